"""The scorecard as a figure and as one HTML page that opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from empathy_probes.drawing import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILLION, settings, svg
from empathy_probes.metrics import METRIC_WORDS
from empathy_probes.pages import environment, image_uri, script_hash, template_text
from empathy_probes.scorecard import Row, Scorecard
from empathy_probes.store import write_file
from empathy_probes.tables import Cell
from empathy_probes.wording import BLANK

SHOWN = (
    "coverage_attenuation",
    "coverage_band",
    "bias",
    "decided",
    "false_alarm",
    "onset_contains",
    "onset_size",
    "minimum_detectable",
)
HEAD = ["family", "architecture", "concept", "n", "metric", "value [95 %]", "target", "met", "redraws"]
_MARKS = {"llama": "o", "gpt2": "s"}


def render_scorecard(card: Scorecard) -> str:
    """The scorecard as HTML; equal scorecards give equal text."""
    judged = [row for row in card.rows if row.met is not None]
    script = template_text("report.js")
    special = {
        kind: [r for r in card.rows if r.family.startswith(f"{kind}:")] for kind in ("attack", "ablation")
    }
    provenance = card.provenance
    return (
        environment()
        .get_template("scorecard.html.j2")
        .render(
            provenance=provenance,
            n_judged=len(judged),
            n_met=len(judged) - len(card.missed),
            facts=[
                ("redraws per cell", f"up to {provenance['redraws']}, as the table says; fewer where n is over 100 and of measures that cost more"),
                ("scenarios drawn from", f"{provenance['population']} of the planted concept, {provenance['others']} of each other"),
                ("n", ", ".join(str(n) for n in provenance["sizes"])),
                ("texts", f"anything but the concept differs between a scenario's texts with probability {provenance['nuisance']}; "
                          f"a text shows a random label with probability {provenance['doubt']}; a fifth of both for local twins"),
                ("multiplier draws", str(provenance["draws"])),
                ("seed", str(provenance["seed"])),
            ],
            missed=_cells(card.missed),
            n_wide=len(card.too_wide),
            attacks=_cells(special["attack"]),
            ablations=_cells(special["ablation"]),
            rows=_cells(card.rows),
            head=HEAD,
            metrics=METRIC_WORDS,
            image=image_uri(svg(scorecard_figure(card))),
            script=Markup(script),
            hash=script_hash(script),
            css=Markup(template_text("report.css")),
        )
    )  # fmt: skip


def write_scorecard(card: Scorecard, path: str | Path) -> Path:
    """Write the page whole or not at all."""
    path = Path(path)
    write_file(path, render_scorecard(card).encode())
    return path


def _cells(rows: Sequence[Row]) -> list[list[Cell]]:
    def cell(text: str) -> Cell:
        return Cell(text or BLANK, sort=text)

    return [
        [
            cell(row.family.replace("_", " ")), cell(row.architecture), cell(row.concept), cell(str(row.n)),
            cell(row.metric.replace("_", " ")),
            Cell(f"{row.value:.3f} [{row.lower:.3f}, {row.upper:.3f}]", sort=f"{row.value:.6f}"),
            cell(row.target), cell("" if row.met is None else "yes" if row.met else "no"),
            cell(str(row.redraws or "")),
        ]
        for row in rows
    ]  # fmt: skip


def scorecard_figure(card: Scorecard) -> Figure:
    """One panel per metric: families down, the metric across, a point per architecture and n."""
    frame = card.to_frame()
    frame = frame[~frame["family"].str.contains(":") & frame["metric"].isin(SHOWN)]
    metrics = [m for m in SHOWN if m in set(frame["metric"])]
    families = list(dict.fromkeys(frame["family"]))
    sizes = sorted({int(n) for n in frame["n"]})
    colours = dict(zip(sizes, cycle((GREY, BLUE, VERMILLION, ORANGE, PURPLE)), strict=False))
    with settings():
        rows = -(-len(metrics) // 2)
        height = 0.24 * len(families) + 0.95
        figure = Figure(figsize=(7.2, rows * height + 0.4))
        FigureCanvasAgg(figure)
        for i, metric in enumerate(metrics):
            axes = figure.add_axes(
                (0.2 + 0.42 * (i % 2), 1 - (0.4 + (i // 2 + 1) * height - 0.65) / (rows * height + 0.4), 0.35,
                 (height - 0.95) / (rows * height + 0.4))
            )  # fmt: skip
            _panel(axes, frame[frame["metric"] == metric], metric, families, colours)
            if i % 2:
                axes.set_yticklabels([])
        handles = [Line2D([], [], marker="o", ls="", c=c, ms=4, label=f"n = {n}") for n, c in colours.items()]
        handles += [
            Line2D([], [], marker=mark, ls="", c="black", ms=4, mfc="none", label=name)
            for name, mark in _MARKS.items()
        ]
        handles += [Line2D([], [], marker="o", ls="", c="black", alpha=0.3, ms=4, label="pale: no target")]
        figure.legend(handles=handles, loc="upper center", ncol=len(handles), frameon=False, fontsize=8)
    return figure


def _panel(
    ax: Axes, rows: pd.DataFrame, metric: str, families: Sequence[str], colours: dict[int, str]
) -> None:
    target = next((t for t in rows["target"] if t), "")
    low, high = _range(target)
    pooled = rows.groupby(["family", "architecture", "n"], sort=False)[
        ["value", "lower", "upper", "target"]
    ].agg({"value": "mean", "lower": "min", "upper": "max", "target": "max"})
    ax.set_title(metric.replace("_", " "), fontsize=9, loc="left")
    everything = [*pooled["lower"], *pooled["upper"], *(x for x in (low, high) if x is not None)]
    left, right = min(everything), max(everything)
    pad = 0.05 * (right - left or 1)
    if target:
        ax.axvspan(
            left - pad if low is None else low,
            right + pad if high is None else high,
            color=GREEN,
            alpha=0.15,
            lw=0,
        )
    for row in pooled.reset_index().to_dict("records"):
        family, gpt2 = str(row["family"]), row["architecture"] == "gpt2"
        place = (sorted(colours).index(row["n"]) + 0.5) / len(colours) - 0.5
        y = families.index(family) + 0.54 * place + (0.07 if gpt2 else -0.07)
        # The green is no target of cells that are only reported.
        style: dict[str, Any] = {"color": colours[row["n"]], "alpha": 1.0 if row["target"] else 0.3}
        ax.plot([row["lower"], row["upper"]], [y, y], "-", lw=0.8, **style)
        ax.plot([row["value"]], [y], _MARKS.get(str(row["architecture"]), "o"), ms=2.6, **style)
    ax.set_yticks(range(len(families)), [f.replace("_", " ") for f in families], fontsize=7)
    ax.set_ylim(len(families) - 0.4, -0.6)
    ax.set_xlim(left - pad, right + pad)
    ax.tick_params(axis="x", labelsize=7)
    ax.xaxis.set_major_locator(MaxNLocator(5))


def _range(target: str) -> tuple[float | None, float | None]:
    if not target:
        return None, None
    if target.startswith("≤"):
        return None, float(target[1:])
    if target.startswith("≥"):
        return float(target[1:]), None
    low, high = target.split(" to ")
    return float(low), float(high)
