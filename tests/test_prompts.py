"""Rendering: one BOS, spans where they are, chat templates through the tokenizer itself."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import CHAT, word_tokenizer

from empathy_probes.errors import InputError
from empathy_probes.prompts import render
from empathy_probes.stimuli import StimulusSet, stimuli_from_rows


def make(read: Any = "last", **content: Any) -> StimulusSet:
    lines = []
    for label, word in ((1, "red"), (0, "blue")):
        filled = {
            key: value.replace("COLOUR", word)
            if isinstance(value, str)
            else [{**turn, "content": turn["content"].replace("COLOUR", word)} for turn in value]
            for key, value in content.items()
        }
        place = (
            {"span": read["span"].replace("COLOUR", word)}
            if isinstance(read, dict) and "span" in read
            else read
        )
        lines.append({"id": str(label), "scenario": "s", "label": label, "read": place, **filled})
    return stimuli_from_rows(lines, "c")


def decoded(tokenizer: Any, prompt: Any) -> str:
    return tokenizer.decode([prompt.ids[i] for i in prompt.read])


TURNS = [
    {"role": "user", "content": "the man saw a COLOUR bird"},
    {"role": "assistant", "content": "the bird was COLOUR then"},
]


def test_raw_text_has_one_bos_and_is_read_at_its_last_token() -> None:
    tokenizer = word_tokenizer()
    one, _ = render(tokenizer, make(text="the man saw a COLOUR bird"), "raw", "user")
    assert one.ids[0] == 1 and one.ids.count(1) == 1
    assert decoded(tokenizer, one) == "bird"


@pytest.mark.parametrize("style", ["raw", "chat"])
def test_a_span_is_read_at_its_own_tokens(style: Any) -> None:
    tokenizer = word_tokenizer(CHAT)
    one, other = render(
        tokenizer, make({"span": "COLOUR bird"}, text="the man saw a COLOUR bird here"), style, "user"
    )
    assert (decoded(tokenizer, one), decoded(tokenizer, other)) == ("red bird", "blue bird")


@pytest.mark.parametrize("style", ["raw", "chat"])
def test_a_span_that_its_spaces_make_unique_is_not_found_in_a_longer_word(style: Any) -> None:
    tokenizer = word_tokenizer(CHAT)
    # "a" stands in "saw" and "was" too; with its spaces it stands once.
    one, _ = render(tokenizer, make({"span": " a "}, text=" man saw a COLOUR was"), style, "user")
    assert decoded(tokenizer, one) == "a" and tokenizer.decode([one.ids[one.read[0] - 1]]) == "saw"


@pytest.mark.parametrize("style", ["raw", "chat"])
@pytest.mark.parametrize(("message", "word"), [(0, "bird"), (1, "then")])
def test_a_message_is_read_at_the_last_token_of_its_content(style: Any, message: int, word: str) -> None:
    tokenizer = word_tokenizer(CHAT)
    one, _ = render(tokenizer, make({"message": message}, messages=TURNS), style, "user")
    assert decoded(tokenizer, one) == word


def test_a_turn_is_found_where_it_stands_and_not_where_the_template_says_the_same() -> None:
    tokenizer = word_tokenizer(CHAT.replace("' <model> '", "' <model> red blue '"))
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "COLOUR"}]
    for one in render(tokenizer, make({"message": 1}, messages=turns), "chat", "user"):
        # <bos> <user> red <end> <model> red blue COLOUR <end>
        assert one.read == (7,)


def test_a_chat_prompt_ends_with_the_generation_prompt_or_with_the_assistants_own_words() -> None:
    tokenizer = word_tokenizer(CHAT)
    plain, _ = render(tokenizer, make(text="a COLOUR dog"), "chat", "user")
    assert plain.text.endswith("<end> <model>") and decoded(tokenizer, plain) == "<model>"
    spoken, _ = render(tokenizer, make(messages=TURNS), "chat", "user")
    assert spoken.text.endswith("red then") and decoded(tokenizer, spoken) == "then"
    assert plain.ids.count(1) == 1


def test_the_speaker_decides_the_role_of_a_plain_text() -> None:
    tokenizer = word_tokenizer(CHAT)
    (as_user, _), (as_model, _) = (
        render(tokenizer, make(text="a COLOUR dog"), "chat", s) for s in ("third_person", "assistant")
    )
    assert "<user> a red" in as_user.text and "<model> a red" in as_model.text


def test_two_bos_are_refused() -> None:
    with pytest.raises(InputError, match="BOS stands twice"):
        render(word_tokenizer(), make(text="<bos> a COLOUR dog"), "raw", "user")
    with pytest.raises(InputError, match="BOS stands twice"):
        render(word_tokenizer("{{ bos_token }} " + CHAT), make(text="a COLOUR dog"), "chat", "user")


def test_a_template_that_refuses_the_turns_is_one_sentence() -> None:
    tokenizer = word_tokenizer("{{ raise_exception('no assistant first') }}")
    with pytest.raises(InputError, match="refuses the turns user"):
        render(tokenizer, make(text="a COLOUR dog"), "chat", "user")


def test_a_template_that_rewrites_content_is_noticed() -> None:
    tokenizer = word_tokenizer(CHAT.replace("m.content", "m.content | upper"))
    with pytest.raises(InputError, match="cannot be located"):
        render(tokenizer, make({"span": "COLOUR"}, text="a COLOUR dog"), "chat", "user")


def test_an_appended_end_token_is_dropped_from_raw_text() -> None:
    from tokenizers import processors

    tokenizer = word_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    one, _ = render(tokenizer, make(text="a COLOUR dog"), "raw", "user")
    assert decoded(tokenizer, one) == "dog" and 2 not in one.ids
