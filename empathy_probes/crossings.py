"""From one model's residual stream into another's, at every boundary: as it is, or by the neutral-text map.

A map stands only where two models hold things in different bases. It is applied to states, and without its offset to directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from empathy_probes.alignment import NeutralMap, fit_map
from empathy_probes.batches import pad_tokens
from empathy_probes.models import Model
from empathy_probes.readouts import TOKEN_BUDGET, token_batches
from empathy_probes.sites import Site

# Two models hold things in different bases where their neutral states, each in units of its rms, share less than half of their
# variance, or differ in size by more than this factor. What alignment merely weakened stays below both, and is not mapped
# away: a map between such states would put back, or take out, what the cut is there to show.
MAP_MISSED, MAP_SIZE = 0.5, 1.5
MAP_TOKENS = 4000
STATE_BYTES = 1 << 28


@dataclass(frozen=True)
class Crossing:
    """What carries a state of one model over to another at one boundary."""

    matrix: Float[Tensor, "d_model d_model"] | None = None
    """None: states go over as they are."""
    offset: Float[Tensor, " d_model"] | None = None

    def __call__(self, first: Float[Tensor, "row pos d"], second: Float[Tensor, "row pos d"]) -> Tensor:
        """From the first model's state, and the second's own, to what the second goes on with."""
        if self.matrix is None or self.offset is None:
            return first
        moved = (first.float() @ self.matrix.to(first.device) + self.offset.to(first.device)).to(second.dtype)
        # A first token sees only itself: in both models it stands for the same thing, and it is far from all others.
        return torch.cat([second[:, :1], moved[:, 1:]], 1)

    def move(self, states: Float[np.ndarray, "k d"]) -> Float[np.ndarray, "k d"]:
        """The first model's states at positions beyond the first as the second's."""
        if self.matrix is None or self.offset is None:
            return states
        return states @ self.matrix.double().numpy() + self.offset.double().numpy()

    def turn(self, directions: Float[np.ndarray, "*k d"]) -> Float[np.ndarray, "*k d"]:
        """Differences of the first model's states as differences of the second's."""
        return directions if self.matrix is None else directions @ self.matrix.double().numpy()


def fit_crossings(
    states: tuple[Float[np.ndarray, "token boundary d"], Float[np.ndarray, "token boundary d"]],
) -> tuple[tuple[list[Crossing], list[Crossing]], Bool[np.ndarray, " boundary"]]:
    """Crossings at every boundary from aligned into base and from base into aligned, and where they are maps.

    Args:
        states: of the same neutral tokens in (base, aligned), from `neutral_states`.
    """
    n = states[0].shape[1]
    there, back = [Crossing()] * n, [Crossing()] * n
    if np.array_equal(*states):
        return (there, back), np.zeros(n, bool)
    rms = np.stack([np.sqrt((x**2).sum(-1).mean(0)) for x in states])
    units = [x / r[:, None] for x, r in zip(states, rms, strict=True)]
    fitted = fit_map(*units)
    centred = [x - x.mean(0) for x in units]
    missed = ((centred[0] - centred[1]) ** 2).sum((0, 2)) / (centred[1] ** 2).sum((0, 2))
    mapped = (missed > MAP_MISSED) & (fitted.error < missed / 2)
    mapped |= abs(np.log(rms[1] / rms[0])) > np.log(MAP_SIZE)
    for i in np.flatnonzero(mapped):
        there[i] = _mapping(fitted, rms, int(i), to_base=True)
        back[i] = _mapping(fitted, rms, int(i), to_base=False)
    return (there, back), mapped


def neutral_states(
    model: Model, tokens: Sequence[Sequence[int]]
) -> Float[np.ndarray, "token boundary d_model"]:
    """States of neutral tokens but the first of each text, whose size is out of proportion in many models."""
    sites = [Site(layer) for layer in range(-1, model.n_layers)]
    ends = np.cumsum([len(row) - 1 for row in tokens])
    used = tokens[: int(np.searchsorted(ends, MAP_TOKENS)) + 1]
    longest = max(map(len, used))
    budget = max(longest, min(TOKEN_BUDGET, STATE_BYTES // (4 * len(sites) * model.d_model)))
    found = []
    for index in token_batches(used, budget):
        batch = pad_tokens([used[i] for i in index], model.device)
        inner = batch.mask.bool()
        inner[:, 0] = False
        with torch.inference_mode():
            run = model.run(batch, read=sites, last_layer=model.n_layers - 1)
            found.append(torch.stack([run.acts[site][inner] for site in sites], 1).double().cpu().numpy())
    return np.concatenate(found)


def _mapping(
    fitted: NeutralMap, rms: Float[np.ndarray, "model=2 boundary"], i: int, *, to_base: bool
) -> Crossing:
    """state → rms·(R(state/rms − centre) + centre') of the other model."""
    a, b = (1, 0) if to_base else (0, 1)
    turn = fitted.left[i] @ fitted.right[i].T
    turn = turn.T if to_base else turn
    shift = fitted.centres[b, i] * rms[b, i] - (fitted.centres[a, i] * rms[b, i]) @ turn
    return Crossing(
        torch.as_tensor(turn * (rms[b, i] / rms[a, i]), dtype=torch.float32),
        torch.as_tensor(shift, dtype=torch.float32),
    )
