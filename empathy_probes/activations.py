"""Pooled activations of one stimulus set in one model, with what they belong to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from empathy_probes.errors import InputError


@dataclass(frozen=True)
class Activations:
    """One row per text: the activation pooled over its read position, at every layer."""

    acts: Float[np.ndarray, "n layer d_model"]
    """float32, in the model's raw units; never compared between models without division by `rms`."""
    layers: tuple[int, ...]
    """0-based block indices; −1 is the input of block 0."""
    component: str
    """TransformerLens name of the site."""
    model: str
    """Name of the model that made them."""
    centred: bool
    """Whether the model's own normalisation subtracts the mean over d_model (LayerNorm)."""

    @property
    def normalised(self) -> Float[np.ndarray, "n layer d_model"]:
        """Activations in the units the next block reads: float64, centred where the model centres, over `rms`."""
        rms = self.rms
        for layer in np.array(self.layers)[rms == 0].tolist():
            raise InputError(
                f"'{self.model}' writes exactly 0 at {self.component} of layer {layer} for every text, expected activations: there is "
                "nothing to measure; leave this layer or site out"
            )
        return self._seen / rms[:, None]

    @property
    def rms(self) -> Float[np.ndarray, " layer"]:
        """sqrt(mean over items of ‖h‖²), section 2 of the method."""
        return np.sqrt((self._seen**2).sum(-1).mean(0))

    @property
    def _seen(self) -> Float[np.ndarray, "n layer d_model"]:
        acts = self.acts.astype(np.float64)
        return acts - acts.mean(-1, keepdims=True) if self.centred else acts
