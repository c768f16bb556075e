"""How well something is read with each scenario left out in turn, and what that tells of its error.

Method. Delete one scenario, with all its texts; the spread of what is left gives the variance. What pairs of scenarios do
together is counted more than once so, and is taken off where it is known (Efron and Stein 1981).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from empathy_probes.auroc import auroc_placements, correlation, ramp_width
from empathy_probes.stats import critical_t, hoeffding_components


@dataclass(frozen=True)
class Jackknife:
    """How well something is read, and the same with each unit left out in turn."""

    value: Float[np.ndarray, "..."]
    left_out: Float[np.ndarray, "... unit"]
    pairs: Float[np.ndarray, "... unit"] | None = None
    """n times what units and the next on a ring do to it together beyond both alone (`leaving_out.LeftOut`), where that is known."""

    @property
    def units(self) -> int:
        """How many are left out in turn: scenarios."""
        return self.left_out.shape[-1]

    @property
    def critical(self) -> float:
        """Student's 97.5 % point for a standard error from so many units."""
        return float(critical_t(self.units - 1))

    @property
    def single(self) -> Float[np.ndarray, "..."]:
        """Sum of squares of what units do to it alone: its variance, were nothing joint."""
        return np.asarray((self.units - 1) * self.left_out.var(-1))

    @property
    def joint(self) -> Float[np.ndarray, "..."]:
        """Sum of squares of what units do to it in pairs, on the same scale; 0 where that is not known."""
        if self.pairs is None:
            return np.zeros_like(self.single)
        return np.asarray((self.units - 1) / (2 * self.units) * (self.pairs**2).mean(-1))

    @property
    def variance(self) -> Float[np.ndarray, "..."]:
        """Squared standard error; what units do together is counted once where `pairs` are known."""
        return np.asarray(self.single * counted_once(self.single, self.joint))

    def __sub__(self, other: Jackknife) -> Jackknife:
        """The difference of two values of which the same units were left out."""
        together = None if self.pairs is None or other.pairs is None else self.pairs - other.pairs
        return Jackknife(self.value - other.value, self.left_out - other.left_out, together)


def counted_once(
    single: Float[np.ndarray, "..."], pairs: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """By what the variance that single units tell is multiplied, so that what several do together counts once.

    What k units do together single ones count k times (Efron and Stein 1981), and pairs C(k, 2) times. With J and P, the
    variance lies between J² / (J + 2 P), by Cauchy and Schwarz, and J. J - P / 2 would be right if all that is joint were of order four;
    J² / (J + P / 2) is the same where that is little, and never below 0. On pairs of known truth it is right where texts differ in little
    else, and up to a third too much where anything may differ; what takes off more is too little there (docs/simulations).
    """
    total = single + pairs / 2
    return np.divide(single, total, out=np.ones_like(total), where=total > 0)


def leave_one_out(
    scores: Float[np.ndarray, "... n"], labels: Int[np.ndarray, "*category n"], groups: Sequence[str]
) -> Jackknife:
    """AUROC, or its mean over categories, with each scenario left out in turn; the scores stay as they are."""
    labels = np.asarray(labels)
    if labels.ndim == 2:
        each = [leave_one_out(scores[..., c, :], row, groups) for c, row in enumerate(labels)]
        value, left_out = (np.mean([getattr(x, name) for x in each], 0) for name in ("value", "left_out"))
        return Jackknife(value, left_out)
    up, down = auroc_placements(scores, labels)
    positive = labels == 1
    p, q = up.shape[-1], down.shape[-1]
    unit = np.unique([str(group) for group in groups], return_inverse=True)[1]
    n_units = int(unit.max()) + 1
    ones, one = _slots(unit[positive], n_units)
    zeros, zero = _slots(unit[~positive], n_units)
    mine, others = scores[..., positive][..., ones], scores[..., ~positive][..., zeros]
    own = (np.sign(mine[..., :, None] - others[..., None, :]) / 2 + 0.5) * one[:, :, None] * zero[:, None, :]
    lost = (up[..., ones] * one).sum(-1) * q + (down[..., zeros] * zero).sum(-1) * p - own.sum((-2, -1))
    wins = up.sum(axis=-1) * q
    left_out = (wins[..., None] - lost) / ((p - one.sum(-1)) * (q - zero.sum(-1)))
    return Jackknife(wins / (p * q), left_out)


def _slots(
    unit: Int[np.ndarray, " n"], n_units: int
) -> tuple[Int[np.ndarray, "unit most"], Bool[np.ndarray, "unit most"]]:
    """Where each unit's items stand, filled up to the most that a unit has, and which places are not filling."""
    counts = np.bincount(unit, minlength=n_units)
    real = np.arange(counts.max()) < counts[:, None]
    places = np.zeros(real.shape, int)
    places[real] = np.argsort(unit, kind="stable")
    return places, real


def leave_one_out_correlations(
    scores: Float[np.ndarray, "... n"], values: Float[np.ndarray, " n"], groups: Sequence[str]
) -> Jackknife:
    """Correlation with each scenario left out in turn."""
    unit = np.unique([str(group) for group in groups], return_inverse=True)[1]
    left_out = [correlation(scores[..., unit != s], values[unit != s]) for s in range(unit.max() + 1)]
    return Jackknife(correlation(scores, values), np.stack(left_out, -1))


def jackknife_covariance(first: Jackknife, second: Jackknife) -> Float[np.ndarray, "..."]:
    """Jackknife covariance; where pairs are known, what the variances of both and of their difference leave for it."""
    if first is second:
        return first.variance
    if first.pairs is not None and second.pairs is not None:
        shared = (first.variance + second.variance - (second - first).variance) / 2
        most = np.sqrt(first.variance * second.variance)
        return np.asarray(np.clip(shared, -most, most))
    n = first.left_out.shape[-1]
    a, b = (x.left_out - x.left_out.mean(axis=-1, keepdims=True) for x in (first, second))
    return np.asarray((n - 1) / n * (a * b).sum(axis=-1))


def pair_variance(
    base: Float[np.ndarray, "... n"],
    aligned: Float[np.ndarray, "... n"],
    labels: Int[np.ndarray, "*category n"],
    groups: Sequence[str],
    *,
    beyond_ramps: bool = False,
) -> Float[np.ndarray, "..."]:
    """zeta_2 of AUROC(aligned) - AUROC(base): the variance of what a pair of scenarios tells of it beyond its two members.

    An AUROC is a mean over pairs; two models that sort nearly alike differ in single pairs, and that is most of what there is.
    Scores and labels as in `auroc`; fewer than four scenarios tell nothing of it (0). `beyond_ramps`: of what `smooth_auroc` does
    not see of it.
    """
    rows = np.atleast_2d(np.asarray(labels)) == 1
    shape = base.shape[:-1] if np.ndim(labels) == 1 else base.shape[:-2]
    scores = [x.reshape(-1, len(rows), x.shape[-1]) for x in (base, aligned)]
    unit = np.unique([str(group) for group in groups], return_inverse=True)[1]
    n = int(unit.max()) + 1
    found = np.zeros(len(scores[0]))
    for i in range(len(found) if n > 3 else 0):
        pairs = np.zeros((n, n))
        for c, positive in enumerate(rows):
            wins = []
            for x in scores:
                lead = x[i, c][positive][:, None] - x[i, c][~positive]
                wins.append(np.sign(lead, dtype=np.float64))
                if beyond_ramps:
                    wins[-1] -= np.clip(lead / ramp_width(x[i, c], positive, np.ones(len(positive))), -1, 1)
            one, zero = (_membership(unit[side], n) for side in (positive, ~positive))
            pairs += zero @ (one @ (wins[1] - wins[0])).T * (n / one.shape[1] * n / zero.shape[1])
        # Half of the difference of signs, half for both orders, and the mean over categories.
        pairs = (pairs + pairs.T) / (4 * len(rows))
        np.fill_diagonal(pairs, 0)
        zeta2 = hoeffding_components(pairs.sum(-1)[None], (pairs**2).sum()[None, None])[3]
        found[i] = max(zeta2.item(), 0)
    return found.reshape(shape)


def _membership(unit: Int[np.ndarray, " m"], n: int) -> csr_array:
    return csr_array((np.ones(len(unit)), (unit, np.arange(len(unit)))), shape=(n, len(unit)))
