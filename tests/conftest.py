"""Tiny models and stimuli that every test may use; nothing here touches the network."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # two processes on two cores would otherwise wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import config, install_import_hook

PACKAGE = Path(__file__).resolve().parent.parent / "empathy_probes"
# Shapes are checked in every module that has any. Of the others mypy knows all; a call to each of their many small functions, such as
# those that choose a word, took ten times as long.
install_import_hook(
    [
        f"empathy_probes.{path.stem}"
        for path in PACKAGE.glob("*.py")
        if "jaxtyping" in path.read_text(encoding="utf8")
    ],
    "beartype.beartype",
)

from empathy_probes.models import Model, load_model  # noqa: E402 after the hook
from empathy_probes.stimuli import StimulusSet, stimuli_from_rows  # noqa: E402

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
WORDS = [
    "the",
    "a",
    "man",
    "woman",
    "dog",
    "cat",
    "bird",
    "house",
    "street",
    "river",
    "saw",
    "met",
    "heard",
    "found",
    "lost",
    "kept",
    "gave",
    "took",
    "red",
    "blue",
    "green",
    "old",
    "new",
    "small",
    "large",
    "day",
    "night",
    "rain",
    "sun",
    "road",
    "train",
    "boat",
    "and",
    "but",
    "then",
    "there",
    "here",
    "with",
    "without",
    "was",
    "is",
    "not",
    "very",
    "quite",
    ".",
    ",",
    "?",
]


def word_tokenizer(template: str | None = None) -> Any:
    """A word-level tokenizer that adds one BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<model>", "<end>"]
    vocabulary = {word: i for i, word in enumerate([*specials, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<model>", "<end>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def byte_tokenizer(template: str | None = None, specials: tuple[str, ...] = ()) -> Any:
    """A byte-level tokenizer with merges, so that spaces and line ends count and tokens begin with a space; adds one BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<pad>", "<bos>", "<eos>", *specials],
    )  # fmt: skip
    inner.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        additional_special_tokens=list(specials),
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ ' <user> ' if m.role == 'user' else ' <model> ' }}{{ m.content }} <end>"
    "{% endfor %}{% if add_generation_prompt %} <model>{% endif %}"
)


def tiny_llama(seed: int = 0, **changes: Any) -> Any:
    """Random Llama with grouped queries, untied, four blocks; initialised wide enough that texts differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.2, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(options | changes))).eval()


def tiny_gpt2(seed: int = 0) -> Any:
    """Random GPT-2 with learned positions and LayerNorm."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


MAKERS: dict[str, Callable[..., Any]] = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture(scope="session", params=sorted(MAKERS))
def model(request: pytest.FixtureRequest) -> Model:
    """A tiny random model of each shape."""
    return load_model((MAKERS[request.param](), word_tokenizer()), device="cpu")


@pytest.fixture(scope="session")
def llama() -> Model:
    """The tiny Llama alone."""
    return load_model((tiny_llama(), word_tokenizer()), device="cpu")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations are not checked, as for a user: what is no such type reaches the function."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def rows(n: int = 40, seed: int = 0, concept: str = "demo") -> list[dict[str, Any]]:
    """Minimal pairs of random words: `red` against `blue`, at varied places, lengths and in varied company."""
    generator = np.random.default_rng(seed)
    plain = [word for word in WORDS if word not in {"red", "blue"}]
    made = []
    for s in range(n):
        words = list(generator.choice(plain, size=int(generator.integers(4, 14))))
        place = int(generator.integers(0, len(words)))
        for label, word in ((1, "red"), (0, "blue")):
            text = " ".join([*words[:place], word, *words[place:], "."])
            made.append(
                {"id": f"{concept}-{s}-{label}", "scenario": f"{concept}-{s}", "text": text, "label": label}
            )
    return made


def stimuli(n: int = 40, seed: int = 0, concept: str = "demo") -> StimulusSet:
    """`rows` as a stimulus set."""
    return stimuli_from_rows(rows(n, seed, concept), concept)


def shared(*parts: str) -> Path:
    """A path in `../shared`, or a skip that says why."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not there: this test reads shared data")
    return path
