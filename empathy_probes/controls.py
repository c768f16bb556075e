"""What alignment does to contrasts in general: the pool of controls that `specific` is measured against.

Method. The controls are a sample of concepts. Their log keeps theta_j are averaged per layer with random-effects
weights 1 / (se_j^2 + tau^2) (DerSimonian-Laird) and the variance of the mean is Hartung and Knapp's, never below
what the standard errors imply. A target is compared on the log scale, theta_T - mean; where the target's signal is
weak its Fieller set and the mean's normal error are combined over all splits of the gap between them, which
equals theta_T - mean +- t sqrt(se^2 + v) wherever the target is strong.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from empathy_probes.contrasts import Contrast, log_keep_interval
from empathy_probes.deviations import deviation
from empathy_probes.keeps import fieller_sets, variance_at
from empathy_probes.stats import as_normal, critical_t, unit_normals, unit_signs, upper_t

# Part of two variances that shared scenarios always leave of their difference: it guards against rounding.
LEAST = 1e-3


@dataclass(frozen=True)
class Pool:
    """Random-effects mean of the controls at each layer."""

    mean: Float[np.ndarray, " layer"]
    variance: Float[np.ndarray, " layer"]
    """Of the mean: Hartung-Knapp, never below what the standard errors alone imply; NaN below two controls."""
    tau2: Float[np.ndarray, " layer"]
    """Variance between controls beyond their standard errors."""
    weights: Float[np.ndarray, "control layer"]
    """Shares in the mean; they sum to 1 (to 0 where there is no control)."""
    count: Int[np.ndarray, " layer"]


def pool_controls(
    effects: Float[np.ndarray, "control layer"],
    variances: Float[np.ndarray, "control layer"],
    usable: Bool[np.ndarray, "control layer"],
    covariances: Float[np.ndarray, "control control layer"] | None = None,
) -> Pool:
    """Pool the controls' effects per layer (DerSimonian-Laird weights, floored Hartung-Knapp variance).

    `covariances` holds the covariances of the estimates of controls that share scenarios (the diagonal is
    ignored); what they have in common is invisible in their spread and is added to the variance of the mean.
    """
    count = usable.sum(axis=0)
    k = np.maximum(count, 1)
    y, raw = np.where(usable, effects, 0.0), np.where(usable, variances, 0.0)
    common = np.zeros(y.shape[1])
    if covariances is not None:
        pairs = usable[:, None] & usable[None] & ~np.eye(len(y), dtype=bool)[:, :, None]
        common = np.where(pairs, covariances, 0.0).sum(axis=(0, 1)) / np.maximum(pairs.sum(axis=(0, 1)), 1)
    # A control with next to no noise must not own the mean: none counts as more than twice as exact as the average.
    average = raw.sum(axis=0) / k
    own = np.maximum(raw - common, 0.25 * average)
    own = np.where(average > 0, own, 1.0)

    first = usable / own
    total = np.maximum(first.sum(axis=0), 1e-300)
    centre = (first * y).sum(axis=0) / total
    excess = (first * (y - centre) ** 2).sum(axis=0) - (k - 1)
    scale = total - (first**2).sum(axis=0) / total
    noiseless = average == 0
    tau2 = np.where(scale > 0, np.maximum(excess, 0) / np.where(scale > 0, scale, 1.0), 0.0)
    plain = (usable * (y - centre) ** 2).sum(axis=0) / np.maximum(k - 1, 1)
    tau2 = np.where(noiseless, plain, tau2)

    weights = usable / (own + tau2)
    total = np.maximum(weights.sum(axis=0), 1e-300)
    weights = weights / total
    mean = (weights * y).sum(axis=0)
    knapp = (weights * (y - mean) ** 2).sum(axis=0) / np.maximum(k - 1, 1)
    least = np.where(noiseless, 0.0, 1 / total)
    known = (count >= 2) | (noiseless & (count == 1))
    variance = np.where(known, np.maximum(knapp, least) + common, np.nan)
    return Pool(np.where(count > 0, mean, np.nan), np.maximum(variance, 0), tau2, weights, count)


@dataclass(frozen=True)
class Reference:
    """The pooled controls with all that a comparison of a target with them needs."""

    pool: Pool
    names: tuple[str, ...]
    keys: tuple[str, ...]
    """All scenarios of the controls."""
    influence: Float[np.ndarray, "layer key"]
    """Error of the mean per scenario; the squares sum to the sampling variance of the mean."""
    spread: Float[np.ndarray, "control layer"]
    """Error of the mean per control, from the controls being a sample."""
    deviation: Float[np.ndarray, "control layer"]
    """Pattern over layers of one more control's own deviation; the squares sum to tau^2."""
    lost: Int[np.ndarray, " layer"]
    """Controls with a weak signal that certainly changed; they enter at the end of their Fieller set nearest 0."""


def _scatter(contrast: Contrast, keys: Sequence[str]) -> Float[np.ndarray, "layer key"]:
    """A contrast's influence in the places of its scenarios among `keys`, scaled so that squares sum to se^2."""
    place = {key: i for i, key in enumerate(keys)}
    found = [(place[key], i) for i, key in enumerate(contrast.keys) if key in place]
    scattered = np.zeros((len(contrast.layers), len(keys)))
    if found:
        to, origin = (list(x) for x in zip(*found, strict=True))
        scattered[:, to] = contrast.influence[:, origin] / np.sqrt(contrast.n * (contrast.n - 1))
    return scattered


def nearest_to_no_change(c: Contrast) -> Float[np.ndarray, " layer"]:
    """The end of the 95 % set of log keep that is nearest to 0; 0 where no change is compatible.

    A signal removed without any noise would be -inf; keep 0.01 says as much and leaves a mean.
    """
    low, high = log_keep_interval(c, float(critical_t(c.n - 1)))
    end = np.where(high < 0, high, np.where(low > 0, low, 0.0))
    return np.clip(end, np.log(0.01), -np.log(0.01))


def build_reference(controls: Sequence[Contrast]) -> Reference:
    """Pool the controls, layer by layer.

    A control whose signal is not detected, or too weak for a logarithm, is left out at that layer. Leaving out one
    that alignment has weakened would make the controls look steadier than they are, so a weak control whose
    Fieller set excludes "no change" enters at the end of the set nearest to no change, with the typical standard
    error of the usable ones; it does not count as usable, and without any that is there is no reference.
    """
    usable = np.stack([c.has_form("log", "identical") for c in controls])
    theta = np.stack([c.theta for c in controls])
    variance = np.stack([c.se**2 for c in controls])
    weak = np.stack([c.has_form("fieller") for c in controls])
    bounds = np.stack(
        [nearest_to_no_change(c) if w.any() else c.theta for c, w in zip(controls, weak, strict=True)]
    )
    # Lost ones have no error of their own: where all others are lost or undetected too there is nothing to lean on.
    lost = weak & (bounds != 0) & usable.any(axis=0)
    typical = np.where(usable, variance, 0.0).sum(axis=0) / np.maximum(usable.sum(axis=0), 1)
    effects = np.where(usable, theta, bounds)
    variances = np.where(usable, variance, typical)

    keys = tuple(sorted({key for c in controls for key in c.keys}))
    influence = np.stack([_scatter(c, keys) for c in controls]) * usable[:, :, None]
    covariances = np.einsum("ilk,jlk->ijl", influence, influence)
    enters = usable | lost
    pool = pool_controls(np.where(enters, effects, 0.0), variances, enters, covariances)
    mean_influence = np.einsum("jl,jlk->lk", pool.weights, influence)

    residual = np.where(enters, effects - pool.mean, 0.0)
    shrunk = residual * np.sqrt(pool.tau2 / np.maximum(pool.tau2 + variances, 1e-300))
    spread = pool.weights * shrunk
    sampling = (mean_influence**2).sum(axis=1)
    spread = _rescale(spread, np.maximum(np.where(np.isnan(pool.variance), 0, pool.variance) - sampling, 0))
    return Reference(
        pool=Pool(pool.mean, pool.variance, pool.tau2, pool.weights, usable.sum(axis=0)),
        names=tuple(c.name for c in controls),
        keys=keys,
        influence=mean_influence,
        spread=spread,
        deviation=_rescale(shrunk, pool.tau2),
        lost=lost.sum(axis=0),
    )


def _rescale(columns: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Scale each column to this sum of squares; empty columns stay empty."""
    size = (columns**2).sum(axis=0)
    return columns * np.sqrt(np.divide(squares, size, out=np.zeros_like(size), where=size > 0))


@dataclass(frozen=True)
class Gap:
    """How far a target's log keep lies from a supposed one, and how uncertain that is."""

    value: Float[np.ndarray, "*#batch layer"]
    own: Float[np.ndarray, "*#batch layer"]
    """Variance from the target's scenarios."""
    reference: Float[np.ndarray, "*#batch layer"]
    """Variance of the controls' mean; 0 without controls."""
    covariance: Float[np.ndarray, "*#batch layer"]
    df: Float[np.ndarray, "*#batch layer"]
    """Satterthwaite's degrees of freedom."""

    @property
    def se(self) -> Float[np.ndarray, "*#batch layer"]:
        """Standard error of the gap."""
        both = self.own + self.reference
        return np.sqrt(np.maximum(both - 2 * self.covariance, LEAST * both))

    @property
    def t(self) -> Float[np.ndarray, "*#batch layer"]:
        """value / se; exactly 0 for no gap."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.value == 0, 0.0, self.value / self.se)

    @property
    def z(self) -> Float[np.ndarray, "*#batch layer"]:
        """t as a normal deviate of equal probability."""
        return as_normal(self.t, self.df)


def gap_to(
    target: Contrast,
    reference: Reference | None,
    log_keep: Float[np.ndarray, "*#batch layer"] | float,
    extra: Float[np.ndarray, "*#batch layer"] | float = 0.0,
) -> Gap:
    """Gap between the target's log keep and the controls' mean (0 without controls) + `log_keep`.

    In the Fieller form the gap is (U_a - lambda U_b) / (2 lambda U_b) at the supposed lambda, which is the same
    to first order. `extra` is added to the variance of the mean (tau^2: one more control).
    """
    pair, size = target.pair, len(target.layers)
    if reference is None:
        mean, others, few = np.zeros(size), np.zeros(size), np.full(size, target.n - 1)
        on_base = on_aligned = np.zeros(size)
    else:
        pool = reference.pool
        mean, others, few = pool.mean, pool.variance + extra, np.maximum(pool.count - 1, 1)
        on_base, on_aligned = mean_covariances(target, reference)
    weak = target.has_form("fieller")
    square = np.where(weak, np.exp(2 * (mean + log_keep)), 1.0)
    u = np.where(pair.u > 0, pair.u, 1.0)
    scale = 2 * square * u[0]
    own = np.where(weak, deviation(pair, -square, np.ones_like(square)).variance / scale**2, target.se**2)
    value = np.where(weak, (pair.u[1] - square * pair.u[0]) / scale, target.theta - mean - log_keep)
    at_log = np.where(target.has_form("log"), 0.5 * (on_aligned / u[1] - on_base / u[0]), 0.0)
    covariance = np.where(weak, (on_aligned - square * on_base) / scale, at_log)
    scatter = own**2 / (target.n - 1) + others**2 / few
    df = np.divide((own + others) ** 2, scatter, out=np.full_like(scatter, target.n - 1), where=scatter > 0)
    return Gap(value, own, others, covariance, np.where(np.isnan(scatter), target.n - 1.0, df))


def error_at(
    target: Contrast, reference: Reference | None, log_keep: Float[np.ndarray, "grid layer"]
) -> Float[np.ndarray, "grid layer"]:
    """Standard error of the gap had the target kept exp(log_keep) of what the controls keep on average, and not what it did.

    In the Fieller form, where the aligned signal is too weak to be scaled, it is that of the test of the first ratio.
    """
    u, size = target.pair.u, len(target.layers)
    mean = others = on_base = on_aligned = np.zeros(size)
    if reference is not None:
        mean, others = reference.pool.mean, reference.pool.variance
        on_base, on_aligned = mean_covariances(target, reference)
    keep = np.exp(mean + log_keep)
    with np.errstate(divide="ignore", invalid="ignore"):
        at_log = 0.5 * (on_aligned / (keep * np.sqrt(u[0] * u[1])) - on_base / u[0])
    both = variance_at(target.pair, keep) + others
    scaled = np.sqrt(np.maximum(both - 2 * at_log, LEAST * both))
    return np.where(target.has_form("fieller"), gap_to(target, reference, log_keep[0]).se, scaled)


def mean_covariances(
    target: Contrast, reference: Reference
) -> tuple[Float[np.ndarray, " layer"], Float[np.ndarray, " layer"]]:
    """Covariances of the target's two U-statistics with the controls' mean, through shared scenarios."""
    shared_keys = set(target.keys).intersection(reference.keys)
    if not shared_keys:
        return np.zeros_like(target.se), np.zeros_like(target.se)
    place = {key: i for i, key in enumerate(reference.keys)}
    found = [(i, place[key]) for i, key in enumerate(target.keys) if key in shared_keys]
    own, other = (list(x) for x in zip(*found, strict=True))
    shared = reference.influence[:, other] / np.sqrt(target.n * (target.n - 1))
    base, aligned = ((x[:, own] * shared).sum(axis=-1) for x in target.pair.influence)
    return base, aligned


def specific_intervals(
    target: Contrast,
    reference: Reference,
    tails: Sequence[float],
    predicted: Sequence[bool],
) -> tuple[Float[np.ndarray, "tail layer"], Float[np.ndarray, "tail layer"]]:
    """Ends of theta_T - mean at these two-sided errors, -inf where nothing need be kept; NaN where undefined.

    Where `predicted`, the variance is that of one more control around the mean, with t(k - 1). All at once, because where
    signals are weak each set is a search.
    """
    pool = reference.pool
    half, new = np.array(tails)[:, None] / 2, np.array(predicted)[:, None]
    extra = np.where(new, pool.tau2, 0.0)
    gap = gap_to(target, reference, 0.0, extra)
    few = np.maximum(pool.count - 1, 1)
    critical = upper_t(half, np.where(new, few, gap.df))
    low, high = gap.value - critical * gap.se, gap.value + critical * gap.se
    weak = target.has_form("fieller")
    if weak.any():
        spread = np.sqrt(pool.variance + extra)
        ends = _combine(target, reference, spread, upper_t(half, target.n - 1), upper_t(half, few))
        low, high = np.where(weak, ends[0], low), np.where(weak, ends[1], high)
    blank = target.has_form("blank")
    return np.where(blank, np.nan, low), np.where(blank, np.nan, high)


def _combine(
    target: Contrast, reference: Reference, spread: np.ndarray, own_critical: np.ndarray, critical: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fieller set of the target and normal error of the mean, projected on theta_T - mean; all [tail layer].

    The pair (lambda, mean) is compatible when z1^2 + z2^2 <= 1, with z1 the target's statistic at lambda and z2
    the mean's, each divided by its own critical value (t(n - 1), t(k - 1)); the ends are the extremes of
    log(lambda) / 2 - mean over that region. A correlation tilts the region.
    """
    pair, mean = target.pair, reference.pool.mean
    low, high = fieller_sets(pair, own_critical)
    steps = np.linspace(0, 1, 257)[:, None, None]
    keep = low + (np.where(np.isfinite(high), high, low) - low) * steps
    square = keep**2
    there = deviation(pair, -square, np.ones_like(square))
    se = np.sqrt(np.maximum(there.variance, 1e-300))
    own = np.clip(there.beyond(own_critical, pair.n), -1, 1)
    on_base, on_aligned = mean_covariances(target, reference)
    r = np.clip((on_aligned - square * on_base) / (se * np.maximum(spread, 1e-150)), -1, 1)
    width = np.sqrt((1 - r**2) * (1 - own**2))
    reach = critical * spread
    with np.errstate(divide="ignore"):
        centre = np.log(keep) - mean + reach * r * own
    lower, upper = (centre - reach * width).min(axis=0), (centre + reach * width).max(axis=0)
    # An unbounded set (base lost at this stricter level) leaves the ratio unbounded above.
    return lower, np.where(np.isinf(high), np.inf, upper)


def mean_errors(
    reference: Reference, draws: int, seed: int
) -> tuple[Float[np.ndarray, "draws layer"], Float[np.ndarray, "draws layer"]]:
    """Multiplier draws of the error of the controls' mean, and of one more control's deviation.

    A scenario has one sign wherever it occurs; a control has one N(0,1) multiplier over all layers.
    """
    signs = unit_signs(reference.keys, draws, seed)
    # In blocks: as floats, all signs of a dozen controls would take some hundred megabytes.
    blocks = np.array_split(signs, draws // 1000 + 1)
    sampling = np.concatenate([block.astype(float) @ reference.influence.T for block in blocks])
    between = unit_normals(reference.names, draws, seed) @ reference.spread
    fresh = unit_normals([f"new {name}" for name in reference.names], draws, seed) @ reference.deviation
    return sampling + between, fresh
