"""What encode, use and express say together: the verdicts of section 8 of the method.

Each stage is reduced to a statement that is already decided (or is not); a verdict is given only where the statements fit one
row of the table, and otherwise says which of them is missing. Nothing here looks at a number.
"""

from __future__ import annotations

from dataclasses import dataclass

from empathy_probes.stitching import Loss

NOT_RUN = "not_run"
CHANGES = ("attenuated", "amplified")


@dataclass(frozen=True)
class Encoded:
    """The encode stage about one concept."""

    decision: str
    """attenuated, amplified, equivalent, inconclusive; empty where nothing may be decided."""
    specific: bool
    """Decided relative to controls."""
    onset: int | None
    """First block at which attenuation may begin."""
    drifted: bool
    """Changed beyond the margin by itself, though not relative to the controls."""
    rotated: bool
    """The base's probe fails in the aligned model, and the neutral-text map repairs it."""
    missing: str = "scenarios"
    """What would decide it: scenarios or controls."""


@dataclass(frozen=True)
class Used:
    """The use stage about one concept."""

    loss: Loss
    """From stitching, aligned → base."""
    gain: str | None
    """Decision about the gain; None where it was not measured."""


@dataclass(frozen=True)
class Verdict:
    """What the stages say together."""

    word: str
    missing: tuple[str, ...]
    """What would settle an inconclusive one; empty otherwise."""


def use_word(used: Used | None, n_layers: int) -> str:
    """The use stage in one word: `not_run`, `kept`, `inconclusive`, or `lost at 3`, `lost at 2-5`, `lost at head`."""
    if used is None:
        return NOT_RUN
    if used.loss.first is None or used.loss.last is None:
        return used.loss.word
    names = [
        "embedding" if at < 0 else "head" if at == n_layers else str(at)
        for at in (used.loss.first, used.loss.last)
    ]
    return f"lost at {'-'.join(dict.fromkeys(names))}"


def reach_verdict(encoded: Encoded, used: Used | None, express: str | None, n_layers: int) -> Verdict:
    """The verdict on one concept.

    Args:
        encoded: the encode stage.
        used: the use stage; None where it was not run.
        express: the decision about coupling; None where it was not run.
        n_layers: blocks of the models; a loss there is the head's.
    """
    if encoded.decision == "amplified" and encoded.specific:
        return Verdict("amplified", ())
    missing = [encoded.missing] if encoded.decision not in (*CHANGES, "equivalent") else []
    missing += ["use"] if used is None or used.loss.word == "inconclusive" else []
    missing += ["express"] if express not in (*CHANGES, "equivalent") else []
    if missing or used is None or express is None:
        return Verdict("inconclusive", tuple(missing))
    word, needs = _row(encoded, used, express, n_layers)
    return Verdict(word or "inconclusive", () if word else needs)


def _row(encoded: Encoded, used: Used, express: str, n_layers: int) -> tuple[str, tuple[str, ...]]:
    """The row of the table that fits, or what keeps any from fitting."""
    lost = used.loss.first
    if encoded.decision == "attenuated":
        # A loss of expression that begins before the attenuation has another cause.
        if express == "attenuated" and lost is not None and lost < n_layers and encoded.onset is not None:
            return ("erased", ()) if lost >= encoded.onset else ("", ("agreement",))
        if express == "equivalent" and lost is None:
            return "local", ()
    if encoded.decision == "equivalent":
        if express == "attenuated" and lost is not None:
            if lost == n_layers:
                return "used_unsaid", ()
            return ("encoded_unread", ()) if used.gain in (None, "attenuated") else ("", ("gain",))
        if express == "equivalent" and lost is None:
            return "rotated" if encoded.rotated else "generic_drift" if encoded.drifted else "preserved", ()
    return "", ("agreement",)
