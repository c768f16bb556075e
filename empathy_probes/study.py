"""A study: what was asked, what was found, and the folder it is kept in.

A specification (from the command line, a TOML file or a notebook) is resolved into loaded models and
concepts; then it is run, saved and reloaded. The report is always made from the saved tables, so that the
same folder gives the same bytes. A folder appears complete or not at all: an interrupted study leaves its
work in the activation store, and the same command goes on from there.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import platform
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.numpy import save

from empathy_probes import __version__
from empathy_probes.attenuation import Finding, Settings, load_finding, measure
from empathy_probes.concepts import Concept, load_concept, load_concept_file, load_controls, load_targets
from empathy_probes.design import Design, describe_design, design_study
from empathy_probes.errors import InputError, StoreError
from empathy_probes.extraction import plan_extraction, seconds_per_token
from empathy_probes.ledger import headline_dicts, headlines, ledger_frame
from empathy_probes.pairs import load_pair
from empathy_probes.sites import Site, parse_layers
from empathy_probes.store import HEADER, SCHEMA_VERSION, check_schema, digest_of, open_store, write_file

LIBRARIES = ("torch", "transformer-lens", "transformers", "numpy", "scipy", "scikit-learn")
INTEGER_COLUMNS = {
    "layer", "onset_lower", "onset_upper", "peak_layer", "peak_lower", "peak_upper", "n_scenarios", "scenarios_needed"
}  # fmt: skip
TABLES = ("attenuation", "onset", "ledger")


@dataclass(frozen=True)
class StudySpec:
    """Everything a study is made from; the keys of a study file."""

    base: str
    aligned: str | None = None
    """None with an adapter on the base."""
    adapter: str | None = None
    concepts: tuple[str, ...] = ()
    """Shipped concepts by name; all shipped targets where neither concepts nor stimuli are given."""
    stimuli: tuple[str, ...] = ()
    """Stimuli files of one's own."""
    controls: tuple[str, ...] | None = None
    """Names or files; None: the shipped controls where shipped concepts are used; empty: none."""
    template: str = "both"
    sites: tuple[str, ...] = ("resid_post",)
    layers: str = "all"
    margin: float = 0.10
    draws: int = 1000
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    allow_identical: bool = False
    trust_remote_code: bool = False
    store: str | None = None
    out: str | None = None


@dataclass(frozen=True)
class Study:
    """A finished study."""

    name: str
    manifest: Mapping[str, Any]
    """Versions, models, concepts, options, headlines: plain data."""
    tables: Mapping[str, pd.DataFrame]
    """The contract's tables by file stem."""
    finding: Finding
    """What the tables summarise, per-scenario values included."""


# ---------------------------------------------------------------------------------------------------------
# From a specification to something that can run


def read_spec(path: str | Path) -> StudySpec:
    """Read a study file.

    Relative paths in it are relative to its folder. Unknown keys are errors.

    Raises:
        InputError: the file is missing, is no TOML, or has an unknown key or a value of the wrong type.
    """
    path = Path(path)
    try:
        entries = tomllib.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise InputError(f"no study file at {path}: expected a TOML file; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, expected a TOML file; name the file in it") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML ({error}): expected a study file; repair it") from None
    known = {field.name: str(field.type) for field in fields(StudySpec)}
    for key, value in entries.items():
        if key not in known:
            raise InputError(
                f"{path}: unknown key '{key}', expected one of {', '.join(known)}; correct or remove it"
            )
        entries[key] = _typed(path, key, value, known[key])
    if "base" not in entries:
        raise InputError(f"{path}: got no key 'base', expected the base model's folder or hub id; add it")

    def here(name: str) -> str:
        return str(path.parent / name) if (path.parent / name).exists() else name

    for key in ("base", "aligned", "adapter"):
        if key in entries:
            entries[key] = here(entries[key])
    for key in ("stimuli", "controls"):
        if key in entries:
            entries[key] = tuple(here(name) for name in entries[key])
    return StudySpec(**entries)


def _typed(path: Path, key: str, value: Any, annotation: str) -> Any:
    kind = annotation.removesuffix(" | None")
    if (
        kind.startswith("tuple")
        and isinstance(value, list)
        and all(isinstance(entry, str) for entry in value)
    ):
        return tuple(value)
    plain: dict[str, tuple[type, ...]] = {
        "str": (str,),
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
    }
    # Numbers come back as floats where floats are meant, and true is not a number.
    if type(value) in plain.get(kind, ()):
        return float(value) if kind == "float" else value
    expected = {"str": "a string", "int": "an integer", "float": "a number", "bool": "true or false"}
    raise InputError(
        f"{path}, key '{key}': got {value!r}, expected {expected.get(kind, 'a list of strings')}; correct the value"
    )


def resolve_concepts(spec: StudySpec) -> tuple[tuple[Concept, ...], tuple[Concept, ...]]:
    """Load targets and controls.

    Raises:
        InputError: a name or file is not usable.
    """
    targets = [load_concept(name) for name in spec.concepts]
    targets = [replace(concept, role="target") for concept in targets]
    for path in spec.stimuli:
        targets += load_concept_file(path, "target")
    if not spec.concepts and not spec.stimuli:
        targets = list(load_targets())
    names = {concept.name for concept in targets}
    if spec.controls is None:
        shipped = load_controls() if spec.concepts or not spec.stimuli else ()
        # A control that is asked about as a target cannot also be its own background.
        return tuple(targets), tuple(concept for concept in shipped if concept.name not in names)
    controls: list[Concept] = []
    for name in spec.controls:
        if Path(name).suffix in {".jsonl", ".csv", ".parquet"}:
            controls += load_concept_file(name, "control")
        else:
            controls.append(replace(load_concept(name), role="control"))
    return tuple(targets), tuple(controls)


def resolve(spec: StudySpec) -> Design:
    """Check options and concepts, load the models, render every text: nothing is written.

    Raises:
        InputError: anything that would keep the study from finishing, named.
    """
    check_numbers(spec)
    targets, controls = resolve_concepts(spec)
    pair = load_pair(
        spec.base,
        spec.aligned,
        adapter=spec.adapter,
        dtype=spec.dtype,
        device=spec.device,
        allow_identical=spec.allow_identical,
        trust_remote_code=spec.trust_remote_code,
    )
    return design_study(
        pair,
        targets,
        controls,
        template=spec.template,
        sites=spec.sites,
        layers=parse_layers(spec.layers, pair.base.n_layers),
    )


def check_numbers(spec: StudySpec) -> None:
    """Refuse numbers outside their range.

    Raises:
        InputError: margin, draws or seed.
    """
    if not 0 < spec.margin < 1:
        raise InputError(
            f"margin got {spec.margin}, expected a number between 0 and 1 such as 0.1; choose one"
        )
    if spec.draws < 99:
        raise InputError(
            f"draws got {spec.draws}, expected at least 99, better 999: p values resolve no finer; raise it"
        )
    if spec.seed < 0:
        raise InputError(f"seed got {spec.seed}, expected 0 or more; choose another")


def default_out(spec: StudySpec) -> str:
    """`runs/<last part of base>-vs-<last part of aligned>`."""

    def last(name: str) -> str:
        return Path(name.rstrip("/")).name.replace("@", "-")

    return f"runs/{last(spec.base)}-vs-{last(spec.adapter or spec.aligned or spec.base)}"


# ---------------------------------------------------------------------------------------------------------
# Plan, run


def describe_plan(design: Design) -> dict[str, Any]:
    """What a run will take: texts, tokens, bytes, and seconds from one measured batch. Plain data."""
    prompts = [p for both in design.prompts.values() for side in both for p in side]
    one_side = [p for both in design.prompts.values() for p in both[0]]
    n_rows = len(design.components) * len(design.layers)
    plan = plan_extraction(prompts, n_rows, design.pair.base.d_model)
    sites = [Site(layer) for layer in design.layers]
    rate = seconds_per_token(design.pair.base, one_side, sites)
    parameters = design.pair.base.n_parameters + design.pair.aligned.n_parameters
    width = {"float32": 4, "float64": 8}.get(design.pair.base.dtype, 2)
    return {
        "base": design.pair.base.name,
        "aligned": design.pair.aligned.name,
        "concepts": {c.name: {"role": c.role, "n_scenarios": c.stimuli.n_scenarios} for c in design.concepts},
        "templates": list(design.templates),
        "sites": list(design.components),
        "layers": list(design.layers),
        "prompts": len(prompts),
        "tokens": plan.n_tokens,
        "batches": len(plan.batches),
        "activation_bytes": plan.size,
        "model_bytes": parameters * width,
        "seconds": round(rate * plan.n_padded, 1),
        "flags": list(design.flags),
    }


def run_study(
    design: Design,
    settings: Settings,
    out: str | Path,
    *,
    name: str | None = None,
    store: str | None = None,
    planted: Mapping[str, Any] | None = None,
) -> Study:
    """Run a design and save it as a folder, or load the folder where this very study is already there.

    Args:
        design: from `resolve` or `design_study`.
        settings: margin, draws, seed.
        out: the output folder; created whole at the end.
        name: the report's title.
        store: activation store URL.
        planted: `truth.json` of a phantom, shown beside what was found.

    Raises:
        InputError: the folder holds something else; nothing has run then.
    """
    out = Path(out)
    options = {
        "template": list(design.templates), "sites": list(design.components), "layers": list(design.layers),
        **asdict(settings), "dtype": design.pair.base.dtype, "device": str(design.pair.base.device),
    }  # fmt: skip
    digest = _study_digest(design, options, planted)
    if (done := _finished(out, digest)) is not None:
        return done
    finding = measure(design, settings, open_store(store))
    title = name or f"{_short(design.pair.aligned.name)} against {_short(design.pair.base.name)}"
    manifest = {
        "package": {"name": "empathy-probes", "version": __version__},
        "versions": {
            "python": platform.python_version(),
            **{library: version(library) for library in LIBRARIES},
        },
        **describe_design(design),
        "options": options,
        "planted": dict(planted) if planted else None,
        "notes": _notes(design),
        "headlines": headline_dicts(headlines(finding)),
    }
    tables = {
        "attenuation": finding.to_frame(),
        "onset": finding.onset_frame(),
        "ledger": ledger_frame(finding),
    }
    save_study(Study(title, manifest, tables, finding), out, digest)
    return load_study(out)


def _short(name: str) -> str:
    return Path(name.rstrip("/")).name


def _study_digest(design: Design, options: Mapping[str, Any], planted: Mapping[str, Any] | None) -> str:
    """Equal for equal options, inputs and weights, wherever the files lie."""
    described = describe_design(design)
    for side in ("base", "aligned"):
        del described[side]["name"], described[side]["revision"]
        described[side]["fingerprint"] = getattr(design.pair, side).fingerprint
    return digest_of({"options": options, "planted": planted, **described})


def _finished(out: Path, digest: str) -> Study | None:
    if not out.exists():
        return None
    if not out.is_dir():
        raise InputError(
            f"the output {out} is a file, expected a folder or nothing there; choose another --out"
        )
    record = out / "study.json"
    if not record.is_file():
        if any(out.iterdir()):
            raise InputError(
                f"the output folder {out} holds other files and no study, expected an empty or a new folder; choose another --out"
            )
        return None
    found = _read_record(out)["digest"]
    if found != digest:
        raise InputError(
            f"the output folder {out} holds another study (digest {found[:12]}, this one has {digest[:12]}), expected the "
            "same study or a new folder; choose another --out or remove it"
        )
    return load_study(out)


def _notes(design: Design) -> list[str]:
    notes = []
    if "no_chat_template" in design.flags:
        notes.append("The aligned tokenizer has no chat template, so only raw text was measured.")
    if "own" in design.templates:
        notes.append("Each model read its own template: differences mix the model with its template.")
    if design.pair.identical:
        notes.append("The two models have identical weights: this is what nothing looks like.")
    return notes


# ---------------------------------------------------------------------------------------------------------
# The folder


def save_study(study: Study, out: str | Path, digest: str) -> None:
    """Write the output folder beside its final place, then rename it."""
    out = Path(out)
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for stem, frame in study.tables.items():
            write_file(partial / f"{stem}.csv", frame.to_csv(index=False, float_format="%.10g").encode())
        study.finding.save(partial / "arrays.safetensors")
        _save_vectors(study.finding, partial / "vectors")
        index = {
            path.relative_to(partial).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        record = {
            "schema_version": SCHEMA_VERSION, "name": study.name, "digest": digest,
            "manifest": _jsonable(study.manifest), "results": index,
        }  # fmt: skip
        text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
        write_file(partial / "study.json", text.encode())
        if out.exists():  # empty, as `_finished` made sure
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise InputError(
            f"{out} cannot be written ({error.strerror or error}), expected a writable folder; choose another --out"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save_vectors(finding: Finding, folder: Path) -> None:
    """One file per concept, model, template and site: the difference-of-means direction at every block."""
    for m in finding.measurements:
        rows = [i for i, layer in enumerate(m.layers) if layer >= 0]
        blocks = [m.layers[i] for i in rows]
        for side, model in enumerate(("base", "aligned")):
            direction = m.directions[side][rows]
            if len(blocks) < finding.n_layers:
                whole = direction[:1].repeat(finding.n_layers, 0) * 0
                whole[blocks] = direction
                direction = whole
            header = {
                "schema_version": SCHEMA_VERSION, "concept": m.concept, "model": finding.provenance[model],
                "template": m.template, "site": m.site, "layers": blocks, "layer_convention": "0-based block",
                "estimator": "difference of means, label 1 minus label 0, raw activation units",
                "rms": [float(m.rms[side][i]) for i in rows], "seed": finding.settings.seed,
                "stimuli": finding.provenance["concepts"][m.concept]["digest"],
            }  # fmt: skip
            name = f"{m.concept}.{model}.{m.template}.{m.site}.safetensors"
            data = save(
                {"direction": direction.astype("float32")},
                metadata={HEADER: json.dumps(header, sort_keys=True)},
            )
            write_file(folder / name, data)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_jsonable(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_study(folder: str | Path) -> Study:
    """Load a saved study.

    Raises:
        StoreError: the folder holds none, a file of it is missing or changed, or it is of a newer version.
    """
    folder = Path(folder)
    record = _read_record(folder)
    tables = {}
    for name, expected in record["results"].items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise StoreError(
                f"{path} is missing or was changed after the study was saved, expected the file that study.json lists; run the study again into a new folder"
            )
        if path.suffix == ".csv":
            tables[path.stem] = _read_table(path.read_bytes())
    return Study(record["name"], record["manifest"], tables, load_finding(folder / "arrays.safetensors"))


def _read_table(data: bytes) -> pd.DataFrame:
    frame = pd.read_csv(io.BytesIO(data), keep_default_na=False, na_values=[""])
    for column in frame.columns:
        if column in INTEGER_COLUMNS:
            frame[column] = frame[column].astype("Int64")
        elif column in {"flags", "decision", "mechanism", "dimension", "verdict", "missing"}:
            frame[column] = frame[column].fillna("").astype(str)
    return frame


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / "study.json"
    try:
        record = json.loads(path.read_text(encoding="utf8"))
        check_schema(record["schema_version"], path)
    except FileNotFoundError:
        raise StoreError(
            f"no study in {folder}: got no study.json there, expected a folder that compare or run wrote; check the path"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} is damaged ({type(error).__name__}), expected the record of a study; run the study again"
        ) from None
    return record
