"""From one model's residual stream into another's, at every boundary: as it is, or by the neutral-text map.

A map stands only where it is needed: where it takes neutral tokens' states of one model to the other's with at most half the
miss that they have as they are. It is applied to states, and without its offset to directions.
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
from empathy_probes.sites import Site

# The map is inserted where it misses this share of what the states as they are miss, or less.
MAP_GAIN = 0.5
MAP_TOKENS = 4000


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
    centred = [x - x.mean(0) for x in states]
    total = (centred[1] ** 2).sum((0, 2))
    missed = ((centred[0] - centred[1]) ** 2).sum((0, 2)) / np.where(total > 0, total, 1.0)
    mapped = fitted.error < MAP_GAIN * missed
    # What both models share to rounding needs no map, whose own error would be all there is.
    mapped &= missed > 1e-6
    for i in np.flatnonzero(mapped):
        there[i] = _mapping(fitted, rms, int(i), to_base=True)
        back[i] = _mapping(fitted, rms, int(i), to_base=False)
    return (there, back), mapped


def neutral_states(
    model: Model, tokens: Sequence[Sequence[int]]
) -> Float[np.ndarray, "token boundary d_model"]:
    """States of neutral tokens but the first of each text, whose size is out of proportion in many models."""
    sites = [Site(layer) for layer in range(-1, model.n_layers)]
    found, count = [], 0
    for row in tokens:
        if count >= MAP_TOKENS:
            break
        batch = pad_tokens([row], model.device)
        with torch.inference_mode():
            run = model.run(batch, read=sites, last_layer=model.n_layers - 1)
        found.append(torch.stack([run.acts[site][0, 1:] for site in sites], 1).float().cpu().numpy())
        count += len(row) - 1
    return np.concatenate(found)[:MAP_TOKENS].astype(np.float64)


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
