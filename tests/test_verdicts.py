"""Statements of three stages become a verdict only where they fit a row of the table."""

from __future__ import annotations

from dataclasses import replace

import pytest

from empathy_probes.stitching import Loss
from empathy_probes.verdicts import Encoded, Used, Verdict, reach_verdict, use_word

LAYERS = 6
SAME = Encoded("equivalent", True, None, drifted=False, rotated=False)
LESS = Encoded("attenuated", True, 3, drifted=False, rotated=False)
KEPT, UNSURE, HEAD = (
    Loss(word, at, at) for word, at in (("kept", None), ("inconclusive", None), ("lost", 6))
)


def lost(first: int, last: int | None = None) -> Used:
    return Used(Loss("lost", first, first if last is None else last), None)


@pytest.mark.parametrize(
    ("encoded", "used", "express", "expected"),
    [
        (LESS, lost(3), "attenuated", "erased"),
        (LESS, lost(4, 5), "attenuated", "erased"),
        (SAME, lost(4, 5), "attenuated", "encoded_unread"),
        (SAME, Used(Loss("lost", 4, 5), "attenuated"), "attenuated", "encoded_unread"),
        (SAME, Used(HEAD, None), "attenuated", "used_unsaid"),
        (LESS, Used(KEPT, None), "equivalent", "local"),
        (replace(SAME, rotated=True), Used(KEPT, None), "equivalent", "rotated"),
        (replace(SAME, drifted=True), Used(KEPT, None), "equivalent", "generic_drift"),
        (SAME, Used(KEPT, None), "equivalent", "preserved"),
        (replace(LESS, decision="amplified"), None, None, "amplified"),
    ],
)
def test_every_row_of_the_table(
    encoded: Encoded, used: Used | None, express: str | None, expected: str
) -> None:
    assert reach_verdict(encoded, used, express, LAYERS) == Verdict(expected, ())


@pytest.mark.parametrize(
    ("encoded", "used", "express", "missing"),
    [
        (SAME, None, None, ("use", "express")),
        (replace(SAME, decision="inconclusive"), Used(KEPT, None), "equivalent", ("scenarios",)),
        (replace(SAME, decision="", missing="controls"), None, "equivalent", ("controls", "use")),
        (SAME, Used(UNSURE, None), "attenuated", ("use",)),
        (LESS, lost(3), "inconclusive", ("express",)),
        # The loss begins before the attenuation; the concept is gone but expressed; only the gain speaks against it.
        (LESS, lost(1), "attenuated", ("agreement",)),
        (LESS, lost(3), "equivalent", ("agreement",)),
        (SAME, Used(Loss("lost", 4, 5), "equivalent"), "attenuated", ("gain",)),
        (replace(SAME, decision="amplified", specific=False), Used(KEPT, None), "equivalent", ("agreement",)),
    ],
)
def test_anything_else_is_inconclusive_and_names_what_is_missing(
    encoded: Encoded, used: Used | None, express: str | None, missing: tuple[str, ...]
) -> None:
    assert reach_verdict(encoded, used, express, LAYERS) == Verdict("inconclusive", missing)


def test_a_loss_is_named_by_its_blocks() -> None:
    words = [
        use_word(used, LAYERS)
        for used in (None, Used(KEPT, None), Used(HEAD, None), lost(-1), lost(2), lost(2, 6))
    ]
    assert words == ["not_run", "kept", "lost at head", "lost at embedding", "lost at 2", "lost at 2-head"]
