"""Which words does a direction speak for?  The logit lens of a contrast, beside what random directions give.

A vector v added to the state after the last block moves the logits by J v, J the derivative of final norm, gain and unembedding at
that state (nostalgebraist 2020 reads states this way; here it is a derivative, so that the norm's reaction to the move is in it).
J v is averaged over states of neutral texts and centred over the vocabulary, because a shift of all logits says nothing. Some
token always comes first: the largest logit is compared with that of directions drawn from the covariance of neutral texts, N(0, Sigma),
made as long as v.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from empathy_probes.errors import InputError
from empathy_probes.models import Model
from empathy_probes.nulls import DRAWS

TOP = 10
# Logits that are held at once.
CHUNK_LOGITS = 1 << 25


@dataclass(frozen=True)
class LogitLens:
    """What a vector, added to the last state, would do to the logits."""

    up: tuple[str, ...]
    """The tokens it raises most, highest first."""
    up_logits: Float[np.ndarray, " token"]
    """By how much, in nats, relative to the mean over the vocabulary."""
    down: tuple[str, ...]
    """The tokens it lowers most, lowest first."""
    down_logits: Float[np.ndarray, " token"]
    null_up: Float[np.ndarray, " draw"]
    """Largest logit of each random direction of the same length."""
    null_down: Float[np.ndarray, " draw"]
    """Lowest logit of each."""
    n_neutral: int
    """Neutral texts behind the random directions."""

    @property
    def p_up(self) -> Float[np.ndarray, " token"]:
        """Of each raised token: (1 + #{random directions whose largest logit reaches it}) / (draws + 1)."""
        return _p(self.up_logits, self.null_up)

    @property
    def p_down(self) -> Float[np.ndarray, " token"]:
        """Of each lowered token."""
        return _p(-self.down_logits, -self.null_down)

    def to_frame(self) -> pd.DataFrame:
        """One row per token: side, token, logit (nats), the null's 95 % quantile of the most extreme token, p."""
        sides = (
            ("up", self.up, self.up_logits, np.quantile(self.null_up, 0.95), self.p_up),
            ("down", self.down, self.down_logits, np.quantile(self.null_down, 0.05), self.p_down),
        )
        return pd.DataFrame(
            [
                {"side": side, "token": token, "logit": logit, "null_95": bound, "p": p}
                for side, tokens, logits, bound, ps in sides
                for token, logit, p in zip(tokens, logits, ps, strict=True)
            ]
        )


def _p(found: Float[np.ndarray, " token"], null: Float[np.ndarray, " draw"]) -> Float[np.ndarray, " token"]:
    return (1 + (null[:, None] >= found - 1e-12).sum(0)) / (len(null) + 1)


def logit_lens(
    model: Model,
    vector: Float[np.ndarray, " d_model"],
    states: Float[np.ndarray, "k d_model"],
    neutral: Float[np.ndarray, "m d_model"],
    *,
    top: int = TOP,
    draws: int = DRAWS,
    seed: int = 0,
) -> LogitLens:
    """The tokens a vector raises and lowers most when it is added to the last state.

    Args:
        model: whose head reads.
        vector: in this model's raw units, such as a contrast: label 1 minus label 0.
        states: after the last block, where the derivative is taken.
        neutral: states of neutral texts where the vector was found; random directions have their covariance.
        top: tokens per side.
        draws: random directions.
        seed: of these.

    Raises:
        InputError: the vector is 0, or there are no two neutral texts.
    """
    length = float(np.linalg.norm(vector))
    if not length > 0 or len(neutral) < 2:
        raise InputError(
            f"the logit lens got a vector of length {length:g} and {len(neutral)} neutral texts, expected a vector that is not 0 "
            "and at least two texts; check the concept and the neutral texts"
        )
    centred = neutral - neutral.mean(0)
    drawn = np.random.default_rng([seed, 13]).standard_normal((draws, len(neutral))) @ centred
    drawn *= length / np.linalg.norm(drawn, axis=1, keepdims=True)
    known = min(len(model.tokenizer), model.d_vocab)  # rows beyond the tokenizer are padding
    at = torch.as_tensor(states, dtype=torch.float32, device=model.device).to(_dtype(model))

    def move(vectors: np.ndarray) -> np.ndarray:
        asked = torch.as_tensor(vectors, dtype=torch.float32, device=model.device).to(at.dtype)
        logits = model.head_slopes(at, asked)[:, :known].float()
        return (logits - logits.mean(-1, keepdim=True)).cpu().numpy().astype(np.float64)

    own = move(vector[None])[0]
    step = max(1, CHUNK_LOGITS // model.d_vocab)
    chunks = [move(drawn[i : i + step]) for i in range(0, draws, step)]
    order = np.argsort(own, kind="stable")
    high, low = order[::-1][:top], order[:top]

    def words(ids: np.ndarray) -> tuple[str, ...]:
        return tuple(model.tokenizer.decode([int(i)]) for i in ids)

    return LogitLens(
        words(high), own[high], words(low), own[low],
        np.concatenate([c.max(1) for c in chunks]), np.concatenate([c.min(1) for c in chunks]), len(neutral),
    )  # fmt: skip


def _dtype(model: Model) -> torch.dtype:
    return next(model.bridge.parameters()).dtype
