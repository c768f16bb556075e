"""Do intervals of strength and attenuation cover the truth of phantoms?  The scorecard's pointwise rows, many redraws cheaply.

Only the concept a twin is about runs through both models, and only the planted block is compared: no controls, no bands.

    python scripts/simulations/twins.py --out docs/simulations/twins.csv [--bases llama-0] [--only erased]
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from empathy_probes.calibration import PLANTED
from empathy_probes.extraction import extract
from empathy_probes.phantoms import load_phantom_concepts
from empathy_probes.planting import list_bases, open_twin
from empathy_probes.populations import Twin
from empathy_probes.prompts import render
from empathy_probes.redraws import CACHED, CURVES, Population, Sample, contrasts_of, holds, sample_of
from empathy_probes.stats import binomial_interval
from empathy_probes.store import open_store

SCENARIOS = 1500
REDRAWS = {40: 600, 100: 600, 300: 200}
NUISANCE, DOUBT, SEED = 0.5, 0.2, 50_000
SHOWN = CURVES[:4]


def twins_of(base: str) -> list[Twin]:
    """The twins in which something of one concept was changed, and one that was trained on."""
    planted = [Twin(base, "planted", *where) for where in PLANTED]
    gone = [Twin(base, "erased", "valence", 2, 0.0), Twin(base, "erased", "distance", 3, 0.0)]
    partly = [Twin(base, "local", "valence", 3, 0.25), Twin(base, "rerouted", "valence", 2, 0.25)]
    return [*planted, *gone, *partly, Twin(base, "continued", "valence", 3)]


def open_sample(twin: Twin) -> Sample:
    """All scenarios of the twin's concept at its block."""
    pair = open_twin(list_bases()[twin.base], twin.family, twin.concept, twin.layer, twin.keep)
    concept = load_phantom_concepts(SCENARIOS, SEED, NUISANCE, DOUBT, (str(twin.concept),))[0][0]
    acts = []
    for model in pair.models:
        prompts = render(model.tokenizer, concept.stimuli, "raw", concept.speaker)
        store = open_store("memory://twins")
        acts.append(extract(model, prompts, ("resid_post",), (int(twin.layer or 0),), store)["resid_post"])
        store.clear()
    return sample_of(concept, acts)


def rows_of(twin: Twin) -> Iterator[dict[str, str]]:
    """Coverage of each curve, the share of two-sided intervals of attenuation, and their median width."""
    sample = open_sample(twin)
    population = Population((int(twin.layer or 0),), (sample,))
    base, aligned = np.sqrt(np.maximum(sample.u[:, 0], 0))
    truths = np.array([base, aligned, aligned - base, 1 - aligned / base])
    strength = np.array([name in ("base", "aligned") for name in SHOWN])
    for n, redraws in REDRAWS.items():
        rng = np.random.default_rng([7, n])
        curves = np.empty((redraws, len(SHOWN), 3))
        at_once = max(1, CACHED // (2 * n**2))
        chosen = np.stack([rng.choice(sample.n, n, replace=False) for _ in range(redraws)])
        for first in range(0, redraws, at_once):
            for i, c in enumerate(contrasts_of(sample, chosen[first : first + at_once], population)):
                for k, curve in enumerate((c.base, c.aligned, c.difference, c.attenuation)):
                    curves[first + i, k] = [curve.value[0], curve.lower[0], curve.upper[0]]
        held = holds(truths, curves, n / sample.n, strength, ~strength)
        ends = curves[:, -1, 1:]
        for k, name in enumerate(SHOWN):
            yield _row(twin, n, f"coverage_{name}", held[~np.isnan(curves[:, k, 1:]).all(-1), k])
        yield _row(twin, n, "two_sided", ~np.isnan(ends[:, 0]) & (ends[:, 1] < 1))
        width = f"{np.nanmedian(ends[:, 1] - ends[:, 0]):.3f}"
        yield _row(twin, n, "median_width", None) | {"value": width, "redraws": str(redraws)}


def _row(twin: Twin, n: int, metric: str, hits: np.ndarray | None) -> dict[str, str]:
    row = {
        "twin": twin.key,
        "n": str(n),
        "metric": metric,
        "value": "",
        "lower": "",
        "upper": "",
        "redraws": "",
    }
    if hits is not None:
        e = binomial_interval(int(hits.sum()), len(hits))
        row |= {
            "value": f"{e.value:.3f}",
            "lower": f"{e.lower:.3f}",
            "upper": f"{e.upper:.3f}",
            "redraws": str(len(hits)),
        }
    return row


def main() -> int:
    """Print the table, and write it with --out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bases", nargs="+", default=["llama-0", "gpt2-0"])
    parser.add_argument("--only", default="", help="only twins whose name holds this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for twin in [twin for base in options.bases for twin in twins_of(base) if options.only in twin.key]:
        for row in rows_of(twin):
            rows.append(row)
            print("  ".join(row.values()), flush=True)
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
