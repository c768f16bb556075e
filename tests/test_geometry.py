"""Whitening, cosine, transfer and the map between two models."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes
from sklearn.covariance import LedoitWolf

from empathy_probes.alignment import fit_map
from empathy_probes.auroc import auroc
from empathy_probes.geometry import (
    cosine_from_kernels,
    map_variance,
    transfer,
    whitened_kernels,
    whitened_strengths,
    whitening_covariance,
)
from empathy_probes.kernels import cross_kernels, mean_squares, strength_kernels, u_statistic
from empathy_probes.stats import grouped_folds

WIDTH = 12


def turn(seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)))[0]


def neutral(m: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((m, 2, WIDTH)) * np.linspace(0.5, 2, WIDTH)) + 0.3


@pytest.mark.parametrize("m", [200, 8])
def test_whitening_is_ledoit_wolf_also_with_fewer_texts_than_dimensions(m: int) -> None:
    d, x = np.random.default_rng(0).standard_normal((6, 2, WIDTH)), neutral(m)
    found = whitened_kernels(d, x)
    for layer in range(2):
        centred = x[:, layer] - x[:, layer].mean(0)
        precision = np.linalg.inv(LedoitWolf(assume_centered=True).fit(centred).covariance_)
        np.testing.assert_allclose(
            found[layer], d[:, layer] @ precision @ d[:, layer].T, rtol=1e-6, atol=1e-8
        )
    np.testing.assert_allclose(whitened_strengths(d, x), u_statistic(found).value, rtol=1e-9)


def test_d_prime_is_that_of_two_gaussians() -> None:
    """Labels 1.5 standard deviations apart along every axis: d' is 1.5 sqrt(width)."""
    rng = np.random.default_rng(0)
    sd = np.linspace(0.5, 2, WIDTH)
    d = 1.5 * sd + rng.standard_normal((400, 1, WIDTH)) * sd * np.sqrt(2)
    x = rng.standard_normal((20000, 1, WIDTH)) * sd
    value = float(u_statistic(whitened_kernels(d, x)[0]).value) ** 0.5
    assert abs(value - 1.5 * np.sqrt(WIDTH)) < 0.1


@pytest.mark.parametrize("shared", [1.0, 0.6, 0.0])
def test_the_cosine_is_not_shrunk_by_noise_and_its_interval_holds_it(shared: float) -> None:
    rng = np.random.default_rng(3)
    first, second = np.eye(WIDTH)[:2]
    other = shared * first + np.sqrt(1 - shared**2) * second
    held, values = 0, []
    for _ in range(200):
        a, b = (x + rng.standard_normal((60, 1, WIDTH)) * 0.8 for x in (first, other))
        one = np.ones((60, 1))
        c = cosine_from_kernels(
            strength_kernels(a, one), strength_kernels(b, one), cross_kernels(a, b, one, one)
        )
        held += bool(c.lower[0] <= shared <= c.upper[0])
        values.append(c.value[0])
    assert abs(np.mean(values) - shared) < 0.03  # plain cosines of the means would give about 0.85 of it
    assert 0.90 <= held / 200 <= 1


def test_the_cosine_is_blank_where_one_model_shows_nothing() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 50, 1, WIDTH))
    a[..., 0] += 3
    one = np.ones((50, 1))
    c = cosine_from_kernels(strength_kernels(a, one), strength_kernels(b, one), cross_kernels(a, b, one, one))
    assert np.isnan(c.value).all()


def test_the_interval_of_a_contrast_all_but_erased_is_shown_also_where_it_says_nothing() -> None:
    """Those that exclude something are a selection."""
    rng = np.random.default_rng(4)
    first, second = np.eye(WIDTH)[:2]
    faint = 0.1 * (0.4 * first + np.sqrt(1 - 0.4**2) * second)
    one = np.ones((60, 1))
    ends = []
    for _ in range(200):
        a, b = (x + rng.standard_normal((60, 1, WIDTH)) for x in (2 * first, faint))
        c = cosine_from_kernels(
            strength_kernels(a, one), strength_kernels(b, one), cross_kernels(a, b, one, one)
        )
        ends.append([c.lower[0], c.upper[0]])
    lower, upper = np.array(ends).T
    assert not np.isnan(ends).any() and (lower >= -1).all() and (upper <= 1).all()
    holds, informs = (lower <= 0.4) & (upper >= 0.4), (lower > -1) | (upper < 1)
    assert 0.1 < informs.mean() < 0.5
    assert holds.mean() >= 0.92 > holds[informs].mean()


def test_a_mapped_cosine_errs_with_the_neutral_texts_too() -> None:
    """Many scenarios say exactly where the contrast is, few neutral texts say only roughly where to look for it."""
    rng = np.random.default_rng(8)
    q, contrast = turn(2), 2 * np.eye(WIDTH)[0]
    one = np.ones((200, 1))
    values, curves = [], []
    for _ in range(200):
        x = rng.standard_normal((60, 1, WIDTH))
        y = x @ q + rng.standard_normal((60, 1, WIDTH))
        base = contrast + 0.5 * rng.standard_normal((200, 1, WIDTH))
        aligned = contrast @ q + 0.5 * rng.standard_normal((200, 1, WIDTH))
        cross = cross_kernels(fit_map(x, y).turn(base), aligned, one, one)
        kernels = strength_kernels(base, one), strength_kernels(aligned, one)
        extra = map_variance((base[None], aligned[None]), (x, y))
        curves.append([cosine_from_kernels(*kernels, cross, more) for more in (None, extra)])
        values.append(curves[-1][0].value[0])
    truth = np.mean(values)
    held = np.mean([[c.lower[0] <= truth <= c.upper[0] for c in pair] for pair in curves], axis=0)
    assert 0.5 < truth < 0.99 and held[0] < 0.7
    assert 0.92 <= held[1] <= 1


def test_the_error_of_a_map_is_the_same_in_its_span() -> None:
    """With fewer neutral texts than dimensions: the maps written out."""
    rng = np.random.default_rng(9)
    x, y = rng.standard_normal((2, 9, 1, WIDTH))
    base, aligned = 1 + rng.standard_normal((2, 30, 1, WIDTH))
    kernels = []
    for g in range(10):
        kept = np.arange(9) % 10 != g
        turned = fit_map(x[kept], y[kept]).turn(base)[:, 0]
        crossed = turned @ aligned[:, 0].T
        kernels.append((crossed + crossed.T) / 2)
    moved = np.array(kernels) - np.mean(kernels, axis=0)
    variance = 0.9 * sum(float(mean_squares(k[None])[0, 0]) for k in moved)
    assert variance > 0
    np.testing.assert_allclose(map_variance((base[None], aligned[None]), (x, y)), variance, rtol=1e-9)


def test_neutral_texts_and_scenarios_together_are_not_counted_twice() -> None:
    """The error of U over fresh scenarios and texts; where no contrast is, no whitening moves it but by chance."""
    rng = np.random.default_rng(4)
    sd = 1 / np.sqrt(np.arange(1, WIDTH + 1))
    values, own, once, twice = [], [], [], []
    for _ in range(300):
        d = 0.1 * np.ones(WIDTH) + rng.standard_normal((1, 30, 1, WIDTH)) * sd
        x = rng.standard_normal((60, 1, WIDTH)) * sd
        kernel = whitened_kernels(d[0], x)
        u = u_statistic(kernel)
        values.append(u.value[0])
        own.append(u.variance[0])
        once.append(whitening_covariance((d, d), (x, x))[0, 0, 0])
        groups = np.arange(60) % 10
        moved = [whitened_strengths(d[0], x[groups != g])[0] for g in range(10)]
        twice.append(8.1 * np.var(moved, ddof=1))
    spread = np.var(values)
    assert abs(np.mean(own) + np.mean(once) - spread) < 0.25 * spread
    assert np.mean(once) < 0.75 * np.mean(twice)


def test_the_map_finds_a_rotation_and_knows_its_error() -> None:
    x = neutral(300)
    q = turn()
    found = fit_map(x, x @ q)
    np.testing.assert_allclose(found.forward(x), x @ q, atol=1e-8)
    np.testing.assert_allclose(found.backward(x @ q), x, atol=1e-8)
    assert (found.error < 1e-10).all() and not found.underdetermined
    rng = np.random.default_rng(5)
    unrelated = fit_map(x, rng.standard_normal(x.shape))
    assert (unrelated.error > 0.9).all()


def test_the_map_is_scipys_and_with_few_texts_lives_on_their_span() -> None:
    x, y = neutral(40), neutral(40, 2)
    a, b = x[:, 0] - x[:, 0].mean(0), y[:, 0] - y[:, 0].mean(0)
    found = fit_map(x, y)
    np.testing.assert_allclose(found.left[0] @ found.right[0].T, orthogonal_procrustes(a, b)[0], atol=1e-8)
    few = fit_map(x[:6], x[:6] @ turn())
    assert few.underdetermined
    np.testing.assert_allclose(few.forward(x[:6]), x[:6] @ turn(), atol=1e-8)


def test_a_map_of_states_of_another_size_is_the_same_map_rescaled() -> None:
    rng = np.random.default_rng(7)
    x, y = rng.standard_normal((2, 80, 2, 12)) + 1
    sizes = np.array([[2.0, 0.5], [3.0, 0.25]])
    ours = fit_map(x, y).rescaled(sizes)
    theirs = fit_map(x * sizes[0][:, None], y * sizes[1][:, None])
    np.testing.assert_allclose(
        ours.forward(x * sizes[0][:, None]), theirs.forward(x * sizes[0][:, None]), atol=1e-9
    )


def test_a_rotated_model_defies_the_base_probe_until_the_map() -> None:
    rng = np.random.default_rng(0)
    labels = np.tile([1, 0], 60)
    units = [str(i // 2) for i in range(120)]
    base = rng.standard_normal((120, 2, WIDTH))
    base[..., 0] += 3 * labels[:, None]
    q = turn(4)
    aligned, folds = base @ q, grouped_folds(units, 5)
    x = neutral(400)
    plain = auroc(transfer(base, aligned, labels[None], folds)[:, :, 0], labels)
    mapped = auroc(transfer(base, aligned, labels[None], folds, fit_map(x, x @ q))[:, :, 0], labels)
    same = auroc(transfer(base, base, labels[None], folds)[:, :, 0], labels)
    # The turned direction has a cosine of −0.16 with the probe's, so unmapped AUROC is about Φ(−0.16 · 3 / √2) = 0.36.
    assert (mapped > 0.95).all() and (abs(plain - 0.5) < 0.2).all()
    np.testing.assert_allclose(mapped, same, atol=1e-3)
