"""Hybrids of two models are exact, their shares sum to the loss, and planted losses are found where they were planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MAKERS, rows, word_tokenizer

from empathy_probes.batches import pad_tokens
from empathy_probes.concepts import Concept
from empathy_probes.crossings import Crossing
from empathy_probes.design import Settings
from empathy_probes.errors import InputError
from empathy_probes.expression import measure_coupling
from empathy_probes.grammar import neutral_texts
from empathy_probes.models import Model, load_model
from empathy_probes.pairs import ModelPair, make_pair
from empathy_probes.phantoms import load_phantom, load_phantom_concepts
from empathy_probes.planting import list_bases, open_twin
from empathy_probes.stimuli import stimuli_from_rows
from empathy_probes.stitching import ORDERS, Loss, StitchedConcept, Stitching, _hybrids, stitch
from empathy_probes.store import load_record

CONTINUATIONS = {"continuations": [" the old dog saw rain", " a boat"]}
NEUTRAL = [f"the {a} {b} met a {c} ." for a in ("old", "new", "red") for b in ("man", "dog", "cat", "bird")
           for c in ("boat", "train", "road", "house", "street")]  # fmt: skip


def demo(n: int = 30, name: str = "demo") -> Concept:
    made = [{**row, "readout": CONTINUATIONS} for row in rows(n, concept=name)]
    return Concept(name, "target", "", "", "user", "", stimuli_from_rows(made, name))


def two(shape: str, seed: int = 1) -> ModelPair:
    models = [load_model((MAKERS[shape](s), word_tokenizer()), device="cpu") for s in (0, seed)]
    return make_pair(*models, allow_identical=True)


def whole(model: Model, row: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model.run(pad_tokens([row])).logits[0]


@pytest.mark.parametrize("shape", sorted(MAKERS))
def test_a_hybrid_equals_a_transformers_model_whose_blocks_were_spliced(shape: str) -> None:
    pair = two(shape)
    row = [1, 8, 9, 20, 11, 30]
    plain = [[Crossing()] * 5] * 2
    with torch.inference_mode():
        found = {
            (order, at): model.head(state[0])
            for order, at, model, state in _hybrids(pair, pad_tokens([row]), plain)
        }
    for order, (a, b) in enumerate(((1, 0), (0, 1))):
        for cut in range(-1, 4):
            first, second = MAKERS[shape](a), MAKERS[shape](b)
            if shape == "llama":
                second.model.embed_tokens = first.model.embed_tokens
                blocks, donors = second.model.layers, first.model.layers
            else:
                second.transformer.wte, second.transformer.wpe = first.transformer.wte, first.transformer.wpe
                blocks, donors = second.transformer.h, first.transformer.h
                second.lm_head.weight = MAKERS[shape](b).lm_head.weight
            for i in range(cut + 1):
                blocks[i] = donors[i]
            with torch.inference_mode():
                expected = second(torch.tensor([row])).logits[0]
            # float32 through four blocks whose order of sums differs
            torch.testing.assert_close(found[order, cut + 2], expected, atol=3e-5, rtol=1e-4)
        assert torch.equal(found[order, 0], whole(pair.models[b], row))
        assert torch.equal(found[order, 6], whole(pair.models[a], row))


@pytest.mark.parametrize("shape", sorted(MAKERS))
def test_a_model_stitched_with_itself_has_its_own_coupling_at_every_boundary_bit_by_bit(
    shape: str, tmp_path: Path
) -> None:
    result = stitch(two(shape, seed=0), demo(), template="raw", neutral=NEUTRAL, store=str(tmp_path))
    coupling = result.concepts[0].coupling
    assert np.ptp(coupling[..., 0]) == 0 and abs(coupling).max() > 0
    assert (coupling == coupling[0, 0]).all()
    frame = result.to_frame()
    assert (frame["share"].dropna() == 0).all() and not result.mapped.any()


def test_shares_of_both_orders_sum_to_the_loss_and_ends_meet(tmp_path: Path) -> None:
    pair = two("llama")
    result = stitch(pair, demo(), template="raw", neutral=NEUTRAL, store=str(tmp_path))
    concept = result.concepts[0]
    there, back = concept.coupling
    assert np.array_equal(there[0], back[-1]) and np.array_equal(there[-1], back[0])
    loss = there[0] - there[-1]
    shares = result.shares(concept)
    np.testing.assert_allclose(np.nansum(shares, axis=1), [loss, loss], atol=1e-10)
    coupled = measure_coupling(pair, demo(), template="raw", store=str(tmp_path)).concepts[0].coupling
    np.testing.assert_allclose(coupled, [there[0], there[-1]], atol=1e-5)
    frame = result.to_frame()
    assert list(frame["order"].unique()) == list(ORDERS) and len(frame) == 14
    assert frame.loc[frame["boundary"] == "none", "share"].isna().all()


def test_an_insane_boundary_is_flagged_and_its_block_merged_so_that_shares_still_sum() -> None:
    generator = np.random.default_rng(0)
    coupling = generator.normal(size=(2, 6, 30))
    coupling[1] = coupling[0, ::-1]
    concept = StitchedConcept("demo", "target", "raw", tuple(f"s{i}" for i in range(30)), coupling)
    loss = np.full((1, 2, 6), 2.0)
    loss[0, 0, 2] = 4.0
    result = Stitching((concept,), 3, loss, np.zeros((1, 4), bool))
    shares = result.shares(concept)
    assert np.isnan(shares[0, 2]).all() and not np.isnan(shares[1, 1:]).any()
    np.testing.assert_allclose(shares[0, 3], coupling[0, 1] - coupling[0, 3])
    np.testing.assert_allclose(np.nansum(shares, 1), [coupling[0, 0] - coupling[0, 5]] * 2, atol=1e-12)
    flags = result.to_frame().set_index(["order", "boundary"])["flags"]
    assert flags[ORDERS[0], "0"] == "insane_boundary" and flags[ORDERS[0], "1"] == "merged"


def test_the_band_covers_all_rows_at_once_in_about_95_percent_of_samples() -> None:
    generator = np.random.default_rng(1)
    held = 0
    for seed in range(200):
        steps = generator.normal(size=(1, 8, 40)) * generator.uniform(0.2, 3, size=(1, 8, 1))
        coupling = np.concatenate([np.zeros((1, 1, 40)), steps.cumsum(1)], 1).repeat(2, 0)
        concept = StitchedConcept("demo", "target", "raw", tuple(f"s{seed}-{i}" for i in range(40)), coupling)
        result = Stitching((concept,), 6, np.zeros((1, 2, 9)), np.zeros((1, 7), bool), Settings(draws=999))
        mean, reach = result.shares(concept)[:, 1:].mean(-1), result.band(concept)[:, 1:]
        held += bool((abs(mean) <= reach).all())
    assert 0.915 <= held / 200 <= 0.98  # ± 2.3 binomial standard errors of .95


def stitched(
    steps: list[float], noise: float, seed: int = 0, n: int = 60
) -> tuple[Stitching, StitchedConcept]:
    """A curve that falls by these steps (embedding, four blocks, head) from 10 at `none`."""
    generator = np.random.default_rng(seed)
    fall = np.array([0.0, *steps]).cumsum()[:, None]
    there = (10 - fall) * generator.normal(1, 0.2, size=(1, n)) + noise * generator.normal(size=(7, n))
    concept = StitchedConcept(
        "demo", "target", "raw", tuple(f"s{i}" for i in range(n)), np.stack([there, there[::-1]])
    )
    return Stitching((concept,), 4, np.zeros((1, 2, 7)), np.zeros((1, 5), bool)), concept


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([0, 0, 0, 6, 0, 0], Loss("lost", 2, 2)),
        ([0, 0, 4, 0, 4, 0], Loss("lost", 1, 3)),
        ([0, 0, 0, 0, 0, 7], Loss("lost", 4, 4)),
        ([5, 0, 0, 0, 0, 0], Loss("lost", -1, -1)),
        ([0, 0.1, 0, -0.1, 0, 0], Loss("kept", None, None)),
        # Lost for a base reader, but the aligned blocks express it all the same: no loss to place.
        ([0, 0, 8, 0, -8, 0], Loss("inconclusive", None, None)),
    ],
)
def test_a_loss_is_placed_where_the_curve_falls(steps: list[float], expected: Loss) -> None:
    result, concept = stitched(steps, noise=0.3)
    assert result.loss(concept) == expected


def test_noise_is_no_loss_and_too_much_of_it_is_inconclusive() -> None:
    found = [Stitching.loss(*stitched([0, 0, 0, 0, 0, 0], noise=6.0, seed=seed)).word for seed in range(40)]
    assert set(found) == {"inconclusive"}


def test_a_rotated_model_is_stitched_through_the_map_and_loses_nothing(tmp_path: Path) -> None:
    pair = open_twin(list_bases()["llama-0"], "rotated", None, None, None)
    concept = load_phantom_concepts(40, names=("valence",))[0]
    result = stitch(pair, concept, template="raw", neutral=neutral_texts(320), store=str(tmp_path))
    assert result.mapped.all()
    coupling = result.concepts[0].coupling.mean(-1)
    np.testing.assert_allclose(coupling, coupling[0, 0], rtol=0.03)


@pytest.mark.parametrize(
    ("family", "layer", "keep", "place"),
    [("planted", 3, 0.25, "3"), ("erased", 2, None, "2"), ("unsaid", None, None, "all")],
)
def test_the_loss_of_a_twin_is_found_where_it_was_planted(
    family: str, layer: int | None, keep: float | None, place: str, tmp_path: Path
) -> None:
    pair = open_twin(list_bases()["llama-0"], family, "valence", layer, keep)
    concepts = load_phantom_concepts(30, names=("valence", "conflict"))[0]
    result = stitch(pair, concepts, template="raw", neutral=neutral_texts(100), store=str(tmp_path))
    frame = result.to_frame().set_index(["concept", "order", "boundary"]).sort_index()
    for order in ORDERS:
        rows_ = frame.loc["valence", order]
        loss = rows_["share"].sum()
        block = 6 if place == "all" else int(place)
        assert result.loss(result.concepts[0]) == Loss("lost", block, block)
        assert result.loss(result.concepts[1]).word == "kept"
        assert rows_.loc[place, "share"] > 0.9 * loss > 5 and not result.mapped.any()
        assert (rows_["share"].drop(["none", place]).abs() < 0.1 * loss).all()
        assert frame.loc["conflict", order]["share"].abs().max() < 0.1 * loss


def test_a_second_run_takes_every_readout_from_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = load_phantom("planted-valence")
    concept = load_phantom_concepts(30, names=("valence",))[0]
    first = stitch(pair, concept, template="raw", neutral=neutral_texts(60), store=str(tmp_path))
    monkeypatch.setattr("empathy_probes.stitching._hybrids", None)
    again = stitch(pair, concept, template="raw", neutral=neutral_texts(60), store=str(tmp_path))
    assert np.array_equal(first.concepts[0].coupling, again.concepts[0].coupling)
    first.save(tmp_path / "s.safetensors")
    types = {cls.__name__: cls for cls in (Stitching, StitchedConcept, Settings)}
    loaded = load_record(tmp_path / "s.safetensors", types)
    assert loaded.to_frame().equals(first.to_frame())


def test_what_cannot_be_stitched_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = two("llama")
    monkeypatch.setitem(pair.base.__dict__, "replay_refusal", "it scales its logits")
    with pytest.raises(InputError, match=r"it scales its logits.*run the encode stage only"):
        stitch(pair, demo(), template="raw", neutral=NEUTRAL, store=str(tmp_path))
    monkeypatch.undo()
    without = Concept("demo", "target", "", "", "user", "", stimuli_from_rows(rows(30), "demo"))
    with pytest.raises(InputError, match="no readout: none of the targets demo"):
        stitch(pair, without, template="raw", neutral=NEUTRAL, store=str(tmp_path))
