"""Many edited continuations of the same run in one pass over the blocks.

A continuation starts from the state after some block, edited there or further on. All continuations of a batch travel through
the blocks together: the pass begins at the first of their starts, and each one joins when the pass reaches its own, so that
nothing before an edit is computed again and every block's weights are used once for all of them. A full layer × position sweep
of n blocks costs half the blocks of n forward passes per position, and no unembedding but the rows that a readout needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from empathy_probes.batches import TokenBatch, pad_tokens
from empathy_probes.errors import InputError
from empathy_probes.interventions import Edit
from empathy_probes.models import Model, Run
from empathy_probes.readouts import AskedBatch, batch_asked, look_up
from empathy_probes.roles import ROLES, match_positions, position_names
from empathy_probes.sites import COMPONENTS, HEADS, Site
from empathy_probes.textpairs import TextPairs

DIRECTIONS = ("denoise", "noise")
# Padded tokens of all continuations that are in one pass; and those of the texts that are patched together.
SWEEP_TOKENS = 16384
PAIR_TOKENS = 1024
STATE_BYTES = 1 << 28


@dataclass(frozen=True)
class Continuation:
    """One way to go on from a run."""

    start: int
    """The block after whose state it starts; −1 for the input of block 0."""
    entry: Edit | None = None
    """Edit of that state."""
    writes: Mapping[Site, Edit] = field(default_factory=dict)
    """Edits in later blocks."""


def check_continuable(model: Model) -> None:
    """Refuse a model that cannot be continued from a state, and what is no model.

    Raises:
        InputError: the message says why.
    """
    if not isinstance(model, Model):
        raise InputError(
            f"model got a {type(model).__name__}, expected one model; pass pair.base or pair.aligned"
        )
    if model.replay_refusal:
        raise InputError(
            f"'{model.name}' ({model.architecture}) cannot be continued from a state: {model.replay_refusal}, expected it to "
            "equal a plain run; run the encode stage only"
        )


def continue_edited(
    model: Model,
    batch: AskedBatch,
    run: Run,
    states: Mapping[int, Float[Tensor, "row pos d_model"]],
    continuations: Sequence[Continuation],
    budget: int = SWEEP_TOKENS,
) -> Float[np.ndarray, "continuation item"]:
    """The readout of every item at the end of every continuation, in nats.

    Args:
        model: goes on.
        batch: what was run.
        run: of these tokens, captured.
        states: the residual stream after every block that a continuation starts from.
        continuations: in any order.
        budget: padded tokens in one pass.
    """
    n_rows, width = batch.tokens.ids.shape
    at_once = max(1, budget // (n_rows * width))
    order = sorted(range(len(continuations)), key=lambda i: continuations[i].start)
    found = np.zeros((len(continuations), len(batch.index)))
    for first in range(0, len(order), at_once):
        chosen = order[first : first + at_once]
        final = _travel(model, run, states, [continuations[i] for i in chosen])
        found[chosen] = look_up(model, batch, final).view(len(chosen), -1).cpu().numpy()
    return found


def _travel(
    model: Model, run: Run, states: Mapping[int, Tensor], together: Sequence[Continuation]
) -> Float[Tensor, "row pos d_model"]:
    """States after the last block of continuations sorted by their start."""
    n_rows = len(states[together[0].start])
    state: Tensor | None = None
    joined = 0
    for layer in range(together[0].start, model.n_layers):
        if state is not None:
            write = {
                site: _of_rows(parts, n_rows, model.d_head)
                for site, parts in _writes_at(layer, together[:joined]).items()
            }
            site = Site(layer)
            state = model.replay(run, state, layer - 1, read=[site], write=write, last_layer=layer).acts[site]
        entering = []
        while joined < len(together) and together[joined].start == layer:
            entry, own = together[joined].entry, states[layer]
            entering.append(own if entry is None else entry(own))
            joined += 1
        if entering:
            state = torch.cat(entering if state is None else [state, *entering])
    assert state is not None
    return state


def _writes_at(
    layer: int, together: Sequence[Continuation]
) -> dict[Site, list[tuple[int, int | None, Edit]]]:
    """Per place in a block, heads taken together: which continuation edits it, at which head, and how."""
    found: dict[Site, list[tuple[int, int | None, Edit]]] = {}
    for i, continuation in enumerate(together):
        for site, edit in continuation.writes.items():
            if site.layer == layer:
                found.setdefault(Site(layer, site.component), []).append((i, site.head, edit))
    return found


def _of_rows(parts: Sequence[tuple[int, int | None, Edit]], n_rows: int, d_head: int) -> Edit:
    """Edits of single continuations as one edit of all their rows."""

    def edit(acts: Tensor) -> Tensor:
        edited = acts.clone()
        for i, head, own in parts:
            rows = slice(i * n_rows, (i + 1) * n_rows)
            columns = slice(None) if head is None else slice(head * d_head, (head + 1) * d_head)
            edited[rows, :, columns] = own(edited[rows, :, columns])
        return edited

    return edit


# ---------------------------------------------------------------- cells of a patching sweep


@dataclass(frozen=True)
class Cell:
    """What is patched together: one place, or the same place in several neighbouring blocks, at the positions of one role."""

    sites: tuple[Site, ...]
    position: str
    """A role, or the index of a token."""


def sites_of(model: Model, *components: str) -> tuple[Site, ...]:
    """Every block's site of these components: of `resid_post` the input of block 0 too, of `z` every head.

    >>> from empathy_probes import load_phantom
    >>> model = load_phantom("planted-valence").base
    >>> [site.layer for site in sites_of(model, "resid_post")]
    [-1, 0, 1, 2, 3, 4, 5]
    >>> len(sites_of(model, "z")) == model.n_layers * model.n_heads
    True
    """
    found: list[Site] = []
    for component in components:
        if component not in (*COMPONENTS, HEADS):
            raise InputError(
                f"unknown site '{component}': expected one of {', '.join((*COMPONENTS, HEADS))}; name one of these"
            )
        if component == "resid_post":
            found.append(Site(-1))
        for layer in range(model.n_layers):
            heads: Sequence[int | None] = range(model.n_heads) if component == HEADS else (None,)
            found += [Site(layer, component, head) for head in heads]
    return tuple(found)


def make_cells(
    model: Model, sites: Sequence[Site], positions: Sequence[str], window: int = 1
) -> tuple[Cell, ...]:
    """Every site, with the same place in the next window − 1 blocks, at every position.

    Raises:
        InputError: no sites, one beyond the model, a window that is not between 1 and the number of blocks, or one that fits
            behind none of the sites.
    """
    if not sites:
        raise InputError("sites got an empty list, expected at least one; name one or leave the option out")
    if not all(isinstance(site, Site) for site in sites):
        raise InputError(
            f"sites got {sites!r}, expected places such as Site(3); pass a list of these, or sites_of(model, 'resid_post')"
        )
    if not isinstance(window, int | np.integer) or not 1 <= window <= model.n_layers:
        raise InputError(
            f"window got {window}, expected 1 to {model.n_layers}, the blocks of '{model.name}'; choose a number of blocks"
        )
    for site in sites:
        if site.layer >= model.n_layers or (site.head is not None and site.head >= model.n_heads):
            raise InputError(
                f"{site} is not in '{model.name}', expected one of its {model.n_layers} blocks and {model.n_heads} heads; choose one of these"
            )
    unique = list(dict.fromkeys(sites))
    spans = [
        tuple(Site(site.layer + k, site.component, site.head) for k in range(window))
        for site in unique
        if site.layer + window <= model.n_layers
    ]
    if not spans:
        first = min(site.layer for site in unique)
        raise InputError(
            f"a window of {window} blocks from block {first} on ends beyond '{model.name}', expected one within its {model.n_layers} "
            "blocks; choose a smaller window or an earlier site"
        )
    return tuple(Cell(span, position) for span in spans for position in positions)


@dataclass(frozen=True)
class Moves:
    """Where in a batch activations are taken from and put."""

    source_rows: Int[Tensor, " move"]
    sources: Int[Tensor, " move"]
    rows: Int[Tensor, " move"]
    """Of the texts put into: two per pair where continuations cannot share one."""
    targets: Int[Tensor, " move"]


@dataclass(frozen=True)
class PairBatch:
    """Some pairs: the prompts taken from, and the texts put into with what is asked after them."""

    index: tuple[int, ...]
    """Pairs."""
    source: TokenBatch
    target: AskedBatch
    moves: Mapping[str, Moves]
    """Per position."""


def pair_batches(
    model: Model, pairs: TextPairs, direction: str, positions: Sequence[str], budget: int = PAIR_TOKENS
) -> Iterator[PairBatch]:
    """Batches of at most `budget` padded tokens, longest first."""
    sources, targets = pairs.sides(direction)
    asked = pairs.asked

    def length(pair: int) -> int:
        return max(
            len(asked.prompts[i]) + sum(map(len, asked.tails(i))) for i in (sources[pair], targets[pair])
        )

    order = sorted(range(len(sources)), key=lambda pair: (-length(pair), pair))
    while order:
        size = max(1, budget // length(order[0]))
        index, order = order[:size], order[size:]
        source = pad_tokens([asked.prompts[sources[pair]] for pair in index], model.device)
        target = batch_asked(asked, [targets[pair] for pair in index], model)
        moves = {}
        for position in dict.fromkeys(positions):
            places = []
            for k, pair in enumerate(index):
                a, b = sources[pair], targets[pair]
                out = (pairs.outside[a], pairs.outside[b]) if pairs.outside is not None else ((), ())
                match = match_positions(position, asked.prompts[a], asked.prompts[b], out)
                places += [
                    (k, p, target.copies * k + copy, q)
                    for copy in range(target.copies)
                    for p, q in zip(match.source, match.target, strict=True)
                ]
            columns = torch.tensor(places, dtype=torch.long, device=model.device).reshape(-1, 4).unbind(-1)
            moves[position] = Moves(*columns)
        yield PairBatch(tuple(index), source, target, moves)


def take(source: Tensor, moves: Moves) -> Edit:
    """Put activations of another batch in place: patching at matched positions."""

    def edit(acts: Tensor) -> Tensor:
        edited = acts.clone()
        edited[moves.rows, moves.targets] = source[moves.source_rows, moves.sources].to(acts)
        return edited

    return edit


def patched_readouts(
    model: Model, pairs: TextPairs, cells: Sequence[Cell], direction: str, budget: int = SWEEP_TOKENS
) -> tuple[Float[np.ndarray, " pair"], Float[np.ndarray, "cell pair"]]:
    """Readout of every text put into, as it is and with every cell taken from its partner's run.

    Args:
        model: runs both texts of every pair once, and then only what lies behind the edits.
        pairs: from `pair_texts`.
        cells: from `make_cells`.
        direction: denoise (clean into the corrupted run) or noise.
        budget: padded tokens in one pass.
    """
    n = model.n_layers
    last = Site(n - 1)
    sites = list(dict.fromkeys(site for cell in cells for site in cell.sites))
    starts = {_start(cell) for cell in cells}
    deepest = max((site.layer for site in sites), default=0)
    plain = np.zeros(len(pairs.clean))
    patched = np.zeros((len(cells), len(pairs.clean)))
    per_token = 4 * model.d_model * (len(sites) + len(starts) + 2)
    at_once = max(1, min(PAIR_TOKENS, STATE_BYTES // per_token))
    for batch in pair_batches(model, pairs, direction, [cell.position for cell in cells], at_once):
        with torch.inference_mode():
            theirs = model.run(batch.source, read=sites, last_layer=max(deepest, 0)).acts
            wanted = dict.fromkeys([*(Site(start) for start in sorted(starts)), last])
            run = model.run(batch.target.tokens, read=list(wanted), last_layer=n - 1, capture=True)
            plain[list(batch.index)] = look_up(model, batch.target, run.acts[last]).cpu().numpy()
            going = [_continuation(cell, theirs, batch.moves[cell.position]) for cell in cells]
            states = {start: run.acts[Site(start)] for start in starts}
            patched[:, list(batch.index)] = continue_edited(model, batch.target, run, states, going, budget)
    return plain, patched


def _start(cell: Cell) -> int:
    """The block whose state a patch can start from: its own where the residual stream after it is what is patched."""
    first = min(cell.sites, key=lambda site: site.layer)
    return first.layer if first.component == "resid_post" else first.layer - 1


def _continuation(cell: Cell, theirs: Mapping[Site, Tensor], moves: Moves) -> Continuation:
    edits = {site: take(theirs[site], moves) for site in cell.sites}
    start = _start(cell)
    entry = edits.pop(Site(start), None)
    return Continuation(start, entry, edits)


def without_tokens(pairs: TextPairs, position: str) -> tuple[int, int]:
    """In how many pairs nothing has this role, and in how many one text has tokens of it that the other has not."""
    empty = unequal = 0
    for a, b in zip(pairs.clean, pairs.corrupted, strict=True):
        out = (pairs.outside[a], pairs.outside[b]) if pairs.outside is not None else ((), ())
        match = match_positions(position, pairs.asked.prompts[a], pairs.asked.prompts[b], out)
        empty += not match.source
        unequal += match.unequal
    return empty, unequal


# ---------------------------------------------------------------- the grid of a question


@dataclass(frozen=True)
class Place:
    """What was patched together, as plain data."""

    site: str
    layer: int
    """The block, −1 for the input of block 0; of a window its first."""
    head: int | None
    window: int
    """Neighbouring blocks patched together."""
    position: str
    """A role, or the index of a token."""
    flags: tuple[str, ...]
    """How well the role fits these texts."""


def grid_of(
    model: Model,
    pairs: TextPairs,
    concept: str,
    sites: Sequence[Site] | None,
    positions: Sequence[str] | None,
    window: int = 1,
) -> tuple[tuple[Cell, ...], tuple[Place, ...]]:
    """The cells asked for, and what is known about each before anything runs."""
    chat = pairs.outside is not None
    asked = [role for role in ROLES if chat or role != "template"] if positions is None else positions
    names = position_names(asked, pairs.lengths, concept, chat)
    cells = make_cells(model, sites_of(model, "resid_post") if sites is None else sites, names, window)
    known = {name: _position_flags(pairs, name) for name in names}
    places = tuple(
        Place(
            cell.sites[0].component, cell.sites[0].layer, cell.sites[0].head, len(cell.sites), cell.position,
            (*((f"window_{window}",) if window > 1 else ()), *known[cell.position]),
        )
        for cell in cells
    )  # fmt: skip
    return cells, places


def _position_flags(pairs: TextPairs, position: str) -> tuple[str, ...]:
    empty, unequal = without_tokens(pairs, position)
    if empty == len(pairs.clean):
        return ("no_tokens",)
    # Texts without a token of the role stay as they are: nothing was patched there, and nothing moved.
    return (*(("some_without_tokens",) if empty else ()), *(("unequal_spans",) if unequal else ()))


def place_cells(place: Place) -> dict[str, Any]:
    """The columns that say where."""
    return {"site": place.site, "layer": place.layer, "head": place.head, "position": place.position}


def directions_of(direction: str) -> tuple[str, ...]:
    """Both, or the one asked for.

    Raises:
        InputError: it is neither.
    """
    if direction not in (*DIRECTIONS, "both"):
        raise InputError(f"unknown direction '{direction}': expected denoise, noise or both; choose one")
    return DIRECTIONS if direction == "both" else (direction,)
