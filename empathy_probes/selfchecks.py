"""What a model cannot be trusted with, found out by running one small batch; each says why, or None."""

from __future__ import annotations

import torch
from torch import Tensor

from empathy_probes.batches import pack_tokens, pad_tokens
from empathy_probes.errors import EmpathyProbesError
from empathy_probes.models import Model
from empathy_probes.sites import HEADS, Site


def replay_refusal(model: Model) -> str | None:
    """Why `replay` cannot be trusted for this model; None where one batch showed it equal to a forward pass."""
    texts = [[(7 * i + 3) % model.d_vocab for i in range(length)] for length in (6, 4)]
    batch = pad_tokens(texts, model.device)
    last = Site(model.n_layers - 1)
    state = Site((model.n_layers - 1) // 2 if model.n_layers > 1 else -1)
    try:
        with torch.inference_mode():
            whole = model.run(batch, read=[state], capture=True)
            again = model.replay(whole, whole.acts[state], after=state.layer, read=[last])
            rows = torch.arange(min(3, model.d_vocab), device=model.device).expand(len(batch.ids), -1)
            some = model.head_rows(again.acts[last][:, 0], rows)
    except (RuntimeError, TypeError, AttributeError, LookupError, EmpathyProbesError) as error:
        return f"continuing from block {state.layer} fails ({type(error).__name__}: {error})"
    assert whole.logits is not None and again.logits is not None
    real = batch.mask.bool()
    miss = (whole.logits[real].float() - again.logits[real].float()).abs().max().item()
    miss = max(miss, (whole.logits[:, 0, : some.shape[1]].float() - some.float()).abs().max().item())
    scale = whole.logits[real].float().std().item()
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-6}.get(whole.logits.dtype, 3e-2) * max(scale, 1e-6)
    if miss <= tolerance:
        return None
    return f"continuing from block {state.layer} misses the plain forward pass by {miss:.2g} logits"


def pack_refusal(model: Model) -> str | None:
    """Why two continuations cannot share a row with their prompt in this model; None where one batch showed they can."""
    window = model.config.get("sliding_window")
    if window is not None and model.config.get("use_sliding_window", True):
        return f"its attention has a window of {window} tokens"
    prompt = [(7 * i + 3) % model.d_vocab for i in range(5)]
    first, second = ([(5 * i + k) % model.d_vocab for i in range(2 + k)] for k in (0, 1))
    last = Site(model.n_layers - 1)
    batches = (
        pack_tokens([(prompt, first, second)], model.device),
        pad_tokens([[*prompt, *first]], model.device),
        pad_tokens([[*prompt, *second]], model.device),
    )
    try:
        with torch.inference_mode():
            both, *alone = (
                model.run(batch, [last], last_layer=last.layer).acts[last][0] for batch in batches
            )
    except (
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        EmpathyProbesError,
    ) as error:
        return f"running them fails ({type(error).__name__}: {error})"
    start = len(prompt) + len(first)
    miss = max(
        (both[:start] - alone[0]).float().abs().max().item(),
        (both[start:] - alone[1][len(prompt) :]).float().abs().max().item(),
    )
    scale = alone[0].float().std().item()
    tolerance = {"float32": 1e-4, "float64": 1e-6}.get(model.dtype, 3e-2) * max(scale, 1e-6)
    return None if miss <= tolerance else f"they miss what each alone gives by {miss:.2g}"


def additivity_refusal(model: Model) -> str | None:
    """Why the residual stream is not the sum of what embedding, heads and MLPs write; None where one batch showed it is.

    Post-norm blocks (Gemma 2 and 3, OLMo 2) normalise what attention made of all heads before it is added: no head
    has a write of its own there.
    """
    texts = [[(7 * i + 3) % model.d_vocab for i in range(length)] for length in (6, 4)]
    batch = pad_tokens(texts, model.device)
    real, layers = batch.mask.bool(), range(model.n_layers)
    parts = [Site(layer, c) for layer in layers for c in ("attn_out", "mlp_out", HEADS)]
    try:
        with torch.inference_mode():
            sites = [*(Site(layer) for layer in range(-1, model.n_layers)), *parts]
            acts = {
                site: found[real].float()
                for site, found in model.run(batch, sites, last_layer=model.n_layers - 1).acts.items()
            }
            heads = []
            for layer in layers:
                weight, bias = model.attention_output(layer)
                made = acts[Site(layer, HEADS)] @ weight.float()
                heads.append(made if bias is None else made + bias.float())
    except (RuntimeError, TypeError, AttributeError, LookupError, EmpathyProbesError) as error:
        return f"its components cannot be read ({type(error).__name__}: {error})"
    tolerance = {"float32": 1e-4, "float64": 1e-4}.get(model.dtype, 3e-2)
    for layer in layers:
        attention, mlp = acts[Site(layer, "attn_out")], acts[Site(layer, "mlp_out")]
        miss = _relative_miss(acts[Site(layer - 1)] + attention + mlp, acts[Site(layer)])
        if miss > tolerance:
            return f"what attention and MLP of block {layer} write misses what the block adds to the stream by {miss:.1%}"
        miss = _relative_miss(heads[layer], attention)
        if miss > tolerance:
            return (
                f"the heads of block {layer} together miss what its attention writes by {miss:.0%}: they are normalised or "
                "scaled together before they are added"
            )
    return None


def _relative_miss(got: Tensor, wanted: Tensor) -> float:
    """Largest difference, each relative to the value wanted there and the usual size of all of them."""
    return ((got - wanted).abs() / (wanted.abs() + wanted.std().clamp(min=1e-12))).max().item()
