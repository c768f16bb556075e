"""Edits of an activation: pure functions from a `[batch pos d_model]` tensor to one of the same shape.

Each maker returns a new tensor and never touches its input, so an edit can be tested without a model
and a model is left as it was found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Edit = Callable[[Tensor], Tensor]
"""A pure function of one activation tensor."""


def add_vector(vector: Float[Tensor, " d_model"], coefficient: float) -> Edit:
    """Add `coefficient * vector` at every position. Coefficients are in raw activation units."""

    def edit(acts: Tensor) -> Tensor:
        return acts + coefficient * vector.to(acts)

    return edit


def add_values(values: Float[Tensor, "batch pos d_model"]) -> Edit:
    """Add another amount at every position of every row."""

    def edit(acts: Tensor) -> Tensor:
        return acts + values.to(acts)

    return edit


def project_out(direction: Float[Tensor, " d_model"]) -> Edit:
    """Remove the component along `direction`. Applying it twice is applying it once."""
    unit = direction / direction.norm()

    def edit(acts: Tensor) -> Tensor:
        u = unit.to(acts)
        return acts - (acts @ u).unsqueeze(-1) * u

    return edit


def replace_with(values: Float[Tensor, "batch pos d_model"]) -> Edit:
    """Put other activations of the same shape in place: patching."""

    def edit(acts: Tensor) -> Tensor:
        return values.to(acts).expand_as(acts).clone()

    return edit


def replace_component(
    values: Float[Tensor, "batch pos d_model"], direction: Float[Tensor, " d_model"]
) -> Edit:
    """Take only the component along `direction` from `values`, and keep the rest."""
    unit = direction / direction.norm()

    def edit(acts: Tensor) -> Tensor:
        u = unit.to(acts)
        return acts + ((values.to(acts) - acts) @ u).unsqueeze(-1) * u

    return edit


def cap_component(direction: Float[Tensor, " d_model"], lower: float, upper: float) -> Edit:
    """Keep the component along `direction` between two bounds, in raw activation units, and the rest as it is."""
    unit = direction / direction.norm()

    def edit(acts: Tensor) -> Tensor:
        u = unit.to(acts)
        along = acts @ u
        return acts + (along.clamp(lower, upper) - along).unsqueeze(-1) * u

    return edit


def mean_ablate(mean: Float[Tensor, " d_model"]) -> Edit:
    """Put one mean vector at every position."""

    def edit(acts: Tensor) -> Tensor:
        return mean.to(acts).expand_as(acts).clone()

    return edit


def at_positions(edit: Edit, positions: Sequence[int]) -> Edit:
    """Restrict `edit` to one position of each row: `positions[i]` in row i."""

    def edit_there(acts: Tensor) -> Tensor:
        rows = torch.arange(acts.shape[0], device=acts.device)
        chosen = torch.as_tensor(list(positions), device=acts.device)
        edited = acts.clone()
        edited[rows, chosen] = edit(acts)[rows, chosen]
        return edited

    return edit_there
