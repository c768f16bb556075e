"""Bits: what a probe extracts, and how far that errs with the scenarios it learnt from."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from empathy_probes import bits as module
from empathy_probes.bits import (
    INFLUENCE,
    LOSS,
    MISTOLD,
    PAIR,
    _Classes,
    _fit_logistic,
    _fit_platt,
    _nested_losses,
    bits,
    bits_covariance,
    bits_difference,
    cross_fitted_grade_losses,
    cross_fitted_losses,
    entropy,
    grade_bits,
    grade_entropy,
)
from empathy_probes.stats import binomial_interval, critical_t


def contrast(n: int, gap: float, seed: int = 0, width: int = 12) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    labels = np.tile([1, 0], n)
    rows = rng.standard_normal((2 * n, 2, width))
    rows[..., 0] += gap * labels[:, None]
    return rows, labels, [str(i // 2) for i in range(2 * n)]


def test_bits_are_none_on_noise_and_never_more_than_the_label_is_worth() -> None:
    none = [bits(cross_fitted_losses(*contrast(40, 0.0, seed)), 1.0).value for seed in range(12)]
    assert -0.08 < np.mean(none) < 0.02
    much = bits(cross_fitted_losses(*contrast(40, 12.0)), 1.0).value
    assert (much > 0.9).all() and (much <= 1).all()
    assert entropy(np.array([0, 1, 2, 3]), list("aabb")) == 2
    assert entropy(np.array([0, 1, 0, 1]), list("aabb")) == 1


def test_bits_of_scenarios_with_unequal_numbers_of_texts_are_none_where_nothing_is_known() -> None:
    """Texts of label 1 are the most, scenarios in which they are the most are not: losses and entropy count scenarios."""
    labels = np.concatenate([np.tile([1, 1, 1, 1, 0], 40), np.tile([1, *[0] * 7], 10)])
    units = [str(s) for s in range(40) for _ in range(5)] + [str(40 + s) for s in range(10) for _ in range(8)]
    assert labels.mean() < 0.65 and entropy(labels, units) == pytest.approx(0.9208, abs=1e-3)
    rng = np.random.default_rng(0)
    found = [
        entropy(labels, units)
        - cross_fitted_losses(rng.standard_normal((280, 1, 6)), labels, units, seed=s)[LOSS].mean()
        for s in range(4)
    ]
    assert -0.05 < np.mean(found) < 0.01
    grades = labels + 0.5 * (np.arange(280) % 3)
    none = [
        grade_entropy(grades, units)
        - cross_fitted_grade_losses(rng.standard_normal((280, 1, 6)), grades, units, seed=s)[LOSS].mean()
        for s in range(4)
    ]
    assert -0.05 < np.mean(none) < 0.01


def test_states_that_are_all_the_same_teach_nothing_for_sure() -> None:
    units = [str(i // 2) for i in range(80)]
    same = bits(cross_fitted_losses(np.zeros((80, 1, 4)), np.tile([0, 1], 40), units), 1.0)
    assert abs(np.array([same.value, same.lower, same.upper])).max() < 1e-9


@pytest.mark.parametrize("kind", ["binary", "graded", "categorical"])
def test_an_influence_is_what_probes_trained_without_the_scenario_lose(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folds as they were; what is left of a difference is the unit of penalties and scores."""
    n, k = 25, 4 if kind == "categorical" else 2
    rng = np.random.default_rng(1)
    units = [str(i // k) for i in range(n * k)]
    labels = np.tile(np.arange(k), n)
    x = rng.standard_normal((n * k, 1, 8)) + 2 * np.eye(8)[labels][:, None]

    def folds(names: list[str], _: int, seed: int) -> np.ndarray:
        return np.array([(int(name) // 5 if seed % 2 else int(name)) % 5 for name in names])

    def losses(rows: np.ndarray) -> np.ndarray:
        some = [units[i] for i in rows]
        if kind == "graded":
            return cross_fitted_grade_losses(x[rows], labels[rows] * 1.0, some, repeats=1)
        return cross_fitted_losses(x[rows], labels[rows], some, repeats=1)

    monkeypatch.setattr(module, "grouped_folds", folds)
    whole = losses(np.arange(n * k))[:, 0]
    place = np.arange(n * k) // k
    one = np.array([losses(np.flatnonzero(place != i))[LOSS, 0].mean() for i in range(n)])
    expected = (n - 1) * (one.mean() - one)
    assert np.corrcoef(whole[INFLUENCE], expected)[0, 1] > 0.99
    assert whole[INFLUENCE].std() == pytest.approx(expected.std(), rel=0.05)
    ring = np.random.default_rng([0, 41]).permutation(np.argsort([str(i) for i in range(n)]))
    pairs = np.array(
        [
            n * whole[LOSS].mean() - (n - 1) * (one[a] + one[b])
            + (n - 2) * losses(np.flatnonzero((place != a) & (place != b)))[LOSS, 0].mean()
            for a, b in zip(ring, np.roll(ring, -1), strict=True)
        ]
    )  # fmt: skip
    assert np.corrcoef(whole[PAIR], pairs)[0, 1] > 0.8
    assert whole[PAIR].std() == pytest.approx(pairs.std(), rel=0.35)


def test_bits_of_a_weak_signal_cover_what_such_probes_extract_on_average() -> None:
    # Forty scenarios that show little: from the spread of losses alone .83 of intervals held the mean.
    rng = np.random.default_rng(5)
    labels, units = np.tile([0, 1], 40), [str(i // 2) for i in range(80)]
    rows = rng.standard_normal((80, 200, 24)) + 1.3 * labels[:, None, None] * np.eye(24)[0]
    losses = cross_fitted_losses(rows, labels, units, repeats=1)
    curve = bits(losses, 1.0)
    truth = curve.value.mean()
    assert 0.05 < truth < 0.3
    held = binomial_interval(int(((curve.lower <= truth) & (truth <= curve.upper)).sum()), 200)
    assert held.upper > 0.95 and held.value > 0.92
    plain = critical_t(39) * losses[LOSS].std(-1, ddof=1) / np.sqrt(40)
    assert (abs(curve.value - truth) <= plain).mean() < 0.9


def test_bits_of_texts_that_are_rarely_mislabelled_cover_where_a_sample_has_none() -> None:
    # A fiftieth of scenarios shows the other label: four samples of ten lack them; without the imaginary one .57 of intervals held the mean.
    rng = np.random.default_rng(3)
    labels, units = np.tile([0, 1], 40), [str(i // 2) for i in range(80)]
    shown = (2 * labels - 1)[:, None] * np.repeat(np.where(rng.random((40, 200)) < 0.02, -1, 1), 2, 0)
    rows = rng.standard_normal((80, 200, 8)) + 4 * shown[..., None] * np.eye(8)[0]
    losses = cross_fitted_losses(rows, labels, units, repeats=1)
    curve, truth = bits(losses, 1.0), 1 - losses[LOSS].mean()
    assert 0.7 < truth < 0.95 and (curve.upper < 1).all()
    assert ((curve.lower <= truth) & (truth <= curve.upper)).mean() > 0.92
    losses[MISTOLD] = losses[LOSS]
    plain = bits(losses, 1.0)
    assert ((plain.lower <= truth) & (truth <= plain.upper)).mean() < 0.85


@pytest.mark.parametrize(
    "kind, k, gap", [("two", 2, 1.5), ("two", 2, 6.0), ("three", 3, 2.0), ("within", 4, 2.0)]
)
def test_with_another_label_is_as_if_all_had_been_taught_it(kind: str, k: int, gap: float) -> None:
    """Of every fourth scenario the labels are changed and all probes trained anew, without closed forms."""
    rng = np.random.default_rng(0)
    n = 24
    labels, place = np.tile(np.arange(k), n), np.arange(n * k) // k
    x = rng.standard_normal((n * k, 1, 16)) + gap * np.eye(16)[labels][:, None]
    other, given = (labels + 1) % k, None
    if kind == "within":  # The other of the two fine categories in each coarse one.
        other, given = labels // 2 * 2 + (1 - labels % 2), labels // 2

    def losses(labels: np.ndarray) -> np.ndarray:
        return cross_fitted_losses(x, labels, [str(i) for i in place], given=given)[:, 0]

    told = losses(labels)
    some = range(0, n, 4)
    expected = np.array([losses(np.where(place == i, other, labels))[LOSS].mean() for i in some])
    assert (expected > told[LOSS].mean()).all()
    # Scores keep the units in which the slope has its prior, which anew would be smaller: a thirtieth where all is clear.
    np.testing.assert_allclose(told[MISTOLD, some], expected, rtol=0.05)
    assert told[MISTOLD, some].mean() == pytest.approx(expected.mean(), rel=0.04)


def test_a_category_alone_in_its_coarse_one_and_grades_have_no_other_label() -> None:
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(4), 25)
    x = rng.standard_normal((100, 1, 8)) + 2 * np.eye(8)[labels][:, None]
    units = [str(i) for i in range(100)]
    alone = cross_fitted_losses(x, labels, units, given=np.minimum(labels, 2), repeats=1)
    loss = alone[LOSS].mean(-1, keepdims=True)
    np.testing.assert_allclose(alone[MISTOLD][:, labels < 2], np.broadcast_to(loss, (1, 50)), rtol=1e-6)
    assert (alone[MISTOLD][:, labels >= 2] > loss).mean() > 0.9
    graded = cross_fitted_grade_losses(x, labels * 1.0, units, repeats=1)
    np.testing.assert_allclose(graded[MISTOLD], np.broadcast_to(graded[LOSS].mean(), (1, 100)))


def test_bits_do_not_depend_on_scale_rotation_or_order() -> None:
    rows, labels, units = contrast(30, 1.5)
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((12, 12)))[0]
    first = cross_fitted_losses(rows, labels, units)
    np.testing.assert_allclose(cross_fitted_losses(5 * rows @ turn, labels, units), first, atol=1e-9)
    order = np.random.default_rng(2).permutation(60)
    moved = cross_fitted_losses(rows[order], labels[order], [units[i] for i in order])
    names = list(dict.fromkeys(units[i] for i in order))
    own = moved[..., [names.index(str(i)) for i in range(30)]]
    np.testing.assert_allclose(own[[LOSS, INFLUENCE, MISTOLD]], first[[LOSS, INFLUENCE, MISTOLD]], atol=1e-9)
    # Pairs stand in the order of the ring, which goes by name.
    np.testing.assert_allclose(moved[PAIR], first[PAIR], atol=1e-9)


def test_telling_every_text_three_times_adds_no_certainty() -> None:
    rows, labels, units = contrast(40, 1.5)
    once = bits(cross_fitted_losses(rows, labels, units), 1.0)
    thrice = bits(
        cross_fitted_losses(np.repeat(rows, 3, 0), np.repeat(labels, 3), list(np.repeat(units, 3))), 1.0
    )
    assert ((thrice.upper - thrice.lower) > 0.85 * (once.upper - once.lower)).all()


def test_the_calibration_of_two_classes_is_a_penalised_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    score = rng.standard_normal(200) + labels
    score = (score - score.mean()) / score.std()
    slope, intercept = _fit_platt(
        np.stack([-score, score], -1), np.eye(2)[labels], np.ones((200, 2), bool), np.ones(200)
    )
    peer = LogisticRegression(C=1.0).fit(score[:, None], labels)  # C = 1 is an N(0, 1) prior on the slope
    # Two class scores -s and s make a logit of slope * s: (C - 1)/C of their difference.
    np.testing.assert_allclose(slope, peer.coef_[0, 0], rtol=1e-3)
    np.testing.assert_allclose(intercept[1] - intercept[0], peer.intercept_[0], atol=1e-3)
    np.testing.assert_allclose(
        np.concatenate(_fit_logistic(score, labels * 1.0, np.ones(200))),
        [slope, intercept[1] - intercept[0]],
        rtol=1e-9,
    )


@pytest.mark.parametrize("gap", [0.0, 1.5, 6.0])
def test_two_classes_are_the_two_of_any_number(gap: float) -> None:
    rows, labels, units = contrast(25, gap)
    general = _Classes(np.eye(2)[labels], np.ones((50, 2), bool))
    expected = _nested_losses(rows, np.eye(2)[labels], units, general, 0, 2)
    np.testing.assert_allclose(cross_fitted_losses(rows, labels, units), expected, atol=1e-10)


def test_eight_classes_are_worth_up_to_three_bits() -> None:
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(8), 25)
    rows = 0.2 * rng.standard_normal((200, 1, 16)) + np.eye(16)[labels][:, None]
    found = bits(
        cross_fitted_losses(rows, labels, units := [str(i // 8) for i in range(200)], repeats=1),
        entropy(labels, units),
    )
    assert 2 < found.value[0] <= 3


def test_a_difference_of_bits_is_paired_and_exactly_zero_for_equal_models() -> None:
    losses = cross_fitted_losses(*contrast(40, 1.0))
    same = bits_difference(losses, losses)
    assert (same.value == 0).all() and (same.lower == 0).all() and (same.upper == 0).all()
    worse = losses.copy()
    worse[[LOSS, MISTOLD]] += 0.1
    np.testing.assert_allclose(bits_difference(losses, worse).upper, -0.1)


@pytest.mark.parametrize("order", [1, 2])
def test_the_variance_of_a_mean_is_exact_and_that_of_products_errs_to_the_wide_side(order: int) -> None:
    """By influences a mean of products of two has twice its variance; pairs, half of that, take a twenty-sixth off."""
    rng = np.random.default_rng(0)
    n, draws = 30, 4000
    z = rng.standard_normal((draws, n))

    def value(z: np.ndarray) -> np.ndarray:
        return (
            z.mean(-1) if order == 1 else (z.sum(-1) ** 2 - (z**2).sum(-1)) / z.shape[-1] / (z.shape[-1] - 1)
        )

    one = np.stack([value(np.delete(z, i, 1)) for i in range(n)], -1)
    two = np.stack([value(np.delete(z, [i, (i + 1) % n], 1)) for i in range(n)], -1)
    mean = value(z)
    pair = n * mean[:, None] - (n - 1) * (one + np.roll(one, -1, 1)) + (n - 2) * two
    loss = np.repeat(mean[:, None], n, 1)
    losses = np.stack([loss, (n - 1) * (one.mean(-1, keepdims=True) - one), pair, loss])
    found = bits_difference(losses, np.zeros_like(losses))
    np.testing.assert_allclose(found.value, mean)
    variance = (((found.upper - found.lower) / 2 / critical_t(n - 1)) ** 2).mean()
    assert variance / mean.var() == pytest.approx({1: 1, 2: 2 / 1.04}[order], rel=0.06)


def test_the_more_pairs_do_the_narrower_and_never_beyond_what_is_possible() -> None:
    losses = cross_fitted_losses(*contrast(40, 1.0))
    n, widths = losses.shape[-1], []
    for scale in (0.0, 0.5, 1.0, 3.0, 10.0, 100.0):
        known = losses.copy()
        known[PAIR] *= scale
        known[MISTOLD] = known[LOSS]
        curve = grade_bits(known, 1.0)
        width = (curve.upper - curve.lower) / 2 / critical_t(n - 1)
        influences, pairs = (
            known[INFLUENCE].var(-1) / (n - 1),
            (n - 1) / (2 * n) * (known[PAIR] ** 2).mean(-1),
        )
        assert (width**2 >= influences**2 / (influences + 2 * pairs) - 1e-15).all()
        widths.append(width)
    assert (np.diff(widths, axis=0) < 0).all()
    np.testing.assert_allclose(widths[0] ** 2, losses[INFLUENCE].var(-1) / (n - 1))


def test_the_covariance_of_two_models_bits_agrees_with_their_variances() -> None:
    base, aligned = cross_fitted_losses(*contrast(40, 1.5, 1)), cross_fitted_losses(*contrast(40, 1.0, 1))
    found = bits_covariance(np.stack([base, aligned]))
    reach = critical_t(39) * np.sqrt(found)
    for model, losses in enumerate((base, aligned)):
        curve = grade_bits(losses, 1.0)
        np.testing.assert_allclose(reach[model, model], (curve.upper - curve.lower) / 2)
    difference = bits_difference(base, aligned)
    spread = found[0, 0] + found[1, 1] - 2 * found[0, 1]
    np.testing.assert_allclose(critical_t(39) * np.sqrt(spread), (difference.upper - difference.lower) / 2)
    same = bits_covariance(np.stack([base, base]))
    np.testing.assert_allclose(same, np.broadcast_to(same[0, 0], same.shape))
