"""Do the intervals of attribution cover?  Writes of three components along cross-fitted directions, in two models.

No model is involved: contrasts are sums of what three components write. The first two write shares of a common signal, the third writes
noise alone; `keep` scales the aligned model's first write. A term depends on the number of scenarios its direction was fitted on: the truth is the mean over
fresh draws of that many. `coverage_without_directions` is that of a t interval over scenarios that takes the directions as known; `factor` is by how
much the package's own is too narrow: the standard deviation over draws of the mean, divided by its mean standard error.

    python scripts/simulations/attribution.py --out docs/simulations/attribution.csv
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from empathy_probes.attribution import direction_influence, fold_directions
from empathy_probes.stats import (
    binomial_interval,
    grouped_folds,
    largest_quantile,
    mean_interval,
    studentised_sums,
    unit_signs,
)

WIDTH = 48
MODEL_CORRELATION = 0.8
SHARES = (0.6, 0.4, 0.0)
# What the components write across the signal; it cancels in the sum.
ACROSS = (1.0, -1.0, 0.0)
PARTS = ("first", "second", "third", "total")
DRAWS = 499


def draw(n: int, trace: float, keep: float, rng: np.random.Generator) -> np.ndarray:
    """Writes `[model component unit width]`, the noise with a falling spectrum and `trace` times the squared signal in all."""
    scale = np.sqrt(1 / np.arange(1, WIDTH + 1))
    scale *= np.sqrt(trace / (scale**2).sum() / len(SHARES))
    signal = np.ones(WIDTH) / np.sqrt(WIDTH)
    shared = rng.standard_normal((len(SHARES), n, WIDTH))
    noise = [
        scale
        * (
            np.sqrt(MODEL_CORRELATION) * shared
            + np.sqrt(1 - MODEL_CORRELATION) * rng.standard_normal(shared.shape)
        )
        for _ in range(2)
    ]
    across = np.where(np.arange(WIDTH) % 2, 1.0, -1.0) / np.sqrt(WIDTH)
    shares = np.array([SHARES, (keep * SHARES[0], *SHARES[1:])])
    written = shares[..., None] * signal + np.array(ACROSS)[None, :, None] * across
    return written[:, :, None] + np.stack(noise)


def terms(writes: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[model part unit]` along each model's own directions, the total last; and what scenarios add through the directions."""
    found, moved = [], []
    for components in writes:
        whole = components.sum(0)
        w = fold_directions(whole, folds)[folds]
        means = np.stack([components[:, folds == fold].mean(1) for fold in range(5)])
        influence = direction_influence(whole, folds, means)
        found.append(np.concatenate([(components * w).sum(-1), (whole * w).sum(-1)[None]]))
        moved.append(np.concatenate([influence, influence.sum(0)[None]]))
    return np.stack(found), np.stack(moved)


def cell(n: int, trace: float, keep: float, replicates: int, seed: int) -> list[dict[str, object]]:
    """Coverage of every part's interval in one setting, and of the band over all parts of the difference."""
    rng = np.random.default_rng([seed, n, int(trace), int(100 * keep)])
    names = [str(i) for i in range(n)]
    folds, signs = grouped_folds(names, 5, seed), unit_signs(names, DRAWS, seed)
    means, halves, plains, bands = [], [], [], []
    for _ in range(replicates):
        both, moved = terms(draw(n, trace, keep, rng), folds)
        values, moved = (np.stack([*x, x[1] - x[0]]) for x in (both, moved))
        means.append(values.mean(-1))
        curve, plain = mean_interval(values + moved), mean_interval(values)
        halves.append(curve.upper - curve.value)
        plains.append(plain.upper - plain.value)
        change = (values + moved)[2] - (values + moved)[2].mean(-1, keepdims=True)
        critical = largest_quantile(studentised_sums(change, signs))
        bands.append(critical * change.std(-1, ddof=1) / np.sqrt(n))
    mean, half, plain, band = (np.array(x) for x in (means, halves, plains, bands))
    truth = mean.mean(0)
    miss = abs(mean - truth)
    rows = []
    setting = {"n": n, "noise_trace": trace, "keep": keep}
    from scipy.stats import t

    naive = half.mean(0) / t.ppf(0.975, n - 1)
    for m, model in enumerate(("base", "aligned", "difference")):
        for p, part in enumerate(PARTS):
            held = binomial_interval(int((miss[:, m, p] <= half[:, m, p]).sum()), replicates)
            rows.append({**setting, "model": model, "part": part, "truth": truth[m, p], "coverage": held.value,
                         "coverage_lower": held.lower, "coverage_upper": held.upper,
                         "coverage_without_directions": float((miss[:, m, p] <= plain[:, m, p]).mean()), "factor": mean[:, m, p].std() / naive[m, p]})  # fmt: skip
    held = binomial_interval(int((miss[:, 2] <= band).all(1).sum()), replicates)
    rows.append({**setting, "model": "difference", "part": "band over all", "truth": "", "coverage": held.value,
                 "coverage_lower": held.lower, "coverage_upper": held.upper, "coverage_without_directions": "", "factor": ""})  # fmt: skip
    return rows


def main() -> None:
    """Run every cell and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/simulations/attribution.csv"))
    args = parser.parse_args()
    rows = [
        row
        for n in (30, 60, 120)
        for trace in (2.0, 8.0, 20.0)
        for keep in (1.0, 0.25)
        for row in cell(n, trace, keep, args.replicates, args.seed)
    ]
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()
