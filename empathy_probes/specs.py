"""What a study is made from: a specification, read from a file or the command line, resolved and planned.

Everything that can go wrong with the inputs goes wrong here, before anything is created.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from empathy_probes.concepts import (
    Concept,
    load_concept,
    load_concept_file,
    load_controls,
    load_targets,
    split_format,
)
from empathy_probes.design import Design, Settings, design_study
from empathy_probes.errors import InputError
from empathy_probes.extraction import plan_extraction, seconds_per_token
from empathy_probes.pairs import load_pair
from empathy_probes.readouts import with_readout
from empathy_probes.sites import Site, parse_layers
from empathy_probes.stages import check_stages
from empathy_probes.stimuli import ReadoutSpec, read_readouts


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
    """Stimuli files of one's own, or public corpora as FORMAT:PATH."""
    controls: tuple[str, ...] | None = None
    """Names, files or FORMAT:PATH; None: the shipped controls where shipped concepts are used; empty: none."""
    template: str = "both"
    sites: tuple[str, ...] = ("resid_post",)
    layers: str = "all"
    stages: tuple[str, ...] = ("encode",)
    readout: str | None = None
    """JSON file: a readout for all concepts, or one per concept by name; wins over those of the stimuli."""
    margin: float = 0.10
    draws: int = 1000
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    allow_identical: bool = False
    trust_remote_code: bool = False
    store: str | None = None
    out: str | None = None

    @property
    def settings(self) -> Settings:
        """Its margin, draws and seed.

        Raises:
            InputError: one of them is out of range.
        """
        return Settings(margin=self.margin, draws=self.draws, seed=self.seed)


def read_spec(path: str | Path) -> StudySpec:
    """Read a study file.

    Relative paths of models and stimuli in it are relative to its folder where they are there; `out` and `store`
    are relative to the working folder, as on the command line. Unknown keys are errors.

    Raises:
        InputError: the file is missing, is no TOML, or has an unknown key or a value of the wrong type.
    """
    path = Path(path)
    try:
        entries = tomllib.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise InputError(f"no study file at {path}: expected a TOML file; check the path") from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}), expected a TOML file; check the path"
        ) from None
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
        format, place = split_format(name)
        beside = path.parent / place
        return f"{format}{':' * bool(format)}{beside}" if beside.exists() else name

    for key in ("base", "aligned", "adapter", "readout"):
        if key in entries and not Path(entries[key]).exists():
            entries[key] = here(entries[key])
    for key in ("stimuli", "controls"):
        if key in entries:
            entries[key] = tuple(here(name) if _is_file(name) else name for name in entries[key])
    if entries.get("controls") == ("none",):
        entries["controls"] = ()
    return StudySpec(**entries)


def _is_file(name: str) -> bool:
    format, place = split_format(name)
    return bool(format) or Path(place).suffix in {".jsonl", ".csv", ".parquet"}


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
        if _is_file(name):
            controls += load_concept_file(name, "control")
        else:
            controls.append(replace(load_concept(name), role="control"))
    return tuple(targets), tuple(controls)


def give_readouts(
    readouts: ReadoutSpec | Mapping[str, ReadoutSpec], *groups: Sequence[Concept]
) -> tuple[tuple[Concept, ...], ...]:
    """The same concepts, asked for what a readout file says.

    Raises:
        InputError: the file names a concept that is not measured.
    """
    names = {concept.name for group in groups for concept in group}
    if isinstance(readouts, ReadoutSpec):
        readouts = dict.fromkeys(names, readouts)
    unknown = sorted(set(readouts) - names)
    if unknown:
        raise InputError(
            f"the readout file names the concept '{unknown[0]}', expected some of {', '.join(sorted(names))}; correct the name"
        )
    return tuple(
        tuple(
            replace(c, stimuli=with_readout(c.stimuli, readouts[c.name])) if c.name in readouts else c
            for c in group
        )
        for group in groups
    )


def resolve(spec: StudySpec) -> Design:
    """Check options and concepts, load the models, render every text: nothing is written.

    Raises:
        InputError: anything that would keep the study from finishing, named.
    """
    _ = spec.settings  # refuses numbers out of range before any model is loaded
    check_stages(spec.stages)
    targets, controls = resolve_concepts(spec)
    if spec.readout is not None:
        targets, controls = give_readouts(read_readouts(spec.readout), targets, controls)
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


def default_out(spec: StudySpec) -> str:
    """`runs/<last part of base>-vs-<last part of aligned>`."""

    def last(name: str) -> str:
        return Path(name.rstrip("/")).name.replace("@", "-")

    return f"runs/{last(spec.base)}-vs-{last(spec.adapter or spec.aligned or spec.base)}"


def describe_plan(design: Design) -> dict[str, Any]:
    """What a run will take: texts, tokens, bytes, and seconds from one measured batch. Plain data."""
    one_side = [p for both in design.prompts.values() for p in both[0]]
    sites = [
        Site(layer, component)
        for component in design.components
        for layer in design.layers
        if layer >= 0 or component == "resid_post"
    ]
    width = design.pair.base.d_model
    plans = [plan_extraction(side, len(sites), width) for both in design.prompts.values() for side in both]
    rate = seconds_per_token(design.pair.base, one_side, sites)
    parameters = design.pair.base.n_parameters + design.pair.aligned.n_parameters
    bytes_each = {"float32": 4, "float64": 8}.get(design.pair.base.dtype, 2)
    return {
        "base": design.pair.base.name,
        "aligned": design.pair.aligned.name,
        "concepts": {c.name: {"role": c.role, "n_scenarios": c.stimuli.n_scenarios} for c in design.concepts},
        "templates": list(design.templates),
        "sites": list(design.components),
        "layers": list(design.layers),
        "prompts": 2 * len(one_side),
        "tokens": sum(plan.n_tokens for plan in plans),
        "batches": sum(len(plan.batches) for plan in plans),
        "activation_bytes": sum(plan.size for plan in plans),
        "model_bytes": parameters * bytes_each,
        "seconds": round(rate * sum(plan.n_padded for plan in plans), 1),
        "flags": list(design.flags),
    }
