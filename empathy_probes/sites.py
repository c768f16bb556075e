"""Places in a transformer where a `[batch pos d_model]` tensor is read or written.

Names are TransformerLens's. Layers are 0-based block indices; `Site(-1)` is the input of block 0 (token
embedding, plus positions where the model adds them there). There is no negative indexing from the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from empathy_probes.errors import InputError

COMPONENTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@dataclass(frozen=True, order=True)
class Site:
    """One component of one block.

    >>> Site(12)
    Site(layer=12, component='resid_post')
    >>> Site(3, "attn_out").hook_name
    'blocks.3.hook_attn_out'
    >>> Site(-1).hook_name
    'blocks.0.hook_resid_pre'
    """

    layer: int
    """0-based block; −1 is the input of block 0 and exists for `resid_post` only."""
    component: str = "resid_post"
    """One of `COMPONENTS`."""

    def __post_init__(self) -> None:
        if self.component not in COMPONENTS:
            raise InputError(
                f"unknown site '{self.component}': expected one of {', '.join(COMPONENTS)}; name one of these"
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
        return f"blocks.{self.layer}.hook_{self.component}"

    def __repr__(self) -> str:
        return f"Site(layer={self.layer}, component={self.component!r})"


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
