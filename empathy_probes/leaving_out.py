"""How far a number errs that probes made: all of them trained anew without every scenario in turn, in closed form.

A score depends on the held-out text and on the scenarios that its probe learnt from. How much the latter matters shows when a
scenario is left out of everything. The dual solution of a ridge without some texts needs no factorisation of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from einops import rearrange
from jaxtyping import Float, Int, Num
from scipy.linalg import cho_solve

from empathy_probes.jackknife import Jackknife
from empathy_probes.probes import factor_gram, from_their_mean, signed_targets

# Numbers held at once while units are left out.
CHUNK = 2_000_000


class LeftOut:
    """Every unit alone, then every unit with the next one on a ring in random order: what is left out in turn."""

    def __init__(self, units: Sequence[str], seed: int):
        order = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
        place, n = np.array([order[unit] for unit in units]), len(order)
        self.n = n
        self.share = np.eye(n)[place] / np.bincount(place)
        # By name, so that the order of texts does not matter.
        self.ring = np.random.default_rng([seed, 41]).permutation(np.argsort(list(order)))
        alone = np.stack([np.arange(n), np.full(n, n)], 1)
        self.sets = np.concatenate([alone, np.stack([self.ring, np.roll(self.ring, -1)], 1)])
        self._place = place
        self._texts = np.full((n + 1, np.bincount(place).max()), len(units))
        for i in range(n):
            mine = np.flatnonzero(place == i)
            self._texts[i, : len(mine)] = mine

    def chunks(self, size: int, many: int | None = None) -> list[slice]:
        """Few enough of the first `many` sets (all) at a time, where each needs `size` numbers."""
        step, last = max(CHUNK // size, 1), len(self.sets) if many is None else many
        return [slice(i, min(i + step, last)) for i in range(0, last, step)]

    def texts(self, chunk: slice) -> Int[np.ndarray, "set text"]:
        """The texts of each set, filled up with one past the last."""
        return self._texts[self.sets[chunk]].reshape(len(self.sets[chunk]), -1)

    def kept(self, chunk: slice) -> Float[np.ndarray, "set n"]:
        """1 for the texts that are not in the set, 0 for those that are."""
        return (self._place != self.sets[chunk][..., None]).all(1).astype(float)

    def pairs(
        self, value: Float[np.ndarray, "..."], without: Float[np.ndarray, "... set"]
    ) -> Float[np.ndarray, "... unit"]:
        """n times what two units, neighbours on the ring, do to a value together, beyond both alone."""
        n = self.n
        one, two = without[..., :n], without[..., n:]
        either = one[..., self.ring] + one[..., np.roll(self.ring, -1)]
        return n * np.asarray(value)[..., None] - (n - 1) * either + (n - 2) * two


class DualProbe:
    """One ridge probe at one layer: its scores of held-out texts, and how they would change without some that it learnt from.

    The dual solution without texts s is the one in which theirs is 0: α − P_s P_ss⁻¹ α_s, with P the inverse of the
    Gram matrix, penalty and intercept included. Exact at the same penalty; no factorisation per set.
    """

    def __init__(
        self,
        gram: Float[np.ndarray, "n n"],
        targets: Float[np.ndarray, "n m"],
        train: Int[np.ndarray, " train"],
        test: Int[np.ndarray, " test"],
        penalty: float,
        states: Float[np.ndarray, "read n"] | None = None,
    ):
        """`states`: inner products of all that is to be read (another model's states) with the texts; those of `test` by default."""
        self.train, self.test = train, test
        inner = gram[np.ix_(train, train)]
        column, n = inner.mean(0), len(train)
        centred = inner - column - column[:, None] + column.mean()
        shift = max(penalty * np.trace(centred) / n, 0.0) or 1.0  # as `factor_gram`
        inverse = cho_solve((factor_gram(centred, shift), False), np.eye(n))
        read = (gram[test] if states is None else states)[:, train] - column
        read -= read.mean(1, keepdims=True)
        self.mean = targets[train].mean(0)
        self.solution = inverse @ (targets[train] - self.mean)
        self.scores = read @ self.solution + self.mean
        self.inverse = inverse - 1 / (n * shift)
        self.weights = read @ inverse + 1 / n
        self.place = np.full(len(gram) + 1, -1)
        self.place[train] = np.arange(n)

    def moves(self, texts: Int[np.ndarray, "set text"]) -> Float[np.ndarray, "set read m"]:
        """Change of every score without each set of texts."""
        index = self.place[texts]
        there = index >= 0
        own = self.inverse[index[:, :, None], index[:, None]] * (there[:, :, None] & there[:, None])
        own[:, np.arange(own.shape[1]), np.arange(own.shape[1])] += ~there
        taken = np.linalg.solve(own, self.solution[index] * there[..., None])
        return np.asarray(-np.swapaxes(self.weights.T[index] * there[..., None], 1, 2) @ taken)

    def retaught(
        self, texts: Int[np.ndarray, "set text"], change: Float[np.ndarray, "n m"]
    ) -> Float[np.ndarray, "set read m"]:
        """Change of every score were the targets of each set of texts others by so much."""
        index = self.place[texts]
        there = index >= 0
        told = change[np.minimum(texts, len(change) - 1)] * there[..., None]
        return np.asarray(np.swapaxes(self.weights.T[index], 1, 2) @ told)


def leave_out(
    fitted: Float[np.ndarray, "n layer d"],
    reads: Sequence[Float[np.ndarray, "n layer d"]],
    labels: Num[np.ndarray, "contrast n"],
    folds: Int[np.ndarray, " n"],
    units: Sequence[str],
    value: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    seed: int = 0,
) -> Jackknife:
    """What a value of `paired_scores` of each of `reads` would be without every unit in turn, all probes trained anew.

    How it differs tells how far it errs, the luck of training included. Axes are read, layer and unit, in the order of their first text:
    probes neither learn from it nor read it. All values of the same units and seed have the same pairs.

    Args:
        fitted: states that probes are trained on.
        reads: states that they read, of the same texts.
        labels: one row per contrast.
        folds: fold of each text; texts of a unit share one.
        units: of each text.
        value: of scores [... contrast n], the labels, and which texts there are [... n]: 1, others 0.
        seed: which units make a pair.
    """
    left_out, targets = LeftOut(units, seed), signed_targets(labels)
    n, m = targets.shape
    held_out = [np.flatnonzero(folds == fold) for fold in np.unique(folds)]
    wholes, alone, pairs = [], [], []
    for x, *others in zip(*from_their_mean(fitted, *reads), strict=True):
        gram = x @ x.T
        products = np.stack([read @ x.T for read in others])
        scores = np.empty((len(reads), n, m))
        probes = []
        for test in held_out:
            states = rearrange(products[:, test], "read test n -> (read test) n")
            probe = DualProbe(gram, targets, np.setdiff1d(np.arange(n), test), test, 1.0, states)
            # Less the training mean, as `paired_scores`.
            scores[:, test] = rearrange(
                probe.scores - probe.mean, "(read test) m -> read test m", read=len(reads)
            )
            probes.append(probe)
        without = np.empty((len(reads), len(left_out.sets)))
        for chunk in left_out.chunks(scores.size):
            texts, kept = left_out.texts(chunk), left_out.kept(chunk)
            moved = np.repeat(scores[None], len(texts), 0)
            for probe in probes:
                changed = probe.moves(texts) - _mean_moves(targets, probe, kept)
                moved[:, :, probe.test] += rearrange(
                    changed, "set (read test) m -> set read test m", read=len(reads)
                )
            moved = _told(moved)
            without[:, chunk] = value(moved, labels, kept[:, None]).T
        wholes.append(value(_told(scores), labels, np.ones((1, n))))
        alone.append(without[:, : left_out.n])
        pairs.append(left_out.pairs(wholes[-1], without))
    return Jackknife(*(np.stack(found, 1) for found in (wholes, alone, pairs)))


def _told(scores: Float[np.ndarray, "*batch n m"]) -> Float[np.ndarray, "*batch m n"]:
    """Without what only rounding tells apart: texts whose states are equal must not be ranked by it."""
    return np.swapaxes(np.round(scores, 12), -1, -2)


def _mean_moves(
    targets: Float[np.ndarray, "n m"], probe: DualProbe, kept: Float[np.ndarray, "set n"]
) -> Float[np.ndarray, "set read=1 m"]:
    """Change of the training mean, which a score of all its texts together would have."""
    there = kept[:, probe.train]
    return ((there @ targets[probe.train]) / there.sum(1, keepdims=True) - probe.mean)[:, None]
