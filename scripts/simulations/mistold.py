"""Do intervals of bits cover where few texts are mislabelled?  By how many scenarios with another label are imagined.

A sample may hold none of the few texts that do not show their label, which make nearly all of the loss. `imagined` is how many
are counted beyond those that a sample holds (`bits.MISTOLD`); the package counts half a one. Twins and noises are those of `measures.py`.

    python scripts/simulations/mistold.py --out docs/simulations/mistold.csv [--redraws 100]
"""

import sys
from collections.abc import Iterator

import numpy as np
from measures import at_noise, samples, tabulate

from empathy_probes.bits import LOSS, MISTOLD, bits, bits_covariance, bits_difference, cross_fitted_losses
from empathy_probes.populations import Twin
from empathy_probes.redraws import holds
from empathy_probes.stats import Curve, binomial_interval, critical_t, fieller_ratio

IMAGINED = (0.0, 0.25, 0.5, 1.0)


def read(losses: np.ndarray, imagined: float) -> dict[str, Curve]:
    """All that is read of losses [model what redraw unit], as if so many scenarios had another label."""
    known, loss = losses.copy(), losses[:, LOSS]
    known[:, MISTOLD] = loss + np.sqrt(2 * imagined) * (
        losses[:, MISTOLD].mean(-1, keepdims=True) - loss.mean(-1, keepdims=True)
    )
    base, aligned = (bits(side, 1.0) for side in known)
    ratio = fieller_ratio(base.value, aligned.value, bits_covariance(known), critical_t(known.shape[-1] - 1))
    return {
        "base": base,
        "aligned": aligned,
        "difference": bits_difference(*known),
        "attenuation": Curve(1 - ratio.value, 1 - ratio.upper, 1 - ratio.lower),
    }


def rows_of(twin: Twin, noise: float, n: int, redraws: int) -> Iterator[dict[str, object]]:
    """Coverage and median width of every reading; of a ratio where the base is detected, as the package shows it."""
    shown = at_noise(twin, noise)
    labels = np.array([int(item.label) for item in shown.concept.stimuli.items])
    units = np.array([item.unit for item in shown.concept.stimuli.items])
    found = []
    for r, rows in enumerate(samples(shown, n, redraws, 47)):
        found.append(
            [
                cross_fitted_losses(a.normalised[rows], labels[rows], list(units[rows]), seed=r)[:, 0]
                for a in shown.acts
            ]
        )
    losses = np.moveaxis(np.array(found), 0, 2)
    for imagined in IMAGINED:
        curves = read(losses, imagined)
        truth = {reading: curve.value.mean() for reading, curve in curves.items()}
        truth["attenuation"] = 1 - truth["aligned"] / truth["base"]
        detected = curves["base"].lower > 0
        for reading, curve in curves.items():
            held = holds(
                np.array(truth[reading]),
                np.stack([curve.value, curve.lower, curve.upper], -1),
                n / shown.n,
                np.array(False),
                np.array(False),
            )
            held = held[detected] if reading == "attenuation" else held
            share = binomial_interval(int(held.sum()), len(held))
            yield {
                "twin": twin.key, "noise": noise, "n": n, "imagined": imagined, "reading": reading, "redraws": len(held),
                "truth": f"{truth[reading]:.3f}", "coverage": f"{share.value:.3f}",
                "lower": f"{share.lower:.3f}", "upper": f"{share.upper:.3f}",
                "width": f"{np.nanmedian(curve.upper - curve.lower):.3f}",
            }  # fmt: skip


if __name__ == "__main__":
    sys.exit(tabulate(rows_of, __doc__))
