"""Do the intervals of the method cover what they promise?  No model is needed.

Contrast vectors are simulated directly: D = signal + noise in d dimensions, the noise with a falling spectrum
(1/rank, so that a few directions dominate, as in residual streams), base and aligned noise correlated 0.8, the
trace of the noise given as a multiple of the squared signal. Every table row is a proportion with its binomial
95 % interval.

    python scripts/simulations/coverage.py --replicates 500 --seed 0 --tables ratio --out ratio.csv
    python scripts/simulations/coverage.py --quick

The shipped docs/simulations/coverage.csv was put together table by table, each with a number of replicates of its own:
docs/simulations/README.md has the command of every table.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from scipy.stats import norm

from empathy_probes.alignment import fit_map
from empathy_probes.auroc_intervals import auroc_difference, auroc_interval
from empathy_probes.contrasts import Contrast, compare
from empathy_probes.controls import build_reference, gap_to
from empathy_probes.decisions import POWER, Judgement, judge
from empathy_probes.geometry import (
    GROUPS,
    cosine_from_kernels,
    delete_one_cosine,
    map_variance,
    whitened_kernels,
    whitened_strengths,
    whitening_covariance,
)
from empathy_probes.keeps import fieller, keep_interval, log_ratio, middle_theta
from empathy_probes.kernels import (
    SECOND_ORDER,
    KernelPair,
    cross_kernels,
    is_strong,
    pair_kernels,
    strength_kernels,
    u_statistic,
)
from empathy_probes.stats import binomial_interval, critical_t, largest_quantile, unit_normals, unit_signs
from empathy_probes.strengths import strength_difference, strength_interval

DIMENSIONS = 48
MODEL_CORRELATION = 0.8
LAYERS = 12


@dataclass(frozen=True)
class Cell:
    """One proportion: `hits` of `trials` replicates, or a plain number in `value` where it is not a proportion."""

    table: str
    cell: str
    metric: str
    hits: int
    trials: int
    value: float | None = None

    def row(self) -> dict[str, str]:
        """As text, with the Wilson interval of a proportion."""
        if self.value is not None:
            numbers = [f"{self.value:.3f}", "", ""]
        elif self.trials == 0:
            numbers = ["", "", ""]
        else:
            e = binomial_interval(self.hits, self.trials)
            numbers = [f"{x:.3f}" for x in (e.value, e.lower, e.upper)]
        names = ("table", "cell", "metric", "value", "lower", "upper", "trials")
        texts = (self.table, self.cell, self.metric, *numbers, str(self.trials))
        return dict(zip(names, texts, strict=True))


def share(table: str, cell: str, metric: str, hits: np.ndarray) -> Cell:
    """The cell of a boolean array over replicates."""
    return Cell(table, cell, metric, int(hits.sum()), int(hits.size))


# ---------------------------------------------------------------- data


def noise(rng: np.random.Generator, shape: tuple[int, ...], trace: float, heavy: bool) -> np.ndarray:
    """Noise [..., n, d] with a 1/rank spectrum and this trace; heavy: multivariate t with 5 degrees of freedom."""
    spectrum = 1 / np.arange(1, shape[-1] + 1)
    draws = rng.standard_normal(shape) * np.sqrt(trace * spectrum / spectrum.sum())
    if heavy:
        draws *= np.sqrt(3 / rng.chisquare(5, shape[:-1]))[..., None]
    return draws


def signal(rng: np.random.Generator, replicates: int) -> np.ndarray:
    """Unit vectors [replicates, 1, d], half of their square among the eight loudest noise directions."""
    spectrum = np.where(np.arange(DIMENSIONS) < 8, 1 / 8, 1 / (DIMENSIONS - 8))
    draws = rng.standard_normal((replicates, 1, DIMENSIONS)) * np.sqrt(spectrum)
    return draws / np.linalg.norm(draws, axis=-1, keepdims=True)


def simulate_pair(
    rng: np.random.Generator, replicates: int, n: int, trace: float, keep: float, ratio: float, heavy: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Contrast vectors [replicates, n, d] of base and aligned; the aligned noise has trace * ratio."""
    shape = (replicates, n, DIMENSIONS)
    mu = signal(rng, replicates)
    common, fresh = noise(rng, shape, trace, heavy), noise(rng, shape, trace, heavy)
    r = MODEL_CORRELATION
    aligned = np.sqrt(ratio) * (r * common + np.sqrt(1 - r**2) * fresh)
    return mu + common, keep * mu + aligned


def gram(vectors: np.ndarray) -> np.ndarray:
    """D D^T along the last two axes."""
    return vectors @ np.swapaxes(vectors, -1, -2)


# ---------------------------------------------------------------- ratio of two strengths


def naive_gap(base: np.ndarray, aligned: np.ndarray, folds: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Attenuation of the gap along a cross-fitted difference-of-means direction, and its paired t interval."""
    n = base.shape[1]
    gaps = []
    for vectors in (base, aligned):
        gap = np.empty(vectors.shape[:2])
        for f in range(folds):
            test = np.arange(n) % folds == f
            direction = vectors[:, ~test].mean(axis=1)
            direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
            gap[:, test] = np.einsum("rnd,rd->rn", vectors[:, test], direction)
        gaps.append(gap)
    mean = [g.mean(axis=1) for g in gaps]
    kept = mean[1] / mean[0]
    error = (gaps[1] - kept[:, None] * gaps[0]).std(axis=1, ddof=1) / np.sqrt(n) / mean[0]
    return kept, error


def plain_error(
    pair: KernelPair, on_base: np.ndarray, on_aligned: np.ndarray, second_order: float
) -> np.ndarray:
    """Standard error of a combination with the variance at the estimate, for comparison; 1 is the unbiased one."""
    zeta1, zeta2 = (
        on_base**2 * z[0, 0] + 2 * on_base * on_aligned * z[0, 1] + on_aligned**2 * z[1, 1]
        for z in (pair.zeta1, pair.zeta2)
    )
    n = pair.n
    return np.sqrt(4 * np.maximum(zeta1, 0) / n + second_order * 2 * zeta2 / (n * (n - 1)))


def ratio_cell(rng: np.random.Generator, replicates: int, setting: dict, batch: int = 50) -> Iterator[Cell]:
    """Coverage of every interval of the keep in one setting."""
    n, keep = setting["n"], setting["keep"]
    t = float(critical_t(n - 1))
    columns: dict[str, list[np.ndarray]] = {}

    def add(name: str, values: np.ndarray) -> None:
        columns.setdefault(name, []).append(values)

    for start in range(0, replicates, batch):
        size = min(batch, replicates - start)
        base, aligned = simulate_pair(rng, size, **setting)
        pair = pair_kernels(gram(base), gram(aligned))
        strengths = strength_interval(pair)
        detected = strengths[0].lower > 0
        ratio = log_ratio(pair)
        truth = np.log(keep) if keep > 0 else -np.inf
        add("detected", detected)
        # Simultaneous bands over a dozen layers live at about 2.9 standard errors.
        for name, critical, weight in (("package", t, 1.0), ("far", 2.9, SECOND_ORDER)):
            low, high = keep_interval(pair, critical, weight)
            add(name, (low <= truth) & (truth <= high))
        add("theta", ratio.theta - truth)
        add("strong", is_strong(pair).all(axis=0))
        u = np.where(pair.u > 0, pair.u, 1.0)
        positive = is_strong(pair)[1] & detected
        gap_now, one = pair.u[1] - keep**2 * pair.u[0], np.ones(size)
        for name, weight, chosen in (("textbook", 1.0, positive), ("before", 1.5, columns["strong"][-1])):
            log_se = plain_error(pair, -0.5 / u[0], 0.5 / u[1], weight)
            set_se = plain_error(pair, -(keep**2) * one, one, weight)
            for suffix, critical in (("", t), ("_far", 2.9)):
                on_log = abs(ratio.theta - truth) <= critical * log_se
                add(name + suffix, np.where(chosen, on_log, abs(gap_now) <= critical * set_se))
        for name, curve, true in zip(
            ("strength_base", "strength_aligned"), strengths, (1.0, keep), strict=True
        ):
            add(name, (curve.lower <= true) & (true <= curve.upper))
        difference = strength_difference(pair, *strengths)
        gap = keep - 1
        add("difference", (difference.lower <= gap) & (gap <= difference.upper))
        kept, error = naive_gap(base, aligned)
        add("naive", abs(kept - keep) <= t * error)
        add("naive_bias", keep - kept)
    c = {name: np.concatenate(parts) for name, parts in columns.items()}
    name = ",".join(f"{k}={v}" for k, v in setting.items())
    shown = c["detected"]
    yield share("ratio", name, "base_detected", shown)
    yield share("ratio", name, "both_strong", c["strong"][shown])
    yield share("ratio", name, "package", c["package"][shown])
    yield share("ratio", name, "package_at_2.9_se", c["far"][shown])
    for column, label in (("before", "variance_at_the_estimate_1.5"), ("textbook", "textbook_variance")):
        yield share("ratio", name, label, c[column][shown])
        yield share("ratio", name, f"{label}_at_2.9_se", c[f"{column}_far"][shown])
    for column in ("strength_base", "strength_aligned", "difference"):
        yield share("ratio", name, column, c[column])
    yield share("ratio", name, "naive_gap", c["naive"])
    yield Cell("ratio", name, "naive_gap_bias", 0, replicates, float(np.median(c["naive_bias"])))
    if keep > 0:
        strong = c["strong"] & shown
        bias = float(np.median(c["theta"][strong])) if strong.sum() > 30 else np.nan
        yield Cell("ratio", name, "median_bias_theta_log_form", 0, int(strong.sum()), bias)


def point_cell(
    rng: np.random.Generator, replicates: int, n: int, trace: float, keep: float, batch: int = 50
) -> Iterator[Cell]:
    """Error of the attenuation's point where the aligned signal is weak and the base detected, and of its strength."""
    errors: dict[str, list[np.ndarray]] = {}
    for start in range(0, replicates, batch):
        size = min(batch, replicates - start)
        pair = pair_kernels(*(gram(x) for x in simulate_pair(rng, size, n, trace, keep, 1.0, False)))
        strengths = strength_interval(pair)
        shown = (strengths[0].lower > 0) & ~is_strong(pair).all(axis=0)
        plain = np.maximum(pair.u[:, shown], 0)
        for name, error in {
            "plain_ratio": keep - np.sqrt(plain[1] / plain[0]),
            "middle": keep - np.exp(middle_theta(pair)[shown]),
            "plain_strength": np.sqrt(plain[1]) - keep,
            "strength": strengths[1].value[shown] - keep,
        }.items():
            errors.setdefault(name, []).append(error)
    cell = f"n={n},trace={trace},keep={keep}"
    for name, parts in errors.items():
        error = np.concatenate(parts)
        if error.size > replicates / 10:
            for metric, value in (
                ("mean", error.mean()), ("median", np.median(error)), ("rmse", np.sqrt((error**2).mean()))
            ):  # fmt: skip
                yield Cell("point", cell, f"{name}_{metric}_error", 0, error.size, float(value))


def together_cell(
    rng: np.random.Generator,
    replicates: int,
    n: int,
    trace: float,
    follows: float,
    batch: int = 50,
) -> Iterator[Cell]:
    """Everything in the aligned model is that of the base times .7, in units of an rms that has to be estimated.

    The log squared norm varies by .1 between scenarios in the base and by .3 in the aligned model, where its correlation with
    the scenario's contrast along the signal is `follows`.
    """
    keep, t = 0.7, float(critical_t(n - 1))
    columns: dict[str, list[np.ndarray]] = {}
    for start in range(0, replicates, batch):
        size = min(batch, replicates - start)
        mu = signal(rng, size)
        vectors = (mu + noise(rng, (size, n, DIMENSIONS), trace, False)).swapaxes(0, 1)
        along = np.einsum("srd,rd->sr", vectors, mu[:, 0]) - 1
        along /= along.std(axis=0)
        kernels = []
        for kept, sd, r in ((1.0, 0.1, 0.0), (keep, 0.3, follows)):
            z = r * along + np.sqrt(1 - r**2) * rng.standard_normal((n, size))
            kernels.append(strength_kernels(kept * vectors, np.exp(sd * z - sd**2 / 2)))
        pair = pair_kernels(*kernels)
        detected = strength_interval(pair)[0].lower > 0
        with np.errstate(divide="ignore"):
            alone = tuple(np.log(end) for end in fieller(pair, t))
        for name, (low, high) in {"package": keep_interval(pair, t), "set_alone": alone}.items():
            columns.setdefault(f"{name}_misses_below", []).append((high < np.log(keep))[detected])
            columns.setdefault(f"{name}_misses_above", []).append((low > np.log(keep))[detected])
            columns.setdefault(f"{name}_half_width", []).append((high - low)[detected] / 2)
    cell = f"n={n},trace={trace},norm_follows={follows}"
    for name in ("package", "set_alone"):
        below, above, width = (
            np.concatenate(columns[f"{name}_{x}"]) for x in ("misses_below", "misses_above", "half_width")
        )
        yield share("together", cell, name, ~(below | above))
        yield share("together", cell, f"{name}_misses_below", below)
        yield share("together", cell, f"{name}_misses_above", above)
        yield Cell("together", cell, f"{name}_half_width", 0, width.size, float(np.median(width)))


def cosine_cell(
    rng: np.random.Generator, replicates: int, n: int, keep: float, cosine: float, batch: int = 50
) -> Iterator[Cell]:
    """Coverage of the cosine of two models' contrasts wherever it is shown, beside that of leaving scenarios out."""
    place = np.zeros((2, DIMENSIONS))
    place[0, 3], place[1, 3], place[1, 4] = 0.75, 0.75 * keep * cosine, 0.75 * keep * np.sqrt(1 - cosine**2)
    columns: dict[str, list[np.ndarray]] = {}
    for start in range(0, replicates, batch):
        shape = (min(batch, replicates - start), n, DIMENSIONS)
        common, fresh = (noise(rng, shape, 4.46, False) for _ in range(2))
        base = place[0] + common
        aligned = place[1] + MODEL_CORRELATION * common + np.sqrt(1 - MODEL_CORRELATION**2) * fresh
        kernels = gram(base), gram(aligned), base @ np.swapaxes(aligned, -1, -2)
        pair = pair_kernels(kernels[0], kernels[1])
        found = cosine_from_kernels(*kernels)
        shown = ~np.isnan(found.lower)
        columns.setdefault("shown", []).append(shown)
        columns.setdefault("aligned_detected", []).append(pair.u[1] > critical_t(n - 1) * pair.se[1])
        held = (found.lower <= cosine + 1e-9) & (cosine - 1e-9 <= found.upper)
        columns.setdefault("package", []).append(held[shown])
        columns.setdefault("half_width", []).append((found.upper - found.lower)[shown] / 2)
        value, reach = delete_one_cosine(*kernels)
        columns.setdefault("delete_one", []).append((abs(value - cosine) <= reach)[~np.isnan(reach)])
        columns.setdefault("delete_one_half_width", []).append(reach[~np.isnan(reach)])
    cell = f"n={n},keep={keep},cosine={cosine}"
    for name, parts in columns.items():
        found_all = np.concatenate(parts)
        if name.endswith("half_width"):
            yield Cell("cosine", cell, name, 0, found_all.size, float(np.median(found_all)))
        else:
            yield share("cosine", cell, name, found_all)


def mapped_cell(
    rng: np.random.Generator, replicates: int, n: int, texts: int, cosine: float
) -> Iterator[Cell]:
    """Coverage of the cosine after the neutral-text map, with the map's own error and without; truth is the mean estimate."""
    turn = np.linalg.qr(rng.standard_normal((DIMENSIONS, DIMENSIONS)))[0]
    place = np.zeros((2, DIMENSIONS))
    place[0, 3], place[1, 3], place[1, 4] = 0.75, 0.75 * cosine, 0.75 * np.sqrt(1 - cosine**2)
    one, found = np.ones((n, 1)), []
    for _ in range(replicates):
        neutral = rng.standard_normal((texts, 1, DIMENSIONS))
        moved = neutral @ turn + rng.standard_normal(neutral.shape) / 2
        common, fresh = (noise(rng, (n, 1, DIMENSIONS), 4.46, False) for _ in range(2))
        base = place[0] + common
        aligned = (place[1] + MODEL_CORRELATION * common + np.sqrt(1 - MODEL_CORRELATION**2) * fresh) @ turn
        cross = cross_kernels(fit_map(neutral, moved).turn(base), aligned, one, one)
        kernels = strength_kernels(base, one), strength_kernels(aligned, one), cross
        extra = map_variance((base[None], aligned[None]), (neutral, moved))
        curves = [cosine_from_kernels(*kernels, more) for more in (extra, None)]
        found.append([[curve.value[0], curve.lower[0], curve.upper[0]] for curve in curves])
    value, lower, upper = np.moveaxis(np.array(found), -1, 0)
    truth = np.nanmean(value)
    cell = f"n={n},texts={texts},cosine={cosine}"
    yield Cell("mapped", cell, "truth", 0, replicates, float(truth))
    for i, name in enumerate(("package", "map_taken_as_known")):
        shown = ~np.isnan(lower[:, i])
        yield share("mapped", cell, name, ((lower <= truth) & (truth <= upper))[shown, i])
        width = np.median((upper - lower)[shown, i]) / 2
        yield Cell("mapped", cell, f"{name}_half_width", 0, int(shown.sum()), float(width))


def variance_cell(rng: np.random.Generator, replicates: int, n: int, trace: float) -> Iterator[Cell]:
    """Mean of the variance that is estimated for U, over its variance; `before`: ζ₁ = var(g) − ζ₂ (n − 1)/(n − 2)²."""
    mu = signal(rng, 1)[0] if np.isfinite(trace) else np.zeros((1, DIMENSIONS))
    size = trace if np.isfinite(trace) else 1.0
    values, found = [], []
    for _ in range(0, replicates, 500):
        pair = pair_kernels(*[gram(mu + noise(rng, (500, n, DIMENSIONS), size, False))] * 2)
        zeta1, zeta2 = pair.zeta1[0, 0], pair.zeta2[0, 0]
        before = zeta1 + zeta2 / (n - 2) - zeta2 * (n - 1) / (n - 2) ** 2
        values.append(pair.u[0])
        found.append([4 * first / n + 2 * zeta2 / (n * (n - 1)) for first in (zeta1, before)])
    true = np.concatenate(values).var()
    for name, estimates in zip(("now", "before"), np.concatenate(found, -1), strict=True):
        yield Cell("variance", f"n={n},trace={trace}", name, 0, replicates, float(estimates.mean() / true))


def whitened_cell(
    rng: np.random.Generator, replicates: int, n: int, texts: int, keep: float
) -> Iterator[Cell]:
    """Coverage of d' and its attenuation: neutral texts in the error once, as jackknife of the U themselves, not at all."""
    keys, found, squares = [str(i) for i in range(n)], [], []
    mu, r, group = signal(rng, 1), MODEL_CORRELATION, np.arange(texts) % GROUPS

    def draw(many: int, trace: float) -> tuple[np.ndarray, np.ndarray]:
        common, fresh = (noise(rng, (many, 1, DIMENSIONS), trace, False) for _ in range(2))
        return common, r * common + np.sqrt(1 - r**2) * fresh

    for first in range(0, replicates, 50):
        kernels, once, twice = [], [], []
        for _ in range(min(50, replicates - first)):
            differences = tuple(
                (part * mu + x)[None] for part, x in zip((1, keep), draw(n, 8.0), strict=True)
            )
            neutral = draw(texts, 4.0)
            both = [(d[0], x) for d, x in zip(differences, neutral, strict=True)]
            kernels.append([whitened_kernels(d, x)[0] for d, x in both])
            once.append(whitening_covariance(differences, neutral)[..., 0])
            moved = [[whitened_strengths(d, x[group != g])[0] for d, x in both] for g in range(GROUPS)]
            twice.append((GROUPS - 1) ** 2 / GROUPS * np.cov(np.array(moved).T))
        pair, curves = np.moveaxis(np.array(kernels), 0, 1), []
        for extra in (once, twice, np.zeros_like(once)):
            c = compare("t", keys, pair, range(len(once)), extra=np.moveaxis(np.array(extra), 0, -1))
            curves.append([[x.lower, x.upper] for x in (c.base, c.attenuation)])
        found.append(curves)
        squares.append(u_statistic(pair).value)
    base, aligned = np.sqrt(np.concatenate(squares, -1).mean(-1))
    ends = np.concatenate(found, -1)
    cell = f"n={n},texts={texts},keep={keep}"
    for k, (measure, truth) in enumerate({"d_prime": base, "attenuation": 1 - aligned / base}.items()):
        yield Cell("whitened", cell, f"{measure}_truth", 0, replicates, float(truth))
        for i, name in enumerate(("package", "counted_twice", "taken_as_known")):
            lower, upper = ends[i, k]
            yield share("whitened", cell, f"{measure}_{name}", ~((lower > truth) | (upper < truth)))
            width = np.nanmedian(upper - lower) / 2
            yield Cell("whitened", cell, f"{measure}_{name}_half_width", 0, replicates, float(width))


RATIO_GRID = [
    {"n": n, "trace": trace, "keep": keep, "ratio": ratio, "heavy": heavy}
    for n, trace, keep, (ratio, heavy) in product(
        (30, 60, 100, 200), (2.0, 8.0, 20.0), (1.0, 0.7, 0.25, 0.0), ((1.0, False), (2.0, False), (1.0, True))
    )
]
QUICK_RATIO = [
    {"n": 60, "trace": 8.0, "keep": keep, "ratio": 1.0, "heavy": heavy}
    for keep, heavy in ((1.0, False), (0.25, False), (0.0, False), (0.7, True))
]


# ---------------------------------------------------------------- layers


def walk(rng: np.random.Generator, shape: tuple[int, ...], trace: float, memory: float = 0.8) -> np.ndarray:
    """Noise [layer, n, d] whose layers are an autoregressive chain."""
    layers = [noise(rng, shape[1:], trace, False)]
    for _ in range(shape[0] - 1):
        layers.append(memory * layers[-1] + np.sqrt(1 - memory**2) * noise(rng, shape[1:], trace, False))
    return np.stack(layers)


def simulate_concept(
    rng: np.random.Generator,
    name: str,
    n: int,
    trace: float,
    theta: np.ndarray,
    shared: np.ndarray | None = None,
) -> Contrast:
    """A compared concept with log keep `theta` per layer.

    `shared` is noise [2 layer n d] of scenarios that several concepts have in common; it makes up half of the
    variance of each of them, and their keys are then equal.
    """
    shape = (len(theta), n, DIMENSIONS)
    mu = signal(rng, len(theta))
    walks = np.stack([walk(rng, shape, trace), walk(rng, shape, trace)])
    if shared is not None:
        walks = np.sqrt(0.5) * (walks + shared)
    base, fresh = walks
    r = MODEL_CORRELATION
    keep = np.exp(theta)[:, None, None]
    d_base = mu + base
    d_aligned = keep * mu + np.sqrt(keep) * (r * base + np.sqrt(1 - r**2) * fresh)
    owner = name if shared is None else "shared"
    return compare(
        name, [f"{owner}/{i}" for i in range(n)], np.stack([gram(d_base), gram(d_aligned)]), range(len(theta))
    )


def covers(contrast_low: np.ndarray, contrast_high: np.ndarray, truth: np.ndarray) -> bool:
    """Whether a band holds the truth at every layer where it says anything."""
    with np.errstate(invalid="ignore"):
        out = (contrast_low > truth + 1e-12) | (contrast_high < truth - 1e-12)
    return not out.any()


def layer_pattern(shape: str) -> np.ndarray:
    """Log keep per layer: unchanged, a step at layer 5 (with a slightly deeper last layer), gone, ramp, or edge."""
    step = np.arange(LAYERS) >= 5
    patterns = {
        "unchanged": np.zeros(LAYERS),
        "step": np.where(step, np.log(0.6), 0.0)
        + np.where(np.arange(LAYERS) == LAYERS - 1, np.log(0.8), 0.0),
        "gone": np.where(step, -np.inf, 0.0),
        # The hard case for an onset: the layers next to it lie close to the margin.
        "ramp": np.linspace(0, np.log(0.6), LAYERS),
        # Every layer exactly at the margin: nothing is beyond it, but only just.
        "edge": np.full(LAYERS, np.log(0.9)),
    }
    return patterns[shape]


def band_cell(
    rng: np.random.Generator, replicates: int, n: int, trace: float, shape: str, draws: int
) -> Iterator[Cell]:
    """Family coverage of the simultaneous band of attenuation, its decisions, onset and peak sets."""
    theta = layer_pattern(shape)
    attenuation = -np.expm1(theta)
    beyond = np.flatnonzero(attenuation > 0.10 + 1e-9)
    onset_layer = int(beyond[0]) if beyond.size else None
    rows: dict[str, list[float]] = {}
    for i in range(replicates):
        contrast = simulate_concept(rng, f"t{i}", n, trace, theta)
        judged = judge([contrast], [], draws=draws, seed=i)[0]
        wrong = [
            (d == "attenuated" and a < 0.10 + 1e-9) or d == "amplified" or (d == "equivalent" and a > 0.10)
            for d, a in zip(judged.decision, attenuation, strict=True)
        ]
        members = judged.onset.members
        hit = judged.onset.includes_none if onset_layer is None else onset_layer in members
        values = {
            "band": covers(judged.band.lower, judged.band.upper, attenuation),
            "pointwise": covers(contrast.attenuation.lower, contrast.attenuation.upper, attenuation),
            "false_decision": any(wrong),
            "onset_covers": hit,
            "onset_size": len(members),
            "onset_none": judged.onset.includes_none,
        }
        if shape in ("step", "ramp"):
            values |= {
                "peak_covers": LAYERS - 1 in judged.peak.members,
                "peak_size": len(judged.peak.members),
            }
        for name, value in values.items():
            rows.setdefault(name, []).append(value)
    cell = f"n={n},trace={trace},shape={shape}"
    for name, values in rows.items():
        if name.endswith("_size"):
            yield Cell("band", cell, name, 0, replicates, float(np.mean(values)))
        else:
            yield share("band", cell, name, np.array(values, dtype=bool))


# ---------------------------------------------------------------- specific


def rival_draws(
    kind: str, target: Contrast, controls: list[Contrast], draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws of two other max-T recipes for `specific`: the largest |M| is compared with |t|, not with a normal z.

    multiplier: the target's scenario signs plus one N(0,1) multiplier per control on its residual, divided by the
    fixed standard error. studentised: the same, with mean and Hartung-Knapp variance recomputed in every draw.
    """
    pool = build_reference(controls).pool
    theta = np.stack([c.theta for c in controls])
    own = (
        unit_signs(target.keys, draws, seed).astype(float)
        @ target.influence.T
        / np.sqrt(target.n * (target.n - 1))
    )
    k = len(controls)
    residual = (theta - pool.mean) * np.sqrt(k / (k - 1))
    xi = unit_normals([c.name for c in controls], draws, seed)
    mean = np.einsum("dk,kl,kl->dl", xi, pool.weights, residual)
    total = target.se**2 + pool.variance
    if kind == "studentised":
        drawn = xi[:, :, None] * residual
        spread = (pool.weights * (drawn - mean[:, None, :]) ** 2).sum(axis=1) / (k - 1)
        within = 1 / (1 / np.stack([c.se**2 for c in controls])).sum(axis=0)
        total = target.se**2 + np.maximum(spread, within)
    return (own - mean) / np.sqrt(total), gap_to(target, build_reference(controls), 0.0).t


@dataclass(frozen=True)
class Specific:
    """One setting: k controls whose log keeps differ with standard deviation tau around a generic drift."""

    k: int
    tau: float
    keep: float = 1.0
    """What the target keeps beyond the drift, in the second half of the layers."""
    together: bool = False
    """Whether all concepts are written on the same scenarios."""
    n: int = 60
    trace: float = 4.0


def specific_cell(rng: np.random.Generator, replicates: int, setting: Specific, draws: int) -> Iterator[Cell]:
    """Coverage of specific pointwise and in the band; decisions about one more concept drawn like the controls."""
    rows: dict[str, list[bool]] = {}

    def add(name: str, value: bool) -> None:
        rows.setdefault(name, []).append(bool(value))

    k, tau, keep, n, trace = setting.k, setting.tau, setting.keep, setting.n, setting.trace
    drift = -0.3 * np.linspace(0.2, 1, LAYERS)
    half = LAYERS // 2
    extra = np.zeros(LAYERS)
    extra[half:] = np.log(keep) if keep > 0 else -np.inf
    truth = -np.expm1(extra)
    for i in range(replicates):
        shape = (LAYERS, n, DIMENSIONS)
        shared = np.stack([walk(rng, shape, trace) for _ in range(2)]) if setting.together else None
        # A control's own deviation is much the same at neighbouring layers.
        path = 0.9 * rng.standard_normal(k + 1)[:, None] + np.sqrt(0.19) * rng.standard_normal(
            (k + 1, LAYERS)
        )
        controls = [
            simulate_concept(rng, f"r{i}c{j}", n, trace, drift + tau * path[j], shared) for j in range(k)
        ]
        target = simulate_concept(rng, f"r{i}m", n, trace, drift + extra, shared)
        judged = judge([target], controls, draws=draws, seed=i)[0]
        low, high = judged.specific.lower, judged.specific.upper
        inside = (low <= truth + 1e-12) & (high >= truth - 1e-12)
        for value in inside[~np.isnan(low)]:
            add("pointwise_each_layer", value)
        add("pointwise_all_layers", covers(low, high, truth))
        headline = np.array(judged.headline) == "specific"
        add("band", covers(judged.band.lower[headline], judged.band.upper[headline], truth[headline]))
        add("few_controls_somewhere", any("few_controls" in f for f in judged.flags))
        if keep == 1:
            for kind in ("multiplier", "studentised"):
                drawn, t = rival_draws(kind, target, controls, draws, i)
                add(f"band_{kind}", abs(t).max() <= largest_quantile(drawn))
            one_more = simulate_concept(rng, f"r{i}x", n, trace, drift + tau * path[k], shared)
            add("one_more_control_decided", any_decided(one_more, controls, draws, i))
        else:
            add("attenuated_at_every_late_layer", all(d == "attenuated" for d in judged.decision[half:]))
            add("decided_early", any(d in ("attenuated", "amplified") for d in judged.decision[:half]))
            add("onset_covers", half in judged.onset.members)
    cell = ",".join(f"{name}={value}" for name, value in vars(setting).items())
    for name, values in rows.items():
        yield share("specific", cell, name, np.array(values))


def any_decided(target: Contrast, controls: list[Contrast], draws: int, seed: int) -> bool:
    """Whether anything is decided at any layer, the margin left aside."""
    judged = judge([target], controls, margin=1e-9, draws=draws, seed=seed)[0]
    return any(d in ("attenuated", "amplified") for d in judged.decision)


# ---------------------------------------------------------------- power


def judge_pairs(
    rng: np.random.Generator, replicates: int, n: int, trace: float, keep: float
) -> Iterator[tuple[Contrast, Judgement]]:
    """One concept at one layer, without controls, again and again."""
    for first in range(0, replicates, 50):
        many = min(50, replicates - first)
        kernels = np.stack([gram(x) for x in simulate_pair(rng, many, n, trace, keep, 1.0, False)])
        whole = compare("t", [str(i) for i in range(n)], kernels, range(many))
        for i in range(many):
            contrast = whole.at(slice(i, i + 1), (0,))
            yield contrast, judge([contrast], [], draws=499, seed=first + i)[0]


def power_cell(
    rng: np.random.Generator, replicates: int, n: int, trace: float, keep: float
) -> Iterator[Cell]:
    """What a run that finds `keep` says it would have shown, and how often it does where just that is lost.

    `found`: the same with the standard error of what was found.
    """
    cell = f"n={n},trace={trace},keep={keep}"
    seen = list(judge_pairs(rng, replicates, n, trace, keep))
    named = {"": np.nanmedian([j.minimum_detectable[0] for _, j in seen])}
    errors = np.array([gap_to(c, None, np.log(0.9)).se[0] for c, _ in seen])
    named["found_"] = np.nanmedian(1 - 0.9 * np.exp(-(critical_t(n - 1) + POWER) * errors))
    for name, lost in named.items():
        yield Cell("power", cell, f"{name}minimum_detectable", 0, replicates, float(lost))
        there = judge_pairs(rng, replicates, n, trace, 1 - lost)
        yield share(
            "power", cell, f"{name}decided_there", np.array([j.decision[0] == "attenuated" for _, j in there])
        )


# ---------------------------------------------------------------- AUROC


def auroc_cell(rng: np.random.Generator, replicates: int, n: int, area: float) -> Iterator[Cell]:
    """Coverage of the AUROC interval and of the paired difference; two texts of each label per scenario."""
    shift = np.sqrt(2) * norm.ppf(area)
    labels = np.tile([0, 0, 1, 1], n)
    groups = [str(i) for i in range(n) for _ in range(4)]
    scenario = np.repeat(rng.standard_normal((2, replicates, n)), 4, axis=-1) * np.sqrt(0.3)
    text = rng.standard_normal((2, replicates, 4 * n)) * np.sqrt(0.7)
    text[1] = 0.8 * text[0] + 0.6 * text[1]
    scenario[1] = 0.8 * scenario[0] + 0.6 * scenario[1]
    scores = labels * shift + scenario + text
    curve = auroc_interval(scores[0], labels, groups)
    gap = auroc_difference(scores[0], scores[1], labels, groups)
    cell = f"n={n},auroc={area}"
    yield share("auroc", cell, "interval", (curve.lower <= area) & (area <= curve.upper))
    yield share("auroc", cell, "difference", (gap.lower <= 0) & (gap.upper >= 0))
    yield Cell("auroc", cell, "mean_width", 0, replicates, float((curve.upper - curve.lower).mean()))
    # Two models that are all but the same: a .05 of the spread apart in every score.
    near = auroc_difference(
        scores[0], scores[0] + 0.05 * rng.standard_normal(scores[0].shape), labels, groups
    )
    lost = norm.cdf(shift / np.sqrt(2 + 0.05**2)) - area
    yield share("auroc", cell, "difference_near", (near.lower <= lost) & (lost <= near.upper))
    yield Cell("auroc", cell, "mean_width_near", 0, replicates, float((near.upper - near.lower).mean()))
    yield Cell("auroc", cell, "spread_near", 0, replicates, float(near.value.std()))


# ---------------------------------------------------------------- command line


def tables(replicates: int, quick: bool) -> dict[str, list[Callable[[np.random.Generator], Iterator[Cell]]]]:
    """The cells of each table, waiting for their random numbers."""
    draws = 499
    areas = product((60,) if quick else (30, 60, 200), (0.5, 0.9) if quick else (0.5, 0.7, 0.9, 0.98, 0.995))
    bands = [(60, 4.0, "step")]
    settings = [Specific(8, 0.1)]
    if not quick:
        bands = [
            (n, 4.0, shape) for n in (30, 60, 120) for shape in ("unchanged", "step", "gone", "ramp", "edge")
        ]
        bands += [(60, 8.0, shape) for shape in ("unchanged", "step", "gone")]
        settings = [Specific(k, tau) for k in (6, 8) for tau in (0.0, 0.05, 0.15)] + [Specific(12, 0.05)]
        settings += [Specific(8, 0.05, keep=0.5), Specific(8, 0.05, keep=0.0)]
        settings += [Specific(8, 0.05, together=True), Specific(8, 0.05, keep=0.0, together=True)]
    together = product((40, 100, 300), (2.0, 8.0), (-0.7, 0.0, 0.7))
    return {
        "ratio": [
            partial(ratio_cell, replicates=replicates, setting=s)
            for s in (QUICK_RATIO if quick else RATIO_GRID)
        ],
        "auroc": [partial(auroc_cell, replicates=replicates, n=n, area=a) for n, a in areas],
        "band": [
            partial(band_cell, replicates=replicates, n=n, trace=trace, shape=shape, draws=draws)
            for n, trace, shape in bands
        ],
        "specific": [partial(specific_cell, replicates=replicates, setting=s, draws=draws) for s in settings],
        "power": [
            partial(power_cell, replicates=replicates, n=n, trace=trace, keep=keep)
            for n, trace, keep in (
                [(100, 2.0, 1.0)] if quick else product((40, 100, 300), (2.0, 8.0), (1.0, 0.75, 0.5, 0.25))
            )
        ],
        "point": [
            partial(point_cell, replicates=replicates, n=n, trace=trace, keep=keep)
            for n, trace, keep in (
                [(40, 8.0, 0.25)]
                if quick
                else product((40, 100, 300), (2.0, 8.0, 20.0), (0.5, 0.25, 0.1, 0.0))
            )
        ],
        "cosine": [
            partial(cosine_cell, replicates=replicates, n=n, keep=keep, cosine=cosine)
            for n, keep, cosine in (
                [(40, 0.5, 1.0)]
                if quick
                else product((40, 100, 300), (1.0, 0.5, 0.25), (1.0, 0.97, 0.9, 0.7, 0.5, 0.0, -0.7))
            )
        ],
        "together": [
            partial(together_cell, replicates=replicates, n=n, trace=trace, follows=follows)
            for n, trace, follows in ([(40, 8.0, 0.7)] if quick else together)
        ],
        "mapped": [
            partial(mapped_cell, replicates=replicates, n=n, texts=texts, cosine=cosine)
            for n, texts, cosine in (
                [(40, 80, 0.9)] if quick else product((40, 100, 300), (80, 320), (1.0, 0.9, 0.5))
            )
        ],
        "variance": [
            partial(variance_cell, replicates=20 * replicates, n=n, trace=trace)
            for n, trace in ([(20, np.inf)] if quick else product((10, 20, 40, 100), (2.0, 8.0, np.inf)))
        ],
        "whitened": [
            partial(whitened_cell, replicates=replicates, n=n, texts=texts, keep=keep)
            for n, texts, keep in (
                [(40, 80, 0.5)] if quick else product((40, 100, 300), (80, 320), (1.0, 0.5, 0.25))
            )
        ],
    }


def main() -> int:
    """Print the table, and write it with --out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few cells only")
    parser.add_argument("--out", type=Path, help="also write the table to this CSV file")
    parser.add_argument(
        "--tables",
        nargs="+",
        choices=list(tables(1, quick=True)),
        help="only these",
    )
    options = parser.parse_args()
    rows = []
    for i, (name, cells) in enumerate(tables(options.replicates, options.quick).items()):
        if options.tables and name not in options.tables:
            continue
        # A generator for every cell, so that one table can be rerun alone.
        for cell, child in zip(
            cells, np.random.SeedSequence([options.seed, i]).spawn(len(cells)), strict=True
        ):
            for row in (found.row() for found in cell(np.random.default_rng(child))):
                rows.append(row)
                print("  ".join(row.values()), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
