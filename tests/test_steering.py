"""Dose and response: exact where it must be, signed by the label, attenuated where the twin does not read the concept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import rows

from empathy_probes.ablation import Ablation, ablate
from empathy_probes.concepts import Concept
from empathy_probes.design import Settings, design_study
from empathy_probes.directions import fit_vector
from empathy_probes.errors import InputError
from empathy_probes.gains import GAIN_COLUMNS, Gain, SteeredConcept
from empathy_probes.grammar import neutral_texts
from empathy_probes.interventions import add_vector, at_positions
from empathy_probes.models import Model
from empathy_probes.pairs import ModelPair
from empathy_probes.phantoms import load_phantom, load_phantom_concepts
from empathy_probes.planting import list_bases, open_twin
from empathy_probes.prompts import render
from empathy_probes.readouts import ask, read_out
from empathy_probes.sites import Site
from empathy_probes.steering import dose_response, dose_response_design, respond, spread_layers
from empathy_probes.steering_plots import ablation_plotly, gain_figure, slope_figure, slope_plotly
from empathy_probes.stimuli import ReadoutSpec, StimulusSet, stimuli_from_rows
from empathy_probes.store import load_record, open_store
from empathy_probes.vectors import make_vector, neutral_rms

NEUTRAL = neutral_texts(60)
FEW = (-0.1, 0.0, 0.1, 0.5)
# float32 through four small blocks, batched differently.
CLOSE = {"atol": 3e-5, "rtol": 1e-4}
ANSWERS = ReadoutSpec("answers", (" red", " sun"), (" blue", " rain"))
CONTINUATIONS = ReadoutSpec("continuations", (" the red sun was there",), (" a blue bird",))


def valence(n: int = 30, seed: int = 3) -> Concept:
    return load_phantom_concepts(n, seed, names=("valence",))[0][0]


def measure(pair: ModelPair, n: int = 30, seed: int = 3, controls: Any = (), **options: Any) -> Gain:
    options = {"layers": (1, 4), "doses": FEW, "template": "raw", "neutral": NEUTRAL} | options
    return dose_response(pair, valence(n, seed), controls, store="memory://steering", **options)


@pytest.fixture(scope="module")
def planted() -> ModelPair:
    return load_phantom("planted-valence")


@pytest.fixture(scope="module")
def gain(planted: ModelPair) -> Gain:
    controls = [dataclasses.replace(c, stimuli=without_readout(c.stimuli))
                for c in load_phantom_concepts(30, 3, names=("tense", "number"))[1]]  # fmt: skip
    return measure(planted, controls=controls)


def without_readout(stimuli: StimulusSet) -> StimulusSet:
    items = tuple(dataclasses.replace(item, readout=None) for item in stimuli.items)
    return dataclasses.replace(stimuli, items=items)


# ---------------------------------------------------------------- one dose is one dose


@pytest.mark.parametrize("spec", [ANSWERS, CONTINUATIONS], ids=["answers", "continuations"])
@pytest.mark.parametrize("read", ["last", "span"])
def test_a_response_is_that_of_an_edit_at_the_read_position_alone(
    model: Model, spec: ReadoutSpec, read: str
) -> None:
    made = [row | ({"read": {"span": row["text"].split()[0] + " " + row["text"].split()[1]}} if read == "span" else {})
            for row in rows(4, 1)]  # fmt: skip
    made = [row for row in made if row["text"].count(" ".join(row["text"].split()[:2])) == 1]
    both = {s for s in (r["scenario"] for r in made) if sum(r["scenario"] == s for r in made) == 2}
    stimuli = stimuli_from_rows([row for row in made if row["scenario"] in both], "demo")
    stimuli = dataclasses.replace(
        stimuli, items=tuple(dataclasses.replace(i, readout=spec) for i in stimuli.items)
    )
    prompts = render(model.tokenizer, stimuli, "raw", "user")
    asked = ask(model.tokenizer, stimuli, prompts, "raw")
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((len(asked.items), 2, model.d_model))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    rms, doses = np.array([2.0, 5.0]), (-0.5, 0.0, 0.01, 1.0)
    values, gradients = respond(model, asked, directions, (1, 3), rms, doses)
    np.testing.assert_array_equal(values[0, 1], values[1, 1])
    np.testing.assert_allclose(values[0, 1], read_out(model, asked), **CLOSE)
    for i, layer in enumerate((1, 3)):
        for d, dose in enumerate(doses):
            for item in (0, len(asked.items) - 1):
                push = torch.tensor(directions[item, i] * dose * rms[i], dtype=torch.float32)
                edit = add_vector(push, 1.0)

                def there(acts: Any, edit: Any = edit, item: int = item) -> Any:
                    for position in asked.read[item]:
                        acts = at_positions(edit, [position] * len(acts))(acts)
                    return acts

                alone = dataclasses.replace(
                    asked, items=asked.items[item : item + 1], prompts=asked.prompts[item : item + 1],
                    read=asked.read[item : item + 1], expressive=asked.expressive[item : item + 1],
                    attenuated=asked.attenuated[item : item + 1],
                )  # fmt: skip
                expected = read_out(
                    model, alone, lambda _batch, layer=layer, there=there: {Site(layer): there}
                )
                assert values[i, d, item] == pytest.approx(expected[0], abs=1e-4)
    # The gradient is the slope of a small dose; float32 and a bend leave about a hundredth of it.
    slope = (values[:, 2] - values[:, 1]).T / (doses[2] * rms)
    along = np.einsum("ilk,ilk->il", gradients, directions)
    np.testing.assert_allclose(along, slope, atol=0.02 * abs(slope).max())


def test_the_design_and_the_notebook_verb_give_the_same(planted: ModelPair, gain: Gain) -> None:
    design = design_study(planted, [valence()], template="raw", layers=(1, 4), neutral=NEUTRAL)
    again = dose_response_design(design, Settings(), open_store("memory://steering"), doses=FEW)
    one, other = again.concepts[0], gain.concepts[0]
    for name in ("readouts", "coupling", "tangents", "random", "shuffled"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_doses_are_in_units_of_each_models_own_rms(planted: ModelPair, gain: Gain) -> None:
    for side, model in enumerate(planted.models):
        np.testing.assert_array_equal(gain.rms[side], neutral_rms(model, neutral=NEUTRAL)[[1, 4]])


def test_the_readout_of_a_dose_is_that_of_a_vector_applied_at_the_read_position(
    planted: ModelPair, gain: Gain
) -> None:
    # Steering with the folds' own direction, by hand, for the texts of one fold.
    from empathy_probes.directions import cross_fitted_directions, scenario_differences
    from empathy_probes.extraction import extract
    from empathy_probes.stats import grouped_folds

    concept, model = valence(), planted.aligned
    prompts = render(model.tokenizer, concept.stimuli, "raw", "user")
    acts = extract(model, prompts, ("resid_post",), (1, 4), open_store("memory://steering"))["resid_post"]
    folds = grouped_folds(concept.stimuli.units, 5, 0)
    fitted = cross_fitted_directions(scenario_differences(acts, concept.stimuli), folds)
    asked = ask(model.tokenizer, concept.stimuli, prompts, "raw")
    last = {len(prompt.ids) - 1 for prompt in prompts}
    unit = int(np.flatnonzero(folds == 2)[0])
    vector = make_vector(fitted[2][[0]], (1,))
    items = [i for i, item in enumerate(concept.stimuli.items) if item.unit == concept.stimuli.units[unit]]
    values = []
    for i in items:
        alone = dataclasses.replace(
            asked,
            **{
                f: getattr(asked, f)[i : i + 1]
                for f in ("items", "prompts", "read", "expressive", "attenuated")
            },
        )
        end = len(prompts[i].ids) - 1
        assert end in last
        with vector.apply(model, 0.5, where=lambda p, end=end: p == end, neutral=NEUTRAL):
            values.append(read_out(model, alone)[0])
    assert gain.concepts[0].readouts[1, 0, FEW.index(0.5), unit] == pytest.approx(np.mean(values), abs=1e-4)


# ---------------------------------------------------------------- what is found


def test_a_push_towards_label_1_moves_the_answer_there_beyond_other_directions(gain: Gain) -> None:
    (c,) = gain.concepts
    found = gain.gain(c)
    assert (found.lower > 0).all() and (gain.wrong_way(c) <= 0.2).all()
    assert (gain.null_p(c)["random"][0] < 0.01).all() and (gain.null_p(c)["shuffled"][0] < 0.05).all()
    # The line through the small doses is the tangent, up to a bend.
    np.testing.assert_allclose(c.tangents.mean(-1), found.value, rtol=0.1)
    # Concepts that have nothing to do with it move the answer far less.
    assert c.controls.shape == (2, 2, 2)
    assert (abs(c.controls[0]) < 0.2 * found.value[0][:, None]).all()


def test_a_model_against_itself_has_lost_exactly_nothing(planted: ModelPair) -> None:
    found = measure(ModelPair(planted.base, planted.base))
    (c,) = found.concepts
    np.testing.assert_array_equal(c.readouts[0], c.readouts[1])
    lost = found.attenuation(c)
    for values in (lost.value, lost.lower, lost.upper):
        np.testing.assert_array_equal(values, 0)


@pytest.fixture(scope="module")
def unread() -> ModelPair:
    return open_twin(list_bases()["llama-0"], "unread", "valence", 3, None)


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_a_twin_that_does_not_read_has_lost_its_gain(unread: ModelPair, seed: int) -> None:
    # That it has not lost the concept is a law of the surgery, and tested there.
    found = measure(unread, 30, seed, doses=(-0.1, 0.0, 0.1))
    (c,) = found.concepts
    lost = found.attenuation(c)
    assert (lost.lower > 0.8).all(), "before the block and after it"
    assert abs(c.coupling[1].mean()) < 0.1 * c.coupling[0].mean()


def test_the_base_s_direction_may_be_asked_of_both(planted: ModelPair, gain: Gain) -> None:
    found = measure(planted, directions="base")
    np.testing.assert_array_equal(found.concepts[0].readouts[0], gain.concepts[0].readouts[0])
    assert not np.array_equal(found.concepts[0].readouts[1, 1], gain.concepts[0].readouts[1, 1])
    assert found.to_frame()["flags"].str.contains("base_direction").all()
    assert not gain.to_frame()["flags"].str.contains("base_direction").any()


# ---------------------------------------------------------------- numbers from curves that are known


def made(slopes: tuple[float, float], noise: float = 0.01, bend: float = 0.0, n: int = 40) -> Gain:
    """A gain whose curves are straight lines (and a bend), the same in every scenario but for noise."""
    rng = np.random.default_rng(0)
    doses = (-1.0, -0.1, 0.0, 0.1, 1.0)
    x = np.array(doses)
    each = np.array(slopes)[:, None, None, None] * (1 + noise * rng.standard_normal((2, 1, 1, n)))
    curves = each * x[:, None] + bend * (x**2)[:, None] + 1
    steered = SteeredConcept(
        "demo", "target", "raw", tuple(f"s{i}" for i in range(n)), curves, np.full((2, n), 4.0) + rng.standard_normal((2, n)) * 0.01,
        curves[:, :, 0] * 0 + each[:, :, 0], rng.standard_normal((2, 1, 999)), rng.standard_normal((2, 1, 999)), np.zeros((2, 1, 0)), np.ones((2, 1)),
    )  # fmt: skip
    loss = np.log(np.array([50.0, 10.5, 10.0, 10.9, 11.2]))
    costs = {"demo/raw": np.tile(loss, (2, 1, 1))}
    return Gain((steered,), doses, 0.1, (3,), 6, np.ones((2, 1)), costs)


def test_slope_bend_attenuation_and_ed50_of_known_lines() -> None:
    gain = made((8.0, 2.0), bend=0.5)
    (c,) = gain.concepts
    np.testing.assert_allclose(gain.gain(c).value[:, 0], [8, 2], rtol=0.01)
    np.testing.assert_allclose(gain.curvatures(c), 0.5, atol=1e-9)
    lost = gain.attenuation(c)
    assert lost.lower[0] < 0.75 < lost.upper[0] and lost.upper[0] - lost.lower[0] < 0.02
    # Half of a coupling of 4 is 2 nats, which a line of 8 per dose reaches at a quarter, one of 2 at 1, and one of 1 not here.
    straight = made((8.0, 2.0))
    ed50 = straight.ed50(straight.concepts[0])
    assert ed50.value[0, 0] == pytest.approx(0.25, abs=0.01) and ed50.value[1, 0] == pytest.approx(
        1.0, abs=0.02
    )
    assert np.isnan(made((8.0, 1.0)).ed50(made((8.0, 1.0)).concepts[0]).value[1, 0])
    assert gain.tolerated(c)[:, 0, 0].tolist() == [-0.1, 0.1]


def test_where_the_base_gains_nothing_there_is_no_ratio() -> None:
    gain = made((0.0, 2.0))
    (c,) = gain.concepts
    c = dataclasses.replace(
        c, readouts=c.readouts + np.random.default_rng(1).standard_normal(c.readouts.shape)
    )
    lost = gain.attenuation(c)
    assert np.isnan([lost.value[0], lost.lower[0], lost.upper[0]]).all()
    assert "gain_not_detected" in gain.flags(c, 0, 0)


def test_a_gain_along_a_noisy_direction_is_flagged() -> None:
    gain = made((8.0, 2.0))
    noisy = dataclasses.replace(gain.concepts[0], cosine=np.array([[0.95], [0.6]]))
    assert "noisy_direction" not in gain.flags(noisy, 0, 0) and "noisy_direction" in gain.flags(noisy, 1, 0)


def test_the_interval_of_an_attenuated_gain_holds_the_truth() -> None:
    # Slopes of 40 scenarios, correlated between the models, true attenuation 0.6; 95 % ± what 400 draws leave.
    rng = np.random.default_rng(0)
    gain = made((1.0, 1.0))
    x = np.array(gain.doses)
    held = 0
    for _ in range(400):
        shared = rng.standard_normal(40)
        slopes = np.stack([2 + shared, 0.8 + 0.4 * shared + 0.4 * rng.standard_normal(40)])
        c = dataclasses.replace(gain.concepts[0], readouts=slopes[:, None, None] * x[:, None])
        lost = gain.attenuation(c)
        held += bool(lost.lower[0] <= 0.6 <= lost.upper[0])
    assert 0.92 < held / 400 < 0.98


# ---------------------------------------------------------------- what is written down


def test_the_table_is_that_of_the_contract_and_every_blank_says_why(gain: Gain) -> None:
    frame = gain.to_frame()
    assert list(frame.columns) == GAIN_COLUMNS and len(frame) == 2 * 2 * len(FEW)
    wide = frame[frame["dose"] == 0.5]
    assert wide["null_lower"].isna().all() and wide["flags"].str.contains("null_small_doses_only").all()
    rest = frame[frame["dose"] != 0.5]
    assert not frame.drop(columns=["null_lower", "null_upper"]).isna().any(axis=None)
    assert (rest["null_lower"] <= rest["null_upper"]).all()
    zero = frame[frame["dose"] == 0]
    np.testing.assert_array_equal(zero["null_lower"], zero["readout"])
    # The price at dose 0 is the model's own perplexity, whatever the layer.
    assert zero.groupby("model")["neutral_perplexity"].agg(np.ptp).max() < 1e-4
    assert (frame["neutral_perplexity"] > 1).all()


def test_every_model_s_gain_stands_beside_what_other_directions_do(gain: Gain) -> None:
    frame, (c,) = gain.by_model(), gain.concepts
    assert len(frame) == 2 * 2 and (frame["n_controls"] == 2).all()
    row = frame[(frame["layer"] == 4) & (frame["model"] == "aligned")].iloc[0]
    assert (row["controls_lower"], row["controls_upper"]) == (c.controls[1, 1].min(), c.controls[1, 1].max())
    # After block 4 a dose of the grid moves the answer by half the coupling; after block 1 none does.
    assert row["ed50"] == gain.ed50(c).value[1, 1] and 0 < row["ed50"] < 0.5
    assert frame.loc[frame["layer"] == 1, "ed50"].isna().all()
    assert row["tolerated_upper"] == gain.tolerated(c)[1, 1, 1] and row["bound"] == 1.1
    alone = dataclasses.replace(gain, concepts=(dataclasses.replace(c, controls=c.controls[..., :0]),))
    assert alone.by_model()["controls_lower"].isna().all()
    shown = [text.get_text() for text in gain_figure(alone.to_frame()).axes[0].get_legend().get_texts()]
    assert shown and not any("control concepts" in name for name in shown)


def test_saving_and_loading_keeps_every_number(tmp_path: Path, gain: Gain) -> None:
    gain.save(tmp_path / "gain.safetensors")
    again = load_record(
        tmp_path / "gain.safetensors", {c.__name__: c for c in (Gain, SteeredConcept, Settings)}
    )
    pd.testing.assert_frame_equal(again.to_frame(), gain.to_frame())
    pd.testing.assert_frame_equal(again.summary(), gain.summary())


def test_figures_show_both_models_the_null_and_n(gain: Gain) -> None:
    frame = gain.to_frame()
    figure = gain.plot()
    # The price that is too high is drawn where the flags have it.
    dear = gain_figure(dataclasses.replace(gain, bound=1.5).to_frame())
    legends = [t.get_text() for axes in dear.axes if axes.get_legend() for t in axes.get_legend().get_texts()]
    assert "+50% on dose 0" in legends
    assert "n = 30 scenarios" in figure.get_suptitle() and "own direction" in figure.get_suptitle()
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert {"base", "aligned"} <= set(names) and any("random directions" in name for name in names)
    assert any("control concepts, base" in name for name in names)
    assert any(trace.name == "control concepts (base)" for trace in slope_plotly(frame).data)
    assert len(figure.axes) == 3 and len(gain_figure(frame[frame["layer"] == 1]).axes) == 2
    slope = slope_figure(frame)
    assert [a.get_title(loc="left") for a in slope.axes][:2] == [
        "Gain: slope at small doses (95 %)",
        "Scenarios that move the wrong way",
    ]
    assert any(trace.name == "aligned" for trace in slope_plotly(frame).data)
    for wrong, message in (
        ({"concept": "joy"}, "no doses of concept 'joy'"),
        ({"layer": 3}, "no doses were given after layer 3"),
    ):
        with pytest.raises(InputError, match=message):
            gain_figure(frame, **wrong)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"doses": (-0.1, 0.1)}, "expected 0 and small doses in pairs"),
        ({"doses": (0.0, 0.1, 0.2)}, "expected 0 and small doses in pairs"),
        ({"doses": (-1.0, 0.0, 1.0)}, "expected 0 and small doses in pairs"),
        ({"doses": (-0.1, 0.0, 0.1, float("nan"))}, "expected finite numbers"),
        ({"doses": (-0.1, 0.0, 0.1, float("inf"))}, "expected finite numbers"),
        ({"bound": 0.9}, "bound got 0.9, expected a ratio of perplexities of at least 1"),
        ({"bound": float("nan")}, "bound got nan"),
        ({"directions": "aligned"}, "expected own or base"),
        ({"layers": (9,)}, "expected block indices"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    planted: ModelPair, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        measure(planted, **options)


def test_layers_are_spread_over_all_blocks() -> None:
    assert spread_layers(6) == (0, 1, 2, 3, 4, 5)
    assert spread_layers(32)[0] == 0 and spread_layers(32)[-1] == 31 and len(spread_layers(32)) == 8


# ---------------------------------------------------------------- ablation


@pytest.fixture(scope="module")
def ablated(planted: ModelPair) -> Ablation:
    return ablate(planted.base, valence(), layers=(3, 5), neutral=NEUTRAL, store="memory://steering")


def test_taking_the_concept_out_takes_the_answer_and_random_directions_do_not(ablated: Ablation) -> None:
    assert ablated.removed.lower[-1] > 0.5
    assert ablated.random_removed.max() < 0.3 and len(ablated.random_removed) == 9
    frame = ablated.to_frame()
    assert frame["layer"].tolist() == ["3", "5", "all"]
    blank = frame.isna()
    # Random directions are taken out after all blocks only.
    assert blank[["random_lower", "random_upper"]].all(axis=1).tolist() == [True, True, False]
    assert not blank.drop(columns=["random_lower", "random_upper"]).any(axis=None)
    assert frame["random_upper"].iloc[-1] == ablated.random_removed.max()
    (axes,) = ablated.plot().axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["3", "5", "all"]
    assert ablation_plotly(frame).data
    assert "data:image" in ablated._repr_html_()


def test_a_direction_given_is_taken_out_as_it_is(planted: ModelPair, tmp_path: Path) -> None:
    model, concept = planted.base, valence()
    vector = fit_vector(model, concept, [5], store="memory://steering")
    found = ablate(model, concept, vector, neutral=NEUTRAL, store="memory://steering")
    prompts = render(model.tokenizer, concept.stimuli, "raw", "user")
    with vector.project_out(model):
        values = read_out(model, ask(model.tokenizer, concept.stimuli, prompts, "raw"))
    labels = np.array([float(item.label) for item in concept.stimuli.items])
    assert found.coupling[1].mean() == pytest.approx(
        values[labels == 1].mean() - values[labels == 0].mean(), abs=1e-4
    )
    assert found.layers == (5,)
    found.save(tmp_path / "a.safetensors")
    again = load_record(tmp_path / "a.safetensors", {"Ablation": Ablation})
    pd.testing.assert_frame_equal(again.to_frame(), found.to_frame())
    for wrong, message in (
        ({"template": "shared"}, "unknown template 'shared'"),
        ({"layers": []}, "got no layers"),
    ):
        with pytest.raises(InputError, match=message):
            ablate(model, concept, vector, neutral=NEUTRAL, **wrong)
    with pytest.raises(InputError, match="expected directions at resid_post"):
        ablate(
            model,
            concept,
            dataclasses.replace(vector, site="mlp_out"),
            neutral=NEUTRAL,
            store="memory://steering",
        )
