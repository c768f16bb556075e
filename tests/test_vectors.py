"""Steering vectors: doses add up, leave nothing behind, and are the same in generation as by hand."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, stimuli, tiny_llama, word_tokenizer
from safetensors import safe_open
from safetensors.numpy import save_file
from test_models import continued_by_hand, hooks_left

from empathy_probes import vectors
from empathy_probes.attenuation import measure_attenuation
from empathy_probes.concepts import Concept
from empathy_probes.directions import (
    ESTIMATORS,
    cross_fitted_directions,
    direction_cosine,
    fit_vector,
    pca_of_differences,
)
from empathy_probes.errors import EmpathyProbesError, InputError, StoreError
from empathy_probes.interventions import add_vector, cap_component
from empathy_probes.models import Model
from empathy_probes.pairs import load_pair
from empathy_probes.phantoms import load_phantom, load_phantom_concepts
from empathy_probes.sites import Site
from empathy_probes.stimuli import stimuli_from_rows
from empathy_probes.vectors import (
    SteeringVector,
    from_position,
    load_vector,
    make_vector,
    neutral_rms,
    only_positions,
)

TEXTS = ["the old man saw a red bird .", "a dog .", "there was rain and then the sun was very large ."]
NEUTRAL = ["the man met a dog .", "rain and sun then night .", "a boat was there with the train ."]
COLOURS = ("blue", "green", "red")
# float32 sums of a few terms in another order.
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def a_vector(model: Model, seed: int = 0, layers: tuple[int, ...] = (1, 2)) -> SteeringVector:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((len(layers), model.d_model)) * rng.uniform(0.5, 3, (len(layers), 1))
    return make_vector(rows, layers, concept=f"random {seed}", n_layers=model.n_layers)


def logits(model: Model) -> torch.Tensor:
    found = model.run(TEXTS).logits
    assert found is not None
    return found


def demo() -> Concept:
    return Concept("demo", "target", "", "", "user", "", stimuli())


# ---------------------------------------------------------------- doses


def test_the_rms_is_the_size_of_neutral_tokens_but_the_first_of_each(model: Model) -> None:
    rows = []
    for text in NEUTRAL:
        states = model.run([text], read=[Site(2)]).acts[Site(2)][0, 1:]
        rows.append(states - states.mean(-1, keepdim=True) if model.centres else states)
    expected = torch.cat(rows).pow(2).sum(-1).mean().sqrt().item()
    assert neutral_rms(model, neutral=NEUTRAL)[2] == pytest.approx(expected, rel=1e-5)
    assert neutral_rms(model, "attn_out", NEUTRAL)[2] != pytest.approx(expected, rel=0.1)
    with pytest.raises(InputError, match="none of 1 neutral texts has a second token"):
        neutral_rms(model, neutral=[""])


def test_the_rms_is_the_models_own_also_while_something_is_being_added(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = neutral_rms(model, "mlp_out", NEUTRAL)
    monkeypatch.setattr(vectors, "_RMS", {})
    with a_vector(model).apply(model, 5.0, neutral=NEUTRAL):
        np.testing.assert_array_equal(neutral_rms(model, "mlp_out", NEUTRAL), expected)
        logits(model)


def test_a_dose_adds_its_share_of_the_rms_along_the_unit_direction(model: Model) -> None:
    vector, rms = a_vector(model), neutral_rms(model, neutral=NEUTRAL)
    edits = {}
    for layer, row in zip(vector.layers, vector.direction, strict=True):
        edits[Site(layer)] = add_vector(torch.tensor(row / np.linalg.norm(row)), 0.3 * rms[layer])
    with vector.apply(model, 0.3, neutral=NEUTRAL) as dose:
        steered = logits(model)
    torch.testing.assert_close(steered, model.run(TEXTS, write=edits).logits, **CLOSE)
    assert dose.coefficient == {layer: pytest.approx(0.3 * rms[layer]) for layer in (1, 2)}
    assert {layer: c / dose.rms[layer] for layer, c in dose.coefficient.items()} == pytest.approx(
        {1: 0.3, 2: 0.3}
    )
    assert not torch.allclose(steered, logits(model), atol=1e-2)


def test_a_zero_dose_changes_no_bit(model: Model) -> None:
    plain = logits(model)
    with a_vector(model).apply(model, 0.0):
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("dose", [float("nan"), float("inf")])
def test_a_dose_that_is_no_number_is_refused(model: Model, dose: float) -> None:
    with pytest.raises(InputError, match=f"dose got {dose}"), a_vector(model).apply(model, dose):
        pass


def test_opposite_vectors_cancel_and_a_sum_is_both(model: Model) -> None:
    a, b, plain = a_vector(model), a_vector(model, 1, (2, 3)), logits(model)
    with a.apply(model, 0.5), (-a).apply(model, 0.5):
        torch.testing.assert_close(logits(model), plain, **CLOSE)
    with (a - a).apply(model, 0.5):
        assert torch.equal(logits(model), plain)
    with a.apply(model, 0.5), b.apply(model, 0.5):
        nested = logits(model)
    with (a + b).apply(model, 0.5):
        torch.testing.assert_close(logits(model), nested, **CLOSE)
    with (2 * a).apply(model, 0.25):
        doubled = logits(model)
    with a.apply(model, 0.5):
        torch.testing.assert_close(logits(model), doubled, **CLOSE)
    assert (a + b).layers == (1, 2, 3)
    with pytest.raises(InputError, match="one site and width"):
        a + make_vector(np.ones((1, model.d_model)), (1,), site="mlp_out")


def test_an_exception_inside_leaves_nothing_behind(model: Model) -> None:
    before, plain, vector = hooks_left(model), logits(model), a_vector(model)
    for around in (vector.apply(model, 1.0), vector.project_out(model), vector.cap(model, upper=0.0)):
        with pytest.raises(RuntimeError, match="mine"), around:
            logits(model)
            raise RuntimeError("mine")
    assert hooks_left(model) == before and torch.equal(logits(model), plain)


def test_a_vector_that_was_added_nowhere_is_an_error(model: Model) -> None:
    with pytest.raises(EmpathyProbesError, match="never fired"), a_vector(model).apply(model, 1.0):
        pass
    with (
        pytest.raises(EmpathyProbesError, match="reaches the chosen positions"),
        a_vector(model).apply(model, 1.0, where=from_position(40)),
    ):
        logits(model)
    for wrong in (make_vector(np.ones((1, 8)), (1,)), a_vector(model, layers=(1, 7))):
        with pytest.raises(InputError, match="expected a vector of such a model"), wrong.apply(model, 1.0):
            pass


def test_positions_are_counted_from_each_texts_first_token(model: Model) -> None:
    plain = model.run(TEXTS, read=[Site(1)]).acts[Site(1)]
    for where, expected in ((only_positions([1, 3]), [1, 3]), (from_position(2), range(2, plain.shape[1]))):
        with a_vector(model, layers=(1,)).apply(model, 1.0, where=where):
            moved = (model.run(TEXTS, read=[Site(1)]).acts[Site(1)] - plain).abs().sum(-1) > 1e-3
        assert moved[2].nonzero().flatten().tolist() == [i for i in expected if i < plain.shape[1]]


def test_projecting_out_twice_is_projecting_out_once_and_a_cap_bounds_what_it_caps(model: Model) -> None:
    vector, rms = a_vector(model, layers=(1,)), neutral_rms(model)[1]
    unit = torch.tensor(vector.relative[0], dtype=torch.float32)
    with vector.project_out(model):
        once = model.run(TEXTS, read=[Site(1)])
        with vector.project_out(model):
            twice = model.run(TEXTS, read=[Site(1)])
    torch.testing.assert_close(twice.logits, once.logits, **CLOSE)
    torch.testing.assert_close(
        once.acts[Site(1)] @ unit, torch.zeros(once.acts[Site(1)].shape[:2]), atol=1e-4, rtol=0
    )
    plain = model.run(TEXTS, read=[Site(1)]).acts[Site(1)] @ unit
    with vector.cap(model, lower=-0.05, upper=0.1):
        capped = model.run(TEXTS, read=[Site(1)]).acts[Site(1)] @ unit
    torch.testing.assert_close(capped, plain.clamp(-0.05 * rms, 0.1 * rms), atol=1e-4, rtol=1e-4)
    assert (capped != plain).any()
    for bounds in ({}, {"lower": 1.0, "upper": 0.5}):
        with pytest.raises(InputError, match="cap got the bounds"), vector.cap(model, **bounds):
            pass
    with pytest.raises(InputError, match="is zero at layer 1"), (vector - vector).project_out(model):
        pass


def test_a_cap_is_a_pure_function_of_a_tensor() -> None:
    acts, direction = torch.randn(2, 3, 8), torch.randn(8)
    kept, unit = acts.clone(), direction / direction.norm()
    capped = cap_component(direction, -0.2, 0.3)(acts)
    torch.testing.assert_close(capped @ unit, (acts @ unit).clamp(-0.2, 0.3), atol=1e-5, rtol=1e-4)
    across = [x - (x @ unit)[..., None] * unit for x in (acts, capped)]
    torch.testing.assert_close(across[0], across[1], atol=1e-5, rtol=1e-4)
    assert torch.equal(acts, kept)


@pytest.mark.parametrize("first", [0, 4])
def test_generation_under_steering_equals_transformers_with_a_hook_of_ones_own(
    model: Model, first: int
) -> None:
    prompts = ["the old man saw a", "a red dog"]
    vector = make_vector(np.linspace(-2, 2, model.d_model)[None], (1,))
    raw = torch.linspace(-2, 2, model.d_model)
    size = float(np.linalg.norm(vector.direction)) / neutral_rms(model)[1]
    expected = [continued_by_hand(model, prompt, raw, first) for prompt in prompts]
    with vector.apply(model, size, where=from_position(first)) as dose:
        assert dose.coefficient[1] == pytest.approx(float(raw.norm()), rel=1e-5)
        for cache in (True, False):
            assert model.generate_batch(prompts, max_new_tokens=6, cache=cache) == expected
        assert [model.generate(prompt, max_new_tokens=6) for prompt in prompts] == expected
    assert model.generate_batch(prompts, max_new_tokens=6) != expected


# ---------------------------------------------------------------- fitting


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_every_estimator_finds_a_planted_direction_and_points_to_label_1(estimator: str) -> None:
    rng = np.random.default_rng(0)
    made = stimuli(60)
    labels = np.array([float(item.label) for item in made.items])
    planted = np.array([3.0, 0, 0, 0, 0, 0, 0, 0])
    rows = rng.standard_normal((len(labels), 2, 8)) * 0.5 + labels[:, None, None] * planted
    for sign in (1, -1):
        found = ESTIMATORS[estimator](rows * sign, made)
        assert (found @ planted * sign > 0.95 * 3 * np.linalg.norm(found, axis=1)).all()
        # As long as the labels lie apart, which was planted to be 3.
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 3, rtol=0.1)


def test_principal_directions_are_taken_about_zero() -> None:
    # Differences that are all the concept, and noise that is less: about their mean only the noise would be left.
    rng = np.random.default_rng(0)
    made = stimuli(40)
    labels = np.array([float(item.label) for item in made.items])
    noise = np.repeat(rng.standard_normal((40, 1, 2)) * [0.0, 1.0], 2, axis=0) * labels[:, None, None]
    rows = labels[:, None, None] * np.array([4.0, 0.0]) + noise
    found = pca_of_differences(rows, made)[0]
    assert abs(found[0]) > 0.95 * np.linalg.norm(found)


def test_cross_fitted_directions_owe_nothing_to_their_own_fold() -> None:
    rng = np.random.default_rng(0)
    differences, folds = rng.standard_normal((20, 2, 6)), np.arange(20) % 5
    before = cross_fitted_directions(differences, folds)
    changed = differences.copy()
    changed[folds == 3] += 100
    after = cross_fitted_directions(changed, folds)
    np.testing.assert_array_equal(before[3], after[3])
    assert not np.allclose(before[0], after[0])
    with pytest.raises(InputError, match="do not differ"):
        cross_fitted_directions(np.zeros((20, 2, 6)), folds)


@pytest.mark.parametrize("signal", [1.0, 0.25])
def test_the_cosine_with_the_true_direction_is_known_without_it(signal: float) -> None:
    # Noise of eight times the squared signal of 1, 100 scenarios, 256 dimensions; the mean of 30 draws is known to about .01.
    rng, folds = np.random.default_rng(0), np.arange(100) % 5
    true, found = [], []
    for _ in range(30):
        differences = rng.standard_normal((100, 1, 256)) * np.sqrt(8 / 256)
        differences[..., 0] += signal
        true.append(cross_fitted_directions(differences, folds)[:, 0, 0].mean())
        found.append(direction_cosine(differences, folds)[0])
    assert np.mean(found) == pytest.approx(np.mean(true), abs=0.04)
    assert (np.mean(true) > 0.9) == (signal == 1.0)


def test_a_vector_fitted_in_a_model_is_the_one_of_its_finding(tmp_path: Path) -> None:
    pair = load_phantom("planted-valence")
    (valence,), _ = load_phantom_concepts(40, names=("valence",))
    finding = measure_attenuation(pair, valence, template="raw", store=str(tmp_path / "store"))
    for side, model in (("base", pair.base), ("aligned", pair.aligned)):
        whole = finding.vector(side)
        fitted = fit_vector(model, valence, store=str(tmp_path / "store"))
        np.testing.assert_allclose(whole.direction, fitted.direction, rtol=1e-4, atol=1e-5)
        assert whole.layers == tuple(range(6)) and whole.model["weights"] == model.weights
        assert whole.stimuli == fitted.stimuli == valence.digest and whole.rms == pytest.approx(fitted.rms)
    one = finding.vector("base", layer=3)
    assert one.layers == (3,) and np.linalg.norm(one.relative) == pytest.approx(1)
    np.testing.assert_array_equal(one.direction[0], finding.vector("base", "valence").direction[3])
    for wrong, message in (
        ({"model": "other"}, "expected base or aligned"),
        ({"model": "base", "concept": "joy"}, "nothing was measured at joy"),
        ({"model": "base", "layer": 9}, "layer 9 of the vector"),
        ({"model": "base", "category": "x"}, "expected none"),
    ):
        with pytest.raises(InputError, match=message):
            finding.vector(**wrong)
    # The embedding of the last word is the same in every text: nothing to steer along.
    with pytest.raises(InputError, match="is zero at layer 0"):
        fit_vector(pair.base, valence, [0], site="resid_pre", store=str(tmp_path / "store"))


def colours(n: int) -> Concept:
    """Random words with one of three colours among them, a text per colour in every scenario."""
    rng, plain = np.random.default_rng(0), [word for word in WORDS if word not in COLOURS]
    made = []
    for s in range(n):
        words = list(rng.choice(plain, int(rng.integers(4, 10))))
        for colour in COLOURS:
            text = " ".join([words[0], colour, *words[1:]])
            made.append({"id": f"{s}-{colour}", "scenario": f"{s}", "text": text, "label": colour})
    return Concept("colour", "target", "", "", "user", "", stimuli_from_rows(made, "colour"))


def test_every_category_has_a_vector_that_is_its_contrast_with_the_others() -> None:
    pair = load_pair(*((tiny_llama(seed), word_tokenizer()) for seed in (0, 1)), device="cpu")
    concept, layers = colours(30), (1, 3)
    options: dict[str, Any] = {"template": "raw", "store": "memory://categories"}
    neutral = [item.text for item in stimuli(30).items]
    finding = measure_attenuation(pair, concept, layers=layers, neutral=neutral, **options)
    items = concept.stimuli.items
    of = {colour: [i for i, item in enumerate(items) if item.label == colour] for colour in COLOURS}
    for side, model in (("base", pair.base), ("aligned", pair.aligned)):
        batch = model.tokenize([item.text for item in items])
        with torch.inference_mode():
            acts = model.run(batch, read=[Site(k) for k in layers]).acts
        read = torch.arange(len(items)), batch.mask.sum(-1) - 1
        states = np.stack([acts[Site(k)][read].numpy() for k in layers], 1)
        means = {colour: states[of[colour]].mean(0) for colour in COLOURS}
        found = {colour: finding.vector(side, category=colour) for colour in COLOURS}
        for colour in COLOURS:
            others = np.mean([means[other] for other in COLOURS if other != colour], 0)
            np.testing.assert_allclose(found[colour].direction, means[colour] - others, **CLOSE)
            assert (found[colour].category, found[colour].layers) == (colour, layers)
            np.testing.assert_array_equal(
                finding.vector(side, category=colour, layer=3).direction, found[colour].direction[1:]
            )
        for one, other in combinations(COLOURS, 2):
            assert ((found[one].relative * found[other].relative).sum(-1) < 0.5).all()
    for category in (None, "pink"):
        with pytest.raises(InputError, match="expected one of blue, green, red"):
            finding.vector("base", category=category)


def test_a_concept_with_categories_has_no_single_vector(llama: Model) -> None:
    with pytest.raises(InputError, match="has categories"):
        fit_vector(llama, colours(2))


# ---------------------------------------------------------------- files


def test_saving_and_loading_is_identity(tmp_path: Path, model: Model) -> None:
    whole = 2 * fit_vector(model, demo(), [1, 3], store=str(tmp_path / "store"))
    whole.save(tmp_path / "v.safetensors")
    again = load_vector(tmp_path / "v.safetensors")
    for name in SteeringVector.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    with safe_open(tmp_path / "v.safetensors", "np") as file:
        rows, header = file.get_tensor("direction"), json.loads(file.metadata()["empathy_probes"])
    assert rows.shape == (4, model.d_model) and not rows[[0, 2]].any()
    assert header["layers"] == [1, 3] and header["layer_convention"] == "0-based block"
    assert header["schema_version"] == 1 and header["model"]["weights"] == model.weights
    with whole.apply(model, 0.2):
        expected = logits(model)
    with again.apply(model, 0.2):
        assert torch.equal(logits(model), expected)


def old_header(**changes: Any) -> dict[str, Any]:
    plain = {
        "schema_version": 1, "concept": "valence", "model": {"name": "m", "weights": "w", "dtype": "float32"}, "template": "raw",
        "site": "resid_post", "layers": [0, 2], "layer_convention": "0-based block", "estimator": "difference of means",
        "rms": [1.0, 2.0], "seed": 3, "stimuli": "abc",
    }  # fmt: skip
    return plain | changes


def test_files_of_studies_before_doses_are_still_read(tmp_path: Path) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(3, 4) + 1
    save_file({"direction": rows}, tmp_path / "old.safetensors", {"empathy_probes": json.dumps(old_header())})
    found = load_vector(tmp_path / "old.safetensors")
    np.testing.assert_array_equal(found.direction, rows[[0, 2]])
    assert found.layers == (0, 2) and found.concept == "valence" and found.seed == 3 and found.n_layers == 3
    np.testing.assert_allclose(np.linalg.norm(found.relative, axis=1), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99"),
        ({"layer_convention": "hidden_states index"}, "counts layers as 'hidden_states index'"),
        ({"schema_version": "x"}, "schema version 'x'"),
        ({"layers": [0, 7]}, r"names \[0, 7\] of 3 rows"),
        ({"layers": [-1, 2]}, r"names \[-1, 2\] of 3 rows"),
        ({"layers": None}, "names None of 3 rows"),
        ({"layers": ["a"]}, "names .*'a'.* of 3 rows"),
        ({"n_layers": 2}, "2 blocks, but the layers"),
        ({"n_layers": "six"}, "damaged empathy_probes header"),
        ({"rms": None}, "damaged empathy_probes header"),
        ({"unit": ["long", "short"]}, "damaged empathy_probes header"),
    ],
)
def test_a_file_of_another_convention_or_version_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    rows = np.ones((3, 4), np.float32)
    save_file(
        {"direction": rows}, tmp_path / "v.safetensors", {"empathy_probes": json.dumps(old_header(**change))}
    )
    with pytest.raises(StoreError, match=message):
        load_vector(tmp_path / "v.safetensors")


def test_a_file_that_is_no_vector_is_refused(tmp_path: Path) -> None:
    save_file({"other": np.ones(3, np.float32)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    save_file({"direction": np.ones((3, 4))}, tmp_path / "list.safetensors", {"empathy_probes": "[1]"})
    save_file(
        {"direction": np.ones(4)}, tmp_path / "flat.safetensors", {"empathy_probes": json.dumps(old_header())}
    )
    for name in ("other", "text", "missing", "list", "flat"):
        with pytest.raises(StoreError, match=r"\.safetensors"):
            load_vector(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": (1, 0)},
        {"layers": (0, 1, 2)},
        {"layers": (-1, 0)},
        {"layers": (0, 1), "site": "nowhere"},
    ],
)
def test_a_vector_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        make_vector(np.ones((2, 4)), **wrong)
    with pytest.raises(InputError, match="not finite"):
        make_vector(np.full((1, 4), np.nan), (0,))
