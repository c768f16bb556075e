"""In which blocks is expression lost?  Hybrids of two models, cut at every boundary.

A hybrid runs blocks 0..l of one model and the blocks beyond, norm and head of the other, on the same tokens (model stitching: Lenc &
Vedaldi 2015, Bansal et al. 2021). Its coupling over l is a curve; successive differences share the whole change of
coupling out among embedding, blocks and head, and sum to it exactly. Aligned -> base asks what a base reader still gets
out of the aligned state, base -> aligned what the aligned model's later blocks make of an intact state. Where the two models
hold things in different bases, a map fitted on neutral tokens stands at the cut; a hybrid that has become a bad language model
on neutral texts says nothing, and its block's share is merged with the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from empathy_probes import __version__
from empathy_probes.batches import TokenBatch, pad_tokens
from empathy_probes.concepts import Concept
from empathy_probes.crossings import Crossing, fit_crossings, neutral_states
from empathy_probes.design import Design, Settings, describe_design, design_study
from empathy_probes.errors import InputError
from empathy_probes.models import Model
from empathy_probes.pairs import ModelPair
from empathy_probes.prompts import render_texts
from empathy_probes.readouts import (
    TOKEN_BUDGET,
    Asked,
    ask_design,
    asked_batches,
    batch_asked,
    look_up,
    readable,
    scenario_coupling,
    token_batches,
    token_losses,
)
from empathy_probes.results import Result
from empathy_probes.sites import Site
from empathy_probes.stats import largest_quantile, mean_interval, studentised_sums, unit_signs
from empathy_probes.store import Store, digest_of, open_store
from empathy_probes.sweeps import check_continuable

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


@dataclass(frozen=True)
class Loss:
    """Between which blocks the expression of a concept is lost on the way from base to aligned."""

    word: str
    """lost, kept, or inconclusive."""
    first: int | None
    """Block at which it has surely begun; −1 the embedding, n_layers the head."""
    last: int | None
    """Block after which nothing of it surely remains."""


@dataclass(frozen=True)
class Stitching(Result):
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
        known = ~np.isnan(shares).any(-1)
        reach = np.full(known.shape, np.nan)
        reach[known] = self._reach(shares[known], concept)
        return reach

    def _reach(
        self, values: Float[np.ndarray, "cell unit"], concept: StitchedConcept
    ) -> Float[np.ndarray, " cell"]:
        """Half widths of a 95 % band of means over scenarios, simultaneous over cells."""
        n = values.shape[-1]
        live = values - values.mean(-1, keepdims=True)
        # Sums that cancel to rounding carry no error of their own and must not be divided by it.
        live[np.abs(live).max(-1) <= 1e-12 * np.abs(concept.coupling).max()] = 0
        signs = unit_signs(concept.units, self.settings.draws, self.settings.seed)
        spread = np.sqrt((live**2).sum(-1) / (n - 1) / n)
        return spread * largest_quantile(studentised_sums(live, signs))

    def loss(self, concept: StitchedConcept) -> Loss:
        """Where a base reader stops getting the concept's expression out of the aligned state (aligned → base).

        With margin δ: lost at the first cut whose hybrid expresses less than 1 − δ of what the base does, complete at the
        first one that no longer keeps more than a share δ of the difference; kept where every hybrid and the aligned model
        lie within δ of the base. All of it holds together at 95 %.
        """
        margin, sane = self.settings.margin, self.sane(concept.template)[0]
        rows = np.flatnonzero(sane)
        curve = concept.coupling[0, rows] * np.sign(concept.coupling[0, 0].mean())
        base, aligned = curve[0], curve[-1]
        gone = base - curve[1:]  # per row beyond `none`
        statements = np.concatenate(
            [gone - margin * base, -gone - margin * base, curve[1:] - aligned - margin * (base - aligned)]
        )
        mean = statements.mean(-1)
        reach = self._reach(statements, concept)
        lower, upper = ((mean + sign * reach).reshape(3, -1) for sign in (-1, 1))
        if (upper[0] < 0).all() and (upper[1] < 0).all():
            return Loss("kept", None, None)
        lost = np.flatnonzero(lower[0] > 0)
        if not len(lost) or lower[0, -1] <= 0:
            return Loss("inconclusive", None, None)
        remains = np.flatnonzero(lower[2, :-1] > 0)
        # Row r of the curve is block r − 2; the last one is the head.
        places = rows[1:] - 2
        last = places[remains[-1] + 1] if len(remains) else places[0]
        return Loss("lost", int(places[lost[0]]), int(max(last, places[lost[0]])))

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
                            **curve.cells("coupling", (order, i)), **share.cells("share", (order, i)),
                            "interaction": between[i] if inner else np.nan,
                            "neutral_perplexity": np.exp(self.neutral_loss[at, order, i]), "flags": ";".join(flags),
                        }
                    )  # fmt: skip
        frame = pd.DataFrame(rows, columns=STITCHING_COLUMNS)
        frame.attrs["n_scenarios"] = {c.concept: len(c.units) for c in self.concepts}
        return frame


def stitch(
    pair: ModelPair,
    concepts: Concept | Sequence[Concept],
    controls: Concept | Sequence[Concept] = (),
    *,
    template: str = "both",
    draws: int = 1000,
    seed: int = 0,
    neutral: Sequence[str] | None = None,
    store: str | None = None,
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
        store: where readouts are kept; the default one if None.

    Raises:
        InputError: no concept has a readout, or a model cannot be continued from a state.
    """
    design = design_study(pair, concepts, controls, template=template, neutral=neutral)
    return stitch_design(design, Settings(draws=draws, seed=seed), open_store(store))


def stitch_design(design: Design, settings: Settings, store: Store) -> Stitching:
    """Stitch a design's concepts; what is in the store is not computed again."""
    pair = design.pair
    check_replay(pair)
    if "own" in design.templates:
        raise InputError(
            "stitching got the template 'own', expected the same tokens in both models; use --template raw or shared"
        )
    texts = design.neutral[:NEUTRAL_TEXTS]
    tokens = [prompt.ids for prompt in render_texts(pair.base.tokenizer, texts) if len(prompt.ids) > 1]
    fitted = cache(
        lambda: fit_crossings((neutral_states(pair.base, tokens), neutral_states(pair.aligned, tokens)))
    )

    def losses() -> dict[str, np.ndarray]:
        crossings, mapped = fitted()
        return {"loss": hybrid_losses(pair, tokens, crossings), "mapped": mapped}

    def readouts(asked: Asked, label: str) -> Float[np.ndarray, "order=2 row item"]:
        return hybrid_readouts(pair, asked, fitted()[0], label)

    # The neutral texts are raw, so that one table of perplexities serves every template.
    neutral = store.remember_all(_key(pair, "neutral", tokens), losses)
    found = []
    for template in design.templates:
        for concept in readable(design):
            asked = ask_design(design, concept, template, 1)
            label = f"stitching · {template} · {concept.name}"
            values = store.remember(_key(pair, asked.digest, tokens), partial(readouts, asked, label))
            coupling = scenario_coupling(np.moveaxis(values, -1, 0), concept.stimuli)
            found.append(
                StitchedConcept(
                    concept.name, concept.role, template, concept.stimuli.units,
                    np.ascontiguousarray(np.moveaxis(coupling, 0, -1)),
                )
            )  # fmt: skip
    templates = len(design.templates)
    return Stitching(
        tuple(found), pair.base.n_layers, np.stack([neutral["loss"]] * templates), np.stack([neutral["mapped"]] * templates),
        settings, describe_design(design),
    )  # fmt: skip


def _key(pair: ModelPair, asked: str, tokens: Sequence[Sequence[int]]) -> str:
    """Of a stored computation: the models, what is asked, and the neutral tokens the map is fitted on."""
    return digest_of(
        [
            "stitching",
            __version__,
            pair.base.fingerprint,
            pair.aligned.fingerprint,
            asked,
            [list(row) for row in tokens],
        ]
    )


def check_replay(pair: ModelPair) -> None:
    """Refuse a pair that cannot be continued from a state."""
    for model in pair.models:
        check_continuable(model)


def _hybrids(
    pair: ModelPair, tokens: TokenBatch, crossings: Sequence[Sequence[Crossing]]
) -> Iterator[tuple[int, int, Model, Float[Tensor, "row pos d_model"]]]:
    """(order, row, the model whose head finishes, the state after the last block) of every hybrid.

    Rows are none, −1, 0 … n_layers − 1, all. Each model runs once; every hybrid is a replay of the blocks beyond its cut.
    """
    n = pair.base.n_layers
    sites = [Site(layer) for layer in range(-1, n)]
    runs = [model.run(tokens, read=sites, last_layer=n - 1, capture=True) for model in pair.models]
    for order, (a, b) in enumerate(((1, 0), (0, 1))):
        first, second = pair.models[a], pair.models[b]
        yield order, 0, second, runs[b].acts[sites[-1]]
        for row, site in enumerate(sites):
            state = crossings[order][row](runs[a].acts[site], runs[b].acts[site])
            if site.layer < n - 1:
                state = second.replay(runs[b], state, site.layer, read=[sites[-1]], last_layer=n - 1).acts[
                    sites[-1]
                ]
            yield order, row + 1, second, state
        yield order, n + 2, first, runs[a].acts[sites[-1]]


def _budget(model: Model, longest: int) -> int:
    """Padded tokens of a batch: all states of both models are held at once."""
    return max(longest, min(TOKEN_BUDGET, STATE_BYTES // (8 * (model.n_layers + 1) * model.d_model)))


def hybrid_readouts(
    pair: ModelPair, asked: Asked, crossings: Sequence[Sequence[Crossing]], label: str = ""
) -> Float[np.ndarray, "order=2 row item"]:
    """Readout of every item from every hybrid."""
    values = np.zeros((2, pair.base.n_layers + 3, len(asked.items)))
    budget = _budget(pair.base, max(map(asked.length, range(len(asked.items)))))
    with tqdm(total=len(asked.items), unit="text", desc=label, leave=False, disable=None) as bar:
        for index in asked_batches(asked, budget):
            batch = batch_asked(asked, index, *pair.models)
            with torch.inference_mode():
                for order, row, model, state in _hybrids(pair, batch.tokens, crossings):
                    values[order, row, list(index)] = look_up(model, batch, state).cpu().numpy()
            bar.update(len(index))
    return values


def hybrid_losses(
    pair: ModelPair, rows: Sequence[Sequence[int]], crossings: Sequence[Sequence[Crossing]]
) -> Float[np.ndarray, "order=2 row"]:
    """Mean loss of every hybrid on neutral texts, in nats per token: texts count alike."""
    losses = np.zeros((2, pair.base.n_layers + 3))
    for index in token_batches(rows, _budget(pair.base, max(map(len, rows)))):
        batch = pad_tokens([rows[i] for i in index], pair.base.device)
        with torch.inference_mode():
            for order, row, model, state in _hybrids(pair, batch, crossings):
                losses[order, row] += token_losses(model, batch, state).sum()
    return losses / len(rows)
