"""Concepts: a stimulus set together with what it is meant to measure.

Shipped concepts live in `data/concepts/` as one TOML (what it is) and one JSON Lines file (its texts);
adding a concept is adding these two files. A stimuli file of one's own becomes a concept by its path.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from empathy_probes.errors import InputError
from empathy_probes.public_data import FORMATS
from empathy_probes.stimuli import StimulusSet, load_stimuli

MECHANISMS = ("sentiment_attenuation", "granularity_mismatch", "conflict_avoidance", "linguistic_distancing")
DIMENSIONS = ("cognitive", "cultural", "relational")
SPEAKERS = ("user", "assistant", "third_person")
REQUIRED = ("name", "role", "mechanism", "dimension", "speaker", "read", "description")
OPTIONAL = ("variant_of", "labels", "exceptions", "author", "date", "version", "licence", "notes")
TABLES = ("labels", "exceptions")


@dataclass(frozen=True)
class Concept:
    """Something probed, with its texts."""

    name: str
    role: Literal["target", "control"]
    """A control is a contrast that has nothing to do with affect or stance."""
    mechanism: str
    """One of `MECHANISMS`; empty for controls and stimuli of one's own."""
    dimension: str
    """One of `DIMENSIONS`; empty for controls and stimuli of one's own."""
    speaker: str
    """Whose state the text carries; decides the role of a plain text in a chat template."""
    description: str
    stimuli: StimulusSet
    labels: dict[str, str] = field(default_factory=dict)
    """What each label means."""
    exceptions: dict[str, str] = field(default_factory=dict)
    """Why a check of the audit may be missed, by its name."""
    variant_of: str = ""
    """Of a variant, the concept that it asks of another speaker; empty otherwise."""

    @property
    def digest(self) -> str:
        """Digest of the texts, labels and read positions, and of the speaker, which a chat template reads."""
        return self.stimuli.digest if self.speaker != "assistant" else f"{self.stimuli.digest}-assistant"


def _folder() -> Path:
    return Path(str(files("empathy_probes"))) / "data" / "concepts"


def list_concepts() -> tuple[str, ...]:
    """Names of the shipped concepts and their variants, targets first, alphabetical within a role."""
    roles = {path.stem: _read_toml(path)["role"] for path in _folder().glob("*.toml")}
    return tuple(sorted(roles, key=lambda name: (roles[name] != "target", name)))


def load_concept(name: str) -> Concept:
    """Load a shipped concept by its name.

    Raises:
        InputError: there is no concept of that name; the message lists those that exist.
    """
    path = _folder() / f"{name}.toml"
    if path.parent != _folder() or not path.is_file():
        raise InputError(
            f"unknown concept '{name}': expected one of {', '.join(list_concepts())}; choose one of these, or pass a stimuli file"
        )
    return _described(path)


def load_targets() -> tuple[Concept, ...]:
    """All shipped targets, each of the speaker it is mostly asked of; variants are measured where they are named."""
    concepts = map(load_concept, list_concepts())
    return tuple(concept for concept in concepts if concept.role == "target" and not concept.variant_of)


def load_controls() -> tuple[Concept, ...]:
    """All shipped control concepts."""
    return tuple(concept for concept in map(load_concept, list_concepts()) if concept.role == "control")


def load_concept_file(path: str | Path, role: Literal["target", "control"] = "target") -> tuple[Concept, ...]:
    """The concepts of a stimuli file of one's own, or of a public corpus named as `FORMAT:PATH`.

    A TOML of the same stem beside the file describes it as shipped concepts are described; without one
    the speaker is the user. `role` always wins: a file named as a control is a control.
    """
    format, place = split_format(str(path))
    if format:
        speaker = FORMATS[format].speaker
        return tuple(
            Concept(stimuli.concept, role, "", "", speaker, f"{format}, paired by length", stimuli)
            for stimuli in load_stimuli(place, format)
        )
    path = Path(path)
    described = path.with_suffix(".toml")
    if described.is_file() and "base" not in _parse_toml(described):  # a study file may share the stem
        return (replace(_described(described, path), role=role),)
    return tuple(
        Concept(stimuli.concept, role, "", "", "user", f"stimuli of {path.name}", stimuli)
        for stimuli in load_stimuli(path)
    )


def save_concept(concept: Concept, folder: Path) -> Path:
    """Write a concept as `NAME.jsonl` with a description beside it, as `load_concept_file` reads it; returns the stimuli file."""
    path = folder / f"{concept.name}.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in concept.stimuli.to_rows()]
    path.write_text("\n".join(lines) + "\n", encoding="utf8")
    described: dict[str, Any] = {key: getattr(concept, key) for key in REQUIRED if key != "read"}
    described |= {key: getattr(concept, key) for key in ("variant_of", *TABLES) if getattr(concept, key)}
    # What a JSON string may hold, a TOML string may.
    said = [
        f"{key} = {_toml(value)}" for key, value in {**described, "read": concept.stimuli.read_kind}.items()
    ]
    path.with_suffix(".toml").write_text("\n".join(said) + "\n", encoding="utf8")
    return path


def _toml(value: str | dict[str, str]) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return "{" + ", ".join(f"{_toml(key)} = {_toml(entry)}" for key, entry in value.items()) + "}"


def split_format(name: str) -> tuple[str, str]:
    """The format and the place of a public corpus named as `FORMAT:PATH`; of a plain path, no format."""
    format, _, place = name.partition(":")
    return (format, place) if format in FORMATS else ("", name)


def load_neutral() -> tuple[str, ...]:
    """Neutral texts of no concept: for maps between models, rms for doses, and perplexity."""
    path = _folder().parent / "neutral.jsonl"
    return tuple(json.loads(line)["text"] for line in path.read_text(encoding="utf8").splitlines() if line)


def _parse_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not TOML ({error}): expected a concept description; repair the file"
        ) from None


def _read_toml(path: Path) -> dict[str, Any]:
    entry = _parse_toml(path)
    missing = [key for key in REQUIRED if key not in entry]
    unknown = [key for key in entry if key not in REQUIRED + OPTIONAL]
    if missing or unknown:
        raise InputError(
            f"{path}: missing keys [{', '.join(missing)}], unknown keys [{', '.join(unknown)}], expected "
            f"{', '.join(REQUIRED)} and optionally {', '.join(OPTIONAL)}; complete the description"
        )
    types = {
        "read": (str, dict),
        **dict.fromkeys(TABLES, (dict,)),
        "version": (int, str),
        "date": (str, date),
    }
    for key, value in entry.items():
        if not isinstance(value, types.get(key, (str,))) or value == {}:
            raise InputError(
                f"{path}, key '{key}': got {value!r}, expected {'a table' if key in TABLES else 'a string'}; correct it"
            )
    for check, why in entry.get("exceptions", {}).items():
        if not isinstance(why, str) or not why.strip():
            raise InputError(
                f"{path}, key 'exceptions.{check}': got {why!r}, expected a sentence; say why the check may be missed"
            )
    choices = {"role": ("target", "control"), "speaker": SPEAKERS}
    if entry["role"] == "target":
        choices |= {"mechanism": ("", *MECHANISMS), "dimension": ("", *DIMENSIONS)}
    for key, allowed in choices.items():
        if entry[key] not in allowed:
            raise InputError(
                f"{path}, key '{key}': got '{entry[key]}', expected one of {', '.join(allowed)}; choose one"
            )
    return entry


def _described(description: Path, stimuli_file: Path | None = None) -> Concept:
    entry = _read_toml(description)
    path = stimuli_file or description.with_suffix(".jsonl")
    sets = load_stimuli(path)
    if len(sets) != 1 or sets[0].concept != entry["name"]:
        raise InputError(
            f"{path} holds the concepts {', '.join(s.concept for s in sets)}, expected only '{entry['name']}' as "
            f"{description.name} says; correct the name"
        )
    declared = entry["read"] if isinstance(entry["read"], str) else next(iter(entry["read"]))
    if declared != sets[0].read_kind:
        raise InputError(
            f"{description}, key 'read': got '{declared}', but {path.name} reads at '{sets[0].read_kind}'; make them agree"
        )
    return Concept(
        name=entry["name"], role=entry["role"], mechanism=entry["mechanism"], dimension=entry["dimension"],
        speaker=entry["speaker"], description=entry["description"], stimuli=sets[0],
        labels={str(key): str(value) for key, value in entry.get("labels", {}).items()},
        exceptions={check: " ".join(why.split()) for check, why in entry.get("exceptions", {}).items()},
        variant_of=entry.get("variant_of", ""),
    )  # fmt: skip
