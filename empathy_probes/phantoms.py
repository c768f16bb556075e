"""Pairs of small models whose difference is known because it was planted, shipped and made from any checkpoint.

A phantom is an ordinary pair of checkpoints. The shipped ones are a base trained on the grammar and twins made of it by
`planting`; `build_phantom` does the same to a checkpoint of one's own, so that the instrument can be tried on it before a
result about it is believed. The truth is measured on the twin (on thousands of fresh scenarios where the grammar can
make them), not taken from what was intended.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from tqdm.auto import tqdm

from empathy_probes.checkpoints import build_checkpoint, open_checkpoint, save_checkpoint
from empathy_probes.concepts import Concept, load_concept, load_controls, load_targets, save_concept
from empathy_probes.contrasts import FEWEST_SCENARIOS, compare_pair
from empathy_probes.design import Settings
from empathy_probes.errors import InputError, check_seed
from empathy_probes.extraction import extract
from empathy_probes.grammar import CONTROLS, TARGETS, readout, stimuli_rows
from empathy_probes.kernels import pair_strengths
from empathy_probes.models import load_model
from empathy_probes.pairs import ModelPair
from empathy_probes.planting import (
    EXACT_BEFORE,
    FAMILIES,
    KEEPING,
    NEED_CONCEPT,
    READ_AT,
    check_order,
    list_bases,
    make_twin,
    mean_differences,
    open_twin,
    twin_checkpoints,
)
from empathy_probes.prompts import render
from empathy_probes.readouts import ask, check_length, read_out, scenario_coupling
from empathy_probes.redraws import sample_of
from empathy_probes.stats import critical_t, mean_interval
from empathy_probes.stimuli import stimuli_from_rows
from empathy_probes.store import open_store
from empathy_probes.weights import Checkpoint

logger = logging.getLogger(__name__)
_PLACES: dict[str, tuple[str | None, int | None, float | None]] = {
    "identical": (None, None, None), "rotated": (None, None, None), "rescaled": (None, None, None),
    "continued": (None, None, None), "template_shift": (None, None, None), "generic_gain": (None, 2, 0.7),
    "planted": ("valence", 3, 0.25), "erased": ("valence", 2, 0.0), "local": ("valence", 3, 0.25),
    "rerouted": ("valence", 2, 0.25), "unread": ("valence", 1, None), "unsaid": ("valence", None, None),
}  # fmt: skip
SHIPPED: dict[str, tuple[str, str, str | None, int | None, float | None]] = {
    "planted-valence": ("llama-0", "planted", "valence", 3, 0.25),
    "planted-valence-k1": ("llama-0", "planted", "valence", 1, 0.25),
    "planted-valence-k4": ("llama-0", "planted", "valence", 4, 0.25),
    **{
        f"{kind}-{family}": (f"{kind}-0", family, *place)
        for kind in ("llama", "gpt2")
        for family, place in _PLACES.items()
    },
}
"""Shipped twins, every family on either base: base, family, concept, block, what is kept."""
TRUTH_SEED, TRUTH_SCENARIOS, TRUTH_OTHERS, TRUTH_SAID = 1000, 4000, 250, 1000
FEW = 500
VERDICTS = {
    "identical": "preserved", "rescaled": "preserved", "template_shift": "preserved", "rotated": "rotated",
    "generic_gain": "generic_drift", "planted": "erased", "erased": "erased", "local": "local",
    "unread": "encoded_unread", "unsaid": "used_unsaid",
    "scaled_writes": "erased",
}  # fmt: skip
"""What the ledger should say of each family once all stages are run, if what was measured is what the family promises."""
MARGIN = Settings().margin
"""Attenuation that counts, and share of the base's coupling that does."""
# The same text in two frames; both are words of the phantoms' grammar too.
FRAMES = (
    "{% for m in messages %}{{ m.content }}{% if not loop.last %} {% endif %}{% endfor %}",
    "We met . {% for m in messages %}{{ m.content }}{% if not loop.last %} {% endif %}{% endfor %}",
)


def list_phantoms() -> tuple[str, ...]:
    """Names of the shipped twins."""
    return tuple(sorted(SHIPPED))


def phantom_truth(name: str) -> dict[str, Any]:
    """What was planted in a shipped twin, as measured: the contract's `truth.json`.

    Raises:
        InputError: there is no twin of that name.
    """
    _check(name)
    return json.loads(truth_path(name).read_text(encoding="utf8"))


def truth_path(name: str) -> Path:
    """Where the truth of a shipped twin lies, beside its base."""
    kind = SHIPPED[name][0].rsplit("-", 1)[0]
    return Path(str(files("empathy_probes"))) / "data" / "phantoms" / kind / f"{name}.truth.json"


def _check(name: str) -> None:
    if name not in SHIPPED:
        raise InputError(
            f"unknown phantom '{name}': expected one of {', '.join(list_phantoms())}; choose one of these"
        )


def load_phantom(name: str) -> ModelPair:
    """Make a shipped base and its twin, and load them as a pair.

    Raises:
        InputError: there is no twin of that name.
    """
    _check(name)
    base, family, concept, layer, keep = SHIPPED[name]
    return open_twin(list_bases()[base], family, concept, layer, keep)


def write_phantom(name: str, out: str | Path) -> Path:
    """Write `out/base`, `out/aligned` and `out/truth.json`: checkpoints any loader opens.

    Raises:
        InputError: there is no twin of that name, or something is at `out` already.
    """
    truth = phantom_truth(name)
    base, family, concept, layer, keep = SHIPPED[name]
    *pair, tokenizer = twin_checkpoints(list_bases()[base], family, concept, layer, keep)
    return _write(Path(out), pair, _framed(family, tokenizer), truth)


def measure_phantom(name: str) -> dict[str, Any]:
    """Measure the truth of a shipped twin on fresh scenarios of the grammar; of a pair in which nothing is planted, that of valence."""
    base, family, concept, layer, keep = SHIPPED[name]
    read = READ_AT.get(family, "")
    targets, controls = load_phantom_concepts(TRUTH_OTHERS, TRUTH_SEED, read=read)
    own = load_phantom_concepts(TRUTH_SCENARIOS, TRUTH_SEED, names=(concept or TARGETS[0],), read=read)[0][0]
    others = [c for c in (*targets, *controls) if c.name != own.name]
    pair = open_twin(list_bases()[base], family, concept, layer, keep)
    return measure_truth(pair, family, own, others, layer, keep, TRUTH_SEED)


def load_phantom_concepts(
    n_scenarios: int = 100,
    seed: int = 0,
    nuisance: float = 0.0,
    doubt: float = 0.0,
    names: Sequence[str] = (*TARGETS, *CONTROLS),
    read: str = "",
) -> tuple[tuple[Concept, ...], tuple[Concept, ...]]:
    """Targets and controls of the grammar that phantoms were trained on, from fresh scenarios.

    Args:
        n_scenarios: per concept.
        seed: of the scenarios; another seed gives other scenarios.
        nuisance: probability with which anything but the concept differs between the texts of a scenario.
        doubt: probability with which a text shows a label drawn at random.
        names: which of them.
        read: a word at which texts are read instead of at their end: what `read` says in the truth of a `local` twin.

    Raises:
        InputError: the grammar has no concept of a name.
    """
    unknown = set(names) - {*TARGETS, *CONTROLS}
    if unknown:
        raise InputError(
            f"the grammar has no concept '{min(unknown)}', expected some of {', '.join((*TARGETS, *CONTROLS))}; name these"
        )

    def concept(name: str, role: Any) -> Concept:
        rows = stimuli_rows(name, n_scenarios, seed, nuisance, doubt, read)
        stimuli = stimuli_from_rows([{**row, "readout": readout(name)} for row in rows], name)
        return Concept(name, role, "", "", "user", f"{name} in the phantom grammar", stimuli)

    targets = tuple(concept(n, "target") for n in TARGETS if n in names)
    return targets, tuple(concept(n, "control") for n in CONTROLS if n in names)


# ---------------------------------------------------------------- from any checkpoint


def build_phantom(
    model: str | Path,
    *,
    family: str,
    out: str | Path,
    concept: Concept | str | None = None,
    layer: int | None = None,
    keep: float | None = None,
    others: Sequence[Concept | str] | None = None,
    seed: int = 0,
    through: int | None = None,
) -> Path:
    """Make a twin with planted truth from a checkpoint, so that the instrument can be tried on it first.

    Args:
        model: hub id or folder.
        family: what is done to the twin (`planting.FAMILIES`).
        out: folder for `base`, `aligned` and `truth.json`; new or empty.
        concept: what is planted; the name of a shipped concept, or one's own, of 60 scenarios and more. The edit is fitted to
            half of them, and the truth measured on the others, which are written beside it as `NAME.jsonl`.
        layer: 0-based block; the middle one by default, the last one for `unsaid`.
        keep: what is left of the concept there, 0 to 1; a quarter by default. Families that leave none, or all, take no notice.
        others: concepts to leave alone, or their names; the other shipped ones by default. Halved likewise. Every one of
            them is measured: on a model of millions of parameters the fewer of them, the sooner.
        seed: of random choices.
        through: `scaled_writes` scales what the blocks from `layer` to this one write; to the last one by default.

    Returns:
        `out`.

    Raises:
        InputError: something cannot be done; nothing has been written then.
    """
    out = Path(out)
    _check_free(out)
    check_seed(seed)
    config, tensors, tokenizer = open_checkpoint(model)
    checkpoint = Checkpoint(config, tensors)
    asked = _loaded(concept) if concept is not None else None
    around = _others(asked) if others is None else [_loaded(c) for c in others]
    if asked is not None and asked.name in [c.name for c in around]:
        raise InputError(
            f"others got '{asked.name}', expected concepts beside the one that is planted; leave it out"
        )
    if keep and family in FAMILIES and family not in KEEPING:
        logger.warning(
            "keep got %g and has no part in '%s': 'planted' leaves a part of a concept", keep, family
        )
    if family == "erased":
        keep = 0.0
    keep = 0.25 if keep is None else keep
    place = check_order(checkpoint, family, asked, layer, keep, through)
    if family in NEED_CONCEPT and asked is not None and asked.stimuli.n_scenarios < 2 * FEWEST_SCENARIOS:
        raise InputError(
            f"'{asked.name}' has {asked.stimuli.n_scenarios} scenarios, expected at least {2 * FEWEST_SCENARIOS}: the edit is fitted "
            "to half of them and measured on the other half; add scenarios"
        )
    running = load_model(model, device="cpu", dtype="float32")
    logger.info(
        "the twin is made, and measured on the texts of every concept: seconds to minutes on a small model"
    )
    store = open_store("memory://phantom")
    guards, fitted, fresh = [], asked, asked
    if family in NEED_CONCEPT and asked is not None:
        fitted, fresh = _halves(asked, seed)
        few = [c.name for c in around if c.stimuli.n_scenarios < 2 * FEWEST_SCENARIOS]
        if few:
            logger.warning(
                "%s: fewer than %d scenarios, measured on the texts that the edit was fitted to leave alone; that they did not move says "
                "little", ", ".join(few), 2 * FEWEST_SCENARIOS,
            )  # fmt: skip
        pairs = [(c, c) if c.name in few else _halves(c, seed) for c in around]
        guards = [mean_differences(running, c, store)[place] for c, _ in pairs if c.stimuli.kind == "binary"]
        around = [c for _, c in pairs]
    made = make_twin(checkpoint, running, family, fitted, guards, place, keep, seed, through)
    pair = ModelPair(*(
        load_model((build_checkpoint(c.config, c.tensors), tokenizer), device="cpu", copy=False, name=side)
        for c, side in zip(made, ("base", "aligned"), strict=True)
    ))  # fmt: skip
    # What is not said is missing at the head, at no block.
    at = place if family in NEED_CONCEPT and family != "unsaid" else None
    truth = measure_truth(
        pair, family, fresh, around, at, keep if family in (*KEEPING, "erased") else None, seed
    )
    if fitted is None or fitted is fresh:
        return _write(out, made, _framed(family, tokenizer), truth)
    truth["n_scenarios_fitted"] = fitted.stimuli.n_scenarios
    return _write(out, made, _framed(family, tokenizer), truth, fresh)


def _loaded(concept: Concept | str) -> Concept:
    return load_concept(concept) if isinstance(concept, str) else concept


def _halves(concept: Concept, seed: int) -> tuple[Concept, Concept]:
    """Scenarios to fit an edit to, and others to measure it on.

    An edit takes away what is peculiar to the texts it is fitted to as well: measured on those, nothing was left of a concept
    of which fresh scenarios had four fifths (32 scenarios, 256 dimensions).
    """
    units = concept.stimuli.units
    drawn = np.random.default_rng([seed, 71]).permutation(len(units))
    halves = [{units[i] for i in half} for half in (drawn[: len(units) // 2], drawn[len(units) // 2 :])]
    one, other = (replace(concept, stimuli=concept.stimuli.of_units(half)) for half in halves)
    return one, other


def _others(concept: Concept | None) -> list[Concept]:
    return [c for c in (*load_targets(), *load_controls()) if concept is None or c.name != concept.name]


def _framed(family: str, tokenizer: Any) -> tuple[Any, Any]:
    import copy

    if family != "template_shift":
        return tokenizer, tokenizer
    both = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    for one, frame in zip(both, FRAMES, strict=True):
        one.chat_template = frame
    return both


def measure_truth(
    pair: ModelPair,
    family: str,
    concept: Concept | None,
    others: Sequence[Concept],
    layer: int | None,
    keep: float | None,
    seed: int,
) -> dict[str, Any]:
    """Measure what a twin does to a concept and to others at every block: the contract's `truth.json`.

    Raises:
        InputError: blocks before the planted one differ, so that the twin is not what it should be.
    """
    curves: dict[str, dict[str, float | None]] = {}
    ends: dict[str, list[float | None]] = {}
    asked_of = (*([concept] if concept else []), *others)
    for asked in tqdm(asked_of, desc="concepts measured", unit="concept", leave=False, disable=None):
        if asked.stimuli.kind == "binary":
            curves[asked.name], found = _attenuation(pair, asked)
            ends = found if asked is concept else ends
    own = curves.pop(concept.name, {}) if concept else {}
    # Writes scaled from the first block on are those of the embedding as well.
    first = 0 if layer == 0 and family == "scaled_writes" else -1
    if layer is not None and family in EXACT_BEFORE and any(own[str(i)] for i in range(first, layer)):
        raise InputError(
            f"the twin differs before block {layer} ({own}), expected exactly 0 there; this architecture cannot be edited so"
        )
    at = own.get(str(layer))
    coupling, heard = _coupling(pair, concept) if concept else (None, True)
    read = concept.stimuli.items[0].read if concept and concept.stimuli.read_kind == "span" else None
    unknown = family in NEED_CONCEPT and layer is not None and at is None
    if unknown and concept is not None:
        logger.warning(
            "the base does not carry '%s' detectably at block %d in these %d scenarios: the truth of the twin is unknown there; "
            "choose another block, concept or more scenarios", concept.name, layer, concept.stimuli.n_scenarios,
        )  # fmt: skip
    return {
        "schema_version": 1, "family": family, "concept": concept.name if concept and family in NEED_CONCEPT else None,
        "layer": layer, "keep_intended": keep,
        "keep_achieved": None if keep is None or at is None else round(1 - at, 4), "attenuation_by_layer": own,
        "positions": "read" if family == "local" else "all",
        "n_scenarios": concept.stimuli.n_scenarios if concept else None, "seed": seed,
        "verdict": None if unknown or not heard else _verdict(family, at, coupling), "other_concepts": curves,
        "n_scenarios_other": max((c.stimuli.n_scenarios for c in others), default=0),
        **({"read": read} if read else {}), **({"coupling": coupling} if coupling else {}),
        **({"attenuation_interval_by_layer": ends} if ends else {}),
    }  # fmt: skip


def _verdict(family: str, attenuation: float | None, coupling: dict[str, float] | None) -> str | None:
    """What the ledger should say by what was measured; None where that is unknown, or fits no row of its table.

    A concept that is weaker where it is read and said as in the base is local; if less, the answer is formed at that place.
    """
    planned = VERDICTS.get(family)
    if family not in NEED_CONCEPT:
        return planned
    encoded = said = ""
    if attenuation is not None:
        encoded = "same" if abs(attenuation) <= MARGIN else "less" if attenuation > 0 else "more"
    if coupling is not None:
        base, aligned = coupling["base"], coupling["aligned"]
        same = abs(aligned - base) <= MARGIN * abs(base)
        said = "same" if same else "less" if abs(aligned) < abs(base) else "more"
    if encoded == said == "same":
        return "preserved"
    if family == "generic_gain":
        return planned if encoded == "less" else None
    if family in ("unread", "unsaid"):
        kept = encoded == "same" or family == "unsaid"
        return planned if kept and said in ("less", "") else None
    if encoded != "less":
        return None
    # What nobody asked of a local twin is what makes it one.
    return {"same": "local", "less": "erased", "": None if family == "local" else "erased"}.get(said)


def _coupling(pair: ModelPair, concept: Concept) -> tuple[dict[str, float] | None, bool]:
    """How far the concept moves the answer in either model, in nats; None where its texts do not say what is asked.

    And whether the base's is told from 0: of a model that does not answer by the concept nothing can be said to be said less.
    """
    items = concept.stimuli.items
    if any(item.readout is None for item in items):
        return None, True
    some = set(list(dict.fromkeys(item.scenario for item in items))[:TRUTH_SAID])
    said = replace(concept.stimuli, items=tuple(item for item in items if item.scenario in some))
    prompts = render(pair.base.tokenizer, said, "raw", concept.speaker)
    try:
        asked = ask(pair.base.tokenizer, said, prompts, "raw")
        check_length(pair.base, asked)
    except InputError as error:
        logger.warning("what is asked after the texts of '%s' cannot be asked here, so coupling is not in the truth: %s",
                       concept.name, error)  # fmt: skip
        return None, True
    couplings = [scenario_coupling(read_out(m, asked), said) for m in pair.models]
    found = [round(float(c.mean()), 4) for c in couplings]
    base = mean_interval(couplings[0])
    return dict(zip(("base", "aligned"), found, strict=True)), bool(base.lower > 0 or base.upper < 0)


def _attenuation(
    pair: ModelPair, concept: Concept
) -> tuple[dict[str, float | None], dict[str, list[float | None]]]:
    """Attenuation of the strength after each block, and of few scenarios its 95 % interval; None where nothing is known."""
    layers = tuple(range(-1, pair.base.n_layers))
    store = open_store("memory://truth")
    acts = []
    for model in pair.models:
        prompts = render(model.tokenizer, concept.stimuli, "raw", concept.speaker)
        acts.append(extract(model, prompts, ("resid_post",), layers, store)["resid_post"])
        store.clear()
    sample = sample_of(concept, acts)
    base, aligned = sample.u
    same = (sample.differences[0] == sample.differences[1]).all((0, 2))
    detected = base > 0
    ends: dict[str, list[float | None]] = {}
    if sample.n <= FEW:  # with thousands of scenarios every base that is positive is detected
        strengths = pair_strengths(sample.differences, sample.squares)
        detected = strengths.u[0] > critical_t(sample.n - 1) * strengths.se[0]
        if sample.n >= FEWEST_SCENARIOS:
            found = compare_pair(concept.name, concept.stimuli.units, strengths, layers)
            detected, curve = found.base.lower > 0, found.attenuation
            ends = {
                str(i): [_rounded(x) for x in (curve.lower[k], curve.upper[k])] for k, i in enumerate(layers)
            }
    with np.errstate(divide="ignore", invalid="ignore"):
        lost = np.where(same, 0.0, np.where(detected, 1 - np.sqrt(np.maximum(aligned, 0) / base), np.nan))
    return {str(i): _rounded(x) for i, x in zip(layers, lost, strict=True)}, ends


def _rounded(x: float) -> float | None:
    return round(float(x), 4) if np.isfinite(x) else None


def _check_free(out: Path) -> None:
    """Refuse a place where something is or nothing can be written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"'{out}' is there already, expected a new or empty folder; choose another --out")
    there = out.resolve()
    above = next(parent for parent in (there, *there.parents) if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"'{out}' cannot be written, expected a writable folder; choose another --out")


def _write(
    out: Path,
    pair: Sequence[Checkpoint],
    tokenizers: Sequence[Any],
    truth: dict[str, Any],
    measured_on: Concept | None = None,
) -> Path:
    """Write a phantom whole or not at all."""
    _check_free(out)
    there = out.resolve()  # "." has no name to put a dot before
    unfinished = there.parent / f".{there.name}.{os.getpid()}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for side, checkpoint, tokenizer in zip(("base", "aligned"), pair, tokenizers, strict=True):
            made = build_checkpoint(checkpoint.config, checkpoint.tensors)
            save_checkpoint(made, tokenizer, unfinished / side)
        text = json.dumps(truth, indent=1, ensure_ascii=False) + "\n"
        (unfinished / "truth.json").write_text(text, encoding="utf8")
        if measured_on is not None:
            save_concept(measured_on, unfinished)
        if there.exists():
            there.rmdir()
        unfinished.rename(there)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"{out} cannot be written ({why}): expected a writable place with room for two models; choose another"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out
