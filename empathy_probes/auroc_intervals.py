"""Intervals of AUROC and correlation, of their differences between two models, and of the attenuation of d'.

Method. Variances are of the jackknife over scenarios, plus one imaginary scenario at chance, which keeps them honest at the ceiling.
An area moves on the logit scale, a correlation on Fisher's. Scores learnt from the same scenarios get intervals up to `widen` times
as wide. Two models are read on the same scenarios, and their errors taken together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import special
from scipy import stats as distributions

from empathy_probes.auroc import d_prime
from empathy_probes.jackknife import (
    Jackknife,
    counted_once,
    jackknife_covariance,
    leave_one_out,
    leave_one_out_correlations,
    pair_variance,
)
from empathy_probes.stats import Curve, fieller_ratio


def area_interval(jackknife: Jackknife, widen: float = 1.0) -> Curve:
    """AUROC with a 95 % interval; see `auroc_interval`."""
    value, reach = jackknife.value, _area_reach(jackknife, widen)
    lower, upper = (_area_at(jackknife, reach, arm) for arm in (-1.0, 1.0))
    return Curve(value, np.fmin(lower, value), np.fmax(upper, value))


def auroc_interval(
    scores: Float[np.ndarray, "... n"],
    labels: Int[np.ndarray, "*category n"],
    groups: Sequence[str],
    widen: float = 1.0,
) -> Curve:
    """AUROC (labels as in `auroc`) with a 95 % delete-one-scenario interval, made up to `widen` times as wide.

    So much at chance; scores that sort everything depend on nothing else (`widened`).
    The ends lie on the logit scale, where the error near the ceiling is closer to normal than on the AUROC's own.
    """
    return area_interval(leave_one_out(scores, labels, groups), widen)


def auroc_difference(
    base: Float[np.ndarray, "... n"],
    aligned: Float[np.ndarray, "... n"],
    labels: Int[np.ndarray, "*category n"],
    groups: Sequence[str],
    widen: float = 1.0,
) -> Curve:
    """AUROC(aligned) - AUROC(base) on the same items with a 95 % interval: its range over both errors together.

    Each area moves along its own skewed interval, as far as a difference needs it (the ellipse whose sides are those intervals).
    Recovered from the ends of the two alone (MOVER), the longer arm towards chance stays even where two models move as
    one: intervals .039 wide of two all but equal models at AUROC .9 with 60 scenarios, now .006 (docs/simulations).
    """
    same = (base == aligned).all(tuple(range(-labels.ndim, 0)))
    pair = [leave_one_out(scores, labels, groups) for scores in (base, aligned)]
    return area_difference(pair[0], pair[1], same, pair_variance(base, aligned, labels, groups), widen)


def area_difference(
    base: Jackknife,
    aligned: Jackknife,
    same: Bool[np.ndarray, "..."],
    pairs: Float[np.ndarray, "..."] | float = 0.0,
    widen: float = 1.0,
) -> Curve:
    """AUROC(aligned) - AUROC(base), exactly 0 where they are the `same`; see `auroc_difference`. `pairs`: `pair_variance`."""
    pair = base, aligned
    # At the ceiling nothing varies, and the imaginary scenario may be another one in each model.
    own = [
        np.maximum(jackknife_covariance(x, x), _imaginary(x, x)) * _area_factor(x, widen) ** 2 for x in pair
    ]
    size, shared = np.sqrt(own[0] * own[1]), _widened_shared(*pair, pairs, widen)
    r = np.clip(np.divide(shared, size, out=np.zeros_like(size), where=size > 0), -1, 1)
    turn = np.linspace(0, 2 * np.pi, 129).reshape(-1, *[1] * r.ndim)
    arms = np.cos(turn), r * np.cos(turn) + np.sqrt(1 - r**2) * np.sin(turn)
    ends = [_area_at(x, _area_reach(x, widen), arm) for x, arm in zip(pair, arms, strict=True)]
    found, difference = ends[1] - ends[0], aligned.value - base.value
    lower, upper = np.fmin(found.min(0), difference), np.fmax(found.max(0), difference)
    return Curve(*(np.where(same, 0.0, x) for x in (difference, lower, upper)))


def area_attenuation(
    base: Jackknife,
    aligned: Jackknife,
    same: Bool[np.ndarray, "..."],
    pairs: Float[np.ndarray, "..."] | float = 0.0,
    widen: float = 1.0,
) -> tuple[Curve, Bool[np.ndarray, "..."]]:
    """1 - d'(aligned) / d'(base) with Fieller's 95 % interval, and where both AUROCs exceed 0.98 (ceiling).

    Blank where either AUROC is 0 or 1 (d' is infinite) or the base is not above chance; exactly 0 where both are the `same`.
    """
    pair = base, aligned
    raw = np.stack([x.value for x in pair])
    finite = ((raw > 0) & (raw < 1)).all(axis=0)
    area = np.where(finite, raw, 0.75)
    slope = np.sqrt(2) / distributions.norm.pdf(distributions.norm.ppf(area))
    factor = [_area_factor(x, widen) for x in pair]
    shared = _widened_shared(base, aligned, pairs, widen)
    covariance = [
        [jackknife_covariance(base, base) * factor[0] ** 2, shared],
        [shared, jackknife_covariance(aligned, aligned) * factor[1] ** 2],
    ]
    cells = [
        [
            (covariance[i][j] + _imaginary(a, b) * factor[i] * factor[j]) * slope[i] * slope[j]
            for j, b in enumerate(pair)
        ]
        for i, a in enumerate(pair)
    ]
    ratio = fieller_ratio(d_prime(area[0]), d_prime(area[1]), np.array(cells), base.critical)
    # Below chance there is nothing to attenuate either, however surely it is below.
    shown = finite & (raw[0] > 0.5)
    ends = (1 - ratio.value, 1 - ratio.upper, 1 - ratio.lower)
    curve = Curve(*(np.where(same, 0.0, np.where(shown, x, np.nan)) for x in ends))
    return curve, np.asarray((raw > 0.98).all(axis=0))


def correlation_interval(
    scores: Float[np.ndarray, "... n"],
    values: Float[np.ndarray, " n"],
    groups: Sequence[str],
    widen: float = 1.0,
) -> Curve:
    """Correlation of scores with graded labels, 95 % delete-one-scenario interval on Fisher's scale, widened likewise."""
    return fisher_interval(leave_one_out_correlations(scores, values, groups), widen)


def fisher_interval(found: Jackknife, widen: float = 1.0) -> Curve:
    """Correlation with a 95 % interval; see `correlation_interval`."""
    z = np.arctanh(np.clip(found.value, -1 + 1e-12, 1 - 1e-12))
    # On Fisher's scale itself: near 1 its derivative would exaggerate a change that is not small against 1 - r.
    moved = replace(found, left_out=np.arctanh(np.clip(found.left_out, -1 + 1e-12, 1 - 1e-12)))
    variance = moved.single * counted_once(found.single, found.joint)
    reach = found.critical * np.sqrt(variance) * widened(found.value**2, widen)
    return Curve(found.value, np.tanh(z - reach), np.tanh(z + reach))


def correlation_difference(
    base: Float[np.ndarray, "... n"],
    aligned: Float[np.ndarray, "... n"],
    values: Float[np.ndarray, " n"],
    groups: Sequence[str],
    widen: float = 1.0,
) -> Curve:
    """Correlation(aligned) - correlation(base) on the same items, paired 95 % delete-one-scenario interval."""
    pair = [leave_one_out_correlations(scores, values, groups) for scores in (base, aligned)]
    return paired_difference(pair[0], pair[1], widen)


def paired_difference(base: Jackknife, aligned: Jackknife, widen: float = 1.0) -> Curve:
    """Correlation(aligned) - correlation(base); see `correlation_difference`."""
    found = aligned - base
    reach = found.critical * np.sqrt(found.variance)
    reach *= widened(np.minimum(base.value**2, aligned.value**2), widen)
    return Curve(found.value, found.value - reach, found.value + reach)


def widened(share: Float[np.ndarray, "..."], widen: float) -> Float[np.ndarray, "..."]:
    """How many times as wide an interval over scenarios must be whose scores were learnt from the same scenarios.

    `share` is what the scores tell of what there is to tell: (2 AUROC - 1)^2, r^2. At 0 it is `widen`; a probe
    that reads everything does so whichever scenarios it learns from, and with one factor for all, intervals of strong
    readings held the truth in .99-1.00 (docs/simulations).
    """
    return 1 + (widen - 1) * (1 - np.clip(share, 0, 1))


def _imaginary(first: Jackknife, second: Jackknife) -> Float[np.ndarray, "..."]:
    """What one imaginary scenario at chance adds to the covariance.

    At AUROC 1 no scenario can move the estimate and the plain jackknife says "no error"; the imaginary one says
    "not more than about 3.6/n below 1", the rule of three. At 0.5 it adds nothing.
    """
    return (first.value - 0.5) * (second.value - 0.5) / first.units**2


def _shared(
    base: Jackknife, aligned: Jackknife, pairs: Float[np.ndarray, "..."] | float
) -> Float[np.ndarray, "..."]:
    """Covariance of two areas such that their difference has the variance of a mean over pairs of scenarios.

    The jackknife counts about twice what pairs tell beyond their members (Efron and Stein 1981, The jackknife estimate of
    variance): intervals of two all but equal models were 1.2 to 1.6 times too wide (docs/simulations). A smooth one does not
    see them at all.
    """
    n = base.units
    covariance = jackknife_covariance(base, aligned)
    if n < 4:
        return covariance
    if base.pairs is not None:
        return np.asarray(covariance - np.asarray(pairs) / (n * (n - 1)))
    total = jackknife_covariance(base, base) + jackknife_covariance(aligned, aligned) - 2 * covariance
    least = 2 * pairs / (n * (n - 1))
    excess = np.clip(2 * np.asarray(pairs) / ((n - 1) * (n - 2)), 0, np.maximum(total - least, 0))
    return np.asarray(covariance + excess / 2)


def _area_reach(jackknife: Jackknife, widen: float) -> Float[np.ndarray, "..."]:
    """Half of a 95 % interval, on the area's own scale."""
    variance = jackknife.variance + _imaginary(jackknife, jackknife)
    return np.asarray(jackknife.critical * np.sqrt(variance) * _area_factor(jackknife, widen))


def _area_factor(jackknife: Jackknife, widen: float) -> Float[np.ndarray, "..."]:
    return widened((2 * jackknife.value - 1) ** 2, widen)


def _widened_shared(
    base: Jackknife, aligned: Jackknife, pairs: Float[np.ndarray, "..."] | float, widen: float
) -> Float[np.ndarray, "..."]:
    """Covariance of two widened errors, whose luck of training is taken to be shared as far as what their texts tell."""
    return np.asarray(
        _shared(base, aligned, pairs) * _area_factor(base, widen) * _area_factor(aligned, widen)
    )


def _area_at(
    jackknife: Jackknife, reach: Float[np.ndarray, "..."], arm: Float[np.ndarray, "..."] | float
) -> Float[np.ndarray, "..."]:
    """The area `arm` times the reach away, which is taken on the logit scale.

    On the way towards chance the start moves to a value shrunk by one imaginary scenario: that keeps the end honest at 0 and 1;
    at the other end it would cut off the truth. It moves by as much as the error is that scenario's: all the way at 0 and 1,
    hardly where many pairs are sorted wrongly and their spread says enough.
    """
    value, n = jackknife.value, jackknife.units
    imaginary, seen = _imaginary(jackknife, jackknife), jackknife_covariance(jackknife, jackknife)
    total = imaginary + seen
    share = np.divide(imaginary, total, out=np.zeros_like(total), where=total > 0)
    towards = np.clip(np.where(value >= 0.5, -1, 1) * arm, 0, 1) * share
    start = value + ((n * value + 0.5) / (n + 1) - value) * towards
    inside = (start > 0) & (start < 1)
    x = np.where(inside, start, 0.5)
    return np.where(inside, special.expit(special.logit(x) + arm * reach / (x * (1 - x))), start)
