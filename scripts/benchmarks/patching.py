"""Patching sweeps against TransformerLens's helper and against the loop people write by hand, in one process.

On a random model of GPT-2 small's shape (12 layers, d 768, vocabulary 50257):

1. residual stream, every layer × every position, one pair of prompts, a logit difference: `get_act_patch_resid_pre` runs
   the whole model once per cell; ours starts each cell at its layer, all cells travelling through the blocks together.
2. residual stream at the last token, every layer, a difference of two continuations' mean log-probability: by hand,
   one full forward pass per layer and continuation over the same batch of prompts; ours runs both continuations in
   one row, from the layer on.

Prints seconds of the process's own CPU time (medians of alternating rounds; on one thread that is what the wall clock shows
on an idle machine, and other programs do not change it; on a GPU the wall clock's), ratios with their range and that of
the wall clock, and how far the two results are apart.

    python scripts/benchmarks/patching.py [--device cuda] [--repeats 3] [--tokens 12] [--prompt 32] [--pairs 2]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from transformer_lens import patching as helpers
from transformers import GPT2Config, GPT2LMHeadModel

from empathy_probes.batches import pad_tokens
from empathy_probes.models import Model, load_model
from empathy_probes.readouts import Asked
from empathy_probes.sites import Site
from empathy_probes.stimuli import stimuli_from_rows
from empathy_probes.sweeps import make_cells, patched_readouts
from empathy_probes.textpairs import TextPairs, pair_texts


def gpt2_small(device: str) -> Model:
    """Random weights, and a tokenizer that is never asked."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    inner = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<eos>", eos_token="<eos>")
    return load_model((GPT2LMHeadModel(GPT2Config()).eval(), tokenizer), device=device, copy=False)


def make_pairs(n: int, tokens: int, kind: str, continuation: int = 6) -> TextPairs:
    """Pairs of random prompts that differ in their middle third, with one answer a side or one continuation a side."""
    generator = np.random.default_rng(0)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(int(i) for i in generator.integers(5, 50000, length))

    prompts = []
    for _ in range(n):
        start, end = draw(tokens // 3), draw(tokens - tokens // 3 * 2)
        prompts += [(*start, *draw(tokens // 3), *end) for _ in range(2)]
    every = range(2 * n)
    length = 1 if kind == "answers" else continuation
    sides = [[draw(length)] * (2 * n) for _ in range(2)]
    asked = Asked(
        "random", kind, tuple(map(str, every)), tuple(prompts), tuple((tokens - 1,) for _ in every),
        tuple(sides[0]), tuple(sides[1]),
    )  # fmt: skip
    rows = [{"id": f"{i}", "scenario": f"{i // 2}", "text": f"{i}", "label": 1 - i % 2} for i in every]
    return pair_texts(asked, stimuli_from_rows(rows, "random"))


def ids(model: Model, pairs: TextPairs, items: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([pairs.asked.prompts[i] for i in items], device=model.device)


def helper_sweep(model: Model, pairs: TextPairs) -> np.ndarray:
    """`[layer pos]` mean logit difference by TransformerLens."""
    good, bad = pairs.asked.expressive[0][0], pairs.asked.attenuated[0][0]
    with torch.inference_mode():
        _, cache = model.bridge.run_with_cache(
            ids(model, pairs, pairs.clean),
            names_filter=lambda name: name.endswith("hook_resid_pre") or name.endswith("hook_in"),
        )
        return helpers.get_act_patch_resid_pre(
            model.bridge, ids(model, pairs, pairs.corrupted), cache, lambda logits: (logits[:, -1, good] - logits[:, -1, bad]).mean()
        ).cpu().numpy()  # fmt: skip


def our_sweep(model: Model, pairs: TextPairs) -> np.ndarray:
    """The same; TransformerLens's resid_pre of a layer is the state after the block before."""
    tokens = pairs.lengths[0][0]
    sites = [Site(layer) for layer in range(-1, model.n_layers - 1)]
    cells = make_cells(model, sites, [str(i) for i in range(tokens)])
    return patched_readouts(model, pairs, cells, "denoise")[1].mean(-1).reshape(-1, tokens)


def layers_by_hand(model: Model, pairs: TextPairs) -> np.ndarray:
    """`[layer pair]` by full forward passes with a hook each, both continuations of all prompts batched."""
    asked, n = pairs.asked, model.n_layers
    found = np.zeros((n, len(pairs.clean)))
    end = len(asked.prompts[0]) - 1
    with torch.inference_mode():
        _, cache = model.bridge.run_with_cache(ids(model, pairs, pairs.clean))
        for layer in range(n):
            for side, sign in ((asked.expressive, 1), (asked.attenuated, -1)):
                rows = pad_tokens([(*asked.prompts[i], *side[i]) for i in pairs.corrupted], model.device).ids

                def put(state: torch.Tensor, hook: object, layer: int = layer) -> torch.Tensor:
                    state = state.clone()
                    state[:, end] = cache["resid_post", layer][:, end]
                    return state

                logits = model.bridge.run_with_hooks(
                    rows, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", put)]
                )
                logp = logits[:, end:-1].log_softmax(-1).gather(-1, rows[:, end + 1 :, None])[..., 0].mean(-1)
                found[layer] += sign * logp.cpu().numpy()
    return found


def our_layers(model: Model, pairs: TextPairs) -> np.ndarray:
    """The same."""
    cells = make_cells(model, [Site(layer) for layer in range(model.n_layers)], ["last"])
    return patched_readouts(model, pairs, cells, "denoise")[1]


def main() -> None:
    """Time each pair of ways, alternating."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=12, help="of a prompt in the layer × position sweep")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt in the sweep over layers")
    parser.add_argument("--pairs", type=int, default=2, help="in the larger of two batches")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = gpt2_small(args.device)
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    print(
        f"{platform.machine()} {platform.processor() or platform.system()}, {os.cpu_count()} cores, {args.threads} thread(s), "
        f"torch {torch.__version__}; {model.n_layers} layers × {model.d_model}, vocabulary {model.d_vocab}, float32, {args.device}"
    )
    cases = []
    for n in (1, args.pairs):
        grid, spoken = make_pairs(n, args.tokens, "answers"), make_pairs(n, args.prompt, "continuations", 4)
        cases += [
            (f"layer × position, {n} × {args.tokens} tokens", helper_sweep, our_sweep, grid),
            (
                f"layers, two continuations, {n} × {args.prompt} + 4 tokens",
                layers_by_hand,
                our_layers,
                spoken,
            ),
        ]
    for title, theirs, ours, pairs in cases:
        seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
        walls: dict[str, list[float]] = {"theirs": [], "ours": []}
        for repeat in range(args.repeats + 1):  # the first round warms both up
            for name, way in (("theirs", theirs), ("ours", ours)):
                started, wall = clock(), time.perf_counter()
                result = way(model, pairs)
                if repeat:
                    seconds[name].append(clock() - started)
                    walls[name].append(time.perf_counter() - wall)
                if name == "theirs":
                    expected = result
        median = {name: statistics.median(times) for name, times in seconds.items()}
        ratios = sorted(a / b for a, b in zip(seconds["theirs"], seconds["ours"], strict=True))
        apart = float(np.abs(result - expected).max())
        print(
            f"{title:<50} theirs {median['theirs']:7.3f} s   ours {median['ours']:7.3f} s   ratio "
            f"{median['theirs'] / median['ours']:5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}; wall {statistics.median(walls['theirs']) / statistics.median(walls['ours']):.2f})   apart {apart:.1e} nats",
            flush=True,
        )


if __name__ == "__main__":
    main()
