"""Known lineages are well-formed; a trend over stages is what was planted, nothing where nothing is, and exactly a pair's for two."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WORDS, byte_tokenizer, rows, tiny_llama, word_tokenizer

from empathy_probes.attenuation import measure
from empathy_probes.cli import main
from empathy_probes.concepts import Concept
from empathy_probes.design import Settings, design_study
from empathy_probes.errors import InputError
from empathy_probes.kernels import strength_kernels
from empathy_probes.lineages import list_lineages, load_lineage
from empathy_probes.models import Model, load_model
from empathy_probes.pairs import make_pair
from empathy_probes.phantoms import load_phantom, load_phantom_concepts
from empathy_probes.planting import list_bases, open_twin
from empathy_probes.stimuli import stimuli_from_rows
from empathy_probes.store import open_store
from empathy_probes.trend_plots import trend_figure, trend_plotly
from empathy_probes.trends import (
    LINEAGE_COLUMNS,
    LineageTrend,
    TracedConcept,
    load_trend,
    measure_lineage,
    trace_design,
    trend_weights,
)

NEUTRAL = [f"the {a} {b} was here ." for a in WORDS[18:26] for b in WORDS[2:9]]
PLANTED_AT = 3
AFFECTED = {"valence"}

# ---------------------------------------------------------------- known lineages


@pytest.mark.parametrize("name", list_lineages())
def test_a_lineage_names_checkpoints_in_order(name: str) -> None:
    lineage = load_lineage(name)
    assert lineage.role in ("aligned", "null") and lineage.family
    models = [stage.model for stage in lineage.stages]
    assert len(models) >= 2 and len(set(models)) == len(models)
    assert all(
        re.fullmatch(r"[\w-]+/[\w.-]+(@(step\d+|[0-9a-f]{40}|it-mid-training))?", model) for model in models
    )
    if lineage.role == "aligned":
        assert lineage.stages[0].name == "base"
    else:  # the same checkpoint a little later, by revision
        assert len({model.split("@")[0] for model in models}) == 1
        steps = [int(model.split("@step")[1]) for model in models]
        assert steps == sorted(steps)


def test_no_two_lineages_are_the_same_and_both_roles_are_there() -> None:
    found = [load_lineage(name) for name in list_lineages()]
    assert len({lineage.stages for lineage in found}) == len(found)
    assert {lineage.role for lineage in found} == {"aligned", "null"}


def test_an_unknown_lineage_is_one_sentence() -> None:
    with pytest.raises(InputError, match="unknown lineage 'olmo': expected one of olmo2-1b"):
        load_lineage("olmo")


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lineages"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in shown if line[0] != " "] == list(list_lineages())
    assert shown[1].split() == ["base", load_lineage("olmo2-1b").stages[0].model]
    assert main(["lineages", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in listed] == list(list_lineages())
    first = load_lineage(listed[0]["name"])
    assert listed[0] == {
        "name": first.name, "family": first.family, "role": first.role,
        "stages": {stage.name: stage.model for stage in first.stages},
    }  # fmt: skip


# ---------------------------------------------------------------- planted


@pytest.fixture(scope="module")
def twins() -> dict[str, Model]:
    """The shipped base, and twins that keep three quarters, half and a quarter of valence from block 3 on."""
    pair = load_phantom("planted-valence")
    folder = list_bases()["llama-0"]
    more = {
        str(keep): open_twin(folder, "planted", "valence", PLANTED_AT, keep).aligned for keep in (0.75, 0.5)
    }
    return {"base": pair.base, **more, "0.25": pair.aligned}


def traced(stages: Mapping[str, Any], **options: Any) -> LineageTrend:
    targets, _ = load_phantom_concepts(60, names=("valence", "intensity"))
    _, controls = load_phantom_concepts(
        60, names=("tense", "number", "place", "weather", "transport", "season")
    )
    return measure_lineage(
        stages, targets, controls, template="raw", store="memory://lineage", draws=500, **options
    )


@pytest.fixture(scope="module")
def falling(twins: dict[str, Model]) -> LineageTrend:
    return traced({"base": twins["base"], "sft": twins["0.75"], "dpo": twins["0.5"], "final": twins["0.25"]})


def test_what_was_planted_is_found_at_every_stage(falling: LineageTrend) -> None:
    frame = falling.to_frame()
    here = frame[(frame.concept == "valence") & (frame.comparison == "stage") & (frame.layer == PLANTED_AT)]
    assert list(here["to"]) == ["sft", "dpo", "final"]
    # The twins are made by an edit in closed form and keep what they should to about .01.
    np.testing.assert_allclose(here["attenuation"], [0.25, 0.5, 0.75], atol=0.03)
    assert (here["decision"] == "attenuated").all() and here["specific"].notna().all()


def test_the_trend_begins_where_it_was_planted_and_in_that_concept_only(falling: LineageTrend) -> None:
    frame = falling.to_frame()
    trend = frame[(frame.comparison == "trend") & (frame.layer >= 0)]
    own, others = trend[trend.concept == "valence"], trend[trend.concept != "valence"]
    after = own["layer"] >= PLANTED_AT
    assert (own[after]["decision"] == "attenuated").all() and (own[after]["shape"] == "monotone").all()
    assert (own[after]["p_adjusted"] <= 1 / 501 + 1e-9).all()
    before = own[~after]
    assert (before[["attenuation", "band_lower", "band_upper"]] == 0).all(axis=None)
    assert (before["decision"] == "equivalent").all() and (before["shape"] == "").all()
    assert not others["decision"].isin(["attenuated", "amplified"]).any()


def test_a_way_back_is_told_from_a_way_down(twins: dict[str, Model]) -> None:
    found = traced({"base": twins["base"], "sft": twins["0.25"], "dpo": twins["0.75"], "final": twins["0.5"]})
    shape = dict(zip(found.concepts[0].layers, found.shape("raw", "resid_post", "valence"), strict=True))
    assert shape[PLANTED_AT] == "reversed" and shape[PLANTED_AT - 1] == ""


def test_a_result_is_what_was_saved_and_shows_itself(falling: LineageTrend, tmp_path: Path) -> None:
    falling.save(tmp_path / "lineage.safetensors")
    again = load_trend(tmp_path / "lineage.safetensors")
    assert again.to_frame().equals(falling.to_frame()) and again.stages == falling.stages
    assert list(falling.to_frame().columns) == LINEAGE_COLUMNS
    assert "lineage" in falling._repr_html_() and "<img" in falling._repr_html_()
    described = falling.provenance["stages"]
    assert [stage["stage"] for stage in described] == ["base", "sft", "dpo", "final"]
    assert len({stage["weights"] for stage in described}) == 4


def test_the_figure_shows_every_stage_and_the_band_of_the_trend(falling: LineageTrend) -> None:
    frame = falling.to_frame()
    axes = trend_figure(frame).axes
    labels = [label for one in axes for label in one.get_legend_handles_labels()[1]]
    assert {"sft", "dpo", "final", "specific (95 % band over layers)"} <= set(labels)
    assert any("n = 60" in text.get_text() for text in trend_figure(frame).texts)
    live = {trace.name: trace for trace in trend_plotly(frame).data if trace.mode == "lines+markers"}
    drawn = frame[(frame.concept == "valence") & (frame["to"] == "dpo") & (frame.comparison == "stage")]
    np.testing.assert_array_equal(
        np.array(live["dpo"].y, float), drawn["attenuation"].to_numpy(dtype=float, na_value=np.nan)
    )
    with pytest.raises(InputError, match="no lineage rows for concept 'joy'"):
        trend_figure(frame, "joy")


def test_an_unknown_stage_is_one_sentence(falling: LineageTrend) -> None:
    assert falling.at_stage("raw", "resid_post", "dpo")["valence"].n == 60
    with pytest.raises(InputError, match="unknown stage 'base': expected one of sft, dpo, final"):
        falling.at_stage("raw", "resid_post", "base")


# ---------------------------------------------------------------- laws, on tiny random models


def tiny(seed: int, tokenizer: Any = None, **changes: Any) -> tuple[Any, Any]:
    return tiny_llama(seed, **changes), tokenizer or word_tokenizer()


def concept(n: int = 40, name: str = "demo") -> Concept:
    return Concept(name, "target", "", "", "user", "", stimuli_from_rows(rows(n, 0, name), name))


def trace(stages: dict[str, Any], **options: Any) -> LineageTrend:
    """Stages by name, base first, through a design of the first and the last."""
    names = list(stages)
    ends = [load_model(stages[name], device="cpu", name=name) for name in (names[0], names[-1])]
    design = design_study(
        make_pair(*ends, allow_identical=True), [concept()], neutral=NEUTRAL, **{"template": "raw", **options}
    )
    between = {name: stages[name] for name in names[1:-1]}
    return trace_design(
        design, Settings(draws=200), open_store("memory://tiny"), between, ends=(names[0], names[-1])
    )


def test_a_model_that_never_changes_gives_exactly_nothing() -> None:
    frame = trace({"base": tiny(0), "sft": tiny(0), "dpo": tiny(0), "final": tiny(0)}).to_frame()
    numbers = frame[["attenuation", "attenuation_lower", "attenuation_upper", "band_lower", "band_upper"]]
    assert (numbers == 0).all(axis=None)
    assert (frame["decision"] == "equivalent").all() and (frame["shape"] == "").all()


def test_two_stages_are_a_pair() -> None:
    models = [load_model(tiny(seed), device="cpu") for seed in (0, 1)]
    design = design_study(make_pair(*models), [concept()], template="raw", neutral=NEUTRAL)
    store, settings = open_store("memory://tiny"), Settings(draws=200)
    trend, pair = trace_design(design, settings, store, {}), measure(design, settings, store)
    (one,) = trend.concepts
    for contrast in (one.trend, one.stages[0], one.steps[0]):
        np.testing.assert_array_equal(contrast.theta, pair.measurements[0].contrast.theta)
        np.testing.assert_array_equal(contrast.se, pair.measurements[0].contrast.se)


def test_the_order_of_the_stages_between_decides_the_trend_alone() -> None:
    one, two = (
        trace({"base": tiny(0), "a": tiny(first), "b": tiny(second), "final": tiny(3)})
        for first, second in ((1, 2), (2, 1))
    )
    np.testing.assert_array_equal(one.concepts[0].stages[0].theta, two.concepts[0].stages[1].theta)
    np.testing.assert_array_equal(one.concepts[0].stages[2].theta, two.concepts[0].stages[2].theta)
    assert not np.array_equal(one.concepts[0].trend.theta, two.concepts[0].trend.theta, equal_nan=True)


@pytest.mark.parametrize("n", range(2, 8))
def test_weights_of_early_and_late_stages_are_mirror_images_that_sum_to_one(n: int) -> None:
    early, late = trend_weights(n)
    assert sum(early.values()) == pytest.approx(1) and not early.keys() & late.keys()
    assert {n - 1 - k: w for k, w in early.items()} == late
    # Later minus earlier is the linear contrast: in proportion to the distance from the middle.
    contrast = np.array([late.get(k, 0) - early.get(k, 0) for k in range(n)])
    centred = np.arange(n) - (n - 1) / 2
    np.testing.assert_allclose(contrast, centred / centred[centred > 0].sum(), atol=1e-12)


def drawn(keeps: tuple[float, ...], n: int, rng: np.random.Generator, name: str = "c") -> TracedConcept:
    """A concept of four stages without a model: signal times keep, and noise that stages share in part."""
    signal = np.zeros((3, 16))
    signal[:, 0] = 1
    shared = rng.standard_normal((n, 3, 16))
    stages = [k * signal + 0.4 * (0.9 * shared + 0.45 * rng.standard_normal(shared.shape)) for k in keeps]
    kernels = np.stack([strength_kernels(d, np.ones((n, 3))) for d in stages]).astype(np.float32)
    units = tuple(f"{name}{s}" for s in range(n))
    return TracedConcept(
        name, "target", "raw", "resid_post", (0, 1, 2), units, kernels, (False,) * len(keeps)
    )


def test_u_of_the_later_stages_is_the_weighted_mean_of_theirs() -> None:
    one = drawn((1, 0.9, 0.8, 0.7), 40, np.random.default_rng(0))
    u = np.stack([one.stages[0].pair.u[0], *(contrast.pair.u[1] for contrast in one.stages)])
    # float64 sums in another order.
    np.testing.assert_allclose(one.trend.pair.u[0], 0.75 * u[0] + 0.25 * u[1], rtol=1e-10)
    np.testing.assert_allclose(one.trend.pair.u[1], 0.75 * u[3] + 0.25 * u[2], rtol=1e-10)


def test_the_trend_keeps_its_level_and_sees_a_ladder() -> None:
    rng = np.random.default_rng(0)

    def rate(keeps: tuple[float, ...], times: int) -> float:
        found = 0
        for i in range(times):
            trend = LineageTrend(
                (drawn(keeps, 40, rng),), ("base", "sft", "dpo", "final"), 3, Settings(draws=200, seed=i)
            )
            found += bool((trend.trends("raw", "resid_post")["c"].p_adjusted <= 0.05).any())
        return found / times

    # 150 draws at 5 % exceed .107 less than once in 500; the full table is in docs/simulations.
    assert rate((1, 1, 1, 1), 150) <= 0.107
    assert rate((1, 0.95, 0.9, 0.85), 20) >= 0.9


# ---------------------------------------------------------------- refusals


def test_a_stage_that_cannot_be_compared_is_refused_by_name() -> None:
    wide = tiny(1, hidden_size=64)
    with pytest.raises(InputError, match="does not match in d_model"):
        trace({"base": tiny(0), "sft": wide, "final": tiny(2)})
    other = word_tokenizer()
    from tokenizers import processors

    other.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(InputError, match="gives other token ids to the raw text"):
        trace({"base": tiny(0), "sft": tiny(1, other), "final": tiny(2)})
    foreign = tiny(1, byte_tokenizer())
    with pytest.raises(InputError, match="does not match in vocabulary"):
        trace({"base": tiny(0), "sft": foreign, "final": tiny(2)})


def test_one_stage_or_a_template_of_each_its_own_is_refused() -> None:
    from conftest import CHAT

    with pytest.raises(InputError, match="has 1 stages, expected a base"):
        measure_lineage({"base": tiny(0)}, concept())
    chat = {name: tiny(seed, word_tokenizer(CHAT)) for seed, name in enumerate(("base", "sft", "final"))}
    with pytest.raises(InputError, match="got the template 'own'"):
        trace(chat, template="own")
    found = trace(chat, template="both")
    assert found.templates == ("raw", "shared")
