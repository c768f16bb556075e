"""The instrument's own scorecard: how often its intervals hold a known truth, and how often it decides rightly.

A cell is family of pairs × architecture × concept × number of scenarios. Its metrics are proportions over the redraws of
all pairs in the cell, with Wilson intervals, or means with t intervals; `metrics` says what they are and must be.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from empathy_probes.errors import InputError
from empathy_probes.metrics import FEWEST, METRICS, Case, Target, keeps, two_sided
from empathy_probes.stats import Estimate, binomial_interval, critical_t
from empathy_probes.store import SCHEMA_VERSION, check_schema, write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)
COLUMNS = ("family", "architecture", "concept", "n", "metric", "value", "lower", "upper", "target", "met")
# Architecture of rows that are about no base.
MADE_UP, TEXTS_ALONE, ALL = "made-up states", "texts alone", "all"
VERDICT_SAID = "verdict_"
# Of the provenance: what was asked, and what adds up when cards are pooled.
ASKED = ("version", "population", "others", "draws", "nuisance", "doubt", "seed", "sizes")
SAID = {*ASKED, "bases", "pairs", "redraws"}


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
    """None without a target, and of a rate that so few redraws are behind that it would meet nearly any (`metrics.FEWEST`)."""
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
        frame = frame[~frame["family"].str.contains(":") & frame["met"].notna()].astype({"met": int})
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
        for name in ASKED:
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
        if len(code) > 1:
            logger.warning("the pooled scorecard is of %d different codes; it says so", len(code))
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
        provenance = dict(record["provenance"])
        if missing := sorted(SAID - set(provenance)):
            raise KeyError(f"provenance lacks {', '.join(missing)}")
        return Scorecard(rows, provenance)
    except OSError as error:
        raise InputError(
            f"no scorecard at {path} ({error.strerror}): expected scorecard.json; make it with 'empathy-probes calibrate'"
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
    kept = keeps(0.5)
    for n in sorted({case.outcomes.n for case in cases}):
        parts = [two_sided(case) for case in cases if case.outcomes.n == n and kept(case)]
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
    # The interval of few redraws reaches into nearly any target.
    judged = target and not (target.consistent and estimate.n < FEWEST)
    met = target.met_by(estimate) if target and judged else None
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
