"""Places in a transformer where a `[batch pos d_model]` tensor is read or written.

Names are TransformerLens's. Layers are 0-based block indices; `Site(-1)` is the input of block 0 (token
embedding, plus positions where the model adds them there). There is no negative indexing from the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from empathy_probes.errors import InputError

COMPONENTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""Places of width d_model, where concepts are measured."""
HEADS = "z"
"""What the attention heads gathered, side by side, before the output projection: `[batch pos d_attn]`."""


@dataclass(frozen=True)
class Site:
    """One component of one block.

    >>> Site(12)
    Site(layer=12, component='resid_post')
    >>> Site(3, "attn_out").hook_name
    'blocks.3.hook_attn_out'
    >>> Site(-1).hook_name
    'blocks.0.hook_resid_pre'
    >>> Site(3, "z", head=1)
    Site(layer=3, component='z', head=1)
    """

    layer: int
    """0-based block; −1 is the input of block 0 and exists for `resid_post` only."""
    component: str = "resid_post"
    """One of `COMPONENTS`, or `z`."""
    head: int | None = None
    """0-based attention head, of `z` only: its `[batch pos d_head]`; None for all heads."""

    def __post_init__(self) -> None:
        if self.component not in (*COMPONENTS, HEADS):
            raise InputError(
                f"unknown site '{self.component}': expected one of {', '.join((*COMPONENTS, HEADS))}; name one of these"
            )
        if self.head is not None and (self.component != HEADS or self.head < 0):
            raise InputError(
                f"head {self.head} of site '{self.component}' does not exist: heads are counted from 0 and only `{HEADS}` has them; "
                "leave the head out"
            )
        if self.layer < -1 or (self.layer == -1 and self.component != "resid_post"):
            raise InputError(
                f"site {self.component} of layer {self.layer} does not exist: layers are block indices from 0, "
                "and −1 is the input of block 0 (resid_post only); count from the first block"
            )

    @property
    def hook_name(self) -> str:
        """The TransformerLens hook name."""
        if self.layer == -1:
            return "blocks.0.hook_resid_pre"
        if self.component == HEADS:
            return f"blocks.{self.layer}.attn.hook_z"
        return f"blocks.{self.layer}.hook_{self.component}"

    def __repr__(self) -> str:
        head = "" if self.head is None else f", head={self.head}"
        return f"Site(layer={self.layer}, component={self.component!r}{head})"


def parse_layers(text: str, n_layers: int) -> tuple[int, ...]:
    """Block indices named by `all`, `0,5,11`, `2-5` or a mixture such as `0,4-6`.

    Raises:
        InputError: a part is no number or range, or lies outside 0 … n_layers − 1.

    >>> parse_layers("0,2-4", 6)
    (0, 2, 3, 4)
    >>> parse_layers("all", 3)
    (0, 1, 2)
    """
    if text.strip() == "all":
        return tuple(range(n_layers))
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low = int(first)
            high = int(last) if dash else low
        except ValueError:
            raise InputError(
                f"--layers got '{text}': '{part.strip()}' is no block index or range; "
                "expected all, a list such as 0,5,11, or a range such as 2-5"
            ) from None
        if low > high or low < 0 or high >= n_layers:
            raise InputError(
                f"--layers got '{text}': '{part.strip()}' is not within the {n_layers} blocks of this model; "
                f"expected indices from 0 to {n_layers - 1}; choose among those"
            )
        chosen.update(range(low, high + 1))
    return tuple(sorted(chosen))
