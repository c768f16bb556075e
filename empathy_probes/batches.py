"""Token ids of several prompts as one padded batch, and the positions of it that are pooled.

Padding, mask and positions are decided here and nowhere else, from row lengths alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Token ids with their mask; built in one place so that mask and positions always follow row lengths."""

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    """1 on tokens, 0 on padding."""
    start: Int[Tensor, " batch"]
    """Index of each row's first token: 0 unless padded on the left."""
    visible: Bool[Tensor, "batch pos pos"] | None = None
    """Which position (last axis) each one sees, where that is not simply all before it."""
    offsets: Int[Tensor, "batch pos"] | None = None
    """Position of every token, where `visible` is given."""


def row_positions(batch: TokenBatch) -> Int[Tensor, "batch pos"]:
    """Position of every token, counted from its row's first (padding: 0)."""
    return batch.offsets if batch.offsets is not None else (batch.mask.cumsum(-1) - 1).clamp(min=0)


def pad_tokens(
    rows: Sequence[Sequence[int]], device: str | torch.device = "cpu", *, left: bool = False
) -> TokenBatch:
    """Stack rows of token ids, padded on the right unless `left`.

    The padding id is never looked at: the mask comes from the row lengths, because the padding token may
    also be a real one.
    """
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    starts = [width - len(row) if left else 0 for row in rows]
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, start : start + len(row)] = torch.as_tensor(row)
        mask[i, start : start + len(row)] = 1
    return TokenBatch(ids.to(device), mask.to(device), torch.tensor(starts, device=device))


def pack_tokens(
    rows: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]], device: str | torch.device = "cpu"
) -> TokenBatch:
    """Rows of a prompt and two continuations, neither of which sees the other: the prompt is computed once for both.

    Each row is (prompt, first, second); the second's tokens have the positions they would have right after the prompt.
    """
    plain = pad_tokens([[*prompt, *first, *second] for prompt, first, second in rows], device)
    width = plain.ids.shape[1]
    visible = torch.tril(torch.ones(width, width, dtype=torch.bool)).repeat(len(rows), 1, 1)
    offsets = torch.arange(width).repeat(len(rows), 1)
    for i, (prompt, first, _) in enumerate(rows):
        end = len(prompt) + len(first)
        visible[i, end:, len(prompt) : end] = False
        offsets[i, end:] -= len(first)
    # Padding sees itself, or its softmax would be over nothing.
    return TokenBatch(plain.ids, plain.mask, plain.start, visible.to(device), offsets.to(device))


@dataclass(frozen=True)
class Pool:
    """Positions of each row that are averaged inside the read, so that only one vector per row is kept."""

    rows: Int[Tensor, " k"]
    positions: Int[Tensor, " k"]
    counts: Float[Tensor, " batch"]

    @classmethod
    def of(cls, read: Sequence[Sequence[int]], batch: TokenBatch) -> Pool:
        """Pool over `read[i]`, counted from the first token of row i."""
        device = batch.ids.device
        rows = [i for i, positions in enumerate(read) for _ in positions]
        places = [
            int(start) + p
            for start, positions in zip(batch.start.tolist(), read, strict=True)
            for p in positions
        ]
        counts = torch.tensor([len(positions) for positions in read], dtype=torch.float32, device=device)
        return cls(torch.tensor(rows, device=device), torch.tensor(places, device=device), counts)

    def __call__(self, acts: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch d_model"]:
        """The float32 mean over each row's positions."""
        gathered = acts[self.rows, self.positions].float()
        if len(self.rows) == len(self.counts):
            return gathered
        member = torch.zeros(len(self.counts), len(self.rows), device=acts.device)
        member[self.rows, torch.arange(len(self.rows), device=acts.device)] = 1.0
        return member @ gathered / self.counts[:, None]
