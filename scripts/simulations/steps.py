"""What single scenarios and pairs of them do to an AUROC, against its variance: with steps for wins, and with ramps.

Probes of the base read the base and a twin, at two noise levels (as in `measures.py`). V is the variance over redraws, J and P the
sums of squares of what scenarios do alone and in pairs (`jackknife.counted_once`); J, P and what is counted are means over redraws.

    python scripts/simulations/steps.py --out docs/simulations/steps.csv [--redraws 100]
"""

import sys
from collections.abc import Iterator

import numpy as np
from measures import at_noise, samples, tabulate

from empathy_probes.auroc import auroc, smooth_auroc
from empathy_probes.coding import contrast_codes
from empathy_probes.jackknife import Jackknife
from empathy_probes.leaving_out import leave_out
from empathy_probes.populations import Twin
from empathy_probes.probes import N_FOLDS, paired_scores
from empathy_probes.stats import grouped_folds


def steps(scores: np.ndarray, labels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """AUROC of the texts that are kept."""
    kept = np.broadcast_to(kept, (*scores.shape[:-2], kept.shape[-1]))
    areas = [
        auroc(x[None, :, there], labels[:, there])
        for x, there in zip(
            scores.reshape(-1, *scores.shape[-2:]), kept.reshape(-1, kept.shape[-1]) > 0, strict=True
        )
    ]
    return np.reshape(areas, scores.shape[:-2])


KINDS = {"steps": steps, "ramps": smooth_auroc}
READINGS = ("base", "transfer", "difference")


def rows_of(twin: Twin, noise: float, n: int, redraws: int) -> Iterator[dict[str, object]]:
    """V of the AUROC of steps, and J, P and the variance that is counted as shares of it, of either kind."""
    shown = at_noise(twin, noise)
    values, found = [], {kind: [] for kind in KINDS}
    for r, rows in enumerate(samples(shown, n, redraws, 43)):
        base, aligned = (a.normalised[rows] for a in shown.acts)
        few = [shown.concept.stimuli.items[i] for i in rows]
        codes = contrast_codes("binary", np.array([float(item.label) for item in few])).astype(int)
        units = [item.unit for item in few]
        folds = grouped_folds(units, N_FOLDS, r)
        own, other = (auroc(paired_scores(base, x, codes, folds), codes)[0] for x in (base, aligned))
        values.append([own, other, other - own])
        for kind, value in KINDS.items():
            both = leave_out(base, [base, aligned], codes, folds, units, value, r)
            one, two = (Jackknife(*(x[i] for x in (both.value, both.left_out, both.pairs))) for i in (0, 1))
            found[kind].append(
                [(x.single.item(), x.joint.item(), x.variance.item()) for x in (one, two, two - one)]
            )
    variance = np.var(values, axis=0, ddof=1) / (1 - n / shown.n)
    for kind, sums in found.items():
        single, pairs, counted = np.mean(sums, axis=0).T
        for k, reading in enumerate(READINGS):
            yield {
                "twin": twin.key, "noise": noise, "n": n, "reading": reading, "kind": kind, "redraws": redraws,
                "value": f"{np.mean(values, axis=0)[k]:.3f}", "sd": f"{np.sqrt(variance[k]):.4f}",
                "J/V": f"{single[k] / variance[k]:.2f}", "P/J": f"{pairs[k] / single[k]:.2f}",
                "counted/V": f"{counted[k] / variance[k]:.2f}",
            }  # fmt: skip


if __name__ == "__main__":
    sys.exit(tabulate(rows_of, __doc__))
