"""Extraction against the loop people write by hand, on the same texts and weights, in one process.

The loop is plain transformers: batches of 8 in file order, `output_hidden_states=True`, the last token of each
row picked afterwards, logits computed because nothing stops them. Ours sorts by length, fills batches to a token
budget, pools inside the read and never runs the unembedding. Both give every layer's residual stream at the
last token (the loop's last entry is after the final norm and is left out). Prints seconds, the ratio, and how far
the two results are apart.

    python scripts/benchmarks/extraction.py [--device cuda] [--d-model 512] [--layers 8] [--texts 512]
"""

from __future__ import annotations

import argparse
import copy
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from empathy_probes.extraction import plan_extraction
from empathy_probes.models import load_model
from empathy_probes.phantoms import write_phantom
from empathy_probes.prompts import RenderedPrompt


def make_prompts(n: int, vocabulary: int, seed: int) -> list[RenderedPrompt]:
    """Token ids with the length distribution of short texts: most 10 to 60 tokens, a few 200."""
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.lognormal(3.4, 0.6, n).astype(int), 6, 200)
    rows = [tuple(int(i) for i in generator.integers(5, vocabulary, length)) for length in lengths]
    return [RenderedPrompt(f"text-{i}", "", row, (len(row) - 1,)) for i, row in enumerate(rows)]


def by_hand(model: LlamaForCausalLM, prompts: list[RenderedPrompt], device: str) -> np.ndarray:
    """`[n layer d_model]` as a careful notebook would do it."""
    kept = []
    for start in range(0, len(prompts), 8):
        rows = [list(prompt.ids) for prompt in prompts[start : start + 8]]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        with torch.inference_mode():
            states = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        kept.append(
            torch.stack([h[torch.arange(len(rows)), last] for h in states[:-1]], 1).float().cpu().numpy()
        )
    return np.concatenate(kept)


def main() -> None:
    """Time both, alternating, best of `--repeats`."""
    import tempfile

    from transformers import AutoTokenizer

    from empathy_probes.extraction import extract
    from empathy_probes.store import Store

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.d_model, intermediate_size=args.d_model * 8 // 3,
        num_hidden_layers=args.layers, num_attention_heads=args.d_model // 64, num_key_value_heads=args.d_model // 64,
    )  # fmt: skip
    hf_model = LlamaForCausalLM(config).eval().to(getattr(torch, args.dtype))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(write_phantom("planted-valence", folder) / "base")
    model = load_model((copy.deepcopy(hf_model), tokenizer), device=args.device, copy=False)
    hf_model = hf_model.to(args.device)
    prompts = make_prompts(args.texts, args.vocabulary, seed=0)
    plan = plan_extraction(prompts, args.layers + 1, args.d_model)
    layers = (-1, *range(args.layers - 1))

    seconds: dict[str, list[float]] = {"by hand": [], "ours": []}
    for repeat in range(args.repeats + 1):  # the first round warms both up
        for name in seconds:
            started = time.perf_counter()
            if name == "ours":
                store = Store(f"memory://benchmark-{repeat}")
                ours = extract(model, prompts, ["resid_post"], layers, store)["resid_post"].acts
            else:
                theirs = by_hand(hf_model, prompts, args.device)
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    best = {name: min(times) for name, times in seconds.items()}
    apart = float(np.abs(ours - theirs).max() / np.abs(theirs).std())
    print(
        f"{args.texts} texts, {plan.n_tokens} tokens, {args.layers} layers × {args.d_model}, {args.dtype}, {args.device}"
    )
    for name, time_taken in best.items():
        print(f"{name:<8} {time_taken:8.3f} s   {plan.n_tokens / time_taken:12.0f} tokens/s")
    print(
        f"ratio    {best['by hand'] / best['ours']:8.2f}   largest difference {apart:.1e} of the activations' spread"
    )


if __name__ == "__main__":
    main()
