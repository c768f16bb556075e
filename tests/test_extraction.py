"""Extraction: nothing depends on batching, everything is cached by content, interruption loses nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import stimuli, tiny_llama, word_tokenizer

from empathy_probes import extraction
from empathy_probes.activations import Activations
from empathy_probes.coding import scenario_contrasts
from empathy_probes.errors import InputError, NonFiniteError
from empathy_probes.extraction import check_prompts, extract, plan_extraction, request_key
from empathy_probes.models import Model, load_model
from empathy_probes.prompts import RenderedPrompt, render
from empathy_probes.stimuli import StimulusSet
from empathy_probes.store import Store

LAYERS = (-1, 0, 1, 2, 3)


def prompts_of(model: Model, texts: StimulusSet) -> tuple[RenderedPrompt, ...]:
    return render(model.tokenizer, texts, "raw", "user")


def run(model: Model, store: Store, prompts: Any, **options: Any) -> Activations:
    return extract(model, prompts, ["resid_post"], LAYERS, store, **options)["resid_post"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def test_the_plan_covers_every_prompt_once_within_its_budget(llama: Model) -> None:
    prompts = prompts_of(llama, stimuli(30))
    plan = plan_extraction(prompts, 5, 32, budget=64)
    assert sorted(i for batch in plan.batches for i in batch) == list(range(60))
    assert all(max(len(prompts[i].ids) for i in b) * len(b) <= 64 for b in plan.batches)
    assert plan.size == 60 * 5 * 32 * 4
    assert plan.n_tokens == sum(len(p.ids) for p in prompts) <= plan.n_padded


@pytest.mark.parametrize("budget", [1, 40, 100000])
def test_batch_size_and_order_change_no_contrast(model: Model, tmp_path: Path, budget: int) -> None:
    texts = stimuli(20)
    prompts = prompts_of(model, texts)
    whole = run(model, Store(str(tmp_path / "a")), prompts)
    other = run(model, Store(str(tmp_path / "b")), prompts[::-1], budget=budget)
    contrast = scenario_contrasts(whole.normalised, texts)[0]
    again = scenario_contrasts(replace(other, acts=other.acts[::-1]).normalised, texts)[0]
    # Directions of contrasts, not raw activations: those agree to 0.9999 even when contrasts are ruined.
    norms = np.linalg.norm(contrast, axis=-1), np.linalg.norm(again, axis=-1)
    live = norms[0] > 1e-3  # the embedding of the shared last token is the same for both labels
    assert live[:, 1:].all()
    assert np.all((contrast * again).sum(-1)[live] > (1 - 1e-5) * (norms[0] * norms[1])[live])


def test_the_same_request_again_runs_nothing(
    llama: Model, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(llama, stimuli(10))
    first = run(llama, store, prompts)
    monkeypatch.setattr(Model, "run", lambda *a, **k: pytest.fail("the model ran again"))
    assert np.array_equal(run(llama, store, prompts).acts, first.acts)


@pytest.mark.parametrize("change", ["weight", "config", "tokenizer", "text", "read", "layers", "component"])
def test_a_changed_input_is_another_request(llama: Model, change: str) -> None:
    prompts = prompts_of(llama, stimuli(4))
    before = request_key(llama, prompts, "resid_post", LAYERS)
    model, layers, component = llama, LAYERS, "resid_post"
    if change == "weight":
        changed = tiny_llama()
        changed.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
        model = load_model((changed, word_tokenizer()), device="cpu")
    elif change == "config":
        model = load_model((tiny_llama(rms_norm_eps=1e-3), word_tokenizer()), device="cpu")
    elif change == "tokenizer":
        other = word_tokenizer()
        other.add_tokens(["<new>"])
        model = load_model((tiny_llama(), other), device="cpu")
    elif change == "text":
        prompts = prompts_of(llama, stimuli(4, seed=1))
    elif change == "read":
        prompts = (replace(prompts[0], read=(1,)), *prompts[1:])
    elif change == "layers":
        layers = (0, 1)
    else:
        component = "mlp_out"
    assert request_key(model, prompts, component, layers) != before
    again = load_model((tiny_llama(), word_tokenizer()), device="cpu")
    assert request_key(again, prompts_of(again, stimuli(4)), "resid_post", LAYERS) == before


def test_an_interrupted_extraction_goes_on_and_ends_with_the_same_bytes(
    llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(llama, stimuli(30))
    monkeypatch.setattr(extraction, "PART_SECONDS", 0.0)
    whole, store = Store(str(tmp_path / "whole")), Store(str(tmp_path / "cut"))
    run(llama, whole, prompts, budget=64)
    real, ran = extraction._run_batch, []

    def dies_after_three(*args: Any) -> np.ndarray:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(1)
        return real(*args)

    monkeypatch.setattr(extraction, "_run_batch", dies_after_three)
    with pytest.raises(KeyboardInterrupt):
        run(llama, store, prompts, budget=64)
    assert store.info().parts == 3 and store.info().entries == 0
    left = []
    monkeypatch.setattr(extraction, "_run_batch", lambda *args: left.append(1) or real(*args))
    run(llama, store, prompts, budget=64)
    assert len(left) == len(plan_extraction(prompts, 5, 32, 64).batches) - 3
    key = request_key(llama, prompts, "resid_post", LAYERS)
    files = [Path(s.url) / f"{key}.safetensors" for s in (whole, store)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert store.info().parts == 0


def test_running_out_of_memory_halves_the_batch(
    llama: Model, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(llama, stimuli(10))
    expected = run(llama, store, prompts).acts
    real, sizes = Model.run, []

    def scarce(self: Model, batch: Any, **options: Any) -> Any:
        sizes.append(len(batch.ids))
        if len(batch.ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, **options)

    monkeypatch.setattr(Model, "run", scarce)
    store.clear()
    np.testing.assert_allclose(run(llama, store, prompts).acts, expected, atol=2e-5, rtol=1e-4)
    assert max(sizes) > 3
    monkeypatch.setattr(
        Model, "run", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    )
    store.clear()
    with pytest.raises(InputError, match=r"alone.*does not fit"):
        run(llama, store, prompts)


def test_nan_is_an_error_that_names_model_layer_and_item(store: Store) -> None:
    broken = tiny_llama()
    broken.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    model = load_model((broken, word_tokenizer()), device="cpu", name="broken model")
    with pytest.raises(NonFiniteError, match=r"'broken model' gave NaN.*layer=2.*item 'demo-"):
        run(model, store, prompts_of(model, stimuli(4)))
    assert store.info().entries == 0


def test_a_text_longer_than_the_context_is_named(llama: Model) -> None:
    long = RenderedPrompt("item-7", "x", tuple([3] * 65), (64,))
    with pytest.raises(InputError, match=r"item 'item-7' has 65 tokens, expected at most 64"):
        check_prompts(llama, [long], "demo")
    with pytest.raises(InputError, match="token id 64"):
        check_prompts(llama, [RenderedPrompt("item-8", "x", (1, 64), (1,))], "demo")


def test_memory_holds_pooled_rows_only(llama: Model, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[int, ...]] = []
    real = Model.run

    def watched(self: Model, *args: Any, **options: Any) -> Any:
        result = real(self, *args, **options)
        kept.extend(tuple(acts.shape) for acts in result.acts.values())
        return result

    monkeypatch.setattr(Model, "run", watched)
    run(llama, store, prompts_of(llama, stimuli(6)))
    assert kept and all(len(shape) == 2 for shape in kept)
