"""Tables of the report: frames as rows of cells, a value and its interval in one cell.

Cells are plain text without markup; the templates escape them. A blank cell is an en dash that carries the
explanation of its row's flags.
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from empathy_probes.ledger import layer_name, runs_of
from empathy_probes.wording import BLANK, explain, interval, missing, number, split_flags

COUNTS = {
    "layer",
    "n_scenarios",
    "n",
    "onset",
    "peak",
    "peak_layer",
    "head",
    "position",
    "scenarios_needed",
    "n_concepts",
    "n_used",
    "n_controls",
    "n_neutral",
}
"""Columns of whole numbers."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    """What is shown."""
    sort: str = ""
    """What the column is sorted by."""
    title: str = ""
    """Why it is blank."""
    flags: tuple[str, ...] = ()
    """Flags to link to the glossary."""


def _stems(frame: pd.DataFrame) -> list[tuple[str, bool, bool]]:
    """Columns as shown: name, whether it has a value, whether it has an interval (of two columns)."""
    columns = [str(c) for c in frame.columns]
    shown: list[tuple[str, bool, bool]] = []
    for column in columns:
        stem = column.removesuffix("_lower").removesuffix("_upper")
        bounded = f"{stem}_lower" in columns and f"{stem}_upper" in columns
        entry = (stem, stem in columns, bounded)
        if entry not in shown:
            shown.append(entry)
    return shown


def table_head(frame: pd.DataFrame) -> list[str]:
    """Headings; a value and its interval share one column."""
    return [name.replace("_", " ") for name, _, _ in _stems(frame)]


def table_rows(frame: pd.DataFrame) -> list[list[Cell]]:
    """Rows of cells under `table_head`."""
    stems = _stems(frame)
    return [[_cell(row, *stem) for stem in stems] for row in frame.to_dict("records")]


def _cell(row: dict[Any, Any], name: str, has_value: bool, bounded: bool) -> Cell:
    if name == "flags":
        flags = split_flags(row[name])
        return Cell("", ";".join(flags), "", flags)
    value = row.get(name)
    low, high = (row.get(f"{name}_lower"), row.get(f"{name}_upper")) if bounded else (None, None)
    why = " ".join(explain(f) for f in split_flags(row.get("flags"))) or "not defined here"
    digits = 0 if name in COUNTS else 3
    texts = []
    if has_value:
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        texts.append(
            number(value, digits)
            if numeric and not missing(value)
            else BLANK
            if missing(value)
            else str(value)
        )
    if bounded and not (missing(low) and missing(high)):
        texts.append(interval(low, high, digits))
    text = " ".join(texts) or BLANK
    key = value if has_value and not missing(value) else low
    numeric = isinstance(key, (int, float)) and not missing(key)
    return Cell(
        text, "" if missing(key) else f"{key:.10g}" if numeric else str(key), why if text == BLANK else ""
    )


CONTROL_HEAD = ["concept", "n scenarios", "largest change", "at", "decisions over blocks"]


def control_rows(frame: pd.DataFrame, place: tuple[str, str]) -> list[list[Cell]]:
    """One row per control: its largest change over blocks, with the simultaneous band there."""
    rows = []
    here = frame[
        (frame["template"] == place[0]) & (frame["site"] == place[1]) & (frame["measure"] == "strength")
    ]
    for name, part in here.groupby("concept", sort=True):
        blocks = part[part["layer"] >= 0]
        # Where a contrast may be all gone there is no point: it changed by the lower end at least.
        sizes = (
            pd.to_numeric(blocks["attenuation"].fillna(blocks["band_lower"]), errors="coerce")
            .astype(float)
            .abs()
        )
        counts = (
            blocks["decision"].dropna().astype(str).replace("", "not decided").value_counts().sort_index()
        )
        said = ", ".join(f"{word} {count}×" for word, count in counts.items()) or BLANK
        if sizes.notna().any():
            row = blocks.iloc[int(sizes.fillna(-1).to_numpy().argmax())]
            value = row["attenuation"]
            size = f"{number(value)} {interval(row['band_lower'], row['band_upper'])}"
            if missing(value):
                value = row["band_lower"]
                size = f"at least {number(value)}"
            key, at, n = str(value), layer_name(row["layer"]), number(row["n_scenarios"], 0)
        else:
            size, key, at, n = BLANK, "", BLANK, number(part["n_scenarios"].iloc[0], 0)
        rows.append([Cell(str(name), str(name)), Cell(n, n), Cell(size, key), Cell(at, at), Cell(said, said)])
    return rows


def did_rows(frame: pd.DataFrame) -> list[list[Cell]]:
    """How the chat template changed attenuation, layer by layer."""
    rows = []
    for row in frame.sort_values("layer").to_dict("records"):
        why = " ".join(explain(f) for f in split_flags(row.get("flags"))) or "not defined here"
        size = f"{number(row.get('attenuation'))} {interval(row.get('attenuation_lower'), row.get('attenuation_upper'))}"
        blank = missing(row.get("attenuation"))
        rows.append(
            [
                Cell(layer_name(row["layer"]), str(row["layer"])),
                Cell(BLANK, "", why) if blank else Cell(size, str(row["attenuation"])),
                Cell(
                    interval(row.get("band_lower"), row.get("band_upper")), _sortable(row.get("band_lower"))
                ),
            ]
        )
    return rows


VIEWS = {
    "auroc": "probe, AUROC", "correlation": "probe, correlation", "slope": "slope of the reading", "granularity": "bits, fine in coarse",
    "d_prime": "d′ (crossnobis)", "bits": "bits", "cosine": "cosine of directions",
    "cosine_mapped": "cosine after the map", "transfer_base_to_aligned": "base's probe",
    "transfer_base_to_aligned_mapped": "base's probe after the map",
    "transfer_aligned_to_base": "aligned model's probe",
    "transfer_aligned_to_base_mapped": "aligned model's probe after the map",
}  # fmt: skip
VIEW_HEAD = ["view", "in the base", "in the aligned model", "difference"]


def view_rows(frame: pd.DataFrame, layer: Any) -> list[list[Cell]]:
    """Other views of a concept at one layer, and what words alone give.

    Args:
        frame: rows of attenuation.csv of one concept, template and site.
        layer: the headline's.
    """
    here = frame[frame["layer"] == layer].set_index("measure")
    rows = []
    for measure, name in VIEWS.items():
        if measure in here.index:
            row = here.loc[measure]
            rows.append(
                [
                    Cell(name, name),
                    *(
                        Cell(_with_ends(row, column), _sortable(row[column]))
                        for column in ("base", "aligned", "difference")
                    ),
                ]
            )
    for row in frame[frame["site"] == "text"].to_dict("records"):
        said = f"{number(row['base'])} {interval(row['base_lower'], row['base_upper'])}"
        what = "correlation" if row["measure"] == "correlation" else "AUROC"
        name = f"{what} of words alone (no model)"
        rows.append([Cell(name, name), Cell(said, _sortable(row["base"])), Cell(BLANK), Cell(BLANK)])
    return rows


def _sortable(value: Any) -> str:
    return "" if missing(value) else str(value)


def _with_ends(row: pd.Series, column: str) -> str:
    """A value and its interval; the interval alone where no value is given."""
    value, lower, upper = (row[f"{column}{end}"] for end in ("", "_lower", "_upper"))
    ends = interval(lower, upper)
    return ends if missing(value) else f"{number(value)} {ends}"


def flag_list(frame: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Flags of some rows: name, where it holds, explanation."""
    where: dict[str, dict[str, set[int]]] = {}
    for row in frame[["site", "measure", "layer", "flags"]].to_dict("records"):
        for flag in split_flags(row["flags"]):
            if flag == "lexical_floor":  # names the row, says nothing about it
                continue
            layers = where.setdefault(flag, {}).setdefault(str(row["measure"]), set())
            if not missing(row["layer"]):
                layers.add(int(row["layer"]))
    return [
        (flag, "; ".join(f"{m}{_layers(found)}" for m, found in sorted(places.items())), explain(flag))
        for flag, places in sorted(where.items())
    ]


def _layers(found: set[int]) -> str:
    """Layers as ranges: `at −1 to 2, 5`."""
    names = [[number(v, 0) if v >= 0 else "emb" for v in run] for run in runs_of(sorted(found))]
    parts = [run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in names]
    return f" at layer {', '.join(parts)}" if parts else ""
