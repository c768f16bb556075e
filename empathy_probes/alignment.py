"""From one model's residual stream to another's: the rotation that neutral texts suggest.

Two models may hold the same thing in different bases. On neutral texts, centred and divided by each model's rms, the
orthogonal Procrustes map (Schönemann 1966) is the rotation R that takes base states closest to aligned states: with
base' aligned = U S V', R = U V'. With fewer texts than dimensions it is known only on their span, and maps the
rest to 0. Its error on texts that it was not fitted on says how far it can be trusted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

N_FOLDS = 5


@dataclass(frozen=True)
class NeutralMap:
    """A rotation per layer, kept as two thin factors: R = left @ right'."""

    left: Float[np.ndarray, "layer d_model rank"]
    right: Float[np.ndarray, "layer d_model rank"]
    centres: Float[np.ndarray, "model=2 layer d_model"]
    """Mean of the neutral texts, in units of the rms."""
    error: Float[np.ndarray, " layer"]
    """Share of held-out neutral variance that the map misses: 0 perfect, 1 no better than the mean."""
    underdetermined: bool
    """Fewer neutral texts than dimensions."""

    def rescaled(self, factors: Float[np.ndarray, "model=2 layer"]) -> NeutralMap:
        """The same map for states that are this many times as large: a rotation does not change."""
        return replace(self, centres=self.centres * factors[..., None])

    def turn(self, rows: Float[np.ndarray, "n layer d_model"]) -> Float[np.ndarray, "n layer d_model"]:
        """Differences of base states as differences of aligned ones."""
        return _turn(rows, self.left, self.right)

    def forward(self, rows: Float[np.ndarray, "n layer d_model"]) -> Float[np.ndarray, "n layer d_model"]:
        """Base states (in units of the rms) as aligned ones."""
        return self.turn(rows - self.centres[0]) + self.centres[1]

    def backward(self, rows: Float[np.ndarray, "n layer d_model"]) -> Float[np.ndarray, "n layer d_model"]:
        """Aligned states as base ones."""
        return _turn(rows - self.centres[1], self.right, self.left) + self.centres[0]


def fit_map(
    base: Float[np.ndarray, "m layer d_model"], aligned: Float[np.ndarray, "m layer d_model"]
) -> NeutralMap:
    """Fit the map on the same neutral texts in both models, each in units of its own rms."""
    m, n_layers, d = base.shape
    centres = np.stack([base.mean(0), aligned.mean(0)])
    fitted = [fit_rotation(base[:, i], aligned[:, i]) for i in range(n_layers)]
    left, right = (np.stack(side) for side in zip(*fitted, strict=True))
    fold = np.arange(m) % N_FOLDS
    missed, total = np.zeros(n_layers), np.zeros(n_layers)
    for held_out in range(N_FOLDS):
        train, test = fold != held_out, fold == held_out
        for i in range(n_layers):
            means = base[train, i].mean(0), aligned[train, i].mean(0)
            u, v = fit_rotation(base[train, i], aligned[train, i])
            rest = aligned[test, i] - means[1]
            missed[i] += ((rest - (base[test, i] - means[0]) @ u @ v.T) ** 2).sum()
            total[i] += (rest**2).sum()
    error = np.divide(missed, total, out=np.zeros(n_layers), where=total > 0)
    return NeutralMap(left, right, centres, error, m <= d)


def _turn(rows: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.moveaxis(rows, 1, 0) @ left @ np.swapaxes(right, -1, -2), 0, 1)


def fit_rotation(
    base: Float[np.ndarray, "m d_model"], aligned: Float[np.ndarray, "m d_model"]
) -> tuple[Float[np.ndarray, "d_model rank"], Float[np.ndarray, "d_model rank"]]:
    """The two orthonormal factors of the Procrustes rotation at one layer, of rank min(texts, d_model)."""
    base, aligned = base - base.mean(0), aligned - aligned.mean(0)
    q = p = np.eye(base.shape[1])
    r, s = base.T, aligned.T
    if len(base) < base.shape[1]:
        # base' aligned has the texts' rank: its decomposition follows from the thin factors of both.
        (q, r), (p, s) = np.linalg.qr(base.T), np.linalg.qr(aligned.T)
    u, size, vt = np.linalg.svd(r @ s.T)
    # Centred texts span one dimension less than there are texts: that pair of axes is what rounding made of nothing.
    return q @ u * (size > 1e-10 * size.max()), p @ vt.T
