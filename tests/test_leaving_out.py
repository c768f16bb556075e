"""What probes would say without some of the scenarios, and how far that tells they err."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from empathy_probes.auroc import auroc, correlation, smooth_auroc
from empathy_probes.auroc_intervals import area_interval, auroc_interval
from empathy_probes.jackknife import Jackknife, counted_once
from empathy_probes.leaving_out import DualProbe, LeftOut, leave_out
from empathy_probes.probes import AREA_FACTOR, paired_scores
from empathy_probes.stats import grouped_folds


def test_a_probes_scores_without_some_texts_are_those_of_one_that_never_saw_them() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 9)) + 3, rng.standard_normal((50, 2))
    train, test = np.arange(40), np.arange(40, 50)
    centred = x[train] - x[train].mean(0)
    penalty = 0.7 * (centred**2).sum() / 40
    whole = Ridge(alpha=penalty).fit(x[train], y[train]).predict(x[test])
    sets = np.array([[3, 4, 5], [0, 50, 50], [45, 46, 50]])  # 50: none, and the last were never learnt from
    moves = DualProbe(x @ x.T, y, train, test, 0.7).moves(sets)
    for without, moved in zip(sets, moves, strict=True):
        left = np.setdiff1d(train, without)
        expected = Ridge(alpha=penalty).fit(x[left], y[left]).predict(x[test])
        np.testing.assert_allclose(whole + moved, expected, atol=1e-9)


def binary(n: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    labels = np.tile([0, 1], n)
    states = rng.standard_normal((2 * n, 2, width)) + 3
    states[..., 0] += 0.8 * labels[:, None]
    return states, labels[None], [f"s{i // 2}" for i in range(2 * n)]


def graded(n: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Scenarios of two or three texts whose grades do not add up to the same."""
    rng = np.random.default_rng(seed)
    units = [f"s{i}" for i in range(n) for _ in range(2 + i % 2)]
    grades = rng.uniform(0, 3, len(units))
    states = rng.standard_normal((len(units), 2, width)) + 3
    states[..., 0] += grades[:, None]
    return states, grades[None], units


def pearson(scores: np.ndarray, grades: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return correlation(scores[..., 0, :], grades[0], kept)


@pytest.mark.parametrize(("data", "value"), [(binary, smooth_auroc), (graded, pearson)])
@pytest.mark.parametrize("width", [90, 6])
def test_a_value_without_a_unit_is_that_of_fitting_and_reading_without_it(data, value, width: int) -> None:
    n = 24
    states, labels, units = data(n, width)
    other = states + np.random.default_rng(3).normal(size=states.shape)
    folds = grouped_folds(units, 5, 0)
    found = leave_out(states, [states, other], labels, folds, units, value)
    assert found.left_out.shape == found.pairs.shape == (2, 2, n)
    everything = np.ones(len(units))
    whole = np.stack(
        [value(paired_scores(states, x, labels, folds), labels, everything) for x in (states, other)]
    )
    np.testing.assert_allclose(found.value, whole)
    without = np.empty_like(found.left_out)
    for i, unit in enumerate(dict.fromkeys(units)):
        kept = np.array([name != unit for name in units])
        for read, x in enumerate((states, other)):
            scores = paired_scores(states[kept], x[kept], labels[:, kept], folds[kept])
            without[read, :, i] = value(scores, labels[:, kept], everything[kept])
    # Penalties are a share of the training texts' spread, which moves a little with them.
    moved = without - whole[..., None]
    assert abs(found.left_out - without).max() < 0.1 * abs(moved).max() + 1e-3
    assert np.corrcoef((found.left_out - whole[..., None]).ravel(), moved.ravel())[0, 1] > 0.99


@pytest.mark.parametrize(("data", "value", "nothing"), [(binary, smooth_auroc, 0.5), (graded, pearson, 0.0)])
def test_states_that_are_all_the_same_read_nothing_without_any_unit(data, value, nothing: float) -> None:
    states, labels, units = data(24, 6)
    states[:, 0] = 0.7
    folds = grouped_folds(units, 5, 0)
    found = leave_out(states, [states], labels, folds, units, value)
    assert (found.left_out[0, 0] == nothing).all() and (found.pairs[0, 0] == 0).all()
    assert (found.left_out[0, 1] != nothing).all() and (found.pairs[0, 1] != 0).all()


def test_pairs_do_together_what_the_values_without_them_say() -> None:
    """Of a mean nothing, and of a product of means what is left when both single parts are taken off."""
    n, x = 12, np.random.default_rng(0).standard_normal((2, 12))
    left_out = LeftOut([str(i) for i in range(n)], 0)
    kept = left_out.kept(slice(None))
    assert kept.shape == (2 * n, n) and (kept[:n].sum(1) == n - 1).all() and (kept[n:].sum(1) == n - 2).all()
    means = kept @ x.T / kept.sum(1, keepdims=True)
    np.testing.assert_allclose(left_out.pairs(x.mean(1), means.T), 0, atol=1e-12)
    dev = x - x.mean(1, keepdims=True)
    ring, after = left_out.ring, np.roll(left_out.ring, -1)
    product = left_out.pairs(x.mean(1).prod(keepdims=True), means.prod(1)[None])[0]
    both = [dev[0, i] * dev[1, j] + dev[1, i] * dev[0, j] for i, j in zip(ring, after, strict=True)]
    # Up to terms of the order of 1 / n of single units with themselves.
    assert np.corrcoef(product, both)[0, 1] > 0.9


def test_what_is_done_jointly_is_counted_between_once_and_as_often_as_it_may_be() -> None:
    pairs = np.array([0.0, 0.1, 2.0, 1000.0])
    share = counted_once(np.ones(4), pairs)
    np.testing.assert_allclose(share[[0, 2]], [1.0, 0.5])
    assert (np.diff(share) < 0).all() and (share >= 1 / (1 + 2 * pairs)).all()
    assert counted_once(np.zeros(1), np.zeros(1)) == 1 and counted_once(np.zeros(1), np.ones(1)) == 0
    # Single units move it by one each, and pairs do nothing or 19 times as much.
    alone = np.tile([1.0, -1.0], (1, 10))
    single = Jackknife(np.zeros(1), alone, np.zeros((1, 20))).variance
    assert single == Jackknife(np.zeros(1), alone).variance == 19
    assert Jackknife(np.zeros(1), alone, 19 * alone).variance == pytest.approx(19 / (1 + 19 / 40 * 19 / 2))


def test_the_variance_of_a_difference_has_pairs_of_its_own() -> None:
    rng = np.random.default_rng(0)
    one = Jackknife(np.array([0.8]), rng.standard_normal((1, 20)), rng.standard_normal((1, 20)))
    gone = one - one
    assert gone.value == 0 and gone.variance == 0
    plain = Jackknife(np.array([0.7]), rng.standard_normal((1, 20)))
    assert (one - plain).pairs is None
    other = Jackknife(np.array([0.7]), one.left_out + 1, one.pairs + 3)
    assert (other - one).left_out.var() < 1e-30 and ((other - one).pairs == pytest.approx(3))


def test_the_luck_of_a_probe_with_states_it_was_not_made_for_is_in_its_interval() -> None:
    rng = np.random.default_rng(5)
    n, draws, width = 60, 120, 24
    labels, units = np.tile([0, 1], n), [str(i // 2) for i in range(2 * n)]
    folds = grouped_folds(units, 5)
    # The same noise in both models, and the concept elsewhere: a probe reads it as far as chance tilts it there.
    base = rng.standard_normal((2 * n, draws, width))
    aligned = base.copy()
    base[..., 0] += 1.5 * labels[:, None]
    aligned[..., 1] += 4 * labels[:, None]
    scores = paired_scores(base, aligned, labels[None], folds)[:, 0]
    value = auroc(scores, labels)
    found = leave_out(base, [aligned], labels[None], folds, units, smooth_auroc)
    anew = area_interval(Jackknife(value, found.left_out[0], found.pairs[0]))
    fixed = auroc_interval(scores, labels, units, AREA_FACTOR)
    held = [((c.lower <= value.mean()) & (value.mean() <= c.upper)).mean() for c in (anew, fixed)]
    assert 0.9 < held[0] < 0.995 and held[1] < 0.8
