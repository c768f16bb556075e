"""Train what has to be trained: phantom bases on the grammar, and the twins that no closed form makes.

    python scripts/build_phantoms.py --out runs/phantoms [--bases llama-0 gpt2-0 ...] [--steps N]

One command, one thread, fixed seeds: the same machine gives the same bytes. Each base takes two to three minutes. Beside
`DIR/<name>/base`, an ordinary checkpoint, lie the trained twins: `<family>.safetensors` holds what was added to the
base's tensors (float16), and a tensor that is not in it is the base's. All other families are made from a base by
`empathy_probes.planting` in a second. With --package the bases and twins of seed 0 are written into the package.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
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
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from empathy_probes import grammar, phantoms, planting, surgery
from empathy_probes.checkpoints import build_checkpoint, open_checkpoint
from empathy_probes.models import load_model

PACKAGE = Path(__file__).resolve().parents[1] / "empathy_probes" / "data" / "phantoms"
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
PAD, UNK, BOS, EOS = range(4)
LEARNING_RATE = 3e-3
CONTINUED_STEPS, CONTINUED_RATE = 150, 3e-4
REROUTED_FROM, REROUTED_TO, REROUTED_STEPS = 2, 4, 400
READ_WEIGHT = 20.0  # how much more the read position counts when a block learns to write again


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
    steps: int
    """Training steps of the base."""


def _llama(vocab_size: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=80, intermediate_size=152, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.05, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _gpt2(vocab_size: int) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=vocab_size, n_embd=80, n_inner=160, n_layer=6, n_head=4, n_positions=128,
        activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        initializer_range=0.05, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, attn_implementation="sdpa",
    )  # fmt: skip
    return GPT2LMHeadModel(config)


FAMILIES = {
    "llama": Family(_llama, lambda m: m.model.layers, lambda m: m.model.norm, 700),
    "gpt2": Family(_gpt2, lambda m: m.transformer.h, lambda m: m.transformer.ln_f, 700),
}
BASES = ("llama-0", "gpt2-0", "llama-1", "gpt2-1")


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


def train_base(family: Family, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> PreTrainedModel:
    """Train a base from scratch: next-token loss on fresh texts, AdamW, warm-up and cosine.

    Two things make minutes enough. At the read position the exact distribution of the reply's first word is
    the label, not one draw from it. And every block from 1 on must predict it through the final norm and head
    (early exit, as in LayerSkip, arXiv 2404.16710), so that every concept is at the read position from block 1.
    """
    torch.manual_seed(seed)
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
        scenes, users, replies = zip(
            *(grammar.generate_turns([1, step, i, *([seed] if seed else [])]) for i in range(64)), strict=True
        )
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


# ---------------------------------------------------------------- trained twins


def train_continued(
    family: Family, base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int
) -> PreTrainedModel:
    """Train a base on with the same kind of data and a small step: what tuning does to everything alike."""
    model = copy.deepcopy(base).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=CONTINUED_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    colon = tokenizer.convert_tokens_to_ids(":")
    for step in range(CONTINUED_STEPS):
        turns = [grammar.generate_turns([3, seed, step, i])[1:] for i in range(64)]
        ids, mask = padded(encode(tokenizer, [f"{user} {reply}" for user, reply in turns], eos=True))
        logits = model(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weight = torch.where((ids == colon).cumsum(1)[:, :-1].bool(), 1.0, 0.1) * mask[:, 1:]
        value = (loss * weight.flatten()).sum() / weight.sum()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return model.eval()


def train_rerouted(
    family: Family, base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Remove valence at the read position at one block, and train a later one to write it again from the words.

    Returns base and twin; both have the hidden neurons that the removal needs.
    """
    pair = planting.make_twin(
        surgery.Checkpoint(*open_checkpoint(folder / "base")[:2]), load_model(folder / "base", device="cpu"), "local",
        planting.grammar_concept("valence"), planting.guards(folder, "valence", REROUTED_FROM), REROUTED_FROM, 0.25,
    )  # fmt: skip
    whole, twin = (build_checkpoint(c.config, c.tensors) for c in pair)
    block = family.blocks(twin)[REROUTED_TO]
    colon = tokenizer.convert_tokens_to_ids(":")
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    for parameter in block.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(block.parameters(), lr=2e-3)
    outputs: dict[str, torch.Tensor] = {}
    for name, model in (("base", whole), ("twin", twin)):
        family.blocks(model)[REROUTED_TO].register_forward_hook(
            lambda _m, _a, out, name=name: outputs.__setitem__(name, out)
        )
    for step in range(REROUTED_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = (
                2e-3 * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / REROUTED_STEPS))
            )
        ids, mask = padded(
            encode(tokenizer, [grammar.generate_text([4, step, i]) for i in range(64)], eos=True)
        )
        with torch.no_grad():
            whole.base_model(ids)
        twin.base_model(ids)
        error = ((outputs["twin"] - outputs["base"]) ** 2).sum(-1)
        weight = mask * (1 + READ_WEIGHT * (ids == colon))
        value = (error * weight).sum() / weight.sum()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if (step + 1) % 200 == 0:
            print(f"  step {step + 1}: error {value.item():.4f}", flush=True)
    return whole, twin.eval()


# ---------------------------------------------------------------- files


def save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write an ordinary checkpoint folder that `AutoModelForCausalLM` and `AutoTokenizer` load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def save_added(base: PreTrainedModel, twin: PreTrainedModel, path: Path) -> None:
    """Write what was added to the base's tensors, as float16; unchanged and tied tensors are left out."""
    before, seen, added = base.state_dict(), set(), {}
    for name, tensor in twin.state_dict().items():
        if tensor.data_ptr() not in seen and not torch.equal(tensor, before[name]):
            added[name] = (tensor - before[name]).half().contiguous()
        seen.add(tensor.data_ptr())
    save_file(added, path, metadata={"format": "pt"})
    path.chmod(0o644)


def build(folder: Path, steps: int | None) -> None:
    """Build a base unless it is there, then its trained twins."""
    kind, seed = folder.name.rsplit("-", 1)
    family = FAMILIES[kind]
    if not (folder / "base").is_dir():
        print(f"{folder.name}: training", flush=True)
        tokenizer = make_tokenizer()
        save_base(
            train_base(family, tokenizer, steps or family.steps, int(seed)), tokenizer, folder / "unfinished"
        )
        (folder / "unfinished").rename(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    for read in ("", *planting.READ_AT.values()):
        guards = planting.measure_guards(folder, read)
        save_file(
            {name: torch.tensor(d, dtype=torch.float32) for name, d in guards.items()},
            planting.guards_file(folder, read),
        )
    print(f"{folder.name}: continued", flush=True)
    save_added(base, train_continued(family, base, tokenizer, int(seed)), folder / "continued.safetensors")
    print(f"{folder.name}: rerouted", flush=True)
    save_added(*train_rerouted(family, base, tokenizer, folder), folder / "rerouted.safetensors")


def main() -> None:
    """Parse the options and build every base."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/phantoms"), help="default %(default)s")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=BASES)
    parser.add_argument("--steps", type=int, help="shorten the training of a base (a trial run)")
    parser.add_argument("--package", action="store_true", help="copy what is shipped into the package")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    began = time.time()
    for name in args.bases:
        build(args.out / name, args.steps)
        kind, seed = name.rsplit("-", 1)
        if args.package and seed == "0":
            shutil.copytree(args.out / name, PACKAGE / kind, dirs_exist_ok=True)
    if args.package:
        for name in phantoms.SHIPPED:
            truth = phantoms.measure_phantom(name)
            phantoms.truth_path(name).write_text(json.dumps(truth, indent=1) + "\n")
    size = sum(path.stat().st_size for path in PACKAGE.rglob("*.safetensors"))
    print(f"{size / 1e6:.2f} MB of weights in the package, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
