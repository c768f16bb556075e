"""What every effect between two models shares: how much is kept at each layer, with intervals and flags.

Method. At each layer theta = log(U_aligned / U_base) / 2 and attenuation = 1 - exp(theta). Where both signals are strong
("log") its interval is that of theta with its standard error, of which comparisons with controls are made as well. Where
one is weak ("fieller") it is the set of keeps that the test of U_aligned = keep^2 U_base does not reject (Fieller); the
set may reach keep 0: then only "at least so much is attenuated" can be said. Without a detected base signal there is
nothing to compare (blank). Equal kernels are exactly unchanged ("identical"). Units are scenarios.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from empathy_probes.deviations import deviation
from empathy_probes.errors import InputError
from empathy_probes.keeps import keep_interval, log_ratio, middle_theta
from empathy_probes.kernels import SECOND_ORDER, KernelPair, is_strong, pair_kernels
from empathy_probes.stats import Curve, adjusted_p, critical_t, largest_quantile, studentised_sums, unit_signs
from empathy_probes.strengths import strength_difference, strength_interval

FEWEST_SCENARIOS = 30
SMALL_N = 60


@dataclass(frozen=True)
class Contrast:
    """One concept in two models on the same scenarios, layer by layer; NaN stands for a blank."""

    name: str
    keys: tuple[str, ...]
    """The scenarios, in the order of the kernels' axes; concepts with a key in common share that scenario."""
    layers: tuple[int, ...]
    pair: KernelPair
    base: Curve
    """Strength, pointwise 95 %."""
    aligned: Curve
    difference: Curve
    """Strength(aligned) - strength(base)."""
    attenuation: Curve
    """1 - keep; blank value and upper end 1 where only a lower bound exists (flag `at_least`)."""
    theta: Float[np.ndarray, " layer"]
    """log keep; of a weak signal the middle of what its test allows."""
    se: Float[np.ndarray, " layer"]
    """Of theta; in the Fieller form the local one, in the middle of the set."""
    influence: Float[np.ndarray, "layer n"]
    """Of theta (theta's first-order error is its mean); 0 where identical or blank."""
    form: tuple[str, ...]
    """`identical`, `log`, `fieller` or `blank`."""
    flags: tuple[tuple[str, ...], ...]

    @property
    def n(self) -> int:
        """Number of scenarios."""
        return self.pair.n

    def has_form(self, *forms: str) -> np.ndarray:
        """Mask of the layers whose comparison has one of these forms."""
        return np.array([form in forms for form in self.form])

    def at(self, part: slice, layers: Sequence[int]) -> "Contrast":
        """Some of the places it was compared at, under these names."""

        def cut(c: Curve) -> Curve:
            return Curve(c.value[part], c.lower[part], c.upper[part])

        return Contrast(
            self.name, self.keys, tuple(layers), self.pair.at(part), cut(self.base), cut(self.aligned),
            cut(self.difference), cut(self.attenuation), self.theta[part], self.se[part], self.influence[part],
            self.form[part], self.flags[part],
        )  # fmt: skip


def flag_layers(masks: dict[str, np.ndarray]) -> tuple[tuple[str, ...], ...]:
    """Turn one mask per flag into the flags of each layer, in the order of the mapping."""
    size = len(next(iter(masks.values())))
    return tuple(tuple(flag for flag, mask in masks.items() if mask[i]) for i in range(size))


def _check(name: str, keys: Sequence[str], kernels: np.ndarray, layers: Sequence[int]) -> None:
    n = len(keys)
    if kernels.shape != (2, len(layers), n, n):
        raise InputError(
            f"the kernels of {name!r} have shape {kernels.shape}, expected (2, {len(layers)}, {n}, {n}) for "
            f"{len(layers)} layers and {n} scenarios: pass [model layer n n] with the base first"
        )
    if not np.isfinite(kernels).all():
        raise InputError(
            f"the kernels of {name!r} hold NaN or infinity, expected finite numbers: "
            "check the activations of that concept"
        )


def _check_keys(name: str, keys: Sequence[str]) -> None:
    n = len(keys)
    if len(set(keys)) != n:
        raise InputError(
            f"{n - len(set(keys))} scenario keys of {name!r} occur twice, expected {n} different ones: "
            "average the texts of a scenario before the kernel"
        )
    if n < FEWEST_SCENARIOS:
        raise InputError(
            f"{name!r} has {n} scenarios, expected at least {FEWEST_SCENARIOS}: "
            "add scenarios, intervals below that do not hold what they promise"
        )


def compare(
    name: str,
    keys: Sequence[str],
    kernels: Float[np.ndarray, "model=2 layer n n"],
    layers: Sequence[int],
    *,
    same_model: bool = False,
    extra: Float[np.ndarray, "model=2 model=2 layer"] | None = None,
) -> Contrast:
    """Compare a concept's Gram matrices in the base (first) and the aligned model at every layer.

    Args:
        name: of the concept; keys the random draws of a control.
        keys: one per scenario, all different.
        kernels: D D^T over scenarios, in units of each model's own rms.
        layers: block index of each layer, -1 for the input of block 0.
        same_model: both kernels come from equal weights, so that nothing differs even where there is no contrast.
        extra: covariance of the two U from another source than the scenarios.

    Raises:
        InputError: fewer than 30 scenarios, repeated keys, wrong shapes, non-finite numbers.
    """
    kernels = np.asarray(kernels, dtype=float)
    _check(name, keys, kernels, layers)
    pair = pair_kernels(kernels[0], kernels[1], same_model=same_model)
    if extra is not None:
        # First-order terms enter every variance as 4 zeta_1 / n: the log form, Fieller's and the difference alike.
        pair = replace(pair, zeta1=pair.zeta1 + pair.n / 4 * extra)
    return compare_pair(name, keys, pair, layers)


def compare_pair(name: str, keys: Sequence[str], pair: KernelPair, layers: Sequence[int]) -> Contrast:
    """The same of kernels that are reduced already."""
    _check_keys(name, keys)
    t = float(critical_t(pair.n - 1))
    base, aligned = strength_interval(pair)
    detected = base.lower > 0
    # The base counts too: a ratio over a weak base is as skewed as one of a weak aligned signal.
    strong = is_strong(pair).all(axis=0) & ~pair.identical
    low, high = keep_interval(pair, t)
    incompatible = ~pair.identical & ~strong & detected & np.isnan(low)
    weak = ~pair.identical & ~strong & detected & ~incompatible
    form = np.select([pair.identical, strong, weak], ["identical", "log", "fieller"], "blank")

    ratio = log_ratio(pair)
    local = _linearise(pair, np.exp(low), np.exp(high))
    at_least = weak & np.isneginf(low)
    point = np.where(weak, middle_theta(pair), ratio.theta)
    point = np.where((form == "blank") | at_least, np.nan, point)
    ends = [np.where(form == "blank", np.nan, x) for x in (low, high)]
    usable = pair.identical | strong
    influence = np.where(usable[:, None], ratio.influence, np.where(weak[:, None], local[1], 0.0))
    difference = strength_difference(pair, base, aligned)
    undetected = ~pair.identical & ~strong & ~detected
    return Contrast(
        name=name,
        keys=tuple(keys),
        layers=tuple(layers),
        pair=pair,
        base=base,
        aligned=aligned,
        difference=difference,
        attenuation=attenuation_curve(point, ends[0], ends[1]),
        theta=point,
        se=np.where(usable, ratio.se, np.where(weak, local[0], np.nan)),
        influence=influence,
        form=tuple(str(x) for x in form),
        flags=flag_layers(
            {
                "base_not_detected": undetected,
                "only_in_aligned": undetected & (difference.lower > 0),
                "at_chance": pair.identical & ~detected,
                "incompatible": incompatible,
                "weak_signal": weak,
                "at_least": at_least,
                "small_n": np.full(len(layers), pair.n < SMALL_N),
            }
        ),
    )


def _linearise(pair: KernelPair, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard error and influence of log keep in the middle of its Fieller set.

    They only serve to correlate layers: at keep 0 itself the logarithm has no derivative.
    """
    keep = np.where(np.isfinite(high) & (high > 0), (low + high) / 2, 1.0)
    square = np.where(keep > 0, keep, 1.0) ** 2
    scale = 2 * square * np.where(pair.u[0] > 0, pair.u[0], 1.0)
    se = np.sqrt(deviation(pair, -square, np.ones_like(square)).variance) / scale
    return se, (pair.influence[1] - square[:, None] * pair.influence[0]) / scale[:, None]


def attenuation_curve(
    theta: Float[np.ndarray, " layer"], lower: Float[np.ndarray, " layer"], upper: Float[np.ndarray, " layer"]
) -> Curve:
    """1 - exp of log keep and its interval, ends swapped.

    -inf becomes 1 (nothing kept); an end without a bound (any amplification possible) is blank.
    """
    with np.errstate(over="ignore"):
        # 0 - expm1 rather than -expm1, so that no change is 0 and not -0.
        value, high, low = (0.0 - np.expm1(x) for x in (theta, lower, upper))
    return Curve(value, np.where(np.isinf(low), np.nan, low), high)


def log_keep_interval(
    contrast: Contrast, critical: Float[np.ndarray, " layer"] | float
) -> tuple[Float[np.ndarray, " layer"], Float[np.ndarray, " layer"]]:
    """Ends of log keep at a band's critical value (-inf where nothing need be kept); NaN where blank."""
    blank = contrast.has_form("blank")
    low, high = keep_interval(contrast.pair, critical, SECOND_ORDER)
    return np.where(blank, np.nan, low), np.where(blank, np.nan, high)


# ---------------------------------------------------------------- where along the layers


@dataclass(frozen=True)
class LayerSet:
    """A 95 % confidence set of layers."""

    members: tuple[int, ...]
    includes_none: bool
    """Whether "there is no such layer" belongs to the set."""
    best: int | None = None
    """The layer with the largest estimate; never to be shown without the set."""

    @property
    def lower(self) -> int | None:
        """First member: it could begin as early as this."""
        return self.members[0] if self.members else None

    @property
    def upper(self) -> int | None:
        """Last member: it has happened by this layer; None when it may not happen at all."""
        return self.members[-1] if self.members and not self.includes_none else None


def onset_set(
    statistics: Float[np.ndarray, " layer"],
    draws: Float[np.ndarray, "draws layer"],
    critical: Float[np.ndarray, " layer"] | float,
    layers: Sequence[int],
) -> LayerSet:
    """Confidence set of the first layer whose effect lies beyond the margin, by inverting tests.

    A layer is a member unless an earlier one is beyond the margin (one-sided 97.5 % of the largest draw over the
    earlier layers) or it is itself not (below -critical, 97.5 %). "None" is a member unless some layer is beyond
    at 95 % over all of them. Layers that cannot be judged have statistic 0 and draws 0: they are never excluded
    themselves and exclude nobody.

    Args:
        statistics: (margin - theta) / se, positive when beyond the margin.
        draws: multiplier draws of the same statistics under no difference.
        critical: one-sided 97.5 % point of each single statistic.
        layers: their names.
    """
    running = np.maximum.accumulate(draws, axis=1)
    earlier = np.concatenate([[-np.inf], np.maximum.accumulate(statistics)[:-1]])
    bounds = np.quantile(running, 0.975, axis=0, method="higher")
    allowed = np.concatenate([[np.inf], bounds[:-1]])
    member = (earlier <= allowed) & (statistics >= -np.asarray(critical))
    none = statistics.max() <= largest_quantile(draws, one_sided=True)
    return LayerSet(tuple(layer for layer, m in zip(layers, member, strict=True) if m), bool(none))


def peak_set(
    effects: Float[np.ndarray, " layer"],
    errors: Float[np.ndarray, "draws layer"],
    layers: Sequence[int],
) -> LayerSet:
    """All layers for which no other is simultaneously larger (95 % set of the layer of the largest effect).

    `errors` are multiplier draws of the effects' errors, in the effects' own units. Layers with NaN are left out.
    """
    shown = np.flatnonzero(~np.isnan(effects))
    members = []
    for i in shown.tolist():
        gaps = errors[:, shown] - errors[:, [i]]
        spread = gaps.std(axis=0)
        live = spread > 0
        lead = effects[shown] - effects[i]
        # Without any noise a larger effect is simply larger.
        beaten = bool((lead[~live] > 0).any())
        if live.any():
            bound = largest_quantile(gaps[:, live] / spread[live], one_sided=True)
            beaten |= bool((lead[live] / spread[live] > bound).any())
        if not beaten:
            members.append(layers[i])
    best = layers[int(shown[effects[shown].argmax()])] if shown.size else None
    return LayerSet(tuple(members), includes_none=False, best=best)


# ---------------------------------------------------------------- template


@dataclass(frozen=True)
class TemplateShift:
    """theta under one rendering minus theta under another, on the same scenarios."""

    attenuation: Curve
    """1 - exp(theta_shared - theta_raw), pointwise 95 %: positive when the template adds attenuation."""
    theta: Curve
    """theta_shared - theta_raw, pointwise 95 %."""
    se: Float[np.ndarray, " layer"]
    band: Curve
    """The same, simultaneous over layers."""
    p_adjusted: Float[np.ndarray, " layer"]
    flags: tuple[tuple[str, ...], ...]


def did(shared: Contrast, raw: Contrast, draws: int = 9999, seed: int = 0) -> TemplateShift:
    """Whether the template changed what alignment did: theta_shared - theta_raw from joint influence values.

    Blank (flag `weak_signal`, `incompatible` or `base_not_detected`) where either has no interval of the log form. Raises
    InputError when the two do not have the same scenarios and layers.
    """
    if shared.keys != raw.keys or shared.layers != raw.layers:
        raise InputError(
            f"{shared.name!r} was compared on {shared.n} and {raw.n} scenarios that are not the same in both "
            "templates, expected equal keys and layers: extract both templates from one stimulus set"
        )
    n = shared.n
    usable = shared.has_form("log", "identical") & raw.has_form("log", "identical")
    undetected, incompatible = (
        np.array([flag in {*a, *b} for a, b in zip(shared.flags, raw.flags, strict=True)])
        for flag in ("base_not_detected", "incompatible")
    )
    theta = np.where(usable, shared.theta - raw.theta, np.nan)
    influence = np.where(usable[:, None], shared.influence - raw.influence, 0.0)
    se = np.where(usable, np.sqrt((influence**2).sum(axis=-1) / (n * (n - 1))), np.nan)
    sums = studentised_sums(influence, unit_signs(shared.keys, draws, seed))
    t = float(critical_t(n - 1))
    reach, wide = t * se, max(t, largest_quantile(sums)) * se
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = np.where(theta == 0, 0.0, theta / se)
    return TemplateShift(
        attenuation=attenuation_curve(theta, theta - reach, theta + reach),
        theta=Curve(theta, theta - reach, theta + reach),
        se=se,
        band=attenuation_curve(theta, theta - wide, theta + wide),
        p_adjusted=adjusted_p(sums, statistic),
        flags=flag_layers(
            {
                "weak_signal": ~usable & ~undetected & ~incompatible,
                "base_not_detected": undetected,
                "incompatible": incompatible,
                "small_n": np.full(len(shared.layers), n < SMALL_N),
            }
        ),
    )
