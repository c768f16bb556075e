"""Print the tables of docs/scorecard/README.md from a scorecard.

    python scripts/scorecard_tables.py [FOLDER]

FOLDER is what a full `empathy-probes calibrate --out` wrote; without it, the scorecard shipped with the package is read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import pandas as pd

from empathy_probes import load_scorecard
from empathy_probes.calibration import MEASURED_UP_TO
from empathy_probes.populations import SIZES
from empathy_probes.secondary import MEASURES

# Line of the table, metric, families (a pattern; the judged cells, where it is blank).
ABOUT_STRENGTH = (
    ("coverage, strength of the base", "coverage_base", ""),
    ("coverage, strength of the aligned model", "coverage_aligned", ""),
    ("coverage, difference", "coverage_difference", ""),
    ("coverage, attenuation", "coverage_attenuation", ""),
    ("coverage, specific", "coverage_specific", ""),
    ("coverage, band of all targets and blocks", "coverage_band", ""),
    ("bias of attenuation (planted, local, rerouted)", "bias", ""),
    ("false alarm", "false_alarm", ""),
    ("decided, keep .25", "decided", r"planted 0\.25"),
    ("equivalent (identical, rotated, rescaled, unsaid)", "equivalent", ""),
    ("onset set holds the truth", "onset_contains", ""),
    ("size of the onset set, of 6", "onset_size", ".*"),
    ("minimum detectable attenuation (planted)", "minimum_detectable", "planted .*"),
    ("interval with two ends, keep ≥ ½ (all cells together)", "two_sided", ""),
)
MEASURE_WORDS = {
    ("auroc", "base"): "AUROC of the base", ("auroc", "aligned"): "AUROC of the aligned model",
    ("auroc", "difference"): "difference of AUROCs", ("auroc", "attenuation"): "attenuation of AUROC",
    ("bits", "base"): "bits of the base", ("bits", "aligned"): "bits of the aligned model",
    ("bits", "difference"): "difference of bits", ("bits", "attenuation"): "attenuation of bits",
    ("d_prime", "base"): "d′ of the base", ("d_prime", "aligned"): "d′ of the aligned model",
    ("d_prime", "attenuation"): "attenuation of d′", ("cosine", "aligned"): "cosine",
    ("cosine_mapped", "aligned"): "cosine after the map",
    ("transfer_base_to_aligned", "aligned"): "transfer, base to aligned",
    ("transfer_base_to_aligned_mapped", "aligned"): "the same after the map",
}  # fmt: skip
FURTHER = tuple((f"coverage, {MEASURE_WORDS[m]}", f"coverage_{m[0]}_{m[1]}", "") for m in MEASURES)
ARCHITECTURES = {"llama": "Llama", "gpt2": "GPT-2"}
ATTACKS = {
    "shuffled labels": "labels shuffled: anything decided",
    "another template frame": "the aligned model's texts in another template frame (equal weights; `template_shift`): anything decided",
    "texts missing in one model": "1 to 9 texts missing in either model: refused",
    "scenarios told five times, no cluster": "every scenario told five times, no `cluster`: coverage of attenuation",
    "scenarios told five times, cluster given": "the same with `cluster`",
}
QUESTIONS = (
    ("use", "use"), ("express", "express"), ("gain", "gain"), ("verdict", "verdict"),
    ("transplant repairs", "base_into_aligned"), ("random one repairs nothing", "random_base_into_aligned"),
)  # fmt: skip


def number(value: float) -> str:
    """Three places, without the zero before the point."""
    text = f"{value:.3f}".replace("-", "−")
    return text.removesuffix("0") if abs(value) >= 1 else re.sub(r"^(−?)0\.", r"\1.", text)


def spread(values: pd.Series) -> str:
    """Smallest, median and largest, or one number where all print alike."""
    shown = [number(value) for value in (values.min(), values.median(), values.max())]
    return shown[0] if len(set(shown)) == 1 else " ".join(shown)


def table(head: list[str], lines: Iterator[list[str]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(head) + " |", "|" + "---|" * len(head), sep="\n")
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print()


def target(rows: pd.DataFrame, sizes: list[int]) -> str:
    """What the judged cells must be, and from which n, if not all are judged."""
    judged = rows[rows["met"].notna()]
    text = re.sub(r"\b0\.", ".", judged["target"].iloc[0]).replace(" to ", "–")
    text = re.sub(r"^-(.+)–\1$", r"± \1", text)
    least, *more = sorted(judged["n"].unique())
    if 1 + len(more) == len(sizes):
        return text
    return f"{text} {'from' if more else 'at'} {least}"


def cells(
    frame: pd.DataFrame, metrics: tuple[tuple[str, str, str], ...], sizes: list[int]
) -> Iterator[list[str]]:
    for words, metric, families in metrics:
        rows = frame[frame["metric"] == metric]
        rows = rows[rows["family"].str.fullmatch(families)] if families else rows[rows["met"].notna()]
        yield [words, *(spread(rows.loc[rows["n"] == n, "value"]) for n in sizes), target(rows, sizes)]


def attacked(frame: pd.DataFrame) -> Iterator[list[str]]:
    for family, words in ATTACKS.items():
        rows = frame[frame["family"] == f"attack: {family}"].set_index("architecture")
        yield [words, *(number(rows.loc[architecture, "value"]) for architecture in ARCHITECTURES)]


def rehearsed(frame: pd.DataFrame) -> Iterator[list[str]]:
    said = frame[frame["metric"].str.startswith("says_")]
    for (family, architecture), rows in said.groupby(["family", "architecture"], sort=False):
        line = [f"{family}, {ARCHITECTURES[architecture]}"]
        for _, question in QUESTIONS:
            found = rows[rows["metric"] == f"says_{question}"].sort_values("n")
            line.append(", ".join(map(number, found["value"])) or "–")
        yield line


def main() -> None:
    card = load_scorecard(*sys.argv[1:2])
    frame = card.to_frame()
    special = frame["family"].str.contains(":")
    plain = frame[~special]
    head = ["metric", *(f"n = {n}" for n in SIZES), "target"]
    table(head, cells(plain, ABOUT_STRENGTH, list(SIZES)))
    few = [n for n in SIZES if n <= MEASURED_UP_TO]
    table(["metric", *(f"n = {n}" for n in few), "target"], cells(plain, FURTHER, few))
    table(["attack", *ARCHITECTURES.values()], attacked(frame))
    table(["pair (n = 40, n = 100)", *(words for words, _ in QUESTIONS)], rehearsed(frame))
    names = {metric for _, metric, *_ in FURTHER}
    about = {"of the further measures": plain["metric"].isin(names),
             "of rehearsals": plain["metric"].str.startswith(("says_", "verdict_"))}  # fmt: skip
    about["of strength and decisions"] = ~(about["of the further measures"] | about["of rehearsals"])
    for words, which in about.items():
        judged = plain[which & plain["met"].notna()]
        print(f"{int(judged['met'].astype(bool).sum())} of {len(judged)} targets {words} are met")
    two_ended = plain[plain["metric"].str.startswith("coverage_") & plain["target"].str.contains(" to ")]
    for words, which in about.items():
        held = two_ended[which.reindex(two_ended.index)]
        below, above = held["upper"] < 0.95, held["lower"] > 0.95
        if len(held):
            print(
                f"{below.sum()} of {len(held)} coverages {words} lie below .95 with their whole interval, {above.sum()} above"
            )
        for row in held[below].sort_values("value").itertuples():
            print(
                f"  {row.family}, {row.architecture}, {row.concept or '-'}, n = {row.n}: {row.metric} {row.value:.3f}"
            )
    for row in frame[special].itertuples():
        print(
            f"{row.family}, {row.architecture}, n = {row.n}: {row.metric} {row.value:.3f} ({row.lower:.3f} to {row.upper:.3f})"
        )
    for row in card.missed:
        print(f"not met: {row.family}, {row.architecture}, n = {row.n}: {row.metric} {row.value:.3f} "
              f"({row.lower:.3f} to {row.upper:.3f}), target {row.target}")  # fmt: skip


if __name__ == "__main__":
    main()
