"""Chance: shuffled labels and random directions."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_auc_score

from empathy_probes.nulls import direction_gaps, largest_p, permutation_null, shuffle_within
from empathy_probes.probes import cross_fitted_scores
from empathy_probes.stats import grouped_folds

LABELS = np.tile([1, 0], 40)
UNITS = [str(i // 2) for i in range(80)]
FOLDS = grouped_folds(UNITS, 5)


def test_labels_are_shuffled_within_scenarios_only() -> None:
    shuffled = LABELS[shuffle_within(UNITS, 50, 0)]
    assert (shuffled.reshape(50, 40, 2).sum(-1) == 1).all()
    assert 0.4 < (shuffled == LABELS).mean() < 0.6


def test_every_shuffle_gets_the_probe_it_would_get_alone() -> None:
    x = np.random.default_rng(0).standard_normal((80, 2, 10))
    own, null = permutation_null(x, LABELS[None], UNITS, FOLDS, draws=4, seed=3)
    np.testing.assert_array_equal(own, cross_fitted_scores(x, LABELS[None], FOLDS))
    for draw, labels in enumerate(LABELS[shuffle_within(UNITS, 4, 3)]):
        for layer, scores in enumerate(cross_fitted_scores(x, labels[None], FOLDS)[:, 0]):
            np.testing.assert_allclose(null[draw, layer], roc_auc_score(labels, scores), atol=1e-12)


def test_equal_scores_share_their_ranks_in_a_shuffle_too() -> None:
    x = np.random.default_rng(0).integers(0, 2, (80, 2, 3)).astype(float)
    x[:, 1] = 1.0
    null = permutation_null(x, LABELS[None], UNITS, FOLDS, draws=4, seed=3)[1]
    for draw, labels in enumerate(LABELS[shuffle_within(UNITS, 4, 3)]):
        scores = cross_fitted_scores(x, labels[None], FOLDS)[:, 0]
        np.testing.assert_allclose(null[draw], [roc_auc_score(labels, row) for row in scores], atol=1e-12)
        assert len(np.unique(scores[0])) < 80 and null[draw, 1] == 0.5


def test_p_of_noise_is_uniform_and_of_a_signal_the_smallest_there_is() -> None:
    rng = np.random.default_rng(1)
    p = []
    for seed in range(60):
        x = rng.standard_normal((80, 2, 10))
        own, null = permutation_null(x, LABELS[None], UNITS, FOLDS, 99, seed)
        observed = np.array([roc_auc_score(LABELS, scores) for scores in own[:, 0]])
        p.append(largest_p(observed, null).min())
    assert (np.array(p) <= 0.05).mean() <= 0.15 and np.mean(p) > 0.3
    x[..., 0] += 3 * LABELS[:, None]
    own, null = permutation_null(x, LABELS[None], UNITS, FOLDS, 99)
    observed = np.array([roc_auc_score(LABELS, scores) for scores in own[:, 0]])
    assert (largest_p(observed, null) == 0.01).all()


def test_a_direction_that_merely_varies_much_is_found_out_only_by_matched_directions() -> None:
    """A contrast of small size along the axis of largest variance: any state differs as much along it."""
    rng = np.random.default_rng(0)
    sd = np.array([12.0, *np.ones(399)])
    x = rng.standard_normal((500, 1, 400)) * sd
    d = rng.standard_normal((60, 1, 400)) * 0.3
    d[..., 0] += 3 + 6 * rng.standard_normal((60, 1))  # a quarter of a standard deviation there
    p = {}
    for isotropic in (False, True):
        observed, null = direction_gaps(d, x, draws=499, isotropic=isotropic)
        p[isotropic] = (1 + (null >= observed).sum()) / 500
    assert p[True] < 0.05 < p[False]


def test_a_real_contrast_beats_matched_directions() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((500, 1, 40))
    d = rng.standard_normal((60, 1, 40)) * 0.3
    d[..., 5] += 2
    observed, null = direction_gaps(d, x, draws=499)
    assert (null < observed).mean() > 0.99
