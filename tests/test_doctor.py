"""The doctor: every law holds on whole models, and each one that is broken is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import CHAT, tiny_gpt2, tiny_llama, word_tokenizer

from empathy_probes import cli
from empathy_probes.batches import TokenBatch, pad_tokens
from empathy_probes.doctor import CHECKS, Checkup, examine, examine_model
from empathy_probes.errors import EmpathyProbesError
from empathy_probes.models import Model, load_model
from empathy_probes.sites import Site

NAMES = [
    "model",
    "bos",
    "padding",
    "dtype",
    "spans",
    "template",
    "hooks",
    "edits",
    "additivity",
    "replay",
    "packing",
]


def verdicts(found: Checkup) -> dict[str, str]:
    return {c.check: c.verdict for c in found.checks}


def words(found: Checkup, name: str) -> str:
    return next(c.words for c in found.checks if c.check == name)


def save(hf_model: Any, tokenizer: Any, folder: Path) -> Path:
    hf_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def knowing(tokenizer: Any) -> Any:
    """The same tokenizer with two of the doctor's own words, so that its span is not unknown text."""
    tokenizer.add_tokens(["red", "bird", "The", "A", "There", "by", "stood", "over", "again", "man", "saw"])
    return tokenizer


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_every_law_holds_on_a_whole_model(make: Any, tmp_path: Path) -> None:
    found = examine(save(make(), word_tokenizer(CHAT), tmp_path), device="cpu")
    assert [c.check for c in found.checks] == NAMES and len(CHECKS) == len(NAMES)
    seen = verdicts(found)
    assert {name for name in NAMES if seen[name] != "ok"} <= {
        "spans",
        "template",
    }  # its words are unknown ones
    assert list(found.to_frame().columns) == ["check", "verdict", "words"]
    assert all("\n" not in c.words for c in found.checks)


def test_a_checkup_leaves_the_model_as_it_was(llama: Model) -> None:
    batch = llama.tokenize(["the old man saw a red bird ."])
    before = llama.run(batch).logits
    examine_model(llama)
    assert torch.equal(llama.run(batch).logits, before)


def test_spans_and_template_are_found_where_the_words_are_known(tmp_path: Path) -> None:
    tokenizer = knowing(word_tokenizer(CHAT))
    found = examine((tiny_llama(vocab_size=80), tokenizer), device="cpu")
    assert found.verdict == "ok" and "2 tokens" in words(found, "template")
    plain = examine((tiny_llama(vocab_size=80), knowing(word_tokenizer())), device="cpu")
    assert verdicts(plain)["template"] == "warn" and plain.verdict == "warn"


@pytest.mark.parametrize("family", ["Gemma2", "Olmo2"])
def test_post_norm_blocks_cannot_be_attributed_and_can_be_measured(family: str) -> None:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    found = examine((getattr(transformers, f"{family}ForCausalLM")(config), word_tokenizer()), device="cpu")
    seen = verdicts(found)
    assert seen["additivity"] == "warn" and "attribution" in words(found, "additivity")
    assert seen["padding"] == seen["hooks"] == seen["replay"] == "ok"


def test_a_tokenizer_without_bos_or_with_an_unused_one_is_said() -> None:
    tokenizer = word_tokenizer()
    tokenizer.bos_token = None
    assert "has no BOS" in words(examine((tiny_llama(), tokenizer), device="cpu"), "bos")
    other = word_tokenizer()
    other.bos_token = "<user>"
    assert "stands 0 times" in words(examine((tiny_llama(), other), device="cpu"), "bos")


def test_padding_that_changes_contrasts_fails(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(*args: Any, **options: Any) -> TokenBatch:
        batch = pad_tokens(*args, **options)
        return TokenBatch(batch.ids, torch.ones_like(batch.mask), batch.start)

    monkeypatch.setattr("empathy_probes.doctor.pad_tokens", unmasked)
    found = examine_model(llama)
    assert verdicts(found)["padding"] == "fail" and "padding on the left" in words(found, "padding")
    assert found.verdict == "fail"


def test_numbers_that_are_not_finite_fail() -> None:
    broken = tiny_llama(3)
    broken.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("inf")
    found = examine((broken, word_tokenizer()), device="cpu")
    assert verdicts(found)["dtype"] == "fail" and "after block 2" in words(found, "dtype")


def test_half_precision_on_a_cpu_is_said_to_be_slow() -> None:
    found = examine((tiny_llama(), word_tokenizer()), dtype="float16", device="cpu")
    assert verdicts(found)["dtype"] == "warn" and "--dtype float32" in words(found, "dtype")
    assert verdicts(found)["padding"] == "ok"


def test_a_place_that_is_not_there_and_an_edit_that_is_not_heard_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_model((tiny_llama(4), word_tokenizer()), device="cpu")
    plain = Model.run

    def blind(self: Model, prompts: Any, read: Any = (), write: Any = None, **options: Any) -> Any:
        if any(site.component == "resid_mid" for site in read):
            raise EmpathyProbesError("no such place")
        return plain(
            self,
            prompts,
            read,
            {s: e for s, e in (write or {}).items() if s.component != "mlp_out"},
            **options,
        )

    monkeypatch.setattr(Model, "run", blind)
    found = examine_model(model)
    assert verdicts(found)["hooks"] == "warn" and "no resid_mid" in words(found, "hooks")
    assert verdicts(found)["edits"] == "fail" and "emptying mlp_out" in words(found, "edits")


def test_the_command_prints_one_verdict_line_per_check(tmp_path: Path, capsys: Any) -> None:
    folder = str(save(tiny_llama(vocab_size=80), knowing(word_tokenizer(CHAT)), tmp_path))
    assert cli.main(["doctor", folder, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == NAMES and {line.split()[0] for line in lines} == {"ok"}
    assert cli.main(["doctor", folder, "--device", "cpu", "--dtype", "bfloat16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == "ok" and "bfloat16" in told["checks"][3]["words"]
    assert cli.main(["doctor", str(tmp_path / "nowhere")]) == 2
    assert "no model at" in capsys.readouterr().err
    assert cli.main(["doctor"]) == 2


def test_site_widths_are_what_is_read_there(model: Model) -> None:
    for component in ("z", "mlp_out"):
        read = model.run(["a dog ."], [Site(1, component)]).acts[Site(1, component)]
        assert read.shape[-1] == model.width(component)


def test_parallel_blocks_are_examined_and_what_they_lack_is_named() -> None:
    """Pythia's architecture: attention and MLP read the same state."""
    config = transformers.GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    found = examine_model(
        load_model((transformers.GPTNeoXForCausalLM(config).eval(), word_tokenizer()), device="cpu")
    )
    assert verdicts(found)["hooks"] == "warn" and "there is no resid_mid" in words(found, "hooks")
    assert verdicts(found)["edits"] == "ok"
