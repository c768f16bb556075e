"""Laws of the numbers: U-statistics, ratios, draws, folds, AUROC."""

from itertools import combinations, permutations, product

import numpy as np
import pytest
from scipy import stats as distributions
from sklearn.metrics import roc_auc_score

from empathy_probes.auroc import auroc, correlation, smooth_auroc
from empathy_probes.auroc_intervals import (
    area_attenuation,
    auroc_difference,
    auroc_interval,
    correlation_interval,
    widened,
)
from empathy_probes.deviations import deviation
from empathy_probes.errors import InputError
from empathy_probes.jackknife import leave_one_out, pair_variance
from empathy_probes.keeps import fieller, log_ratio, middle_theta
from empathy_probes.kernels import (
    THIN,
    combined_variance,
    mean_squares,
    pair_kernels,
    pair_strengths,
    strength_kernels,
    u_statistic,
)
from empathy_probes.stats import (
    adjusted_p,
    binomial_interval,
    fieller_ratio,
    grouped_folds,
    hull_of_members,
    largest_quantile,
    skewed_critical,
    studentised_sums,
    unit_signs,
)
from empathy_probes.strengths import strength_difference, strength_interval


def gram(seed: int, n: int = 40, layers: int = 3, signal: float = 1.0, d: int = 12) -> np.ndarray:
    """Gram matrices [layer n n] of vectors with mean length `signal` and unit noise in half the directions."""
    vectors = np.random.default_rng(seed).standard_normal((layers, n, d)) * np.linspace(1, 0.2, d)
    vectors[..., 0] += signal
    return vectors @ np.swapaxes(vectors, -1, -2)


# ---------------------------------------------------------------- U-statistics


def test_u_statistic_is_the_formula_written_out():
    kernel = gram(0)[0]
    n = len(kernel)
    k = kernel * (1 - np.eye(n))
    m = k.sum() / (n * (n - 1))
    r = k.sum(axis=1)
    g = (r / (n - 1) - m) * (n - 1) / (n - 2)
    centred = (k - (r[:, None] + r) / (n - 2) + k.sum() / ((n - 1) * (n - 2))) * (1 - np.eye(n))
    zeta2 = (centred**2).sum() / (n * (n - 3))
    zeta1 = max(g.var(ddof=1) - zeta2 / (n - 2), 0)
    u = u_statistic(kernel)
    # The closed form of the centred sum cancels to about 1e-14 of the sum of squares.
    np.testing.assert_allclose(u.value, m, rtol=1e-12)
    np.testing.assert_allclose(u.influence, g, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(u.variance, 4 * zeta1 / n + 2 * zeta2 / (n * (n - 1)), rtol=1e-9)


def test_the_product_of_true_means_is_that_over_four_different_units() -> None:
    """The only unbiased one that does not depend on their order; so the variance taken off U squared is unbiased too."""
    x = np.random.default_rng(0).standard_normal((2, 7, 7))
    x += np.swapaxes(x, 1, 2)
    found = mean_squares(x)
    for i, j in product(range(2), repeat=2):
        brute = np.mean([x[i, a, b] * x[j, c, d] for a, b, c, d in permutations(range(7), 4)])
        np.testing.assert_allclose(found[i, j], brute, rtol=1e-10)


def test_u_statistic_ignores_the_diagonal():
    kernel = gram(1)
    loud = kernel + 1e3 * np.eye(kernel.shape[-1])
    np.testing.assert_array_equal(u_statistic(kernel).value, u_statistic(loud).value)
    np.testing.assert_array_equal(u_statistic(kernel).variance, u_statistic(loud).variance)


def test_u_statistic_does_not_depend_on_the_order_of_the_units():
    kernel = gram(2)
    order = np.random.default_rng(0).permutation(kernel.shape[-1])
    shuffled = u_statistic(kernel[:, order][:, :, order])
    # Sums are taken in another order, so only rounding may differ.
    np.testing.assert_allclose(shuffled.value, u_statistic(kernel).value, rtol=1e-12)
    np.testing.assert_allclose(shuffled.variance, u_statistic(kernel).variance, rtol=1e-9)


def second_order(kernel: np.ndarray) -> np.ndarray:
    """2 zeta_2 / (n (n-1)), written out."""
    n = kernel.shape[-1]
    k = kernel * (1 - np.eye(n))
    r = k.sum(axis=-1)
    total = r.sum(axis=-1)[:, None, None]
    centred = k - (r[:, :, None] + r[:, None]) / (n - 2) + total / ((n - 1) * (n - 2))
    zeta2 = ((centred * (1 - np.eye(n))) ** 2).sum(axis=(-2, -1)) / (n * (n - 3))
    return 2 * zeta2 / (n * (n - 1))


def test_variance_of_a_combination_is_that_of_the_combined_kernel_with_half_a_second_order_term_more():
    base, aligned = gram(3), gram(4, signal=0.5)
    combined = combined_variance(pair_kernels(base, aligned), np.full(3, -0.3), np.ones(3))
    kernel = aligned - 0.3 * base
    np.testing.assert_allclose(combined, u_statistic(kernel).variance + 0.5 * second_order(kernel), rtol=1e-9)


def test_a_kernel_over_too_few_units_is_refused():
    with pytest.raises(InputError, match="5 or more"):
        u_statistic(np.ones((3, 4, 4)))


# ---------------------------------------------------------------- ratios


@pytest.mark.parametrize("signal", [0.0, 0.2, 3.0])
def test_equal_kernels_are_exactly_unchanged_whatever_the_signal(signal: float):
    kernel = gram(5, signal=signal)
    pair = pair_kernels(kernel, kernel.copy())
    ratio = log_ratio(pair)
    difference = strength_difference(pair, *strength_interval(pair))
    for array in (
        ratio.theta,
        ratio.se,
        ratio.influence,
        difference.value,
        difference.lower,
        difference.upper,
    ):
        np.testing.assert_array_equal(array, 0)
    for end in fieller(pair, 2.0):
        np.testing.assert_array_equal(end, 1)


def test_log_ratio_is_the_u_statistic_of_the_ratio_kernel():
    base, aligned = gram(6, signal=2.0), gram(7, signal=1.5)
    pair = pair_kernels(base, aligned)
    scaled = [k / u[:, None, None] for k, u in zip((base, aligned), pair.u, strict=True)]
    kernel = (scaled[1] - scaled[0]) / 2
    direct = u_statistic(kernel)
    ratio = log_ratio(pair)
    np.testing.assert_allclose(direct.value, 0, atol=1e-12)
    np.testing.assert_allclose(ratio.se, np.sqrt(direct.variance + 0.5 * second_order(kernel)), rtol=1e-8)
    np.testing.assert_allclose(ratio.influence, 2 * direct.influence, rtol=1e-8, atol=1e-11)


def test_a_kernel_scaled_by_a_constant_is_kept_at_its_root_without_error():
    pair = pair_kernels(gram(8, signal=2.0), 0.49 * gram(8, signal=2.0))
    low, high = fieller(pair, 2.0)
    np.testing.assert_allclose(np.exp(log_ratio(pair).theta), 0.7, rtol=1e-12)
    # Variances cancel to rounding; the square root of 1e-16 is 1e-8, and the ends take a few hundred of these.
    np.testing.assert_allclose([low, high], 0.7, atol=1e-5)


def grid_fieller(pair, layer: int, critical: float) -> np.ndarray:
    keep = np.linspace(0, 6, 60001)
    there = deviation(pair_kernels_layer(pair, layer), -(keep[:, None] ** 2), np.ones((len(keep), 1)))
    return keep[abs(there.beyond(critical, pair.n)[:, 0]) <= 1]


def pair_kernels_layer(pair, layer: int):
    part = slice(layer, layer + 1)
    return type(pair)(
        pair.u[:, part],
        pair.influence[:, part],
        pair.zeta1[:, :, part],
        pair.zeta2[:, :, part],
        pair.triangles[:, part],
        pair.identical[part],
        pair.n,
    )


@pytest.mark.parametrize("signals", [(1.0, 0.7), (1.5, 0.1), (0.4, 0.4), (1.2, 2.0)])
def test_fieller_finds_the_set_that_a_grid_finds(signals: tuple[float, float]):
    pair = pair_kernels(gram(9, signal=signals[0]), gram(10, signal=signals[1]))
    low, high = fieller(pair, 2.0)
    for layer in range(3):
        grid = grid_fieller(pair, layer, 2.0)
        np.testing.assert_allclose(low[layer], grid[0], atol=2e-4)  # the grid's step is 1e-4
        if high[layer] < 6:
            np.testing.assert_allclose(high[layer], grid[-1], atol=2e-4)
        else:
            assert grid[-1] == 6


def test_fieller_reaches_zero_where_the_signal_is_gone_and_infinity_where_the_base_is():
    gone = pair_kernels(gram(11, signal=2.0), gram(12, signal=0.0))
    low, high = fieller(gone, 2.0)
    assert (low == 0).all() and (high < 1).all()
    absent = pair_kernels(gram(12, signal=0.0), gram(11, signal=2.0))
    assert np.isinf(fieller(absent, 2.0)[1]).all()


def test_fieller_is_empty_where_the_aligned_u_is_negative_beyond_chance():
    base = gram(13, signal=2.0)
    pair = pair_kernels(base, -0.3 * base)
    assert np.isnan(np.stack(fieller(pair, 2.0))).all()


def test_signed_ratio_keeps_its_sign_and_is_blank_where_the_base_is_not_detected():
    covariance = np.array([[[0.04] * 3, [0.01] * 3], [[0.01] * 3, [0.04] * 3]])
    curve = fieller_ratio(np.array([2.0, 0.1, -2.0]), np.ones(3), covariance, 1.96)
    np.testing.assert_allclose(curve.value, [0.5, np.nan, -0.5])
    assert curve.lower[0] < 0.5 < curve.upper[0] and curve.upper[2] < 0
    # At either end the gap is exactly 1.96 standard errors.
    for x in (curve.lower[0], curve.upper[0]):
        assert abs(1 - 2 * x) / np.sqrt(0.04 - 0.02 * x + 0.04 * x**2) == pytest.approx(1.96)


def test_triangles_are_the_mean_over_distinct_units_written_out():
    base, aligned = gram(16, signal=1.0)[:1, :9, :9], gram(17, signal=0.5)[:1, :9, :9]
    n, centred = 9, []
    for kernel in (base[0], aligned[0]):
        off = kernel * (1 - np.eye(n))
        rows = off.sum(1)
        off = off - (rows[:, None] + rows) / (n - 2) + off.sum() / ((n - 1) * (n - 2))
        centred.append(off)
    b, a = centred
    found = pair_kernels(base, aligned).triangles[:, 0]
    for value, (x, y, z) in zip(found, ((b, b, b), (b, b, a), (b, a, a), (a, a, a)), strict=True):
        loops = [x[s, t] * y[t, u] * z[u, s] for s, t, u in permutations(range(n), 3)]
        np.testing.assert_allclose(value, np.mean(loops), rtol=1e-9)


@pytest.mark.parametrize("n", [7, 60, 90])
def test_strengths_of_many_units_in_few_dimensions_need_no_kernels(n: int):
    """Beside the kernels written out, with the error of the rms in them: every number that comparisons are made of."""
    rng = np.random.default_rng(21)
    differences = rng.standard_normal((2, n, 3, 4))
    differences[..., 0] += 0.5
    differences[1] = 0.4 * differences[0] + 0.6 * differences[1]
    norms = 1 + 0.5 * rng.standard_normal((2, n, 3)) ** 2
    differences[1, :, 0], norms[1, :, 0] = differences[0, :, 0], norms[0, :, 0]
    differences[:, :, 2] = 0
    assert (n > THIN * 4) == (n > 8)
    for same in (False, True):
        thin = pair_strengths(differences, norms, same_model=same)
        whole = pair_kernels(
            *(strength_kernels(d, q) for d, q in zip(differences, norms, strict=True)), same_model=same
        )
        for name, right in vars(whole).items():
            np.testing.assert_allclose(getattr(thin, name), right, rtol=1e-9, atol=1e-12, err_msg=name)
        assert thin.identical.tolist() == [True, False, same]


def test_strengths_of_too_few_units_are_refused_in_any_dimension():
    for d_model in (1, 8):
        with pytest.raises(InputError, match="5 or more"):
            pair_strengths(np.ones((2, 4, 1, d_model)), np.ones((2, 4, 1)))


def test_eigenvalues_come_back_as_second_and_third_moments():
    """zeta_2 is the sum of their squares, the triangles that of their cubes."""
    rng, scale = np.random.default_rng(18), np.sqrt([3.0, 1.0, 0.5])
    vectors = rng.standard_normal((400, 60, 3)) * scale
    pair = pair_kernels(*[vectors @ np.swapaxes(vectors, -1, -2)] * 2)
    # 400 samples of 60: a mean within 5 %.
    assert pair.zeta2[0, 0].mean() == pytest.approx((scale**4).sum(), rel=0.05)
    assert pair.triangles[3].mean() == pytest.approx((scale**6).sum(), rel=0.1)


@pytest.mark.parametrize("signal", [0.0, 0.15, 0.3, 0.6])
def test_an_interval_of_a_weak_strength_covers_what_it_promises(signal: float):
    """The variance at the estimate covers 1.000 without a signal: it rises with the very error it is to bound."""
    rng = np.random.default_rng(19)
    vectors = rng.standard_normal((1000, 40, 2))
    vectors[..., 0] += signal
    pair = pair_kernels(*[vectors @ np.swapaxes(vectors, -1, -2)] * 2)
    base, _ = strength_interval(pair)
    covered = ((base.lower <= signal) & (signal <= base.upper)).mean()
    # A proportion of 1,000 has a standard error of .007. A variance component is not negative: cut off at 0, it is a
    # little too large where there is no signal.
    assert 0.935 <= covered <= 0.99
    if signal == 0:
        error = np.sqrt(combined_variance(pair, np.ones(1000), np.zeros(1000)))
        assert (abs(pair.u[0]) <= 2.02 * error).mean() > 0.99


@pytest.mark.parametrize("keep", [0.0, 0.25, 0.5])
def test_the_keep_of_a_weak_signal_is_neither_too_sure_nor_too_vague(keep: float):
    rng = np.random.default_rng(20)
    base = rng.standard_normal((1000, 40, 4)) * np.sqrt(0.2)
    base[..., 0] += 1
    # As in a planted twin: the scenarios' own part of the concept shrinks with it.
    aligned = 0.9 * base + np.sqrt(0.19 * 0.2) * rng.standard_normal(base.shape)
    aligned[..., 0] = keep * base[..., 0]
    low, high = fieller(pair_kernels(*(x @ np.swapaxes(x, -1, -2) for x in (base, aligned))), 2.02)
    assert 0.92 <= ((low <= keep) & (keep <= high)).mean() <= 0.985


def test_the_point_of_a_weak_signal_is_in_the_middle_and_not_too_low():
    """The plain ratio of a right-skewed U and its root overstate what is lost."""
    rng, keep = np.random.default_rng(22), 0.25
    # A few directions hold most of the noise, as in residual streams.
    scale = 1 / np.sqrt(np.arange(1, 31))
    base = rng.standard_normal((1500, 40, 30)) * scale
    aligned = 0.8 * base + 0.6 * rng.standard_normal(base.shape) * scale
    base[..., 3] += 0.7
    aligned[..., 3] += 0.7 * keep
    pair = pair_kernels(*(x @ np.swapaxes(x, -1, -2) for x in (base, aligned)))
    plain = np.sqrt(np.maximum(pair.u[1], 0) / pair.u[0])
    middle = np.exp(middle_theta(pair))
    strength = strength_interval(pair)[1].value / 0.7
    # A mean of 1,500 has a standard error of .004.
    assert plain.mean() < keep - 0.03
    for found in (middle, strength):
        assert abs(found.mean() - keep) < 0.02 and abs(np.median(found) - keep) < 0.02
        assert ((found - keep) ** 2).mean() < ((plain - keep) ** 2).mean()
    low, high = fieller(pair, 2.02)
    assert ((low <= middle) & (middle <= high)).all()


def test_a_skewed_tail_is_longer_and_never_shorter_than_students():
    for critical in (2.0, 2.9):
        error = 2 * distributions.t.sf(critical, 1e6)
        exact = (distributions.chi2.isf(error, 1) - 1) / np.sqrt(2)
        found = skewed_critical(critical, np.sqrt(np.array([0.0, 8.0])), 10**6)
        assert found[0] == critical
        # Wilson and Hilferty's cube is within 4 % for a single square, the most skewed there is.
        assert found[1] == pytest.approx(max(exact, critical), rel=0.04)


def test_the_ends_of_a_set_are_found_however_narrow_it_is():
    centre, half = np.array([0.3, 0.30001, 0.9, 0.5]), np.array([0.2, 1e-7, 0.3, -1.0])
    lower, upper = hull_of_members(lambda x: abs(x - centre) - half, np.array([0.3, 0.30001, 0.9, np.nan]))
    np.testing.assert_allclose(lower[:3], centre[:3] - half[:3], atol=1e-9)
    np.testing.assert_allclose(upper[:3], [0.5, 0.3000101, 1.0], atol=1e-9)
    assert np.isnan([lower[3], upper[3]]).all()


def test_strength_is_the_length_of_the_mean_vector():
    vectors = np.tile(np.array([3.0, 4.0]), (30, 1))
    base, _ = strength_interval(pair_kernels((vectors @ vectors.T)[None], (vectors @ vectors.T)[None]))
    np.testing.assert_allclose([base.value[0], base.lower[0], base.upper[0]], 5.0)


def test_strength_difference_contains_its_value_and_grows_with_noise():
    pair = pair_kernels(gram(14, signal=2.0), gram(15, signal=0.3))
    curve = strength_difference(pair, *strength_interval(pair))
    assert (curve.lower < curve.value).all() and (curve.value < curve.upper).all()


# ---------------------------------------------------------------- draws


def test_a_unit_has_the_same_signs_in_every_concept_it_occurs_in():
    first, second = unit_signs(["a", "b", "c"], 64, 0), unit_signs(["c", "d", "a"], 64, 0)
    np.testing.assert_array_equal(first[:, 0], second[:, 2])
    np.testing.assert_array_equal(first[:, 2], second[:, 0])
    assert (first[:, 1] != second[:, 1]).any()
    assert (first != unit_signs(["a", "b", "c"], 64, 1)).any()
    assert set(np.unique(first)) == {-1, 1}


def test_studentised_sums_of_one_cell_are_the_sign_flip_t_statistics():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(25)
    values -= values.mean()
    signs = unit_signs([str(i) for i in range(25)], 50, 0)
    direct = distributions.ttest_1samp(signs * values, 0, axis=1).statistic
    np.testing.assert_allclose(studentised_sums(values[None], signs)[:, 0], direct, rtol=1e-10)


def test_cells_without_variance_change_no_quantile():
    signs = unit_signs([str(i) for i in range(30)], 200, 0)
    influence = np.random.default_rng(1).standard_normal((2, 30))
    padded = np.vstack([influence, np.zeros((5, 30))])
    few, many = studentised_sums(influence, signs), studentised_sums(padded, signs)
    assert (many[:, 2:] == 0).all()
    assert largest_quantile(few) == largest_quantile(many)


def test_adjusted_p_is_never_zero_and_one_without_any_effect():
    draws = np.random.default_rng(2).standard_normal((99, 4))
    np.testing.assert_allclose(adjusted_p(draws, np.array([0.0, 1e9, np.nan])), [1.0, 0.01, np.nan])


# ---------------------------------------------------------------- folds and counts


def test_folds_keep_scenarios_together_whatever_the_order_of_items():
    groups = [f"s{i // 3}" for i in range(60)]
    folds = grouped_folds(groups, 5, seed=3)
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_array_equal(grouped_folds([groups[i] for i in order], 5, seed=3), folds[order])
    assert all(len(set(folds[i : i + 3])) == 1 for i in range(0, 60, 3))
    assert set(np.bincount(folds)) == {12}
    assert (grouped_folds(groups, 5, seed=4) != folds).any()


def test_duplicating_texts_of_a_scenario_moves_no_fold():
    groups = [f"s{i}" for i in range(20)]
    np.testing.assert_array_equal(grouped_folds(groups + groups, 4), np.tile(grouped_folds(groups, 4), 2))


def test_more_folds_than_scenarios_are_refused():
    with pytest.raises(InputError, match="5 folds"):
        grouped_folds(["a", "a", "b"], 5)


def test_binomial_interval_contains_the_proportion_and_stays_within_0_and_1():
    estimate = binomial_interval(0, 100)
    assert estimate.value == 0 and estimate.lower == 0 and 0.02 < estimate.upper < 0.05


# ---------------------------------------------------------------- AUROC


def scored(seed: int, shift: float, n: int = 30, ties: bool = False):
    rng = np.random.default_rng(seed)
    labels = np.tile([0, 1, 1], n)
    groups = [f"s{i}" for i in range(n) for _ in range(3)]
    scores = rng.standard_normal((2, 3 * n)) + shift * labels
    return (np.round(scores) if ties else scores), labels, groups


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 2.0])
def test_auroc_equals_scikit_learns(shift: float, ties: bool):
    scores, labels, _ = scored(0, shift, ties=ties)
    expected = [roc_auc_score(labels, row) for row in scores]
    np.testing.assert_allclose(auroc(scores, labels), expected, rtol=1e-12)


def test_smooth_auroc_is_the_mean_of_ramps_over_the_pairs_that_are_kept():
    rng = np.random.default_rng(0)
    labels = np.stack([np.arange(60) % 3 == c for c in range(3)]).astype(int)
    scores = np.round(rng.standard_normal((4, 3, 60)) + labels, 1)  # with ties
    kept = np.ones((4, 60))
    kept[1, :7] = kept[2, 30:31] = 0
    found = smooth_auroc(scores, labels, kept)
    for i in range(4):
        areas = []
        for row, x in zip(labels, scores[i], strict=True):
            one, zero = (x[(row == label) & (kept[i] == 1)] for label in (1, 0))
            m = len(one) + len(zero)
            ramp = np.sqrt(3 * (len(one) * one.var() + len(zero) * zero.var()) / m) * m ** (-1 / 3)
            areas.append(np.clip(((one[:, None] - zero) / ramp + 1) / 2, 0, 1).mean())
        assert found[i] == pytest.approx(np.mean(areas), abs=1e-12)
    assert abs(found - auroc(scores, labels))[0] < 0.02


def test_smooth_auroc_of_scores_that_do_not_vary_within_labels_is_one_or_a_half():
    labels = np.tile([0, 1], 20)[None]
    kept = np.ones((1, 40))
    assert smooth_auroc(labels[None].astype(float), labels, kept) == pytest.approx(1, abs=1e-9)
    assert smooth_auroc(np.full((1, 1, 40), 0.3), labels, kept) == 0.5


def test_correlation_of_what_is_kept_is_that_of_nothing_else():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 30)), rng.standard_normal(30)
    kept = (np.arange(30) % 4 > 0).astype(float)
    np.testing.assert_allclose(correlation(x, y, kept), correlation(x[:, kept > 0], y[kept > 0]))


def test_auroc_interval_rests_on_leaving_whole_scenarios_out():
    scores, labels, groups = scored(1, 1.0, n=12, ties=True)
    names = np.array(groups)
    left = np.array([roc_auc_score(labels[names != s], scores[0][names != s]) for s in dict.fromkeys(groups)])
    n, value = len(left), roc_auc_score(labels, scores[0])
    imaginary = (value - 0.5) ** 2 / n**2
    variance = (n - 1) / n * ((left - left.mean()) ** 2).sum() + imaginary
    shrunk = value + ((n * value + 0.5) / (n + 1) - value) * imaginary / variance
    curve = auroc_interval(scores, labels, groups)
    for centre, sign, end in ((shrunk, -1, curve.lower[0]), (value, 1, curve.upper[0])):
        reach = distributions.t.ppf(0.975, n - 1) * np.sqrt(variance) / (centre * (1 - centre))
        np.testing.assert_allclose(np.log(end / (1 - end)), np.log(centre / (1 - centre)) + sign * reach)


def test_auroc_of_one_has_an_interval_that_admits_a_few_errors():
    scores, labels, groups = scored(2, 50.0, n=100)
    curve = auroc_interval(scores, labels, groups)
    assert (curve.value == 1).all() and (curve.upper == 1).all()
    # Rule of three: up to about 3 or 4 in 100 scenarios could be wrong.
    assert (curve.lower > 0.95).all() and (curve.lower < 0.98).all()


def test_readings_are_widened_by_what_they_do_not_read_yet():
    np.testing.assert_allclose(widened(np.array([-0.1, 0.0, 0.5, 1.0]), 1.6), [1.6, 1.6, 1.3, 1.0])
    scores, labels, groups = scored(4, 1.0)
    plain, wide = (auroc_interval(scores, labels, groups, widen) for widen in (1.0, 1.6))
    logit = [np.log(c.upper / (1 - c.upper)) - np.log(c.value / (1 - c.value)) for c in (plain, wide)]
    np.testing.assert_allclose(logit[1] / logit[0], widened((2 * plain.value - 1) ** 2, 1.6))
    values = labels + np.random.default_rng(1).standard_normal(len(labels))
    plain, wide = (correlation_interval(scores, values, groups, widen) for widen in (1.0, 1.6))
    reach = [np.arctanh(c.upper) - np.arctanh(c.value) for c in (plain, wide)]
    np.testing.assert_allclose(reach[1] / reach[0], widened(plain.value**2, 1.6))


def test_auroc_interval_covers_chance_on_noise():
    n, replicates = 30, 400
    labels, groups = np.tile([0, 1], n), [f"s{i}" for i in range(n) for _ in range(2)]
    curve = auroc_interval(np.random.default_rng(3).standard_normal((replicates, 2 * n)), labels, groups)
    covered = int(((curve.lower <= 0.5) & (curve.upper >= 0.5)).sum())
    interval = binomial_interval(covered, replicates)
    assert interval.upper > 0.95 and interval.value > 0.92


def test_duplicating_a_text_inside_a_scenario_does_not_narrow_the_auroc_interval():
    scores, labels, groups = scored(4, 1.0)
    twice = auroc_interval(np.hstack([scores, scores]), np.tile(labels, 2), groups * 2)
    once = auroc_interval(scores, labels, groups)
    np.testing.assert_allclose(twice.upper - twice.lower, once.upper - once.lower, rtol=1e-10)


def lost_separation(base: np.ndarray, aligned: np.ndarray, labels: np.ndarray, groups: list[str]):
    """`area_attenuation` of fixed scores."""
    one, other = (leave_one_out(scores, labels, groups) for scores in (base, aligned))
    return area_attenuation(one, other, (base == aligned).all(-1))


def test_equal_scores_differ_by_exactly_nothing():
    scores, labels, groups = scored(5, 0.0)
    for curve in (
        auroc_difference(scores, scores.copy(), labels, groups),
        lost_separation(scores, scores, labels, groups)[0],
    ):
        np.testing.assert_array_equal([curve.value, curve.lower, curve.upper], 0)


def test_the_difference_of_two_models_that_move_as_one_is_known_well_and_covers():
    rng = np.random.default_rng(12)
    n, replicates = 40, 400
    labels, groups = np.tile([0, 1], n), [f"s{i}" for i in range(n) for _ in range(2)]
    base, fresh = rng.standard_normal((2, replicates, 2 * n))
    one = base + 1.7 * labels
    curves = {noise: auroc_difference(one, one + noise * fresh, labels, groups) for noise in (0.05, 0.5)}
    single = auroc_interval(one, labels, groups)
    assert np.mean(curves[0.05].upper - curves[0.05].lower) < 0.2 * np.mean(single.upper - single.lower)
    for noise, curve in curves.items():
        truth = distributions.norm.cdf(1.7 / np.sqrt(2 * (1 + noise**2))) - distributions.norm.cdf(
            1.7 / np.sqrt(2)
        )
        assert ((curve.lower <= truth) & (truth <= curve.upper)).mean() >= 0.93, noise
    # Two nearly equal models differ in single pairs of scenarios; the jackknife counts those about twice (1.6 times as wide).
    near = curves[0.05]
    assert np.mean(near.upper - near.lower) < 1.25 * 2 * 1.96 * near.value.std()


@pytest.mark.parametrize("categories", [1, 3])
def test_what_pairs_tell_beyond_their_members_is_what_an_additive_fit_leaves(categories: int) -> None:
    rng = np.random.default_rng(3)
    n = 7
    names = np.repeat([f"s{i}" for i in range(n)], 3)
    labels = np.stack([rng.permuted(np.tile([0, 1, 1], (n, 1)), axis=1).ravel() for _ in range(categories)])
    base, aligned = np.round(rng.standard_normal((2, 2, categories, 3 * n)), 1)
    found = pair_variance(base, aligned, labels, list(names))
    pairs = list(combinations(range(n), 2))
    members = np.array([[i in pair for i in range(n)] for pair in pairs], dtype=float)
    for layer in range(2):
        told = np.zeros(len(pairs))
        for c, row in enumerate(labels):
            for k, (s, t) in enumerate(pairs):
                for x, sign in ((aligned[layer, c], 1), (base[layer, c], -1)):
                    for one, zero in ((s, t), (t, s)):
                        high = x[(names == f"s{one}") & (row == 1)]
                        low = x[(names == f"s{zero}") & (row == 0)]
                        told[k] += sign * roc_auc_score([1, 1, 0], np.r_[high, low]) / 2 / categories
        left = told - members @ np.linalg.lstsq(members, told)[0]
        np.testing.assert_allclose(found[layer], (left**2).sum() / (len(pairs) - n), atol=1e-12)
    if categories == 1:
        alone = pair_variance(base[:, 0], aligned[:, 0], labels[0], list(names))
        np.testing.assert_allclose(alone, found, atol=1e-12)
        few = np.isin(names, ["s0", "s1", "s2"])
        assert (
            pair_variance(base[:, 0, few], aligned[:, 0, few], labels[0, few], list(names[few])) == 0
        ).all()


def test_two_different_perfect_scores_are_not_called_equal_beyond_doubt():
    scores, labels, groups = scored(6, 50.0)
    curve = auroc_difference(scores[:1], scores[1:], labels, groups)
    assert curve.value[0] == 0 and curve.lower[0] < -0.05 and curve.upper[0] > 0.05


def test_attenuation_through_d_prime_covers_a_halved_separation():
    rng = np.random.default_rng(7)
    n, replicates = 60, 300
    labels, groups = np.tile([0, 1], n), [f"s{i}" for i in range(n) for _ in range(2)]
    noise, fresh = rng.standard_normal((2, replicates, 2 * n))
    curve, ceiling = lost_separation(noise + 2 * labels, 0.8 * noise + 0.6 * fresh + labels, labels, groups)
    covered = int(((curve.lower <= 0.5) & (curve.upper >= 0.5)).sum())
    assert binomial_interval(covered, replicates).upper > 0.95 and covered / replicates > 0.92
    assert abs(np.median(curve.value) - 0.5) < 0.03 and not ceiling.any()


def test_attenuation_of_auroc_is_blank_at_the_ceiling_and_at_chance():
    scores, labels, groups = scored(8, 50.0)
    curve, ceiling = lost_separation(scores, scores[::-1], labels, groups)
    assert np.isnan(curve.value).all() and ceiling.all()
    noise, labels, groups = scored(9, 0.0)
    curve, ceiling = lost_separation(noise, noise[::-1], labels, groups)
    assert np.isnan(curve.value).any() and not ceiling.any()
