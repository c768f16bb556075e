"""Train the shipped phantoms: a base model on the grammar and twins in which one concept is attenuated.

    python scripts/build_phantoms.py [--out DIR] [--only base planted-valence ...] [--steps N] [--quick]

One command, one thread, fixed seeds: the same machine gives the same bytes. A twin is trained at one block
only, so that its output equals the base's output with the concept's component scaled; it is stored as the
tensors of that block, and its truth is measured on fresh scenarios, not assumed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from empathy_probes import grammar

DATA = Path(__file__).resolve().parents[1] / "empathy_probes" / "data" / "phantoms"
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
PAD, UNK, BOS, EOS = range(4)
LEARNING_RATE = 3e-3
TWIN_STEPS = 800
TRUTH_SEED = 1000
SPAN = 3  # directions of a concept beyond the read position's that a planted block scales as well
READ_WEIGHT, GUARD_WEIGHT = 8.0, 5.0  # how much more the read position and the concepts' directions count


# ---------------------------------------------------------------- what is built


@dataclass(frozen=True)
class Family:
    """One architecture: how the base is made and trained."""

    make: Callable[[int], PreTrainedModel]
    """Vocabulary size to a model with fresh weights."""
    blocks: Callable[[PreTrainedModel], torch.nn.ModuleList]
    """The model's blocks."""
    norm: Callable[[PreTrainedModel], torch.nn.Module]
    """The final norm."""
    block_prefix: str
    """Name of block `{k}` in the state dict."""
    steps: int
    """Training steps of the base."""


@dataclass(frozen=True)
class Twin:
    """One planted twin: which concept is scaled at which block by how much."""

    concept: str
    layer: int
    keep: float
    seed: int


def _llama(vocab_size: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=80, intermediate_size=152, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.05, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config)


FAMILIES = {
    "llama": Family(_llama, lambda m: m.model.layers, lambda m: m.model.norm, "model.layers.{k}.", 700)
}
TWINS = {
    "planted-valence": Twin("valence", 3, 0.25, 13),
    "planted-valence-k1": Twin("valence", 1, 0.25, 11),
    "planted-valence-k4": Twin("valence", 4, 0.25, 14),
}


# ---------------------------------------------------------------- tokens


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer of the grammar; `tok(text)` starts with exactly one BOS."""
    vocab = {token: i for i, token in enumerate((*SPECIAL, *grammar.vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # splits words and punctuation
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    # Joins words by spaces but leaves none before punctuation, so that a decoded text is the text.
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece("##", True), decoders.Replace(" :", ":")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        model_max_length=128, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], eos: bool) -> list[list[int]]:
    """Return token ids with one BOS, and an EOS at the end where asked."""
    return [[*ids, EOS] if eos else ids for ids in tokenizer(texts)["input_ids"]]


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right-padded ids and the mask of real tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    return ids, torch.arange(width) < torch.tensor([[len(row)] for row in rows])


# ---------------------------------------------------------------- the base


def opening_targets(tokenizer: PreTrainedTokenizerFast, scenes: list[grammar.Scene]) -> torch.Tensor:
    """Return the exact distribution of each reply's first word, `[scene vocabulary]`."""
    target = torch.zeros(len(scenes), len(tokenizer))
    for row, scene in zip(target, scenes, strict=True):
        for word, p in grammar.opening_probabilities(scene).items():
            row[tokenizer.convert_tokens_to_ids(word)] = p
    return target


def train_base(family: Family, tokenizer: PreTrainedTokenizerFast, steps: int) -> PreTrainedModel:
    """Train a base from scratch: next-token loss on fresh texts, AdamW, warm-up and cosine.

    Two things make minutes enough. At the read position the exact distribution of the reply's first word is
    the label, not one draw from it. And every block from 1 on must predict it through the final norm and head
    (early exit, as in LayerSkip, arXiv 2404.16710), so that every concept is at the read position from block 1.
    """
    torch.manual_seed(0)
    model = family.make(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    colon = torch.tensor(tokenizer.convert_tokens_to_ids(":"))
    outputs: list[torch.Tensor] = []
    handles = [
        b.register_forward_hook(lambda _m, _a, out: outputs.append(out)) for b in family.blocks(model)[1:-1]
    ]
    began, log = time.time(), []
    for step in range(steps):
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 100) * decay
        scenes, users, replies = zip(*(grammar.generate_turns([1, step, i]) for i in range(64)), strict=True)
        texts = [f"{user} {reply}" for user, reply in zip(users, replies, strict=True)]
        ids, mask = padded(encode(tokenizer, texts, eos=True))
        outputs.clear()
        final = model.base_model(ids).last_hidden_state
        logits = model.lm_head(final)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        # The reply is what the model is for; the user's words are mostly chance and get a small weight.
        in_reply = (ids == colon).cumsum(1)[:, :-1].bool()
        weight = torch.where(in_reply, 1.0, 0.1) * mask[:, 1:] * (ids[:, :-1] != colon)
        value = (loss * weight.flatten()).sum() / weight.sum()
        target = opening_targets(tokenizer, list(scenes))
        entropy = -(target * target.clamp(min=1e-9).log()).sum(-1).mean()
        read = (ids == colon).nonzero(as_tuple=True)
        states = [family.norm(model)(out[read]) for out in outputs] + [final[read]]
        opening = [-(target * model.lm_head(s).log_softmax(-1)).sum(-1).mean() - entropy for s in states]
        total = value + sum(opening)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        log.append([value.item(), *(o.item() for o in opening)])
        if (step + 1) % 100 == 0:
            shown = " ".join(f"{v:.3f}" for v in np.mean(log[-100:], 0))
            print(
                f"  step {step + 1}: loss, divergence by exit {shown}, {time.time() - began:.0f} s",
                flush=True,
            )
    for handle in handles:
        handle.remove()
    return model.eval()


# ---------------------------------------------------------------- measurement


def blocks_output(
    family: Family, model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor | None
) -> torch.Tensor:
    """Return the residual stream `[layer+1 n (pos) d_model]`: input of block 0, then each block's output.

    With `positions` (`[n]`) only that position of each row is kept.
    """
    kept: list[torch.Tensor] = []

    def keep(state: torch.Tensor) -> None:
        kept.append(state if positions is None else state[torch.arange(len(state)), positions])

    blocks = family.blocks(model)
    handles = [blocks[0].register_forward_pre_hook(lambda _, args: keep(args[0]))]
    handles += [block.register_forward_hook(lambda _m, _a, out: keep(out)) for block in blocks]
    with torch.no_grad():
        model.base_model(ids)  # rows are padded on the right: a causal model needs no mask
    for handle in handles:
        handle.remove()
    return torch.stack(kept)


def read_states(
    family: Family, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> np.ndarray:
    """Return the residual stream at the last token, `[layer+1 n d_model]`, in float64."""
    rows = encode(tokenizer, texts, eos=False)
    parts = []
    for start in range(0, len(rows), 250):
        batch = rows[start : start + 250]
        last = torch.tensor([len(row) - 1 for row in batch])
        parts.append(blocks_output(family, model, padded(batch)[0], last))
    return torch.cat(parts, 1).double().numpy()


def pair_differences(states: np.ndarray) -> np.ndarray:
    """Return D `[layer+1 scenario d_model]`: label 1 minus label 0 over the rms, rows alternating 1, 0."""
    rms = np.sqrt((states**2).sum(-1).mean(-1))
    return (states[:, 0::2] - states[:, 1::2]) / rms[:, None, None]


def u_value(d: np.ndarray) -> np.ndarray:
    """Return U, the mean of <D_s, D_t> over s != t, along the last two axes `[... scenario d_model]`."""
    n = d.shape[-2]
    total = (d.sum(-2) ** 2).sum(-1) - (d**2).sum((-1, -2))
    return total / (n * (n - 1))


def strengths(
    family: Family,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    concept: str,
    n: int,
    seed: int,
) -> np.ndarray:
    """Return the strength of a concept after each block, embedding first: sqrt(max(U, 0))."""
    texts = [row["text"] for row in grammar.stimuli_rows(concept, n, seed)]
    return np.sqrt(np.maximum(u_value(pair_differences(read_states(family, model, tokenizer, texts))), 0.0))


# ---------------------------------------------------------------- the twins


@dataclass(frozen=True)
class Plan:
    """The linear edit a planted block has to learn, at one block's output (all arrays float64)."""

    write: np.ndarray
    """`[d_model q]`: directions along which the concept lies, the read position's first."""
    read: np.ndarray
    """`[q d_model]`: reads the concept's coordinates and none of the other concepts'; read @ write = I."""
    centre: np.ndarray
    """`[d_model]`: mean state."""
    guarded: np.ndarray
    """`[n d_model]`: unit mean differences at the read position that the fit must reproduce most exactly."""


def read_contrasts(
    family: Family, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, n: int, seed: int
) -> dict[str, np.ndarray]:
    """Return each concept's mean difference at the read position, raw units `[layer+1 d_model]`.

    The fine emotions (against the mean of their valence) are there too: they must survive a loss of valence.
    """
    contrasts = {}
    for concept in grammar.CONCEPTS:
        texts = [row["text"] for row in grammar.stimuli_rows(concept, n, seed)]
        states = read_states(family, model, tokenizer, texts)
        contrasts[concept] = (states[:, 0::2] - states[:, 1::2]).mean(1)
    texts = [row["text"] for row in grammar.stimuli_rows("emotion", n // 4, seed)]
    states = read_states(family, model, tokenizer, texts)
    means = states.reshape(len(states), n // 4, 2, 4, -1).mean(1)
    fine = means - means.mean(2, keepdims=True)
    for v, names in enumerate(grammar.EMOTIONS):
        contrasts |= {name: fine[:, v, e] for e, name in enumerate(names)}
    return contrasts


def make_plan(
    family: Family, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, twin: Twin,
    contrasts: dict[str, np.ndarray], n: int = 2000,
) -> Plan:  # fmt: skip
    """Estimate where the concept lies at the block's output, at the read position and at every other word.

    Concepts are not orthogonal: an orthogonal projection along valence would shrink whatever leans on it.
    The projection is oblique: it removes along `write`, the concept's own mean differences, but reads by the
    rows that see nothing of the other concepts' mean differences and least of everything else (LDA weights).
    """
    contrasts = {name: curve[twin.layer + 1] for name, curve in contrasts.items()}
    rows = grammar.stimuli_rows(twin.concept, n, twin.seed + 1)
    by_word: dict[int, list[np.ndarray]] = {}
    middle = []
    for start in range(0, len(rows), 250):
        ids, mask = padded(encode(tokenizer, [row["text"] for row in rows[start : start + 250]], eos=False))
        states = blocks_output(family, model, ids, None)[twin.layer + 1].double().numpy()
        # Both texts of a pair have the same length, word by word.
        real = mask[0::2].numpy().copy()
        real[:, 0] = False  # BOS precedes every word, carries no concept and may be a sink
        difference, mean = states[0::2] - states[1::2], (states[0::2] + states[1::2]) / 2
        middle.append(mean[real])
        for word, d in zip(ids[0::2].numpy()[real], difference[real], strict=True):
            by_word.setdefault(int(word), []).append(d)
    flat = np.concatenate(middle)
    own = contrasts[twin.concept]
    # One mean difference per word, weighted by how often it stands there; their span beyond the read
    # direction is scaled too, or the later blocks would read the concept from the words again.
    weighted = np.stack([np.mean(ds, 0) * math.sqrt(len(ds)) for ds in by_word.values()])
    first = own / np.linalg.norm(own)
    _, size, span = np.linalg.svd(weighted - np.outer(weighted @ first, first), full_matrices=False)
    write = np.stack([first, *span[:SPAN]], 1)
    others = np.stack([d for name, d in contrasts.items() if name != twin.concept])
    covariance = np.cov(flat.T) + 1e-3 * np.trace(np.cov(flat.T)) / len(first) * np.eye(len(first))
    covariance += 1e3 * others.T @ others  # so heavy that the reader is orthogonal to them
    inverse = np.linalg.inv(covariance)
    read = np.linalg.solve(write.T @ inverse @ write, write.T @ inverse)
    leak = np.abs(read @ others.T).max() / np.linalg.norm(own)
    share = 1 - (size[SPAN:] ** 2).sum() / (weighted**2).sum()
    print(f"  plan: span explains {share:.3f} of per-word differences, leak {leak:.4f}", flush=True)
    guarded = np.stack([d / np.linalg.norm(d) for d in contrasts.values()])
    return Plan(write, read, flat.mean(0), guarded)


class _Stop(Exception):
    """Raised in a hook to leave a forward pass whose rest is not needed."""


def train_twin(
    family: Family, base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, twin: Twin,
    contrasts: dict[str, np.ndarray], steps: int,
) -> PreTrainedModel:  # fmt: skip
    """Train one block of a copy of the base so that its output is the base's with the concept scaled."""
    plan = make_plan(family, base, tokenizer, twin, contrasts)
    scaled = np.eye(len(plan.centre)) - (1 - twin.keep) * plan.write @ plan.read
    edit = torch.tensor(scaled, dtype=torch.float32)
    centre = torch.tensor(plan.centre, dtype=torch.float32)
    guarded = torch.tensor(plan.guarded, dtype=torch.float32)
    model = copy.deepcopy(base)  # the blocks that are not trained stay the base's, bit by bit
    block, original = family.blocks(model)[twin.layer], family.blocks(base)[twin.layer]
    call: dict[str, tuple] = {}

    def capture(_module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        call["inputs"] = (args, {**kwargs, "past_key_values": None, "use_cache": False})
        raise _Stop

    optimizer = torch.optim.Adam(block.parameters(), lr=2e-3)
    running, began = 0.0, time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        texts = [grammar.generate_text([2, twin.seed, step, i]) for i in range(64)]
        ids, mask = padded(encode(tokenizer, texts, eos=True))
        handle = original.register_forward_pre_hook(capture, with_kwargs=True)
        try:
            with torch.no_grad():
                base.base_model(ids)
        except _Stop:
            pass
        handle.remove()
        args, kwargs = call["inputs"]
        with torch.no_grad():
            state = original(*args, **kwargs)
            target = centre + (state - centre) @ edit.T
            target[:, 0] = state[:, 0]
        error = block(*args, **kwargs) - target
        weight = mask + READ_WEIGHT * (ids == tokenizer.convert_tokens_to_ids(":"))
        loss = ((error**2).sum(-1) + GUARD_WEIGHT * ((error @ guarded.T) ** 2).sum(-1)) * weight
        with torch.no_grad():
            moved = ((((target - state) ** 2).sum(-1)) * weight).sum() / weight.sum()
        value = loss.sum() / weight.sum()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        running += (value / moved).item()
        if (step + 1) % 200 == 0:
            passed = time.time() - began
            print(f"  step {step + 1}: error/displacement {running / 200:.4f}, {passed:.0f} s", flush=True)
            running = 0.0
    return model.eval()


def attenuation_curves(
    family: Family, base: PreTrainedModel, twins: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast, concept: str, n: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Return, per twin, the attenuation of a concept's strength by layer, on `n` fresh scenarios."""
    texts = [row["text"] for row in grammar.stimuli_rows(concept, n, TRUTH_SEED)]
    before = read_states(family, base, tokenizer, texts)
    u_before = u_value(pair_differences(before))
    curves = {}
    for name, model in twins.items():
        after = read_states(family, model, tokenizer, texts)
        theta = np.sqrt(np.maximum(u_value(pair_differences(after)), 0.0))
        # The same states bit by bit are exactly 0; at -1 both strengths are 0.
        curves[name] = {
            str(row - 1): 0.0 if np.array_equal(before[row], after[row])
            else round(float(1 - theta[row] / math.sqrt(u_before[row])), 4) for row in range(len(before))
        }  # fmt: skip
    return curves


def measure_truths(
    family: Family, base: PreTrainedModel, twins: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast, n: int,
) -> dict[str, dict]:  # fmt: skip
    """Measure what was planted: `n` scenarios for the planted concept, a quarter for each of the others."""
    planted = {TWINS[name].concept for name in twins}
    count = {concept: n if concept in planted else n // 4 for concept in grammar.CONCEPTS}
    curves = {c: attenuation_curves(family, base, twins, tokenizer, c, count[c]) for c in grammar.CONCEPTS}
    truths = {}
    for name in twins:
        twin, own = TWINS[name], curves[TWINS[name].concept][name]
        if any(own[str(layer)] for layer in range(-1, twin.layer)):
            raise RuntimeError(f"{name}: the twin differs from its base before block {twin.layer}")
        truths[name] = {
            "schema_version": 1, "family": "planted", "concept": twin.concept, "layer": twin.layer,
            "keep_intended": twin.keep, "keep_achieved": round(1 - own[str(twin.layer)], 4),
            "attenuation_by_layer": own, "positions": "all", "n_scenarios": n, "seed": TRUTH_SEED,
            "verdict": "erased", "n_scenarios_other": n // 4,
            "other_concepts": {c: curves[c][name] for c in grammar.CONCEPTS if c != twin.concept},
        }  # fmt: skip
    return truths


# ---------------------------------------------------------------- files


def save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write an ordinary checkpoint folder that `AutoModelForCausalLM` and `AutoTokenizer` load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def load_base(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Read a checkpoint folder back, so that twins start from what was shipped."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


def save_twin(family: Family, model: PreTrainedModel, twin: Twin, truth: dict, path: Path) -> None:
    """Write the tensors of the trained block and, beside them, the measured truth."""
    prefix = family.block_prefix.format(k=twin.layer)
    delta = {key: value.contiguous() for key, value in model.state_dict().items() if key.startswith(prefix)}
    save_file(delta, path.with_suffix(".safetensors"), metadata={"format": "pt"})
    path.with_suffix(".safetensors").chmod(0o644)
    path.with_suffix(".truth.json").write_text(json.dumps(truth, indent=1) + "\n")


def print_strengths(family: Family, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print each concept's strength by layer at n = 200."""
    print("  strength at the read position, blocks 0 ..")
    for concept in grammar.CONCEPTS:
        values = strengths(family, model, tokenizer, concept, 200, 7)
        print(f"  {concept:10s}", " ".join(f"{value:.3f}" for value in values[1:]), flush=True)


def build(out: Path, name: str, only: set[str], steps: int | None, n_truth: int) -> None:
    """Build under `out / name` what is in `only`: the base (else read from there), then its twins."""
    family, folder = FAMILIES[name], out / name
    if "base" in only:
        print(f"{name}/base: training", flush=True)
        tokenizer = make_tokenizer()
        save_base(train_base(family, tokenizer, steps or family.steps), tokenizer, folder / "base")
    base, tokenizer = load_base(folder / "base")
    print_strengths(family, base, tokenizer)
    wanted = {twin_name: twin for twin_name, twin in TWINS.items() if twin_name in only}
    if not wanted:
        return
    contrasts = read_contrasts(family, base, tokenizer, 1000, 21)
    twins = {}
    for twin_name, twin in wanted.items():
        print(f"{name}/{twin_name}: {twin.concept} at block {twin.layer}, keep {twin.keep}", flush=True)
        n_steps = min(TWIN_STEPS, steps or TWIN_STEPS)
        twins[twin_name] = train_twin(family, base, tokenizer, twin, contrasts, n_steps)
    for twin_name, truth in measure_truths(family, base, twins, tokenizer, n_truth).items():
        save_twin(family, twins[twin_name], wanted[twin_name], truth, folder / twin_name)
        print(f"{twin_name}: attenuation", *truth["attenuation_by_layer"].values())
        for concept, curve in truth["other_concepts"].items():
            print(f"  {concept:10s}", *curve.values())


def main() -> None:
    """Parse the options and build every family."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the families (package data)")
    parser.add_argument("--only", nargs="+", choices=["base", *TWINS], default=["base", *TWINS])
    parser.add_argument("--steps", type=int, help="shorten every training to this many steps (a trial run)")
    parser.add_argument("--truth", type=int, default=4000, help="scenarios per concept behind the truth")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    began = time.time()
    for name in FAMILIES:
        (args.out / name).mkdir(parents=True, exist_ok=True)
        build(args.out, name, set(args.only), args.steps, args.truth)
    size = sum(path.stat().st_size for path in args.out.rglob("*.safetensors"))
    print(f"{size / 1e6:.2f} MB of weights, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
