"""Do intervals of the secondary measures cover where texts differ in little but the concept?  Twins at two noise levels.

What is compared is what the scorecard compares, with all and a fifth of its nuisance and doubt: rules that hold where anything
may differ between the two texts of a scenario need not hold for minimal pairs. `factor` is by how much the mean interval should be
wider: the standard deviation over redraws, divided by the mean half width over the quantile of t.

    python scripts/simulations/measures.py --out docs/simulations/measures.csv [--sizes 40] [--redraws 100]
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from empathy_probes.populations import Options, Twin, exhibit
from empathy_probes.secondary import MEASURES, Exhibit, proportions, read_redraws
from empathy_probes.stats import binomial_interval, critical_t

NOISES = (1.0, 0.2)


def twins_of(base: str) -> list[Twin]:
    """Twins whose readings differ much, little, and by where they are read from."""
    return [
        Twin(base, "planted", "valence", 3, 0.25),
        Twin(base, "planted", "valence", 2, 0.75),
        Twin(base, "unread", "valence", 1),
        Twin(base, "local", "valence", 3, 0.25),
    ]


def at_noise(twin: Twin, noise: float) -> Exhibit:
    """What the scorecard compares of it, with so much of the scorecard's nuisance and doubt."""
    card = Options((twin,))
    # A local twin's own factor is in what the options make of it.
    factor = noise / twin.noise
    return exhibit(twin, replace(card, nuisance=card.nuisance * factor, doubt=card.doubt * factor))


def samples(shown: Exhibit, n: int, redraws: int, stream: int) -> Iterator[np.ndarray]:
    """Rows of the texts of n scenarios, drawn anew each time."""
    items: dict[str, list[int]] = {}
    for i, item in enumerate(shown.concept.stimuli.items):
        items.setdefault(item.scenario, []).append(i)
    rows_of = list(items.values())
    for r in range(redraws):
        chosen = np.random.default_rng([n, r, stream]).choice(len(rows_of), n, replace=False)
        yield np.concatenate([rows_of[i] for i in chosen])


def rows_of(twin: Twin, noise: float, n: int, redraws: int) -> Iterator[dict[str, object]]:
    """Coverage and factor of every measure."""
    shown = at_noise(twin, noise)
    found = read_redraws(shown, n, redraws)
    shorter = np.sqrt(1 - n / found.population)
    for i, (measure, column) in enumerate(MEASURES):
        entries = proportions([found], i)
        value, lower, upper = np.moveaxis(found.values[:, i].astype(np.float64), -1, 0)
        half = np.nanmean(upper - lower) / 2 / critical_t(n - 1)
        share = binomial_interval(int(entries.sum()), len(entries)) if len(entries) else None
        yield {
            "twin": twin.key, "noise": noise, "n": n, "measure": f"{measure}_{column}", "redraws": len(entries),
            "truth": f"{found.truth[i]:.3f}",
            "coverage": "" if share is None else f"{share.value:.3f}",
            "lower": "" if share is None else f"{share.lower:.3f}",
            "upper": "" if share is None else f"{share.upper:.3f}",
            "factor": f"{np.nanstd(value) / shorter / half:.2f}" if half > 0 else "",
        }  # fmt: skip


def tabulate(rows_of: Callable[[Twin, float, int, int], Iterator[dict[str, object]]], doc: str) -> int:
    """Print the rows of every twin at every noise and size, and write them with --out; the command line of this script, of `steps.py` and of `mistold.py`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=["llama-0", "gpt2-0"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[40])
    parser.add_argument("--noises", nargs="+", type=float, default=list(NOISES))
    parser.add_argument("--redraws", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for n in options.sizes:
        for noise in options.noises:
            for twin in [twin for base in options.bases for twin in twins_of(base)]:
                for row in rows_of(twin, noise, n, options.redraws):
                    rows.append(row)
                    print(*row.values(), flush=True)
    if options.out:
        pd.DataFrame(rows).to_csv(options.out, index=False)
    return 0


if __name__ == "__main__":
    sys.exit(tabulate(rows_of, __doc__))
