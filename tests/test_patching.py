"""Patching: nothing into itself, everything through the last state, and the same numbers as TransformerLens's helpers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHAT, stimuli, tiny_llama, word_tokenizer

from empathy_probes import plots
from empathy_probes.concepts import Concept
from empathy_probes.design import Settings, design_study
from empathy_probes.errors import EmpathyProbesError, InputError
from empathy_probes.gradients import EstimatedConcept, EstimatedPatching, attribution_patch, estimated_changes
from empathy_probes.models import Model
from empathy_probes.pairs import ModelPair, load_pair
from empathy_probes.patching import PATCHING_COLUMNS, PatchedConcept, Patching, patch, patch_design
from empathy_probes.patching_plots import patching_plotly
from empathy_probes.prompts import outside_messages, render
from empathy_probes.readouts import Asked, batch_asked, look_up, with_readout
from empathy_probes.roles import Match, match_positions
from empathy_probes.sites import Site
from empathy_probes.stats import mean_interval, ratio_of_means
from empathy_probes.stimuli import ReadoutSpec, stimuli_from_rows
from empathy_probes.store import load_record, open_store
from empathy_probes.sweeps import (
    Continuation,
    Place,
    continue_edited,
    make_cells,
    patched_readouts,
    sites_of,
)
from empathy_probes.textpairs import TextPairs, pair_texts, unit_means

ANSWERS = ReadoutSpec("answers", (" sun", " day"), (" night", " rain"))
CONTINUATIONS = ReadoutSpec("continuations", (" the sun was very large",), (" rain was there",))
READOUTS = pytest.mark.parametrize("readout", [ANSWERS, CONTINUATIONS], ids=["answers", "continuations"])
# Float32 through four small blocks in batches of another size, of readouts of a few nats.
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def concept_of(n: int = 6, readout: ReadoutSpec = ANSWERS, name: str = "demo") -> Concept:
    return Concept(name, "target", "", "", "user", "", with_readout(stimuli(n, concept=name), readout))


def token_pairs(n: int = 3, length: int = 7) -> TextPairs:
    """Random prompts of one length as token ids, clean and corrupted in turn, with one answer a side."""
    generator = np.random.default_rng(0)
    every = range(2 * n)
    prompts = tuple((1, *map(int, generator.integers(7, 50, length - 1))) for _ in every)
    asked = Asked(
        "demo", "answers", tuple(map(str, every)), prompts, tuple((length - 1,) for _ in every),
        tuple((20,) for _ in every), tuple((30,) for _ in every),
    )  # fmt: skip
    return pair_texts(asked, stimuli_from_rows(label_rows(n), "demo"))


def label_rows(n: int) -> list[dict[str, Any]]:
    return [{"id": f"{i}", "scenario": f"{i // 2}", "text": f"{i}", "label": 1 - i % 2} for i in range(2 * n)]


def hooks_left(model: Model) -> int:
    modules = list(model.bridge.modules())
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(getattr(m, "fwd_hooks", [])) for m in modules
    )


# ---------------------------------------------------------------- roles


def test_roles_take_every_token_apart_where_two_texts_differ_in_one_word() -> None:
    source, target = [1, 5, 6, 7, 8, 9], [1, 5, 4, 4, 7, 8, 9]
    assert match_positions("before", source, target) == Match((0, 1), (0, 1))
    assert match_positions("span", source, target) == Match((2,), (3,), unequal=True)
    assert match_positions("after", source, target) == Match((3, 4), (4, 5))
    assert match_positions("last", source, target) == Match((5,), (6,))
    assert match_positions("all", source, target) == Match(
        (0, 1, 2, 3, 4, 5), (0, 1, 3, 4, 5, 6), unequal=True
    )
    inserted = match_positions("span", [1, 5, 9], [1, 5, 6, 9])
    assert inserted == Match((), (), unequal=True)  # nothing in the shorter text stands for what was inserted


def test_template_tokens_are_what_the_template_put_around_the_words() -> None:
    tokenizer = word_tokenizer(CHAT)
    texts = stimuli_from_rows(
        [
            {"id": "a", "scenario": "s", "text": "the old man saw red .", "label": 1},
            {"id": "b", "scenario": "s", "text": "red .", "label": 0},
        ],
        "demo",
    )
    prompts = render(tokenizer, texts, "chat", "user")
    for prompt, outside in zip(prompts, outside_messages(tokenizer, texts, prompts, "user"), strict=True):
        decoded = [tokenizer.decode([prompt.ids[i]]) for i in outside]
        assert decoded == ["<bos>", "<user>", "<end>", "<model>"]


def test_each_token_and_template_are_refused_where_they_mean_nothing(llama: Model) -> None:
    with pytest.raises(InputError, match="expected all of one length"):
        patch(llama, concept_of(), positions=["each"])
    with pytest.raises(InputError, match="position 'template' got plain text"):
        patch(llama, concept_of(), positions=["template"])
    with pytest.raises(InputError, match="unknown position 'end'"):
        patch(llama, concept_of(), positions=["end"])


# ---------------------------------------------------------------- laws


@READOUTS
@pytest.mark.parametrize("component", ["resid_post", "resid_mid", "attn_out", "mlp_out", "z"])
def test_a_text_patched_into_itself_stays_what_it_was(
    model: Model, component: str, readout: ReadoutSpec
) -> None:
    concept = concept_of(readout=readout)
    same = {item.scenario: item.text for item in concept.stimuli.items if item.label == 1}
    items = tuple(replace(item, text=same[item.scenario]) for item in concept.stimuli.items)
    concept = replace(concept, stimuli=replace(concept.stimuli, items=items))
    found = patch(model, concept, sites=sites_of(model, component), positions=["last", "before", "all"])
    (patched,) = found.concepts
    np.testing.assert_allclose(patched.moved, 0, atol=2e-5)
    assert found.to_frame()["flags"].str.contains("effect_not_detected").all()
    assert found.to_frame()["recovered"].isna().all()


@READOUTS
def test_the_whole_state_carries_the_whole_effect_and_what_stands_before_the_difference_none(
    model: Model, readout: ReadoutSpec
) -> None:
    pairs = [(f"the {a} saw a red bird .", f"the {a} saw a blue bird .") for a in ("man", "dog", "cat")]
    sites = [Site(-1), Site(1), Site(model.n_layers - 1)]
    found = patch(model, pairs, readout=readout, sites=sites, positions=["all", "before", "last"]).concepts[0]
    moved = {(p.layer, p.position): found.moved[:, i] for i, p in enumerate(found.places)}
    whole = np.stack([found.effect] * 2)
    assert np.abs(whole).min() > 1e-3
    for site in sites:
        # A continuation's own tokens keep what they saw before the patch, unless it comes before all blocks.
        if readout is ANSWERS or site.layer == -1:
            np.testing.assert_allclose(moved[site.layer, "all"], whole, **CLOSE)
        np.testing.assert_allclose(moved[site.layer, "before"], 0, atol=2e-5)
    if readout is ANSWERS:  # the answer is read off the last state at the last token, and nothing else
        np.testing.assert_allclose(moved[model.n_layers - 1, "last"], whole, **CLOSE)
    np.testing.assert_allclose(moved[-1, "last"], 0, atol=2e-5)  # both texts end in the same token


@READOUTS
def test_company_padding_and_the_size_of_a_pass_change_nothing(model: Model, readout: ReadoutSpec) -> None:
    concept = concept_of(8, readout)
    chosen: dict[str, Any] = {
        "sites": sites_of(model, "resid_post", "attn_out", "z"),
        "positions": ["last", "span"],
    }
    together = patch(model, concept, **chosen).concepts[0]
    for i in (0, 7):
        one = (*concept.stimuli.items[2 * i : 2 * i + 2], *concept.stimuli.items[6:8])
        alone = patch(
            model, replace(concept, stimuli=replace(concept.stimuli, items=one)), **chosen
        ).concepts[0]
        np.testing.assert_allclose(alone.moved[..., 0], together.moved[..., i], **CLOSE)
        np.testing.assert_allclose(alone.effect[0], together.effect[i], **CLOSE)
    pairs = token_pairs()
    cells = make_cells(model, sites_of(model, "resid_post", "mlp_out"), ["2", "5"])
    whole, narrow = (patched_readouts(model, pairs, cells, "noise", budget)[1] for budget in (16384, 60))
    np.testing.assert_allclose(narrow, whole, **CLOSE)


def test_a_window_patches_its_blocks_together(model: Model) -> None:
    pairs = token_pairs()
    (cell,) = make_cells(model, [Site(1, "mlp_out")], ["3"], window=2)
    assert cell.sites == (Site(1, "mlp_out"), Site(2, "mlp_out"))
    _, got = patched_readouts(model, pairs, [cell], "denoise")
    asked = pairs.asked
    source = model.run(torch_batch(model, [asked.prompts[i] for i in pairs.clean]), read=cell.sites).acts
    batch = batch_asked(asked, list(pairs.corrupted), model)

    def put(site: Site) -> Any:
        def edit(acts: torch.Tensor) -> torch.Tensor:
            acts[:, 3] = source[site][:, 3]
            return acts

        return edit

    last = Site(model.n_layers - 1)
    with torch.inference_mode():
        final = model.run(batch.tokens, read=[last], write={site: put(site) for site in cell.sites}).acts[
            last
        ]
        np.testing.assert_allclose(got[0], look_up(model, batch, final).numpy(), **CLOSE)
    with pytest.raises(InputError, match="window got 9"):
        make_cells(model, [Site(1)], ["last"], window=9)


def torch_batch(model: Model, rows: Any) -> Any:
    from empathy_probes.batches import pad_tokens

    return pad_tokens(rows, model.device)


def test_an_edit_that_raises_leaves_no_hook_and_the_same_model(model: Model) -> None:
    pairs, last = token_pairs(), Site(model.n_layers - 1)
    batch = batch_asked(pairs.asked, list(pairs.clean), model)
    before, plain = hooks_left(model), model.run(batch.tokens).logits

    def broken(acts: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken edit")

    run = model.run(batch.tokens, read=[Site(0), last], capture=True)
    for going in (Continuation(0, None, {Site(2, "z", 1): broken}), Continuation(0, broken)):
        with pytest.raises(RuntimeError, match="broken edit"), torch.inference_mode():
            continue_edited(model, batch, run, {0: run.acts[Site(0)]}, [going])
    assert hooks_left(model) == before
    assert torch.equal(model.run(batch.tokens).logits, plain)


def test_nothing_before_an_edit_is_computed_again(model: Model) -> None:
    pairs, ran = token_pairs(), []
    cells = make_cells(model, [Site(2), Site(3, "attn_out")], ["1", "4"])
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(model.bridge.blocks)
    ]
    patched_readouts(model, pairs, cells, "denoise")
    for handle in handles:
        handle.remove()
    # Both texts once; then all four continuations start after block 2 and share one pass over block 3.
    assert ran == [0, 1, 2, 3, 0, 1, 2, 3, 3]


# ---------------------------------------------------------------- TransformerLens's helpers


@pytest.fixture(scope="module")
def helpers() -> Any:
    from transformer_lens import patching

    return patching


@pytest.mark.parametrize(
    ("helper", "components"),
    [
        ("get_act_patch_resid_pre", ["resid_pre", "resid_post"]),
        ("get_act_patch_resid_mid", ["resid_mid"]),
        ("get_act_patch_attn_out", ["attn_out"]),
        ("get_act_patch_mlp_out", ["mlp_out"]),
        ("get_act_patch_attn_head_out_all_pos", ["z"]),
        ("get_act_patch_attn_head_out_by_pos", ["z by token"]),
    ],
)
def test_numbers_equal_transformer_lens(
    model: Model, helpers: Any, helper: str, components: list[str]
) -> None:
    pairs, n = token_pairs(), model.n_layers
    clean, corrupted = (
        torch.tensor([pairs.asked.prompts[i] for i in items]) for items in (pairs.clean, pairs.corrupted)
    )
    with torch.inference_mode():
        _, cache = model.bridge.run_with_cache(clean)
        expected = getattr(helpers, helper)(
            model.bridge, corrupted, cache, lambda logits: (logits[:, -1, 20] - logits[:, -1, 30]).mean()
        ).numpy()
    tokens = [str(i) for i in range(clean.shape[1])]
    for component in components:
        name = component.split()[0]
        # TransformerLens's resid_pre of a layer is the state after the block before.
        sites = [Site(layer) for layer in range(-1, n - 1)] if name == "resid_post" else sites_of(model, name)
        cells = make_cells(model, sites, ["all"] if component == "z" else tokens)
        got = patched_readouts(model, pairs, cells, "denoise")[1].mean(-1)
        if component == "z by token":  # theirs is [layer pos head]
            got = np.swapaxes(got.reshape(n, model.n_heads, -1), 1, 2)
        assert expected.std() > 1e-3
        np.testing.assert_allclose(got.reshape(expected.shape), expected, atol=1e-4)


# ---------------------------------------------------------------- shares and their intervals


def test_fieller_of_a_ratio_of_means_covers_at_every_number_of_pairs() -> None:
    generator, truth, hit, shown = np.random.default_rng(0), 0.4, 0, 0
    for _ in range(600):
        effect = generator.normal(1.0, 1.0, 12)
        moved = truth * effect + generator.normal(0, 0.3, 12)
        curve = ratio_of_means(moved, effect)
        if np.isfinite(curve.value):
            shown += 1
            hit += bool(curve.lower <= truth <= curve.upper)
    # 600 draws resolve 95 % to ±1.8 %; conditioning on a detected effect may only cost a little.
    assert shown > 450 and 0.925 < hit / shown < 0.975
    assert np.isnan(ratio_of_means(moved, effect - effect.mean()).value)
    zero = ratio_of_means(np.zeros(12), effect)
    assert (float(zero.value), float(zero.lower), float(zero.upper)) == (0, 0, 0)


def test_a_share_of_everything_is_one_and_texts_repeated_within_a_scenario_narrow_nothing() -> None:
    effect = np.array([1.0, 2.0, 3.0, 2.5])
    curve = ratio_of_means(effect, effect)
    np.testing.assert_allclose([curve.value, curve.lower, curve.upper], 1)
    once = unit_means(effect, list("abcd"), list("abcd"))
    twice = unit_means(np.repeat(effect, 2), [*"aabbccdd"], [*"aabbccdd"])
    np.testing.assert_allclose(twice, once)
    assert unit_means(effect, list("abcd"), list("xxyy")).tolist() == [1.5, 2.75]
    assert mean_interval(once).lower == mean_interval(twice).lower


def test_unpaired_texts_of_a_scenario_are_paired_each_with_each() -> None:
    rows = [{"id": f"{i}", "scenario": "s", "text": f"t{i}", "label": int(i < 2)} for i in range(5)]
    pairs = pair_texts(token_pairs().asked, stimuli_from_rows(rows, "demo"))
    assert list(zip(pairs.clean, pairs.corrupted, strict=True)) == [(a, b) for a in (0, 1) for b in (2, 3, 4)]
    graded = stimuli_from_rows([{**row, "label": i} for i, row in enumerate(rows)], "demo")
    with pytest.raises(InputError, match="graded labels, expected two labels"):
        pair_texts(token_pairs().asked, graded)


def test_directions_agree_where_the_last_token_carries_everything(llama: Model) -> None:
    """A path that is known: in the last block only the last token's state still counts."""
    found = patch(llama, concept_of(40), sites=[Site(llama.n_layers - 1)], positions=["last", "span"])
    curve = found.concepts[0].recovered
    if np.isnan(curve.value).any():
        pytest.fail("the effect of this fixture should be detected")
    np.testing.assert_allclose(curve.value, [[1, 0], [1, 0]], atol=1e-4)


# ---------------------------------------------------------------- results


def test_rows_follow_the_contract_and_survive_a_file(llama: Model, tmp_path: Path) -> None:
    found = patch(
        llama, concept_of(4), sites=[Site(-1), Site(2, "z", 1)], positions=["last", "after"], window=2
    )
    frame = found.to_frame()
    assert list(frame.columns) == PATCHING_COLUMNS
    assert len(frame) == 2 * 2 * 2
    assert set(frame["direction"]) == {"denoise", "noise"} and set(frame["layer"]) == {-1, 2}
    assert frame["head"].dropna().unique().tolist() == [1]
    assert frame["flags"].str.contains("window_2").all() and frame["flags"].str.contains("small_n").all()
    found.save(tmp_path / "patching.safetensors")
    types = {t.__name__: t for t in (Patching, PatchedConcept, Place, Settings)}
    again = load_record(tmp_path / "patching.safetensors", types)
    assert again.to_frame().equals(frame)


def test_a_role_that_no_text_has_is_blank_with_the_reason_and_one_that_some_lack_says_so(
    llama: Model,
) -> None:
    pairs = [("the man saw red", "the man saw blue"), ("a dog was red", "a dog was blue")]
    frame = patch(llama, pairs, readout=ANSWERS, positions=["after", "span"]).to_frame()
    after = frame[frame["position"] == "after"]
    assert after["flags"].str.contains("no_tokens").all() and after[["recovered", "patched"]].isna().all(None)
    assert frame[frame["position"] == "span"]["patched"].notna().all()
    some = [("the red man saw", "the blue man saw"), ("a red dog", "a blue blue dog")]
    frame = patch(llama, some, readout=ANSWERS, positions=["after", "span"]).to_frame()
    assert frame[frame["position"] == "after"]["flags"].str.contains("some_without_tokens").all()
    assert frame[frame["position"] == "span"]["flags"].str.contains("unequal_spans").all()


def test_both_models_of_a_design_are_patched_and_a_pair_with_itself_gives_equal_rows() -> None:
    made = (tiny_llama(), word_tokenizer(CHAT))
    pair = load_pair(made, made, device="cpu", allow_identical=True)
    design = design_study(pair, [concept_of(30)], layers=[1, 3])
    frame = patch_design(design, Settings(), open_store("memory://patching")).to_frame()
    assert set(frame["template"]) == {"raw", "shared"} and set(frame["layer"]) == {-1, 1, 3}
    assert "template" in set(frame[frame["template"] == "shared"]["position"])
    sides = [
        frame[frame["model"] == m].drop(columns="model").reset_index(drop=True) for m in ("base", "aligned")
    ]
    assert sides[0].equals(sides[1])
    single = patch(pair.base, concept_of(30), sites=[Site(-1), Site(1), Site(3)]).to_frame()
    raw = sides[0][sides[0]["template"] == "raw"].reset_index(drop=True)
    assert single.drop(columns="model").equals(raw)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"direction": "up"}, "unknown direction 'up'"),
        ({"template": "own"}, "unknown template 'own'"),
        ({"sites": [Site(9)]}, "is not in"),
        ({"sites": []}, "sites got an empty list"),
        ({"sites": [Site(3)], "window": 2}, "a window of 2 blocks from block 3 on ends beyond"),
        ({"readout": None}, "has no readout"),
    ],
)
def test_what_cannot_be_patched_is_refused(llama: Model, wrong: dict[str, Any], what: str) -> None:
    concept = Concept("demo", "target", "", "", "user", "", stimuli(4))
    with pytest.raises(InputError, match=what):
        patch(llama, concept, **({"readout": ANSWERS} | wrong))
    with pytest.raises(InputError, match="1 pairs of texts"):
        patch(llama, [("the man", "the dog")], readout=ANSWERS)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"sites": "resid_post"}, "sites got 'resid_post', expected places such as Site"),
        ({"sites": [3]}, "sites got \\[3\\], expected places such as Site"),
        ({"window": 1.5}, "window got 1.5, expected 1 to 4"),
        ({"readout": "x"}, "readout got 'x', expected a ReadoutSpec"),
        ({"concepts": [("the man", "a man", "a cat")] * 2}, "expected two texts"),
    ],
)
def test_what_is_of_another_kind_is_refused_by_name(llama: Model, wrong: dict[str, Any], what: str) -> None:
    options = {"concepts": concept_of(), "readout": ANSWERS} | wrong
    with pytest.raises(InputError, match=what):
        patch(llama, **options)
    two: Any = ModelPair(llama, llama)
    for verb in (patch, attribution_patch):
        with pytest.raises(InputError, match=r"model got a ModelPair, expected one model; pass pair\.base"):
            verb(two, concept_of())


def test_a_model_that_cannot_be_continued_is_refused(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llama.__dict__, "replay_refusal", "continuing from block 1 fails")
    for verb in (patch, attribution_patch):
        with pytest.raises(InputError, match="cannot be continued"):
            verb(llama, concept_of())
    assert issubclass(InputError, EmpathyProbesError)


# ---------------------------------------------------------------- from gradients


def test_estimates_are_the_slope_of_exact_patching(model: Model) -> None:
    """A patch of 1/1000 of the way: there the readout is straight, and the estimate exact."""
    pairs = token_pairs()
    cells = make_cells(
        model, sites_of(model, "resid_post", "resid_mid", "attn_out", "mlp_out", "z"), ["2", "all"]
    )
    _, change = estimated_changes(model, pairs, cells, "denoise")
    small = 1e-2
    asked, last = pairs.asked, Site(model.n_layers - 1)
    read = list(dict.fromkeys(cell.sites[0] for cell in cells))
    batch = batch_asked(asked, list(pairs.corrupted), model)
    theirs = model.run(torch_batch(model, [asked.prompts[i] for i in pairs.clean]), read=read).acts
    own = model.run(batch.tokens, read=read).acts
    for cell, expected in zip(cells, change, strict=True):
        site = cell.sites[0]
        where = torch.zeros(own[site].shape[1], 1)
        where[slice(None) if cell.position == "all" else int(cell.position)] = 1
        ends = []
        for sign in (1, -1):
            step = sign * small * where * (theirs[site] - own[site])
            with torch.inference_mode():
                final = model.run(
                    batch.tokens, read=[last], write={site: lambda acts, step=step: acts + step}
                ).acts[last]
                ends.append(look_up(model, batch, final).numpy())
        # Central difference: third order in the step, first in float32 rounding over the step.
        np.testing.assert_allclose(expected, (ends[0] - ends[1]) / 2 / small, atol=3e-3, rtol=2e-2)


def test_gradients_along_the_whole_path_add_up_to_the_whole_change(model: Model) -> None:
    pairs = token_pairs()
    cells = make_cells(model, [Site(-1)], ["all"])
    plain, change = estimated_changes(model, pairs, cells, "denoise", steps=40)
    theirs, _ = patched_readouts(model, pairs, (), "noise")
    # The midpoint rule's error falls with the square of the number of steps.
    np.testing.assert_allclose(change[0], theirs - plain, atol=2e-2, rtol=5e-2)
    coarse = estimated_changes(model, pairs, cells, "denoise", steps=0)[1]
    assert np.abs(coarse[0] - (theirs - plain)).max() > 2 * np.abs(change[0] - (theirs - plain)).max()


@READOUTS
def test_estimates_do_not_depend_on_company(model: Model, readout: ReadoutSpec) -> None:
    concept = concept_of(5, readout)
    together = attribution_patch(
        model, concept, positions=["last", "span"], top=2, sample=1, steps=2
    ).concepts[0]
    one = replace(concept, stimuli=replace(concept.stimuli, items=concept.stimuli.items[6:10]))
    alone = attribution_patch(model, one, positions=["last", "span"], top=2, sample=1, steps=2).concepts[0]
    np.testing.assert_allclose(alone.estimated[:, 0], together.estimated[:, 3], **CLOSE)


def test_every_estimate_comes_with_its_check(llama: Model, tmp_path: Path) -> None:
    found = attribution_patch(llama, concept_of(12), direction="denoise", top=3, sample=5)
    exact = patch(llama, concept_of(12), direction="denoise").concepts[0]
    (c,) = found.concepts
    np.testing.assert_allclose(c.exact, exact.moved[0][c.checked], **CLOSE)
    size = np.abs(c.per_unit(c.estimated).mean(-1))
    assert set(c.checked[:3]) == set(np.argsort(-size)[:3]) and len(set(c.checked)) == 8
    assert c.exceeding == pytest.approx(1 - 0.05 ** (1 / 5))
    gap = np.abs((c.per_unit(c.estimated)[c.checked] - c.per_unit(c.exact)).mean(-1) / c.effect.mean())
    assert np.isfinite(c.misses).all()
    assert c.worst_top == pytest.approx(gap[:3].max()) and c.worst_rest == pytest.approx(gap[3:].max())
    frame = found.to_frame()
    assert frame["checked"].value_counts().to_dict() == {"": len(frame) - 8, "sample": 5, "top": 3}
    found.save(tmp_path / "estimate.safetensors")
    types = {t.__name__: t for t in (EstimatedPatching, EstimatedConcept, Place)}
    assert load_record(tmp_path / "estimate.safetensors", types).to_frame().equals(frame)
    everything = attribution_patch(
        llama, concept_of(4), positions=["last"], sites=[Site(1), Site(2)], direction="noise"
    )
    assert everything.concepts[0].exceeding == 0 and math.isnan(everything.concepts[0].worst_rest)
    assert "nothing else was left to check" in everything.concepts[0].sentence
    with pytest.raises(InputError, match="steps, top and sample"):
        attribution_patch(llama, concept_of(4), top=0)


def test_what_an_estimate_s_check_says_is_true_whatever_was_checked(llama: Model) -> None:
    few: dict[str, Any] = {"direction": "denoise", "top": 1, "sample": 0}
    (none,) = attribution_patch(llama, concept_of(6), positions=["last"], **few).concepts
    assert none.exceeding == 1 and math.isnan(none.worst_rest)
    detected = replace(
        none, clean=none.clean + 100
    )  # whether this model's effect is detected is not the question
    assert detected.sentence.endswith("none of the other 4 was checked")
    assert "rank agreement with exact patching not defined without two places" in none.sentence
    assert "the effect is not detected" in replace(none, clean=none.corrupted).sentence
    pairs = [("the man saw red", "the man saw blue"), ("a dog was old", "a dog was new")]
    (empty,) = attribution_patch(llama, pairs, readout=ANSWERS, positions=["after"], **few).concepts
    assert math.isnan(empty.worst_top) and math.isnan(empty.agreement.value)
    assert empty.sentence.endswith("no text has a token at the places asked for, so nothing was estimated")


def test_figures_are_drawn_from_tables(llama: Model) -> None:
    concept = concept_of(12)
    by_role = patch(llama, concept)
    heads = patch(llama, concept, sites=sites_of(llama, "z"), positions=["all"])
    tokens = patch(
        llama,
        [("the man saw red", "the man saw blue"), ("a dog was red", "a cat was blue")],
        readout=ANSWERS,
        positions=["each"],
    )
    estimate = attribution_patch(llama, concept, top=3, sample=5)
    for result in (by_role, heads, tokens, estimate):
        assert plots.plot(result).axes
    for result in (by_role, heads, tokens):
        assert patching_plotly(result.to_frame()).data
    with pytest.raises(InputError, match="no rows with concept 'other'"):
        plots.FIGURES["patching"](by_role.to_frame(), "other")
