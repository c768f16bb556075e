"""An audit for readers: a block of lines per concept, plain data for JSON, and the page docs/concepts.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from empathy_probes.audit import Audit, Check
from empathy_probes.concepts import MECHANISMS

INTRODUCTION = """# The shipped concepts

Written by `empathy-probes concepts audit --markdown > docs/concepts.md`; do not edit it.

Every concept is audited before any model reads it: what gives its label away without a model, and what ties its
scenarios together. A check that is missed and not explained fails (exit code 3; the test suite runs it on this whole
library). Numbers in brackets are 95 % intervals over scenarios. Differences are label 1 minus label 0 (the highest grade
minus the lowest; for categories, the one that is furthest from the rest), in turns that differ between the labels.
A name that ends in a speaker (`valence_third_person`) is a variant: the same contrast asked of another speaker, in texts of
its own. It is measured where it is named; a study of all targets leaves it out. Five targets have no variant, because their
contrast lives in one turn: how a reply takes up what was said (`specificity`, `validation`, `advice_first`), how a person asks
or addresses another (`indirectness`, `honorific`).

- *floor, words* and *floor, characters*: AUROC of TF-IDF and ridge on words, or on runs of 2 to 5 characters; five folds
  grouped by scenario, mean over three draws of the folds. Chance .5, target at most .75 without an explanation.
- *words*, *tokens*: paired difference in words between spaces, and in tokens of a byte-level BPE (4,000 tokens, trained
  on these and the neutral texts), within half a word and one token.
- *ease*: paired difference in Flesch's reading ease, within 10 points.
- *nearest*: TF-IDF cosine of the most similar text of any other scenario in the library, at most .6.

Checked as well: labels of every scenario, repeated texts, sentences that recur in another scenario (none of six words
or more), skeletons of five words, one left open (at most in a tenth of the scenarios), and readouts (equal in length to
a word, the same after all texts of a scenario, four wordings or more).
"""
COLUMNS = ("floor_words", "floor_characters", "length_words", "length_tokens", "reading", "duplicates")
HEAD = "| concept | dimension | speaker | scenarios | floor, words | floor, characters | words | tokens | ease | nearest |"


def describe_audit(audit: Audit) -> str:
    """The audit as lines of text: verdict, value, interval, bound and what was found."""
    what = ", ".join(part for part in (audit.role, audit.mechanism, audit.dimension) if part)
    lines = [f"{audit.concept}: {audit.verdict} ({what}; {audit.n_scenarios} scenarios)"]
    for check in audit.checks:
        lines.append(
            f"  {check.verdict:<9}  {check.name:<16}  {_value(check):<22} {_bound(check)} {check.unit}: {check.found}"
        )
        if check.explanation:
            lines.append(f"{'':13}because {check.explanation}")
    return "\n".join([*lines, *(f"  gives away {line}" for line in _cue_lines(audit))])


def plain_audit(audit: Audit) -> dict[str, Any]:
    """The audit as plain data, the verdict included."""
    return {"verdict": audit.verdict} | asdict(audit)


def docs_page(audits: Sequence[Audit]) -> str:
    """The page of the documentation: floors and balances in tables, then what is explained and what gives most away."""
    parts = [INTRODUCTION]
    for group in (*MECHANISMS, "targets", "controls"):
        rows = [audit for audit in audits if group_of(audit) == group]
        if rows:
            parts += [f"## {group.replace('_', ' ').capitalize()}\n", _table(rows)]
    parts.append("A star marks an explained exception.\n\n## Explained exceptions\n")
    for audit in audits:
        reasons: dict[str, list[str]] = {}
        for check in audit.checks:
            if check.verdict != "ok":
                missed = f"{check.name} {_value(check)} ({_bound(check)} {check.unit})"
                reasons.setdefault(check.explanation or "not explained.", []).append(missed)
        parts += [f"- **{audit.concept}**, {', '.join(missed)}: {why}" for why, missed in reasons.items()]
    parts.append("\n## What gives most away\n")
    parts.append(
        "Largest ridge weights; in brackets the scenarios in which a text of this label, and one of the other, has the word.\n"
    )
    parts += [f"- **{audit.concept}**: {'; '.join(_cue_lines(audit))}" for audit in audits]
    return "\n".join(parts) + "\n"


def group_of(audit: Audit) -> str:
    """Its mechanism, or controls; targets of no mechanism are targets."""
    return "controls" if audit.role == "control" else audit.mechanism or "targets"


def _table(audits: Sequence[Audit]) -> str:
    lines = [HEAD, "|---" * 3 + "|---:" * 7 + "|"]
    for audit in audits:
        values = [_value(audit.check(name)) + _mark(audit.check(name)) for name in COLUMNS]
        cells = [audit.concept, audit.dimension, audit.speaker, str(audit.n_scenarios), *values]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mark(check: Check) -> str:
    return {"ok": "", "explained": " *", "fail": " **fail**"}[check.verdict]


def _value(check: Check) -> str:
    if check.value is None:
        return "–"
    if check.lower is None or check.upper is None:
        return f"{check.value:.2f}" if check.unit in {"cosine", "of scenarios"} else f"{check.value:.0f}"
    sign = "+" if check.sense == "within" else ""
    return f"{check.value:{sign}.2f} [{check.lower:{sign}.2f}, {check.upper:{sign}.2f}]"


def _bound(check: Check) -> str:
    return f"{check.sense} {'±' if check.sense == 'within' else ''}{check.bound:g}"


def _cue_lines(audit: Audit) -> list[str]:
    sides = dict.fromkeys(cue.label for cue in audit.cues)
    return [
        f"{side}: {', '.join(f'{cue.word} ({cue.here}, {cue.there})' for cue in audit.cues if cue.label == side)}"
        for side in sides
    ]
