"""Permutation tests of linear probes: ours at all layers, folds and permutations, a scikit-learn pipeline extrapolated.

    python scripts/benchmarks/probes.py [--n 2000] [--d 768] [--layers 12] [--permutations 1000] [--repeats 3]

The same work in one process, on one thread and then on as many as the libraries take by themselves: 5 folds of scenarios, AUROC of
held-out texts, labels shuffled within scenarios. Ours runs in full. scikit-learn's `permutation_test_score` over a standardised
LogisticRegression runs 20 permutations at one layer and is multiplied up to all layers and permutations. Both run in turn, and
medians are printed.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, permutation_test_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from empathy_probes.auroc import auroc
from empathy_probes.nulls import permutation_null
from empathy_probes.stats import grouped_folds

PEER_PERMUTATIONS = 20


def make_data(n: int, d: int, layers: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Texts in pairs, a weak contrast in correlated noise."""
    rng = np.random.default_rng(0)
    labels = np.tile([1, 0], n // 2)
    mixing = rng.standard_normal((d, d)) / np.sqrt(d)
    features = rng.standard_normal((n, layers, d)) @ mixing
    features += 0.03 * (2 * labels[:, None, None] - 1) * rng.standard_normal((1, layers, d))
    return features, labels, [str(i // 2) for i in range(n)]


def main() -> None:
    """Run both and print seconds, ratio and what each found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--permutations", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"n = {args.n}, d = {args.d}, {args.layers} layers, 5 folds, {args.permutations} permutations")
    features, labels, units = make_data(args.n, args.d, args.layers)
    for threads in (1, None):
        print(f"{threads} thread" if threads else "threads as installed")
        with threadpool_limits(threads):
            compare(features, labels, units, args.permutations, args.repeats)


def compare(
    features: np.ndarray, labels: np.ndarray, units: list[str], permutations: int, repeats: int
) -> None:
    """Time both in turn and print what each found."""
    folds = grouped_folds(units, 5)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    groups = np.array([int(unit) for unit in units])
    ours, theirs = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        scores, null = permutation_null(features, labels[None], units, units, folds, draws=permutations)
        observed = auroc(scores[:, 0], labels)
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        score, shuffled, _ = permutation_test_score(
            probe, features[:, 0], labels, groups=groups, cv=GroupKFold(5), n_permutations=PEER_PERMUTATIONS,
            scoring="roc_auc", random_state=0,
        )  # fmt: skip
        theirs.append(time.perf_counter() - began)
    p = (1 + (null >= observed).sum(0)) / (permutations + 1)
    # One fit of all folds is the observed score, the others are permutations.
    whole = np.median(theirs) / (PEER_PERMUTATIONS + 1) * (permutations + 1) * features.shape[1]
    print(
        f"  empathy_probes   {np.median(ours):10.1f} s   AUROC at layer 0 {observed[0]:.3f}, shuffled {null[:, 0].mean():.3f}, p {p[0]:.4f}"
    )
    print(
        f"  scikit-learn     {whole:10.0f} s   AUROC at layer 0 {score:.3f}, shuffled {shuffled.mean():.3f} "
        f"({PEER_PERMUTATIONS} permutations at 1 layer took {np.median(theirs):.1f} s; the rest is multiplied up)"
    )
    print(f"  ratio            {whole / np.median(ours):10.0f} ×")


if __name__ == "__main__":
    main()
