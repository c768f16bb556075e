"""From comparisons to decisions: specific attenuation, simultaneous bands, equivalence, onset and peak.

Method. The controls are a sample of concepts that have nothing to do with affect; specific = 1 - exp(theta_T -
mean theta of the controls), with the controls' spread (Hartung-Knapp) in its variance. Bands hold at once for
all targets and layers of one call: multiplier draws of all estimates' errors give the largest studentised error,
whose quantile sets the local level at every layer. Decided is what lies beyond the margin in that band and, for
specific, outside the band in which one more control would fall.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from empathy_probes.contrasts import (
    Contrast,
    LayerSet,
    attenuation_curve,
    flag_layers,
    log_keep_interval,
    onset_set,
    peak_set,
)
from empathy_probes.controls import (
    Gap,
    Reference,
    build_reference,
    error_at,
    gap_to,
    mean_errors,
    specific_intervals,
)
from empathy_probes.errors import InputError
from empathy_probes.stats import (
    LEVEL,
    Curve,
    adjusted_p,
    critical_t,
    largest_quantile,
    studentised_sums,
    unit_signs,
    upper_t,
)

FEWEST_CONTROLS = 6
# 80 % power: the upper quintile of the normal distribution.
POWER = 0.84


@dataclass(frozen=True)
class Judgement:
    """What can be said about one concept at each layer; NaN stands for a blank."""

    name: str
    layers: tuple[int, ...]
    n: int
    headline: tuple[str, ...]
    """Per layer the quantity that band, p and decision are about: `specific` or `attenuation`."""
    specific: Curve
    """Pointwise 95 %; all blank without controls."""
    prediction: Curve
    """95 % band of `specific` for one more control, simultaneous; its value is 0."""
    n_controls: Int[np.ndarray, " layer"]
    """Controls with a usable signal at the layer."""
    tau: Float[np.ndarray, " layer"]
    """Standard deviation of log keep between controls."""
    band: Curve
    """The headline quantity with its simultaneous 95 % band."""
    p_adjusted: Float[np.ndarray, " layer"]
    """Of no change in the headline quantity, over the whole family."""
    decision: tuple[str, ...]
    """`attenuated`, `amplified`, `equivalent`, `inconclusive`, or empty where nothing may be decided."""
    flags: tuple[tuple[str, ...], ...]
    minimum_detectable: Float[np.ndarray, " layer"]
    """Attenuation that would have been decided with 80 % power."""
    scenarios_needed: Float[np.ndarray, " layer"]
    """To settle an inconclusive layer with 80 % power if the estimate is right; NaN elsewhere."""
    controls_needed: Float[np.ndarray, " layer"]
    """The same, where the spread between controls is what hinders; NaN elsewhere."""
    onset: LayerSet
    """First layer attenuated beyond the margin (headline quantity)."""
    loss: LayerSet
    """Last layer attenuated beyond the margin: before the last layer, the concept comes back."""
    peak: LayerSet
    """Layers that may be the most attenuated (headline quantity)."""


def _check_family(
    targets: Sequence[Contrast], controls: Sequence[Contrast], margin: float, wide: float
) -> None:
    everyone = [*targets, *controls]
    if not targets:
        raise InputError("0 targets were given to judge, expected at least 1: pass the compared targets")
    names = [x.name for x in everyone]
    if len(set(names)) != len(names):
        raise InputError(
            f"the names {names} are not all different, expected each concept once: "
            "judge one template and site at a time"
        )
    if any(x.layers != everyone[0].layers for x in everyone):
        raise InputError(
            "the concepts were compared at different layers, expected the same: compare all of them alike"
        )
    if not (0 < margin < 1 and 0 < wide < 1):
        raise InputError(f"the margins are {margin} and {wide}, expected numbers between 0 and 1 such as 0.1")


def judge(
    targets: Sequence[Contrast],
    controls: Sequence[Contrast],
    *,
    margin: float = 0.10,
    specific_margin: float = 0.20,
    draws: int = 9999,
    seed: int = 0,
) -> tuple[Judgement, ...]:
    """Judge one family of targets against the controls; errors are controlled over all targets x layers given.

    With six or more usable controls at a layer the headline is `specific`. With fewer it is `attenuation`, of which nothing
    is decided there but equivalence (`few_controls`); with none at all `attenuation` is decided (`no_controls`). The input
    of block 0 (layer -1) is one more place as soon as it varies; where it does not (embeddings left alone, or the
    same last token in every text) its draws are 0 and it costs the family nothing.

    Args:
        targets: the family, compared at the same layers.
        controls: compared at the same layers; they may share scenarios with the targets and each other.
        margin: smallest attenuation worth a decision, and the equivalence margin of `attenuation`.
        specific_margin: equivalence margin of `specific`.
        draws: multiplier draws.
        seed: of the draws, which are keyed by scenario and control names.
    """
    _check_family(targets, controls, margin, specific_margin)
    reference = build_reference(controls) if controls else None
    common = mean_errors(reference, draws, seed) if reference else None
    views = [_view(target, reference, common, margin, draws, seed) for target in targets]
    # Cells on which nothing can be decided do not belong to the family.
    family = _Family(
        attenuation=np.concatenate([v.sums for v in views], axis=1),
        specific=np.concatenate([v.errors[:, v.enough] for v in views], axis=1),
        prediction=np.concatenate([v.wider[:, v.enough] for v in views], axis=1),
    )
    return tuple(_judge_one(view, reference, family, margin, specific_margin) for view in views)


def judge_controls(
    controls: Sequence[Contrast], *, margin: float = 0.10, draws: int = 9999, seed: int = 0
) -> tuple[Judgement, ...]:
    """Judge each control on its own `attenuation`, simultaneous over its layers only."""
    judged = [judge([c], [], margin=margin, draws=draws, seed=seed)[0] for c in controls]
    return tuple(
        replace(j, flags=tuple(tuple(f for f in at if f != "no_controls") for at in j.flags)) for j in judged
    )


# ---------------------------------------------------------------- one target


@dataclass(frozen=True)
class _Family:
    """Draws of all cells that are judged together."""

    attenuation: np.ndarray
    specific: np.ndarray
    prediction: np.ndarray

    @cached_property
    def critical(self) -> float:
        """Of attenuation's band."""
        return largest_quantile(self.attenuation)

    @cached_property
    def tails(self) -> tuple[float, float]:
        """Local errors of the bands of `specific` and of its prediction."""
        return _tail(self.specific), _tail(self.prediction)


@dataclass(frozen=True)
class _View:
    """A target with the multiplier draws of its studentised errors."""

    target: Contrast
    enough: np.ndarray
    """Layers where `specific` may be decided."""
    sums: np.ndarray
    """Draws for attenuation."""
    errors: np.ndarray
    """Draws for specific, standard deviation 1 (0 where nothing varies)."""
    wider: np.ndarray
    """The same with one more control's deviation in place of the mean alone."""
    ratio_errors: np.ndarray
    """Draws of the error of the headline's squared keep, for the peak."""
    statistics: np.ndarray
    """(margin - log keep) / se of the headline, for the onset."""


def _unit_columns(draws: np.ndarray) -> np.ndarray:
    spread = draws.std(axis=0)
    return np.divide(draws, spread, out=np.zeros_like(draws), where=spread > 1e-12)


def _view(
    target: Contrast,
    reference: Reference | None,
    common: tuple[np.ndarray, np.ndarray] | None,
    margin: float,
    draws: int,
    seed: int,
) -> _View:
    n, pair = target.n, target.pair
    signs = unit_signs(target.keys, draws, seed)
    sums = studentised_sums(target.influence, signs)
    shown, square = ~target.has_form("blank"), _square_keep(target)
    live = shown & ~pair.identical
    influence = np.zeros_like(target.influence)
    influence[live] = (pair.influence[1] - square[:, None] * pair.influence[0])[live] / pair.u[0][live, None]
    ratio_errors = signs.astype(float) @ influence.T / np.sqrt(n * (n - 1))
    edge = float(np.log(1 - margin))
    none, enough = np.zeros_like(sums), np.zeros_like(shown)
    if reference is None or common is None:
        # A layer that cannot be judged neither is excluded from the onset nor excludes another.
        plain = np.where(shown, -gap_to(target, None, edge).t, 0.0)
        return _View(target, enough, sums, none, none, ratio_errors, plain)
    enough = (reference.pool.count >= FEWEST_CONTROLS) & shown
    # What too few controls reach may be shown not to have changed, as in `_decide`, and nothing else.
    kept = np.where(shown, np.minimum(-gap_to(target, None, edge).z, 0), 0.0)
    if not enough.any():
        return _View(target, enough, sums, none, none, ratio_errors, kept)

    own = signs.astype(float) @ target.influence.T / np.sqrt(n * (n - 1))
    mean, fresh = common
    scale = np.where(enough, np.exp(-2 * reference.pool.mean), 0.0)
    ratio_errors = scale * (ratio_errors - 2 * square * mean)
    statistics = np.where(enough, -gap_to(target, reference, edge).z, kept)
    errors = _unit_columns(own - mean) * enough
    return _View(
        target, enough, sums, errors, _unit_columns(own - mean + fresh) * enough, ratio_errors, statistics
    )


def _square_keep(target: Contrast) -> np.ndarray:
    """U_a / U_b, which stays usable where U_a is not positive; 1 where identical or blank."""
    live = target.has_form("log", "fieller")
    base, aligned = np.where(live, target.pair.u, 1.0)
    return aligned / base


@dataclass(frozen=True)
class _Headline:
    """One quantity of one target on the log scale."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    narrow_low: np.ndarray
    """Ends of the pointwise 90 % interval, for equivalence."""
    narrow_high: np.ndarray
    p: np.ndarray
    critical: np.ndarray


@dataclass(frozen=True)
class _Sets:
    """Ends of log keep relative to the controls' mean."""

    pointwise: tuple[np.ndarray, np.ndarray]
    band: tuple[np.ndarray, np.ndarray]
    narrow: tuple[np.ndarray, np.ndarray]
    """Pointwise 90 %, for equivalence."""
    prediction: tuple[np.ndarray, np.ndarray]
    """Band for one more control."""


def _specific_sets(target: Contrast, reference: Reference, family: _Family) -> _Sets:
    band, prediction = family.tails
    tails = (1 - LEVEL, band, 0.10, prediction)
    low, high = specific_intervals(target, reference, tails, (False, False, False, True))
    return _Sets(*zip(low, high, strict=True))


def _attenuation_headline(view: _View, family: _Family) -> _Headline:
    target = view.target
    # Never narrower than the pointwise interval, whatever the draws say.
    critical = max(float(critical_t(target.n - 1)), family.critical)
    low, high = log_keep_interval(target, critical)
    narrow = log_keep_interval(target, float(critical_t(target.n - 1, 0.90)))
    p = adjusted_p(family.attenuation, gap_to(target, None, 0.0).t)
    return _Headline(target.theta, low, high, *narrow, p, np.full_like(p, critical))


def _tail(draws: np.ndarray) -> float:
    """Local two-sided error at each cell that the largest of the studentised draws exceeds with 5 %.

    The draws, scaled to standard deviation 1, say only how dependent the cells are; the tail of each cell stays
    Student's with its own degrees of freedom. Simulated with 6 and 8 controls over 12 layers: the band covers
    .942-.954. Two other recipes were worse: comparing |t| with the draws over the fixed standard error covers
    .868-.944, recomputing mean and Hartung-Knapp variance in every draw .910-.945 (docs/simulations).
    """
    return min(1 - LEVEL, 2 * float(special.ndtr(-largest_quantile(draws))))


def _specific_headline(view: _View, reference: Reference, family: _Family, sets: _Sets) -> _Headline:
    gap = gap_to(view.target, reference, 0.0)
    value = view.target.theta - reference.pool.mean
    p = adjusted_p(family.specific, gap.z)
    return _Headline(value, *sets.band, *sets.narrow, p, upper_t(family.tails[0] / 2, gap.df))


def _merge(enough: np.ndarray, specific: _Headline, attenuation: _Headline) -> _Headline:
    pairs = zip(vars(specific).values(), vars(attenuation).values(), strict=True)
    return _Headline(*(np.where(enough, a, b) for a, b in pairs))


def _judge_one(
    view: _View, reference: Reference | None, family: _Family, margin: float, specific_margin: float
) -> Judgement:
    target, enough = view.target, view.enough
    n_layers = len(target.layers)
    blank, none = np.full(n_layers, np.nan), np.zeros(n_layers, int)
    specific = prediction = Curve(blank, blank, blank)
    count, lost, tau, outside = none, none, blank, none == 0
    if reference is not None:
        pool = reference.pool
        count, lost, tau = pool.count, reference.lost, np.sqrt(pool.tau2)
        sets = _specific_sets(target, reference, family)
        specific = attenuation_curve(target.theta - pool.mean, *sets.pointwise)
        prediction = _prediction(target, reference, family.tails[1])
        outside = (sets.prediction[0] > 0) | (sets.prediction[1] < 0) | ~enough
    if reference is None or not enough.any():
        headline = _attenuation_headline(view, family)
    else:
        headline = _specific_headline(view, reference, family, sets)
        if not enough.all():
            headline = _merge(enough, headline, _attenuation_headline(view, family))

    few = ~enough & (reference is not None)
    limit = np.where(enough, specific_margin, margin)
    decision, within = _decide(headline, outside, target.has_form("blank"), few, margin, limit)
    needs = _needs(target, reference, enough, headline.critical, decision, within, margin, limit)
    onset, loss, peak = _locate(view, reference)
    extra = flag_layers(
        {
            "no_controls": np.full(n_layers, reference is None),
            "few_controls": (count < FEWEST_CONTROLS) & (reference is not None),
            "control_lost": lost > 0,
            "within_control_spread": within,
        }
    )
    return Judgement(
        name=target.name,
        layers=target.layers,
        n=target.n,
        headline=tuple("specific" if e else "attenuation" for e in enough),
        specific=specific,
        prediction=prediction,
        n_controls=count,
        tau=tau,
        band=attenuation_curve(headline.value, headline.low, headline.high),
        p_adjusted=np.where(target.has_form("blank"), np.nan, headline.p),
        decision=decision,
        flags=tuple((*a, *b) for a, b in zip(target.flags, extra, strict=True)),
        minimum_detectable=needs[0],
        scenarios_needed=needs[1],
        controls_needed=needs[2],
        onset=onset,
        loss=loss,
        peak=peak,
    )


def _prediction(target: Contrast, reference: Reference, tail: float) -> Curve:
    """Band of `specific` for one more control measured like this target."""
    pool = reference.pool
    critical = upper_t(tail / 2, np.maximum(pool.count - 1, 1))
    reach = critical * gap_to(target, reference, 0.0, pool.tau2).se
    return attenuation_curve(reach * 0, -reach, reach)


def _locate(view: _View, reference: Reference | None) -> tuple[LayerSet, LayerSet, LayerSet]:
    """Onset, loss layer and peak of the headline quantity; what too few controls of a study reach may be any of them.

    Unless it is shown not to have changed: then it is no onset.
    """
    target, enough, shown = view.target, view.enough, ~view.target.has_form("blank")
    square = np.where(shown, _square_keep(target), np.nan)
    draws, back = view.sums, float(critical_t(target.n - 1))
    open_ = np.zeros_like(shown)
    if reference is not None:
        square = np.where(enough, square * np.exp(-2 * reference.pool.mean), np.nan)
        draws, back = view.errors, float(-special.ndtri(0.025))
        open_ = shown & ~enough
    # Nothing can begin where the base does not carry the contrast, such as a last token that all texts share.
    carried = np.array(["base_not_detected" not in flags for flags in target.flags])
    onset = loss = LayerSet((), includes_none=True)
    if carried.any():
        layers = [layer for layer, there in zip(target.layers, carried, strict=True) if there]
        statistics, draws = view.statistics[carried], draws[:, carried]
        onset = onset_set(statistics, draws, back, layers)
        # The last layer is the first one of the reversed curve.
        reverse = onset_set(statistics[::-1], draws[:, ::-1], back, layers[::-1])
        loss = LayerSet(reverse.members[::-1], reverse.includes_none)
    peak = peak_set(-square, -view.ratio_errors, target.layers)
    members = tuple(
        layer for layer, may in zip(target.layers, open_, strict=True) if may or layer in peak.members
    )
    return onset, loss, replace(peak, members=members)


def _decide(
    headline: _Headline,
    outside: np.ndarray,
    blank: np.ndarray,
    few: np.ndarray,
    margin: float,
    limit: np.ndarray,
) -> tuple[tuple[str, ...], np.ndarray]:
    """Decision of each layer, and where only the controls' own spread stands against one.

    Where the controls are too few, a change cannot be told from what happens to everything, but that the contrast has not
    changed can be said: without that, a pair that differs in nothing was called inconclusive for an early block that few
    controls reach (.03 right at 40 scenarios of a rotated twin).
    """
    less, more = headline.high < np.log(1 - margin), headline.low > np.log(1 + margin)
    equal = (headline.narrow_low >= np.log(1 - limit)) & (headline.narrow_high <= np.log(1 + limit))
    undecidable = blank | (few & ~equal)
    within = (less | more) & ~outside & ~undecidable
    words = np.select(
        [undecidable, less & outside, more & outside, equal],
        ["", "attenuated", "amplified", "equivalent"],
        "inconclusive",
    )
    return tuple(str(word) for word in words), within


def _needs(
    target: Contrast,
    reference: Reference | None,
    enough: np.ndarray,
    critical: np.ndarray,
    decision: tuple[str, ...],
    within: np.ndarray,
    margin: float,
    limit: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minimum detectable attenuation, scenarios needed, controls needed.

    The estimate is taken at its word: a layer beyond the margin needs a standard error that would show it there,
    one inside needs one that would show it equivalent. Between controls only tau^2 / k remains however many
    scenarios there are; where that leaves less than half of the variance allowed, more controls are asked for.
    """
    n = target.n
    edges = [np.full_like(limit, 1 - margin), np.full_like(limit, 1 + margin), 1 - limit, 1 + limit]
    gap = _gap(target, reference, enough, np.log(np.stack(edges)))
    own, others = gap.own[0], gap.reference

    show = np.maximum(-gap.value[0], gap.value[1]) / (critical + POWER)
    equate = np.minimum(gap.value[2], -gap.value[3]) / (-special.ndtri(0.05) + POWER)
    target_se = np.maximum(show, equate)
    allowed = np.where(target_se > 0, target_se, np.nan) ** 2
    fixed = np.zeros_like(own)
    if reference is not None:
        fixed = np.where(enough, reference.pool.tau2 / np.maximum(reference.pool.count, 1), 0.0)
    short = fixed > allowed / 2
    sampling = np.maximum(own + others - fixed, 0)
    scenarios = np.ceil(n * sampling / np.where(short, allowed / 2, allowed - fixed))
    more = np.full_like(own, np.nan)
    if reference is not None:
        more = np.where(short, np.ceil(reference.pool.tau2 / (allowed / 2)), np.nan)
    open_ = (np.array(decision) == "inconclusive") & ~within
    return (
        _detectable(target, reference, enough, critical, margin),
        np.where(open_, np.maximum(scenarios, n), np.nan),
        np.where(open_, more, np.nan),
    )


def _detectable(
    target: Contrast, reference: Reference | None, enough: np.ndarray, critical: np.ndarray, margin: float
) -> np.ndarray:
    """Least attenuation whose standard error, as it would be there, shows it with 80 % power; 1 where none does.

    Errors are larger the more is lost. With those of what was found, the attenuation named for a pair that keeps everything
    was decided in .55-.70 of runs, and one that keeps a quarter needed more scenarios to show less (docs/simulations).
    """
    lost = np.linspace(margin, 0.99, 179)[:, None]
    log_keep = np.broadcast_to(np.log1p(-lost), (len(lost), len(target.layers)))
    se = error_at(target, None, log_keep)
    if reference is not None:
        se = np.where(enough, error_at(target, reference, log_keep), se)
    beyond = np.log1p(-margin) - log_keep - (critical + POWER) * se
    first = (beyond >= 0).argmax(0)
    before, after = (np.take_along_axis(beyond, i[None], 0)[0] for i in (np.maximum(first - 1, 0), first))
    step = np.divide(after, after - before, out=np.zeros_like(after), where=after > before)
    value = np.where((beyond >= 0).any(0), lost[first, 0] - step * (lost[1] - lost[0]), 1.0)
    return np.where(~target.has_form("blank") & (target.base.lower > 0), value, np.nan)


def _gap(target: Contrast, reference: Reference | None, enough: np.ndarray, log_keep: np.ndarray) -> Gap:
    """Gap of the headline quantity to each log keep [edge layer]."""
    plain = gap_to(target, None, log_keep)
    if reference is None:
        return plain
    pairs = zip(vars(gap_to(target, reference, log_keep)).values(), vars(plain).values(), strict=True)
    return Gap(*(np.where(enough, a, b) for a, b in pairs))
