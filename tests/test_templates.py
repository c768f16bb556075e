"""The template as a factor: six styles of chat template, all written here, on two tokenizers.

The styles are those of families people compare (where BOS stands, whether a system turn is taken, who begins, what closes a
turn, whether a turn is stripped); the wording of every tag is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHAT, WORDS, byte_tokenizer, rows, tiny_llama, word_tokenizer

from empathy_probes.batches import pad_tokens
from empathy_probes.concepts import Concept
from empathy_probes.design import Settings, design_study
from empathy_probes.errors import InputError
from empathy_probes.expression import couple
from empathy_probes.models import load_model
from empathy_probes.pairs import ModelPair, make_pair
from empathy_probes.prompts import RenderedPrompt, begins_with_bos, render
from empathy_probes.readouts import ask, ask_design, read_out
from empathy_probes.stimuli import StimulusSet, stimuli_from_rows
from empathy_probes.store import open_store

ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate, the user first') }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    # Header around the role, blank line, contents stripped.
    "llama3": "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
    # No system turn, user and model alternate, contents stripped.
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    + ALTERNATE
    + "{% for m in messages %}<|turn|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|eot|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>model\n{% endif %}",
    # A system turn of its own where none is given; its tokenizer has no BOS.
    "qwen": "{% if messages[0].role != 'system' %}<|im|>system\nthe old house .<|eot|>\n{% endif %}"
    "{% for m in messages %}<|im|>{{ m.role }}\n{{ m.content }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im|>assistant\n{% endif %}",
    # Brackets around the user, spaces around contents, EOS behind the assistant, alternating.
    "mistral": "{{ bos_token }}"
    + ALTERNATE
    + "{% for m in messages %}{% if m.role == 'user' %}<|inst|> {{ m.content }} <|/inst|>{% else %} {{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}",
    # EOS behind the assistant, a line end too unless it is the last turn.
    "olmo": "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% if not loop.last or m.role != 'assistant' %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    # No tags, and no BOS although the tokenizer has one.
    "plain": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
}  # fmt: skip
TAGS = (
    "<|head|>", "<|/head|>", "<|eot|>", "<|turn|>", "<|im|>", "<|inst|>", "<|/inst|>", "<|system|>", "<|user|>", "<|assistant|>",
)  # fmt: skip
TAKES_SYSTEM = {"llama3", "qwen", "olmo", "plain"}
USER_FIRST = {"gemma", "mistral"}
STRIPS = {"llama3", "gemma"}


def words(style: str) -> Any:
    """The word-level tokenizer under a template; the tags are tokens of its own."""
    tokenizer = word_tokenizer(TEMPLATES[style])
    tokenizer.add_special_tokens({"additional_special_tokens": list(TAGS)})
    return _without_bos(tokenizer) if style == "qwen" else tokenizer


def pieces(style: str) -> Any:
    """The byte-level tokenizer, to which every space and line end is something."""
    tokenizer = byte_tokenizer(TEMPLATES[style], TAGS)
    return _without_bos(tokenizer) if style == "qwen" else tokenizer


def _without_bos(tokenizer: Any) -> Any:
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.bos_token = None
    return tokenizer


@pytest.fixture(params=[words, pieces], ids=["words", "pieces"])
def tokenizers(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """A tokenizer for every style, of one kind."""
    return request.param


styles = pytest.mark.parametrize("style", TEMPLATES)
USER = {"role": "user", "content": "the man saw a red bird here"}
ASSISTANT = {"role": "assistant", "content": "the red bird was lost then"}
SYSTEM = {"role": "system", "content": "a very old house"}


def one(read: Any = "last", **content: Any) -> StimulusSet:
    """A stimulus set whose first text is about red and the second, in the same words, about blue."""

    def blue(value: Any) -> Any:
        if isinstance(value, list):
            return [blue(entry) for entry in value]
        if isinstance(value, dict):
            return {key: blue(entry) for key, entry in value.items()}
        return value.replace("red", "blue") if isinstance(value, str) else value

    lines = [
        {"id": str(y), "scenario": "s", "label": y, **(content if y else blue(content)), "read": read if y else blue(read)}
        for y in (1, 0)
    ]  # fmt: skip
    return stimuli_from_rows(lines, "c")


def first(tokenizer: Any, stimuli: StimulusSet, speaker: str = "user", style: Any = "chat") -> RenderedPrompt:
    return render(tokenizer, stimuli, style, speaker)[0]


def decoded(tokenizer: Any, prompt: RenderedPrompt) -> str:
    return str(tokenizer.decode([prompt.ids[i] for i in prompt.read])).strip()


def applied(tokenizer: Any, turns: list[dict[str, str]], ask: bool) -> str:
    """What the tokenizer's own template makes of turns, BOS put where a tokenizer that has one needs it."""
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask))
    missing = begins_with_bos(tokenizer) and not text.startswith(tokenizer.bos_token)
    return tokenizer.bos_token + text if missing else text


# ---------------------------------------------------------------- what is rendered


@styles
def test_a_prompt_is_what_the_tokenizers_own_template_says(
    style: str, tokenizers: Callable[[str], Any]
) -> None:
    tokenizer = tokenizers(style)
    prompt = first(tokenizer, one(text=USER["content"]))
    assert prompt.text == applied(tokenizer, [USER], True)
    assert list(prompt.ids) == tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    # The template's own encoding, where the template writes BOS itself.
    if style != "plain":
        own = tokenizer.apply_chat_template([USER], add_generation_prompt=True, tokenize=True)
        assert list(prompt.ids) == list(own["input_ids"] if hasattr(own, "keys") else own)


@styles
@pytest.mark.parametrize("rendering", ["raw", "chat"])
def test_there_is_exactly_one_bos_where_the_tokenizer_has_one(
    style: str, rendering: str, tokenizers: Callable[[str], Any]
) -> None:
    tokenizer = tokenizers(style)
    for content in ({"text": USER["content"]}, {"messages": [USER, ASSISTANT]}):
        prompt = first(tokenizer, one(**content), style=rendering)
        if style == "qwen":
            assert 1 not in prompt.ids and not begins_with_bos(tokenizer)
        else:
            assert prompt.ids[0] == 1 and prompt.ids.count(1) == 1


@styles
def test_a_system_turn_is_rendered_or_refused_in_one_sentence(
    style: str, tokenizers: Callable[[str], Any]
) -> None:
    tokenizer = tokenizers(style)
    stimuli = one(messages=[SYSTEM, USER])
    if style in TAKES_SYSTEM:
        prompt = first(tokenizer, stimuli)
        assert prompt.text == applied(tokenizer, [SYSTEM, USER], True) and SYSTEM["content"] in prompt.text
        spoken = first(tokenizer, one({"message": 0}, messages=[SYSTEM, USER]))
        assert decoded(tokenizer, spoken) in "house" and decoded(tokenizer, spoken)
    else:
        with pytest.raises(InputError, match=r"refuses the turns system, user \(.*\), expected turns it acc"):
            first(tokenizer, stimuli)


# ---------------------------------------------------------------- where it is read


@styles
@pytest.mark.parametrize("speaker", ["user", "third_person", "assistant"])
def test_a_span_is_read_at_its_own_tokens_whoever_speaks(
    style: str, speaker: str, tokenizers: Callable[[str], Any]
) -> None:
    tokenizer = tokenizers(style)
    stimuli = one({"span": "red bird"}, text=USER["content"])
    assert decoded(tokenizer, first(tokenizer, stimuli, speaker)) == "red bird"
    assert decoded(tokenizer, render(tokenizer, stimuli, "chat", speaker)[1]) == "blue bird"


def test_the_first_token_of_a_text_is_in_no_mean() -> None:
    """It is an attention sink where no BOS is before it, and would be all that the mean shows."""
    text = USER["content"]
    for tokenizer, first_read in ((words("olmo"), 1), (words("qwen"), 1)):
        (prompt, _) = render(tokenizer, one({"span": text}, text=text), "raw", "user")
        assert prompt.read[0] == first_read and prompt.read[-1] == len(prompt.ids) - 1
    alone = one({"span": text.split()[0]}, text=text)
    assert render(words("qwen"), alone, "raw", "user")[0].read == (0,)


@styles
@pytest.mark.parametrize(("turn", "span"), [(0, "a red bird"), (1, "red bird was lost")])
def test_a_span_is_found_in_the_turn_that_holds_it(
    style: str, turn: int, span: str, tokenizers: Callable[[str], Any]
) -> None:
    tokenizer = tokenizers(style)
    prompt = first(tokenizer, one({"span": span}, messages=[USER, ASSISTANT]))
    assert decoded(tokenizer, prompt) == span
    before = tokenizer.decode(list(prompt.ids[: prompt.read[0]]))
    assert ("saw" in before) and (USER["content"] in before) == (turn == 1)


@styles
@pytest.mark.parametrize(("turn", "word"), [(0, "here"), (1, "then"), (2, "here")])
def test_a_turn_is_read_at_the_last_token_of_its_own_words(
    style: str, turn: int, word: str, tokenizers: Callable[[str], Any]
) -> None:
    tokenizer = tokenizers(style)
    again = {
        "role": "user",
        "content": USER["content"],
    }  # the same words twice: the place decides, not the words
    prompt = first(tokenizer, one({"message": turn}, messages=[USER, ASSISTANT, again]))
    (place,) = prompt.read
    assert word.endswith(decoded(tokenizer, prompt)) and decoded(tokenizer, prompt)
    before = tokenizer.decode(list(prompt.ids[: place + 1])).rstrip()
    assert before.endswith(word) and before.count("saw") == (1 if turn < 2 else 2)


@styles
@pytest.mark.parametrize("outer", ["", "  "])
def test_outer_spaces_of_a_turn_move_no_place(
    style: str, outer: str, tokenizers: Callable[[str], Any]
) -> None:
    tokenizer = tokenizers(style)
    turns = [USER, {"role": "assistant", "content": outer + ASSISTANT["content"] + outer}]
    for read, found in (({"span": "bird was"}, "bird was"), ({"message": 1}, "then")):
        prompt = first(tokenizer, one(read, messages=turns))
        assert found.endswith(decoded(tokenizer, prompt)) and decoded(tokenizer, prompt)


@styles
def test_the_last_place_is_the_one_from_which_the_model_goes_on(
    style: str, tokenizers: Callable[[str], Any]
) -> None:
    tokenizer = tokenizers(style)
    asked = first(tokenizer, one(messages=[USER, ASSISTANT, USER]))
    assert asked.text == applied(tokenizer, [USER, ASSISTANT, USER], True)
    assert asked.read == (len(asked.ids) - 1,)
    spoken = first(tokenizer, one(messages=[USER, ASSISTANT]))
    assert spoken.text.endswith(ASSISTANT["content"]) and spoken.read == (len(spoken.ids) - 1,)
    assert spoken.read == first(tokenizer, one({"message": 1}, messages=[USER, ASSISTANT])).read


@styles
def test_the_assistant_alone_speaks_behind_an_empty_turn_where_the_user_must_begin(
    style: str, tokenizers: Callable[[str], Any]
) -> None:
    tokenizer = tokenizers(style)
    prompt = first(tokenizer, one(text=ASSISTANT["content"]), "assistant")
    turns = [{"role": "user", "content": ""}, ASSISTANT] if style in USER_FIRST else [ASSISTANT]
    whole = applied(tokenizer, turns, False)
    assert whole.startswith(prompt.text) and prompt.text.endswith(ASSISTANT["content"])


# ---------------------------------------------------------------- what is asked there


@styles
def test_what_is_asked_after_the_assistant_goes_on_within_its_turn(
    style: str, tokenizers: Callable[[str], Any]
) -> None:
    """Rendering the turn with the continuation in it gives the prompt, the continuation, and then the end of turn."""
    tokenizer = tokenizers(style)
    spec = {"continuations": [" and the dog met rain", " but not here"]}
    stimuli = one({"message": 1}, messages=[USER, ASSISTANT], readout=spec)
    prompts = render(tokenizer, stimuli, "chat", "assistant")
    asked = ask(tokenizer, stimuli, prompts, "chat")
    for side, continuation in zip((asked.expressive, asked.attenuated), spec["continuations"], strict=True):
        whole = {"role": "assistant", "content": ASSISTANT["content"] + continuation}
        text = applied(tokenizer, [USER, whole], False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        said = (*asked.prompts[0], *side[0])
        assert tuple(ids[: len(said)]) == said
        assert tokenizer.decode(list(side[0])).strip() == continuation.strip()
        # Something closes the turn, and it was not in what is asked.
        assert text != prompts[0].text + continuation


@styles
def test_what_is_asked_after_the_user_stands_behind_the_generation_prompt(
    style: str, tokenizers: Callable[[str], Any]
) -> None:
    tokenizer = tokenizers(style)
    stimuli = one(text=USER["content"], readout={"continuations": [" then the dog", " the cat"]})
    asked = ask(tokenizer, stimuli, render(tokenizer, stimuli, "chat", "user"), "chat")
    assert list(asked.prompts[0]) == tokenizer(applied(tokenizer, [USER], True), add_special_tokens=False)["input_ids"]  # fmt: skip


def chat_stimuli(n: int = 6) -> StimulusSet:
    """An assistant's turn that is asked to go on."""
    spec = {"continuations": [" and the old dog", " but no rain"]}
    made = []
    for row in rows(n):
        turns = [USER, {"role": "assistant", "content": row.pop("text")}]
        made.append({**row, "messages": turns, "read": {"message": 1}, "readout": spec})
    return stimuli_from_rows(made, "demo")


@styles
def test_a_readout_of_the_assistants_words_is_what_plain_forward_passes_say(style: str) -> None:
    model = load_model((tiny_llama(vocab_size=96, max_position_embeddings=128), words(style)), device="cpu")
    stimuli = chat_stimuli()
    prompts = render(model.tokenizer, stimuli, "chat", "assistant")
    found = read_out(model, ask(model.tokenizer, stimuli, prompts, "chat"))
    for item, value in zip(stimuli.items, found, strict=True):
        means = []
        for continuation in (" and the old dog", " but no rain"):
            own = item.messages[1].content
            ids = [
                model.tokenizer(
                    applied(model.tokenizer, [USER, {"role": "assistant", "content": text}], False),
                    add_special_tokens=False,
                )["input_ids"]
                for text in (own, own + continuation)
            ]
            # Where the two renderings part, the continuation begins; it is as long as its words.
            start = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), len(ids[0]))
            steps = range(start, start + len(continuation.split()))
            with torch.inference_mode():
                logs = model.run(pad_tokens([ids[1]])).logits[0].double().log_softmax(-1)
            means.append(np.mean([logs[i - 1, ids[1][i]].item() for i in steps]))
        # float32 through four small blocks, batched differently.
        np.testing.assert_allclose(value, means[0] - means[1], atol=5e-5)


# ---------------------------------------------------------------- both models


def pair_with(base: Any, aligned: Any) -> ModelPair:
    made = [
        load_model((tiny_llama(seed, vocab_size=96, max_position_embeddings=128), tokenizer), device="cpu", name=name)
        for seed, tokenizer, name in ((0, base, "base"), (1, aligned, "aligned"))
    ]  # fmt: skip
    return make_pair(*made)


def concept() -> Concept:
    spec = {"answers": [[" red"], [" blue"]]}
    stimuli = stimuli_from_rows([{**row, "readout": spec} for row in rows(40)], "demo")
    return Concept("demo", "target", "", "", "user", "", stimuli)


@styles
def test_it_works_when_only_the_aligned_tokenizer_has_a_template(style: str) -> None:
    bare = words(style)
    bare.chat_template = None
    pair = pair_with(bare, words(style))
    design = design_study(pair, [concept()], template="both")
    assert design.templates == ("raw", "shared") and design.flags == ()
    base, aligned = design.prompts["demo", "shared"]
    assert base == aligned and base[0].text == applied(pair.aligned.tokenizer, [{"role": "user", "content": concept().stimuli.items[0].text}], True)  # fmt: skip
    assert ask_design(design, concept(), "shared", 0) == ask_design(design, concept(), "shared", 1)
    with pytest.raises(InputError, match="tokenizer of base 'base' has none; use --template shared"):
        design_study(pair, [concept()], template="own")


def test_it_says_so_when_neither_tokenizer_has_a_template() -> None:
    pair = pair_with(word_tokenizer(), word_tokenizer())
    design = design_study(pair, [concept()], template="both")
    assert design.templates == ("raw",) and design.flags == ("no_chat_template",)
    with pytest.raises(InputError, match="tokenizer of aligned 'aligned' has none; use --template raw"):
        design_study(pair, [concept()], template="shared")


def test_a_template_of_the_base_alone_is_not_used() -> None:
    pair = pair_with(word_tokenizer(CHAT), word_tokenizer())
    assert design_study(pair, [concept()], template="both").templates == ("raw",)


@styles
def test_texts_of_the_assistant_can_be_measured_under_every_template(style: str) -> None:
    """Neutral texts are rendered in the assistant's voice too, also where it may not begin."""
    pair = pair_with(words(style), words(style))
    spoken = Concept("demo", "target", "", "", "assistant", "", chat_stimuli(40))
    neutral = [f"the {a} {b} was here ." for a in WORDS[18:26] for b in WORDS[2:9]]
    design = design_study(pair, [spoken], template="shared", neutral=neutral)
    for prompt, text in zip(
        design.prompts["neutral (last token of the text, assistant)", "shared"][0], neutral, strict=True
    ):
        (place,) = prompt.read
        assert decoded(pair.aligned.tokenizer, prompt) == "."
        assert pair.aligned.tokenizer.decode(list(prompt.ids[: place + 1])).rstrip().endswith(text)
    found = couple(design, Settings(draws=99), open_store("memory://templates"))
    assert np.isfinite(found.concepts[0].readouts).all()
