"""The run primitive: reading changes nothing, edits are exact, nothing is left behind."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import CHAT, MAKERS, tiny_llama, word_tokenizer
from safetensors.torch import load_file, save_file

from empathy_probes.batches import Pool, pack_tokens, pad_tokens
from empathy_probes.errors import EmpathyProbesError, InputError
from empathy_probes.interventions import (
    add_values,
    add_vector,
    at_positions,
    mean_ablate,
    project_out,
    replace_component,
    replace_with,
)
from empathy_probes.models import Model, load_model
from empathy_probes.pairs import load_pair, make_pair
from empathy_probes.prompts import render_texts
from empathy_probes.sites import COMPONENTS, Site

TEXTS = ["the old man saw a red bird .", "a dog .", "there was rain and then the sun was very large ."]
# float32 through four small blocks, batched differently.
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def hooks_left(model: Model) -> int:
    count = 0
    for module in model.bridge.modules():
        count += len(module._forward_hooks) + len(module._forward_pre_hooks)
        count += len(getattr(module, "fwd_hooks", []))
    return count


def all_sites(model: Model) -> list[Site]:
    return [Site(-1), *(Site(layer, c) for layer in range(model.n_layers) for c in COMPONENTS)]


def test_logits_equal_a_plain_transformers_forward(model: Model) -> None:
    shape = "gpt2" if "GPT2" in model.architecture else "llama"
    reference = MAKERS[shape]()
    batch = model.tokenize(TEXTS[:1])
    with torch.inference_mode():
        expected = reference(batch.ids).logits
        got = model.run(batch).logits
    assert got is not None
    torch.testing.assert_close(got, expected, **CLOSE)


def test_reading_changes_nothing_and_leaves_no_hook(model: Model) -> None:
    before = hooks_left(model)
    plain = model.run(TEXTS).logits
    read = model.run(TEXTS, read=all_sites(model)).logits
    assert torch.equal(plain, read)
    assert hooks_left(model) == before


def test_residual_sites_add_up(model: Model) -> None:
    acts = model.run(TEXTS, read=all_sites(model)).acts
    for layer in range(model.n_layers):
        site = {c: acts[Site(layer, c)] for c in COMPONENTS}
        torch.testing.assert_close(site["resid_pre"] + site["attn_out"], site["resid_mid"], **CLOSE)
        torch.testing.assert_close(site["resid_mid"] + site["mlp_out"], site["resid_post"], **CLOSE)
        assert torch.equal(site["resid_pre"], acts[Site(layer - 1)])


def test_stopping_early_reads_the_same_and_never_reaches_the_unembedding(model: Model) -> None:
    ran = []
    handle = model.bridge.unembed.register_forward_hook(lambda *_: ran.append(1))
    whole = model.run(TEXTS, read=[Site(1)])
    assert ran
    ran.clear()
    stopped = model.run(TEXTS, read=[Site(1)], last_layer=1)
    last = model.run(TEXTS, read=[Site(model.n_layers - 1)], last_layer=model.n_layers - 1)
    handle.remove()
    assert not ran and stopped.logits is None and last.logits is None
    assert torch.equal(stopped.acts[Site(1)], whole.acts[Site(1)])


@pytest.mark.parametrize("component", COMPONENTS)
def test_writing_what_was_read_changes_nothing(model: Model, component: str) -> None:
    site = Site(2, component)
    plain = model.run(TEXTS, read=[site])
    again = model.run(TEXTS, write={site: replace_with(plain.acts[site])})
    torch.testing.assert_close(again.logits, plain.logits, **CLOSE)


@pytest.mark.parametrize("component", ["resid_pre", "resid_mid", "resid_post"])
def test_replacing_a_whole_residual_stream_moves_the_run_to_the_other_prompt(
    model: Model, component: str
) -> None:
    site = Site(2, component)
    one, other = ["the man saw a red bird ."], ["the cat met the old dog ."]
    donor = model.run(other, read=[site])
    moved = model.run(one, write={site: replace_with(donor.acts[site])})
    torch.testing.assert_close(moved.logits, donor.logits, **CLOSE)


def test_a_zero_dose_changes_nothing(model: Model) -> None:
    vector = torch.ones(model.d_model)
    edits = {Site(layer, c): add_vector(vector, 0.0) for layer in range(4) for c in ("resid_pre", "mlp_out")}
    assert torch.equal(model.run(TEXTS, write=edits).logits, model.run(TEXTS).logits)


def test_an_exception_inside_an_edit_leaves_no_hook_and_the_same_model(model: Model) -> None:
    before, plain = hooks_left(model), model.run(TEXTS).logits

    def broken(acts: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken edit")

    with pytest.raises(RuntimeError, match="broken edit"):
        model.run(TEXTS, read=[Site(0)], write={Site(1): broken}, last_layer=2)
    assert hooks_left(model) == before
    assert torch.equal(model.run(TEXTS).logits, plain)


def test_an_edit_never_touches_what_was_read_before_it(model: Model) -> None:
    plain = model.run(TEXTS, read=[Site(0)])

    def in_place(acts: torch.Tensor) -> torch.Tensor:
        acts += 100.0
        return acts

    edited = model.run(TEXTS, read=[Site(0)], write={Site(1, "resid_pre"): in_place})
    assert torch.equal(edited.acts[Site(0)], plain.acts[Site(0)])


def test_a_block_or_head_beyond_the_run_is_refused_to_reads_and_edits(llama: Model) -> None:
    nudge = add_vector(torch.ones(llama.d_model), 1.0)
    with pytest.raises(InputError, match="outside the layers"):
        llama.run(TEXTS, write={Site(9): nudge})
    with pytest.raises(InputError, match="outside the layers"):
        llama.run(TEXTS, read=[Site(3)], last_layer=1)
    with pytest.raises(InputError, match="a block has 4 heads, expected 0 to 3"):
        llama.run(TEXTS, read=[Site(1, "z", head=4)])
    with pytest.raises(InputError, match="a block has 4 heads, expected 0 to 3"), \
            llama.editing({Site(1, "z", head=4): nudge}):  # fmt: skip
        pass


def without_block(layer: int) -> Model:
    """A tiny Llama pruned by depth: one block hands its input on, and nothing inside it runs."""
    pruned = tiny_llama()
    pruned.model.layers[layer].forward = lambda hidden_states, *args, **options: hidden_states
    return load_model((pruned, word_tokenizer()), device="cpu")


@pytest.mark.parametrize("component", ["resid_mid", "attn_out", "mlp_out", "z"])
def test_a_place_that_no_state_passes_is_an_error_to_reads_and_edits(component: str) -> None:
    model, site = without_block(2), Site(2, component)
    before, plain = hooks_left(model), model.run(TEXTS, read=[Site(1)], capture=True)
    edit = {site: add_vector(torch.ones(model.width(component)), 1.0)}
    unread = re.escape(f"{site} never fired in 'LlamaForCausalLM'") + ".*this architecture has no such place"
    with pytest.raises(EmpathyProbesError, match=f"^{unread}"):
        model.run(TEXTS, read=[Site(1), site])
    with pytest.raises(EmpathyProbesError, match=f"^{unread}"):
        model.replay(plain, plain.acts[Site(1)], 1, read=[site])
    with pytest.raises(EmpathyProbesError, match=f"^the edit at {unread}"):
        model.run(TEXTS, write=edit)
    with pytest.raises(EmpathyProbesError, match=f"^the edit at {unread}"), model.editing(edit):
        model.run(TEXTS)
    # What stands around the block is there, and nothing is left behind.
    around = model.run(TEXTS, read=[Site(1), Site(2)]).acts
    assert torch.equal(around[Site(2)], around[Site(1)])
    assert hooks_left(model) == before and torch.equal(model.run(TEXTS).logits, plain.logits)


@pytest.mark.parametrize("how", ["read", "write"])
def test_parallel_blocks_have_no_place_between_attention_and_mlp(how: str) -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.GPTNeoXForCausalLM(config).eval()
    model, site = load_model((made, word_tokenizer()), device="cpu"), Site(1, "resid_mid")
    asked: dict[str, Any] = {"read": [site]} if how == "read" else {"write": {site: lambda acts: acts + 1}}
    with pytest.raises(EmpathyProbesError, match="no such place"):
        model.run(TEXTS, **asked)


@pytest.mark.parametrize("after", [-1, 0, 2])
def test_replay_from_a_state_equals_the_whole_run(model: Model, after: int) -> None:
    whole = model.run(TEXTS, read=[Site(after), Site(3, "attn_out")], capture=True)
    again = model.replay(whole, whole.acts[Site(after)], after, read=[Site(3, "attn_out")])
    mask = model.tokenize(TEXTS).mask.bool()
    torch.testing.assert_close(again.logits[mask], whole.logits[mask], **CLOSE)
    torch.testing.assert_close(
        again.acts[Site(3, "attn_out")][mask], whole.acts[Site(3, "attn_out")][mask], **CLOSE
    )


def test_replay_carries_a_batch_that_is_a_multiple_of_the_captured_one(model: Model) -> None:
    batch = model.tokenize(TEXTS)
    whole = model.run(batch, read=[Site(1)], capture=True)
    state = whole.acts[Site(1)].repeat(3, 1, 1)
    again = model.replay(whole, state, 1)
    mask = batch.mask.bool()
    for copy in again.logits.chunk(3):
        torch.testing.assert_close(copy[mask], whole.logits[mask], **CLOSE)


def test_replay_accepts_an_edit_and_stops_early(model: Model) -> None:
    edit = {Site(2): project_out(torch.arange(model.d_model, dtype=torch.float32))}
    whole = model.run(TEXTS, read=[Site(0)], capture=True)
    direct = model.run(TEXTS, write=edit, read=[Site(3)])
    again = model.replay(whole, whole.acts[Site(0)], 0, read=[Site(3)], write=edit, last_layer=3)
    mask = model.tokenize(TEXTS).mask.bool()
    torch.testing.assert_close(again.acts[Site(3)][mask], direct.acts[Site(3)][mask], **CLOSE)
    assert again.logits is None


def test_the_self_check_trusts_these_architectures(model: Model) -> None:
    assert model.replay_refusal is None


def test_the_self_check_refuses_a_model_whose_suffix_differs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        Model, "_unembed", lambda self, state: 2 * self.bridge.unembed(self.bridge.ln_final(state))
    )
    broken = load_model((tiny_llama(3), word_tokenizer()), device="cpu")
    assert "misses the plain forward pass" in str(broken.replay_refusal)
    assert "not continued from a state" in caplog.text


@pytest.mark.parametrize(
    ("family", "centres"),
    [("Olmo2", False), ("Olmo3", False), ("Gemma2", False), ("Qwen3", False), ("Olmo", True), ("OPT", True)],
)
def test_the_norm_that_runs_decides_whether_activations_are_centred(family: str, centres: bool) -> None:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    loaded = load_model(
        (getattr(transformers, f"{family}ForCausalLM")(config), word_tokenizer()), device="cpu"
    )
    assert loaded.centres is centres and loaded.replay_refusal is None
    assert loaded.run(TEXTS, read=[Site(1)], last_layer=1).acts[Site(1)].shape[0] == len(TEXTS)


def test_float16_on_a_cpu_is_slow_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    load_model((tiny_llama(), word_tokenizer()), dtype="float16", device="cpu")
    assert "--dtype float32" in caplog.text


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def of_another_width(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 32', '"hidden_size": 48'))


def with_a_list_for_a_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def with_half_a_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:20])


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (without_a_tensor, "lacks 1 tensors, for example model.layers.1.mlp.up_proj.weight"),
        (cut_short, "cannot load a model"),
        (of_another_width, "cannot load a model"),
        (with_a_list_for_a_config, "config.json' is no model configuration .got a list"),
        (with_half_a_config, "config.json' is no model configuration .Expecting value"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_and_never_filled_with_noise(
    tmp_path: Path, break_it: Callable[[Path], None], expected: str
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    break_it(tmp_path)
    with pytest.raises(InputError, match=expected) as caught:
        load_model(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


class _Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code that came with the weights ran",)


@pytest.mark.parametrize("harm", [False, True])
def test_weights_in_a_pickle_are_read_as_numbers_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: bool
) -> None:
    hf_model = tiny_llama()
    hf_model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(
        {**hf_model.state_dict(), **({"harm": _Harm()} if harm else {})}, tmp_path / "pytorch_model.bin"
    )
    if harm:
        with pytest.raises(InputError, match="holds more than numbers") as caught:
            load_model(tmp_path, device="cpu")
        assert "\n" not in str(caught.value) and "ran" not in capsys.readouterr().out
    else:
        same = load_model((hf_model, word_tokenizer()), device="cpu")
        assert load_model(tmp_path, device="cpu").fingerprint == same.fingerprint


@pytest.mark.parametrize("device", ["bogus", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(device: str) -> None:
    with pytest.raises(InputError, match=f"device '{device}' cannot be used"):
        load_model("/no/such/model", device=device)


@pytest.mark.parametrize("left", [False, True])
def test_padding_side_and_company_change_no_activation(model: Model, left: bool) -> None:
    token_rows = [prompt.ids for prompt in render_texts(model.tokenizer, TEXTS)]
    assert len({len(row) for row in token_rows}) == len(token_rows)
    batch = pad_tokens(token_rows, left=left)
    pool = Pool.of([[len(row) - 1] for row in token_rows], batch)
    together = model.run(batch, read=[Site(3)], pool=pool).acts[Site(3)]
    for row, pooled in zip(token_rows, together, strict=True):
        alone = model.run(pad_tokens([row]), read=[Site(3)]).acts[Site(3)][0, -1]
        torch.testing.assert_close(pooled, alone, **CLOSE)


def test_pooling_inside_the_read_equals_pooling_outside(model: Model) -> None:
    batch = model.tokenize(TEXTS)
    read = [[0, 2, 3], [1], [4, 5]]
    outside = model.run(batch, read=[Site(2)]).acts[Site(2)]
    inside = model.run(batch, read=[Site(2)], pool=Pool.of(read, batch)).acts[Site(2)]
    expected = torch.stack([outside[i, positions].mean(0) for i, positions in enumerate(read)])
    torch.testing.assert_close(inside, expected, atol=1e-6, rtol=1e-5)


def test_edits_are_pure_functions_of_a_tensor() -> None:
    acts, vector = torch.randn(2, 3, 8), torch.randn(8)
    kept = acts.clone()
    once = project_out(vector)(acts)
    torch.testing.assert_close(project_out(vector)(once), once)
    torch.testing.assert_close(once @ vector, torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(add_vector(vector, 2.0)(acts), acts + 2 * vector)
    assert torch.equal(add_values(kept)(acts), 2 * acts)
    other = torch.randn(2, 3, 8)
    mixed = replace_component(other, vector)(acts)
    torch.testing.assert_close(mixed @ vector, other @ vector, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(project_out(vector)(mixed), once, atol=1e-5, rtol=1e-4)
    assert torch.equal(mean_ablate(vector)(acts)[1, 2], vector)
    there = at_positions(mean_ablate(vector), [0, 2])(acts)
    assert torch.equal(there[0, 1], acts[0, 1]) and torch.equal(there[1, 2], vector)
    assert torch.equal(acts, kept)


def test_loading_leaves_the_callers_model_and_tokenizer_as_they_were() -> None:
    mine, tokenizer = tiny_llama(1), word_tokenizer(CHAT)
    keys = list(mine.state_dict())
    loaded = load_model((mine, tokenizer), device="cpu")
    assert list(mine.state_dict()) == keys
    assert loaded.tokenizer.chat_template == CHAT
    assert len(loaded.tokenizer("the man")["input_ids"]) == 3  # one BOS


def test_a_saved_checkpoint_loads_offline_and_has_the_same_weights(tmp_path: Path) -> None:
    mine = tiny_llama(1)
    mine.save_pretrained(tmp_path / "m")
    word_tokenizer().save_pretrained(tmp_path / "m")
    loaded = load_model(tmp_path / "m", device="cpu")
    assert loaded.weights == load_model((mine, word_tokenizer()), device="cpu").weights
    assert load_model(tmp_path / "m", dtype="bfloat16", device="cpu").dtype == "bfloat16"


def test_fingerprints_change_with_weights_configuration_and_dtype() -> None:
    prints = [
        load_model((tiny_llama(seed, **changes), word_tokenizer()), dtype=dtype, device="cpu").fingerprint
        for seed, changes, dtype in (
            (0, {}, None),
            (1, {}, None),
            (0, {"rms_norm_eps": 1e-3}, None),
            (0, {}, "bfloat16"),
        )
    ]
    assert len(set(prints)) == 4


def pair_of(base: Any, aligned: Any, **options: Any) -> Any:
    return load_pair((base, word_tokenizer()), (aligned, word_tokenizer()), device="cpu", **options)


@pytest.mark.parametrize(
    ("aligned", "what"),
    [
        ({"num_hidden_layers": 3}, "number of blocks"),
        ({"hidden_size": 64}, "d_model"),
        ({"vocab_size": 20}, "vocabulary"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused_naming_both_sides(
    aligned: dict[str, Any], what: str
) -> None:
    with pytest.raises(InputError, match=f"{what}.*base 'LlamaForCausalLM'.*aligned 'LlamaForCausalLM'"):
        pair_of(tiny_llama(0), tiny_llama(1, **aligned))


def test_another_architecture_or_dtype_is_refused(llama: Model) -> None:
    gpt2 = load_model((MAKERS["gpt2"](), word_tokenizer()), device="cpu")
    with pytest.raises(InputError, match="architecture"):
        make_pair(llama, gpt2)
    half = load_model((tiny_llama(1), word_tokenizer()), dtype="bfloat16", device="cpu")
    with pytest.raises(InputError, match="dtype"):
        make_pair(llama, half)


def test_vocabularies_may_differ_in_added_specials_and_padding_rows_only() -> None:
    wider = word_tokenizer()
    wider.add_special_tokens({"additional_special_tokens": ["<user>", "<model>", "<end>", "<tool>"]})
    pair = load_pair((tiny_llama(0), word_tokenizer()), (tiny_llama(1, vocab_size=72), wider), device="cpu")
    assert pair.aligned.d_vocab == 72
    swapped = word_tokenizer()
    swapped._tokenizer = type(swapped._tokenizer).from_str(
        swapped._tokenizer.to_str()
        .replace('"red":', '"X":')
        .replace('"blue":', '"red":')
        .replace('"X":', '"blue":')
    )
    with pytest.raises(InputError, match="2 tokens differ"):
        load_pair((tiny_llama(0), word_tokenizer()), (tiny_llama(1), swapped), device="cpu")


def test_identical_models_are_refused_unless_allowed() -> None:
    with pytest.raises(InputError, match="identical weights"):
        pair_of(tiny_llama(0), tiny_llama(0))
    assert pair_of(tiny_llama(0), tiny_llama(0), allow_identical=True).identical


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "nobody/no-such-model-anywhere"])
def test_an_unknown_model_is_one_sentence(path: str) -> None:
    with pytest.raises(InputError) as caught:
        load_model(path)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_makes_the_aligned_side(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny_llama(0)
    base.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    torch.manual_seed(5)
    tuned = get_peft_model(tiny_llama(0), LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "lora")
    pair = load_pair(str(tmp_path / "base"), adapter=tmp_path / "lora", device="cpu")
    merged = tuned.merge_and_unload()
    batch = pair.aligned.tokenize(TEXTS[:1])
    with torch.inference_mode():
        torch.testing.assert_close(pair.aligned.run(batch).logits, merged(batch.ids).logits, **CLOSE)
    assert not pair.identical and pair.aligned.template_digest is None
    word_tokenizer(CHAT).save_pretrained(tmp_path / "lora")
    assert load_pair(str(tmp_path / "base"), adapter=tmp_path / "lora", device="cpu").aligned.template_digest
    with pytest.raises(InputError, match="no adapter folder"):
        load_pair(str(tmp_path / "base"), adapter=tmp_path / "base", device="cpu")


# ---------------------------------------------------------------- heads, packed rows, edits that stay, generation


def test_one_head_is_its_slice_of_all_heads_and_what_is_written_there_stays_there(model: Model) -> None:
    whole, one = Site(1, "z"), Site(1, "z", head=2)
    run = model.run(TEXTS, read=[whole, one])
    mine = slice(2 * model.d_head, 3 * model.d_head)
    assert torch.equal(run.acts[one], run.acts[whole][..., mine])
    edited = model.run(TEXTS, read=[whole], write={one: lambda z: z * 0}).acts[whole]
    expected = run.acts[whole].clone()
    expected[..., mine] = 0
    assert torch.equal(edited, expected)
    with pytest.raises(InputError, match="a block has 4 heads"):
        model.run(TEXTS, read=[Site(1, "z", head=4)])
    with pytest.raises(InputError, match="only `z` has them"):
        Site(1, "attn_out", head=0)


def test_two_continuations_in_one_row_are_what_each_is_alone(model: Model) -> None:
    packed = [([1, 7, 8, 9, 10], [11, 12, 13], [14]), ([1, 20], [], [21, 22]), ([1, 30, 31], [], [])]
    assert model.pack_refusal is None
    got = model.run(pack_tokens(packed), read=[Site(1)], capture=True)
    again = model.replay(got, got.acts[Site(1)], 1)
    for i, (prompt, first, second) in enumerate(packed):
        start = len(prompt) + len(first)
        behind = [*range(len(prompt)), *range(start, start + len(second))]
        for tail, places in ((first, list(range(start))), (second, behind)):
            alone = model.run(pad_tokens([[*prompt, *tail]])).logits
            torch.testing.assert_close(got.logits[i, places], alone[0], **CLOSE)
            torch.testing.assert_close(again.logits[i, places], alone[0], **CLOSE)


def test_a_model_that_cannot_pack_says_why() -> None:
    narrow = transformers.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    loaded = load_model((transformers.MistralForCausalLM(narrow), word_tokenizer()), device="cpu")
    assert "window of 8 tokens" in str(loaded.pack_refusal)


def test_edits_that_stay_equal_edits_of_one_run_may_be_nested_and_leave_nothing(model: Model) -> None:
    before, vector = hooks_left(model), torch.ones(model.d_model)
    plain = model.run(TEXTS).logits
    with model.editing({Site(1): add_vector(vector, 3.0)}):
        with model.editing({Site(2, "resid_mid"): add_vector(vector, -2.0)}):
            nested = model.run(TEXTS).logits
        outer = model.run(TEXTS).logits
    both = {Site(1): add_vector(vector, 3.0), Site(2, "resid_mid"): add_vector(vector, -2.0)}
    assert torch.equal(nested, model.run(TEXTS, write=both).logits)
    assert torch.equal(outer, model.run(TEXTS, write={Site(1): add_vector(vector, 3.0)}).logits)
    with pytest.raises(RuntimeError, match="mine"), model.editing({Site(1): add_vector(vector, 3.0)}):
        raise RuntimeError("mine")
    assert hooks_left(model) == before
    assert torch.equal(model.run(TEXTS).logits, plain)


def test_what_the_model_itself_computes_can_be_had_under_edits_that_stay(model: Model) -> None:
    plain, edits = model.run(TEXTS).logits, {Site(1): add_vector(torch.ones(model.d_model), 3.0)}
    with model.editing(edits):
        with model.unedited():
            assert torch.equal(model.run(TEXTS).logits, plain)
        assert not torch.equal(model.run(TEXTS).logits, plain)
    # What was passed over was not edited.
    with pytest.raises(EmpathyProbesError, match="never fired"), model.editing(edits), model.unedited():
        model.run(TEXTS)


def test_an_edit_that_stayed_but_never_fired_is_an_error(llama: Model) -> None:
    edits = {Site(1): add_vector(torch.ones(llama.d_model), 1.0)}
    nothing_ran = "got no run of this model that reaches the chosen positions of that layer"
    other = load_model((tiny_llama(1), word_tokenizer()), device="cpu")
    with pytest.raises(EmpathyProbesError, match=nothing_ran), llama.editing(edits):
        other.run(TEXTS)
    with pytest.raises(EmpathyProbesError, match=nothing_ran), llama.editing(edits):
        llama.run(TEXTS, read=[Site(0)], last_layer=0)
    with (
        pytest.raises(EmpathyProbesError, match="reaches the chosen"),
        llama.editing(edits, where=lambda positions: positions > 40),
    ):
        llama.run(TEXTS)
    with (
        pytest.raises(InputError, match="outside the layers"),
        llama.editing({Site(7): add_vector(torch.ones(llama.d_model), 1.0)}),
    ):
        pass


@pytest.mark.parametrize("left", [False, True])
def test_edits_of_chosen_positions_count_from_each_rows_first_token(model: Model, left: bool) -> None:
    batch = pad_tokens([prompt.ids for prompt in render_texts(model.tokenizer, TEXTS)], left=left)
    edits = {Site(1): add_vector(torch.ones(model.d_model), 3.0)}
    with model.editing(edits, where=lambda positions: positions == 2):
        got = model.run(batch, read=[Site(1)]).acts[Site(1)]
        captured = model.run(batch, read=[Site(0)], capture=True)
        again = model.replay(captured, captured.acts[Site(0)].repeat(2, 1, 1), 0, read=[Site(1)]).acts[
            Site(1)
        ]
    plain = model.run(batch, read=[Site(1)]).acts[Site(1)]
    moved = (got - plain).abs().sum(-1) > 1e-3
    expected = torch.zeros_like(moved)
    expected[torch.arange(len(TEXTS)), batch.start + 2] = True
    assert torch.equal(moved & batch.mask.bool(), expected & batch.mask.bool())
    torch.testing.assert_close(again, got.repeat(2, 1, 1), **CLOSE)


def continued_by_hand(model: Model, prompt: str, vector: torch.Tensor, first: int) -> str:
    """Greedy continuation by plain transformers: a hook of one's own, one text at a time, no cache, no padding."""
    shape = "gpt2" if "GPT2" in model.architecture else "llama"
    reference = MAKERS[shape]()

    def add(_module: Any, _args: Any, out: Any) -> Any:
        state = (out[0] if isinstance(out, tuple) else out).clone()
        state[:, first:] += vector
        return (state, *out[1:]) if isinstance(out, tuple) else state

    block = (reference.transformer.h if shape == "gpt2" else reference.model.layers)[1]
    block.register_forward_hook(add)
    ids = start = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(6):
        with torch.inference_mode():
            ids = torch.cat([ids, reference(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
        if ids[0, -1] == model.tokenizer.eos_token_id:
            break
    return model.tokenizer.decode(ids[0, start.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("first", [0, 4])
def test_generation_under_an_edit_equals_transformers_with_a_hook_of_ones_own(
    model: Model, first: int
) -> None:
    prompts = ["the old man saw a", "a red dog"]
    vector = torch.linspace(-2, 2, model.d_model)
    expected = [continued_by_hand(model, prompt, vector, first) for prompt in prompts]
    with model.editing({Site(1): add_vector(vector, 1.0)}, where=lambda positions: positions >= first):
        for cache in (True, False):
            assert model.generate_batch(prompts, max_new_tokens=6, cache=cache) == expected
        assert [model.generate(prompt, max_new_tokens=6) for prompt in prompts] == expected
    assert model.generate_batch(prompts, max_new_tokens=6) != expected


def test_sampling_follows_the_seed_and_leaves_the_global_stream_alone(llama: Model) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn = [llama.generate("the man", temperature=2.0, seed=seed, max_new_tokens=8) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.rand(3), expected)
    for wrong in ({"template": "chat"}, {"template": "x"}, {"max_new_tokens": 100}):
        with pytest.raises(InputError):
            llama.generate("the man", **wrong)


def test_heads_through_the_output_projection_are_what_attention_writes(model: Model) -> None:
    assert model.additivity_refusal is None
    for layer in range(model.n_layers):
        heads, whole = Site(layer, "z"), Site(layer, "attn_out")
        acts = model.run(TEXTS, read=[heads, whole]).acts
        weight, bias = model.attention_output(layer)
        assert weight.shape == (model.width("z"), model.d_model)
        made = acts[heads] @ weight + (0 if bias is None else bias)
        torch.testing.assert_close(made, acts[whole], **CLOSE)


def test_a_block_that_scales_what_it_writes_is_not_additive_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model((tiny_llama(2), word_tokenizer()), device="cpu")
    plain = Model.attention_output
    monkeypatch.setattr(Model, "attention_output", lambda self, layer: (2 * plain(self, layer)[0], None))
    assert "heads of block 0 together miss what its attention writes" in str(model.additivity_refusal)
