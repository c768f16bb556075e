"""Laws of the phantoms' grammar and of the shipped phantoms' files."""

import functools
import json
import re
from pathlib import Path

import pytest

from empathy_probes import grammar
from empathy_probes.errors import InputError

PHANTOMS = Path(grammar.__file__).parent / "data" / "phantoms"
TRUTHS = sorted(PHANTOMS.glob("*/*.truth.json"))
TRUTH_KEYS = {
    "schema_version", "family", "concept", "layer", "keep_intended", "keep_achieved", "attenuation_by_layer",
    "positions", "n_scenarios", "seed", "verdict",
}  # fmt: skip


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def pairs(concept: str, n: int = 40, seed: int = 0) -> list[tuple[dict, dict]]:
    rows = grammar.stimuli_rows(concept, n, seed)
    return list(zip(rows[0::2], rows[1::2], strict=True))


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    assert grammar.training_texts(20, 3) == grammar.training_texts(20, 3)
    assert not set(grammar.training_texts(20, 3)) & set(grammar.training_texts(20, 4))
    assert grammar.stimuli_rows("valence", 5, 1) == grammar.stimuli_rows("valence", 5, 1)


@pytest.mark.parametrize("concept", grammar.CONCEPTS)
def test_every_scenario_has_both_labels_and_its_texts_differ(concept):
    for one, zero in pairs(concept):
        assert (one["label"], zero["label"]) == (1, 0)
        assert one["scenario"] == zero["scenario"] and one["frame"] == zero["frame"]
        assert one["id"] != zero["id"] and one["text"] != zero["text"]


@pytest.mark.parametrize("concept", grammar.CONCEPTS)
def test_the_texts_of_a_pair_have_equal_length_and_end_in_the_same_two_words(concept):
    for one, zero in pairs(concept):
        assert len(words(one["text"])) == len(words(zero["text"]))
        assert words(one["text"])[-2:] == words(zero["text"])[-2:] == ["Reply", ":"]


@functools.cache
def swaps(concept: str) -> frozenset[tuple[str, str]]:
    """The words that change between the two texts of a pair, (label 1, label 0)."""
    return frozenset(
        (one_word, zero_word)
        for one, zero in pairs(concept, 100)
        for one_word, zero_word in zip(words(one["text"]), words(zero["text"]), strict=True)
        if one_word != zero_word
    )


@pytest.mark.parametrize("concept", grammar.CONCEPTS)
def test_the_words_that_change_in_a_pair_are_this_concepts_and_no_other_concepts(concept):
    assert len({word for word, _ in swaps(concept)}) >= 4
    for other in grammar.CONCEPTS:
        assert other == concept or not swaps(concept) & swaps(other)


def test_scenarios_are_independent_draws_that_do_not_depend_on_how_many_are_asked():
    few, many = grammar.stimuli_rows("weather", 5, 2), grammar.stimuli_rows("weather", 50, 2)
    assert many[: len(few)] == few
    texts = [row["text"] for row in many]
    assert len(set(texts)) == len(texts)
    assert len({row["frame"] for row in many}) > 10


def test_other_factors_are_balanced_over_the_scenarios_of_a_concept():
    texts = [one["text"] for one, _ in pairs("number", 400)]
    share = sum(" I felt " in f" {t}" or " felt " in t for t in texts) / len(texts)
    assert 0.4 < share < 0.6  # tense: 400 fair draws stay within four standard errors of one half


def test_the_eight_emotions_of_a_scenario_differ_only_in_valence_and_feeling_words():
    rows = grammar.stimuli_rows("emotion", 10, 0)
    assert [row["label"] for row in rows[:8]] == [
        f"{coarse}/{name}"
        for coarse, names in zip(("bad", "good"), grammar.EMOTIONS, strict=True)
        for name in names
    ]
    for start in range(0, len(rows), 8):
        group = [words(row["text"]) for row in rows[start : start + 8]]
        assert len({tuple(g) for g in group}) == 8
        differing = [i for i in range(len(group[0])) if len({g[i] for g in group[:4]}) > 1]
        assert len(differing) == 1


@pytest.mark.parametrize("concept", grammar.CONCEPTS)
def test_the_answers_of_a_readout_are_disjoint_words_of_the_vocabulary(concept):
    high, low = (set(answers) for answers in grammar.readout(concept)["answers"])
    assert high and low and not high & low
    assert {answer.strip() for answer in high | low} <= set(grammar.vocabulary())


def test_every_word_of_every_text_is_in_the_vocabulary():
    known = set(grammar.vocabulary())
    assert 400 <= len(known) <= 1000
    for text in [*grammar.training_texts(3000, 5), *grammar.neutral_texts(100, 5)]:
        assert set(words(text)) <= known


def test_an_unknown_concept_is_refused_by_name():
    with pytest.raises(InputError, match="'warmth'"):
        grammar.stimuli_rows("warmth", 3)
    with pytest.raises(InputError, match="'warmth'"):
        grammar.readout("warmth")


def test_the_shipped_tokenizer_knows_every_word_adds_one_bos_and_decodes_to_the_text():
    transformers = pytest.importorskip("transformers")
    for folder in PHANTOMS.glob("*/base"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        for text in grammar.training_texts(50, 6):
            ids = tokenizer(text)["input_ids"]
            assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("path", TRUTHS, ids=lambda path: path.name)
def test_a_truth_file_has_the_keys_of_the_contract_and_is_exactly_zero_before_its_block(path):
    truth = json.loads(path.read_text())
    assert set(truth) >= TRUTH_KEYS
    curve = {int(layer): value for layer, value in truth["attenuation_by_layer"].items()}
    config = json.loads((path.parent / "base" / "config.json").read_text())
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    assert sorted(curve) == list(range(-1, layers))
    if truth["layer"] is not None:
        for one in [truth["attenuation_by_layer"], *truth["other_concepts"].values()]:
            assert all(value == 0.0 for layer, value in one.items() if int(layer) < truth["layer"])
    if truth["keep_achieved"] is not None:
        assert abs(1 - curve[truth["layer"]] - truth["keep_achieved"]) < 1e-3
    # Where nothing is planted in a concept, the curve is that of the first target.
    assert set(truth["other_concepts"]) == set(grammar.CONCEPTS) - {truth["concept"] or grammar.TARGETS[0]}


def test_the_shipped_weights_stay_small():
    assert TRUTHS
    assert sum(path.stat().st_size for path in PHANTOMS.rglob("*.safetensors")) < 8e6
