"""Laws of comparing two models over layers: bands, controls, decisions, onset, peak, template."""

import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from empathy_probes.contrasts import Contrast, compare, did, onset_set, peak_set
from empathy_probes.controls import (
    build_reference,
    gap_to,
    mean_covariances,
    pool_controls,
    specific_intervals,
)
from empathy_probes.decisions import judge, judge_controls
from empathy_probes.design import Settings
from empathy_probes.errors import InputError
from empathy_probes.kernels import pair_kernels
from empathy_probes.ledger import Headline, _sentence, encoded_overall
from empathy_probes.stats import Estimate, binomial_interval
from empathy_probes.strengths import strength_difference, strength_interval

DIMENSIONS = 24
DRAWS = 499


def vectors(seed: int, n: int, layers: int, trace: float) -> np.ndarray:
    """Noise [layer n d] that persists over layers, a few directions loud."""
    rng = np.random.default_rng(seed)
    spectrum = 1 / np.arange(1, DIMENSIONS + 1)
    scale = np.sqrt(trace * spectrum / spectrum.sum())
    chain = [rng.standard_normal((n, DIMENSIONS))]
    for _ in range(layers - 1):
        chain.append(0.8 * chain[-1] + 0.6 * rng.standard_normal((n, DIMENSIONS)))
    return np.stack(chain) * scale


def concept(
    name: str,
    keeps: list[float | None],
    *,
    seed: int,
    n: int = 80,
    trace: float = 2.0,
    signal: float = 1.0,
    owner: str | None = None,
    noise_seed: int | None = None,
) -> Contrast:
    """A compared concept that keeps `keeps` of its signal per layer; None: the two models are identical there.

    Concepts of one `owner` have the same scenarios, and with one `noise_seed` the same noise in them.
    """
    layers = len(keeps)
    direction = np.random.default_rng([seed, 1]).standard_normal(DIMENSIONS)
    mu = signal * direction / np.linalg.norm(direction)
    source = seed if noise_seed is None else noise_seed
    noise, fresh = vectors(source, n, layers, trace), vectors(source + 10_000, n, layers, trace)
    base = mu + noise
    aligned = base.copy()
    for i, keep in enumerate(keeps):
        if keep is not None:
            aligned[i] = keep * mu + 0.8 * noise[i] + 0.6 * fresh[i]
    kernels = np.stack([x @ np.swapaxes(x, -1, -2) for x in (base, aligned)])
    return compare(name, [f"{owner or name}/{i}" for i in range(n)], kernels, range(layers))


def pool_of(keeps: list[float | None], k: int = 8, **options) -> list[Contrast]:
    return [concept(f"control{j}", keeps, seed=100 + j, **options) for j in range(k)]


# ---------------------------------------------------------------- one concept


def test_fewer_than_thirty_scenarios_are_refused_and_fewer_than_sixty_flagged():
    with pytest.raises(InputError, match="29 scenarios"):
        concept("valence", [0.5], seed=0, n=29)
    assert "small_n" in concept("valence", [0.5], seed=0, n=59).flags[0]
    assert "small_n" not in concept("valence", [0.5], seed=0, n=60).flags[0]


@pytest.mark.parametrize(
    ("keys", "kernels", "message"),
    [
        (["a"] * 40, np.ones((2, 1, 40, 40)), "occur twice"),
        ([str(i) for i in range(40)], np.full((2, 1, 40, 40), np.nan), "NaN"),
        ([str(i) for i in range(40)], np.ones((2, 2, 40, 40)), "shape"),
    ],
)
def test_unusable_kernels_are_refused_by_name(keys: list[str], kernels: np.ndarray, message: str):
    with pytest.raises(InputError, match=message):
        compare("valence", keys, kernels, [0])


@pytest.mark.parametrize("signal", [0.0, 1.0])
def test_a_model_against_itself_gives_exactly_nothing(signal: float):
    same = concept("valence", [None] * 3, seed=1, signal=signal)
    controls = [concept(f"c{j}", [None] * 3, seed=20 + j, signal=signal) for j in range(6)]
    for given in ([], controls[:1], controls):
        judged = judge([same], given, draws=DRAWS)[0]
        for curve in (same.difference, same.attenuation, judged.band):
            np.testing.assert_array_equal([curve.value, curve.lower, curve.upper], 0)
        if given:
            np.testing.assert_array_equal([judged.specific.lower, judged.specific.upper], 0)
        assert judged.decision == ("equivalent",) * 3
        np.testing.assert_array_equal(judged.p_adjusted, 1)
        assert judged.onset.members == () and judged.onset.includes_none
    assert ("at_chance" in same.flags[0]) == (signal == 0)


def test_planted_attenuation_is_found_where_it_was_planted():
    target = concept("valence", [None, None, 0.4, 0.4], seed=2)
    judged = judge([target], [], draws=DRAWS)[0]
    assert judged.decision == ("equivalent", "equivalent", "attenuated", "attenuated")
    assert judged.onset.members == (2,) and judged.onset.upper == 2
    assert (target.attenuation.lower[2:] < 0.6).all() and (target.attenuation.upper[2:] > 0.6).all()


def test_amplification_is_not_called_attenuation():
    judged = judge([concept("valence", [1.0, 2.0], seed=3)], [], draws=DRAWS)[0]
    assert judged.decision[1] == "amplified" and judged.onset.members == ()


def test_a_concept_erased_to_nothing_is_attenuated_by_at_least_so_much():
    target = concept("valence", [1.0, 0.0], seed=4)
    assert target.form == ("log", "fieller")
    assert np.isnan(target.attenuation.value[1]) and target.attenuation.upper[1] == 1
    assert target.attenuation.lower[1] > 0.4 and {"weak_signal", "at_least"} <= set(target.flags[1])
    assert judge([target], [], draws=DRAWS)[0].decision[1] == "attenuated"
    assert judge([target], pool_of([1.0, 1.0]), draws=DRAWS)[0].decision[1] == "attenuated"


def test_a_weak_base_is_as_weak_as_a_weak_aligned_model():
    target = concept("valence", [4.0], seed=28, signal=0.22)
    base, aligned = target.pair.u[:, 0] / target.pair.se[:, 0]
    assert 2 < base < 4 < aligned and target.form == ("fieller",) and "weak_signal" in target.flags[0]


def test_without_a_base_signal_nothing_is_said():
    target = concept("valence", [1.0, 1.0], seed=5, signal=0.0)
    judged = judge([target], pool_of([1.0, 1.0]), draws=DRAWS)[0]
    for curve in (target.attenuation, judged.band, judged.specific):
        assert np.isnan([curve.value, curve.lower, curve.upper]).all()
    assert judged.decision == ("", "") and target.flags[0][0] == "base_not_detected"
    assert np.isnan(judged.p_adjusted).all()


@pytest.mark.parametrize(("gained", "said"), [(0.0, "equivalent"), (1.0, "inconclusive")])
def test_a_block_where_nothing_is_shown_does_not_stand_in_the_way_but_a_contrast_gained_does(
    gained: float, said: str
):
    mu = np.eye(DIMENSIONS)[0]
    noise = vectors(6, 200, 2, 0.5)
    base = noise + np.array([0.0, 1.0])[:, None, None] * mu
    aligned = noise[:, ::-1] + np.array([gained, 1.0])[:, None, None] * mu
    kernels = np.stack([x @ np.swapaxes(x, -1, -2) for x in (base, aligned)])
    target = compare("valence", [f"s{i}" for i in range(200)], kernels, (0, 1))
    judged = judge([target], [], draws=DRAWS)[0]
    assert judged.decision == ("", "equivalent")
    assert ("only_in_aligned" in judged.flags[0]) == (gained > 0)
    assert encoded_overall(judged) == (said, 1)


def test_a_negative_aligned_signal_beyond_chance_is_incompatible():
    base = concept("valence", [1.0], seed=6)
    vectors_ = vectors(6, 80, 1, 2.0) + 1
    kernel = vectors_ @ np.swapaxes(vectors_, -1, -2)
    target = compare("valence", base.keys, np.stack([kernel, -kernel]), [0])
    assert target.form == ("blank",) and target.flags[0] == ("incompatible",)
    assert judge([target], [], draws=DRAWS)[0].decision == ("",)
    assert did(target, base, draws=DRAWS).flags[0] == ("incompatible",)


def test_scaling_or_rotating_both_models_changes_nothing():
    rng = np.random.default_rng(7)
    base, aligned = vectors(8, 60, 1, 2.0) + 1, 0.6 * vectors(8, 60, 1, 2.0) + 1
    turn = np.linalg.qr(rng.standard_normal((DIMENSIONS, DIMENSIONS)))[0]
    keys = [str(i) for i in range(60)]

    def run(a: np.ndarray, b: np.ndarray) -> Contrast:
        return compare("x", keys, np.stack([m @ np.swapaxes(m, -1, -2) for m in (a, b)]), [0])

    plain, turned = run(base, aligned), run(base @ turn, aligned @ turn.T)
    # A rotation only rounds; the ratio is compared at the accuracy of a cancelled variance.
    np.testing.assert_allclose(turned.theta, plain.theta, rtol=1e-9)
    np.testing.assert_allclose(turned.se, plain.se, rtol=1e-6)


def test_the_simultaneous_band_contains_the_pointwise_interval():
    target = concept("valence", [0.9, 0.7, 0.0], seed=9)
    for controls in ([], pool_of([0.9, 0.9, 0.9])):
        judged = judge([target], controls, draws=DRAWS)[0]
        inner = judged.specific if controls else target.attenuation
        assert (judged.band.lower <= inner.lower).all() and (judged.band.upper >= inner.upper).all()


def test_an_embedding_layer_that_does_not_vary_costs_the_family_nothing():
    with_it = concept("valence", [None, 0.8, 0.7], seed=10)
    judged = judge([with_it], [], draws=DRAWS)[0]
    part = compare("valence", with_it.keys, kernels_of(10, [0.8, 0.7]), [0, 1])
    alone = judge([part], [], draws=DRAWS)[0]
    np.testing.assert_allclose(judged.band.lower[1:], alone.band.lower, rtol=1e-9)


def kernels_of(seed: int, keeps: list[float]) -> np.ndarray:
    """The kernels of `concept` at the layers after an identical first one."""
    direction = np.random.default_rng([seed, 1]).standard_normal(DIMENSIONS)
    mu = direction / np.linalg.norm(direction)
    noise, fresh = (vectors(s, 80, len(keeps) + 1, 2.0)[1:] for s in (seed, seed + 10_000))
    aligned = np.array(keeps)[:, None, None] * mu + 0.8 * noise + 0.6 * fresh
    return np.stack([x @ np.swapaxes(x, -1, -2) for x in (mu + noise, aligned)])


def test_a_larger_family_has_wider_bands():
    first, second = concept("a", [0.8, 0.7], seed=11), concept("b", [0.8, 0.7], seed=12)
    alone, together = judge([first], [], draws=DRAWS)[0], judge([first, second], [], draws=DRAWS)[0]
    assert (together.band.lower < alone.band.lower).all()


def test_the_same_seed_gives_the_same_numbers():
    target, controls = concept("valence", [0.8, 0.7], seed=13), pool_of([0.9, 0.9])
    first, second = (judge([target], controls, draws=DRAWS, seed=5)[0] for _ in range(2))
    np.testing.assert_array_equal(first.band.lower, second.band.lower)
    np.testing.assert_array_equal(first.p_adjusted, second.p_adjusted)


# ---------------------------------------------------------------- controls


def test_generic_drift_is_no_specific_attenuation():
    target, controls = concept("valence", [0.6, 0.5], seed=14), pool_of([0.6, 0.5])
    assert "attenuated" in judge([target], [], draws=DRAWS)[0].decision
    judged = judge([target], controls, draws=DRAWS)[0]
    assert judged.headline == ("specific",) * 2 and "attenuated" not in judged.decision
    assert (judged.band.lower < 0).all() and (judged.band.upper > 0).all()


def test_equivalence_of_specific_has_a_margin_of_its_own():
    target, controls = concept("valence", [0.9], seed=27, trace=0.8), pool_of([0.9], trace=0.8)
    wide, narrow = (judge([target], controls, draws=DRAWS, specific_margin=m)[0] for m in (0.2, 0.02))
    assert (wide.decision, narrow.decision) == (("equivalent",), ("inconclusive",))


def test_fewer_than_six_controls_are_printed_and_decide_nothing():
    target = concept("valence", [0.3, 0.3], seed=15)
    judged = judge([target], pool_of([1.0, 1.0], k=5), draws=DRAWS)[0]
    assert judged.decision == ("", "") and all("few_controls" in f for f in judged.flags)
    assert np.isfinite(judged.specific.lower).all() and judged.headline == ("attenuation",) * 2


def test_with_few_controls_that_nothing_changed_can_still_be_said():
    target = concept("valence", [1.0, 0.6], seed=15, trace=0.8)
    judged = judge([target], pool_of([1.0, 1.0], k=5), draws=DRAWS)[0]
    assert judged.decision == ("equivalent", "") and judged.headline == ("attenuation",) * 2
    assert all("few_controls" in f for f in judged.flags)


def test_equivalence_is_quoted_where_controls_reach_and_says_where_they_do_not():
    target = concept("valence", [0.97, 1.0], seed=15, trace=0.5, n=200)
    # The sixth control is carried at the second layer only; at the first the target changes more.
    mu, noise = np.eye(DIMENSIONS)[0], vectors(6, 200, 2, 0.5)
    states = noise + np.array([0.0, 1.0])[:, None, None] * mu
    kernel = states @ np.swapaxes(states, -1, -2)
    late = compare("late", [f"late/{i}" for i in range(200)], np.stack([kernel, 1.001 * kernel]), (0, 1))
    judged = judge([target], [*pool_of([1.0, 1.0], k=5, trace=0.5, n=200), late], draws=DRAWS)[0]
    assert judged.headline == ("attenuation", "specific") and judged.decision == ("equivalent",) * 2
    assert abs(judged.band.value[0]) > abs(judged.band.value[1])
    assert encoded_overall(judged) == ("equivalent", 1)


def test_the_sentence_of_an_equivalence_names_the_blocks_that_few_controls_reach():
    headline = Headline(
        "valence", "target", "raw", "resid_post", "equivalent", "specific", 1, 0.01, -0.05, 0.07, None, None, None, None,
        200, 6, 0.2, None, None, ("equivalent_alone",), "",
    )  # fmt: skip
    said = _sentence(headline, Settings(), [1, 2, 3], [0])
    assert "±20 % relative to 6 controls at any block that shows the contrast (1–3)" in said
    assert said.endswith("By itself within ±10 % at block 0, which fewer than 6 controls reach.")
    plain = _sentence(replace(headline, flags=()), Settings(), None, [])
    assert "at any block; the largest" in plain and "By itself" not in plain
    alone = _sentence(
        replace(headline, quantity="attenuation", n_controls=2, flags=("few_controls",)), Settings(), None, []
    )
    assert "±10 % (fewer than 6 controls to compare with) at any block" in alone


def test_the_input_of_block_0_is_called_the_embedding() -> None:
    headline = Headline(
        "valence", "target", "raw", "resid_post", "attenuated", "specific", 2, 0.5, 0.4, 0.6, -1, 0, -1, 3, 200, 6, 0.2, None, None,
        (), "",
    )  # fmt: skip
    said = _sentence(headline, Settings(), None, [])
    assert said.startswith("Attenuated by block 0; could begin as early as the embedding. Largest at block 2")
    assert "(it may be any from the embedding to block 3)" in said


def test_an_open_question_says_what_such_a_run_finds():
    headline = Headline(
        "valence", "target", "raw", "resid_post", "inconclusive", "specific", 1, 0.1, -0.2, 0.3, None, None, None, None,
        50, 8, 0.2, 310, None, (), "",
    )  # fmt: skip
    said = _sentence(replace(headline, minimum_detectable=0.41), Settings(), None, [])
    assert said.endswith(
        "; an attenuation of 41 % is found in four of five such runs; about 310 scenarios would settle it."
    )
    assert "no attenuation is found" in _sentence(
        replace(headline, minimum_detectable=1.0), Settings(), None, []
    )


def test_without_controls_attenuation_is_decided_and_flagged():
    judged = judge([concept("valence", [0.5], seed=16)], [], draws=DRAWS)[0]
    assert judged.decision == ("attenuated",) and judged.flags[0] == ("no_controls",)
    assert np.isnan(judged.specific.lower).all()
    assert judge_controls([concept("tense", [0.5], seed=16)], draws=DRAWS)[0].flags == ((),)


def test_controls_without_signal_at_a_layer_are_dropped_there_and_counted():
    controls = [*pool_of([1.0], k=6), concept("mute", [1.0], seed=90, signal=0.0)]
    target = concept("valence", [0.4], seed=17)
    judged, without = (judge([target], c, draws=DRAWS)[0] for c in (controls, controls[:6]))
    assert judged.n_controls[0] == 6 and judged.decision == ("attenuated",)
    np.testing.assert_array_equal(judged.specific.lower, without.specific.lower)
    five = [*controls[1:6], controls[6]]
    judged = judge([target], five, draws=DRAWS)[0]
    assert judged.decision == ("",) and "few_controls" in judged.flags[0]


def test_an_erased_control_widens_the_spread_instead_of_vanishing():
    target, controls = concept("valence", [0.7], seed=18), pool_of([1.0], k=7)
    erased = concept("gone", [0.0], seed=91)
    plain, honest = (judge([target], c, draws=DRAWS)[0] for c in (controls, [*controls, erased]))
    assert "control_lost" in honest.flags[0] and honest.n_controls[0] == 7
    assert honest.tau[0] > plain.tau[0] + 0.1
    assert plain.decision == ("attenuated",) and honest.decision != ("attenuated",)


@pytest.mark.parametrize("lost", [1, 2])
def test_erased_controls_alone_are_no_reference(lost: int):
    """They enter with the error of the others: without others they would be known exactly."""
    gone = [concept(f"gone{j}", [0.0], seed=91 + j) for j in range(lost)]
    assert {c.form for c in gone} == {("fieller",)}
    judged = judge([concept("valence", [0.7], seed=18)], gone, draws=DRAWS)[0]
    assert judged.n_controls[0] == 0 and judged.decision == ("",)
    assert np.isnan([judged.specific.value, judged.specific.lower, judged.specific.upper]).all()


def test_what_too_few_controls_reach_may_be_the_onset_and_the_peak_unless_it_has_not_changed():
    """Five controls drift as the target does, from layer 2 on: generic drift begins nowhere in particular."""
    drift = [None, None, 0.5, 0.5]
    target, five = concept("valence", drift, seed=30), pool_of(drift, k=5)
    judged = judge([target], five, draws=DRAWS)[0]
    assert judged.decision == ("equivalent", "equivalent", "", "")
    assert judged.onset.members == (2, 3) and judged.onset.includes_none and judged.onset.upper is None
    assert judged.loss.includes_none and set(judged.peak.members) == {0, 1, 2, 3}
    # One more that is carried at layer 0 alone says nothing of the others.
    states = vectors(6, 80, 4, 0.5) + np.array([1.0, 0, 0, 0])[:, None, None]
    kernels = states @ np.swapaxes(states, -1, -2)
    early = compare(
        "early", [f"early/{i}" for i in range(80)], np.stack([kernels, 1.001 * kernels]), range(4)
    )
    judged = judge([target], [*five, early], draws=DRAWS)[0]
    assert judged.n_controls.tolist() == [6, 5, 5, 5]
    assert {2, 3} <= set(judged.onset.members) and judged.onset.includes_none
    assert set(judged.peak.members) == {0, 1, 2, 3}


def test_a_target_inside_the_spread_of_the_controls_is_not_decided():
    keeps = [0.5, 0.6, 0.75, 0.9, 1.05, 1.2, 1.4, 1.7]
    controls = [concept(f"c{j}", [keep], seed=30 + j, trace=0.3) for j, keep in enumerate(keeps * 3)]
    judged = judge([concept("valence", [0.55], seed=19, trace=0.3)], controls, draws=DRAWS)[0]
    assert "within_control_spread" in judged.flags[0] and judged.decision == ("inconclusive",)
    assert judged.band.lower[0] > 0.1 and judged.prediction.upper[0] > judged.band.value[0]


def test_one_control_without_any_noise_does_not_own_the_mean():
    effects = np.array([[0.1], [0.0], [0.02], [-0.02], [0.01], [-0.01]])
    variances = np.array([[0.0], *[[0.01]] * 5])
    pool = pool_controls(effects, variances, np.ones((6, 1), bool))
    assert pool.mean[0] < 0.06 and pool.variance[0] > 0.0005 and pool.tau2[0] == 0


def test_controls_that_agree_exactly_have_no_spread_and_leave_the_standard_errors():
    pool = pool_controls(np.full((6, 2), 0.1), np.full((6, 2), 0.04), np.ones((6, 2), bool))
    np.testing.assert_allclose(pool.mean, 0.1)
    np.testing.assert_allclose(pool.tau2, 0)
    np.testing.assert_allclose(pool.variance, 0.04 / 6)


def test_what_controls_have_in_common_is_added_to_the_variance_of_their_mean():
    effects, variances = np.random.default_rng(0).normal(0, 0.1, (6, 1)), np.full((6, 1), 0.01)
    apart = pool_controls(effects, variances, np.ones((6, 1), bool))
    shared = pool_controls(effects, variances, np.ones((6, 1), bool), np.full((6, 6, 1), 0.005))
    np.testing.assert_allclose(shared.variance - 0.005, apart.variance, atol=0.002)


@pytest.mark.parametrize("together", [False, True])
def test_the_two_forms_of_specific_agree_where_the_target_is_strong(together: bool):
    options = {"owner": "s", "noise_seed": 20} if together else {}
    target = concept("valence", [0.7], seed=20, trace=0.3, **options)
    reference = build_reference(pool_of([0.9], trace=0.3, **options))
    weak = Contrast(**{**vars(target), "form": ("fieller",)})
    strong_ends, weak_ends = (
        np.array(specific_intervals(t, reference, (0.05,), (False,))) for t in (target, weak)
    )
    # t(n-1) and t(k-1) apart instead of Satterthwaite's between them: the weak form is a little wider.
    width = np.diff(strong_ends, axis=0)
    assert (abs(strong_ends - weak_ends) < 0.12 * width).all()
    strong_gap, weak_gap = (gap_to(t, reference, t.theta[0] - reference.pool.mean) for t in (target, weak))
    np.testing.assert_allclose(weak_gap.value, 0, atol=1e-12)
    # The standard error of a logarithm has half a second-order term more, little at a strong signal.
    np.testing.assert_allclose(weak_gap.se, strong_gap.se, rtol=0.01)


def test_what_target_and_controls_share_does_not_count_as_error_of_their_difference():
    target = concept("valence", [0.7], seed=20, trace=0.3, owner="s", noise_seed=20)
    copies = build_reference([Contrast(**{**vars(target), "name": f"copy{j}"}) for j in range(8)])
    # The mean of copies of the target moves with the target; nothing is left but the floors.
    assert gap_to(target, copies, 0.0).se[0] < 0.5 * target.se[0]
    elsewhere = Contrast(**{**vars(target), "keys": tuple(f"t/{i}" for i in range(80))})
    for form in ("log", "fieller"):
        near, far = (
            np.diff(
                specific_intervals(Contrast(**{**vars(t), "form": (form,)}), copies, (0.05,), (False,)),
                axis=0,
            )
            for t in (target, elsewhere)
        )
        assert near[0, 0] < 0.5 * far[0, 0]


def test_shared_scenarios_enter_the_covariance_and_others_do_not():
    target = concept("valence", [0.8], seed=21, owner="s")
    same = build_reference(pool_of([0.9], owner="s"))
    copy = Contrast(**{**vars(target), "name": "copy"})
    # A control that is the target itself has all of its error in common with it.
    itself = build_reference([copy])
    assert gap_to(target, itself, 0.0).value[0] == 0
    base, aligned = mean_covariances(target, itself)
    u = target.pair.u
    np.testing.assert_allclose(
        0.5 * (aligned / u[1] - base / u[0]), (target.influence**2).sum() / (80 * 79), rtol=1e-9
    )
    np.testing.assert_array_equal(mean_covariances(target, build_reference(pool_of([0.9]))), 0)
    assert (np.array(mean_covariances(target, same)) != 0).all()


def test_the_order_of_the_controls_does_not_matter():
    target, controls = concept("valence", [0.8, 0.5], seed=22), pool_of([0.9, 0.9])
    first, second = judge([target], controls, draws=DRAWS)[0], judge([target], controls[::-1], draws=DRAWS)[0]
    np.testing.assert_allclose(first.band.lower, second.band.lower, rtol=1e-9)
    assert first.decision == second.decision


# ---------------------------------------------------------------- where


def test_onset_is_the_first_layer_beyond_the_margin_when_all_is_certain():
    draws = np.random.default_rng(0).standard_normal((999, 5))
    found = onset_set(np.array([-50.0, -50.0, 50.0, -50.0, 50.0]), draws, 1.96, range(5))
    assert found.members == (2,) and (found.lower, found.upper) == (2, 2)


def test_an_onset_cannot_lie_where_the_base_carries_nothing():
    rng = np.random.default_rng(0)
    signal, noise = np.eye(20)[0], 0.05 * rng.normal(size=(60, 20))
    nothing = rng.normal(size=(60, 20))
    pairs = [
        (nothing, nothing + rng.normal(size=(60, 20))),
        (signal + noise, signal + noise),
        (signal + noise, 0.3 * signal + noise),
    ]
    kernels = np.stack([[m @ m.T for m in pair] for pair in pairs], axis=1)
    (judged,) = judge([compare("x", [str(i) for i in range(60)], kernels, [-1, 0, 1])], [], draws=199)
    assert "base_not_detected" in judged.flags[0] and judged.onset.members == (1,)


def test_an_unclear_layer_before_the_onset_stays_in_the_set():
    draws = np.random.default_rng(0).standard_normal((999, 4))
    found = onset_set(np.array([-50.0, 0.0, 50.0, 50.0]), draws, 1.96, [3, 4, 5, 6])
    assert found.members == (4, 5) and not found.includes_none
    never = onset_set(np.array([-50.0, 0.0, -50.0, 0.0]), draws, 1.96, [3, 4, 5, 6])
    assert never.members == (4, 6) and never.includes_none and never.upper is None


def test_peak_holds_every_layer_that_no_other_surely_exceeds():
    errors = 0.1 * np.random.default_rng(0).standard_normal((999, 4))
    found = peak_set(np.array([0.1, 0.9, 0.85, np.nan]), errors, range(4))
    assert found.members == (1, 2) and found.best == 1


# ---------------------------------------------------------------- template and needs


def test_did_of_one_template_with_itself_is_exactly_nothing():
    target = concept("valence", [0.5, None], seed=23)
    shift = did(target, target, draws=DRAWS)
    np.testing.assert_array_equal([shift.theta.value, shift.theta.lower, shift.theta.upper], 0)
    np.testing.assert_array_equal(shift.p_adjusted, 1)


def test_did_finds_what_one_template_adds_and_says_where_it_cannot():
    raw = concept("valence", [0.9, 0.9, 0.9], seed=24, trace=0.5)
    shared = concept("valence", [0.5, 0.9, 0.0], seed=24, trace=0.5)
    shift = did(shared, raw, draws=DRAWS)
    assert shift.attenuation.lower[0] > 0.3 and shift.p_adjusted[0] < 0.01
    assert shift.attenuation.lower[1] <= 0 <= shift.attenuation.upper[1]
    assert np.isnan(shift.theta.value[2]) and shift.flags[2] == ("weak_signal",)
    with pytest.raises(InputError, match="not the same"):
        did(shared, concept("valence", [0.9, 0.9, 0.9], seed=24, owner="other"), draws=DRAWS)


def test_more_scenarios_are_asked_for_only_where_nothing_was_settled():
    judged = judge([concept("valence", [0.3, 0.93], seed=25, trace=8.0)], [], draws=DRAWS)[0]
    assert judged.decision == ("attenuated", "inconclusive")
    assert np.isnan(judged.scenarios_needed[0]) and judged.scenarios_needed[1] > 80
    assert (judged.minimum_detectable > 0.1).all()


def test_what_a_run_could_have_shown_depends_on_its_size_and_not_on_what_it_found():
    named = {
        (n, keep): judge([concept("valence", [keep], seed=27, n=n, trace=1.0)], [], draws=DRAWS)[
            0
        ].minimum_detectable[0]
        for n in (100, 300)
        for keep in (1.0, 0.5, 0.25)
    }
    for keep in (1.0, 0.5, 0.25):
        assert 0.1 < named[300, keep] < named[100, keep] < 0.25
    assert max(named[300, k] for k in (1.0, 0.5, 0.25)) - min(named[300, k] for k in (1.0, 0.5, 0.25)) < 0.02
    # With controls, whose spread adds to the error; where the base carries nothing there is nothing to show.
    controls = [
        concept(f"c{j}", [keep], seed=40 + j, trace=0.1, n=300) for j, keep in enumerate([0.9, 1.0, 1.1] * 3)
    ]
    against = judge([concept("valence", [1.0], seed=27, n=300, trace=1.0)], controls, draws=DRAWS)[0]
    assert against.minimum_detectable[0] > named[300, 1.0] + 0.02
    assert np.isnan(
        judge([concept("valence", [1.0], seed=28, signal=0.0)], [], draws=DRAWS)[0].minimum_detectable[0]
    )


def test_more_controls_are_asked_for_where_their_spread_is_what_hinders():
    keeps = [0.6, 0.75, 0.9, 1.0, 1.1, 1.4]
    controls = [concept(f"c{j}", [keep], seed=40 + j, trace=0.1, n=200) for j, keep in enumerate(keeps)]
    judged = judge([concept("valence", [0.95], seed=26, trace=0.1, n=200)], controls, draws=DRAWS)[0]
    assert judged.decision == ("inconclusive",) and judged.controls_needed[0] > 6


# ---------------------------------------------------------------- the coverage simulation, in small


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    """The simulation script as a module."""
    path = Path(__file__).parents[1] / "scripts" / "simulations" / "coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_simulation", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def shares(cells: Iterable) -> dict[str, Estimate]:
    """Proportions with their binomial intervals, by metric."""
    return {c.metric: binomial_interval(c.hits, c.trials) for c in cells if c.value is None and c.trials}


@pytest.mark.parametrize("keep", [1.0, 0.25, 0.0])
def test_the_ratio_interval_covers_the_truth_where_the_naive_gap_does_not(coverage: ModuleType, keep: float):
    setting = {"n": 60, "trace": 8.0, "keep": keep, "ratio": 1.0, "heavy": False}
    found = shares(coverage.ratio_cell(np.random.default_rng(0), 400, setting))
    # An interval may cover more than 95 %; it covers less only if its upper binomial bound stays below.
    assert found["package"].upper > 0.95 and found["difference"].upper > 0.95
    assert found["package_at_2.9_se"].value > 0.98
    if keep == 0.25:
        assert found["naive_gap"].upper < 0.90


@pytest.mark.parametrize(("keep", "widest"), [(0.0, 1.17), (0.25, 1.43)])
def test_a_difference_of_strengths_is_no_wider_than_an_aligned_strength_of_zero_asks_for(
    coverage: ModuleType, keep: float, widest: float
):
    """The joint region of both strengths for all aligned ones, not for 0 alone, was 1.24 and 1.48 times as wide as +- 1.96 sd."""
    n, trace = (40, 2.0) if keep == 0 else (60, 8.0)
    base, aligned = coverage.simulate_pair(np.random.default_rng(1), 400, n, trace, keep, 1.0, False)
    pair = pair_kernels(coverage.gram(base), coverage.gram(aligned))
    curve = strength_difference(pair, *strength_interval(pair))
    covered = int(((curve.lower <= keep - 1) & (keep - 1 <= curve.upper)).sum())
    assert binomial_interval(covered, 400).upper > 0.95
    assert (curve.upper - curve.lower).mean() < widest * 2 * 1.96 * curve.value.std()


def test_a_scaled_model_with_an_uncertain_rms_is_missed_on_both_sides_alike(coverage: ModuleType):
    found = shares(coverage.together_cell(np.random.default_rng(0), 600, 100, 16.0, -0.95))
    assert found["package"].upper > 0.95
    assert max(found["package_misses_below"].value, found["package_misses_above"].value) < 0.045
    # The set of keeps that the test of the two U-statistics does not reject lies to one side.
    assert found["set_alone_misses_below"].lower > 0.07 > 0.02 > found["set_alone_misses_above"].upper


def test_a_cosine_is_shown_whether_or_not_chance_lifts_a_weak_contrast_and_is_sharp_near_one(
    coverage: ModuleType,
):
    cells = list(coverage.cosine_cell(np.random.default_rng(0), 100, 100, 0.25, 1.0))
    weak = shares(cells)
    assert weak["aligned_detected"].upper < 0.25 and weak["shown"].lower > 0.75
    assert weak["package"].upper > 0.95
    strong = list(coverage.cosine_cell(np.random.default_rng(1), 100, 100, 0.5, 1.0))
    assert shares(strong)["package"].upper > 0.95
    widths = {c.metric: c.value for c in strong if c.value is not None}
    assert widths["half_width"] < 0.8 * widths["delete_one_half_width"]


def test_the_band_covers_all_layers_at_once_and_the_onset_set_the_onset(coverage: ModuleType):
    found = shares(coverage.band_cell(np.random.default_rng(0), 150, 60, 4.0, "step", 199))
    assert found["band"].upper > 0.95 and found["onset_covers"].upper > 0.95
    assert found["pointwise"].upper < 0.90 and found["false_decision"].lower < 0.05


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_what_is_named_detectable_is_detected_in_four_of_five_runs(coverage: ModuleType, keep: float):
    cells = list(coverage.power_cell(np.random.default_rng(1), 150, 100, 2.0, keep))
    found = shares(cells)
    assert found["decided_there"].lower < 0.8 < found["decided_there"].upper + 0.05
    # With the errors of what was found it is too much where nothing is lost, and too little where half is.
    other = found["found_decided_there"]
    assert other.upper < 0.8 if keep == 1 else other.lower > 0.9


def test_specific_covers_and_one_more_control_is_not_decided(coverage: ModuleType):
    found = shares(coverage.specific_cell(np.random.default_rng(0), 20, coverage.Specific(6, 0.1, n=40), 199))
    assert found["band"].upper > 0.95 and found["pointwise_each_layer"].upper > 0.93
    assert found["one_more_control_decided"].lower < 0.05
