"""What an edit of the weights must leave alone, and what it must do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MAKERS, rows, word_tokenizer
from safetensors.torch import load_file

from empathy_probes.activations import Activations
from empathy_probes.checkpoints import build_checkpoint
from empathy_probes.concepts import Concept
from empathy_probes.errors import InputError
from empathy_probes.extraction import extract
from empathy_probes.pairs import ModelPair
from empathy_probes.phantoms import (
    _verdict,
    build_phantom,
    list_phantoms,
    load_phantom_concepts,
    phantom_truth,
)
from empathy_probes.planting import FAMILIES, TRAINED, list_bases, open_twin
from empathy_probes.prompts import render
from empathy_probes.readouts import ask, read_out, scenario_coupling
from empathy_probes.redraws import Sample, sample_of
from empathy_probes.stimuli import stimuli_from_rows
from empathy_probes.store import open_store
from empathy_probes.surgery import (
    Subspace,
    concept_subspace,
    folded,
    rescaled,
    rotated,
    scaled_writes,
    widened,
)
from empathy_probes.weights import Checkpoint

BASES = list_bases()


def checkpoint(kind: str) -> Checkpoint:
    """A tiny random model whose norms have gains and biases, so that folding matters."""
    model = MAKERS[kind]()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return Checkpoint(model.config.to_dict(), {k: v.clone() for k, v in model.state_dict().items()})


def logits(c: Checkpoint) -> torch.Tensor:
    ids = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return build_checkpoint(c.config, c.tensors)(ids).logits


@pytest.mark.parametrize("kind", sorted(MAKERS))
@pytest.mark.parametrize(
    "change",
    [folded, rotated, rescaled, lambda c: widened(c, 6)],
    ids=["folded", "rotated", "rescaled", "widened"],
)
def test_a_change_of_basis_scale_or_width_computes_the_same(kind: str, change: Any) -> None:
    c = checkpoint(kind)
    # float32 sums in another order: about 1e-5 of logits of size 1.
    torch.testing.assert_close(logits(change(c)), logits(c), rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_a_rotation_turns_every_direction_and_a_scale_keeps_it(kind: str) -> None:
    c = checkpoint(kind)
    name = c.layout.embeddings[0]
    a, b = folded(c).tensors[name], rotated(c).tensors[name]
    torch.testing.assert_close(a @ a.T, b @ b.T, rtol=1e-3, atol=1e-4)
    assert torch.nn.functional.cosine_similarity(a, b).mean() < 0.5
    torch.testing.assert_close(rescaled(c, 3.0).tensors[name], 3 * c.tensors[name])


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_writes_that_are_scaled_out_leave_nothing_in_the_direction(kind: str) -> None:
    c = folded(checkpoint(kind))
    d = c.d_model
    direction = np.ones(d) / np.sqrt(d) if not c.layout.layer_norm else np.eye(d)[0] - 1 / d
    direction /= np.linalg.norm(direction)
    where = Subspace(direction[:, None], direction[None], np.zeros(d))
    made = scaled_writes(c, range(c.n_layers), 0.0, where)
    for k in range(c.n_layers):
        for write in c.layout.writes(k):
            w = made.tensors[write + ".weight"]
            w = w if c.layout.transposed else w.T
            assert abs(w.double() @ torch.tensor(direction)).max() < 1e-5


def test_the_reader_of_a_concept_sees_nothing_of_a_guarded_one() -> None:
    rng = np.random.default_rng(0)
    own, other = rng.standard_normal((2, 20))
    other = other + own  # they lean on each other: an orthogonal projection would take both
    states = (
        rng.standard_normal((4000, 20))
        + np.outer(rng.integers(0, 2, 4000), own)
        + np.outer(rng.integers(0, 2, 4000), other)
    )
    where = concept_subspace(states, own, other[None])
    left = other - where.projection @ other
    np.testing.assert_allclose(where.projection @ own, own, atol=1e-8)
    assert np.linalg.norm(left) / np.linalg.norm(other) > 0.99
    orthogonal = other - own * (own @ other) / (own @ own)
    assert np.linalg.norm(orthogonal) / np.linalg.norm(other) < 0.9


def test_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="'bloom' model, expected one of llama"):
        _ = Checkpoint({"model_type": "bloom"}, {}).layout


# ---------------------------------------------------------------- twins of the shipped bases


def test_a_sample_holds_scenarios_in_the_order_of_their_texts() -> None:
    """As everything else does: the same rows of a sample and of what is said are the same scenarios."""
    (concept,), _ = load_phantom_concepts(30, names=("valence",))
    texts = np.arange(60, dtype=np.float32)[:, None, None]
    acts = [
        Activations(texts**power, (0,), "resid_post", model, False)
        for power, model in ((1, "base"), (2, "aligned"))
    ]
    found = sample_of(concept, acts)
    first = {unit: i for i, unit in reversed(list(enumerate(item.unit for item in concept.stimuli.items)))}
    squares = [(first[unit] ** 2 + (first[unit] + 1) ** 2) / 2 for unit in concept.stimuli.units]
    np.testing.assert_allclose(found.squares[0, :, 0], squares)


@pytest.fixture(scope="module")
def concepts() -> dict[str, Concept]:
    targets, controls = load_phantom_concepts(150, seed=4, names=("valence", "distance", "tense"))
    return {c.name: c for c in (*targets, *controls)}


def sample(
    base: str, family: str, concepts: dict[str, Concept], *planted: Any, of: str = "valence"
) -> Sample:
    return sample_of_pair(open_twin(BASES[base], family, *(planted or ("valence", None, None))), concepts[of])


def sample_of_pair(pair: ModelPair, concept: Concept) -> Sample:
    store = open_store("memory://tests")
    acts = []
    for model in pair.models:
        prompts = render(model.tokenizer, concept.stimuli, "raw", "user")
        acts.append(extract(model, prompts, ("resid_post",), range(6), store)["resid_post"])
        store.clear()
    return sample_of(concept, acts)


def lost(s: Sample) -> np.ndarray:
    return 1 - np.sqrt(np.maximum(s.u[1], 0) / s.u[0])


@pytest.mark.parametrize("base", sorted(BASES))
def test_a_planted_concept_is_scaled_at_its_block_and_bit_by_bit_the_same_before(
    base: str, concepts: dict[str, Concept]
) -> None:
    s = sample(base, "planted", concepts, "valence", 3, 0.25)
    np.testing.assert_array_equal(s.differences[0, :, :3], s.differences[1, :, :3])
    np.testing.assert_array_equal(s.squares[0, :, :3], s.squares[1, :, :3])
    assert abs(lost(s)[3] - 0.74) < 0.04  # 0.75 of the contrast, and a little less as the rms shrinks along
    other = sample(base, "planted", concepts, "valence", 3, 0.25, of="distance")
    assert abs(lost(other)[3]) < 0.06


@pytest.mark.parametrize("base", sorted(BASES))
def test_families_that_compute_the_same_lose_nothing(base: str, concepts: dict[str, Concept]) -> None:
    for family in ("rotated", "rescaled", "unsaid"):
        # The contrasts of gpt2's block 0 are too small for a ratio to be exact in float32.
        np.testing.assert_allclose(lost(sample(base, family, concepts))[1:], 0, atol=2e-3)


@pytest.mark.parametrize("base", sorted(BASES))
def test_erased_stays_away_and_rerouted_comes_back(base: str, concepts: dict[str, Concept]) -> None:
    assert (lost(sample(base, "erased", concepts, "valence", 2, 0.0))[2:] > 0.85).all()
    rerouted = lost(sample(base, "rerouted", concepts, "valence", 2, 0.25))
    assert (rerouted[2:4] > 0.6).all() and abs(rerouted[4:]).max() < 0.05 and (rerouted[:2] == 0).all()


@pytest.mark.parametrize("base", sorted(BASES))
def test_unread_is_there_as_strong_as_it_was_and_nothing_answers_to_it(
    base: str, concepts: dict[str, Concept]
) -> None:
    pair = open_twin(BASES[base], "unread", "valence", 3, None)
    s = sample_of_pair(pair, concepts["valence"])
    np.testing.assert_array_equal(s.differences[0, :, :3], s.differences[1, :, :3])
    assert abs(lost(s)).max() < 0.05
    for name in ("valence", "distance"):
        (concept,), _ = load_phantom_concepts(15, 5, names=(name,))
        prompts = render(pair.base.tokenizer, concept.stimuli, "raw", "user")
        asked = ask(pair.base.tokenizer, concept.stimuli, prompts, "raw")
        coupling = [scenario_coupling(read_out(m, asked), concept.stimuli).mean() for m in pair.models]
        kept = coupling[1] / coupling[0]
        assert abs(kept) < 0.1 if name == "valence" else abs(kept - 1) < 0.1


def test_a_generic_gain_shrinks_controls_as_well(concepts: dict[str, Concept]) -> None:
    for of in ("valence", "tense"):
        assert abs(lost(sample("gpt2-0", "generic_gain", concepts, "valence", 2, 0.7, of=of))[2] - 0.3) < 0.05


def test_what_is_trained_or_unknown_is_refused() -> None:
    for family in (*TRAINED, "nonsense"):
        with pytest.raises(InputError, match="cannot be made from a checkpoint"):
            build_phantom(BASES["llama-0"] / "base", family=family, out="never")
    assert not Path("never").exists()


# ---------------------------------------------------------------- from a checkpoint of one's own


def test_a_phantom_is_two_checkpoints_and_a_truth(tmp_path: Path, concepts: dict[str, Concept]) -> None:
    out = build_phantom(
        BASES["llama-0"] / "base", family="planted", concept=concepts["distance"], layer=2, keep=0.5,
        others=[concepts["tense"]], out=tmp_path / "twin",
    )  # fmt: skip
    truth = json.loads((out / "truth.json").read_text())
    assert truth["family"] == "planted" and truth["concept"] == "distance" and truth["layer"] == 2
    assert [truth["attenuation_by_layer"][str(k)] for k in (0, 1)] == [0, 0]
    assert abs(truth["keep_achieved"] - 0.5) < 0.05 and abs(truth["other_concepts"]["tense"]["2"]) < 0.05
    from empathy_probes.pairs import load_pair

    pair = load_pair(out / "base", out / "aligned", device="cpu")
    assert pair.base.n_layers == 6 and not pair.identical
    with pytest.raises(InputError, match="is there already"):
        build_phantom(BASES["llama-0"] / "base", family="identical", out=out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "planted"}, "got no concept"),
        ({"family": "planted", "layer": 9}, "layer 9 does not exist, expected 0 to 5"),
        ({"family": "planted", "keep": 1.5}, "keep is 1.5"),
    ],
)
def test_an_impossible_order_writes_nothing(
    tmp_path: Path, concepts: dict[str, Concept], options: dict[str, Any], message: str
) -> None:
    concept = None if options == {"family": "planted"} else concepts["valence"]
    with pytest.raises(InputError, match=message):
        build_phantom(BASES["llama-0"] / "base", concept=concept, out=tmp_path / "x", others=(), **options)
    assert list(tmp_path.iterdir()) == []


def test_every_family_has_a_verdict() -> None:
    from empathy_probes.phantoms import VERDICTS

    assert set(VERDICTS) == set(FAMILIES)


@pytest.mark.parametrize("name", list_phantoms())
def test_the_verdict_of_a_shipped_twin_is_that_of_its_measured_truth(name: str) -> None:
    truth = phantom_truth(name)
    at = truth["attenuation_by_layer"].get(str(truth["layer"]))
    assert _verdict(truth["family"], at, truth.get("coupling")) == truth["verdict"]


LOST, SAID, HARDLY = ({"base": 12.0, "aligned": aligned} for aligned in (3.0, 11.9, 10.9))


@pytest.mark.parametrize(
    ("family", "attenuation", "coupling", "verdict"),
    [
        ("planted", 0.7, LOST, "erased"), ("planted", 0.7, None, "erased"), ("planted", 0.7, SAID, "local"),
        ("planted", 0.0, SAID, "preserved"), ("planted", 0.05, HARDLY, "preserved"), ("planted", 0.0, LOST, None),
        ("scaled_writes", -0.3, SAID, None), ("scaled_writes", 0.0, None, None), ("local", 0.7, SAID, "local"),
        ("local", 0.7, LOST, "erased"), ("local", 0.7, None, None), ("local", 0.0, SAID, "preserved"),
        ("generic_gain", 0.3, LOST, "generic_drift"), ("generic_gain", 0.0, SAID, "preserved"),
        ("generic_gain", 0.05, LOST, None), ("unread", 0.02, LOST, "encoded_unread"), ("unread", 0.3, LOST, None),
        ("unread", 0.0, SAID, "preserved"), ("unsaid", None, LOST, "used_unsaid"), ("unsaid", None, SAID, None),
        ("rotated", None, None, "rotated"),
    ],
)  # fmt: skip
def test_a_verdict_is_of_what_was_measured(
    family: str, attenuation: float | None, coupling: dict[str, float] | None, verdict: str | None
) -> None:
    assert _verdict(family, attenuation, coupling) == verdict


def test_a_twin_in_which_nothing_was_taken_is_preserved(tmp_path: Path, concepts: dict[str, Concept]) -> None:
    out = build_phantom(
        BASES["llama-0"] / "base", family="planted", concept=concepts["valence"], layer=3, keep=1.0, others=(), out=tmp_path / "x"
    )  # fmt: skip
    truth = json.loads((out / "truth.json").read_text())
    assert truth["keep_achieved"] == 1 and truth["verdict"] == "preserved"
    with pytest.raises(InputError, match="seed got -1"):
        build_phantom(BASES["llama-0"] / "base", family="rotated", seed=-1, out=tmp_path / "y")


def test_a_template_shift_is_two_templates_on_equal_weights(tmp_path: Path) -> None:
    from empathy_probes.pairs import load_pair

    concept = Concept("demo", "target", "", "", "user", "", stimuli_from_rows(rows(40, 0, "demo"), "demo"))
    model = MAKERS["llama"]()
    model.save_pretrained(tmp_path / "m")
    word_tokenizer().save_pretrained(tmp_path / "m")
    out = build_phantom(
        tmp_path / "m", family="template_shift", concept=concept, others=(), out=tmp_path / "t"
    )
    pair = load_pair(out / "base", out / "aligned", device="cpu", allow_identical=True)
    assert pair.identical and pair.base.template_digest != pair.aligned.template_digest


def test_writes_of_some_blocks_are_scaled_and_the_truth_says_from_where_on(
    tmp_path: Path, concepts: dict[str, Concept]
) -> None:
    out = build_phantom(
        BASES["gpt2-0"] / "base", family="scaled_writes", concept=concepts["valence"], layer=1, through=3, keep=0.0, others=[],
        out=tmp_path / "twin",
    )  # fmt: skip
    truth = json.loads((out / "truth.json").read_text())
    lost = truth["attenuation_by_layer"]
    assert lost["-1"] == lost["0"] == 0 and lost["1"] > 0.8 and truth["verdict"] == "erased"
    states = [load_file(out / side / "model.safetensors") for side in ("base", "aligned")]
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert {name.split(".")[2] for name in changed} == {"1", "2", "3"}
    for wrong in ({"family": "planted"}, {"layer": 4}):
        asked = {"family": "scaled_writes", "layer": 1, "concept": concepts["valence"], **wrong}
        with pytest.raises(InputError, match="through is 3"):
            build_phantom(BASES["gpt2-0"] / "base", through=3, out=tmp_path / "never", **asked)
