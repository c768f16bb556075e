"""Transplants repair where something was planted and not before; the whole state is a stitched hybrid; controls stay controls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import stimuli, tiny_llama, word_tokenizer

import empathy_probes as ep
from empathy_probes import plots, transplants
from empathy_probes.concepts import Concept
from empathy_probes.contrasts import LayerSet
from empathy_probes.crossings import Crossing, fit_crossings, neutral_states
from empathy_probes.design import Settings, design_study
from empathy_probes.errors import InputError
from empathy_probes.models import Model, load_model
from empathy_probes.pairs import ModelPair
from empathy_probes.patching_plots import transplant_figure, transplant_plotly
from empathy_probes.readouts import ask_design, batch_asked, with_readout
from empathy_probes.stimuli import ReadoutSpec
from empathy_probes.stitching import ORDERS as STITCHED
from empathy_probes.stitching import hybrid_readouts
from empathy_probes.store import load_record
from empathy_probes.transplants import (
    ORDERS,
    POSITIONS,
    TRANSPLANT_COLUMNS,
    VARIANTS,
    TransplantedConcept,
    Transplants,
    _edits,
    _where,
    plan_transplant,
    transplant,
    transplanted_readouts,
)

ANSWERS = ReadoutSpec("answers", (" sun", " day"), (" night", " rain"))
CONTINUATIONS = ReadoutSpec("continuations", (" the sun was large",), (" rain",))
NEUTRAL = tuple(f"the {a} {b} a {c} ." for a in ("man", "dog", "cat", "bird") for b in ("saw", "met", "lost", "kept")
                for c in ("house", "street", "river", "road"))  # fmt: skip
CONCEPT, FULL, COMPLEMENT, RANDOM, SHUFFLED = range(len(VARIANTS))


def concept_of(n: int = 30, readout: ReadoutSpec = ANSWERS) -> Concept:
    return Concept("demo", "target", "", "", "user", "", with_readout(stimuli(n), readout))


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair(*(load_model((tiny_llama(seed), word_tokenizer()), device="cpu") for seed in (0, 1)))


@pytest.fixture(scope="module")
def planted() -> tuple[ModelPair, Concept, Transplants]:
    phantom = ep.load_phantom("planted-valence")
    ((concept,), _) = ep.load_phantom_concepts(30, 0, names=("valence",))
    return phantom, concept, transplant(phantom, concept, template="raw", store="memory://transplant-planted")


def test_the_concept_repairs_from_the_planted_block_on_and_not_before(
    planted: tuple[ModelPair, Concept, Transplants],
) -> None:
    _, _, found = planted
    (c,) = found.concepts
    block = int(ep.phantom_truth("planted-valence")["layer"])
    for o in range(2):
        share = c.repaired(o)
        # Before the block the models hold the same bits: what is put in is what was there.
        np.testing.assert_allclose(
            share.value[:, [CONCEPT, FULL, COMPLEMENT, RANDOM], : block + 1], 0, atol=1e-5
        )
        assert (share.lower[:, CONCEPT, block + 1 :] > 0.4).all()
        assert (share.value[:, FULL, block + 1 :] > 0.7).all()
        for position in POSITIONS:
            assert found.frontier(c, o, position) == LayerSet((block,), False)
        assert (
            c.repaired(o).value[0, SHUFFLED, block + 1 :] > 0.4
        ).all()  # it is the concept, not the scenario


def test_as_large_a_move_along_random_directions_does_not_repair(
    planted: tuple[ModelPair, Concept, Transplants],
) -> None:
    (c,) = planted[2].concepts
    for o in range(2):
        share = c.repaired(o).value
        # Of 80 dimensions a random one has a tenth of any other.
        assert np.abs(share[:, RANDOM]).max() < 0.1 < share[:, CONCEPT, -1].min()
        gap = (c.donor(o) - c.recipient(o)).mean()
        assert np.abs((c.random[o] - c.recipient(o)).mean(-1) / gap).max() < 0.25


def test_both_directions_of_patching_agree_where_the_path_is_known(
    planted: tuple[ModelPair, Concept, Transplants],
) -> None:
    phantom, concept, _ = planted
    for model in phantom.models:
        curve = ep.patch(model, concept, sites=[ep.Site(layer) for layer in (-1, 2, 4)]).concepts[0].recovered
        sure = (curve.lower > 0.01) | (curve.upper < -0.01)
        assert sure.any(1).all() and (np.sign(curve.value[0]) == np.sign(curve.value[1]))[sure.all(0)].all()


@pytest.mark.parametrize("readout", [ANSWERS, CONTINUATIONS], ids=["answers", "continuations"])
def test_the_full_state_at_all_positions_is_a_stitched_hybrid(pair: ModelPair, readout: ReadoutSpec) -> None:
    concept = concept_of(readout=readout)
    design = design_study(pair, [concept], template="raw", neutral=NEUTRAL)
    asked = ask_design(design, concept, "raw", 1)
    tokens = [prompt.ids for prompt in design.prompts["demo", "raw"][0]]
    crossings, _ = fit_crossings((neutral_states(pair.base, tokens), neutral_states(pair.aligned, tokens)))
    to_base = crossings[0]
    random = np.ones((1, pair.base.n_layers + 1, pair.base.d_model))
    plan = plan_transplant(pair.aligned, concept.stimuli, asked, to_base, random, 0)
    plain, values = transplanted_readouts(pair.aligned, pair.base, asked, to_base, plan)
    hybrids = hybrid_readouts(pair, asked, crossings)[STITCHED.index("aligned_then_base")]
    np.testing.assert_allclose(plain, hybrids[0], atol=2e-5)
    # Rows of a hybrid: none, −1, 0 … n_layers − 1, all.
    np.testing.assert_allclose(values[1, FULL], hybrids[1:-1], atol=2e-5, rtol=1e-4)


def test_states_of_a_turned_model_cross_by_the_map_and_equal_ones_as_they_are() -> None:
    generator = np.random.default_rng(0)
    turn = np.linalg.qr(generator.standard_normal((8, 8)))[0]
    base = generator.standard_normal((400, 2, 8)) + 1
    aligned = base.copy()
    aligned[:, 1] = 3 * base[:, 1] @ turn
    (to_base, to_aligned), mapped = fit_crossings((base, aligned))
    assert mapped.tolist() == [False, True]
    ours, own = (torch.as_tensor(x[:6, 1], dtype=torch.float32).reshape(2, 3, 8) for x in (base, aligned))
    assert to_aligned[0](ours, own) is ours
    torch.testing.assert_close(to_aligned[1](ours, own), own, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(to_base[1](own, ours), ours, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(to_aligned[1].move(base[:, 1]), aligned[:, 1], atol=1e-4)
    np.testing.assert_allclose(
        to_aligned[1].turn(base[:5, 1] - base[5, 1]), aligned[:5, 1] - aligned[5, 1], atol=1e-4
    )
    # The first token keeps the second model's own state.
    assert torch.equal(to_aligned[1](ours + 1, own)[:, 0], own[:, 0])


def test_the_component_and_the_rest_add_up_to_the_full_state(pair: ModelPair) -> None:
    concept = concept_of()
    design = design_study(pair, [concept], template="raw", neutral=NEUTRAL)
    asked = ask_design(design, concept, "raw", 1)
    batch = batch_asked(asked, range(4), pair.base)
    as_it_is = [Crossing()] * (pair.base.n_layers + 1)
    random = np.random.default_rng(0).standard_normal((2, pair.base.n_layers + 1, pair.base.d_model))
    random /= np.linalg.norm(random, axis=-1, keepdims=True)
    plan = plan_transplant(pair.base, concept.stimuli, asked, as_it_is, random, 0)
    theirs, own = torch.randn(2, *batch.tokens.ids.shape, pair.base.d_model)
    where = _where(batch, asked, range(4), "read")
    kinds = dict(_edits(theirs, Crossing(), plan, 2, range(4), batch, where, shuffle=True))
    moved = {kind: edit(own) - own for kind, edit in kinds.items()}
    torch.testing.assert_close(moved[0] + moved[2], moved[1], atol=1e-5, rtol=1e-4)
    for kind in (4, 5):  # a random move is as large as the concept's
        torch.testing.assert_close(moved[kind].norm(dim=-1), moved[0].norm(dim=-1), atol=1e-5, rtol=1e-4)
    read = [positions[0] for positions in asked.read[:4]]
    for row, position in enumerate(read):
        torch.testing.assert_close(kinds[1](own)[row, position], theirs[row, position])
        for change in moved.values():
            assert (change[row, :position] == 0).all() and (change[row, position + 1 :] == 0).all()


def test_a_direction_never_sees_the_scenario_it_is_used_on(pair: ModelPair) -> None:
    concept = concept_of()
    items = list(concept.stimuli.items)
    items[0], items[1] = (replace(items[i], label=1.0 - float(items[i].label)) for i in (0, 1))
    swapped = replace(concept.stimuli, items=tuple(items))
    design = design_study(pair, [concept], template="raw", neutral=NEUTRAL)
    asked = ask_design(design, concept, "raw", 1)
    as_it_is, random = [Crossing()] * 5, np.ones((1, 5, pair.base.d_model))
    one, other = (
        plan_transplant(pair.base, s, asked, as_it_is, random, 0) for s in (concept.stimuli, swapped)
    )
    mine = one.fold[0]
    np.testing.assert_array_equal(one.directions[mine], other.directions[mine])
    rest = [f for f in range(5) if f != mine]
    assert (np.abs(one.directions[rest] - other.directions[rest]).max((1, 2)) > 1e-3).all()
    np.testing.assert_allclose(np.linalg.norm(one.directions[:, 1:], axis=-1), 1)
    # All texts end in the same token: before block 0 nothing tells them apart there.
    assert not one.found[0] and one.found[1:].all() and (one.directions[:, 0] == 0).all()


def test_a_model_with_itself_is_blank_and_nothing_moves(llama: Model, tmp_path: Path) -> None:
    found = transplant(
        ModelPair(llama, llama),
        concept_of(),
        template="raw",
        neutral=NEUTRAL,
        store="memory://transplant-same",
    )
    (c,) = found.concepts
    assert not found.mapped.any()
    for o in range(2):
        own = np.broadcast_to(c.recipient(o), c.moved[o][:, [CONCEPT, FULL, COMPLEMENT, RANDOM]].shape)
        np.testing.assert_allclose(c.moved[o][:, [CONCEPT, FULL, COMPLEMENT, RANDOM]], own, atol=2e-5)
        assert found.frontier(c, o, "read") is None
    frame = found.to_frame()
    assert list(frame.columns) == TRANSPLANT_COLUMNS
    assert len(frame) == len(ORDERS) * len(POSITIONS) * len(VARIANTS) * (llama.n_layers + 1)
    assert frame["repaired"].isna().all() and frame["flags"].str.contains("difference_not_detected").all()
    assert frame[frame["coupling"].isna()]["flags"].str.contains("lengths_differ").all()
    found.save(tmp_path / "transplant.safetensors")
    types = {t.__name__: t for t in (Transplants, TransplantedConcept, Settings)}
    assert load_record(tmp_path / "transplant.safetensors", types).to_frame().equals(frame)


def test_an_interrupted_transplant_goes_on_with_what_it_had(
    pair: ModelPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def interrupted(*args: Any) -> Any:
        ran.append(args[-1])
        if len(ran) == 2:
            raise KeyboardInterrupt
        return transplanted_readouts(*args)

    def run(store: str) -> Transplants:
        return transplant(pair, concept_of(), template="raw", neutral=NEUTRAL, store=store)

    monkeypatch.setattr(transplants, "transplanted_readouts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(str(tmp_path / "kept"))
    resumed = run(str(tmp_path / "kept"))
    assert [label.split(" · ")[-1] for label in ran] == [ORDERS[0], ORDERS[1], ORDERS[1]]
    assert run(str(tmp_path / "kept")).to_frame().equals(resumed.to_frame()) and len(ran) == 3
    # Another seed has other folds and random directions; nothing that was kept is taken for them.
    assert resumed.to_frame().equals(run(str(tmp_path / "new")).to_frame()) and len(ran) == 5
    transplant(pair, concept_of(), template="raw", neutral=NEUTRAL, store=str(tmp_path / "kept"), seed=1)
    assert len(ran) == 7


def test_figures_show_both_ways_and_the_frontier(planted: tuple[ModelPair, Concept, Transplants]) -> None:
    found = planted[2]
    frame = found.to_frame()
    assert len(plots.plot(found).axes) >= 2
    assert transplant_figure(frame, frontier=found.frontier_frame()).axes
    assert transplant_plotly(frame, position="all").data
    assert found.frontier_frame()["frontier_lower"].tolist() == [3, 3, 3, 3]
    with pytest.raises(InputError, match="no rows with position 'end'"):
        transplant_figure(frame, position="end")
    with pytest.raises(InputError, match="template 'own'"):
        transplant(planted[0], planted[1], template="own", store="memory://transplant-own")
