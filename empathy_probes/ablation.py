"""Does the answer need a direction?  Project it out of the stream, and see what is left of a concept's coupling.

The direction is the concept's own, fitted on the other folds' scenarios, or a vector of one's own; it is taken out at every position,
after one block at a time and after all of them. Covariance-matched random directions say what taking any direction out does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from empathy_probes.concepts import Concept, load_neutral
from empathy_probes.directions import N_FOLDS, cross_fitted_directions, scenario_differences, unit_rows
from empathy_probes.errors import InputError
from empathy_probes.extraction import check_prompts, extract
from empathy_probes.interventions import project_out
from empathy_probes.models import Model
from empathy_probes.prompts import render, render_texts, style_of
from empathy_probes.readouts import Asked, ask, check_length, read_out, scenario_coupling
from empathy_probes.results import Result
from empathy_probes.sites import Site
from empathy_probes.stats import Curve, critical_t, fieller_ratio, grouped_folds, mean_interval
from empathy_probes.store import open_store
from empathy_probes.vectors import SteeringVector

SITE = "resid_post"


@dataclass(frozen=True)
class Ablation(Result):
    """What is left of a concept's coupling once a direction is projected out of the stream."""

    concept: str
    model: str
    template: str
    layers: tuple[int, ...]
    units: tuple[str, ...]
    coupling: Float[np.ndarray, "condition unit"]
    """c_s in nats: as it is; the direction out after each layer alone; out after all of them."""
    random: Float[np.ndarray, "draw unit"]
    """c_s with a covariance-matched random direction out after all layers."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What kind of result this is, also in saved files."""
        return "ablation"

    @cached_property
    def removed(self) -> Curve:
        """1 − coupling(ablated)/coupling(as it is), Fieller's interval; blank where the coupling itself is not detected."""
        n = len(self.units)
        plain, rest = self.coupling[0], self.coupling[1:]
        covariance = np.stack([np.cov(plain, row) / n for row in rest], -1)
        ratio = fieller_ratio(np.full(len(rest), plain.mean()), rest.mean(-1), covariance, critical_t(n - 1))
        return Curve(1 - ratio.value, 1 - ratio.upper, 1 - ratio.lower)

    @property
    def random_removed(self) -> Float[np.ndarray, " draw"]:
        """The same of random directions out after all layers, without intervals."""
        plain = mean_interval(self.coupling[:1])
        shown = plain.lower[0] > 0 or plain.upper[0] < 0
        return np.asarray(1 - self.random.mean(-1) / (self.coupling[0].mean() if shown else np.nan))

    def to_frame(self) -> pd.DataFrame:
        """One row per layer and one for all of them; coupling in nats, removed as a share; of random directions, which are taken
        out after all layers only, the smallest and the largest share."""
        curve, removed, random = mean_interval(self.coupling), self.removed, self.random_removed
        names = [*(str(layer) for layer in self.layers), "all"]
        ends = [(np.nan, np.nan)] * len(self.layers) + [(random.min(), random.max())]
        return pd.DataFrame(
            {
                "concept": self.concept, "model": self.model, "template": self.template, "layer": name,
                **curve.cells("coupling", i + 1), **removed.cells("removed", i), "random_lower": ends[i][0],
                "random_upper": ends[i][1], "n_scenarios": len(self.units),
            }
            for i, name in enumerate(names)
        )  # fmt: skip


RANDOM_ABLATIONS = 9


def ablate(
    model: Model,
    concept: Concept,
    vector: SteeringVector | None = None,
    *,
    layers: Sequence[int] | None = None,
    template: str = "raw",
    seed: int = 0,
    neutral: Sequence[str] | None = None,
    store: str | None = None,
) -> Ablation:
    """Project a direction out of the residual stream, at every position, and see what is left of a concept's coupling.

    Args:
        model: runs the concept's texts.
        concept: with a readout.
        vector: the direction, as it is; by default the concept's own, cross-fitted over scenarios.
        layers: 0-based blocks; the vector's, or all.
        template: raw, or chat: the model's own template.
        seed: of folds and random directions.
        neutral: texts whose covariance the random directions have; the shipped ones by default.
        store: activation store; the default one if None.

    Raises:
        InputError: the concept has no readout, or the vector has not these layers.
    """
    style = style_of(template)
    prompts = render(model.tokenizer, concept.stimuli, style, concept.speaker)
    check_prompts(model, prompts, concept.name)
    asked = ask(model.tokenizer, concept.stimuli, prompts, style)
    check_length(model, asked)
    every_layer = range(model.n_layers) if vector is None else vector.layers
    chosen = tuple(sorted({int(layer) for layer in (every_layer if layers is None else layers)}))
    if not chosen:
        raise InputError("ablate got no layers, expected one or more blocks; leave layers out for all")
    units = concept.stimuli.units
    folds = grouped_folds(units, N_FOLDS, seed)
    opened = open_store(store)
    if vector is None:
        acts = extract(model, prompts, (SITE,), chosen, opened, label=concept.name)[SITE]
        by_fold = cross_fitted_directions(scenario_differences(acts, concept.stimuli), folds)
    else:
        rows = np.stack([vector.at(layer).direction[0] for layer in chosen]).astype(float)
        if vector.site != SITE or not rows.any(-1).all():
            raise InputError(
                f"ablate got a vector at {vector.site} that is zero at a layer or lies elsewhere, expected directions at {SITE}; choose its layers"
            )
        by_fold = np.repeat(rows[None], N_FOLDS, 0)
    place = {unit: i for i, unit in enumerate(units)}
    item_fold = folds[[place[item.unit] for item in concept.stimuli.items]]

    def coupling(
        directions: Float[np.ndarray, "fold layer d_model"], at: Sequence[int]
    ) -> Float[np.ndarray, " unit"]:
        values = np.zeros(len(asked.items))
        for fold in range(len(directions)):
            index = np.flatnonzero(item_fold == fold)
            edits = {Site(chosen[i]): project_out(torch.as_tensor(directions[fold, i])) for i in at}
            with model.editing(edits):
                values[index] = read_out(model, _some(asked, index))
        return scenario_coupling(values, concept.stimuli)

    every = range(len(chosen))
    conditions = [coupling(by_fold, ()), *(coupling(by_fold, (i,)) for i in every), coupling(by_fold, every)]
    texts = render_texts(model.tokenizer, load_neutral() if neutral is None else tuple(neutral))
    check_prompts(model, texts, "neutral")
    x = extract(model, texts, (SITE,), chosen, opened, label="neutral")[SITE].normalised
    x = x - x.mean(0)
    rng = np.random.default_rng([seed, 19])
    drawn = np.einsum("rm,mld->rld", rng.standard_normal((RANDOM_ABLATIONS, len(x))), x)
    random = [coupling(np.repeat(unit_rows(rows)[None], N_FOLDS, 0), every) for rows in drawn]
    return Ablation(
        concept.name, model.name, template, chosen, units, np.stack(conditions), np.stack(random),
        {"weights": model.weights, "stimuli": concept.digest, "direction": "cross-fitted" if vector is None else vector.estimator},
    )  # fmt: skip


def _some(asked: Asked, index: Int[np.ndarray, " k"]) -> Asked:
    """Some of the items."""
    fields = ("items", "prompts", "read", "expressive", "attenuated")
    return Asked(asked.concept, asked.kind, *(tuple(getattr(asked, f)[i] for i in index) for f in fields))
