"""What a push along a concept does, drawn from the rows of `gain.csv`: the answer against the dose, its price, the gain by layer; and
what its direction's absence does, from those of an ablation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from empathy_probes.drawing import (
    BLUE,
    GREY,
    VERMILLION,
    Line,
    Panel,
    Sheet,
    draw_sheet,
    line_of,
    plotly_sheet,
    settings,
)
from empathy_probes.errors import InputError
from empathy_probes.gains import BOUND

COLOURS = {"base": BLUE, "aligned": VERMILLION}


def gain_figure(
    frame: pd.DataFrame,
    concept: str | None = None,
    *,
    template: str | None = None,
    layer: int | None = None,
    n: int | None = None,
) -> Figure:
    """The answer of both models against the dose after one block, the price in perplexity below, and the gain of every block.

    Args:
        frame: columns of gain.csv.
        concept, template: the first ones by default.
        layer: 0-based block; by default the one whose gain in the base stands farthest from zero, in its interval's widths.
        n: scenarios, where the frame does not carry their number.

    Raises:
        InputError: the frame has no such rows.
    """
    rows = _rows(frame, concept, template)
    shown = _clearest(rows) if layer is None else layer
    here = rows[rows["layer"] == shown]
    if here.empty:
        known = ", ".join(str(x) for x in sorted(rows["layer"].unique()))
        raise InputError(
            f"no doses were given after layer {shown}, expected one of {known}; choose among these"
        )
    several = rows["layer"].nunique() > 1
    with settings():
        height, n_panels = (7.4, 3) if several else (5.4, 2)
        figure = Figure(figsize=(7.2, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(n_panels, 1, height_ratios=[2.4, 1.2, 1.5][:n_panels])
        axes[1].sharex(axes[0])
        for model in _models(here):
            _draw_response(axes[0], here[here["model"] == model].sort_values("dose"), model)
            _draw_cost(
                axes[1],
                here[here["model"] == model].sort_values("dose"),
                model,
                frame.attrs.get("bound", BOUND),
            )
        axes[0].axvline(0, color=GREY, linewidth=0.8)
        axes[1].axvline(0, color=GREY, linewidth=0.8)
        axes[0].set_title(f"The answer after block {shown} (95 % over scenarios)")
        axes[0].set_ylabel("readout (nats)")
        axes[0].legend(loc="best", fontsize=9)
        axes[1].set_title("What it costs: neutral texts steered throughout")
        wide = here["neutral_perplexity"].max() > 3 * here["neutral_perplexity"].min()
        if wide:
            axes[1].set_yscale("log", subs=(2, 5))
            axes[1].yaxis.set_major_formatter(ScalarFormatter())
            axes[1].yaxis.set_minor_formatter(ScalarFormatter())
        axes[1].set_ylabel("perplexity\n(log scale)" if wide else "perplexity")
        axes[1].set_xlabel("dose (rms of the residual stream; label 0 ← 0 → label 1)")
        if several:
            _draw_slopes(axes[2], rows, shown)
        for each in axes:
            each.grid(axis="y", color="#e5e7eb", linewidth=0.6)
            each.set_axisbelow(True)
        figure.suptitle(_caption(rows, n), x=0.01, ha="left", fontsize=11, color=GREY)
    return figure


def slope_figure(
    frame: pd.DataFrame, concept: str | None = None, *, template: str | None = None, n: int | None = None
) -> Figure:
    """Gain after every block that was steered, in both models, and the share of scenarios that move the wrong way.

    Arguments as in `gain_figure`.
    """
    return draw_sheet(_sheet(_rows(frame, concept, template), n))


def slope_plotly(
    frame: pd.DataFrame, concept: str | None = None, *, template: str | None = None, n: int | None = None
) -> Any:
    """The same as `slope_figure`, as a plotly figure."""
    return plotly_sheet(_sheet(_rows(frame, concept, template), n))


def ablation_figure(frame: pd.DataFrame) -> Figure:
    """Share of a concept's coupling that goes with its direction, taken out after each layer and after all of them.

    Args:
        frame: `Ablation.to_frame()`.
    """
    return draw_sheet(_ablation_sheet(frame))


def ablation_plotly(frame: pd.DataFrame) -> Any:
    """The same as `ablation_figure`, as a plotly figure."""
    return plotly_sheet(_ablation_sheet(frame))


def _ablation_sheet(frame: pd.DataFrame) -> Sheet:
    places = np.arange(len(frame), dtype=float)
    first = frame.iloc[0]
    middle = frame[["random_lower", "random_upper"]].mean(axis=1)
    random = line_of(frame.assign(random=middle), "random", "random directions, smallest to largest", GREY)
    panel = Panel(
        "Coupling that goes with the direction (95 %)", "removed\n(share)",
        (line_of(frame, "removed", "the concept's direction", COLOURS["base"]), random), ((0.0, "", GREY, "solid"), (1.0, "", GREY, "dot")),
        None, None, True,
    )  # fmt: skip
    caption = f"ablation · {first['concept']} · {first['template']} · {first['model']} · n = {first['n_scenarios']} scenarios"
    return Sheet(
        caption, places, places, (panel,), tuple(frame["layer"].astype(str)), "taken out after block"
    )


def _rows(frame: pd.DataFrame, concept: str | None, template: str | None) -> pd.DataFrame:
    if frame.empty:
        raise InputError(
            "a gain figure got a frame without rows, expected those of gain.csv; measure something first"
        )
    name = str(frame["concept"].iloc[0]) if concept is None else concept
    style = str(frame["template"].iloc[0]) if template is None else template
    rows = frame[(frame["concept"] == name) & (frame["template"] == style)]
    if rows.empty:
        known = ", ".join(
            sorted({f"{c} ({t})" for c, t in zip(frame["concept"], frame["template"], strict=True)})
        )
        raise InputError(
            f"no doses of concept '{name}' ({style}), expected one of {known}; choose among these"
        )
    return rows


def _models(rows: pd.DataFrame) -> list[str]:
    return [model for model in COLOURS if (rows["model"] == model).any()]


def _slopes(rows: pd.DataFrame, model: str) -> pd.DataFrame:
    """One row per layer; slopes stand on every dose's row."""
    return rows[rows["model"] == model].drop_duplicates("layer").sort_values("layer").set_index("layer")


def _clearest(rows: pd.DataFrame) -> int:
    base = _slopes(rows, _models(rows)[0])
    width = (base["slope_upper"] - base["slope_lower"]).clip(lower=1e-12)
    sharp = (base["slope"].abs() / width).to_numpy()
    return int(base.index.to_numpy()[int(sharp.argmax())])


def _caption(rows: pd.DataFrame, n: int | None) -> str:
    concept, template, site = (str(rows[name].iloc[0]) for name in ("concept", "template", "site"))
    counted = rows.attrs.get("n_scenarios", {}).get(concept) if n is None else n
    known = f"n = {counted} scenarios" if counted else "n not recorded"
    along = (
        "both along the base's direction"
        if "base_direction" in str(rows["flags"].iloc[0])
        else "each along its own direction"
    )
    return f"{concept} · {template} · {site} · {known} · {along}"


def _draw_response(axes: Axes, rows: pd.DataFrame, model: str) -> None:
    dose, colour = _numbers(rows, "dose"), COLOURS[model]
    axes.plot(dose, _numbers(rows, "readout"), color=colour, marker="o", markersize=4.5, label=model)
    axes.fill_between(
        dose,
        _numbers(rows, "readout_lower"),
        _numbers(rows, "readout_upper"),
        color=colour,
        alpha=0.18,
        linewidth=0,
    )
    for end in ("lower", "upper"):
        axes.plot(
            dose, _numbers(rows, f"null_{end}"), color=colour, linestyle="--", linewidth=1.2,
            label=f"random directions, {model} (95 %)" if end == "upper" else "_",
        )  # fmt: skip
    known = rows[rows["null_upper"].notna()]
    small, zero = _numbers(known, "dose"), _numbers(rows[rows["dose"] == 0], "readout")
    for k, slope in enumerate(_control_range(rows, model)):
        axes.plot(
            small, zero + small * slope, color=colour, linestyle=":", linewidth=1.2,
            label=f"control concepts, {model} (range)" if k else "_",
        )  # fmt: skip


def _draw_cost(axes: Axes, rows: pd.DataFrame, model: str, bound: float) -> None:
    dose, perplexity = _numbers(rows, "dose"), _numbers(rows, "neutral_perplexity")
    axes.plot(dose, perplexity, color=COLOURS[model], marker="o", markersize=4, label="_")
    at_zero = perplexity[np.argmin(np.abs(dose))]
    axes.axhline(
        at_zero * bound, color=COLOURS[model], linewidth=1.0, linestyle=":",
        label=f"+{bound - 1:.0%} on dose 0" if model == "base" else "_",
    )  # fmt: skip
    axes.legend(loc="best")


def _draw_slopes(axes: Axes, rows: pd.DataFrame, shown: int) -> None:
    for model in _models(rows):
        slopes = _slopes(rows, model)
        x = slopes.index.to_numpy(dtype=float)
        axes.plot(x, _numbers(slopes, "slope"), color=COLOURS[model], marker="o", markersize=4.5, label="_")
        axes.fill_between(
            x,
            _numbers(slopes, "slope_lower"),
            _numbers(slopes, "slope_upper"),
            color=COLOURS[model],
            alpha=0.18,
            linewidth=0,
        )
        for edge in _null_slopes(rows, model):
            axes.plot(x, edge, color=COLOURS[model], linestyle="--", linewidth=1.2, label="_")
        for edge in _control_range(rows, model):
            axes.plot(x, edge, color=COLOURS[model], linestyle=":", linewidth=1.2, label="_")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.axvline(shown, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xticks(sorted(rows["layer"].unique()))
    axes.set_xlabel("layer (block after which the dose is added; dotted: the one above)")
    axes.set_ylabel("gain\n(nats per dose)")
    axes.set_title("Gain by block: slope at small doses")


def _null_slopes(rows: pd.DataFrame, model: str) -> list[Float[np.ndarray, " layer"]]:
    """The random directions' band as slopes, from the largest dose for which it is known."""
    known = rows[(rows["model"] == model) & rows["null_upper"].notna() & (rows["dose"] > 0)]
    largest = known[known["dose"] == known["dose"].max()].sort_values("layer")
    zero = rows[(rows["model"] == model) & (rows["dose"] == 0)].sort_values("layer")
    return [
        (_numbers(largest, f"null_{end}") - _numbers(zero, "readout")) / _numbers(largest, "dose")
        for end in ("lower", "upper")
    ]


def _control_range(rows: pd.DataFrame, model: str) -> list[Float[np.ndarray, " layer"]]:
    """Smallest and largest gain along a control concept's direction; none where the frame does not carry them."""
    name = f"{rows['concept'].iloc[0]}/{rows['template'].iloc[0]}"
    known = rows.attrs.get("control_gains", {}).get(name, {}).get(model, {})
    gains = [known.get(int(layer)) for layer in sorted(rows["layer"].unique())]
    return [np.array([end(each) for each in gains]) for end in (min, max)] if all(gains) else []


def _sheet(rows: pd.DataFrame, n: int | None) -> Sheet:
    lines, wrong = [], []
    for model in _models(rows):
        slopes = _slopes(rows, model)
        value, lower, upper = (_numbers(slopes, f"slope{end}") for end in ("", "_lower", "_upper"))
        lines.append(Line(model, value, lower, upper, COLOURS[model]))
        low, high = _null_slopes(rows, model)
        # One entry of the legend for both edges.
        lines.append(Line(f"random ({model}, 95 %)", high, None, None, COLOURS[model], "dash"))
        lines.append(Line("", low, None, None, COLOURS[model], "dash"))
        for k, edge in enumerate(reversed(_control_range(rows, model))):
            name = "" if k else f"control concepts ({model})"
            lines.append(Line(name, edge, None, None, COLOURS[model], "dot"))
        wrong.append(Line(model, _numbers(slopes, "wrong_way"), None, None, COLOURS[model]))
    ends: Float[np.ndarray, " end"] = np.concatenate(
        [edge for line in lines for edge in (line.y, line.lower, line.upper) if edge is not None]
    )
    room = 0.08 * max(float(np.ptp(ends)), 1e-9)
    layers = np.array(sorted(rows["layer"].unique()), dtype=float)
    panels = (
        Panel("Gain: slope at small doses (95 %)", "gain\n(nats per dose)", tuple(lines), ((0.0, "", GREY, "solid"),), None,
              (min(0.0, float(ends.min())) - room, max(0.0, float(ends.max())) + room)),
        Panel("Scenarios that move the wrong way", "share", tuple(wrong), ((0.5, "chance", GREY, "dot"),), None, (-0.03, 1.03)),
    )  # fmt: skip
    # gain.csv does not say how deep the model is: a frame read from it leaves depth blank.
    return Sheet(_caption(rows, n), layers, (layers + 1) / rows.attrs.get("n_layers", np.nan), panels)


def _numbers(rows: pd.DataFrame, name: str) -> Float[np.ndarray, " row"]:
    return pd.to_numeric(rows[name], errors="coerce").to_numpy(dtype=float, na_value=np.nan)
