"""Dose and response of concepts in two models: what `steering` measured, and every number that follows from it.

A scenario's slope is least squares over its small doses; the gain, their mean, is in nats per dose, with a t interval over scenarios,
and its attenuation 1 − gain(aligned)/gain(base) has Fieller's. Half of what the base's own texts move the answer is the aim of ED50.
Null bands come from gradients: where the response is a line, one gradient per text gives the slope along any direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from empathy_probes.design import Settings
from empathy_probes.results import Result
from empathy_probes.stats import LEVEL, Curve, critical_t, fieller_ratio, mean_interval

GAIN_COLUMNS = [
    "concept", "template", "site", "layer", "model", "dose", "readout", "readout_lower", "readout_upper", "slope", "slope_lower",
    "slope_upper", "wrong_way", "neutral_perplexity", "null_lower", "null_upper", "flags",
]  # fmt: skip
MODELS = ("base", "aligned")
SITE = "resid_post"
# A direction fitted from weak contrasts is noisy, and a noisy direction has a small gain whatever the model reads: below this
# cosine a gain, and a difference of gains between models, may be that.
SHARP = 0.9
BOUND = 1.1
"""Largest ratio of neutral perplexity that a tolerable dose may cost."""


@dataclass(frozen=True)
class SteeredConcept:
    """Dose and response of one concept under one template."""

    concept: str
    role: str
    template: str
    units: tuple[str, ...]
    readouts: Float[np.ndarray, "model=2 layer dose unit"]
    """Mean readout of a scenario's texts, in nats."""
    coupling: Float[np.ndarray, "model=2 unit"]
    """c_s without any dose: what the texts themselves do, in nats."""
    tangents: Float[np.ndarray, "model=2 layer unit"]
    """Slope at dose 0 by the gradient, nats per dose."""
    random: Float[np.ndarray, "model=2 layer draw"]
    """Mean slope at dose 0 along directions drawn from N(0, Σ) of neutral states."""
    shuffled: Float[np.ndarray, "model=2 layer draw"]
    """The same along cross-fitted directions of shuffled labels."""
    controls: Float[np.ndarray, "model=2 layer control"]
    """The same along the control concepts' directions."""
    cosine: Float[np.ndarray, "model=2 layer"]
    """Estimated cosine of the fitted direction with the true one: a gain is too small by about this factor."""


@dataclass(frozen=True)
class Gain(Result):
    """What doses of concepts do to the answer, in both models."""

    concepts: tuple[SteeredConcept, ...]
    doses: tuple[float, ...]
    """Ascending, in units of each model's rms."""
    small: float
    """Doses up to this size make the slope."""
    layers: tuple[int, ...]
    n_layers: int
    rms: Float[np.ndarray, "model=2 layer"]
    """What a dose of 1 adds, in raw activation units: the coefficient is dose · rms."""
    neutral_loss: Mapping[str, Float[np.ndarray, "model=2 layer dose"]]
    """Per concept and template: mean loss on neutral texts steered at every position, in nats per token."""
    controls: tuple[str, ...] = ()
    """Names of the control directions."""
    directions: str = "own"
    """own: each model's; base: the base's in both."""
    bound: float = BOUND
    settings: Settings = field(default_factory=Settings)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What kind of result this is, also in saved files."""
        return "gain"

    @property
    def _small(self) -> Bool[np.ndarray, " dose"]:
        return np.abs(self.doses) <= self.small + 1e-12

    def slopes(self, concept: SteeredConcept) -> Float[np.ndarray, "model=2 layer unit"]:
        """Least-squares slope of every scenario over the small doses, nats per dose."""
        return self._fit(concept, 1)

    def curvatures(self, concept: SteeredConcept) -> Float[np.ndarray, "model=2 layer unit"]:
        """Quadratic coefficient over the small doses, nats per dose²: how far from a line they lie."""
        return self._fit(concept, 2)

    def _fit(self, concept: SteeredConcept, power: int) -> Float[np.ndarray, "model=2 layer unit"]:
        x = np.array(self.doses)[self._small]
        weights = np.linalg.pinv(np.vander(x, 3 if power == 2 else 2, increasing=True))[power]
        return np.einsum("d,mldu->mlu", weights, concept.readouts[:, :, self._small])

    def gain(self, concept: SteeredConcept) -> Curve:
        """Mean slope `[model layer]` with its 95 % t interval over scenarios."""
        return mean_interval(self.slopes(concept))

    def attenuation(self, concept: SteeredConcept, level: float = LEVEL) -> Curve:
        """1 − gain(aligned)/gain(base) by layer, Fieller's interval; blank where the base's gain is not detected."""
        slopes = self.slopes(concept)
        n = slopes.shape[-1]
        base, aligned = slopes.mean(-1)
        centred = slopes - slopes.mean(-1, keepdims=True)
        covariance = np.einsum("ilu,jlu->ijl", centred, centred) / (n * (n - 1))
        ratio = fieller_ratio(base, aligned, covariance, critical_t(n - 1, level))
        ends = (1 - ratio.value, 1 - ratio.upper, 1 - ratio.lower)
        # A model against itself has a ratio of exactly 1, whatever rounding leaves of its interval.
        same = self._same_model & ~np.isnan(ratio.value)
        return Curve(*(np.where(same, 0.0, x) for x in ends))

    def decision(self, concept: str, template: str) -> str:
        """What became of the gain over all layers steered: attenuated, equivalent, inconclusive; empty where nothing is detected.

        Only layers count at which both models' directions are known well enough (`SHARP`): a noisy direction has a small gain by
        itself. Attenuated where any layer's interval, at a level that holds for all layers together (Bonferroni), lies beyond the margin;
        equivalent where the 90 % intervals of all layers with a detected base lie within it.
        """
        found = [c for c in self.concepts if (c.concept, c.template) == (concept, template)]
        if not found:
            return ""
        margin = self.settings.margin
        sharp = (found[0].cosine >= SHARP).all(0)
        strict = self.attenuation(found[0], 1 - (1 - LEVEL) / len(self.layers))
        known = ~np.isnan(strict.value) & sharp
        if not known.any():
            return ""
        if (strict.lower[known] > margin).any():
            return "attenuated"
        narrow = self.attenuation(found[0], 0.90)
        inside = (narrow.lower > -margin) & (narrow.upper < margin)
        return "equivalent" if inside[~np.isnan(narrow.value) & sharp].all() else "inconclusive"

    @property
    def _same_model(self) -> bool:
        found = [self.provenance.get(side, {}).get("weights") for side in MODELS]
        return found[0] is not None and found[0] == found[1]

    def wrong_way(self, concept: SteeredConcept) -> Float[np.ndarray, "model=2 layer"]:
        """Share of scenarios that a push towards label 1 moves towards label 0."""
        return np.asarray((self.slopes(concept) < 0).mean(-1))

    def null_band(self, concept: SteeredConcept) -> Float[np.ndarray, "end=2 model=2 layer"]:
        """Central 95 % of the gains of covariance-matched random directions."""
        return np.asarray(np.quantile(concept.random, [0.025, 0.975], axis=-1))

    def null_p(self, concept: SteeredConcept) -> Mapping[str, Float[np.ndarray, "model=2 layer"]]:
        """(1 + #{|null| ≥ |gain|}) / (draws + 1) for random and shuffled-label directions, from gradients on both sides."""
        own = abs(concept.tangents.mean(-1))[..., None]
        nulls = {"random": concept.random, "shuffled": concept.shuffled}
        return {
            kind: (1 + (abs(null) >= own - 1e-12).sum(-1)) / (null.shape[-1] + 1)
            for kind, null in nulls.items()
        }

    def ed50(self, concept: SteeredConcept) -> Curve:
        """Dose `[model layer]` that moves the mean answer by half of what the base's own texts move it (half its coupling).

        The same number of nats is asked of both models; the dose is interpolated on the grid, its interval inverts the
        movement's. NaN (and an infinite upper end) where no dose of the grid gets there, or the base's coupling is not detected.
        """
        whole = mean_interval(concept.coupling[0])
        detected = bool(whole.lower > 0 or whole.upper < 0)
        aim = float(whole.value) / 2
        zero = self.doses.index(0.0)
        moved = mean_interval(concept.readouts - concept.readouts[:, :, [zero]])
        ends = [
            np.apply_along_axis(
                _crossing, -1, curve[..., zero:] * np.sign(aim), np.array(self.doses[zero:]), abs(aim)
            )
            for curve in (
                moved.value,
                moved.upper if aim > 0 else moved.lower,
                moved.lower if aim > 0 else moved.upper,
            )
        ]
        value, lower, upper = (np.where(detected, x, np.nan) for x in ends)
        open_ended = detected & ~np.isnan(lower) & np.isnan(upper)
        return Curve(value, lower, np.where(open_ended, np.inf, upper))

    def tolerated(self, concept: SteeredConcept) -> Float[np.ndarray, "end=2 model=2 layer"]:
        """Most negative and most positive dose up to which no dose costs more than `bound` times the neutral perplexity."""
        zero = self.doses.index(0.0)
        loss = self.neutral_loss[cost_key(concept)]
        fine = loss <= loss[..., [zero]] + np.log(self.bound) + 1e-12
        found = np.zeros((2, *loss.shape[:2]))
        for end, order in enumerate((range(zero, -1, -1), range(zero, len(self.doses)))):
            unbroken = np.logical_and.accumulate(fine[..., list(order)], axis=-1)
            found[end] = np.array(self.doses)[list(order)][unbroken.sum(-1) - 1]
        return found

    def flags(self, concept: SteeredConcept, model: int, layer: int) -> list[str]:
        """What a reader must know about one curve."""
        gain = self.gain(concept)
        low, high = self.null_band(concept)[:, model, layer]
        found = ["base_direction"] if self.directions == "base" else []
        found += ["noisy_direction"] if concept.cosine[model, layer] < SHARP else []
        if gain.lower[model, layer] <= 0 <= gain.upper[model, layer]:
            found.append("gain_not_detected")
        if low <= concept.tangents[model, layer].mean() <= high:
            found.append("within_random_directions")
        if self.null_p(concept)["shuffled"][model, layer] > 0.05:
            found.append("within_shuffled_labels")
        return found

    def to_frame(self) -> pd.DataFrame:
        """The rows of `gain.csv`: readouts in nats, slopes in nats per dose, doses in units of the model's rms.

        `slope` and what belongs to it are repeated on every dose's row. The null band is the readout that the central 95 % of
        random directions give; it is known where the response is a line, and blank beyond the small doses.
        """
        rows: list[dict[str, Any]] = []
        for c in self.concepts:
            gain, shown = self.gain(c), mean_interval(c.readouts)
            wrong, null, loss = self.wrong_way(c), self.null_band(c), self.neutral_loss[cost_key(c)]
            zero = self.doses.index(0.0)
            for i, layer in enumerate(self.layers):
                for m, model in enumerate(MODELS):
                    flags = self.flags(c, m, i)
                    for d, dose in enumerate(self.doses):
                        line = bool(self._small[d])
                        # A negative dose turns the band round.
                        band = (
                            np.sort(shown.value[m, i, zero] + dose * null[:, m, i])
                            if line
                            else (np.nan, np.nan)
                        )
                        costly = loss[m, i, d] > loss[m, i, zero] + np.log(self.bound)
                        here = [
                            *flags,
                            *(["beyond_perplexity_bound"] if costly else []),
                            *([] if line else ["null_small_doses_only"]),
                        ]
                        rows.append(
                            {
                                "concept": c.concept, "template": c.template, "site": SITE, "layer": layer, "model": model,
                                "dose": dose, **shown.cells("readout", (m, i, d)), **gain.cells("slope", (m, i)),
                                "wrong_way": wrong[m, i], "neutral_perplexity": np.exp(loss[m, i, d]),
                                "null_lower": band[0], "null_upper": band[1], "flags": ";".join(here),
                            }
                        )  # fmt: skip
        frame = pd.DataFrame(rows, columns=GAIN_COLUMNS)
        frame.attrs["n_scenarios"] = {c.concept: len(c.units) for c in self.concepts}
        frame.attrs["n_layers"] = self.n_layers
        frame.attrs["bound"] = self.bound
        # For the figure; plain lists, because frames compare what they carry.
        frame.attrs["control_gains"] = {
            cost_key(c): {
                model: dict(zip(self.layers, c.controls[m].tolist(), strict=True))
                for m, model in enumerate(MODELS)
            }
            for c in self.concepts
        }
        return frame

    def by_model(self) -> pd.DataFrame:
        """One row per concept, template, layer and model: the gain, what other directions do, ED50 and the doses within the bound.

        Gains in nats per dose: `random` is their central 95 %, `controls` the smallest and largest along a control concept's
        direction, blank without any.
        """
        rows: list[dict[str, Any]] = []
        for c in self.concepts:
            gain, null, ed50, kept = self.gain(c), self.null_band(c), self.ed50(c), self.tolerated(c)
            p = self.null_p(c)["shuffled"]
            for i, layer in enumerate(self.layers):
                for m, model in enumerate(MODELS):
                    others = c.controls[m, i]
                    rows.append(
                        {
                            "concept": c.concept, "template": c.template, "layer": layer, "model": model, "n_scenarios": len(c.units),
                            **gain.cells("gain", (m, i)),
                            "random_lower": null[0, m, i], "random_upper": null[1, m, i],
                            "controls_lower": others.min() if len(others) else np.nan,
                            "controls_upper": others.max() if len(others) else np.nan, "n_controls": len(others),
                            "p_shuffled": p[m, i], **ed50.cells("ed50", (m, i)), "bound": self.bound,
                            "tolerated_lower": kept[0, m, i], "tolerated_upper": kept[1, m, i],
                        }
                    )  # fmt: skip
        return pd.DataFrame(rows)

    def summary(self) -> pd.DataFrame:
        """Gain, its attenuation and what bounds it, one row per concept, template and layer."""
        rows = []
        for c in self.concepts:
            gain, lost, ed50, kept = self.gain(c), self.attenuation(c), self.ed50(c), self.tolerated(c)
            bend, p = self.curvatures(c).mean(-1), self.null_p(c)
            for i, layer in enumerate(self.layers):
                row: dict[str, Any] = {
                    "concept": c.concept,
                    "template": c.template,
                    "layer": layer,
                    "n_scenarios": len(c.units),
                }
                for m, model in enumerate(MODELS):
                    row |= {
                        **gain.cells(f"gain_{model}", (m, i)), f"spread_{model}": self.slopes(c)[m, i].std(ddof=1),
                        f"curvature_{model}": bend[m, i], **ed50.cells(f"ed50_{model}", (m, i)),
                        f"tolerated_{model}": kept[1, m, i], f"p_random_{model}": p["random"][m, i],
                        f"p_shuffled_{model}": p["shuffled"][m, i],
                        f"cosine_{model}": c.cosine[m, i],
                    }  # fmt: skip
                rows.append(row | lost.cells("attenuation", i))
        return pd.DataFrame(rows)


TYPES = {cls.__name__: cls for cls in (Gain, SteeredConcept, Settings)}


def cost_key(concept: SteeredConcept) -> str:
    """Where a concept's neutral losses stand."""
    return f"{concept.concept}/{concept.template}"


def _crossing(curve: Float[np.ndarray, " dose"], doses: Float[np.ndarray, " dose"], aim: float) -> float:
    """First dose at which a curve reaches `aim`, by straight lines between doses; NaN where it does not."""
    over = np.flatnonzero(curve >= aim)
    if not len(over) or over[0] == 0:
        return 0.0 if len(over) else np.nan
    i = over[0]
    share = (aim - curve[i - 1]) / (curve[i] - curve[i - 1])
    return float(doses[i - 1] + share * (doses[i] - doses[i - 1]))
