"""What every component of two models writes along a concept's direction: the numbers of an attribution, and their table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import rankdata

from empathy_probes.design import Settings
from empathy_probes.lens import LogitLens
from empathy_probes.results import Result
from empathy_probes.stats import (
    Curve,
    Estimate,
    largest_quantile,
    mean_interval,
    studentised_sums,
    unit_signs,
)
from empathy_probes.store import load_record

ATTRIBUTION_COLUMNS = [
    "concept", "template", "model", "component", "layer", "head", "write", "write_lower", "write_upper", "flags",
]  # fmt: skip
MODELS = ("base", "aligned", "difference")
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
        signs = unit_signs(concept.units, self.settings.draws, self.settings.seed)
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
                            **curve.cells("write", (m, i)), "flags": ";".join(flags),
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
