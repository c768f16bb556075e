"""In which blocks is expression lost?  Hybrids of two models, cut at every boundary.

A hybrid runs blocks 0..l of one model and the blocks beyond, norm and head of the other, on the same tokens (model stitching: Lenc &
Vedaldi 2015, Bansal et al. 2021). Its coupling over l is a curve; successive differences share the whole change of
coupling out among embedding, blocks and head, and sum to it exactly. Aligned -> base asks what a base reader still gets
out of the aligned state, base -> aligned what the aligned model's later blocks make of an intact state. Where the two models
hold things in different bases, a map fitted on neutral tokens stands at the cut; a hybrid that has become a bad language model
on neutral texts says nothing, and its block's share is merged with the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from empathy_probes.batches import TokenBatch
from empathy_probes.concepts import Concept, load_neutral
from empathy_probes.crossings import Crossing, fit_crossings, neutral_states
from empathy_probes.design import Design, Settings, describe_design, design_study
from empathy_probes.errors import InputError
from empathy_probes.models import Model
from empathy_probes.pairs import ModelPair
from empathy_probes.prompts import render_texts
from empathy_probes.readouts import (
    Asked,
    ask_design,
    asked_batches,
    batch_asked,
    look_up,
    neutral_losses,
    readable,
    scenario_coupling,
)
from empathy_probes.sites import Site
from empathy_probes.stats import Curve, largest_quantile, mean_interval, unit_signs
from empathy_probes.store import save_record
from empathy_probes.sweeps import check_continuable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDERS = ("aligned_then_base", "base_then_aligned")
STITCHING_COLUMNS = [
    "concept", "template", "order", "boundary", "coupling", "coupling_lower", "coupling_upper", "share", "share_lower", "share_upper",
    "interaction", "neutral_perplexity", "flags",
]  # fmt: skip
# A hybrid whose loss on neutral texts exceeds both models' by more than this (nats; twice the perplexity) is no language model
# any more: what it answers is an artefact of the cut.
INSANE = np.log(2)
NEUTRAL_TEXTS = 100
STATE_BYTES = 1 << 28


@dataclass(frozen=True)
class StitchedConcept:
    """Coupling of every hybrid for one concept under one template."""

    concept: str
    role: str
    template: str
    units: tuple[str, ...]
    coupling: Float[np.ndarray, "order=2 row unit"]
    """c_s in nats; rows: none, −1, 0 … n_layers − 1, all."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the scenarios, for signs that concepts share."""
        return tuple(f"{self.concept}\x1f{unit}" for unit in self.units)


@dataclass(frozen=True)
class Stitching:
    """Where between two models coupling changes."""

    concepts: tuple[StitchedConcept, ...]
    n_layers: int
    neutral_loss: Float[np.ndarray, "template order=2 row"]
    """Mean loss of each hybrid on neutral texts, in nats per token."""
    mapped: Bool[np.ndarray, "template boundary"]
    """Where the neutral-text map was inserted."""
    settings: Settings = field(default_factory=Settings)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What kind of result this is, also in saved files."""
        return "stitching"

    @property
    def templates(self) -> tuple[str, ...]:
        """Templates measured, in order."""
        return tuple(dict.fromkeys(c.template for c in self.concepts))

    @property
    def boundaries(self) -> tuple[str, ...]:
        """Names of the rows."""
        return ("none", *(str(layer) for layer in range(-1, self.n_layers)), "all")

    def sane(self, template: str) -> Bool[np.ndarray, "order=2 row"]:
        """Which hybrids are still language models on neutral texts; the two models themselves always are."""
        loss = self.neutral_loss[self.templates.index(template)]
        fine = loss <= max(loss[0, 0], loss[0, -1]) + INSANE
        fine[:, [0, -1]] = True
        return np.asarray(fine)

    def shares(self, concept: StitchedConcept) -> Float[np.ndarray, "order=2 row unit"]:
        """What each row adds to coupling(base) − coupling(aligned), per scenario; NaN at `none` and at insane rows.

        A row's share is that of everything since the last sane row: merged blocks stand at the later one.
        """
        sane = self.sane(concept.template)
        shares = np.full(concept.coupling.shape, np.nan)
        for order, sign in enumerate((-1.0, 1.0)):
            rows = np.flatnonzero(sane[order])
            shares[order, rows[1:]] = sign * np.diff(concept.coupling[order, rows], axis=0)
        return shares

    def interaction(self, concept: StitchedConcept) -> Float[np.ndarray, "row unit"]:
        """(A→A) − (B→A) − (A→B) + (B→B) at every boundary, per scenario: what both orders disagree about."""
        there, back = concept.coupling
        return there[-1] - back - there + there[0]

    def band(self, concept: StitchedConcept) -> Float[np.ndarray, "order=2 row"]:
        """Half width of the 95 % band of the shares, simultaneous over rows and orders."""
        shares = self.shares(concept)
        n = shares.shape[-1]
        known = ~np.isnan(shares).any(-1)
        live = shares[known] - shares[known].mean(-1, keepdims=True)
        spread = np.sqrt((live**2).sum(-1) / (n - 1))
        signs = unit_signs(concept.keys, self.settings.draws, self.settings.seed).astype(float)
        moving = spread > 0
        critical = 0.0
        if moving.any():
            sums = signs @ live[moving].T
            left = np.sqrt(np.maximum((live[moving] ** 2).sum(-1) - sums**2 / n, 1e-300) * n / (n - 1))
            critical = largest_quantile(sums / left)
        reach = np.full(known.shape, np.nan)
        reach[known] = critical * spread / np.sqrt(n)
        return reach

    def to_frame(self) -> pd.DataFrame:
        """The rows of `stitching.csv`, coupling in nats."""
        rows = []
        for c in self.concepts:
            at = self.templates.index(c.template)
            sane, shares, curve = self.sane(c.template), self.shares(c), mean_interval(c.coupling)
            share, between = mean_interval(shares), self.interaction(c).mean(-1)
            for order, name in enumerate(ORDERS):
                for i, boundary in enumerate(self.boundaries):
                    inner = 0 < i < len(self.boundaries) - 1
                    flags = [] if sane[order, i] else ["insane_boundary"]
                    flags += ["merged"] if sane[order, i] and i > 0 and not sane[order, i - 1] else []
                    flags += ["mapped"] if inner and self.mapped[at, i - 1] else []
                    rows.append(
                        {
                            "concept": c.concept, "template": c.template, "order": name, "boundary": boundary,
                            **_cells("coupling", curve, order, i), **_cells("share", share, order, i),
                            "interaction": between[i] if inner else np.nan,
                            "neutral_perplexity": np.exp(self.neutral_loss[at, order, i]), "flags": ";".join(flags),
                        }
                    )  # fmt: skip
        return pd.DataFrame(rows, columns=STITCHING_COLUMNS)

    def save(self, path: str | Path) -> None:
        """Save as one safetensors file with a JSON header."""
        save_record(self, path)

    def plot(self) -> Figure:
        """Both curves of the first target, and the shares of its blocks."""
        from empathy_probes import plots

        return plots.plot(self)

    def _repr_html_(self) -> str:
        from empathy_probes import report

        return report.result_html(self)


def _cells(name: str, curve: Curve, order: int, row: int) -> dict[str, float]:
    return {
        name: curve.value[order, row], f"{name}_lower": curve.lower[order, row],
        f"{name}_upper": curve.upper[order, row],
    }  # fmt: skip


def stitch(
    pair: ModelPair,
    concepts: Concept | Sequence[Concept],
    controls: Sequence[Concept] = (),
    *,
    template: str = "both",
    draws: int = 1000,
    seed: int = 0,
    neutral: Sequence[str] | None = None,
) -> Stitching:
    """Where the aligned model's coupling departs from the base's, block by block and in both orders.

    Args:
        pair: base and aligned model.
        concepts: targets, each with a readout.
        controls: contrasts with a readout of their own.
        template: raw, shared, own or both.
        draws: multiplier draws behind every band.
        seed: of the draws.
        neutral: texts for perplexity and the map; the shipped ones by default.

    Raises:
        InputError: no concept has a readout, or a model cannot be continued from a state.
    """
    targets = (concepts,) if isinstance(concepts, Concept) else tuple(concepts)
    design = design_study(pair, targets, controls, template=template, neutral=neutral)
    return stitch_design(design, Settings(draws=draws, seed=seed), neutral)


def stitch_design(design: Design, settings: Settings, neutral: Sequence[str] | None = None) -> Stitching:
    """Stitch a design's concepts."""
    pair = design.pair
    check_replay(pair)
    if "own" in design.templates:
        raise InputError(
            "stitching got the template 'own', expected the same tokens in both models; use --template raw or shared"
        )
    texts = (load_neutral() if neutral is None else tuple(neutral))[:NEUTRAL_TEXTS]
    tokens = [prompt.ids for prompt in render_texts(pair.base.tokenizer, texts) if len(prompt.ids) > 1]
    crossings, mapped = fit_crossings(
        (neutral_states(pair.base, tokens), neutral_states(pair.aligned, tokens))
    )
    found, losses = [], []
    n_rows = pair.base.n_layers + 3
    # The neutral texts are raw, so that one table of perplexities serves every template.
    loss = np.stack(
        [
            [
                neutral_losses(second, tokens, _final(first, second, crossings[order], row)).mean()
                for row in range(n_rows - 1)
            ]
            + [neutral_losses(first, tokens).mean()]
            for order, (first, second) in enumerate(_orders(pair))
        ]
    )
    for template in design.templates:
        losses.append(loss)
        for concept in readable(design):
            asked = ask_design(design, concept, template, 1)
            label = f"stitching · {template} · {concept.name}"
            values = np.stack(
                [
                    hybrid_readouts(first, second, asked, crossings[order], f"{label} · {ORDERS[order]}")
                    for order, (first, second) in enumerate(_orders(pair))
                ]
            )
            coupling = scenario_coupling(np.moveaxis(values, -1, 0), concept.stimuli)
            found.append(
                StitchedConcept(
                    concept.name, concept.role, template, concept.stimuli.units,
                    np.ascontiguousarray(np.moveaxis(coupling, 0, -1)),
                )
            )  # fmt: skip
    return Stitching(
        tuple(found), pair.base.n_layers, np.stack(losses), np.stack([mapped] * len(design.templates)), settings,
        describe_design(design),
    )  # fmt: skip


def check_replay(pair: ModelPair) -> None:
    """Refuse a pair that cannot be continued from a state."""
    for model in pair.models:
        check_continuable(model)


def _orders(pair: ModelPair) -> tuple[tuple[Model, Model], tuple[Model, Model]]:
    """First and second model of each order."""
    return (pair.aligned, pair.base), (pair.base, pair.aligned)


def hybrid_readouts(
    first: Model, second: Model, asked: Asked, crossings: Sequence[Crossing], label: str = ""
) -> Float[np.ndarray, "row item"]:
    """Readout of every item from every hybrid: none, −1, 0 … n_layers − 1, all."""
    n = second.n_layers
    values = np.zeros((n + 3, len(asked.items)))
    longest = max(map(len, asked.prompts)) + max(
        sum(map(len, asked.tails(i))) for i in range(len(asked.items))
    )
    # All states of the first model are held at once.
    budget = max(longest, min(4096, STATE_BYTES // (4 * (n + 1) * second.d_model)))
    last = Site(n - 1)
    with tqdm(total=len(asked.items), unit="text", desc=label, leave=False, disable=None) as bar:
        for index in asked_batches(asked, budget):
            batch = batch_asked(asked, index, first, second)
            with torch.inference_mode():
                ours = first.run(batch.tokens, read=[Site(layer) for layer in range(-1, n)], last_layer=n - 1)
                own = second.run(
                    batch.tokens, read=[Site(layer) for layer in range(-1, n)], last_layer=n - 1, capture=True
                )
                columns = [look_up(second, batch, own.acts[last])]
                for layer in range(-1, n):
                    state = crossings[layer + 1](ours.acts[Site(layer)], own.acts[Site(layer)])
                    if layer < n - 1:
                        state = second.replay(own, state, layer, read=[last], last_layer=n - 1).acts[last]
                    columns.append(look_up(second, batch, state))
                columns.append(look_up(first, batch, ours.acts[last]))
            values[:, list(index)] = torch.stack(columns).cpu().numpy()
            bar.update(len(index))
    return values


def _final(
    first: Model, second: Model, crossings: Sequence[Crossing], row: int
) -> Callable[[TokenBatch], Tensor]:
    """State after the last block of one hybrid that the second model's head finishes."""
    n = second.n_layers
    last = Site(n - 1)

    def final(batch: TokenBatch) -> Tensor:
        if row == 0:
            return second.run(batch, read=[last], last_layer=n - 1).acts[last]
        layer = row - 2
        site = Site(layer)
        ours = first.run(batch, read=[site], last_layer=max(layer, 0)).acts[site]
        own = second.run(batch, read=[site], last_layer=n - 1, capture=True)
        state = crossings[layer + 1](ours, own.acts[site])
        if layer == n - 1:
            return state
        return second.replay(own, state, layer, read=[last], last_layer=n - 1).acts[last]

    return final
