"""Where in the model is what a text says of a concept carried to the answer?  Activations of one text put into another's run.

Clean is a scenario's text with label 1, corrupted its text with label 0. `denoise` puts a clean activation into the
corrupted run (is it sufficient?), `noise` a corrupted one into the clean run (is it necessary?). With y the mean readout over scenarios,

    recovered = (y_patched − y_corrupted) / (y_clean − y_corrupted)   denoise
    recovered = (y_clean − y_patched) / (y_clean − y_corrupted)       noise

so that in both 0 is nothing and 1 the whole effect (Meng et al. 2022, Wang et al. 2023). It is a ratio of means with Fieller's
interval over scenarios, blank where clean and corrupted are not told apart. Positions are matched by role (`roles`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from tqdm.auto import tqdm

from empathy_probes import __version__
from empathy_probes.concepts import Concept
from empathy_probes.design import Design, Settings, describe_design, describe_model
from empathy_probes.errors import InputError
from empathy_probes.models import Model
from empathy_probes.prompts import Style
from empathy_probes.readouts import ask_design, readable
from empathy_probes.results import Result
from empathy_probes.sites import Site
from empathy_probes.stats import Curve, ratio_of_means
from empathy_probes.stimuli import ReadoutSpec
from empathy_probes.store import Store, digest_of
from empathy_probes.sweeps import (
    DIRECTIONS,
    Place,
    check_continuable,
    directions_of,
    grid_of,
    patched_readouts,
    place_cells,
)
from empathy_probes.textpairs import TextPairs, around, as_concepts, pair_texts, prepare_pairs, unit_means

PATCHING_COLUMNS = [
    "concept", "template", "model", "direction", "site", "layer", "head", "position", "recovered", "recovered_lower", "recovered_upper",
    "clean", "corrupted", "patched", "flags",
]  # fmt: skip
SMALL_N = 60


@dataclass(frozen=True)
class PatchedConcept:
    """One concept's readouts in one model under one template, in nats, per pair of texts."""

    concept: str
    template: str
    model: str
    places: tuple[Place, ...]
    directions: tuple[str, ...]
    scenarios: tuple[str, ...]
    """Of every pair."""
    pair_units: tuple[str, ...]
    """Of every pair."""
    clean: Float[np.ndarray, " pair"]
    corrupted: Float[np.ndarray, " pair"]
    patched: Float[np.ndarray, "direction place pair"]
    """NaN where no text has a token of this role."""

    @property
    def units(self) -> tuple[str, ...]:
        """Scenarios, or clusters of them."""
        return tuple(dict.fromkeys(self.pair_units))

    def per_unit(self, values: Float[np.ndarray, "*axes pair"]) -> Float[np.ndarray, "*axes unit"]:
        """Means over the pairs of each unit."""
        return unit_means(values, self.scenarios, self.pair_units)

    @property
    def effect(self) -> Float[np.ndarray, " unit"]:
        """clean − corrupted: what there is to recover."""
        return self.per_unit(self.clean - self.corrupted)

    @property
    def moved(self) -> Float[np.ndarray, "direction place unit"]:
        """How far each patch goes from the run it is put into towards the other."""
        toward = [
            self.patched[i] - self.corrupted if name == "denoise" else self.clean - self.patched[i]
            for i, name in enumerate(self.directions)
        ]
        return self.per_unit(np.stack(toward))

    @property
    def recovered(self) -> Curve:
        """`[direction place]`: share of the effect, with Fieller's 95 % interval; NaN where blank."""
        return ratio_of_means(self.moved, self.effect)

    @property
    def flags(self) -> tuple[str, ...]:
        """What holds of every row."""
        detected = np.isfinite(ratio_of_means(self.effect, self.effect).value)
        return (
            *(() if detected else ("effect_not_detected",)),
            *(("small_n",) if len(self.units) < SMALL_N else ()),
        )


@dataclass(frozen=True)
class Patching(Result):
    """What activations of one text do in another's run."""

    concepts: tuple[PatchedConcept, ...]
    n_layers: int
    settings: Settings = field(default_factory=Settings)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What kind of result this is, also in saved files."""
        return "patching"

    def to_frame(self) -> pd.DataFrame:
        """The rows of `patching.csv`: `recovered` is a share, readouts are means in nats."""
        rows = []
        for c in self.concepts:
            curve, clean, corrupted = c.recovered, c.per_unit(c.clean).mean(), c.per_unit(c.corrupted).mean()
            patched, flags = c.per_unit(c.patched).mean(-1), c.flags
            for i, direction in enumerate(c.directions):
                for j, place in enumerate(c.places):
                    rows.append(
                        {
                            "concept": c.concept, "template": c.template, "model": c.model, "direction": direction,
                            **place_cells(place), **curve.cells("recovered", (i, j)), "clean": clean, "corrupted": corrupted,
                            "patched": patched[i, j], "flags": ";".join((*flags, *place.flags)),
                        }
                    )  # fmt: skip
        frame = pd.DataFrame(rows, columns=PATCHING_COLUMNS).astype({"head": "Int64"})
        frame.attrs["n_scenarios"] = {c.concept: len(c.units) for c in self.concepts}  # for the figure
        return frame


def patch(
    model: Model,
    concepts: Concept | Sequence[Concept] | Sequence[tuple[str, str]],
    *,
    readout: ReadoutSpec | None = None,
    sites: Sequence[Site] | None = None,
    positions: Sequence[str] | None = None,
    direction: str = "both",
    window: int = 1,
    template: str = "raw",
) -> Patching:
    """Put activations of one text of each scenario into the other's run, place by place.

    Args:
        model: runs.
        concepts: with two labels; or pairs of texts (clean, corrupted), then with `readout`.
        readout: asked after every text, in place of the concepts' own.
        sites: where; the residual stream at every layer by default. `sites_of` lists those of a component.
        positions: roles, `all` tokens, or `each` of texts of one length; the roles that the template has by default.
        direction: denoise, noise or both.
        window: patch each site in so many neighbouring blocks at once; sites from which they would end beyond the model are left out.
        template: raw, or chat: the model's own chat template.

    Raises:
        InputError: labels are not two, there is no readout, or the model cannot be continued from a state.
    """
    check_continuable(model)
    found = []
    asked_for = as_concepts(concepts)
    for concept in asked_for:
        prepared, pairs = prepare_pairs(model, concept, readout, template)
        found.append(
            _patch_pairs(
                model, pairs, prepared.name, template, model.name, sites, positions, direction, window
            )
        )
    described = {"model": describe_model(model), "concepts": {c.name: {"digest": c.digest, "n_scenarios": c.stimuli.n_scenarios} for c in asked_for}}  # fmt: skip
    return Patching(tuple(found), model.n_layers, Settings(), described)


def patch_design(design: Design, settings: Settings, store: Store) -> Patching:
    """Patch both models of a design on its targets, at its sites and layers, in both directions; what is in the store is not
    computed again.

    Raises:
        InputError: no target has a readout and two labels.
    """
    found = []
    for model in design.pair.models:
        check_continuable(model)
    concepts = patchable(design)
    for template in design.templates:
        for concept in concepts:
            for side, (model, name) in enumerate(zip(design.pair.models, ("base", "aligned"), strict=True)):
                pairs = design_pairs(design, concept, template, side)
                sites = [
                    Site(layer, component)
                    for component in design.components
                    for layer in design.layers
                    if layer >= 0 or component == "resid_post"
                ]
                prompts = [prompt.ids for prompt in design.prompts[concept.name, template][side]]
                decisive = [
                    model.fingerprint,
                    concept.digest,
                    template,
                    name,
                    prompts,
                    [str(s) for s in sites],
                ]
                found.append(
                    store.remember_record(
                        digest_of(["patching", __version__, *decisive]),
                        partial(
                            _patch_pairs, model, pairs, concept.name, template, name, sites, None, "both", 1
                        ),
                        TYPES,
                    )
                )
    return Patching(tuple(found), design.pair.base.n_layers, settings, describe_design(design))


def patchable(design: Design) -> tuple[Concept, ...]:
    """The targets of a design with a readout and two labels.

    Raises:
        InputError: there is none.
    """
    found = tuple(c for c in readable(design) if c.role == "target" and c.stimuli.kind == "binary")
    if not found:
        raise InputError(
            "patching got targets with grades only, expected one with two labels and a readout; leave the stage out"
        )
    return found


def design_pairs(design: Design, concept: Concept, template: str, side: int) -> TextPairs:
    """Pairs of a concept's texts as one of a design's models (0 base, 1 aligned) sees them."""
    tokenizer = design.pair.models[1 if template == "shared" else side].tokenizer
    prompts = design.prompts[concept.name, template][side]
    asked = ask_design(design, concept, template, side)
    style: Style = "raw" if template == "raw" else "chat"
    return pair_texts(
        asked, concept.stimuli, around(tokenizer, concept.stimuli, prompts, concept.speaker, style)
    )


def _patch_pairs(
    model: Model,
    pairs: TextPairs,
    concept: str,
    template: str,
    name: str,
    sites: Sequence[Site] | None,
    positions: Sequence[str] | None,
    direction: str,
    window: int,
) -> PatchedConcept:
    directions = directions_of(direction)
    cells, places = grid_of(model, pairs, concept, sites, positions, window)
    plain: dict[str, np.ndarray] = {}
    patched = []
    for way in tqdm(
        DIRECTIONS, desc=f"patching · {template} · {concept} · {name}", leave=False, disable=None
    ):
        plain[way], values = patched_readouts(model, pairs, cells if way in directions else (), way)
        if way in directions:
            values[[i for i, place in enumerate(places) if "no_tokens" in place.flags]] = np.nan
            patched.append(values)
    return PatchedConcept(
        concept, template, name, places, directions, pairs.scenarios, pairs.units, plain["noise"], plain["denoise"],
        np.stack(patched),
    )  # fmt: skip


TYPES = {cls.__name__: cls for cls in (Patching, PatchedConcept, Place, Settings)}
