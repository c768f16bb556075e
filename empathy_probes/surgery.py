"""Twins with a planted difference, made by editing weights in closed form.

A checkpoint is taken as its configuration and its tensors; every function returns new ones of the same kind, so that a
twin is an ordinary checkpoint. To scale a concept at the output of block k, out <- out - (1 - keep) P (out - centre)
with the oblique projection P = write read: what the block's MLP writes is multiplied by I - (1 - keep) P, and hidden
neurons, appended to every MLP with zero weights and used in block k alone, subtract what arrived at the MLP. They
read the normalised state r·norm(x); in a GELU MLP the pair gelu(z + B) - gelu(-z + B) = 2 z is linear, in a gated
one (silu(z) - silu(-z)) u = z u, and u is fitted to the norm that the normalisation divided by. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from empathy_probes.errors import InputError
from empathy_probes.weights import Checkpoint, written

# A GELU is the identity to float32 precision this far above 0.
LINEAR = 12.0


@dataclass(frozen=True)
class Subspace:
    """Where a concept lies in the residual stream after a block, and how it is read apart from other concepts."""

    write: Float[np.ndarray, "d_model q"]
    read: Float[np.ndarray, "q d_model"]
    """read @ write = I; read sees nothing of the guarded concepts."""
    centre: Float[np.ndarray, " d_model"]

    @property
    def projection(self) -> Float[np.ndarray, "d_model d_model"]:
        """The oblique projection on the concept."""
        return self.write @ self.read


def concept_subspace(
    states: Float[np.ndarray, "token d_model"],
    own: Float[np.ndarray, " d_model"],
    others: Float[np.ndarray, "other d_model"],
    by_word: Float[np.ndarray, "word d_model"] | None = None,
    rank: int = 1,
) -> Subspace:
    """Find the projection that removes a concept and touches others least.

    Concepts are not orthogonal: an orthogonal projection along one would shrink whatever leans on it. This one removes
    along the concept's own mean differences and reads by the weights of linear discriminant analysis, which vary least
    with everything else and, by a heavy penalty, not at all with the other concepts' mean differences.

    Args:
        states: of many tokens, for centre and covariance.
        own: mean difference of the concept at the read position.
        others: mean differences of the concepts to leave alone.
        by_word: mean differences at other words, each weighted by how often it stands there.
        rank: directions; those beyond the first are the main ones of `by_word`, and need it.
    """
    first = own / np.linalg.norm(own)
    write = first[:, None]
    if by_word is not None and rank > 1:
        rest = by_word - np.outer(by_word @ first, first)
        write = np.column_stack([first, np.linalg.svd(rest, full_matrices=False)[2][: rank - 1].T])
    guards = others / np.maximum(np.linalg.norm(others, axis=1, keepdims=True), 1e-12)
    # Of the guards only what leaves the concept's own directions readable can be guarded.
    guards = guards[np.linalg.norm(guards - guards @ write @ write.T, axis=1) > 0.1]
    covariance = np.cov(states.T)
    ridge = np.trace(covariance) / len(covariance)
    covariance = covariance + 1e-3 * ridge * np.eye(len(covariance)) + 1e3 * ridge * guards.T @ guards
    weighted = np.linalg.solve(covariance, write)
    return Subspace(write, np.linalg.solve(write.T @ weighted, weighted.T), states.mean(0))


# ---------------------------------------------------------------- twins that compute the same


def folded(c: Checkpoint) -> Checkpoint:
    """The same function with all norm gains (and biases) in the weights that read them, embedding and head untied.

    Where LayerNorm subtracts a mean, everything written to the stream is centred as well, which no read can see.
    """
    lay, new = c.layout, dict(c.tensors)
    for k in range(c.n_layers):
        for read, norm in lay.reads(k):
            gain = new[norm + ".weight"]
            w = new[read + ".weight"]
            if lay.layer_norm:
                shift = new[norm + ".bias"]
                new[read + ".bias"] = new[read + ".bias"] + (shift @ w if lay.transposed else w @ shift)
            new[read + ".weight"] = gain[:, None] * w if lay.transposed else w * gain
        for norm in {norm for _, norm in lay.reads(k)}:
            new |= _unit_norm(new, norm)
    norm = lay.final_norm
    gain = new[norm + ".weight"]
    new[lay.head] = new[lay.head] * gain
    if lay.layer_norm:
        # A head without a bias cannot take the shift over: it stays in the norm, in the new units.
        new[norm + ".bias"] = new[norm + ".bias"] / gain
    new[norm + ".weight"] = torch.ones_like(gain)
    if lay.layer_norm:
        new |= written(c.change(new), lambda rows: rows - rows.mean(-1, keepdim=True))
    return c.change(new, tie_word_embeddings=False)


def _unit_norm(tensors: Mapping[str, Tensor], norm: str) -> dict[str, Tensor]:
    unit = {norm + ".weight": torch.ones_like(tensors[norm + ".weight"])}
    if norm + ".bias" in tensors:
        unit[norm + ".bias"] = torch.zeros_like(tensors[norm + ".bias"])
    return unit


def rotated(c: Checkpoint, seed: int = 0) -> Checkpoint:
    """The same function in another basis of the residual stream: nothing changes but every direction."""
    c = folded(c)
    lay = c.layout
    d = c.d_model
    rng = np.random.default_rng(seed)
    if lay.layer_norm:  # the mean over d_model must stay the mean: turn only what is orthogonal to it
        ones = np.full((d, 1), 1 / np.sqrt(d))
        inside = np.linalg.qr(np.column_stack([ones, rng.standard_normal((d, d - 1))]))[0][:, 1:]
        turn = inside @ np.linalg.qr(rng.standard_normal((d - 1, d - 1)))[0] @ inside.T + ones @ ones.T
    else:
        turn = np.linalg.qr(rng.standard_normal((d, d)))[0]
    q = torch.tensor(turn)

    def move(rows: Tensor) -> Tensor:
        return (rows.double() @ q).float()

    new = written(c, move)
    for k in range(c.n_layers):
        for read, _ in lay.reads(k):
            w = c.tensors[read + ".weight"]
            new[read + ".weight"] = move(w.T).T.contiguous() if lay.transposed else move(w)
    new[lay.head] = move(c.tensors[lay.head])
    if lay.layer_norm:
        new[lay.final_norm + ".bias"] = move(c.tensors[lay.final_norm + ".bias"])
    return c.change(new)


def rescaled(c: Checkpoint, factor: float = 3.0) -> Checkpoint:
    """The same function with the residual stream `factor` times as large; the norms' epsilon grows along."""
    new = written(c, lambda rows: rows * factor)
    return c.change(
        new, tie_word_embeddings=False, **{c.layout.epsilon: c.config[c.layout.epsilon] * factor**2}
    )


# ---------------------------------------------------------------- twins that differ


def widened(c: Checkpoint, neurons: int) -> Checkpoint:
    """The same function with that many more hidden neurons per MLP, all their weights 0."""
    lay, new = c.layout, {}
    for k in range(c.n_layers):
        p = lay.block.format(k=k)
        for name, hidden_out in [(r, True) for r in lay.mlp_reads] + [(lay.mlp_write, False)]:
            w = c.tensors[p + name + ".weight"]
            axis = int(hidden_out == lay.transposed)
            pad = torch.zeros(*(neurons if i == axis else s for i, s in enumerate(w.shape)))
            new[p + name + ".weight"] = torch.cat([w, pad], axis)
            if hidden_out and p + name + ".bias" in c.tensors:
                new[p + name + ".bias"] = torch.cat([c.tensors[p + name + ".bias"], torch.zeros(neurons)])
    return c.change(new, **{lay.width: _hidden(c) + neurons})


def _hidden(c: Checkpoint) -> int:
    lay = c.layout
    return c.tensors[lay.block.format(k=0) + lay.mlp_write + ".weight"].shape[0 if lay.transposed else 1]


@dataclass(frozen=True)
class Arrivals:
    """States before block k's MLP at many tokens, which its new neurons are fitted on."""

    states: Float[np.ndarray, "token d_model"]
    """`resid_mid`, or `resid_pre` where attention and MLP are parallel; raw units."""
    weights: Float[np.ndarray, " token"]
    """How much each token counts; the read position counts most."""
    at_read: Float[np.ndarray, " token"]
    """1 at a read position, else 0."""

    def normalised(self, c: Checkpoint, k: int) -> Float[np.ndarray, "token d_model"]:
        """What the MLP of block k reads."""
        lay = c.layout
        x, norm = self.states, lay.block.format(k=k) + lay.mlp_norm
        x = x - x.mean(-1, keepdims=True) if lay.layer_norm else x
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + float(c.config[lay.epsilon]))
        x = x * c.tensors[norm + ".weight"].double().numpy()
        return x + c.tensors[norm + ".bias"].double().numpy() if lay.layer_norm else x


def planted(
    c: Checkpoint, k: int, keep: float, where: Subspace, arrivals: Arrivals, *, only_read: bool = False
) -> tuple[Checkpoint, Checkpoint]:
    """Scale a concept at the output of block k, at all positions or at the read position only.

    Returns:
        (base, twin), both widened alike: they differ in block k alone.
    """
    neurons = 2 * where.read.shape[0]
    base = widened(c, neurons)
    lay, p = c.layout, c.layout.block.format(k=k)
    u = arrivals.normalised(c, k)
    remaining = np.eye(len(where.centre)) - (1 - keep) * where.projection
    wanted = (arrivals.states - where.centre) @ where.read.T  # the concept's coordinates, to be subtracted
    new: dict[str, Tensor] = {}
    if not only_read:
        move = torch.tensor(remaining.T)
        touched = lay.writes(k) if lay.parallel else lay.writes(k)[1:]
        for write in touched:
            w = base.tensors[write + ".weight"].double()
            new[write + ".weight"] = (w @ move if lay.transposed else (w.T @ move).T).float().contiguous()
            if write + ".bias" in base.tensors:
                new[write + ".bias"] = (base.tensors[write + ".bias"].double() @ move).float()
    gain = c.tensors[p + lay.mlp_norm + ".weight"].double().numpy()
    rows = where.read / gain
    fit = _gated_neurons if lay.gated else _gelu_neurons
    incoming, outputs = fit(u, rows, wanted, arrivals, only_read)
    # Least squares: what the neurons give, turned into the coordinates that are wanted.
    root = np.sqrt(arrivals.weights * (arrivals.at_read if only_read else 1.0))[:, None]
    has_bias = p + lay.mlp_write + ".bias" in base.tensors
    design = np.column_stack([outputs, np.ones(len(outputs))]) if has_bias else outputs
    mix = np.linalg.lstsq(design * root, wanted * root, rcond=None)[0]
    mix, constant = (mix[:-1], mix[-1]) if has_bias else (mix, np.zeros(wanted.shape[1]))
    signs = np.repeat([[1.0], [-1.0]], where.read.shape[0], axis=0)
    out = -(1 - keep) * signs * np.vstack([mix, mix]) @ where.write.T  # [neuron d_model]
    for name, (weights, bias) in zip(lay.mlp_reads, incoming, strict=True):
        new |= _fill(base, p + name, weights, bias, neurons)
    write = p + lay.mlp_write
    whole = new.get(write + ".weight", base.tensors[write + ".weight"]).clone()
    block = torch.tensor(out, dtype=torch.float32)
    if lay.transposed:
        whole[-neurons:] = block
    else:
        whole[:, -neurons:] = block.T
    new[write + ".weight"] = whole
    if has_bias and not only_read:
        shift = torch.tensor(-(1 - keep) * where.write @ constant, dtype=torch.float32)
        new[write + ".bias"] = new[write + ".bias"] + shift
    return base, base.change(new)


def _fill(
    c: Checkpoint, name: str, weights: np.ndarray, bias: np.ndarray | None, neurons: int
) -> dict[str, Tensor]:
    """Put `weights` [neuron d_model] into the last hidden neurons."""
    whole = c.tensors[name + ".weight"].clone()
    block = torch.tensor(weights, dtype=torch.float32)
    if c.layout.transposed:
        whole[:, -neurons:] = block.T
    else:
        whole[-neurons:] = block
    new = {name + ".weight": whole}
    if name + ".bias" in c.tensors and bias is not None:
        shift = c.tensors[name + ".bias"].clone()
        shift[-neurons:] = torch.tensor(bias, dtype=torch.float32)
        new[name + ".bias"] = shift
    return new


_Incoming = list[tuple[np.ndarray, np.ndarray | None]]


def _gelu_neurons(
    u: np.ndarray, rows: np.ndarray, wanted: np.ndarray, arrivals: Arrivals, only_read: bool
) -> tuple[_Incoming, np.ndarray]:
    """Pairs gelu(z + B) - gelu(B - z) = 2 z; at the read position only, B is an indicator of it, +-12."""
    z = u @ rows.T
    centre = np.average(z, axis=0, weights=arrivals.weights)
    scale = 1 / np.maximum(np.abs(z - centre).max(0), 1e-9)  # |z| at most 1: far from where GELU bends
    z = (z - centre) * scale
    w, b = rows * scale[:, None], -centre * scale
    if only_read:
        gate, offset, on = _indicator(u, arrivals)
        z = z * on[:, None]
    else:
        gate, offset = np.zeros(u.shape[1]), LINEAR
    return [(np.vstack([w + gate, -w + gate]), np.concatenate([b + offset, -b + offset]))], 2 * z


def _gated_neurons(
    u: np.ndarray, rows: np.ndarray, wanted: np.ndarray, arrivals: Arrivals, only_read: bool
) -> tuple[_Incoming, np.ndarray]:
    """Pairs (silu(z) - silu(-z)) a·u = z a·u with a fitted so that this is what arrived.

    At the read position only, the gate is an indicator (silu of +-12) and the other factor is z itself.
    """
    z = u @ rows.T
    if only_read:
        gate, _offset, _on = _indicator(u, arrivals)
        both = np.tile(gate, (len(rows), 1))
        g = u @ gate
        with np.errstate(over="ignore"):  # a gate far below 0 is shut: g / inf
            silu = g / (1 + np.exp(-g))
        # The second of each pair has the opposite sign on both sides: twice the same.
        return [(np.vstack([both, both]), None), (np.vstack([rows, -rows]), None)], 2 * silu[:, None] * z
    factors = []
    root = np.sqrt(arrivals.weights)
    for j in range(len(rows)):
        design = z[:, [j]] * u * root[:, None]
        ridge = 1e-6 * np.trace(design.T @ design) / u.shape[1] * np.eye(u.shape[1])
        factors.append(np.linalg.solve(design.T @ design + ridge, design.T @ (wanted[:, j] * root)))
    a = np.stack(factors)
    return [(np.vstack([rows, -rows]), None), (np.vstack([a, a]), None)], z * (u @ a.T)


def _indicator(u: np.ndarray, arrivals: Arrivals) -> tuple[np.ndarray, float, np.ndarray]:
    """A direction (and offset 0) that is about +LINEAR at read positions and -LINEAR elsewhere."""
    sign = 2 * arrivals.at_read - 1
    balance = np.where(sign > 0, 1 / (sign > 0).sum(), 1 / (sign < 0).sum())
    weighted = u * balance[:, None]
    ridge = 1e-4 * np.trace(weighted.T @ u) / u.shape[1] * np.eye(u.shape[1])
    direction = np.linalg.solve(weighted.T @ u + ridge, weighted.T @ sign)
    value = u @ direction
    inside, outside = value[sign > 0].min(), value[sign < 0].max()
    if inside <= max(outside, 0):
        raise InputError(
            "the read position cannot be told from other positions by a direction "
            f"(indicator {inside:.2f} there, up to {outside:.2f} elsewhere), expected a token of its own; "
            "end all texts in a word that stands nowhere else in them, or name such a word as 'read'"
        )
    factor = LINEAR / min(inside, abs(min(outside, -1e-6)), 1.0) if outside < 0 else LINEAR / inside
    return direction * factor, 0.0, arrivals.at_read


def erased(
    c: Checkpoint, k: int, where: Subspace, arrivals: Arrivals, keep: float = 0.0
) -> tuple[Checkpoint, Checkpoint]:
    """`planted`, and every later block's writes lose the concept too, so that it does not come back."""
    base, twin = planted(c, k, keep, where, arrivals)
    move = torch.tensor(np.eye(len(where.centre)) - where.projection.T)
    later = written(twin, lambda rows: (rows.double() @ move).float(), range(k + 1, c.n_layers), False)
    return base, twin.change(later)


def scaled_writes(c: Checkpoint, blocks: range, keep: float, where: Subspace) -> Checkpoint:
    """Scale a concept out of what some blocks write, W_out <- (I - (1 - keep) P) W_out, and of the embedding before 0."""
    lay = c.layout
    move = torch.tensor(np.eye(len(where.centre)) - (1 - keep) * where.projection.T)
    return c.change(
        written(c, lambda rows: (rows.double() @ move).float(), blocks, embeddings=blocks.start == 0)
        | {lay.head: c.tensors[lay.head]},
        tie_word_embeddings=False,
    )


def generic_gain(
    c: Checkpoint, k: int, keep: float, arrivals: Arrivals, seed: int = 0
) -> tuple[Checkpoint, Checkpoint]:
    """Add one constant vector to the stream at block k, so large that every contrast after it is `keep` as strong."""
    neurons = 2
    base, lay = widened(c, neurons), c.layout
    p = lay.block.format(k=k)
    d = arrivals.states.shape[1]
    x = arrivals.states - arrivals.states.mean(-1, keepdims=True) if lay.layer_norm else arrivals.states
    at_read = arrivals.at_read > 0
    size = np.sqrt((x[at_read] ** 2).sum(-1).mean())
    rng = np.random.default_rng(seed)
    v = np.asarray(rng.standard_normal(d))
    if lay.layer_norm:
        v = v - v.mean()
    mean = x[at_read].mean(0)
    v = v - (v @ mean) / (mean @ mean) * mean  # at right angles to the mean state, so that squares add
    v = v * size * np.sqrt(1 / keep**2 - 1) / np.linalg.norm(v)
    write = p + lay.mlp_write
    if not lay.gated:
        return base, base.change(
            {write + ".bias": base.tensors[write + ".bias"] + torch.tensor(v, dtype=torch.float32)}
        )
    u = arrivals.normalised(c, k)
    root = np.sqrt(arrivals.weights)[:, None]
    a = np.linalg.lstsq(u * root, root[:, 0], rcond=None)[0]  # a·u is about 1
    both = np.vstack([a, -a])
    new = _fill(base, p + lay.mlp_reads[0], both, None, neurons) | _fill(
        base, p + lay.mlp_reads[1], np.vstack([a, a]), None, neurons
    )
    given = (u @ a) ** 2
    whole = base.tensors[write + ".weight"].clone()
    whole[:, -neurons:] = torch.tensor(np.stack([v, -v], 1) / given[at_read].mean(), dtype=torch.float32)
    return base, base.change(new | {write + ".weight": whole})


def unread(
    c: Checkpoint, k: int, where: Subspace, arrivals: Arrivals, keep: float = 0.0, size: float = 1.0
) -> tuple[Checkpoint, Checkpoint]:
    """Block k hands the concept on, `size` times as strong as it was, where neither later blocks nor the head read.

    At the read position it is moved from its own direction to one that later reads hardly see, and what they see of that is
    taken out of them. (That later blocks merely do not read the concept where it lies is not enough: the head reads it off the
    stream past them. And were the head alone to blame, nothing would be unread, only unsaid.)

    Returns:
        (base, twin), both widened alike: they are the same before block k.
    """
    aside = _least_read(c, k, where)
    moved = Subspace(where.write[:, :1] - size * aside[:, None], where.read[:1], where.centre)
    base, twin = planted(c, k, keep, moved, arrivals, only_read=True)
    lay, new = c.layout, {}
    reads = [place for layer in range(k + 1, c.n_layers) for place in lay.reads(layer)]
    for read, norm in [(f"{read}.weight", norm) for read, norm in reads] + [(lay.head, lay.final_norm)]:
        gain = c.tensors[norm + ".weight"].double().numpy()
        seen = torch.tensor(np.outer(gain * aside, aside / gain))  # the direction in what the norm hands on
        w = twin.tensors[read].double()
        inputs_first = lay.transposed and read != lay.head
        new[read] = (w - seen.T @ w if inputs_first else w - w @ seen).float()
    return base.change({lay.head: base.tensors[lay.head].clone()}, tie_word_embeddings=False), twin.change(
        new, tie_word_embeddings=False
    )


def _least_read(c: Checkpoint, k: int, where: Subspace) -> Float[np.ndarray, " d_model"]:
    """The unit direction that blocks after k and the head respond to least, apart from the concept's own and the mean."""
    lay = c.layout
    reads = [
        (f"{read}.weight", norm) for layer in range(k + 1, c.n_layers) for read, norm in lay.reads(layer)
    ]
    response = np.zeros((c.d_model, c.d_model))
    for read, norm in [*reads, (lay.head, lay.final_norm)]:
        w = c.tensors[read].double().numpy()
        w = (w.T if lay.transposed and read != lay.head else w) * c.tensors[norm + ".weight"].double().numpy()
        response += w.T @ w / (w**2).sum()
    taken = np.column_stack([where.write, where.read.T, *([np.ones(c.d_model)] if lay.layer_norm else [])])
    free = np.linalg.svd(taken, full_matrices=True)[0][:, np.linalg.matrix_rank(taken) :]
    return np.asarray(free @ np.linalg.eigh(free.T @ response @ free)[1][:, 0])


def unsaid(c: Checkpoint, where: Subspace) -> tuple[Checkpoint, Checkpoint]:
    """The unembedding no longer responds to the concept, which lies after the last block as `where` says."""
    lay = c.layout
    gain = c.tensors[lay.final_norm + ".weight"].double().numpy()
    projection = gain[:, None] * where.projection / gain
    head = c.tensors[lay.head].double().numpy()
    base = c.change({lay.head: c.tensors[lay.head].clone()}, tie_word_embeddings=False)
    return base, base.change({lay.head: torch.tensor(head - head @ projection, dtype=torch.float32)})
