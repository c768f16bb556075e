"""The command line: the same verbs as the notebook, with exit codes other programs can rely on.

0 done · 2 bad input, one sentence on standard error · 3 an audit failed · 130 interrupted, run the same command
to go on · 1 a defect of ours. Results go to standard output, progress and messages to standard error.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empathy_probes.arguments import build_parser
from empathy_probes.errors import EmpathyProbesError, InputError

if TYPE_CHECKING:
    from empathy_probes.specs import StudySpec
    from empathy_probes.study import Study

DEMO_PHANTOM = "planted-valence"
DEMO_SCENARIOS = 60
DEMO_NEUTRAL = 500
# Attenuation of another concept from which on `phantom` says that its edit moved it.
MOVED = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        args = build_parser().parse_args(argv)
        _configure(args)
        return COMMANDS[args.command](args)
    except EmpathyProbesError as error:
        print(f"empathy-probes: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "empathy-probes: interrupted; run the same command again to go on where it stopped",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _configure(args: argparse.Namespace) -> None:
    if not sys.stderr.isatty() or args.quiet:
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    level = logging.ERROR if args.quiet else logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=logging.ERROR, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("empathy_probes").setLevel(level)


def _split(values: Sequence[str], option: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for value in values for part in value.split(","))
    if "" in parts:
        raise InputError(
            f"{option} got an empty name, expected names separated by commas; name one or leave the option out"
        )
    return parts


def _names(values: Sequence[str], option: str) -> tuple[str, ...] | None:
    """Names, no name at all where `none` is said, or None where nothing is."""
    names = _split(values, option)
    if "none" in names and len(names) > 1:
        raise InputError(f"{option} got none beside names, expected either; drop one of them")
    return () if names == ("none",) else names or None


def _demo(args: argparse.Namespace) -> int:
    from empathy_probes.design import Settings, design_study
    from empathy_probes.grammar import neutral_texts
    from empathy_probes.phantoms import load_phantom, load_phantom_concepts, phantom_truth
    from empathy_probes.stages import STAGES
    from empathy_probes.study import run_study

    targets, controls = load_phantom_concepts(DEMO_SCENARIOS)
    design = design_study(
        load_phantom(DEMO_PHANTOM), targets, controls, template="raw", neutral=neutral_texts(DEMO_NEUTRAL)
    )
    study = run_study(
        design, Settings(), args.out, name="Demo: a planted attenuation of valence", stages=STAGES, store=args.store,
        planted=phantom_truth(DEMO_PHANTOM),
    )  # fmt: skip
    return _finish(study, args)


def _compare(args: argparse.Namespace) -> int:
    from empathy_probes.specs import StudySpec

    controls = _names(args.controls, "--controls")
    if args.aligned is None and args.adapter is None:
        raise InputError(
            "compare got one model, expected BASE and ALIGNED, or --adapter with BASE; name the other"
        )
    spec = StudySpec(
        base=args.base, aligned=args.aligned, adapter=args.adapter, concepts=_split(args.concepts, "--concepts"),
        stimuli=tuple(args.stimuli), controls=controls,
        template=args.template, sites=_split(args.sites, "--sites") or ("resid_post",), layers=args.layers,
        stages=_split(args.stages, "--stages") or ("encode",), readout=args.readout, margin=args.margin,
        draws=args.draws, seed=args.seed, dtype=args.dtype, device=args.device, allow_identical=args.allow_identical,
        trust_remote_code=args.trust_remote_code, store=args.store, out=args.out,
    )  # fmt: skip
    return _run_spec(spec, args)


def _run(args: argparse.Namespace) -> int:
    from empathy_probes.specs import read_spec

    return _run_spec(read_spec(args.study), args)


def _run_spec(spec: StudySpec, args: argparse.Namespace) -> int:
    from empathy_probes.specs import default_out, describe_plan, resolve
    from empathy_probes.stages import plan_questions
    from empathy_probes.study import run_study

    design = resolve(spec)
    if args.dry_run:
        plan_questions(design, spec.stages)
        plan = describe_plan(design)
        print(json.dumps(plan, indent=1, ensure_ascii=False) if args.json else _plan_text(plan))
        return 0
    args.out = args.out or spec.out or default_out(spec)
    return _finish(run_study(design, spec.settings, args.out, stages=spec.stages, store=spec.store), args)


def _plan_text(plan: dict[str, Any]) -> str:
    roles = [entry["role"] for entry in plan["concepts"].values()]
    lines = [
        f"base        {plan['base']}",
        f"aligned     {plan['aligned']}",
        f"concepts    {roles.count('target')} targets, {roles.count('control')} controls",
        f"templates   {', '.join(plan['templates'])}",
        f"places      {', '.join(plan['sites'])} at {len(plan['layers'])} layers (the input of block 0 included)",
        f"texts       {plan['prompts']:,} ({plan['tokens']:,} tokens in {plan['batches']:,} batches)",
        f"memory      {_size(plan['model_bytes'])} for both models, {_size(plan['activation_bytes'])} of pooled activations",
        f"time        about {plan['seconds']:.0f} s on this device, from one measured batch (nothing taken from the store)",
    ]
    return "\n".join(lines)


def _size(n: int | float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def _finish(study: Study, args: argparse.Namespace) -> int:
    from empathy_probes.ledger import percent
    from empathy_probes.report import write_report

    path = write_report(study, Path(args.out) / "report.html")
    found = study.manifest["headlines"]
    if args.json:
        print(
            json.dumps(
                {"name": study.name, "out": str(args.out), "report": str(path), "headlines": found},
                ensure_ascii=False,
            )
        )
        return 0
    if study.manifest["planted"]:
        truth = study.manifest["planted"]
        print(
            f"Planted: {truth['concept']} from block {truth['layer']} on, attenuated by {percent(1 - truth['keep_achieved'])} there."
        )
    several = len({(h["template"], h["site"]) for h in found}) > 1
    for h in found:
        place = f" ({h['template']}, {h['site']})" if several else ""
        print(f"{h['concept']}{place}: {h['sentence']}")
    print(f"Report: {path}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from empathy_probes.report import write_report
    from empathy_probes.study import load_study

    print(write_report(load_study(args.folder), Path(args.folder) / "report.html"))
    return 0


def _concepts(args: argparse.Namespace) -> int:
    if args.markdown and (args.action != "audit" or args.json):
        raise InputError(
            "--markdown got no audit, or --json beside it, expected 'concepts audit --markdown'; drop one of them"
        )
    return _audit(args) if args.action == "audit" else _list_concepts(args)


def _list_concepts(args: argparse.Namespace) -> int:
    from empathy_probes.concepts import MECHANISMS, list_concepts, load_concept

    rows: list[dict[str, Any]] = [
        {
            "name": concept.name, "role": concept.role, "mechanism": concept.mechanism, "dimension": concept.dimension,
            "speaker": concept.speaker, "n_scenarios": concept.stimuli.n_scenarios, "digest": concept.digest,
        }
        for concept in map(load_concept, list_concepts())
    ]  # fmt: skip
    if args.json:
        print(json.dumps(rows))
        return 0
    for mechanism in (*MECHANISMS, ""):
        print(mechanism or "controls")
        for row in rows:
            if (row["mechanism"] if row["role"] == "target" else "") == mechanism:
                print(
                    f"  {row['name']:<24} {row['n_scenarios']:>3} scenarios  {row['speaker']:<12}  {row['dimension']:<10}  {row['digest'][:12]}"
                )
    return 0


def _audit(args: argparse.Namespace) -> int:
    from empathy_probes.audit import audit_concepts, audit_library, shipped_concepts
    from empathy_probes.audit_tables import describe_audit, docs_page, plain_audit
    from empathy_probes.concepts import load_concept, load_concept_file, split_format

    if args.names:
        concepts = [
            concept
            for name in args.names
            for concept in (
                load_concept_file(name)
                if Path(name).suffix or split_format(name)[0]
                else [load_concept(name)]
            )
        ]
        audits = audit_concepts(concepts, shipped_concepts())
    else:
        audits = audit_library()
    if args.json:
        print(json.dumps([plain_audit(audit) for audit in audits], ensure_ascii=False))
    elif args.markdown:
        print(docs_page(audits), end="")
    else:
        print("\n\n".join(map(describe_audit, audits)))
    return 3 if any(audit.verdict == "fail" for audit in audits) else 0


def _lineages(args: argparse.Namespace) -> int:
    from empathy_probes.lineages import list_lineages, load_lineage

    found = [load_lineage(name) for name in list_lineages()]
    if args.json:
        rows = [
            {"name": x.name, "family": x.family, "role": x.role, "stages": {s.name: s.model for s in x.stages}} for x in found
        ]  # fmt: skip
        print(json.dumps(rows))
        return 0
    for x in found:
        print(f"{x.name} ({x.family}, {x.role})")
        for stage in x.stages:
            print(f"  {stage.name:<10} {stage.model}")
    return 0


def _phantom(args: argparse.Namespace) -> int:
    from empathy_probes.concepts import load_concept_file
    from empathy_probes.ledger import percent
    from empathy_probes.phantoms import build_phantom

    if args.concept and args.stimuli:
        raise InputError("phantom got --concept and --stimuli, expected one of them; drop the other")
    concept: Any = args.concept
    if args.stimuli:
        found = load_concept_file(args.stimuli)
        if len(found) > 1:
            raise InputError(f"{args.stimuli} holds {len(found)} concepts, expected one; split the file")
        concept = found[0]
    out = build_phantom(
        args.model, family=args.family, concept=concept, layer=args.layer, keep=args.keep, seed=args.seed, out=args.out,
        through=args.through, others=_names(args.others, "--others"),
    )  # fmt: skip
    truth = json.loads((out / "truth.json").read_text(encoding="utf8"))
    if args.json:
        print(json.dumps({"out": str(out), "truth": truth}, ensure_ascii=False))
        return 0
    print(f"{args.family}: {out / 'base'} and {out / 'aligned'}")
    curve = {int(k): v for k, v in truth["attenuation_by_layer"].items() if int(k) >= 0}
    if curve:
        shown = ", ".join(f"block {k} {'unknown' if v is None else percent(v)}" for k, v in curve.items())
        low, high = truth.get("attenuation_interval_by_layer", {}).get(str(truth["layer"]), (None, None))
        least = "any amplification" if low is None else percent(low)
        at = (
            f" 95 % interval at block {truth['layer']}: {least} to {percent(high)}."
            if high is not None
            else ""
        )
        fresh = " that the edit was not fitted to" if "n_scenarios_fitted" in truth else ""
        name = getattr(concept, "name", concept)
        print(f"Attenuation of {name}, measured on {truth['n_scenarios']} scenarios{fresh}: {shown}.{at}")
    moved = [
        f"{name} ({percent(most)})"
        for name, curve in truth["other_concepts"].items()
        if abs(most := max((v or 0.0 for v in curve.values()), key=abs)) > MOVED
    ]
    if moved:
        print(f"It moved other concepts too, at most: {', '.join(moved)}.")
    print(f"Try it: {_trial(args, out, truth)}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from empathy_probes.doctor import examine

    found = examine(
        args.model, dtype=args.dtype, device=args.device, trust_remote_code=args.trust_remote_code
    )
    if args.json:
        checks = [{"check": c.check, "verdict": c.verdict, "words": c.words} for c in found.checks]
        print(
            json.dumps(
                {
                    "model": found.model,
                    "architecture": found.architecture,
                    "verdict": found.verdict,
                    "checks": checks,
                },
                ensure_ascii=False,
            )
        )
        return 0
    for c in found.checks:
        print(f"{c.verdict:<4}  {c.check:<10}  {c.words}")
    return 0


def _trial(args: argparse.Namespace, out: Path, truth: dict[str, Any]) -> str:
    """The command that looks for what was planted, on texts that the edit has not seen."""
    words = ["empathy-probes", "compare", str(out / "base"), str(out / "aligned")]
    if "n_scenarios_fitted" in truth:
        words += ["--stimuli", str(out / f"{truth['concept']}.jsonl")]
    elif args.stimuli:
        words += ["--stimuli", args.stimuli]
    elif args.concept:
        words += ["--concepts", args.concept]
    if args.family in ("local", "unread", "unsaid"):
        words += ["--stages", "encode,use,express"]
    if args.family in ("identical", "template_shift"):
        words += ["--allow-identical"]
    return shlex.join(words)


def _calibrate(args: argparse.Namespace) -> int:
    from empathy_probes.calibration import calibrate
    from empathy_probes.scorepage import write_scorecard

    card = calibrate(
        args.out, quick=args.quick, phantoms=args.phantoms, bases=args.bases, redraws=args.redraws, workers=args.workers,
        seed=args.seed,
    )  # fmt: skip
    page = write_scorecard(card, Path(args.out) / "scorecard.html")
    judged = [row for row in card.rows if row.met is not None]
    if args.json:
        missed = [{"family": r.family, "architecture": r.architecture, "concept": r.concept, "n": r.n, "metric": r.metric,
                   "value": r.value, "lower": r.lower, "upper": r.upper, "target": r.target} for r in card.missed]  # fmt: skip
        print(
            json.dumps({"out": str(args.out), "report": str(page), "judged": len(judged), "missed": missed})
        )
        return 0
    print(
        f"{len(judged) - len(card.missed)} of {len(judged)} targets met on {card.provenance['pairs']} pairs."
    )
    for r in card.missed:
        what = " ".join(part for part in (r.family, r.concept) if part)
        print(
            f"missed: {r.metric} {r.value:.3f} [{r.lower:.3f}, {r.upper:.3f}], target {r.target}: {what}, {r.architecture}, n = {r.n}"
        )
    print(f"Scorecard: {page}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from empathy_probes.interchange import read_vector, write_vector

    vector = read_vector(args.source, args.source_format, args.layer)
    made = write_vector(vector, args.target, args.target_format)
    left_out = [*vector.notes, *made.left_out]
    if args.json:
        print(
            json.dumps(
                {"out": str(made.path), "format": made.format, "layers": list(made.layers), "d_model": vector.d_model,
                 "left_out": left_out},
                ensure_ascii=False,
            )
        )  # fmt: skip
        return 0
    blocks = ", ".join(str(layer) for layer in made.layers)
    print(f"{made.path} ({made.format}): blocks {blocks}, width {vector.d_model}")
    for sentence in left_out:
        print(f"not carried: {sentence}")
    return 0


def _store(args: argparse.Namespace) -> int:
    from empathy_probes.store import open_store

    store = open_store(args.store)
    cleared = args.action == "clear"
    info = store.clear() if cleared else store.info()
    if args.json:
        print(
            json.dumps(
                {
                    "url": info.url,
                    "entries": info.entries,
                    "parts": info.parts,
                    "bytes": info.size,
                    "cleared": cleared,
                }
            )
        )
    else:
        verb = "removed" if cleared else "holds"
        print(
            f"{info.url} {verb} {info.entries} entries and {info.parts} unfinished parts, {_size(info.size)}"
        )
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo, "compare": _compare, "run": _run, "report": _report, "concepts": _concepts, "lineages": _lineages,
    "phantom": _phantom, "doctor": _doctor, "calibrate": _calibrate, "convert": _convert, "store": _store,
}  # fmt: skip
