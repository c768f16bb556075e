"""Do the intervals of what probes read cover?  Bits, granularity, correlation, slope and mean AUROC.

A probe's reading is a property of the concept, the model and the number of scenarios it was fitted on: the truth is the mean
over fresh draws of that many. Units of one draw share probes, so a t interval over units is too narrow; `factor` is by how
much the mean interval should be wider: the standard deviation over draws, divided by the mean half width over the quantile of t.

    python scripts/simulations/readings.py --out docs/simulations/readings.csv
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from empathy_probes.auroc import auroc, correlation
from empathy_probes.auroc_intervals import area_difference, area_interval, fisher_interval, paired_difference
from empathy_probes.bits import (
    bits,
    bits_difference,
    cross_fitted_grade_losses,
    cross_fitted_losses,
    entropy,
    grade_bits,
    grade_entropy,
)
from empathy_probes.coding import coarse_numbers, contrast_codes
from empathy_probes.jackknife import Jackknife, pair_variance
from empathy_probes.leaving_out import leave_out
from empathy_probes.measurements import smooth_reading
from empathy_probes.probes import cross_fitted_scores, paired_t
from empathy_probes.rows import scenario_slopes
from empathy_probes.stats import Curve, binomial_interval, critical_t, grouped_folds
from empathy_probes.stimuli import LabelKind

WIDTH = 32
MODEL_CORRELATION = 0.8
# Per kind: labels within a scenario, and where they lie.
KINDS: dict[LabelKind, tuple[np.ndarray, np.ndarray]] = {
    "binary": (np.arange(2.0), np.eye(2, WIDTH)[:1] * np.arange(2)[:, None]),
    "graded": (np.arange(3.0), np.eye(2, WIDTH)[:1] * np.arange(3)[:, None] / 2),
    "categorical": (np.arange(4.0), np.eye(4, WIDTH) + np.eye(6, WIDTH)[[4, 4, 5, 5]]),
}
NAMES = ("a/x", "a/y", "b/x", "b/y")


def draw(
    rng: np.random.Generator, kind: LabelKind, n: int, size: float, keep: float, draws: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """States [model item draw d], labels and units; draws take the place of layers."""
    labels, places = KINDS[kind]
    k = len(labels)
    shared, *own = rng.standard_normal((3, n * k, draws, WIDTH))
    scenario = np.repeat(rng.standard_normal((n, draws, WIDTH)), k, 0) / 2
    mix = [np.sqrt(MODEL_CORRELATION) * shared + np.sqrt(1 - MODEL_CORRELATION) * o for o in own]
    signal = np.tile(size * places, (n, 1))[:, None]
    states = np.stack([factor * signal + scenario + x for factor, x in zip((1, keep), mix, strict=True)])
    return states, np.tile(labels, n), [str(i // k) for i in range(n * k)]


def readings(kind: LabelKind, states: np.ndarray, labels: np.ndarray, units: list[str]) -> dict[str, Curve]:
    """Every reading of the base (or of both), as a study prints it; per draw."""
    found: dict[str, Curve] = {}
    folds = grouped_folds(units, 5)
    losses = {}
    if kind == "graded":
        losses["bits"] = [cross_fitted_grade_losses(x, labels, units) for x in states]
    else:
        classes = labels.astype(int)
        losses["bits"] = [cross_fitted_losses(x, classes, units) for x in states]
    coarse = coarse_numbers(NAMES if kind == "categorical" else (), labels)
    if coarse is not None:
        losses["granularity"] = [
            cross_fitted_losses(x, labels.astype(int), units, given=coarse) for x in states
        ]
    for name, (base, aligned) in losses.items():
        if kind == "graded":
            found[f"{name} base"] = grade_bits(base, grade_entropy(labels, units))
            found[f"{name} difference"] = bits_difference(base, aligned)
        else:
            whole = entropy(labels.astype(int), units, None if name == "bits" else coarse)
            found[f"{name} base"] = bits(base, whole)
            found[f"{name} difference"] = bits_difference(base, aligned)
    codes = contrast_codes(kind, labels)
    scores = [cross_fitted_scores(x, codes, folds) for x in states]
    left_out = [leave_out(x, [x], codes, folds, units, smooth_reading) for x in states]
    values = [
        correlation(x[:, 0], labels) if kind == "graded" else auroc(x, codes.astype(int)) for x in scores
    ]
    base, aligned = (
        Jackknife(value, without.left_out[0], without.pairs[0])
        for value, without in zip(values, left_out, strict=True)
    )
    if kind == "graded":
        found["correlation base"] = fisher_interval(base)
        found["correlation difference"] = paired_difference(base, aligned)
        slopes = [scenario_slopes(x[:, 0], labels, units, units) for x in scores]
        found["slope base"], found["slope difference"] = paired_t(slopes[0]), paired_t(slopes[1] - slopes[0])
    else:
        same = np.zeros(len(values[0]), bool)
        found["auroc base"] = area_interval(base)
        pairs = pair_variance(scores[0], scores[1], codes.astype(int), units, beyond_ramps=True)
        found["auroc difference"] = area_difference(base, aligned, same, pairs)
    return found


def table(draws: int, seed: int) -> Iterator[dict[str, object]]:
    """One row per kind of label, number of scenarios, size of the signal and reading."""
    for k, kind in enumerate(KINDS):
        for n in (40, 100):
            for size in (0.5, 1.0, 2.0):
                rng = np.random.default_rng([seed, k, n, int(10 * size)])
                parts = [
                    readings(kind, *draw(rng, kind, n, size, 0.5, 25)) for _ in range(max(1, draws // 25))
                ]
                for name in parts[0]:
                    value, lower, upper = (
                        np.concatenate([getattr(part[name], end) for part in parts])
                        for end in ("value", "lower", "upper")
                    )
                    hits = (lower <= value.mean()) & (value.mean() <= upper)
                    share = binomial_interval(int(hits.sum()), len(hits))
                    naive = np.mean(upper - lower) / 2 / critical_t(n - 1)
                    yield {
                        "kind": kind, "n": n, "size": size, "reading": name, "draws": len(hits), "value": round(value.mean(), 4),
                        "coverage": round(share.value, 4), "lower": round(share.lower, 4), "upper": round(share.upper, 4),
                        "factor": round(value.std() / naive, 3),
                    }  # fmt: skip


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for row in table(args.draws, args.seed):
        print(*row.values(), flush=True)
        rows.append(row)
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
