"""What runs inside a forward pass: hooks that edit or keep activations at a site, and where the pass stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from empathy_probes.batches import Pool
from empathy_probes.errors import EmpathyProbesError
from empathy_probes.interventions import Edit
from empathy_probes.sites import HEADS, Site


@dataclass
class Place:
    """Where the running forward pass stands: the one thing about a run that an edit of chosen positions must know."""

    positions: Int[Tensor, "batch pos"] | None = None
    """Counted from each row's first token, also where keys and values of earlier ones come from a cache."""
    unedited: bool = False
    """Edits that stay are passed over."""


def edit_hook(site: Site, edit: Edit, fired: set[Site], d_head: int) -> Callable[..., Tensor]:
    """A hook that edits a copy of what stands at the site, and notes that it fired."""

    def hook(tensor: Tensor, hook: Any) -> Tensor:
        fired.add(site)
        if site.component != HEADS:
            return edit(tensor.clone())
        # Some bridges give z as [batch pos head d_head], others with the heads already side by side.
        flat = tensor.reshape(*tensor.shape[:2], -1).clone()
        if site.head is None:
            return edit(flat).view(tensor.shape)
        mine = slice(site.head * d_head, (site.head + 1) * d_head)
        flat[..., mine] = edit(flat[..., mine].clone())
        return flat.view(tensor.shape)

    return hook


def at_positions(
    site: Site, edit: Edit, where: Callable[[Tensor], Tensor] | None, place: Place, edited: set[Site]
) -> Edit:
    """The edit at the chosen positions of the running pass; notes that there were any."""

    def there(acts: Tensor) -> Tensor:
        if place.unedited:
            return acts
        if where is None:
            edited.add(site)
            return edit(acts)
        if place.positions is None:
            raise EmpathyProbesError(
                f"the edit at {site} cannot tell positions in a run without token ids: expected a run, replay or generation; edit "
                "all positions instead"
            )
        chosen = where(place.positions)
        if not chosen.any():
            return acts
        edited.add(site)
        # A replayed batch may hold the captured one several times over.
        chosen = chosen.repeat(len(acts) // len(chosen), 1)
        return torch.where(chosen[..., None], edit(acts), acts)

    return there


def keep_hook(kept: dict[str, Tensor]) -> Callable[..., None]:
    """A hook that keeps the stream before the block for `edit_mid_hook`."""

    def hook(tensor: Tensor, hook: Any) -> None:
        kept["resid_pre"] = tensor

    return hook


def edit_mid_hook(site: Site, edit: Edit, kept: dict[str, Tensor], fired: set[Site]) -> Callable[..., Tensor]:
    """A hook on attention's output that makes the edit between attention and MLP."""

    def hook(tensor: Tensor, hook: Any) -> Tensor:
        fired.add(site)
        return edit(kept["resid_pre"] + tensor) - kept["resid_pre"]

    return hook


def read_hook(site: Site, acts: dict[Site, Tensor], pool: Pool | None, d_head: int) -> Callable[..., None]:
    """A hook that keeps what stands at the site, averaged where a pool is given."""

    def hook(tensor: Tensor, hook: Any) -> None:
        if site.component == HEADS:
            tensor = tensor.reshape(*tensor.shape[:2], -1)
            if site.head is not None:
                tensor = tensor[..., site.head * d_head : (site.head + 1) * d_head]
        acts[site] = pool(tensor) if pool is not None else tensor.clone()

    return hook


def keep_call(calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Callable[..., None]:
    """A hook that keeps the arguments a block was called with, for replay."""

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, dict(kwargs)))

    return keep


def repeat_rows(value: Any, captured: int, wanted: int) -> Any:
    """Repeat a captured tensor along a batch that grew; tensors without the batch axis stay as they are."""
    if isinstance(value, tuple):
        return tuple(repeat_rows(entry, captured, wanted) for entry in value)
    if (
        isinstance(value, Tensor)
        and value.ndim
        and value.shape[0] == captured
        and wanted != captured
        and captured > 1
    ):
        return value.repeat(wanted // captured, *([1] * (value.ndim - 1)))
    return value
