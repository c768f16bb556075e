"""What a probe extracts about a label, in bits: nested ridge probes with calibrated log-losses, and how far they err.

Label entropy minus held-out log-loss, the usable information of Xu et al. (2020, arXiv 2002.10689) for linear probes. A loss depends
on the held-out text and on the scenarios that its probe learnt from. How much the latter matters shows when a scenario is left out of
everything, and all probes and their calibration learn without it: in closed form, as if at every scenario in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import expit, log_softmax

from empathy_probes.jackknife import Jackknife
from empathy_probes.leaving_out import DualProbe, LeftOut
from empathy_probes.probes import N_FOLDS, from_their_mean
from empathy_probes.stats import Curve, critical_t, grouped_folds

# Penalties mixed, in units of the mean eigenvalue of the training Gram matrix.
PENALTIES = (0.1, 10.0)
# What is known of every unit: its loss; its influence on the mean loss (of a mean of numbers: the number less the mean);
# n times what it and another unit do to the mean loss together, beyond both alone; and the mean loss had it another label.
LOSS, INFLUENCE, PAIR, MISTOLD = range(4)
# Where pairs count this many times what influences do, half of that is taken off (`_variance`).
JOINT = 2.25
# Of Newton's method, from the map of texts labelled as they are to that of texts one of which has another label.
STEPS = 3


def cross_fitted_losses(
    features: Float[np.ndarray, "n layer d"],
    labels: Int[np.ndarray, " n"],
    units: Sequence[str],
    *,
    given: Int[np.ndarray, " n"] | None = None,
    seed: int = 0,
    repeats: int = 2,
) -> Float[np.ndarray, "what=4 layer unit"]:
    """Log-loss in bits of a nested ridge probe, averaged over each unit's texts and over fold repeats.

    Penalty and Platt map (one slope with an N(0, 1) prior on standardised scores, one intercept per class) come from
    inner out-of-fold scores only: a map fitted on in-sample scores is far too sure of itself.

    Args:
        features: one row per text.
        labels: 0 to C - 1; two classes or more.
        units: scenario of each text; all folds keep it together.
        given: coarse class of each text, told to the probe: it chooses among the classes that occur in it.
        seed: of the folds.
        repeats: how many times folds are drawn.

    Returns:
        Per layer and unit the loss, its influence, a pair's, and the mean loss of all had the unit another label (`LOSS`, `INFLUENCE`, `PAIR`, `MISTOLD`),
        units in the order of their first text (of pairs any order).
    """
    classes = np.eye(int(labels.max()) + 1)[labels]
    groups = np.zeros(len(labels), int) if given is None else given
    allowed = (np.eye(int(groups.max()) + 1)[groups].T @ classes > 0)[groups]
    if classes.shape[1] == 2 and allowed.all():
        return _nested_losses(features, classes[:, 1:], units, _TwoClasses(classes[:, 1]), seed, repeats)
    return _nested_losses(features, classes, units, _Classes(classes, allowed), seed, repeats)


def cross_fitted_grade_losses(
    features: Float[np.ndarray, "n layer d"],
    grades: Float[np.ndarray, " n"],
    units: Sequence[str],
    *,
    seed: int = 0,
    repeats: int = 2,
) -> Float[np.ndarray, "what=4 layer unit"]:
    """The same for graded labels: log-loss in bits of a normal distribution around a line in the nested probe's score.

    Line and spread come from inner out-of-fold scores. Losses are differential: only their difference from `grade_entropy` (or from
    another model's) means anything. A grade has no other label: `MISTOLD` is the loss. Arguments as in `cross_fitted_losses`.
    """
    return _nested_losses(features, grades[:, None], units, _Grades(grades), seed, repeats)


# Arrays that begin with the same batch axes.
_Fitted = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class _Classes:
    """How scores of classes become losses: a Platt map."""

    classes: Float[np.ndarray, "*set n m"]
    allowed: Bool[np.ndarray, "n m"]

    @property
    def other(self) -> Float[np.ndarray, "n m"]:
        """Another class of every text: the next that it could have, its own where there is none."""
        found = self.classes
        for k in reversed(range(1, self.classes.shape[-1])):
            rolled = np.roll(self.classes, k, -1)
            found = np.where((rolled * self.allowed).any(-1, keepdims=True), rolled, found)
        return found

    def told(self, classes: Float[np.ndarray, "*set n m"]) -> _Classes:
        """Of texts with other classes."""
        return replace(self, classes=classes)

    def fit(
        self,
        inner: Float[np.ndarray, "*batch train m"],
        train: Int[np.ndarray, " train"],
        weight: Float[np.ndarray, "*#batch train"],
        start: _Fitted | None = None,
        steps: int = 1,
    ) -> _Fitted:
        """The map from inner out-of-fold scores of the training texts, by their `weight`; of some, from where all of them lead."""
        if start is None:
            centre = inner.mean((-2, -1), keepdims=True)
            spread = np.maximum(inner.std((-2, -1), keepdims=True), 1e-12)
            scores = (inner - centre) / spread
            platt = _fit_platt(scores, self.classes[..., train, :], self.allowed[train], weight)
            return centre, spread, *platt
        # Scores keep their units, and from where all texts led one Newton step leads to where most of them do.
        centre, spread, *from_here = start
        scores = (inner - centre) / spread
        again = _fit_platt(scores, self.classes[..., train, :], self.allowed[train], weight, from_here, steps)
        return centre, spread, *again

    def losses(
        self, fitted: _Fitted, scores: Float[np.ndarray, "*batch rows m"], rows: Int[np.ndarray, " rows"]
    ) -> Float[np.ndarray, "*batch rows"]:
        """In nats."""
        centre, spread, slope, intercept = fitted
        logits = _logits((scores - centre) / spread, slope, intercept, self.allowed[rows])
        return _cross_entropy(logits, self.classes[..., rows, :])


@dataclass(frozen=True)
class _TwoClasses:
    """The same map of two classes, by the score of the second alone: that of the first is what it leaves of 1. In half the time."""

    second: Float[np.ndarray, "*set n"]
    """1 for texts of the second class, 0 for those of the first."""

    @property
    def other(self) -> Float[np.ndarray, "n 1"]:
        """As `_Classes.other`."""
        return 1 - self.second[:, None]

    def told(self, classes: Float[np.ndarray, "*set n 1"]) -> _TwoClasses:
        """As `_Classes.told`."""
        return _TwoClasses(classes[..., 0])

    def fit(
        self,
        inner: Float[np.ndarray, "*batch train 1"],
        train: Int[np.ndarray, " train"],
        weight: Float[np.ndarray, "*#batch train"],
        start: _Fitted | None = None,
        steps: int = 1,
    ) -> _Fitted:
        """As `_Classes.fit`."""
        scores = inner[..., 0] - 0.5
        if start is None:
            spread = np.maximum(np.sqrt((scores**2).mean(-1, keepdims=True)), 1e-12)
            return spread, *_fit_logistic(scores / spread, self.second[..., train], weight)
        spread, *from_here = start
        return spread, *_fit_logistic(scores / spread, self.second[..., train], weight, from_here, steps)

    def losses(
        self, fitted: _Fitted, scores: Float[np.ndarray, "*batch rows 1"], rows: Int[np.ndarray, " rows"]
    ) -> Float[np.ndarray, "*batch rows"]:
        """In nats."""
        spread, slope, intercept = fitted
        logits = slope * (scores[..., 0] - 0.5) / spread + intercept
        return np.logaddexp(0, (1 - 2 * self.second[..., rows]) * logits)


@dataclass(frozen=True)
class _Grades:
    """How scores of grades become losses: a line and a normal distribution."""

    grades: Float[np.ndarray, " n"]

    def fit(
        self,
        inner: Float[np.ndarray, "*batch train 1"],
        train: Int[np.ndarray, " train"],
        weight: Float[np.ndarray, "*#batch train"],
        start: _Fitted | None = None,
        steps: int = 1,
    ) -> _Fitted:
        """The line through inner out-of-fold scores and grades of the training texts, by their `weight`."""
        x, y = inner[..., 0], self.grades[train]
        w = np.broadcast_to(weight, x.shape)
        many = w.sum(-1, keepdims=True)
        centre, mean = ((w * values).sum(-1, keepdims=True) / many for values in (x, y))
        size = (w * (x - centre) ** 2).sum(-1, keepdims=True)
        slope = (w * (x - centre) * (y - mean)).sum(-1, keepdims=True) / np.where(size > 0, size, 1.0)
        left = (w * (y - mean - slope * (x - centre)) ** 2).sum(-1, keepdims=True)
        variance = np.maximum(left / (many - 2), 1e-12 * y.var())
        return centre, mean, slope, variance

    def losses(
        self, fitted: _Fitted, scores: Float[np.ndarray, "*batch rows 1"], rows: Int[np.ndarray, " rows"]
    ) -> Float[np.ndarray, "*batch rows"]:
        """In nats."""
        centre, mean, slope, variance = fitted
        missed = self.grades[rows] - mean - slope * (scores[..., 0] - centre)
        return np.asarray(np.log(2 * np.pi * variance) / 2 + missed**2 / (2 * variance))


def _nested_losses(
    features: Float[np.ndarray, "n layer d"],
    targets: Float[np.ndarray, "n m"],
    units: Sequence[str],
    judge: _Classes | _TwoClasses | _Grades,
    seed: int,
    repeats: int,
) -> Float[np.ndarray, "what=4 layer unit"]:
    """Held-out losses in bits per unit, penalties mixed by how they do on inner out-of-fold scores.

    A choice of the best one would be another one in the next sample: two models may differ by it alone, and no influence tells.
    """
    splits = _splits(units, seed, repeats)
    left_out = LeftOut(units, seed)
    n = left_out.n
    layers = features.shape[1]
    (centred,) = from_their_mean(features)
    total, mistold, without = (np.zeros((layers, many)) for many in (n, n, len(left_out.sets)))
    for layer in range(layers):
        gram = centred[layer] @ centred[layer].T
        for split in splits:
            probes = [[DualProbe(gram, targets, *rows, penalty) for rows in split] for penalty in PENALTIES]
            losses, fewer, other = _fold_losses(left_out, judge, probes, targets)
            total[layer] += losses @ left_out.share[split[0][1]]
            without[layer] += fewer
            mistold[layer] += other
    total /= repeats
    mistold /= repeats * n
    without /= repeats * np.repeat([n - 1, n - 2], n)
    one = without[:, :n]
    influence = (n - 1) * (one.mean(-1, keepdims=True) - one)
    pair = left_out.pairs(total.mean(-1), without)
    return np.stack([total, influence, pair, mistold]) / np.log(2)


def _mixed(
    losses: Float[np.ndarray, "penalty *batch rows"], badness: Float[np.ndarray, "penalty *batch"]
) -> Float[np.ndarray, "*batch rows"]:
    """Log-losses of what probes of several penalties say together, each as likely as it made the inner out-of-fold texts."""
    return -np.logaddexp.reduce(log_softmax(-badness, 0)[..., None] - losses, 0)


def _splits(
    units: Sequence[str], seed: int, repeats: int
) -> list[list[tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]]]:
    """Texts to learn from and to read in every fold, each followed by those of its inner folds."""
    found = []
    for repeat in range(repeats):
        outer = grouped_folds(units, N_FOLDS, seed * 1000 + 2 * repeat)
        for fold in range(N_FOLDS):
            train, test = np.flatnonzero(outer != fold), np.flatnonzero(outer == fold)
            inner = grouped_folds([units[int(i)] for i in train], N_FOLDS, seed * 1000 + 2 * repeat + 1)
            nested = [(train[inner != i], train[inner == i]) for i in range(N_FOLDS)]
            found.append([(train, test), *nested])
    return found


def _fold_losses(
    left_out: LeftOut,
    judge: _Classes | _TwoClasses | _Grades,
    probes: Sequence[Sequence[DualProbe]],
    targets: Float[np.ndarray, "n m"],
) -> tuple[Float[np.ndarray, " test"], Float[np.ndarray, " set"], Float[np.ndarray, " unit"]]:
    """Losses of one fold's texts in nats; summed over its units without each set of units, which neither teach nor are read; and the
    same where each unit teaches another label and is read as having it.

    `probes` are, for every penalty, that of the fold and those of its inner folds.
    """
    train, test = probes[0][0].train, probes[0][0].test
    weight = left_out.share.sum(1)
    counted = weight / weight.mean()
    inner = np.empty((len(probes), len(train), probes[0][0].scores.shape[1]))
    for k, (_, *nested) in enumerate(probes):
        for probe in nested:
            inner[k, np.searchsorted(train, probe.test)] = probe.scores
    read = np.stack([outer.scores for outer, *_ in probes])
    fitted = judge.fit(inner, train, counted[train])
    losses = _mixed(judge.losses(fitted, read, test), judge.losses(fitted, inner, train) @ weight[train])
    start = tuple(value[:, None] for value in fitted)

    def summed(
        judge: _Classes | _TwoClasses | _Grades,
        kept: Float[np.ndarray, "set n"],
        moves: Callable[[DualProbe], Float[np.ndarray, "set read m"]],
        steps: int,
    ) -> Float[np.ndarray, " set"]:
        inner_moved, read_moved = (np.repeat(scores[:, None], len(kept), 1) for scores in (inner, read))
        for k, (outer, *nested) in enumerate(probes):
            read_moved[k] += moves(outer)
            for probe in nested:
                inner_moved[k][:, np.searchsorted(train, probe.test)] += moves(probe)
        fitted = judge.fit(inner_moved, train, (kept * counted)[:, train], start, steps)
        weights = kept * weight
        badness = (judge.losses(fitted, inner_moved, train) * weights[:, train]).sum(-1)
        return (_mixed(judge.losses(fitted, read_moved, test), badness) * weights[:, test]).sum(-1)

    without = np.empty(len(left_out.sets))
    for chunk in left_out.chunks(inner.size):
        texts = left_out.texts(chunk)
        without[chunk] = summed(judge, left_out.kept(chunk), partial(DualProbe.moves, texts=texts), 1)
    if isinstance(judge, _Grades):
        return losses, without, np.full(left_out.n, weight[test] @ losses)
    change, mistold = judge.other - targets, np.empty(left_out.n)
    for chunk in left_out.chunks(inner.size, left_out.n):
        texts, kept = left_out.texts(chunk), left_out.kept(chunk)
        told = judge.told(targets + change * (1 - kept)[..., None])
        moves = partial(DualProbe.retaught, texts=texts, change=change)
        mistold[chunk] = summed(told, np.ones_like(kept), moves, STEPS)
    return losses, without, mistold


# Logit of a class that cannot be: finite, so that 0 times it is 0.
IMPOSSIBLE = -1e9


def _logits(
    scores: Float[np.ndarray, "*batch n m"],
    slope: Float[np.ndarray, "*batch"],
    intercept: Float[np.ndarray, "*batch m"],
    allowed: Bool[np.ndarray, "n m"],
) -> Float[np.ndarray, "*batch n m"]:
    # (C - 1)/C makes two classes the usual logistic of one standardised score.
    factor = (scores.shape[-1] - 1) / scores.shape[-1]
    logits = factor * slope[..., None, None] * scores + intercept[..., None, :]
    return np.where(allowed, logits, IMPOSSIBLE)


def _cross_entropy(
    logits: Float[np.ndarray, "*batch n m"], classes: Float[np.ndarray, "*set n m"]
) -> Float[np.ndarray, "*batch n"]:
    top, _, total = _exponentials(logits)
    return np.asarray(top + np.log(total) - np.einsum("...k,...k->...", logits, classes))


def _exponentials(
    logits: Float[np.ndarray, "*batch m"],
) -> tuple[Float[np.ndarray, "*batch"], Float[np.ndarray, "*batch m"], Float[np.ndarray, "*batch"]]:
    """The largest logit, exponentials of all less that, and their sum; class by class, faster than along a short last axis."""
    top = reduce(np.maximum, np.moveaxis(logits, -1, 0))
    powers = np.exp(logits - top[..., None])
    return top, powers, reduce(np.add, np.moveaxis(powers, -1, 0))


def _fit_platt(
    scores: Float[np.ndarray, "*batch n m"],
    classes: Float[np.ndarray, "*set n m"],
    allowed: Bool[np.ndarray, "n m"],
    weight: Float[np.ndarray, "*#batch n"],
    start: Sequence[np.ndarray] | None = None,
    steps: int = 20,
) -> tuple[Float[np.ndarray, "*batch"], Float[np.ndarray, "*batch m"]]:
    """Slope and intercepts by Newton's method on the penalised log-likelihood (convex), texts by their `weight`."""
    m = scores.shape[-1]
    factor = (m - 1) / m
    weight = weight[..., None]
    theta = np.zeros((*scores.shape[:-2], 1 + m))
    if start is not None:
        theta += np.concatenate([start[0][..., None], start[1]], -1)
    # The slope's prior; the intercepts' is next to none and only fixes their common shift.
    prior = np.diag([1.0, *[1e-6] * m])
    for _ in range(steps):
        logits = _logits(scores, theta[..., 0], theta[..., 1:], allowed)
        _, p, total = _exponentials(logits)
        p /= total[..., None]
        slack = weight * (p - classes)
        gradient = np.concatenate(
            [factor * np.einsum("...nk,...nk->...", slack, scores)[..., None], slack.sum(-2)], -1
        )
        mean = np.einsum("...k,...k->...", p, scores)[..., None]
        across = factor * weight * p * (scores - mean)
        hessian = np.empty((*theta.shape, 1 + m))
        hessian[..., 0, 0] = factor * np.einsum("...nk,...nk->...", across, scores)
        hessian[..., 0, 1:] = hessian[..., 1:, 0] = across.sum(-2)
        hessian[..., 1:, 1:] = (
            np.eye(m) * (weight * p).sum(-2)[..., None, :] - np.swapaxes(weight * p, -1, -2) @ p
        )
        step = np.linalg.solve(hessian + prior, (gradient + theta @ prior)[..., None])[..., 0]
        theta = theta - np.clip(step, -2, 2)
        if abs(step).max() < 1e-8:
            break
    return theta[..., 0], theta[..., 1:]


def _fit_logistic(
    scores: Float[np.ndarray, "*batch n"],
    labels: Float[np.ndarray, "*set n"],
    weight: Float[np.ndarray, "*#batch n"],
    start: Sequence[np.ndarray] | None = None,
    steps: int = 20,
) -> tuple[Float[np.ndarray, "*batch 1"], Float[np.ndarray, "*batch 1"]]:
    """`_fit_platt` of two classes: slope, and the difference of their intercepts."""
    # Each of two intercepts is half of their difference: a prior of 1e-6 on both is one of half that on the difference.
    prior = 0.5e-6
    slope, intercept = (np.zeros((*scores.shape[:-1], 1)),) * 2 if start is None else start
    for _ in range(steps):
        p = expit(slope * scores + intercept)
        slack, spread = weight * (p - labels), weight * p * (1 - p)
        by_slope = (slack * scores).sum(-1, keepdims=True) + slope
        by_intercept = slack.sum(-1, keepdims=True) + prior * intercept
        bent = spread * scores
        a, b = (bent * scores).sum(-1, keepdims=True) + 1, bent.sum(-1, keepdims=True)
        c = spread.sum(-1, keepdims=True) + prior
        whole = a * c - b**2
        step = (c * by_slope - b * by_intercept) / whole, (a * by_intercept - b * by_slope) / whole
        slope, intercept = slope - np.clip(step[0], -2, 2), intercept - np.clip(step[1], -4, 4)
        if max(abs(x).max() for x in step) < 1e-8:
            break
    return slope, intercept


def entropy(
    labels: Int[np.ndarray, " n"], units: Sequence[str], given: Int[np.ndarray, " n"] | None = None
) -> float:
    """Bits that knowing the label is worth, to one who knows the coarse class where one is `given`; every unit counts once, as in losses."""
    if given is not None:
        both = np.unique(np.stack([given, labels]), axis=1, return_inverse=True)[1].ravel()
        return entropy(both, units) - entropy(given, units)
    weight = unit_weights(units)
    share = np.bincount(labels, weight) / weight.sum()
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def grade_entropy(grades: Float[np.ndarray, " n"], units: Sequence[str]) -> float:
    """Differential entropy in bits of a normal distribution with the grades' variance; every unit counts once."""
    weight = unit_weights(units)
    centred = grades - np.average(grades, weights=weight)
    return float(np.log2(2 * np.pi * np.e * np.average(centred**2, weights=weight)) / 2)


def unit_weights(units: Sequence[str]) -> Float[np.ndarray, " n"]:
    """Weight of every text such that every unit counts once; their mean is 1."""
    place, many = np.unique(units, return_inverse=True, return_counts=True)[1:]
    weight = 1.0 / many[place]
    return weight / weight.mean()


def bits(losses: Float[np.ndarray, "what=4 layer unit"], label_entropy: float) -> Curve:
    """What a probe trained on this many scenarios extracts: label entropy minus log-loss, 95 % interval.

    A loss is never below 0 and made by few texts where it is small: what it may be less is a share of itself.
    """
    loss, reach = losses[LOSS].mean(-1), _reach(losses)
    least = loss * np.exp(-np.divide(reach, loss, out=np.zeros_like(loss), where=loss > 0))
    return Curve(label_entropy - loss, label_entropy - loss - reach, label_entropy - least)


def grade_bits(losses: Float[np.ndarray, "what=4 layer unit"], label_entropy: float) -> Curve:
    """The same of grades, whose losses have no lower bound."""
    return _interval(label_entropy - losses[LOSS].mean(-1), losses)


def bits_difference(
    base: Float[np.ndarray, "what=4 layer unit"], aligned: Float[np.ndarray, "what=4 layer unit"]
) -> Curve:
    """bits(aligned) - bits(base) from two models' losses on the same units, 95 % interval."""
    moved = base - aligned
    return _interval(moved[LOSS].mean(-1), moved)


def bits_covariance(
    losses: Float[np.ndarray, "model=2 what=4 layer unit"],
) -> Float[np.ndarray, "model=2 model=2 layer"]:
    """Covariance of the two models' bits, from the same units: what variances of both and of their difference leave for it."""
    base, aligned = losses
    own = np.stack([_variance(base), _variance(aligned)])
    shared = (own.sum(0) - _variance(base - aligned)) / 2
    shared = np.clip(shared, -np.sqrt(own.prod(0)), np.sqrt(own.prod(0)))
    return np.stack([np.stack([own[0], shared]), np.stack([shared, own[1]])])


def _interval(value: Float[np.ndarray, " layer"], known: Float[np.ndarray, "what=4 layer unit"]) -> Curve:
    reach = _reach(known)
    return Curve(value, value - reach, value + reach)


def _reach(known: Float[np.ndarray, "what=4 layer unit"]) -> Float[np.ndarray, " layer"]:
    return np.asarray(critical_t(known.shape[-1] - 1) * np.sqrt(_variance(known)))


def _variance(known: Float[np.ndarray, "what=4 layer unit"]) -> Float[np.ndarray, " layer"]:
    """Errors are scenarios read by chance and scenarios learnt from by chance: those of a mean of influences.

    From the spread of losses alone intervals were half as wide as needed where 40 scenarios teach some probes much and others
    little. What k scenarios do together influences count k times and pairs C(k, 2) times: with J and P, their sums of squares, the
    variance lies between J² / (J + 2 P), by Cauchy and Schwarz, and J. Where between, planted pairs tell, which is not
    where it is for readings (`jackknife.counted_once`): near J where P is small, near the other end where it is many times as much.

    A sample may lack by luck the rare scenario whose label is not what its texts show, and then says that nothing varies. The rare
    ones are counted as Jeffreys does, half a one more than there are: it makes as much of a difference as if a scenario of the sample
    had another label, taught and read. Where a fiftieth are such, .57 of intervals from 40 held the truth without it.
    """
    loss, mistold = known[LOSS].mean(-1), known[MISTOLD].mean(-1)
    found = Jackknife(loss, -known[INFLUENCE] / (known.shape[-1] - 1), known[PAIR])
    single = found.single
    share = np.divide(found.joint, single, out=np.zeros_like(single), where=single > 0)
    seen = single / (1 + np.minimum((share / JOINT) ** 2, 2 * share))
    return np.asarray(seen + (mistold - loss) ** 2 / 2)
