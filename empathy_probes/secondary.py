"""The secondary measures on many scenario samples of one pair: AUROC, bits, d′, cosine and transfer.

Each sample goes through `measure_concept` and the rows of attenuation.csv, as in a study, with neutral texts drawn anew. What
d′ and cosine estimate does not depend on n (but on the number of neutral texts): their truth is the value over the whole
population, the mean over draws of as many neutral texts. A cross-fitted probe is
better the more scenarios it learns from: the truth of AUROC, bits and transfer is the mean over all samples of that size,
so that coverage says whether the interval is as wide as the scatter of the estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from empathy_probes.activations import Activations
from empathy_probes.alignment import fit_rotation
from empathy_probes.auroc import d_prime
from empathy_probes.coding import scenario_contrasts
from empathy_probes.concepts import Concept
from empathy_probes.geometry import whitened_strengths
from empathy_probes.kernels import is_strong, mean_product, pair_kernels, strength_kernels
from empathy_probes.measurements import Measurement, measure_concept, neutral_states
from empathy_probes.redraws import ROUNDING, check_size, holds
from empathy_probes.rows import bits_rows, cosine_rows, reading_rows, separation_rows, transfer_rows

# (measure, column) of attenuation.csv.
MEASURES = (
    ("auroc", "base"), ("auroc", "aligned"), ("auroc", "difference"), ("auroc", "attenuation"),
    ("bits", "base"), ("bits", "aligned"), ("bits", "difference"), ("bits", "attenuation"),
    ("d_prime", "base"), ("d_prime", "aligned"), ("d_prime", "attenuation"),
    ("cosine", "aligned"), ("cosine_mapped", "aligned"),
    ("transfer_base_to_aligned", "aligned"), ("transfer_base_to_aligned_mapped", "aligned"),
)  # fmt: skip
# Nulls say nothing about intervals; a study draws 999.
NULL_DRAWS = 1
NEUTRAL = 320
# Draws of as many neutral texts behind the truth of what depends on them. 20 left an error of a third of that of 100 scenarios.
TRUTH_DRAWS = 100


@dataclass(frozen=True)
class Exhibit:
    """All texts of one concept, and neutral ones, at one layer of both models."""

    concept: Concept
    acts: tuple[Activations, Activations]
    neutral: tuple[Activations, Activations]
    same_model: bool = False
    """Both models have equal weights."""

    @property
    def n(self) -> int:
        """Number of scenarios."""
        return self.concept.stimuli.n_scenarios


@dataclass(frozen=True)
class Readings:
    """The secondary measures of one concept at one layer in every redraw of one pair at one n."""

    n: int
    population: int
    """Scenarios drawn from."""
    truth: Float[np.ndarray, " measure"]
    """In the order of `MEASURES`."""
    values: Float[np.ndarray, "redraw measure value_lower_upper=3"]

    def covers(self) -> Bool[np.ndarray, "redraw measure"]:
        """Which intervals hold the truth; an open end holds everything on its side."""
        strength = np.array([m == "d_prime" and column != "attenuation" for m, column in MEASURES])
        share = np.array(
            [m.startswith("cosine") or (m, c) == ("d_prime", "attenuation") for m, c in MEASURES]
        )
        return holds(self.truth, self.values, self.n / self.population, strength, share)


def read_redraws(exhibit: Exhibit, n: int, redraws: int, seed: int = 0) -> Readings:
    """Measure `redraws` samples of n scenarios.

    Args:
        exhibit: what is drawn from.
        n: scenarios per sample.
        redraws: how many samples.
        seed: of samples and folds.

    Raises:
        InputError: there are fewer than 2 n scenarios.
    """
    check_size(exhibit.n, n)
    items: dict[str, list[int]] = {}
    for i, item in enumerate(exhibit.concept.stimuli.items):
        items.setdefault(item.scenario, []).append(i)
    rows_of = [np.array(rows) for rows in items.values()]
    values = np.full((redraws, len(MEASURES), 3), np.nan, np.float32)
    for r in range(redraws):
        rng = np.random.default_rng([seed, n, r, 31])
        rows = np.concatenate([rows_of[i] for i in rng.choice(len(rows_of), n, replace=False)])
        few = rng.choice(len(exhibit.neutral[0].acts), NEUTRAL, replace=False)
        values[r] = _printed(_measured(exhibit, rows, few, seed + r))
    return Readings(n, exhibit.n, _truth(exhibit, values.astype(np.float64)), values)


def _measured(
    exhibit: Exhibit, rows: Int[np.ndarray, " item"], neutral: Int[np.ndarray, " m"], seed: int
) -> Measurement:
    stimuli = exhibit.concept.stimuli
    few = replace(exhibit.concept, stimuli=replace(stimuli, items=tuple(stimuli.items[i] for i in rows)))
    return measure_concept(
        few,
        "raw",
        [replace(a, acts=a.acts[rows]) for a in exhibit.acts],
        [replace(a, acts=a.acts[neutral]) for a in exhibit.neutral],
        np.zeros((1, len(rows))),
        seed,
        exhibit.same_model,
        null_draws=NULL_DRAWS,
    )


def _printed(m: Measurement) -> Float[np.ndarray, "measure value_lower_upper=3"]:
    """What a study prints, at the only layer there is."""
    rows: list[dict[str, Any]] = []
    for make in (reading_rows, bits_rows, separation_rows, cosine_rows, transfer_rows):
        rows += make(m, 1, ())
    found = {row["measure"]: row for row in rows}
    ends = ("", "_lower", "_upper")
    return np.array([[found[measure][column + end] for end in ends] for measure, column in MEASURES])


def _truth(
    exhibit: Exhibit, values: Float[np.ndarray, "redraw measure end"]
) -> Float[np.ndarray, " measure"]:
    shown = ~np.isnan(values[..., 0])
    count = shown.sum(0)
    total = np.where(shown, values[..., 0], 0).sum(0)
    means = dict(
        zip(MEASURES, np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0), strict=True)
    )
    areas = means["auroc", "base"], means["auroc", "aligned"]
    if 0.5 < areas[0] < 1 and areas[1] < 1:
        means["auroc", "attenuation"] = float(1 - d_prime(np.array(areas[1])) / d_prime(np.array(areas[0])))
    extracted = means["bits", "base"], means["bits", "aligned"]
    means["bits", "attenuation"] = 1 - extracted[1] / extracted[0] if extracted[0] > 0 else np.nan
    stimuli = exhibit.concept.stimuli
    differences = [scenario_contrasts(a.normalised, stimuli)[0] for a in exhibit.acts]
    # What d' and the mapped cosine are depends on how many neutral texts whiten and map: with few of them the covariance is
    # shrunk more, and a contrast that became quieter stands out less. They are properties of that number, as bits are of n.
    whole = neutral_states(exhibit.neutral, exhibit.acts)
    rng = np.random.default_rng([TRUTH_DRAWS, 37])
    draws = [rng.choice(len(whole[0]), NEUTRAL, replace=False) for _ in range(TRUTH_DRAWS)]
    neutral = [[x[rows] for x in whole] for rows in draws]
    whitened = np.mean(
        [[whitened_strengths(d, x)[0] for d, x in zip(differences, n, strict=True)] for n in neutral],
        axis=0,
    )
    separation = np.sqrt(np.maximum(whitened, 0))
    means["d_prime", "base"], means["d_prime", "aligned"] = separation.tolist()
    means["d_prime", "attenuation"] = float(1 - separation[1] / separation[0])
    one = np.ones((exhibit.n, 1))  # they are in units of the rms already
    pair = pair_kernels(*(strength_kernels(d, one) for d in differences))
    # A contrast that is gone has no direction.
    if is_strong(pair).all():
        there = differences[1][:, 0].astype(float)
        for measure, bases in (
            ("cosine", differences[:1]),
            (
                "cosine_mapped",
                differences[:1] if exhibit.same_model else [_turned(differences[0], *n) for n in neutral],
            ),
        ):
            crossed = [mean_product(base[:, 0].astype(float), there) for base in bases]
            means[measure, "aligned"] = float(
                np.clip(np.mean(crossed) / np.sqrt(pair.u[0, 0] * pair.u[1, 0]), -1, 1)
            )
    return np.array([means[measure] for measure in MEASURES])


def _turned(
    rows: Float[np.ndarray, "n layer=1 d_model"], *neutral: Float[np.ndarray, "m layer=1 d_model"]
) -> Float[np.ndarray, "n layer=1 d_model"]:
    left, right = fit_rotation(*(x[:, 0] for x in neutral))
    return np.asarray(rows @ left @ right.T)


def proportions(readings: Sequence[Readings], index: int) -> Float[np.ndarray, " redraw"]:
    """Zeros and ones of one measure over all pairs of a cell, without redraws that leave it blank.

    Nor without intervals that hold the truth and are as narrow as rounding, where both models are equal but for that or no text changes
    its rank: a share of them would say nothing of how far anything errs.
    """
    entries = []
    for r in readings:
        lower, upper = np.moveaxis(r.values[:, index, 1:].astype(np.float64), -1, 0)
        held, width = r.covers()[:, index], upper - lower
        blank = (np.isnan(lower) & np.isnan(upper)) | np.isnan(r.truth[index])
        entries.append(held[~blank & ~(held & (width < 10 * ROUNDING))].astype(float))
    return np.concatenate(entries)
