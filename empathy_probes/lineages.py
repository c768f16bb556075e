"""Which checkpoints descend from which, as data: a base model and what was made of it, stage by stage.

Ids are those of the Hugging Face hub, as `load_model` takes them; nothing is loaded here. Lineages live in
`data/lineages.toml`; adding one is adding a table there. Those with the role `null` are the same training a little further
on, in which nothing but drift should be found.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from empathy_probes.errors import InputError


@dataclass(frozen=True)
class Stage:
    """One checkpoint of a lineage."""

    name: str
    """Such as base, sft, dpo, final."""
    model: str
    """Hub id, `ID@REVISION`, or a local folder."""


@dataclass(frozen=True)
class Lineage:
    """Checkpoints of which each was made from the one before it."""

    name: str
    family: str
    role: str
    """aligned, or null: a chain without alignment, as a control."""
    stages: tuple[Stage, ...]
    """The base first."""


def list_lineages() -> tuple[str, ...]:
    """Names of the known lineages, in the order of the file."""
    return tuple(_entries())


def load_lineage(name: str) -> Lineage:
    """A known lineage by its name; no model is loaded.

    >>> [stage.name for stage in load_lineage("olmo2-7b").stages]
    ['base', 'sft', 'dpo', 'final']

    Raises:
        InputError: there is no lineage of that name; the message lists those that exist.
    """
    entries = _entries()
    if name not in entries:
        raise InputError(
            f"unknown lineage '{name}': expected one of {', '.join(entries)}; choose one of these"
        )
    entry = entries[name]
    stages = tuple(Stage(stage, model) for stage, model in entry["stages"].items())
    return Lineage(name, entry["family"], entry["role"], stages)


@cache
def _entries() -> dict[str, Any]:
    text = files("empathy_probes").joinpath("data/lineages.toml").read_text(encoding="utf8")
    return tomllib.loads(text)
