"""Sections of the report for the stages use and express: what each question's figures show, and in which order.

One entry per table. A section shows, for every target, the figure of the headline template; figures of other templates, and
of concepts to which nothing happened, are folded away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from empathy_probes import wording
from empathy_probes.attribution_plots import attribution_figure, attribution_plotly
from empathy_probes.coupling_plots import coupling_figure, coupling_plotly
from empathy_probes.gains import Gain
from empathy_probes.pages import Picture, Section, Tables, head_and_rows, make_picture, parts, slug
from empathy_probes.patching_plots import (
    estimate_figure,
    patching_figure,
    patching_plotly,
    transplant_figure,
    transplant_plotly,
)
from empathy_probes.steering_plots import gain_figure
from empathy_probes.stitching_plots import stitching_figure, stitching_plotly
from empathy_probes.transplants import Transplants
from empathy_probes.writes import Attribution

QUIET = ("preserved", "generic_drift", "rotated")
"""Verdicts whose figures are folded away."""


@dataclass(frozen=True)
class Effect:
    """How the table of one question is shown."""

    title: str
    words: str
    """What was asked, in two or three sentences."""
    alt: str
    """What a reader who cannot see a figure is told it shows."""
    figure: Callable[..., Figure]
    """Of the table and, by keyword, `template` and, where there is one per concept, `concept`."""
    live: Callable[..., Any] | None
    """The same with plotly; None for a picture only."""
    per_concept: bool = True
    detail: Callable[[Any], pd.DataFrame] | None = None
    """Of the result: what belongs to a concept and stands in no column of its table."""
    detail_words: str = ""


def _frontiers(moved: Transplants) -> pd.DataFrame:
    frame = moved.frontier_frame()
    words = []
    for low, high in zip(frame.pop("frontier_lower"), frame.pop("frontier_upper"), strict=True):
        later = " or later, or none" if pd.isna(high) else f" to {high}" if high != low else ""
        words.append("–" if pd.isna(low) else f"{low}{later}")
    frame.insert(len(frame.columns) - 1, "frontier", words)
    return frame


EFFECTS = {
    "coupling": Effect(
        "Does it reach the output?",
        "Coupling is how far a concept moves the answer: the readout after texts that show it minus the readout after their matched "
        "twins, in nats. Nothing is generated and nothing is judged. A change of sign is told apart by a flag.",
        "coupling of every concept in both models with 95 % intervals, and its attenuation, plain and beyond the controls",
        coupling_figure,
        coupling_plotly,
        per_concept=False,
    ),
    "stitching": Effect(
        "In which blocks is expression lost?",
        "A hybrid runs the blocks up to a cut in one model and those beyond, with the head, in the other. Aligned → base is what a base "
        "reader still gets out of the aligned state; base → aligned is what the aligned model's later blocks make of an intact state. "
        "Steps of a curve are the shares of the blocks and sum to the whole loss in either order. Where the two orders differ, blocks "
        "of one model depend on what others did: the range between the orders is not an interval.",
        "coupling of every hybrid over the cut in both orders, and the share of each block",
        stitching_figure,
        stitching_plotly,
    ),
    "gain": Effect(
        "How far does a push move the answer?",
        "At the read position a dose of the concept's direction is added, in units of what stands there. The slope at small doses is the "
        "gain; a model that encodes a concept and does not use it has a small one. Bands are what random directions of the same "
        "spread do (dashed) and what control concepts do (dotted); the price of a dose is the perplexity of neutral texts.",
        "readout against dose in both models with the band of random directions, and the perplexity that each dose costs",
        gain_figure,
        None,
        detail=Gain.by_model,
        detail_words="By block and model: the gain in nats per dose; where 95 % of random directions lie; the smallest and the largest "
        "gain along a control concept's direction; p against shuffled labels; the dose that moves the answer by half of what the "
        "base's own texts move it (ED50); and tolerated, the doses up to which none costs more than bound times the neutral "
        "perplexity. Brackets of gain and ED50 are 95 % intervals over scenarios; a dash, or an end at inf, is "
        "what no dose of the grid reaches; a dash is also what was not asked.",
    ),
    "patching": Effect(
        "Where is it carried to the answer?",
        "An activation of the text that shows the concept is put into the run of its matched twin (denoise: is it sufficient?), and the "
        "other way round (noise: is it necessary?), layer by layer and place by place. 0 is nothing, 1 the whole effect.",
        "share of the effect that patching each layer recovers, by place, direction and model",
        patching_figure,
        patching_plotly,
    ),
    "attribution_patching": Effect(
        "How good is the estimate from gradients?",
        "A gradient says to first order what every patch would do, in two runs instead of one per place. The largest estimates and a "
        "random sample of the others were patched exactly: points on the dotted line are estimated right.",
        "estimated against exact patching at every place that was checked, by direction",
        estimate_figure,
        None,
    ),
    "transplant": Effect(
        "Does the other model's state restore it?",
        "After each layer one model's component of the concept takes the place of the other's own, and the rest of the run follows. "
        "0 is as before, 1 as the donor answers. Beside it stand the full state, everything but the component, directions at random "
        "and the component of another scenario.",
        "share of the models' difference that a transplant after each layer brings along, both ways",
        transplant_figure,
        transplant_plotly,
        detail=_frontiers,
        detail_words="Frontier: the first layer after which the component repairs by more than the margin, as its 95 % set of layers.",
    ),
    "attribution": Effect(
        "Who writes it?",
        "The residual stream is a sum of what the embedding, every head and every MLP write. Along a concept's direction each term is "
        "one component's direct contribution to the contrast, in units of the stream's rms, and they sum to the whole. A component can "
        "also act through later ones, which is not seen here.",
        "what attention and MLP of each block write along the concept's direction in both models, and the difference",
        attribution_figure,
        attribution_plotly,
        detail=Attribution.lens_frame,
        detail_words="Which words the direction speaks for: the tokens that the contrast, added to the last state, raises (up) and lowers "
        "(down) most, in nats beside the mean over the vocabulary. Some token always comes first: null 95 is what the most extreme "
        "token of a random direction of the same length reaches in 95 of 100, and p that of the first token here.",
    ),
}
"""Table → how it is shown, in the order of the page."""


def effect_section(key: str, study: Tables) -> list[Section]:
    """The section of one table of the stages use and express."""
    effect, frame = EFFECTS[key], study.tables[key].copy()
    encoded = study.tables["attenuation"]
    counts = encoded.groupby("concept")["n_scenarios"].max()
    frame.attrs |= {
        "n_scenarios": {
            **frame.attrs.get("n_scenarios", {}),
            **{str(name): int(n) for name, n in counts.items() if pd.notna(n)},
        },
        "n_layers": study.manifest["base"]["n_layers"],
    }
    order = {"shared": 0, "raw": 1}
    templates = sorted(frame["template"].unique(), key=lambda name: order.get(name, 2))
    ledger = {str(row["concept"]): row for row in study.tables["ledger"].to_dict("records")}
    targets = [
        name
        for name in dict.fromkeys(frame["concept"])
        if ledger.get(name, {"role": "target"})["role"] == "target"
    ]
    result = study.result(key) if effect.detail else None
    detail = effect.detail(result) if effect.detail and result is not None else None
    shown: list[tuple[str, str, list[Picture], bool, Any]] = []
    for i, name in enumerate(targets if effect.per_concept else [""]):
        pictures = [_picture(f"{slug(key)}-{i}", effect, frame, name, template) for template in templates]
        row = ledger.get(name)
        beside = None
        if detail is not None:
            beside = head_and_rows(detail[detail["concept"] == name].drop(columns="concept"))
        quiet = bool(row and row["verdict"] in QUIET)
        shown.append((name, _sentence(row) if row else "", pictures, quiet, beside))
    # What happened comes first.
    shown.sort(key=lambda entry: entry[3])
    body = parts().effect(effect.words, shown, key, *head_and_rows(frame), effect.detail_words)
    return [Section(f"stage-{slug(key)}", effect.title, Markup(body))]


def _sentence(row: Mapping[Any, Any]) -> str:
    verdict = str(row["verdict"]).replace("_", " ")
    missing = (
        f" ({str(row['missing']).replace(';', ', ')} missing)" if not wording.missing(row["missing"]) else ""
    )
    said = {"use": row["use"], "express": row["express"], "encode": row["encode"]}
    told = ", ".join(f"{stage}: {str(word).replace('_', ' ')}" for stage, word in said.items())
    return f"{verdict}{missing}. {told}."


def _picture(place: str, effect: Effect, frame: pd.DataFrame, concept: str, template: str) -> Picture:
    chosen: dict[str, Any] = {"template": template, **({"concept": concept} if concept else {})}
    name = " · ".join(part for part in (concept, wording.TEMPLATES.get(template, template)) if part)
    return make_picture(
        f"figure-{place}-{slug(concept)}-{slug(template)}", f"{name}: {effect.alt}", name,
        effect.figure(frame, **chosen), effect.live(frame, **chosen) if effect.live else None,
    )  # fmt: skip
