"""Attribution: terms sum to the score, predict interventions, find what was planted, and see nothing in equal models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import MAKERS, WORDS, rows, stimuli, tiny_gpt2, tiny_llama, word_tokenizer
from matplotlib.figure import Figure

from empathy_probes import attribution
from empathy_probes.attribution import attribute
from empathy_probes.attribution_plots import (
    attribution_figure,
    attribution_plotly,
    heads_figure,
    heads_plotly,
)
from empathy_probes.batches import Pool, TokenBatch, pad_tokens
from empathy_probes.coding import scenario_contrasts
from empathy_probes.concepts import Concept
from empathy_probes.errors import InputError
from empathy_probes.extraction import extract
from empathy_probes.grammar import neutral_texts
from empathy_probes.interventions import add_values, replace_with
from empathy_probes.lens import logit_lens
from empathy_probes.models import Model, load_model
from empathy_probes.pairs import ModelPair
from empathy_probes.phantoms import load_phantom, load_phantom_concepts
from empathy_probes.planting import list_bases, open_twin
from empathy_probes.plots import plot
from empathy_probes.prompts import RenderedPrompt, render
from empathy_probes.sites import Site
from empathy_probes.stats import grouped_folds
from empathy_probes.stimuli import StimulusSet, stimuli_from_rows
from empathy_probes.wording import FLAGS
from empathy_probes.writes import ATTRIBUTION_COLUMNS, Attribution, Part, largest_writers, load_attribution

NEUTRAL = [" ".join(np.random.default_rng(i).choice(WORDS, 9)) + " ." for i in range(60)]
# What float32 leaves of a sum of some 20 terms, relative to the scores' size.
EXACT = 5e-6


def concept_of(found: StimulusSet, name: str = "demo", role: Any = "target") -> Concept:
    return Concept(name, role, "", "", "user", "", found)


def ask(pair: ModelPair, concepts: Any, store: str, **options: Any) -> Attribution:
    options = {"template": "raw", "neutral": NEUTRAL, "total_effects": False} | options
    return attribute(pair, concepts, store=f"memory://{store}", **options)


def in_spans(n: int = 40) -> StimulusSet:
    """The same texts read over two words and the full stop, of which the first carries the label."""
    made = []
    for row in rows(n):
        words = row["text"].split()[:-1]
        words.remove("red" if row["label"] else "blue")
        span = f"{'red' if row['label'] else 'blue'} quite ."
        made.append({**row, "text": " ".join([*words, span]), "read": {"span": span}})
    return stimuli_from_rows(made, "demo")


@pytest.fixture(scope="module", params=sorted(MAKERS))
def pair(request: pytest.FixtureRequest) -> ModelPair:
    """Two random models of each shape."""
    make = MAKERS[request.param]
    models = []
    for seed in (0, 1):
        made = make(seed)
        if request.param == "gpt2":  # fresh biases are 0, and a bias that is 0 tests nothing
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in made.named_parameters():
                if name.endswith("bias"):
                    parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        models.append(load_model((made, word_tokenizer()), device="cpu", name=f"{request.param}-{seed}"))
    return ModelPair(*models)


@pytest.fixture(scope="module")
def found(pair: ModelPair) -> Attribution:
    """The pair's attribution with total effects."""
    return ask(pair, concept_of(stimuli()), f"found-{pair.base.name}", total_effects=True)


def leaf(result: Attribution, component: str, layer: int, head: int | None = None) -> np.ndarray:
    return result.concepts[0].writes[:, result.leaves.index(Part(component, layer, head))]


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize(("layer", "direction"), [(0, "own"), (2, "base"), (None, "own")])
@pytest.mark.parametrize("made", [stimuli, in_spans])
def test_writes_sum_to_the_score(pair: ModelPair, layer: int | None, direction: str, made: Any) -> None:
    result = ask(
        pair, concept_of(made()), f"sums-{pair.base.name}-{made.__name__}", layer=layer, direction=direction
    )
    c = result.concepts[0]
    assert c.gap.max() < EXACT and abs(c.score).mean() > 1e-3
    values = dict(zip(result.parts, np.moveaxis(result.values(c), 1, 0), strict=True))
    modules = sum(values[part] for part in result.modules)
    np.testing.assert_allclose(modules, values[result.parts[-1]], atol=EXACT * abs(c.score).max())
    np.testing.assert_array_equal(values[result.parts[-1]][:2], c.score)


def test_a_score_is_the_contrast_read_off_the_stream_in_units_of_its_rms(
    pair: ModelPair, found: Attribution
) -> None:
    own = stimuli()
    for side, model in enumerate(pair.models):
        states, _ = pooled_runs(model, own, [Site(3)])
        w, rms = fold_directions(model, own, states[Site(3)])
        expected = contrast(states[Site(3)], own, w) / rms
        np.testing.assert_allclose(found.concepts[0].score[side], expected, rtol=1e-4, atol=1e-5)


def test_heads_and_bias_sum_to_what_the_whole_attention_writes(pair: ModelPair, found: Attribution) -> None:
    own, c = stimuli(), found.concepts[0]
    values = found.values(c)
    for side, model in enumerate(pair.models):
        sites = [Site(3), Site(1, "attn_out"), Site(2, "attn_out")]
        states, _ = pooled_runs(model, own, sites)
        w, rms = fold_directions(model, own, states[Site(3)])
        for site in sites[1:]:
            expected = contrast(states[site], own, w) / rms
            got = values[side, found.parts.index(Part("attn", site.layer))]
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_the_bias_is_the_same_for_every_text_and_stands_only_where_there_is_one(
    pair: ModelPair, found: Attribution
) -> None:
    has_bias = pair.base.attention_output(0)[1] is not None
    assert has_bias is ("gpt2" in pair.base.name) is found.biased
    assert sum(part.component == "attn_bias" for part in found.parts) == 4 * has_bias
    if has_bias:
        assert (leaf(found, "attn_bias", 2) == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_may_be_wider_than_the_stream_and_numbers_of_half_the_precision(dtype: str) -> None:
    models = [
        load_model((tiny_llama(seed, head_dim=16), word_tokenizer()), device="cpu", dtype=dtype)
        for seed in (0, 1)
    ]
    assert models[0].width("z") == 64 == 2 * models[0].d_model
    c = ask(ModelPair(*models), concept_of(stimuli()), f"wide-{dtype}").concepts[0]
    # bfloat16 keeps 8 bits, and every block rounds the stream once more.
    assert c.gap.max() < (EXACT if dtype == "float32" else 0.1)


# ---------------------------------------------------------------- interventions


def prompts_of(model: Model, own: StimulusSet) -> tuple[RenderedPrompt, ...]:
    return render(model.tokenizer, own, "raw", "user")


def batch_of(prompts: Sequence[RenderedPrompt]) -> tuple[TokenBatch, Pool]:
    batch = pad_tokens([prompt.ids for prompt in prompts])
    return batch, Pool.of([prompt.read for prompt in prompts], batch)


def pooled_runs(
    model: Model, own: StimulusSet, sites: list[Site], **options: Any
) -> tuple[dict[Site, np.ndarray], Any]:
    """Pooled states of every text from one plain run."""
    batch, pool = batch_of(prompts_of(model, own))
    with torch.inference_mode():
        run = model.run(batch, read=sites, pool=pool, **options)
    return {site: run.acts[site].numpy().astype(np.float64) for site in sites}, run


def fold_directions(model: Model, own: StimulusSet, states: np.ndarray) -> tuple[np.ndarray, float]:
    """The direction of every text's fold, and the rms, computed from the method's words alone."""
    if model.centres:
        states = states - states.mean(-1, keepdims=True)
    rms = float(np.sqrt((states**2).sum(-1).mean()))
    d = scenario_contrasts(states[:, None], own)[0, :, 0]
    folds = grouped_folds(own.units, 5, 0)
    w = {f: d[folds != f].mean(0) / np.linalg.norm(d[folds != f].mean(0)) for f in range(5)}
    place = dict(zip(own.units, folds, strict=True))
    return np.stack([w[place[item.unit]] for item in own.items]), rms


def contrast(states: np.ndarray, own: StimulusSet, w: np.ndarray) -> np.ndarray:
    return scenario_contrasts((states * w).sum(-1)[:, None, None], own)[0, :, 0, 0]


CUT = (
    ("embedding", -1, None), ("head", 0, 1), ("attn", 1, None), ("mlp", 1, None), ("head", 3, 2), ("attn", 3, None), ("mlp", 3, None),
)  # fmt: skip


@pytest.mark.parametrize("made", [stimuli, in_spans])
def test_taking_a_write_out_lowers_the_score_by_exactly_its_term(pair: ModelPair, made: Any) -> None:
    """The later components are held at what they wrote, so that only the direct path is cut."""
    own, last = made(), Site(3)
    result = ask(pair, concept_of(own), f"sums-{pair.base.name}-{made.__name__}")
    values = result.values(result.concepts[0])
    for side, model in enumerate(pair.models):
        states, _ = pooled_runs(model, own, [last])
        w, rms = fold_directions(model, own, states[last])
        batch, pool = batch_of(prompts_of(model, own))
        everything = [Site(b, c) for b in range(4) for c in ("attn_out", "mlp_out")]
        with torch.inference_mode():
            kept = model.run(batch, read=everything).acts
        for component, layer, head in CUT:
            if component == "embedding":
                gone = Site(0, "resid_pre")
            else:
                gone = Site(layer, "z", head) if head is not None else Site(layer, f"{component}_out")
            later = [
                site
                for site in everything
                if site.layer > layer or (site == Site(layer, "mlp_out") and component in ("head", "attn"))
            ]
            write = {site: replace_with(kept[site]) for site in later} | {gone: lambda acts: acts * 0}
            with torch.inference_mode():
                after = model.run(batch, read=[last], write=write, pool=pool).acts[last]
            lost = contrast(states[last] - after.numpy().astype(np.float64), own, w) / rms
            term = values[side, result.parts.index(Part(component, layer, head))]
            np.testing.assert_allclose(
                lost, term, rtol=1e-3, atol=2e-5, err_msg=f"{component} {layer} {head}"
            )


def test_a_total_effect_is_what_a_run_without_the_modules_contrast_shows(
    pair: ModelPair, found: Attribution
) -> None:
    own, last = stimuli(), Site(3)
    c = found.concepts[0]
    assert c.total_effect is not None
    for side, model in enumerate(pair.models):
        states, _ = pooled_runs(model, own, [last])
        w, rms = fold_directions(model, own, states[last])
        batch, pool = batch_of(prompts_of(model, own))
        for site in (Site(1, "mlp_out"), Site(2, "attn_out"), Site(3, "mlp_out")):
            write, _ = pooled_runs(model, own, [site])
            scenario = np.array([item.scenario for item in own.items])
            means = np.stack([write[site][scenario == s].mean(0) for s in scenario])
            moved = torch.zeros(*batch.ids.shape, model.d_model)
            moved[pool.rows, pool.positions] = torch.as_tensor(means - write[site], dtype=torch.float32)
            ablated, _ = pooled_runs(model, own, [last], write={site: add_values(moved)})
            lost = contrast(states[last] - ablated[last], own, w) / rms
            at = found.modules.index(Part(site.component.removesuffix("_out"), site.layer))
            np.testing.assert_allclose(c.total_effect[side, at], lost, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("made", [stimuli, in_spans])
def test_where_nothing_follows_the_total_effect_is_the_direct_one(pair: ModelPair, made: Any) -> None:
    result = ask(
        pair, concept_of(made()), f"sums-{pair.base.name}-{made.__name__}", total_effects=True, layer=2
    )
    total = result.concepts[0].total_effect
    assert total is not None
    np.testing.assert_allclose(total[:, -1], leaf(result, "mlp", 2), rtol=1e-3, atol=2e-5)
    assert abs(total[:, -3] - leaf(result, "mlp", 1)).max() > 1e-3  # and elsewhere it is not


# ---------------------------------------------------------------- laws


def test_equal_models_differ_by_exactly_nothing(pair: ModelPair) -> None:
    result = ask(ModelPair(pair.base, pair.base), concept_of(stimuli()), "equal")
    c = result.concepts[0]
    assert (result.values(c)[2] == 0).all() and (result.band(c) == 0).all()
    frame = result.to_frame()
    difference = frame[frame["model"] == "difference"]
    assert (difference[["write", "write_lower", "write_upper"]] == 0).all(axis=None)
    assert not difference["flags"].str.contains("beyond_band").any()
    assert c.lens[0].up == c.lens[1].up and (c.lens[0].null_up == c.lens[1].null_up).all()


def test_order_and_batching_change_nothing(
    pair: ModelPair, found: Attribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = stimuli()
    shuffled = list(own.items)
    np.random.default_rng(3).shuffle(shuffled)  # type: ignore[arg-type]
    monkeypatch.setattr(attribution, "extract", partial(extract, budget=300))
    monkeypatch.setattr(attribution, "STATE_BYTES", 300 * 4 * (4 + 1) * 32)  # 300 tokens a batch
    result = ask(pair, concept_of(replace(own, items=tuple(shuffled))), "shuffled", total_effects=True)
    ours, theirs = found.concepts[0], result.concepts[0]
    order = [theirs.units.index(unit) for unit in ours.units]
    close: dict[str, float] = {"rtol": 1e-3, "atol": 1e-5}  # float32, summed in another company
    np.testing.assert_allclose(theirs.writes[:, :, order], ours.writes, **close)
    assert ours.total_effect is not None and theirs.total_effect is not None
    np.testing.assert_allclose(theirs.total_effect[:, :, order], ours.total_effect, **close)


def test_the_band_is_wider_than_any_pointwise_interval_and_flags_what_lies_beyond(found: Attribution) -> None:
    frame = found.to_frame()
    difference = frame[frame["model"] == "difference"]
    band = found.band(found.concepts[0])
    half = (difference["write_upper"] - difference["write"]).to_numpy(float)
    assert (band >= half).all() and (band[half > 0] > 1.2 * half[half > 0]).all()
    clear = difference["flags"].str.contains("beyond_band").to_numpy()
    assert (clear == (abs(difference["write"].to_numpy(float)) > band)).all() and 0 < clear.sum() < len(clear)


def test_copies_of_a_text_inside_a_scenario_do_not_narrow_an_interval(
    pair: ModelPair, found: Attribution
) -> None:
    twice = [dict(row, id=f"{row['id']}-{k}") for row in rows() for k in range(3)]
    result = ask(pair, concept_of(stimuli_from_rows(twice, "demo")), "copies")
    width = [
        (r.to_frame()["write_upper"] - r.to_frame()["write_lower"]).to_numpy(float) for r in (found, result)
    ]
    np.testing.assert_allclose(*width, rtol=1e-3, atol=1e-6)


def test_a_scenarios_influence_is_what_leaving_it_out_changes() -> None:
    """Three components, of which two write against each other across the direction; to first order in 1/n."""
    rng = np.random.default_rng(0)
    n, d = 150, 12
    written = np.stack([1.2 * np.eye(d)[0] + 2 * np.eye(d)[1], -2 * np.eye(d)[1], 0.3 * np.eye(d)[0]])
    writes = written[:, None] + 0.5 * rng.standard_normal((3, n, d))
    folds = np.arange(n) % 5

    def term(kept: np.ndarray) -> np.ndarray:
        w = attribution.fold_directions(writes[:, kept].sum(0), folds[kept])[folds[kept]]
        return (writes[:, kept] * w).sum(-1)

    everything = np.ones(n, bool)
    own = term(everything)
    means = np.stack([writes[:, folds == fold].mean(1) for fold in range(5)])
    influence = own + attribution.direction_influence(writes.sum(0), folds, means)
    left_out = np.stack([term(np.arange(n) != s).mean(-1) for s in range(n)], axis=1)
    predicted = own.mean(-1, keepdims=True) - (influence - influence.mean(-1, keepdims=True)) / (n - 1)
    change = left_out - own.mean(-1, keepdims=True)
    assert abs(left_out - predicted).max() < 0.05 * abs(change).max()
    # Without the directions, what leaving one out does to the first two would not be known at all.
    naive = own.mean(-1, keepdims=True) - (own - own.mean(-1, keepdims=True)) / (n - 1)
    assert abs(left_out - naive)[0].max() > 0.5 * abs(change)[0].max()


@pytest.fixture(scope="module")
def base_folder() -> Path:
    return list_bases()["llama-0"]


@pytest.mark.parametrize("family", ["rescaled", "rotated"])
def test_a_scaled_or_turned_stream_is_written_alike(base_folder: Path, family: str) -> None:
    targets, _ = load_phantom_concepts(30, names=("valence",))
    twin = open_twin(base_folder, family, None, None, None)
    result = ask(twin, targets, family, neutral=neutral_texts(50))
    c = result.concepts[0]
    assert abs(result.values(c)[2]).max() < 2e-4 < 0.3 < c.score.mean()
    along_base = ask(twin, targets, family, neutral=neutral_texts(50), direction="base")
    aligned = along_base.concepts[0].score[1].mean()
    # The base's direction means nothing in a turned stream, and all in a scaled one.
    assert (
        aligned == pytest.approx(c.score[1].mean(), rel=1e-3) if family == "rescaled" else abs(aligned) < 0.15
    )
    assert along_base.to_frame()["flags"].str.contains("base_direction").sum() == 2 * len(along_base.parts)


@pytest.fixture(scope="module")
def planted() -> Attribution:
    """Valence and a concept that was left alone, in the shipped twin whose block 3 shrinks valence to a quarter."""
    (valence, intensity), _ = load_phantom_concepts(60, names=("valence", "intensity"))
    return ask(
        load_phantom("planted-valence"), valence, "planted", controls=(replace(intensity, role="control"),),
        neutral=neutral_texts(50),
    )  # fmt: skip


def test_what_was_planted_is_found_in_the_mlp_it_was_planted_in(planted: Attribution) -> None:
    valence = planted.concepts[0]
    assert valence.gap.max() < EXACT
    difference = planted.values(valence)[2].mean(-1)
    mlp, total = planted.parts.index(Part("mlp", 3)), len(planted.parts) - 1
    others = [i for i in range(total) if i != mlp]
    assert difference[total] == pytest.approx(-0.75 * valence.score[0].mean(), abs=0.05)
    assert difference[mlp] == pytest.approx(difference[total], abs=0.02)
    assert abs(difference[others]).max() < 0.03 * abs(difference[mlp])
    assert largest_writers(planted.to_frame(), 1)["part"].tolist()[:2] == ["total", "L3 MLP"]
    untouched = planted.values(planted.concepts[1]).mean(-1)
    assert abs(untouched[2, mlp]) < 0.005
    # All it gains is the unit: the twin's stream has a smaller rms, by one factor for all that is written.
    large = abs(untouched[0]) > 0.01
    ratio = untouched[1, large] / untouched[0, large]
    assert large.sum() >= 3 and np.ptp(ratio) < 0.05 and ratio.min() > 1


def test_direct_writes_and_total_effects_are_compared_with_an_interval(found: Attribution) -> None:
    c = found.concepts[0]
    agreement = found.agreement(c)
    assert agreement is not None
    for side in agreement:
        assert side.n == 40 and -1 <= side.lower <= side.value <= side.upper <= 1
        assert 0.2 < side.value < 1 and side.lower < side.upper
    direct = np.stack([found.values(c)[:2, found.parts.index(module)] for module in found.modules], axis=1)
    for sign in (1, -1):
        same = found.agreement(replace(c, total_effect=sign * direct))
        assert same is not None and [side.value for side in same] == pytest.approx([sign, sign])
    assert found.agreement(replace(c, total_effect=None)) is None


def test_a_concept_that_is_not_there_is_flagged() -> None:
    """Labels drawn at random within scenarios: the score's interval holds 0 in most draws."""
    model = load_model((tiny_llama(), word_tokenizer()), device="cpu")
    flagged = 0
    for seed in range(6):
        generator = np.random.default_rng(seed)
        made = rows(30, seed)
        for one, other in zip(made[::2], made[1::2], strict=True):
            if generator.random() < 0.5:
                one["text"], other["text"] = other["text"], one["text"]
        result = ask(ModelPair(model, model), concept_of(stimuli_from_rows(made, "demo")), f"noise-{seed}")
        flagged += "base_not_detected" in result.to_frame()["flags"].iloc[0]
    assert flagged >= 4  # of 6, at 2.5 % each and some correlation between folds


# ---------------------------------------------------------------- refusals


def post_norm(family: str) -> Model:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return load_model((getattr(transformers, f"{family}ForCausalLM")(config), word_tokenizer()), device="cpu")


@pytest.mark.parametrize("family", ["Gemma2", "Olmo2"])
def test_post_norm_blocks_are_refused_with_the_reason(family: str) -> None:
    model = post_norm(family)
    with pytest.raises(
        InputError, match=f"{family}ForCausalLM.*normalised or scaled together before they are added"
    ) as caught:
        ask(ModelPair(model, model), concept_of(stimuli()), family)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("unchecked")
def test_a_layer_that_is_no_whole_number_is_refused(pair: ModelPair) -> None:
    with pytest.raises(InputError, match=r"layer got 2\.0, expected a block index"):
        ask(pair, concept_of(stimuli()), "no", layer=2.0)


def test_what_cannot_be_attributed_is_one_sentence(pair: ModelPair) -> None:
    with pytest.raises(InputError, match="unknown direction 'mine': expected one of own, base"):
        ask(pair, concept_of(stimuli()), "no", direction="mine")
    with pytest.raises(InputError, match="layer got 4, expected a block index from 0 to 3"):
        ask(pair, concept_of(stimuli()), "no", layer=4)
    kinds = [
        {
            "id": f"{s}-{k}",
            "scenario": str(s),
            "text": f"the {word} man {s % 7} .".replace(str(s % 7), WORDS[s % 7]),
            "label": word,
        }
        for s in range(32)
        for k, word in enumerate(("red", "blue", "green"))
    ]
    categorical = concept_of(stimuli_from_rows(kinds, "colours"), "colours")
    with pytest.raises(InputError, match="all of colours have categories"):
        ask(pair, categorical, "no")
    both = ask(pair, [concept_of(stimuli()), categorical], f"sums-{pair.base.name}-stimuli")
    assert both.skipped == ("colours",) and [c.concept for c in both.concepts] == ["demo"]


def test_grades_are_read_per_grade(pair: ModelPair) -> None:
    graded = [
        {"id": f"{s}-{k}", "scenario": str(s), "text": f"{WORDS[s]} {word} {WORDS[s + 3]} .", "label": grade}
        for s in range(32)
        for k, (word, grade) in enumerate((("red", 0.5), ("blue", 2.0), ("green", 3.0)))
    ]
    c = ask(pair, concept_of(stimuli_from_rows(graded, "graded"), "graded"), "graded").concepts[0]
    assert c.gap.max() < EXACT and len(c.units) == 32


# ---------------------------------------------------------------- results


def test_the_table_has_the_contracts_columns_and_no_blank_number(found: Attribution) -> None:
    frame = found.to_frame()
    assert list(frame.columns) == ATTRIBUTION_COLUMNS
    assert frame["write"].notna().all() and not frame["write"].isna().any()
    assert frame["head"].notna().equals(frame["component"] == "head")
    assert set(frame["component"]) - {"attn_bias"} == {"embedding", "attn", "head", "mlp", "total"}
    assert list(frame["model"].unique()) == ["base", "aligned", "difference"]
    assert {flag for flags in frame["flags"] for flag in flags.split(";") if flag} <= set(FLAGS)
    mine = frame[frame["model"] == "aligned"].set_index("component")["write"]
    assert mine[["embedding", "attn", "mlp"]].sum() == pytest.approx(mine["total"], abs=1e-5)


def test_saving_and_loading_gives_the_same_result(found: Attribution, tmp_path: Path) -> None:
    found.save(tmp_path / "attribution.safetensors")
    again = load_attribution(tmp_path / "attribution.safetensors")
    assert again.to_frame().equals(found.to_frame()) and again.leaves == found.leaves
    assert again.agreement(again.concepts[0]) == found.agreement(found.concepts[0])
    assert again.concepts[0].lens[1].to_frame().equals(found.concepts[0].lens[1].to_frame())


def test_figures_show_what_the_table_says(found: Attribution) -> None:
    frame = found.to_frame()
    figure = plot(found)
    assert isinstance(figure, Figure)
    drawn = figure.axes[1].lines[2].get_ydata()  # after zero: base, then aligned
    mlp = frame[(frame["model"] == "aligned") & frame["component"].isin(["embedding", "mlp"])]
    np.testing.assert_allclose(np.asarray(drawn, float), mlp["write"].to_numpy(float))
    assert "n = 40 scenarios" in figure.texts[0].get_text() and "own direction" in figure.texts[0].get_text()
    screen = attribution_plotly(frame)
    np.testing.assert_allclose(next(t.y for t in screen.data if t.name == "MLP" and t.mode == "lines+markers"),
                               frame[(frame["model"] == "difference") & frame["component"].isin(["embedding", "mlp"])]["write"])  # fmt: skip
    heads = frame[(frame["component"] == "head") & (frame["model"] == "difference")]
    largest = heads.iloc[abs(heads["write"].astype(float)).to_numpy().argmax()]
    names = [label.get_text() for label in heads_figure(frame, top=3).axes[0].get_yticklabels()]
    assert len(names) == 3 and names[0] == f"L{largest['layer']} H{largest['head']}"
    assert heads_plotly(frame, top=3).data[2].x[0] == pytest.approx(largest["write"])
    bare = frame.copy()
    bare.attrs = {}
    assert "n not recorded" in attribution_figure(bare).texts[0].get_text()
    assert "n = 7 scenarios" in attribution_figure(bare, n_scenarios={"demo": 7}).texts[0].get_text()
    with pytest.raises(InputError, match="expected one of demo \\(raw\\)"):
        attribution_figure(frame, "nothing")
    assert "attribution" in found._repr_html_()


# ---------------------------------------------------------------- the lens


@pytest.mark.parametrize(("make", "close"), [(tiny_gpt2, 1e-6), (tiny_llama, 2e-3)])
def test_the_lens_is_the_finite_difference_of_logits(make: Any, close: float) -> None:
    """transformers computes RMSNorm in float32 whatever the dtype, which leaves a finite difference three digits."""
    model = load_model((make(), word_tokenizer()), device="cpu", dtype="float64")
    generator = torch.Generator().manual_seed(0)
    model.bridge.ln_final.original_component.weight.data = torch.rand(
        model.d_model, generator=generator, dtype=torch.float64
    )
    states = 2 * torch.randn(7, model.d_model, generator=generator, dtype=torch.float64)
    vectors = torch.randn(2, model.d_model, generator=generator, dtype=torch.float64)
    step = 1e-4 if make is tiny_gpt2 else 1e-2
    expected = torch.stack(
        [
            ((model.head(states + step * v) - model.head(states - step * v)) / (2 * step)).mean(0)
            for v in vectors
        ]
    )
    torch.testing.assert_close(model.head_slopes(states, vectors), expected.detach(), atol=close, rtol=close)
    found = logit_lens(model, vectors[0].numpy(), states.numpy(), states.numpy(), top=5, draws=99)
    centred = (
        (expected[0, : len(model.tokenizer)] - expected[0, : len(model.tokenizer)].mean()).detach().numpy()
    )
    np.testing.assert_allclose(found.up_logits, np.sort(centred)[::-1][:5], atol=3 * close, rtol=3 * close)
    assert found.up[0] == model.tokenizer.decode([int(centred.argmax())])
    assert found.down[0] == model.tokenizer.decode([int(centred.argmin())])


def test_a_random_direction_is_as_extreme_as_chance(llama: Model) -> None:
    generator = np.random.default_rng(0)
    neutral = generator.standard_normal((40, llama.d_model)) * np.linspace(0.1, 3, llama.d_model)
    states = generator.standard_normal((10, llama.d_model))
    ps = []
    for seed in range(40):
        vector = generator.standard_normal(40) @ (neutral - neutral.mean(0))
        ps.append(logit_lens(llama, vector, states, neutral, draws=99, seed=seed).p_up[0])
    assert 0.38 < np.mean(ps) < 0.62 and np.mean(np.array(ps) <= 0.1) < 0.25
    # A row of the unembedding is no random direction: its own token comes first, and beyond chance.
    row = llama.bridge.unembed.original_component.weight[9].detach().numpy().astype(float)
    gained = logit_lens(llama, 9 * row, states, neutral, draws=99)
    assert gained.up[0] == llama.tokenizer.decode([9]) and gained.p_up[0] < 0.05
    with pytest.raises(InputError, match="a vector of length 0"):
        logit_lens(llama, np.zeros(llama.d_model), states, neutral)
