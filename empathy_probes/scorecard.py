"""The instrument's own scorecard: how often its intervals hold a known truth, and how often it decides rightly.

A cell is family of pairs × architecture × concept × number of scenarios. Its metrics are proportions over the redraws of
all pairs in the cell, with Wilson intervals, or means with t intervals. A rate that must be consistent with a nominal one
(coverage, false alarms) meets its target where its interval reaches into it; everything else must lie in its target itself.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from empathy_probes.errors import InputError
from empathy_probes.redraws import CURVES, DECISIONS, Outcomes
from empathy_probes.stats import Estimate, binomial_interval, critical_t
from empathy_probes.store import SCHEMA_VERSION, check_schema, write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("family", "architecture", "concept", "n", "metric", "value", "lower", "upper", "target", "met")
ATTENUATED, AMPLIFIED, EQUIVALENT = (DECISIONS.index(w) for w in ("attenuated", "amplified", "equivalent"))
MARGIN = 0.10
# Strength from which on a block of a phantom is said to carry a concept.
CARRIED = 0.1
# Architecture of rows that are about no base.
MADE_UP, TEXTS_ALONE, ALL = "made-up states", "texts alone", "all"
VERDICT_SAID = "verdict_"
# Twins whose residual stream holds exactly what their base's does: everything must be equivalent.
EXACT = ("identical", "rotated", "rescaled", "unsaid")


@dataclass(frozen=True)
class Case:
    """One pair with what the instrument said about it in its redraws."""

    family: str
    architecture: str
    concept: str | None
    """The concept that was attenuated; None where nothing specific was."""
    layer: int | None
    """The block at which."""
    keep: float | None
    """What was to be left of it."""
    outcomes: Outcomes

    @property
    def place(self) -> tuple[int, int]:
        """Indices of the target and the layer that the case is judged at: the planted ones, or the middle block."""
        o = self.outcomes
        layer = o.layers.index(self.layer) if self.layer is not None else len(o.layers) // 2
        return o.targets.index(self.concept) if self.concept is not None else 0, layer

    def truth(self, curve: str) -> Float[np.ndarray, "target layer"]:
        """The population's value of one curve."""
        return self.outcomes.truth[..., CURVES.index(curve)]


@dataclass(frozen=True)
class Target:
    """What a metric must be."""

    least: int | float = -np.inf
    most: int | float = np.inf
    consistent: bool = False
    """It is enough that the interval reaches there."""

    def __str__(self) -> str:
        if np.isinf(self.least):
            return f"≤ {self.most:g}"
        return f"≥ {self.least:g}" if np.isinf(self.most) else f"{self.least:g} to {self.most:g}"

    @staticmethod
    def read(text: str, metric: str) -> Target | None:
        """The target that a row of this metric names."""
        if not text:
            return None
        ends = [float(part) for part in text.strip("≤≥ ").split(" to ")]
        least = -np.inf if text.startswith("≤") else ends[0]
        most = np.inf if text.startswith("≥") else ends[-1]
        return Target(least, most, consistent=metric.startswith("coverage_") or metric == "false_alarm")

    def met_by(self, estimate: Estimate) -> bool:
        """Whether the estimate, or where that is enough its interval, reaches into the target."""
        low, high = (estimate.lower, estimate.upper) if self.consistent else (estimate.value, estimate.value)
        return bool(high >= self.least and low <= self.most)


@dataclass(frozen=True)
class Metric:
    """One number of a cell."""

    measure: Callable[[Case], Float[np.ndarray, " redraw"] | None]
    """One entry per redraw, NaN where it says nothing; None where the metric does not apply."""
    proportion: bool
    """Whether the entries are 0 or 1."""
    target: Callable[[Case], Target | None]


# ---------------------------------------------------------------- what is measured


def _coverage(curve: str) -> Callable[[Case], np.ndarray | None]:
    def measure(case: Case) -> np.ndarray | None:
        if case.family in EXACT:
            return None
        t, layer = case.place
        k = CURVES.index(curve)
        lower, upper = case.outcomes.curves[:, t, layer, k, 1:].T
        # Before a planted block nothing differs, exactly: an interval without width is no test of an interval.
        shown = ~(np.isnan(lower) & np.isnan(upper)) & ~(upper - lower < 1e-9)
        # Nothing is compatible with the data, though the base is detected: a miss, not a blank.
        empty = (
            np.isnan(lower)
            & np.isnan(upper)
            & (case.outcomes.curves[:, t, layer, CURVES.index("base"), 1] > 0)
        )
        return np.where(shown, case.outcomes.covers()[:, t, layer, k], np.where(empty, 0.0, np.nan))

    return measure


def _all_at_once(curve: str) -> Callable[[Case], np.ndarray | None]:
    """Whether the intervals of all targets at all layers together hold the truth, where that is defined (`_referred`).

    A redraw in which no layer is left says nothing.
    """

    def measure(case: Case) -> np.ndarray | None:
        if case.family in EXACT:
            return None
        k = CURVES.index(curve)
        blank = np.isnan(case.outcomes.curves[..., k, 1:]).all(-1) | np.isnan(case.truth(curve))
        blank |= ~_referred(case)[:, None]
        held = (case.outcomes.covers()[..., k] | blank).all((1, 2))
        return np.where(blank.all((1, 2)), np.nan, held)

    return measure


def _referred(case: Case) -> Bool[np.ndarray, "redraw layer"]:
    """Layers at which all controls are carried, or were all used: truth is relative to all of them."""
    return np.asarray((case.outcomes.controls > CARRIED).all(0) | case.outcomes.usable)


def _error(case: Case) -> np.ndarray | None:
    """Error of the estimated attenuation; of that of the strengths where only a bound is printed: else the rest is a selection."""
    printed = _printed_error(case)
    if printed is None:
        return None
    t, layer = case.place
    base, aligned = (case.outcomes.curves[:, t, layer, CURVES.index(name), 0] for name in ("base", "aligned"))
    with np.errstate(divide="ignore", invalid="ignore"):
        unprinted = np.where(base > 0, 1 - aligned / base, np.nan) - case.truth("attenuation")[t, layer]
    return np.where(np.isnan(printed), unprinted, printed)


def _printed_error(case: Case) -> np.ndarray | None:
    """The same where a point is printed."""
    if case.concept is None:
        return None
    t, layer = case.place
    point = case.outcomes.curves[:, t, layer, CURVES.index("attenuation"), 0]
    return np.asarray(point - case.truth("attenuation")[t, layer])


def _false_alarm(case: Case) -> np.ndarray:
    """Any decision about a target that nothing was planted in, at any layer where the truth is defined and within the margin."""
    truth, o = case.truth("specific"), case.outcomes
    others = np.array([name != case.concept for name in o.targets])[:, None]
    innocent = (truth <= MARGIN) & (truth >= -MARGIN) & others & _referred(case)[:, None]
    attenuated, amplified = o.beyond(MARGIN)
    claimed = np.isin(o.decisions, (ATTENUATED, AMPLIFIED)) | ((attenuated | amplified) & (o.decisions != 0))
    return np.where(innocent.any((1, 2)), (claimed & innocent).any((1, 2)), np.nan)


def _decided(case: Case) -> np.ndarray | None:
    if case.concept is None:
        return None
    t, layer = case.place
    claimed = (case.outcomes.decisions == ATTENUATED) & case.outcomes.beyond(MARGIN)[0]
    return claimed[:, t, layer].astype(float)


def _equivalent(case: Case) -> np.ndarray | None:
    """Every target shown equivalent at every layer that carries it, and nothing else said where none does."""
    if case.family not in EXACT:
        return None
    blank = (case.outcomes.decisions == 0) & (case.truth("base") <= CARRIED)
    return ((case.outcomes.decisions == EQUIVALENT) | blank).all((1, 2)).astype(float)


def _onset(case: Case) -> tuple[np.ndarray, np.ndarray] | None:
    """Whether the onset set holds the first layer beyond the margin, and its size."""
    if case.concept is None:
        return None
    t = case.place[0]
    beyond = np.flatnonzero(case.truth("specific")[t] > MARGIN)
    members = case.outcomes.onset[:, t]
    holds = members[:, beyond[0]] if len(beyond) else case.outcomes.onset_none[:, t]
    return holds.astype(float), members.sum(-1).astype(float)


def _two_sided(case: Case) -> np.ndarray | None:
    if case.concept is None:
        return None
    t, layer = case.place
    lower, upper = case.outcomes.curves[:, t, layer, CURVES.index("attenuation"), 1:].T
    return (~np.isnan(lower) & (upper < 1)).astype(float)


def _detectable(case: Case) -> np.ndarray | None:
    if case.concept is None:
        return None
    t, layer = case.place
    return case.outcomes.minimum_detectable[:, t, layer]


def _always(target: Target) -> Callable[[Case], Target | None]:
    return lambda case: target


def _when(target: Target, applies: Callable[[Case], bool]) -> Callable[[Case], Target | None]:
    return lambda case: target if applies(case) else None


def _keeps(least: float) -> Callable[[Case], bool]:
    return lambda case: case.keep is not None and case.keep >= least


def _planted_at(n: int) -> Callable[[Case], bool]:
    return lambda case: case.family == "planted" and case.outcomes.n == n


COVERAGE = Target(0.92, 0.98, consistent=True)
METRICS: dict[str, Metric] = {
    **{f"coverage_{curve}": Metric(_coverage(curve), True, _always(COVERAGE)) for curve in CURVES[:4]},
    # The controls of a phantom are a fixed set, but `specific` speaks about controls in general: it may cover more.
    "coverage_specific": Metric(_coverage("specific"), True, _always(Target(0.92, consistent=True))),
    "coverage_band": Metric(_all_at_once("band"), True, _always(Target(0.95, consistent=True))),
    # What simultaneous bands are for: pointwise intervals, asked to hold everything at once.
    "pointwise_band": Metric(_all_at_once("specific"), True, lambda c: None),
    "bias": Metric(_error, False, _when(Target(-0.03, 0.03), _keeps(0.25))),
    "rmse": Metric(lambda c: None if (e := _error(c)) is None else e**2, False, lambda c: None),
    "bias_printed": Metric(_printed_error, False, lambda c: None),
    "false_alarm": Metric(_false_alarm, True, _always(Target(most=0.05, consistent=True))),
    "decided": Metric(
        _decided, True,
        _when(Target(0.90), lambda c: c.family == "planted" and c.keep == 0.25 and c.outcomes.n >= 100),
    ),
    "equivalent": Metric(_equivalent, True, _always(Target(0.95))),
    "onset_contains": Metric(lambda c: (o := _onset(c)) and o[0], True, _always(Target(0.95))),
    "onset_size": Metric(lambda c: (o := _onset(c)) and o[1], False, _when(Target(most=3), _planted_at(100))),
    # Judged over all cells together, in `score`.
    "two_sided": Metric(_two_sided, True, lambda c: None),
    "minimum_detectable": Metric(_detectable, False, _when(Target(most=0.30), _planted_at(100))),
}  # fmt: skip


METRIC_WORDS = {
    "coverage_base": "Share of redraws whose 95 % interval of the base's strength holds the truth, at the planted block.",
    "coverage_aligned": "The same of the aligned model's strength.",
    "coverage_difference": "The same of the difference of strengths.",
    "coverage_attenuation": "The same of attenuation (pointwise).",
    "coverage_specific": "The same of attenuation beyond the controls. It speaks about controls in general, so it may hold more than 95 %.",
    "coverage_band": "Share of redraws whose simultaneous band holds the truth of all targets at all blocks (that carry all controls) together.",
    "pointwise_band": "The same of the pointwise intervals of specific: what happens without simultaneous bands.",
    "bias": "Mean error of the estimated attenuation at the planted block, of all redraws, also of those that print a bound only.",
    "rmse": "Root mean square of the same error.",
    "bias_printed": "Mean error where a point is printed: the fewer there are, the more they are those that chance made large.",
    "false_alarm": "Share of redraws in which anything is decided of a concept that nothing was planted in, at any block (that carries all controls) where its truth lies within the margin, with errors as large as those of fresh scenarios.",
    "decided": "Share of redraws in which the planted concept is called attenuated at the planted block, with errors as large as those of fresh scenarios.",
    "equivalent": "Share of redraws in which every target is shown equivalent at every block that carries it (pairs that compute the same).",
    "onset_contains": "Share of redraws whose onset set holds the block where the truth first exceeds the margin.",
    "onset_size": "Mean number of blocks in the onset set, of six.",
    "two_sided": "Share of redraws whose interval of attenuation has both ends; judged over all cells of an n that keep half or more.",
    "minimum_detectable": "Mean smallest attenuation that a run of this size would decide with 80 % power.",
    "caught": "Share of draws in which the attack is noticed: the lexical floor beats .9, or texts missing in one model are refused.",
    "says_<question>": "Share of redraws of a whole study with all stages in which encode, use, express, gain, the verdict or the frontier of a transplant is what was planted.",
    "verdict_<word>": "Share of the same redraws in which the ledger gives this verdict.",
    "coverage_<measure>_<column>": "Share of redraws in which this interval of attenuation.csv holds the truth, at the planted block. Truth of d′ and cosine: the whole population, with as many neutral texts as a sample has (mean of 100 draws of them). Truth of AUROC, bits and transfer: their mean over samples of this size.",
}  # fmt: skip


def describe_metric(name: str) -> str:
    """What a metric says, in words; of those that come by measure, question or verdict, what all of them say."""
    patterns = [key for key in METRIC_WORDS if "<" in key and name.startswith(key[: key.index("<")])]
    return METRIC_WORDS[name] if name in METRIC_WORDS else METRIC_WORDS[patterns[0]]


# ---------------------------------------------------------------- the scorecard


@dataclass(frozen=True)
class Row:
    """One line of scorecard.csv."""

    family: str
    architecture: str
    concept: str
    """Blank where nothing specific was planted."""
    n: int
    """Scenarios per concept."""
    metric: str
    value: float
    lower: float
    upper: float
    target: str
    """Blank for a number that is only reported."""
    met: bool | None
    redraws: int = 0
    """Behind the value; 0 in a card that was made before they were counted."""


@dataclass(frozen=True)
class Scorecard:
    """What the instrument did on pairs of known truth."""

    rows: tuple[Row, ...]
    provenance: Mapping[str, Any]
    """Versions, bases, sizes of populations, redraws, seed."""

    @property
    def missed(self) -> tuple[Row, ...]:
        """Rows whose target was not met."""
        return tuple(row for row in self.rows if row.met is False)

    @property
    def too_wide(self) -> tuple[Row, ...]:
        """The missed rows whose intervals hold the truth more often than promised."""
        return tuple(row for row in self.missed if row.metric.startswith("coverage") and row.lower > 0.95)

    def to_frame(self) -> pd.DataFrame:
        """The rows of `scorecard.csv`."""
        return pd.DataFrame([asdict(row) for row in self.rows], columns=list(COLUMNS))

    def summary(self) -> pd.DataFrame:
        """Per metric and n: smallest, median and largest cell, and how many of the cells meet the target.

        Columns `metric, n, smallest, median, largest, target, cells, met`; cells without a target count as not judged, and
        attacks and ablations are left out. A metric whose target differs between cells has only its judged cells here.
        """
        frame = self.to_frame()
        frame = frame[~frame["family"].str.contains(":") & (frame["target"] != "")].astype({"met": int})
        groups = frame.groupby(["metric", "n", "target"], sort=False)
        return groups.agg(
            smallest=("value", "min"), median=("value", "median"), largest=("value", "max"), cells=("value", "size"),
            met=("met", "sum"),
        ).reset_index()  # fmt: skip

    def pooled(self, other: Scorecard) -> Scorecard:
        """This card and one of other bases, made on another machine or another day, cell by cell.

        Raises:
            InputError: the two have a base in common or differ in what was asked of them, or one does not count its redraws.
        """
        mine, theirs = self.provenance, other.provenance
        common = sorted(set(mine["bases"]) & set(theirs["bases"]))
        if common:
            raise InputError(
                f"both scorecards measure {common[0]}, expected different bases; pool each base once"
            )
        for name in ("version", "population", "others", "draws", "nuisance", "doubt", "seed", "sizes"):
            if mine[name] != theirs[name]:
                raise InputError(
                    f"{name} of the scorecards is {mine[name]} and {theirs[name]}, expected equal ones; make both alike"
                )
        cells: dict[tuple[str | int, ...], list[Row]] = {}
        for row in (*self.rows, *other.rows):
            cells.setdefault((row.family, row.architecture, row.concept, row.n, row.metric), []).append(row)
        for card, rest in ((self, other), (other, self)):
            for row in _unsaid(card, rest):
                cells[row.family, row.architecture, row.concept, row.n, row.metric].append(row)
        added = {name: mine[name] + theirs[name] for name in ("bases", "pairs")}
        rows = tuple(map(_pool, cells.values()))
        # Rows of all pairs together are no cell's.
        most = max(mine["redraws"], theirs["redraws"], *(r.redraws for r in rows if r.architecture != ALL))
        code = list(dict.fromkeys([*mine.get("code", ()), *theirs.get("code", ())]))
        return Scorecard(rows, {**mine, **added, "redraws": most, "code": code})

    def save(self, folder: str | Path) -> None:
        """Write `scorecard.json` and `scorecard.csv`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        said = {"schema_version": SCHEMA_VERSION, "provenance": dict(self.provenance)}
        # A row per line: two cards can be compared line by line.
        rows = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in self.rows)
        text = f'{json.dumps(said, ensure_ascii=False)[:-1]}, "rows": [\n{rows}\n]}}\n'
        write_file(folder / "scorecard.json", text.encode())
        table = io.StringIO()
        self.to_frame().to_csv(table, index=False, float_format="%.6g")
        write_file(folder / "scorecard.csv", table.getvalue().encode())

    def plot(self) -> Figure:
        """Coverage, false alarms and power by number of scenarios."""
        from empathy_probes import scorepage

        return scorepage.scorecard_figure(self)


def load_scorecard(path: str | Path | None = None) -> Scorecard:
    """Load `scorecard.json`, or the folder it is in; by default the one shipped with the package (`docs/scorecard`).

    Raises:
        InputError: nothing of that kind is there.
    """
    path = Path(str(files("empathy_probes"))) / "data" if path is None else Path(path)
    path = path / "scorecard.json" if path.is_dir() else path
    try:
        record = json.loads(path.read_text(encoding="utf8"))
        check_schema(record["schema_version"], path)
        rows = tuple(Row(**row) for row in record["rows"])
        for row in rows:
            numbers = (row.n, row.value, row.lower, row.upper, row.redraws)
            if not all(isinstance(number, int | float) for number in numbers):
                raise TypeError(f"a row's numbers are {numbers}")
        return Scorecard(rows, dict(record["provenance"]))
    except FileNotFoundError:
        raise InputError(
            f"no scorecard at {path}: expected scorecard.json; make it with 'empathy-probes calibrate'"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no scorecard ({type(error).__name__}: {error}), expected what 'empathy-probes calibrate' wrote; make it again"
        ) from None


def cell_family(family: str, keep: float | None) -> str:
    """How a family is called in the rows: with what is kept, where that was planted."""
    return family if keep is None else f"{family} {keep:g}"


def score(cases: Sequence[Case]) -> tuple[Row, ...]:
    """Pool the cases of every cell and judge each metric against its target."""
    cells: dict[tuple[str, str, str, int], list[Case]] = {}
    for case in cases:
        cells.setdefault(
            (cell_family(case.family, case.keep), case.architecture, case.concept or "", case.outcomes.n), []
        ).append(case)
    rows = []
    for (family, architecture, concept, n), members in cells.items():
        for name, metric in METRICS.items():
            parts = [metric.measure(case) for case in members]
            entries = np.concatenate([part for part in parts if part is not None] or [np.empty(0)])
            entries = entries[~np.isnan(entries)]
            if len(entries) < 2:
                continue
            estimate = (
                binomial_interval(int(entries.sum()), len(entries)) if metric.proportion else _mean(entries)
            )
            if name == "rmse":
                estimate = _roots(estimate)
            target = metric.target(members[0])
            rows.append(_row(family, architecture, concept, n, name, estimate, target))
    return (*rows, *_two_sided_rows(cases))


def _two_sided_rows(cases: Sequence[Case]) -> Iterator[Row]:
    """How many attenuations have two ends, of all pairs that keep half and more: one faint concept is a matter of power."""
    keeps = _keeps(0.5)
    for n in sorted({case.outcomes.n for case in cases}):
        parts = [_two_sided(case) for case in cases if case.outcomes.n == n and keeps(case)]
        entries = [part for part in parts if part is not None]
        if entries:
            yield proportion_row(
                "planted ≥ 0.5", ALL, "", n, "two_sided", np.concatenate(entries), Target(0.95)
            )


def proportion_row(
    family: str,
    architecture: str,
    concept: str,
    n: int,
    metric: str,
    entries: Float[np.ndarray, " n"],
    target: Target | None = None,
) -> Row:
    """A row from zeros and ones."""
    estimate = binomial_interval(int(entries.sum()), len(entries))
    return _row(family, architecture, concept, n, metric, estimate, target)


def mean_row(
    family: str, architecture: str, concept: str, n: int, metric: str, entries: Float[np.ndarray, " n"]
) -> Row:
    """A row from numbers, without a target."""
    return _row(family, architecture, concept, n, metric, _mean(entries), None)


def _row(
    family: str,
    architecture: str,
    concept: str,
    n: int,
    metric: str,
    estimate: Estimate,
    target: Target | None,
) -> Row:
    met = target.met_by(estimate) if target else None
    return Row(
        family,
        architecture,
        concept,
        n,
        metric,
        estimate.value,
        estimate.lower,
        estimate.upper,
        str(target or ""),
        met,
        estimate.n,
    )


def _unsaid(card: Scorecard, other: Scorecard) -> Iterator[Row]:
    """Verdicts that only the other card has of a cell of both: none of this card's redraws said them."""
    mine = {
        (r.family, r.architecture, r.concept, r.n): r for r in card.rows if r.metric.startswith(VERDICT_SAID)
    }
    there = {(r.family, r.architecture, r.concept, r.n, r.metric) for r in card.rows}
    for row in other.rows:
        cell = (row.family, row.architecture, row.concept, row.n)
        if row.metric.startswith(VERDICT_SAID) and cell in mine and (*cell, row.metric) not in there:
            yield proportion_row(*cell, row.metric, np.zeros(mine[cell].redraws))


def _pool(rows: Sequence[Row]) -> Row:
    """One row from those of one cell in several cards."""
    first, counts = rows[0], np.array([float(row.redraws) for row in rows])
    # No base has a part in these, and so the draws are the same in every card.
    if len(rows) == 1 or first.architecture in (MADE_UP, TEXTS_ALONE):
        return first
    if (counts < 2).any():
        raise InputError(
            f"the scorecard does not say how many redraws are behind {first.metric} of {first.family}, expected a number; make it again"
        )
    metric = METRICS.get(first.metric)
    square = first.metric == "rmse"
    values, upper = (
        np.array([getattr(row, name) for row in rows]) ** (1 + square) for name in ("value", "upper")
    )
    total = int(counts.sum())
    centre = float((counts * values).sum() / total)
    if metric is None or metric.proportion:
        estimate = binomial_interval(round(centre * total), total)
    else:
        spread = (
            counts * (counts - 1) * ((upper - values) / critical_t(counts - 1)) ** 2
            + counts * (values - centre) ** 2
        )
        reach = float(critical_t(total - 1) * np.sqrt(spread.sum() / (total - 1) / total))
        estimate = Estimate(centre, centre - reach, centre + reach, total)
    if square:
        estimate = _roots(estimate)
    target = Target.read(first.target, first.metric)
    return _row(first.family, first.architecture, first.concept, first.n, first.metric, estimate, target)


def _roots(estimate: Estimate) -> Estimate:
    value, lower, upper = np.sqrt(np.maximum([estimate.value, estimate.lower, estimate.upper], 0)).tolist()
    return Estimate(value, lower, upper, estimate.n)


def _mean(entries: Float[np.ndarray, " n"]) -> Estimate:
    reach = float(critical_t(len(entries) - 1) * entries.std(ddof=1) / np.sqrt(len(entries)))
    centre = float(entries.mean())
    return Estimate(centre, centre - reach, centre + reach, len(entries))
