"""Whether two U-statistics allow a supposed value of a combination of them, and which values they allow.

Method. A signal that is weak seems to vary more where chance made it large, and its U-statistic is skewed: the variance and
the skewness are taken at the supposed value, and the longer tail gets a longer critical value. An interval is the hull of all
values that are not rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from empathy_probes.kernels import KernelPair, combined
from empathy_probes.stats import hull_of_members, skewed_critical


@dataclass(frozen=True)
class Deviation:
    """How far a combination of the two U-statistics lies from its supposed value."""

    value: Float[np.ndarray, "..."]
    variance: Float[np.ndarray, "..."]
    """If the supposed value is true."""
    skewness: Float[np.ndarray, "..."]
    """Likewise, as of Gaussian scenarios."""

    @property
    def below_mean(self) -> Float[np.ndarray, "..."]:
        """How far the median of the combination lies below its mean (Cornish and Fisher's first term)."""
        return self.skewness * np.sqrt(self.variance) / 6

    def beyond(self, critical: Float[np.ndarray, "..."] | float, n: int) -> Float[np.ndarray, "..."]:
        """Standard errors divided by their critical value: within -1 and 1 unless the supposed value is rejected.

        The longer tail gets the critical value of its own shape, at the whole error probability, because the shorter tail
        then holds next to nothing; it is never taken shorter than Student's.
        """
        longer = skewed_critical(critical, abs(self.skewness), n - 1)
        limit = np.where((self.value > 0) == (self.skewness > 0), longer, critical)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.value == 0, 0.0, self.value / np.sqrt(self.variance) / limit)


def deviation(
    pair: KernelPair,
    on_base: Float[np.ndarray, "..."] | float,
    on_aligned: Float[np.ndarray, "..."] | float,
    supposed: Float[np.ndarray, "..."] | float = 0.0,
) -> Deviation:
    """Hold on_base U_base + on_aligned U_aligned against a supposed value.

    The estimate of zeta_1 errs with U: where chance makes a signal large, it makes its variance large too. With mu_i
    the eigenvalues of the kernel, errors of U of the second order go with those of zeta_1 as sum mu_i z_i^2 goes with
    sum mu_i^2 z_i^2, so that zeta_1 at the supposed value is the estimate less beta (U - supposed), beta = sum mu^3 / sum mu^2.
    Errors of the first order move zeta_1 by the eigenvalues that the signal meets, which may be smaller: the
    first order's share of the variance counts half. Without all that the interval of a vanished signal covers 1.000 for
    .95 and one of a signal just above its noise .90 (docs/simulations). The third cumulant is
    24 sum mu_i^3 b_i^2 / n^2 + 8 sum mu^3 / n^3 with zeta_1 = sum mu_i^2 b_i^2; its first sum is taken as beta zeta_1.
    """
    n = pair.n
    value = np.asarray(on_base * pair.u[0] + on_aligned * pair.u[1] - supposed)
    zeta1, zeta2 = (combined(z, on_base, on_aligned) for z in (pair.zeta1, pair.zeta2))
    zeta2 = np.maximum(zeta2, 0)
    triangles = cubic(pair.triangles, on_base, on_aligned)
    beta = np.divide(triangles, zeta2, out=np.zeros_like(zeta2), where=zeta2 > 0)
    second = 2 * zeta2 / (n * (n - 1))
    first = 4 * np.maximum(zeta1 - beta * value, 0) / n
    whole = first + second
    beta = beta * (1 - 0.5 * np.divide(first, whole, out=np.zeros_like(whole), where=whole > 0))
    first = 4 * np.maximum(zeta1 - beta * value, 0) / n
    variance = first + second
    third = beta / n * (6 * first + 4 * second)
    # Multiplied out: a power that is no square takes numpy as long as all the rest.
    size = variance * np.sqrt(variance)
    skewness = np.divide(third, size, out=np.zeros_like(third), where=variance > 0)
    return Deviation(value, variance, skewness)


def cubic(of: np.ndarray, on_base: np.ndarray | float, on_aligned: np.ndarray | float) -> np.ndarray:
    """A trilinear mean of the combination, from its values with 0 to 3 factors of the aligned model."""
    none, one, two, three = of
    of_base = on_base**2 * (on_base * none + 3 * on_aligned * one)
    return np.asarray(of_base + on_aligned**2 * (3 * on_base * two + on_aligned * three))


@dataclass(frozen=True)
class Line:
    """A hypothesis for every x from 0 to 1: (on_base + x on_base') U_base + (the same) U_aligned = x supposed'."""

    on_base: Float[np.ndarray, "constant_slope=2 *batch"]
    on_aligned: Float[np.ndarray, "constant_slope=2 *batch"]
    supposed: Float[np.ndarray, "*batch"]
    point: Float[np.ndarray, "*batch"]
    """Where the estimate lies; NaN where it is no possible value."""


def members(
    pair: KernelPair, lines: Sequence[Line], critical: Float[np.ndarray, "..."] | float
) -> list[tuple[Float[np.ndarray, "*batch"], Float[np.ndarray, "*batch"]]]:
    """Smallest and largest x of each line that is not rejected; NaN where all are."""
    on_base, on_aligned = (
        np.stack([getattr(x, name) for x in lines], 1) for name in ("on_base", "on_aligned")
    )
    supposed = np.stack([line.supposed for line in lines])

    def rejected(x: np.ndarray) -> np.ndarray:
        there = deviation(pair, on_base[0] + on_base[1] * x, on_aligned[0] + on_aligned[1] * x, supposed * x)
        return abs(there.beyond(critical, pair.n)) - 1

    return list(zip(*hull_of_members(rejected, np.stack([line.point for line in lines])), strict=True))
