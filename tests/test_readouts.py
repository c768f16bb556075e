"""A readout is what plain forward passes say, whatever the batch, and only what was asked is computed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CHAT, rows, tiny_llama, word_tokenizer

from empathy_probes.batches import pad_tokens
from empathy_probes.errors import InputError
from empathy_probes.models import Model, load_model
from empathy_probes.prompts import Style, render
from empathy_probes.readouts import Asked, ask, check_length, neutral_losses, read_out, scenario_coupling
from empathy_probes.stimuli import ReadoutSpec, StimulusSet, stimuli_from_rows

ANSWERS = {"answers": [[" red", " green"], [" blue"]]}
CONTINUATIONS = {"continuations": [" the old dog saw rain", " a boat"]}
# float32 through four small blocks, batched differently.
CLOSE = {"atol": 5e-5}


def asking(readout: dict[str, object], n: int = 6) -> StimulusSet:
    return stimuli_from_rows([{**row, "readout": readout} for row in rows(n)], "demo")


def asked_of(model: Model, stimuli: StimulusSet, style: Style = "raw") -> Asked:
    prompts = render(model.tokenizer, stimuli, style, "user")
    asked = ask(model.tokenizer, stimuli, prompts, style)
    check_length(model, asked)
    return asked


def test_answers_are_logsumexp_of_the_expressive_minus_that_of_the_others(model: Model) -> None:
    stimuli = asking(ANSWERS)
    found = read_out(model, asked_of(model, stimuli))
    ids = [model.tokenizer.convert_tokens_to_ids(word) for word in ("red", "green", "blue")]
    for item, value in zip(stimuli.items, found, strict=True):
        with torch.inference_mode():
            logits = model.run([item.text]).logits[0, -1, ids].double()
        expected = logits[:2].logsumexp(0) - logits[2]
        np.testing.assert_allclose(value, expected, **CLOSE)


@pytest.mark.parametrize("packed", [True, False])
def test_continuations_are_mean_log_probabilities_per_token(
    model: Model, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed:
        monkeypatch.setitem(model.__dict__, "pack_refusal", "told not to")
    stimuli = asking(CONTINUATIONS)
    found = read_out(model, asked_of(model, stimuli))
    for item, value in zip(stimuli.items, found, strict=True):
        means = []
        start = len(model.tokenizer(item.text)["input_ids"])
        for words in CONTINUATIONS["continuations"]:
            ids = model.tokenizer(item.text + words, return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                logs = model.run(pad_tokens(ids.tolist())).logits[0].double().log_softmax(-1)
            steps = range(start, ids.shape[1])
            means.append(np.mean([logs[i - 1, ids[0, i]].item() for i in steps]))
        np.testing.assert_allclose(value, means[0] - means[1], **CLOSE)


@pytest.mark.parametrize("readout", [ANSWERS, CONTINUATIONS])
def test_company_order_and_batch_size_change_no_readout(model: Model, readout: dict[str, object]) -> None:
    stimuli = asking(readout)
    whole = read_out(model, asked_of(model, stimuli))
    back = read_out(model, asked_of(model, replace(stimuli, items=stimuli.items[::-1])))
    alone = np.concatenate(
        [read_out(model, asked_of(model, replace(stimuli, items=(item,)))) for item in stimuli.items]
    )
    np.testing.assert_allclose(back[::-1], whole, **CLOSE)
    # On contrasts too: an error common to all texts would cancel, one that depends on the company would not.
    np.testing.assert_allclose(scenario_coupling(alone, stimuli), scenario_coupling(whole, stimuli), **CLOSE)


def test_no_unembedding_of_a_position_that_is_not_asked(llama: Model) -> None:
    seen: list[int] = []
    handle = llama.bridge.unembed.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[0]))
    read_out(llama, asked_of(llama, asking(ANSWERS)))
    assert not seen
    read_out(llama, asked_of(llama, asking(CONTINUATIONS)))
    handle.remove()
    # Five tokens and two of every text; the first of both is predicted at the same position.
    assert sum(seen) == 12 * 6


def test_a_chat_prompt_is_asked_after_the_generation_prompt() -> None:
    model = load_model((tiny_llama(), word_tokenizer(CHAT)), device="cpu")
    stimuli = asking(ANSWERS)
    asked = asked_of(model, stimuli, "chat")
    assert all(model.tokenizer.decode(prompt).endswith("<model>") for prompt in asked.prompts)
    assert np.isfinite(read_out(model, asked)).all()


@pytest.mark.parametrize(
    ("readout", "message"),
    [
        ({"answers": [[" red dog"], [" blue"]]}, "' red dog' is 2 tokens.*'red', 'dog'"),
        ({"answers": [[" red"], ["  red"]]}, "both sets of answers contain the token 'red'"),
    ],
)
def test_an_answer_that_is_no_single_token_is_refused_with_its_split(
    llama: Model, readout: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        asked_of(llama, asking(readout))


def test_an_answer_that_changes_the_prompts_own_tokens_is_refused(llama: Model) -> None:
    stimuli = asking({"answers": [["dog"], [" blue"]]})
    joined = replace(stimuli, items=tuple(replace(item, text=item.text[:-2]) for item in stimuli.items))
    with pytest.raises(InputError, match="begin the answer with a space"):
        asked_of(llama, joined)


def test_texts_without_a_readout_or_with_two_kinds_are_refused(llama: Model) -> None:
    stimuli = asking(ANSWERS)
    spec = ReadoutSpec("continuations", (" red",), (" blue",))
    mixed = (replace(stimuli.items[0], readout=None), *stimuli.items[1:])
    with pytest.raises(InputError, match="None, answers"):
        asked_of(llama, replace(stimuli, items=mixed))
    mixed = (replace(stimuli.items[0], readout=spec), *stimuli.items[1:])
    with pytest.raises(InputError, match="answers, continuations"):
        asked_of(llama, replace(stimuli, items=mixed))


def test_neutral_losses_are_those_of_transformers(model: Model) -> None:
    token_rows = [[1, 8, 9, 20, 11], [1, 30, 31], [1, 40, 12, 13, 14, 15]]
    found = neutral_losses(model, token_rows)
    for row, loss in zip(token_rows, found, strict=True):
        ids = torch.tensor([row])
        with torch.inference_mode():
            logits = model.run(pad_tokens([row])).logits
        expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        np.testing.assert_allclose(loss, expected, atol=1e-5)


def test_categories_have_no_coupling() -> None:
    made = [{**row, "label": "ab"[row["label"]], "readout": ANSWERS} for row in rows(4)]
    stimuli = stimuli_from_rows(made, "demo")
    with pytest.raises(InputError, match="has categories"):
        scenario_coupling(np.zeros(8), stimuli)


def test_a_prompt_that_its_continuation_carries_beyond_the_context_is_refused(model: Model) -> None:
    """The prompt alone would fit."""
    longest = max(len(model.tokenizer(item.text)["input_ids"]) for item in asking(ANSWERS).items)
    words = " a" * (model.n_ctx - longest + 2)
    asked_of(model, asking({"continuations": [words[:-4], " a"]}))
    with pytest.raises(
        InputError, match=f"tokens with what is asked after it, expected at most {model.n_ctx}"
    ):
        asked_of(model, asking({"continuations": [words, " a"]}))
