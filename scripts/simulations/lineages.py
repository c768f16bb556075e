"""Does the trend test over a lineage keep its level, and what does it see?  No model is needed.

Contrast vectors of four stages are drawn as in `coverage.py`: D = keep · signal + noise in 48 dimensions, noise with a falling
spectrum, correlated 0.8 between any two stages and 0.8 between layers, its trace a multiple of the squared signal. Six layers;
every one follows the same course. Per replicate: is the trend significant at any layer (adjusted p ≤ .05), decided at any
layer, is the last stage against the base, and what is said of the shape.

    python scripts/simulations/lineages.py --replicates 150 --seed 0 --out docs/simulations/lineages.csv
"""

import argparse
import csv
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from empathy_probes.decisions import judge
from empathy_probes.design import Settings
from empathy_probes.kernels import strength_kernels
from empathy_probes.stats import binomial_interval
from empathy_probes.trends import LineageTrend, TracedConcept

DIMENSIONS, LAYERS, CORRELATION, DRAWS = 48, 6, 0.8, 500
STAGES = ("base", "sft", "dpo", "final")
COURSES = {
    "nothing": (1, 1, 1, 1),
    "steady, to .97": (1, 0.99, 0.98, 0.97),
    "steady, to .85": (1, 0.95, 0.9, 0.85),
    "steady, to .7": (1, 0.9, 0.8, 0.7),
    "first step only": (1, 0.8, 0.8, 0.8),
    "last step only": (1, 1, 1, 0.8),
    "down and half up again": (1, 0.7, 0.7, 0.85),
    "down and up again": (1, 0.7, 1, 1),
}
# What every contrast keeps at each stage: growth, then loss.
DRIFTS = {"no drift": (1, 1, 1, 1), "drift": (1, 1.3, 1.2, 0.9)}
CONTROLS, SPREAD = 8, 0.05


def draw_concept(
    name: str, role: str, keep: np.ndarray, n: int, trace: float, rng: np.random.Generator
) -> TracedConcept:
    """One concept of n scenarios in four stages; `keep` per stage."""
    spectrum = 1 / np.arange(1, DIMENSIONS + 1)
    scale = np.sqrt(spectrum * trace / spectrum.sum())
    r = np.sqrt(CORRELATION)

    def noise(*shape: int) -> np.ndarray:
        return rng.standard_normal((*shape, DIMENSIONS))

    # Correlated over stages and over layers: a part that all share, one per stage, one per layer, one of its own.
    parts = (r * r, noise(1, n, 1)), (r * np.sqrt(1 - r * r), noise(len(keep), n, 1))
    more = (np.sqrt(1 - r * r) * r, noise(1, n, LAYERS)), (1 - r * r, noise(len(keep), n, LAYERS))
    errors = sum(weight * part for weight, part in (*parts, *more)) * scale
    signal = rng.standard_normal((LAYERS, DIMENSIONS))
    signal /= np.linalg.norm(signal, axis=-1, keepdims=True)
    differences = keep[:, None, None, None] * signal + errors
    norms = np.ones((n, LAYERS))  # a unit rms, known: its own sampling error is the subject of coverage.py
    kernels = np.stack([strength_kernels(d, norms) for d in differences]).astype(np.float32)
    units = tuple(f"{name}-{s}" for s in range(n))
    return TracedConcept(
        name, role, "raw", "resid_post", tuple(range(LAYERS)), units, kernels, (False,) * len(keep)
    )


def replicate(
    course: np.ndarray, drift: np.ndarray, n: int, trace: float, controls: int, rng: np.random.Generator
) -> dict[str, bool]:
    """What is said of one draw."""
    drawn = [draw_concept("target", "target", course * drift, n, trace, rng)]
    for j in range(controls):
        own = drift * np.exp(SPREAD * rng.standard_normal() * np.arange(len(drift)) / (len(drift) - 1))
        drawn.append(draw_concept(f"control-{j}", "control", own, n, trace, rng))
    seed = int(rng.integers(1 << 30))
    trend = LineageTrend(tuple(drawn), STAGES, LAYERS, Settings(draws=DRAWS, seed=seed))
    tested = trend.trends("raw", "resid_post")["target"]
    last = judge(
        [drawn[0].stages[-1]], [c.stages[-1] for c in drawn[1:]], draws=DRAWS, seed=seed
    )[0]  # fmt: skip
    shapes = trend.shape("raw", "resid_post", "target")
    return {
        "trend_significant": bool((tested.p_adjusted <= 0.05).any()),
        "trend_attenuated": "attenuated" in tested.decision,
        "trend_amplified": "amplified" in tested.decision,
        "last_stage_significant": bool((last.p_adjusted <= 0.05).any()),
        "monotone_anywhere": "monotone" in shapes,
        "reversed_anywhere": "reversed" in shapes,
    }


def cells(replicates: int, seed: int) -> Iterator[list[object]]:
    """Rows of the table."""
    plain = [(course, "no drift", 60, 4.0, 0) for course in COURSES]
    with_controls = [
        (course, drift, 60, 4.0, CONTROLS) for course in ("nothing", "steady, to .7") for drift in DRIFTS
    ]
    without = [("nothing", "drift", 60, 4.0, 0)]
    for course, drift, n, trace, controls in (*plain, *with_controls, *without):
        name = f"{course};{drift};n={n};controls={controls}"
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        # Controls are eight times the work; a level needs more draws than a power.
        times = replicates * (4 if course == "nothing" else 1)
        times = max(2 * times // 5, 1) if controls else times
        keep, common = np.array(COURSES[course], float), np.array(DRIFTS[drift], float)
        hits: dict[str, int] = {}
        for _ in range(times):
            for metric, hit in replicate(keep, common, n, trace, controls, rng).items():
                hits[metric] = hits.get(metric, 0) + hit
        for metric, count in hits.items():
            x = binomial_interval(count, times)
            yield [course, drift, n, controls, metric, f"{x.value:.3f}", f"{x.lower:.3f}", f"{x.upper:.3f}", times]  # fmt: skip


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description="Level and power of the trend over a lineage.")
    parser.add_argument("--replicates", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV file; standard output by default")
    options = parser.parse_args()
    with options.out.open("w", newline="") if options.out else sys.stdout as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["course", "drift", "n", "controls", "metric", "value", "lower", "upper", "replicates"]
        )
        for row in cells(options.replicates, options.seed):
            writer.writerow(row)
            file.flush()


if __name__ == "__main__":
    main()
