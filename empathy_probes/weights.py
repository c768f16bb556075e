"""A causal language model as data: its configuration, its tensors, and which of them read and write the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from empathy_probes.errors import InputError


@dataclass(frozen=True)
class Checkpoint:
    """A causal language model as data."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    """float32, by their names in the state dict; the unembedding too, also where it is tied."""

    @property
    def layout(self) -> Layout:
        """Where things are.

        Raises:
            InputError: an architecture this module does not know.
        """
        kind = str(self.config.get("model_type"))
        if kind not in LAYOUTS:
            raise InputError(
                f"a phantom cannot be made from a '{kind}' model, expected one of {', '.join(LAYOUTS)} (normalisation before "
                "each read, known MLP); choose such a checkpoint"
            )
        return LAYOUTS[kind]

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self.config[self.layout.n_layers])

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.tensors[self.layout.head].shape[1])

    def change(self, tensors: Mapping[str, Tensor], **config: Any) -> Checkpoint:
        """The same with some tensors and entries replaced."""
        return Checkpoint({**self.config, **config}, {**self.tensors, **tensors})


@dataclass(frozen=True)
class Layout:
    """Names of one architecture's tensors."""

    block: str
    """Prefix of block {k}."""
    embeddings: tuple[str, ...]
    """Tables whose rows are added to the stream."""
    final_norm: str
    attention_norm: str
    attention_reads: tuple[str, ...]
    attention_write: str
    mlp_norm: str
    mlp_reads: tuple[str, ...]
    mlp_write: str
    gated: bool
    """SwiGLU (reads: gate, up) or a plain GELU MLP with biases."""
    layer_norm: bool
    """LayerNorm (mean subtracted, bias) or RMSNorm."""
    transposed: bool
    """Weights are [in out] (Conv1D), not [out in]."""
    parallel: bool
    """Attention and MLP read the same state."""
    width: str
    """Configuration entry of the MLP's hidden size."""
    epsilon: str
    n_layers: str = "num_hidden_layers"
    head: str = "lm_head.weight"

    def reads(self, k: int) -> list[tuple[str, str]]:
        """(read, the norm before it) of block k, without `.weight`."""
        p = self.block.format(k=k)
        return [(p + r, p + self.attention_norm) for r in self.attention_reads] + [
            (p + r, p + self.mlp_norm) for r in self.mlp_reads
        ]

    def writes(self, k: int) -> list[str]:
        """What block k adds to the stream, without `.weight`."""
        return [self.block.format(k=k) + name for name in (self.attention_write, self.mlp_write)]


_LLAMA = Layout(
    block="model.layers.{k}.", embeddings=("model.embed_tokens.weight",), final_norm="model.norm",
    attention_norm="input_layernorm",
    attention_reads=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), attention_write="self_attn.o_proj",
    mlp_norm="post_attention_layernorm", mlp_reads=("mlp.gate_proj", "mlp.up_proj"), mlp_write="mlp.down_proj",
    gated=True, layer_norm=False, transposed=False, parallel=False, width="intermediate_size", epsilon="rms_norm_eps",
)  # fmt: skip
LAYOUTS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": Layout(
        block="transformer.h.{k}.", embeddings=("transformer.wte.weight", "transformer.wpe.weight"),
        final_norm="transformer.ln_f", attention_norm="ln_1", attention_reads=("attn.c_attn",),
        attention_write="attn.c_proj", mlp_norm="ln_2", mlp_reads=("mlp.c_fc",), mlp_write="mlp.c_proj",
        gated=False, layer_norm=True, transposed=True, parallel=False, width="n_inner", epsilon="layer_norm_epsilon",
        n_layers="n_layer",
    ),
    "gpt_neox": Layout(
        block="gpt_neox.layers.{k}.", embeddings=("gpt_neox.embed_in.weight",), final_norm="gpt_neox.final_layer_norm",
        attention_norm="input_layernorm", attention_reads=("attention.query_key_value",),
        attention_write="attention.dense", mlp_norm="post_attention_layernorm", mlp_reads=("mlp.dense_h_to_4h",),
        mlp_write="mlp.dense_4h_to_h", gated=False, layer_norm=True, transposed=False, parallel=True,
        width="intermediate_size", epsilon="layer_norm_eps", head="embed_out.weight",
    ),
}  # fmt: skip


def written(
    c: Checkpoint, move: Any, blocks: range | None = None, embeddings: bool = True
) -> dict[str, Tensor]:
    """Apply a linear map of row vectors `[... d_model]` to everything that is added to the stream."""
    lay = c.layout
    new: dict[str, Tensor] = {}
    if embeddings:
        new |= {name: move(c.tensors[name]) for name in lay.embeddings}
    for k in range(c.n_layers) if blocks is None else blocks:
        for write in lay.writes(k):
            w = c.tensors[write + ".weight"]
            new[write + ".weight"] = move(w) if lay.transposed else move(w.T).T.contiguous()
            if write + ".bias" in c.tensors:
                new[write + ".bias"] = move(c.tensors[write + ".bias"])
    return new
