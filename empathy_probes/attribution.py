"""Who writes a concept?  What embedding, every head and every MLP add along its direction, base beside aligned.

The residual stream is a sum: h = embedding + sum over blocks of (heads + attention's bias + MLP). Read along a unit direction w
and in units of the stream's rms, so is the score of a scenario's contrast, s = <D_s, w> / rms: each term is what one component
writes there, and they sum to the score exactly. w is the mean contrast of the other folds' scenarios, so that it owes nothing to
the scenarios it reads; LayerNorm models are centred over d_model, and w with them. Nothing is patched: a term is the direct path
from a component to the read position. Beside the terms of whole attentions and MLPs stands the total effect: the score that is
lost when the component's contrast is taken out at the read position and everything after it is computed again.

Intervals are t intervals over scenarios of each one's influence on a mean: its own term, and what it does to the directions of
the other folds. A component that writes much across the direction has a term that hangs on where exactly that points: with the
directions taken as known, nominal 95 % held .46 to .90 (docs/simulations); with the influence, .94 to .99.

How *much* is lost between two models is said by strength, not by this score: a direction that is estimated is noisier where the
signal is weaker. This says who writes what is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from tqdm.auto import tqdm

from empathy_probes.activations import Activations
from empathy_probes.batches import Pool, pad_tokens
from empathy_probes.coding import scenario_contrasts
from empathy_probes.concepts import Concept
from empathy_probes.design import Design, Settings, describe_design, design_study, neutral_name
from empathy_probes.errors import InputError
from empathy_probes.extraction import extract, plan_extraction
from empathy_probes.interventions import add_values
from empathy_probes.kernels import u_statistic
from empathy_probes.lens import LogitLens, logit_lens
from empathy_probes.models import Model
from empathy_probes.pairs import ModelPair
from empathy_probes.probes import N_FOLDS
from empathy_probes.prompts import RenderedPrompt
from empathy_probes.results import Result
from empathy_probes.sites import HEADS, Site
from empathy_probes.stats import (
    Curve,
    Estimate,
    grouped_folds,
    largest_quantile,
    mean_interval,
    studentised_sums,
    unit_signs,
)
from empathy_probes.stimuli import StimulusSet
from empathy_probes.store import Store, load_record, open_store

ATTRIBUTION_COLUMNS = [
    "concept", "template", "model", "component", "layer", "head", "write", "write_lower", "write_upper", "flags",
]  # fmt: skip
MODELS = ("base", "aligned", "difference")
DIRECTIONS = ("own", "base")
# Of final states that the lens takes its derivative at.
LENS_STATES = 100
# Of states between blocks that are held while components are ablated.
STATE_BYTES = 1 << 28
# A sum of terms that misses the score by more than this share of it is flagged: rounding in half precision.
INEXACT = 0.01


@dataclass(frozen=True)
class Part:
    """One row of the table: a component, or several together."""

    component: str
    """embedding, attn (all of a block's attention), head, attn_bias, mlp, or total."""
    layer: int
    """Block; −1 of the embedding; of total, the block after which the score is read."""
    head: int | None = None

    @property
    def name(self) -> str:
        """As in figures: `L3 MLP`, `L2 H1`."""
        words = {"embedding": "embedding", "total": "total", "attn": f"L{self.layer} attention"}
        words |= {"mlp": f"L{self.layer} MLP", "attn_bias": f"L{self.layer} attention bias"}
        return words.get(self.component, f"L{self.layer} H{self.head}")


@dataclass(frozen=True)
class AttributedConcept:
    """What every component of both models writes along one concept's direction under one template."""

    concept: str
    role: str
    template: str
    units: tuple[str, ...]
    writes: Float[np.ndarray, "model=2 leaf unit"]
    """Per scenario, in units of each model's rms at the layer read; components as in `Attribution.leaves`."""
    influence: Float[np.ndarray, "model=2 leaf unit"]
    """What a scenario adds to the mean writes beside its own, through the directions it helped to estimate; for intervals."""
    score: Float[np.ndarray, "model=2 unit"]
    """The scenario's contrast along the direction, read off the stream itself: what the writes sum to."""
    strength: Float[np.ndarray, "model=2"]
    """Of the whole contrast there, unbiased: what a perfectly known direction would read."""
    contrasts: Float[np.ndarray, "model=2 d_model"]
    """Mean contrast of all scenarios along the direction used, in each model's raw units: what the lens reads."""
    total_effect: Float[np.ndarray, "model=2 module unit"] | None
    """Score lost when a module's contrast is taken out and the rest computed again (`Attribution.modules`); None: not asked."""
    lens: tuple[LogitLens, ...]
    """What that contrast, added to the last state, does to the logits: base, aligned."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the scenarios, for signs that concepts share."""
        return tuple(f"{self.concept}\x1f{unit}" for unit in self.units)

    @property
    def gap(self) -> Float[np.ndarray, "model=2"]:
        """Largest miss of the sum of all writes, relative to the scores' size: rounding, and nothing else."""
        size = np.sqrt((self.score**2).mean(-1))
        return abs(self.writes.sum(1) - self.score).max(-1) / np.where(size > 0, size, 1.0)


@dataclass(frozen=True)
class Attribution(Result):
    """Who writes each concept, in base and aligned model."""

    concepts: tuple[AttributedConcept, ...]
    layer: int
    """The block after which scores are read."""
    n_layers: int
    n_heads: int
    biased: bool
    """Attention adds a bias. It is the same for every text, so that its contrast is 0 by construction."""
    direction: str = "own"
    """own: each model's direction; base: the base's in both."""
    settings: Settings = field(default_factory=Settings)
    skipped: tuple[str, ...] = ()
    """Concepts with categories, which have no one direction."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What kind of result this is, also in saved files."""
        return "attribution"

    @property
    def templates(self) -> tuple[str, ...]:
        """Templates measured, in order."""
        return tuple(dict.fromkeys(c.template for c in self.concepts))

    @property
    def leaves(self) -> tuple[Part, ...]:
        """The components that sum to the score."""
        return leaf_parts(self.layer, self.n_heads, self.biased)

    @property
    def modules(self) -> tuple[Part, ...]:
        """Embedding, and every block's attention and MLP as a whole."""
        return module_parts(self.layer)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Rows of the table: before each block's heads its attention as a whole, and the total at the end."""
        rows: list[Part] = []
        for leaf in self.leaves:
            rows += [Part("attn", leaf.layer)] if leaf.head == 0 else []
            rows.append(leaf)
        return (*rows, Part("total", self.layer))

    def values(self, concept: AttributedConcept) -> Float[np.ndarray, "model=3 part unit"]:
        """Per scenario: base, aligned, and aligned minus base, each in its own model's units."""
        both = np.stack([self._sum(concept, part) for part in self.parts], axis=1)
        return np.concatenate([both, both[1:] - both[:1]])

    def curve(self, concept: AttributedConcept) -> Curve:
        """Means over scenarios of base, aligned and difference with pointwise 95 % intervals, `[model=3 part]`."""
        values = self.values(concept).mean(-1)
        around = mean_interval(self._moved(concept))
        return Curve(values, values + around.lower - around.value, values + around.upper - around.value)

    def _moved(self, concept: AttributedConcept) -> Float[np.ndarray, "model=3 part unit"]:
        """Influence of every scenario on the means: its own writes, and what it does to the directions."""
        score = concept.score + concept.influence.sum(1)
        return self.values(replace(concept, writes=concept.writes + concept.influence, score=score))

    def _sum(self, concept: AttributedConcept, part: Part) -> Float[np.ndarray, "model=2 unit"]:
        if part.component == "total":
            return concept.score
        mine = [
            i
            for i, leaf in enumerate(self.leaves)
            if leaf == part or (part.component == "attn" and leaf.layer == part.layer and _of_attention(leaf))
        ]
        return concept.writes[:, mine].sum(1)

    def band(self, concept: AttributedConcept) -> Float[np.ndarray, " part"]:
        """Half width of the 95 % band of the differences, simultaneous over all parts."""
        difference = self._moved(concept)[2]
        n = difference.shape[-1]
        centred = difference - difference.mean(-1, keepdims=True)
        signs = unit_signs(concept.keys, self.settings.draws, self.settings.seed)
        critical = largest_quantile(studentised_sums(centred, signs))
        return np.asarray(critical * difference.std(-1, ddof=1) / np.sqrt(n))

    def agreement(self, concept: AttributedConcept, draws: int = 999) -> tuple[Estimate, Estimate] | None:
        """Spearman's correlation over modules of direct write and total effect, in base and aligned; None without effects.

        Scenarios are drawn anew for the interval (percentiles of their bootstrap, the directions held).
        """
        if concept.total_effect is None:
            return None
        n = len(concept.units)
        direct = np.stack([self._sum(concept, module) for module in self.modules], axis=1)
        drawn = np.random.default_rng([self.settings.seed, 17]).multinomial(n, np.full(n, 1 / n), draws) / n
        found = []
        for ours, theirs in zip(direct, concept.total_effect, strict=True):
            value = _rank_correlation(ours.mean(-1)[None], theirs.mean(-1)[None])[0]
            ends = np.quantile(_rank_correlation(drawn @ ours.T, drawn @ theirs.T), [0.025, 0.975])
            found.append(Estimate(float(value), float(ends[0]), float(ends[1]), n))
        return found[0], found[1]

    def to_frame(self) -> pd.DataFrame:
        """The rows of `attribution.csv`, in units of each model's rms after the block read."""
        rows: list[dict[str, Any]] = []
        for c in self.concepts:
            curve, band = self.curve(c), self.band(c)
            lost = [not curve.lower[m, -1] > 0 for m in (0, 1)]
            missed = abs(c.writes.sum(1).mean(-1) - c.score.mean(-1)) > INEXACT * abs(c.score.mean(-1))
            inexact = [*missed, missed.any()]
            for m, model in enumerate(MODELS):
                for i, part in enumerate(self.parts):
                    flags = ["base_direction"] if self.direction == "base" and m > 0 else []
                    flags += ["base_not_detected"] if m != 1 and lost[0] else []
                    flags += ["aligned_not_detected"] if m > 0 and lost[1] else []
                    flags += ["beyond_band"] if m == 2 and abs(curve.value[m, i]) > band[i] else []
                    flags += ["inexact_sum"] if part.component == "total" and inexact[m] else []
                    rows.append(
                        {
                            "concept": c.concept, "template": c.template, "model": model, "component": part.component,
                            "layer": part.layer, "head": pd.NA if part.head is None else part.head,
                            "write": curve.value[m, i], "write_lower": curve.lower[m, i],
                            "write_upper": curve.upper[m, i], "flags": ";".join(flags),
                        }
                    )  # fmt: skip
        frame = pd.DataFrame(rows, columns=ATTRIBUTION_COLUMNS).astype({"head": "Int64"})
        # What figures say beside the rows, and the contract's columns have no place for.
        frame.attrs["n_scenarios"] = {c.concept: len(c.units) for c in self.concepts}
        frame.attrs["n_layers"] = self.n_layers
        return frame

    def lens_frame(self, top: int = 5) -> pd.DataFrame:
        """One row per concept, template, model and side: the tokens that the contrast raises or lowers most, and how far, in nats.

        `null_95` is the 95 % quantile of the most extreme token of random directions, and `p` that of the first token.
        """
        rows = []
        for c in self.concepts:
            for model, lens in zip(MODELS, c.lens, strict=False):
                frame = lens.to_frame()
                for side in ("up", "down"):
                    part = frame[frame["side"] == side].head(top)
                    tokens = ", ".join(
                        f"{token!r} {logit:+.2f}"
                        for token, logit in zip(part["token"], part["logit"], strict=True)
                    )
                    rows.append(
                        {
                            "concept": c.concept, "template": c.template, "model": model, "side": side, "tokens": tokens,
                            "null_95": part["null_95"].iloc[0], "p": part["p"].iloc[0], "n_neutral": lens.n_neutral,
                        }
                    )  # fmt: skip
        return pd.DataFrame(rows)


TYPES = {cls.__name__: cls for cls in (Attribution, AttributedConcept, LogitLens, Settings)}


def load_attribution(path: str | Path) -> Attribution:
    """Load what `Attribution.save` wrote."""
    return load_record(path, TYPES)


def leaf_parts(layer: int, n_heads: int, biased: bool) -> tuple[Part, ...]:
    """The components that write into the stream up to a block, in the order in which they do."""
    found = [Part("embedding", -1)]
    for block in range(layer + 1):
        found += [Part("head", block, head) for head in range(n_heads)]
        found += [Part("attn_bias", block)] if biased else []
        found.append(Part("mlp", block))
    return tuple(found)


def module_parts(layer: int) -> tuple[Part, ...]:
    """The embedding, and attention and MLP of every block up to one, each as a whole."""
    blocks = range(layer + 1)
    return (Part("embedding", -1), *(Part(name, block) for block in blocks for name in ("attn", "mlp")))


def _of_attention(part: Part) -> bool:
    return part.component in ("head", "attn_bias")


def _rank_correlation(
    one: Float[np.ndarray, "draw module"], other: Float[np.ndarray, "draw module"]
) -> Float[np.ndarray, " draw"]:
    x, y = (rankdata(a, axis=1) - (a.shape[1] + 1) / 2 for a in (one, other))
    size = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    return np.divide((x * y).sum(1), size, out=np.zeros(len(x)), where=size > 0)


WRITER_COLUMNS = [
    "concept",
    "template",
    "part",
    *(f"{m}{end}" for m in MODELS for end in ("", "_lower", "_upper")),
    "flags",
]


def largest_writers(frame: pd.DataFrame, top: int = 5, *, heads: bool = False) -> pd.DataFrame:
    """The parts whose writes differ most between the models, of each concept and template, and its total.

    Args:
        frame: columns of attribution.csv.
        top: parts per concept.
        heads: single heads and MLPs; otherwise every block's attention as a whole.
    """
    shown = ("embedding", "mlp", "head" if heads else "attn")
    rows: list[dict[str, Any]] = []
    for (concept, template), mine in frame.groupby(["concept", "template"], sort=False):
        by_part: dict[Part, dict[str, Any]] = {}
        for row in mine.to_dict("records"):
            part = Part(
                row["component"], int(row["layer"]), None if pd.isna(row["head"]) else int(row["head"])
            )
            entry = by_part.setdefault(
                part, {"concept": concept, "template": template, "part": part.name, "flags": ""}
            )
            for end in ("", "_lower", "_upper"):
                entry[f"{row['model']}{end}"] = row[f"write{end}"]
            if row["model"] == "difference":
                entry["flags"] = "" if pd.isna(row["flags"]) else row["flags"]
        total = next(part for part in by_part if part.component == "total")
        ranked = sorted(
            (p for p in by_part if p.component in shown), key=lambda p: -abs(by_part[p]["difference"])
        )
        rows += [by_part[part] for part in (total, *ranked[:top])]
    return pd.DataFrame(rows, columns=WRITER_COLUMNS)


# ---------------------------------------------------------------- the two entrances


def attribute(
    pair: ModelPair,
    concepts: Concept | Sequence[Concept],
    controls: Sequence[Concept] = (),
    *,
    template: str = "both",
    layer: int | None = None,
    direction: str = "own",
    total_effects: bool = True,
    draws: int = 1000,
    seed: int = 0,
    neutral: Sequence[str] | None = None,
    store: str | None = None,
) -> Attribution:
    """What every component of both models writes along each concept's direction at the read position.

    Args:
        pair: base and aligned model.
        concepts: targets.
        controls: contrasts that have nothing to do with affect or stance.
        template: raw, shared, own or both.
        layer: 0-based block after which the score is read; the last by default.
        direction: own (each model's), or base (the base's in both: only where they share a basis).
        total_effects: of targets, also ablate every attention and MLP and compute what follows.
        draws: multiplier draws behind the band.
        seed: of folds and draws.
        neutral: texts of no concept, for the logit lens and its null; the shipped ones by default.
        store: activation store; the default one if None.

    Raises:
        InputError: writes do not add up in this architecture, or no concept has one direction.
    """
    targets = (concepts,) if isinstance(concepts, Concept) else tuple(concepts)
    design = design_study(pair, targets, controls, template=template, neutral=neutral)
    return attribute_design(
        design, Settings(draws=draws, seed=seed), open_store(store), layer=layer, direction=direction,
        total_effects=total_effects,
    )  # fmt: skip


def attribute_design(
    design: Design,
    settings: Settings,
    store: Store,
    *,
    layer: int | None = None,
    direction: str = "own",
    total_effects: bool = True,
) -> Attribution:
    """Attribute a design's concepts; arguments as in `attribute`."""
    pair = design.pair
    target = pair.base.n_layers - 1 if layer is None else layer
    _check(pair, target, direction)
    found = tuple(c for c in design.concepts if c.stimuli.kind != "categorical")
    if not found:
        raise InputError(
            f"all of {', '.join(c.name for c in design.concepts)} have categories, expected two labels or grades, which have one "
            "direction; ask for one of their contrasts instead"
        )
    attributed = tuple(
        _attribute_concept(
            design, concept, template, target, direction, settings, store,
            total_effects and concept.role == "target",
        )
        for template in design.templates
        for concept in found
    )  # fmt: skip
    return Attribution(
        attributed, target, pair.base.n_layers, pair.base.n_heads, _biased(pair), direction, settings,
        tuple(c.name for c in design.concepts if c not in found), describe_design(design),
    )  # fmt: skip


def _check(pair: ModelPair, layer: int, direction: str) -> None:
    if direction not in DIRECTIONS:
        raise InputError(
            f"unknown direction '{direction}': expected one of {', '.join(DIRECTIONS)}; choose one"
        )
    if not isinstance(layer, int | np.integer) or not 0 <= layer < pair.base.n_layers:
        raise InputError(
            f"layer got {layer}, expected a block index from 0 to {pair.base.n_layers - 1} of '{pair.base.name}'; choose among those"
        )
    for model in pair.models:
        if model.additivity_refusal:
            raise InputError(
                f"'{model.name}' ({model.architecture}) cannot be attributed to its components: {model.additivity_refusal}, "
                "expected writes that sum to the residual stream; ask where expression is lost by stitching instead"
            )
    if pair.base.n_heads != pair.aligned.n_heads:
        raise InputError(
            f"base '{pair.base.name}' has {pair.base.n_heads} heads and aligned '{pair.aligned.name}' {pair.aligned.n_heads}, "
            "expected the same; choose a base model and a model tuned from it"
        )


def _biased(pair: ModelPair) -> bool:
    return any(model.attention_output(0)[1] is not None for model in pair.models)


@dataclass(frozen=True)
class _Side:
    """One model's activations for a concept, and where its contrast points."""

    model: Model
    prompts: tuple[RenderedPrompt, ...]
    stream: Activations
    mlp: Activations
    heads: Activations
    at: Activations
    """The stream after the block read."""
    differences: Float[np.ndarray, "unit d_model"]
    """D_s there: centred where the model centres, in units of its rms."""

    @property
    def rms(self) -> float:
        return float(self.at.rms[0])


def _attribute_concept(
    design: Design, concept: Concept, template: str, layer: int, direction: str, settings: Settings, store: Store,
    effects: bool,
) -> AttributedConcept:  # fmt: skip
    stimuli = concept.stimuli
    sides = [_read_side(design, concept, template, side, layer, store) for side in (0, 1)]
    by_unit = dict(zip(stimuli.units, grouped_folds(stimuli.units, N_FOLDS, settings.seed), strict=True))
    unit_folds = np.array([by_unit[unit] for unit in stimuli.units])
    folds = np.array([by_unit[item.unit] for item in stimuli.items])
    owners = sides if direction == "own" else [sides[0], sides[0]]
    directions = [_directions(owner, unit_folds, concept.name, layer) for owner in owners]
    writes, moves, scores, contrasts, strengths, lenses, lost = [], [], [], [], [], [], []
    for side, (ours, owner, w) in enumerate(zip(sides, owners, directions, strict=True)):
        writes.append(
            _contrast(_leaf_writes(ours, w, folds, layer, _biased(design.pair)), stimuli) / ours.rms
        )
        fold_means = _fold_means(ours, stimuli, unit_folds, layer, _biased(design.pair))
        moves.append(direction_influence(owner.differences, unit_folds, fold_means) / ours.rms)
        scores.append((ours.differences * w[unit_folds]).sum(-1))
        kernel = ours.differences @ ours.differences.T
        strengths.append(np.sqrt(max(float(u_statistic(kernel).value), 0.0)))
        mean = owner.differences.mean(0)
        length = float(ours.differences.mean(0) @ mean / np.linalg.norm(mean))
        contrasts.append(mean / np.linalg.norm(mean) * length * ours.rms)
        lenses.append(_lens(design, concept, template, side, layer, contrasts[-1], settings, store))
        if effects and ours.model.replay_refusal is None:
            label = f"attribution · {('base', 'aligned')[side]} · {template} · {concept.name}"
            lost.append(_total_effects(ours, w, folds, layer, stimuli, label))
    return AttributedConcept(
        concept.name, concept.role, template, stimuli.units, np.stack(writes), np.stack(moves), np.stack(scores), np.array(strengths),
        np.stack(contrasts), np.stack(lost) if len(lost) == 2 else None, tuple(lenses),
    )  # fmt: skip


def _layers(design: Design, needed: Sequence[int]) -> tuple[int, ...]:
    """What is read: the design's own layers where they will do, so that what attenuation left in the store serves."""
    return design.layers if set(needed) <= set(design.layers) else tuple(needed)


def _read_side(design: Design, concept: Concept, template: str, side: int, layer: int, store: Store) -> _Side:
    model, prompts = design.pair.models[side], design.prompts[concept.name, template][side]
    label = f"attribution · {('base', 'aligned')[side]} · {template} · {concept.name}"
    blocks = tuple(range(layer + 1))
    layers = _layers(design, (-1, *blocks))
    acts = extract(model, prompts, ("resid_post", "mlp_out", HEADS), layers, store, label=label)
    stream, mlp, heads = (acts[name] for name in ("resid_post", "mlp_out", HEADS))
    at = _only(stream, (layer,))
    differences = scenario_contrasts(at.normalised, concept.stimuli)[0, :, 0]
    return _Side(model, prompts, stream, _only(mlp, blocks), _only(heads, blocks), at, differences)


def _only(acts: Activations, layers: tuple[int, ...]) -> Activations:
    rows = [acts.layers.index(layer) for layer in layers]
    return replace(acts, acts=acts.acts[:, rows], layers=layers)


def fold_directions(
    differences: Float[np.ndarray, "unit d_model"], unit_folds: Int[np.ndarray, " unit"]
) -> Float[np.ndarray, "fold d_model"]:
    """Per fold the unit direction of the other folds' mean contrast; 0 where that is 0."""
    means = np.stack([differences[unit_folds != fold].mean(0) for fold in range(N_FOLDS)])
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    return np.divide(means, lengths, out=np.zeros_like(means), where=lengths > 0)


def direction_influence(
    differences: Float[np.ndarray, "unit d_model"],
    unit_folds: Int[np.ndarray, " unit"],
    fold_means: Float[np.ndarray, "fold leaf d_model"],
) -> Float[np.ndarray, "leaf unit"]:
    """What each scenario adds to the mean write of every component through the directions it helped to estimate.

    A term is mean_f n_f/n <B_f, w_f>, B_f the component's mean contrast in fold f and w_f = m_f/|m_f| the other folds' direction.
    Scenario s moves w_f by (I - w_f w_f')(D_s - m_f) / (n_train |m_f|): a component that writes across the direction has a term that
    hangs on where the direction points, and an interval without this would not know.
    """
    w = fold_directions(differences, unit_folds)
    added = np.zeros((fold_means.shape[1], len(differences)))
    for fold, (unit, means) in enumerate(zip(w, fold_means, strict=True)):
        train = unit_folds != fold
        centre = differences[train].mean(0)
        moves = differences[train] - centre
        moves = (moves - np.outer(moves @ unit, unit)) / (train.sum() * np.linalg.norm(centre))
        added[:, train] += (~train).sum() * means @ moves.T
    return added


def _directions(
    side: _Side, unit_folds: Int[np.ndarray, " unit"], concept: str, layer: int
) -> Float[np.ndarray, "fold d_model"]:
    w = fold_directions(side.differences, unit_folds)
    if not w.any(axis=1).all():
        raise InputError(
            f"concept '{concept}' has no contrast after block {layer} of '{side.model.name}': its texts give equal states there, "
            "expected states that differ; choose another layer or read position"
        )
    return w


def _leaf_writes(
    side: _Side,
    w: Float[np.ndarray, "fold d_model"],
    folds: Int[np.ndarray, " item"],
    layer: int,
    biased: bool,
) -> Float[np.ndarray, "item leaf"]:
    """What every component writes along each text's direction, in raw units; the bias, the same for all texts, as 0."""
    n_heads, d_head = side.model.n_heads, side.model.d_head
    embedding = _project(_only(side.stream, (-1,)).acts, w[:, None], folds)
    mlp = _project(side.mlp.acts, np.repeat(w[:, None], layer + 1, 1), folds)
    # W_O w is taken once per block and fold, so that no head's write is ever made in full.
    seen = np.stack([_weight(side.model, block) @ w.T for block in range(layer + 1)]).transpose(2, 0, 1)
    split = (layer + 1) * n_heads
    heads = _project(
        side.heads.acts.reshape(len(folds), split, d_head), seen.reshape(len(w), split, d_head), folds
    ).reshape(len(folds), layer + 1, n_heads)
    bias = np.zeros((len(folds), layer + 1, int(biased)))
    blocks = np.concatenate([heads, bias, mlp[..., None]], axis=-1).reshape(len(folds), -1)
    return np.concatenate([embedding, blocks], axis=1)


def _fold_means(
    side: _Side, stimuli: StimulusSet, unit_folds: Int[np.ndarray, " unit"], layer: int, biased: bool
) -> Float[np.ndarray, "fold leaf d_model"]:
    """Mean contrast of every component in every fold, as vectors in raw units: only as many as there are folds are ever made."""
    n_heads, d_head, d = side.model.n_heads, side.model.d_head, side.model.d_model

    def means(acts: Activations) -> np.ndarray:
        each = scenario_contrasts(acts.acts.astype(np.float64), stimuli)[0]
        return np.stack([each[unit_folds == fold].mean(0) for fold in range(N_FOLDS)])

    embedding, mlp = means(_only(side.stream, (-1,))), means(side.mlp)
    heads = means(side.heads).reshape(N_FOLDS, layer + 1, n_heads, d_head)
    blocks = []
    for block in range(layer + 1):
        weight = _weight(side.model, block).reshape(n_heads, d_head, d)
        made = np.einsum("fhk,hkd->fhd", heads[:, block], weight, optimize=True)
        blocks += [made, *([np.zeros((N_FOLDS, 1, d))] if biased else []), mlp[:, block, None]]
    return np.concatenate([embedding, *blocks], axis=1)


def _weight(model: Model, block: int) -> Float[np.ndarray, "d_attn d_model"]:
    return model.attention_output(block)[0].float().cpu().numpy().astype(np.float64)


def _project(
    rows: Float[np.ndarray, "item place width"],
    weights: Float[np.ndarray, "fold place width"],
    folds: Int[np.ndarray, " item"],
) -> Float[np.ndarray, "item place"]:
    """Every place's row along the direction of its text's fold, in float64."""
    out = np.empty(rows.shape[:2])
    for fold, weight in enumerate(weights):
        mine = folds == fold
        out[mine] = np.einsum("ipd,pd->ip", rows[mine].astype(np.float64), weight)
    return out


def _contrast(values: Float[np.ndarray, "item leaf"], stimuli: StimulusSet) -> Float[np.ndarray, "leaf unit"]:
    """The within-scenario contrast of every column."""
    return np.ascontiguousarray(scenario_contrasts(values[:, :, None], stimuli)[0, :, :, 0].T)


def _lens(
    design: Design, concept: Concept, template: str, side: int, layer: int, contrast: Float[np.ndarray, " d_model"],
    settings: Settings, store: Store,
) -> LogitLens:  # fmt: skip
    model, last = design.pair.models[side], design.pair.base.n_layers - 1
    name = neutral_name(concept)
    layers = _layers(design, tuple(sorted({layer, last})))
    label = f"attribution · {('base', 'aligned')[side]} · {template} · {name}"
    acts = extract(model, design.prompts[name, template][side], ("resid_post",), layers, store, label=label)[
        "resid_post"
    ]
    here = _only(acts, (layer,))
    finals = _only(acts, (last,)).acts[:LENS_STATES, 0].astype(np.float64)
    neutral = here.normalised[:, 0] * here.rms[0]  # centred where the model centres
    return logit_lens(model, contrast, finals, neutral, seed=settings.seed)


# ---------------------------------------------------------------- total effects


def _total_effects(
    side: _Side, w: Float[np.ndarray, "fold d_model"], folds: Int[np.ndarray, " item"], layer: int,
    stimuli: StimulusSet, label: str,
) -> Float[np.ndarray, "module unit"]:  # fmt: skip
    """Score lost per scenario when a module writes the same for all of a scenario's texts, all after it computed again.

    At every read position the module's output is moved by what brings its mean over them to the scenario's mean: its contrast is
    gone, and with it exactly its term of the score; what later blocks make of that is the rest of the total effect.
    """
    model, modules, site = side.model, module_parts(layer), Site(layer)
    away = {name: _to_the_mean(acts, stimuli) for name, acts in
            (("embedding", _only(side.stream, (-1,))), ("attn", side.heads), ("mlp", side.mlp))}  # fmt: skip
    longest = max(len(prompt.ids) for prompt in side.prompts)
    budget = max(longest, min(4096, STATE_BYTES // (4 * (layer + 2) * model.d_model)))
    scores = np.zeros((len(side.prompts), 1 + len(modules)))
    with tqdm(total=len(side.prompts), unit="text", desc=label, leave=False, disable=None) as bar:
        for index in map(list, plan_extraction(side.prompts, 1, model.d_model, budget).batches):
            batch = pad_tokens([side.prompts[i].ids for i in index], model.device)
            pool = Pool.of([side.prompts[i].read for i in index], batch)
            with torch.inference_mode():
                states = [Site(block) for block in range(-1, layer + 1)]
                whole = model.run(batch, read=states, last_layer=model.n_layers - 1, capture=True)
                ends = [pool(whole.acts[site])]
                for part in modules:
                    shift = torch.as_tensor(
                        away[part.component][index, max(part.layer, 0)], device=model.device
                    )
                    if part.component == "attn":
                        shift = shift @ model.attention_output(part.layer)[0].float()
                    moved = torch.zeros_like(whole.acts[site], dtype=torch.float32)
                    moved[pool.rows, pool.positions] = shift[pool.rows]
                    start, write = whole.acts[Site(part.layer)], {}
                    if part.component == "embedding":
                        start = add_values(moved)(start)
                    else:
                        start = whole.acts[Site(part.layer - 1)]
                        write = {Site(part.layer, f"{part.component}_out"): add_values(moved)}
                    after = -1 if part.component == "embedding" else part.layer - 1
                    run = model.replay(whole, start, after, [site], write, last_layer=layer, pool=pool)
                    ends.append(run.acts[site])
            read = torch.stack(ends, 1).cpu().numpy().astype(np.float64)
            scores[index] = np.einsum("ikd,id->ik", read, w[folds[index]])
            bar.update(len(index))
    return _contrast(scores[:, :1] - scores[:, 1:], stimuli) / side.rms


def _to_the_mean(acts: Activations, stimuli: StimulusSet) -> Float[np.ndarray, "item layer width"]:
    """What brings every text's row to the mean of its scenario's."""
    scenarios = list(dict.fromkeys(item.scenario for item in stimuli.items))
    place = np.array([scenarios.index(item.scenario) for item in stimuli.items])
    sums = np.zeros((len(scenarios), *acts.acts.shape[1:]), acts.acts.dtype)
    np.add.at(sums, place, acts.acts)
    return (sums / np.bincount(place)[:, None, None].astype(sums.dtype))[place] - acts.acts
