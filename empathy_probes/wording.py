"""What the report says: numbers, headlines and flags in words.

Everything here is plain text and numbers without markup, so that the page has one place that escapes (its templates).
A blank cell is an en dash whose explanation is that of the row's flags; the word "nan" never reaches a reader.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from empathy_probes.ledger import layer_name

BLANK = "–"
FLAGS: dict[str, str] = {
    "base_not_detected": "The base model does not show this contrast beyond noise, so there is nothing that could be lost.",
    "open_band": "The base shows this contrast, but too weakly for a band that holds for all layers and targets together; the intervals of single layers are in the tables.",
    "only_in_aligned": "Only the aligned model shows this contrast here: it was gained, and no ratio can say by how much.",
    "at_chance": "The two models are identical here and the contrast is not detected: 0 by construction.",
    "incompatible": "No ratio of the two strengths fits the data: the interval would be empty.",
    "weak_signal": "The aligned model shows so little that the ratio has a one-sided or wide interval (Fieller form).",
    "at_least": "Attenuation is at least the lower end of the interval; complete loss cannot be excluded, so no point is given.",
    "small_n": "Fewer than 60 scenarios: intervals are wide and their coverage is less certain.",
    "few_controls": "Fewer than six usable control concepts: a change is shown, not decided; only that nothing changed can be.",
    "equivalent_alone": "At some blocks fewer than six controls are usable; there the contrast by itself lies within the margin of attenuation.",
    "no_controls": "No control concepts: generic changes of every contrast cannot be told from a specific one.",
    "control_lost": "At least one control could not be used at this layer.",
    "within_control_spread": "Beyond the margin, but within what single controls do by themselves: not decided.",
    "ceiling": "Decodability is near its maximum in both models (or cannot be converted): it says nothing about attenuation.",
    "below_lexical_floor": "The probe does not beat a bag of words here: words alone may explain what it reads.",
    "not_above_shuffled": "The base's probe is no better than probes fitted to shuffled labels (p > 0.05 over all layers).",
    "not_above_random": "The labels lie no further apart than along random directions of the neutral texts' covariance (p > 0.05).",
    "few_neutral": "No more neutral texts than dimensions: the covariance behind d′ is shrunk so far that a merely quieter contrast can look less decodable.",
    "map_underdetermined": "No more neutral texts than dimensions: the map between the models is known on their span only.",
    "lexical_floor": "A bag of words (TF-IDF and ridge, same folds): what can be read without any model.",
    "no_chat_template": "The aligned tokenizer has no chat template, so only raw text was measured.",
    "onset_may_be_absent": "The data do not exclude that there is no layer at which attenuation begins.",
    "single_concept": "One concept only: nothing tells how much concepts of this group differ, so there is no interval.",
    "sign_reversed": "The aligned model's answer moves the other way: more than all of the base's coupling is gone.",
    "insane_boundary": "The hybrid cut here is no language model any more (twice the perplexity on neutral texts): its answers say nothing.",
    "merged": "The share of this block and of those before it back to the last usable cut.",
    "mapped": "The two models hold things in different bases here: a map fitted on neutral texts stands at the cut.",
    "aligned_not_detected": "The aligned model does not show this contrast beyond noise here.",
    "base_direction": "Read along the base's direction in both models, not along each one's own.",
    "beyond_band": "The difference is not 0: it lies beyond the 95 % band that holds for all components at once.",
    "inexact_sum": "The components miss the score by more than 1 %: rounding of the model's half-precision numbers.",
    "gain_not_detected": "A push along this direction does not move the answer beyond noise.",
    "within_random_directions": "Directions drawn at random, with the spread of neutral states, move the answer as far (central 95 %).",
    "within_shuffled_labels": "Directions of shuffled labels move the answer as far (p > 0.05).",
    "beyond_perplexity_bound": "This dose makes neutral texts more perplexing than the study's bound allows (1.1 times unless set): what it does to the answer may be damage.",
    "null_small_doses_only": "The band of random directions comes from gradients and is known for small doses only.",
    "noisy_direction": "The direction is known only roughly (estimated cosine below 0.9), and a rough direction has a small gain by itself: not decided.",
    "effect_not_detected": "The two texts' answers are not told apart, so there is nothing to recover.",
    "unequal_spans": "The two texts differ in a span of unequal length; its tokens are matched from the end.",
    "no_tokens": "No pair of texts has a token of this role.",
    "some_without_tokens": "Some pairs of texts have no token of this role and count as unmoved.",
    "difference_not_detected": "The two models' couplings are not told apart, so there is nothing to repair.",
    "no_component": "The model it comes from shows no direction of the concept here: nothing could be moved.",
    "lengths_differ": "The two models render a text in different lengths: moving all positions has no meaning there.",
    "may_not_repair": "The data do not exclude that no layer repairs it.",
    "no_onset": "No layer at which attenuation begins fits the data.",
}
"""Flag → explanation, in the words of the method."""
TEMPLATES = {
    "raw": "plain text", "shared": "the aligned model's chat template for both", "did": "shared minus raw",
    "own": "each model's own template",
}  # fmt: skip
RANKS = {"attenuated": 0, "amplified": 1, "inconclusive": 2, "": 3, "equivalent": 4}
BLOCKING = ("base_not_detected", "open_band", "incompatible", "few_controls", "no_controls", "at_chance")
"""Flags that keep a concept from being decided, the deepest reason first."""
TITLES = {"": "not decided"}


def missing(value: Any) -> bool:
    """Whether a value is None, NaN, NA or an empty string."""
    if value is None or isinstance(value, (list, tuple, dict)):
        return value is None
    return bool(pd.isna(value)) or (isinstance(value, str) and not value)


def number(value: Any, digits: int = 2) -> str:
    """A number with a true minus sign, or an en dash.

    >>> number(-0.126), number(None), number(float("nan"))
    ('−0.13', '–', '–')
    """
    if missing(value):
        return BLANK
    text = f"{float(value):.{digits}f}"
    return (text[1:] if float(text) == 0 else f"−{text[1:]}") if text.startswith("-") else text


def interval(lower: Any, upper: Any, digits: int = 2) -> str:
    """An interval in brackets, or an en dash where neither end is known.

    >>> interval(-0.1, 0.25), interval(None, None)
    ('[−0.10, 0.25]', '–')
    """
    return (
        BLANK if missing(lower) and missing(upper) else f"[{number(lower, digits)}, {number(upper, digits)}]"
    )


def plain(value: Any) -> str:
    """Any value of the manifest as a short text; long digests are shortened."""
    if missing(value):
        return BLANK
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k}: {plain(v)}" for k, v in value.items())
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:,}"
    text = str(value)
    digest = len(text) >= 40 and all(c in "0123456789abcdef" for c in text)
    return f"{text[:16]}…" if digest else text


def split_flags(value: Any) -> tuple[str, ...]:
    """Flags of a cell (joined by `;`) or of a headline (a list)."""
    if isinstance(value, (list, tuple)):
        return tuple(str(v) for v in value)
    return () if missing(value) else tuple(f for f in str(value).split(";") if f)


def explain(flag: str) -> str:
    """A flag in words; an unknown one as it is."""
    if flag.startswith("window_"):
        return (
            f"The same place is patched in {flag.removeprefix('window_')} blocks together, from this one on."
        )
    return FLAGS.get(flag, flag)


def margins(options: Mapping[str, Any]) -> tuple[float, float]:
    """Margin of attenuation and margin of specific."""
    margin = float(options.get("margin") or 0.10)
    return margin, float(options.get("specific_margin") or options.get("margin_specific") or margin)


# ---- headlines --------------------------------------------------------------------------------------------


def card(
    headline: Mapping[str, Any],
    others: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    n_controls: int,
) -> dict[str, Any]:
    """What the card of one concept says.

    Args:
        headline: entry of the manifest's `headlines` that stands for the concept.
        others: entries for other templates and sites.
        options: the manifest's `options`, for the margins.
        n_controls: how many controls the study has, for headlines that do not say.
    """
    decision = "" if missing(headline.get("decision")) else str(headline["decision"])
    size: Any = headline.get("size")
    at = headline.get("layer")
    rank = RANKS.get(decision, 3) - min(abs(0.0 if missing(size) else size), 9) / 10
    specific = headline.get("quantity") == "specific"
    controls = headline.get("n_controls", n_controls)
    if missing(at) or (missing(size) and missing(headline.get("size_lower"))):
        much = BLANK
    else:
        much = number(size) if not missing(size) else f"at least {number(headline['size_lower'])}"
    return {
        "concept": str(headline["concept"]),
        "decision": decision,
        "title": TITLES.get(decision, decision),
        "rank": rank,
        "template": headline["template"],
        "site": headline["site"],
        "n": headline.get("n_scenarios"),
        "sentence": headline.get("sentence") or "",
        "much": much,
        "band": interval(headline.get("size_lower"), headline.get("size_upper"))
        if not missing(at)
        else BLANK,
        "quantity": "attenuation beyond the controls" if specific else "attenuation",
        "at": BLANK if missing(at) else layer_name(at),
        "where": _where(decision, headline),
        "sure": _sure(decision, headline, margins(options)[1 if specific else 0]),
        "against": _against(specific, controls, n_controls, split_flags(headline.get("flags"))),
        "flags": split_flags(headline.get("flags")),
        "others": [_short_headline(h) for h in others],
        "headline": dict(headline),
    }


def _against(specific: bool, controls: Any, measured: int, flags: tuple[str, ...]) -> str:
    if "few_controls" in flags:
        return f"{measured} control concepts, {controls} of them usable; six are needed"
    if not controls:
        return "no controls were measured"
    if not specific:
        return f"not compared with the {controls} control concepts"
    lost = "; not all of them usable at this block" if "control_lost" in flags else ""
    return f"{controls} control concepts, measured the same way{lost}"


def _where(decision: str, h: Mapping[str, Any]) -> str:
    first: Any = h.get("onset_lower")
    last: Any = h.get("onset_upper")
    if missing(first) and missing(last):
        return {
            "equivalent": "no block that shows the contrast changes by more than the margin",
            "attenuated": "attenuated, without a layer by which it has surely begun",
        }.get(decision, "no onset established")
    if missing(last):
        return f"could begin as early as {layer_name(first)}; no layer by which it has surely begun"
    if missing(first) or int(first) == int(last):
        text = f"attenuated by {layer_name(last)}; no earlier beginning fits the data"
    else:
        text = f"attenuated by {layer_name(last)}; could begin as early as {layer_name(first)}"
    if not missing(h.get("peak_lower")) and not missing(h.get("peak_upper")):
        low, high = int(h["peak_lower"]), int(h["peak_upper"])
        text += (
            f"; largest at {layer_name(low)}"
            if low == high
            else f"; largest between {layer_name(low)} and {layer_name(high)}"
        )
    return text


def _sure(decision: str, h: Mapping[str, Any], limit: float) -> str:
    if decision in ("attenuated", "amplified"):
        spread = " and outside the spread of single controls" if h.get("quantity") == "specific" else ""
        return f"the simultaneous 95 % band lies beyond the margin{spread}"
    if decision == "equivalent":
        text = f"shown equivalent: the 90 % interval lies within ±{limit:g} at every block that shows the contrast"
        if "equivalent_alone" in split_flags(h.get("flags")):
            return f"{text} and that six controls reach; at the others that of the contrast by itself lies within its margin"
        return text
    if decision == "inconclusive":
        text = "neither a change beyond the margin nor the absence of one is shown"
    else:
        # The first reason that stands in the way; the others are listed in the concept's own section.
        flags = split_flags(h.get("flags"))
        first = next((flag for flag in BLOCKING if flag in flags), None)
        known = not (missing(h.get("size")) and missing(h.get("size_lower")))
        text = "nothing is decided" if known else "nothing can be said"
        text += f". {explain(first)}" if first else ""
    needs = [f"{h[k]} {word}" for k, word in (("scenarios_needed", "scenarios"), ("controls_needed", "controls"))
             if not missing(h.get(k))]  # fmt: skip
    extra = []
    if not missing(h.get("minimum_detectable")):
        least = float(h["minimum_detectable"])
        extra.append(
            f"smallest attenuation this run could have shown: {number(least) if least < 1 else 'none'}"
        )
    if needs:
        extra.append(f"about {' or '.join(needs)} would settle it")
    return "; ".join([text.rstrip("."), *extra])


def _short_headline(h: Mapping[str, Any]) -> str:
    decision = "not decided" if missing(h.get("decision")) else str(h["decision"])
    text = f"{TEMPLATES.get(h['template'], h['template'])}, {h['site']}: {decision}"
    if missing(h.get("layer")):
        return text
    size = number(h.get("size"))
    return f"{text}, {size} {interval(h.get('size_lower'), h.get('size_upper'))} at {layer_name(h['layer'])}"


def planted_and_found(truth: Mapping[str, Any], cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was planted in a phantom, beside what was found, one row per target."""
    concept = truth.get("concept")
    by_layer = {int(layer): value for layer, value in (truth.get("attenuation_by_layer") or {}).items()}
    planted = "no attenuation of any concept" if missing(concept) else f"attenuation of {concept}"
    if not missing(truth.get("layer")) and not missing(concept):
        planted += f" from {layer_name(truth['layer'])} on"
    if not missing(truth.get("keep_achieved")):
        planted += f"; measured keep {number(truth['keep_achieved'], 3)}, intended {number(truth.get('keep_intended'), 3)}"
    rows = []
    for c in cards:
        h = c["headline"]
        mine = not missing(concept) and c["concept"] == concept
        checks = []
        if mine and not missing(truth.get("layer")):
            first, last = h.get("onset_lower"), h.get("onset_upper")
            if not missing(first) and not missing(last):
                hit = int(first) <= int(truth["layer"]) <= int(last)
                checks.append(
                    (
                        hit,
                        "onset set holds the planted layer" if hit else "onset set misses the planted layer",
                    )
                )
            value, low, high = by_layer.get(h.get("layer")), h.get("size_lower"), h.get("size_upper")
            if not (missing(value) or missing(low) or missing(high)):
                hit = low <= value <= high
                checks.append(
                    (hit, f"band {'holds' if hit else 'misses'} the truth {number(value)} at {c['at']}")
                )
        elif not mine:
            false = c["decision"] in ("attenuated", "amplified")
            checks.append(
                (not false, "a change is claimed that was not planted" if false else "no change claimed")
            )
        rows.append(
            {"concept": c["concept"], "anchor": c["anchor"], "mine": mine, "found": c, "checks": checks}
        )
    rows.sort(key=lambda r: not r["mine"])
    return {"family": truth.get("family"), "planted": planted, "n": truth.get("n_scenarios"), "rows": rows}
