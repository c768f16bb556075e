"""Write stimuli files made of public labelled texts: length-matched scenarios that any `--stimuli` takes.

    python scripts/prepare_public_data.py --data ../shared/data --out runs/public-stimuli

What each file holds, and how texts are paired, is in the docstring of `empathy_probes.public_data`, which reads the corpora;
`load_stimuli(path, format=…)` does so without files. Texts are read as their mean; `--read last` reads the last token.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from empathy_probes.corpus_files import bad_data, read_text
from empathy_probes.errors import InputError
from empathy_probes.pairing import count_words
from empathy_probes.public_data import read_public
from empathy_probes.store import write_file

# Folder of the data, licence, formats.
SOURCES = {
    "goemotions": (
        "Apache-2.0 repository; the texts are Reddit comments",
        ("goemotions", "goemotions_controls"),
    ),
    "sst2": ("MIT repository; the texts are sentences of film reviews", ("sst2",)),
    "politeness": (
        "Apache-2.0 repository; the texts are requests on Wikipedia talk pages",
        ("politeness", "politeness_controls"),
    ),
    "repe_emotions": ("MIT", ("repe_emotions",)),
}
Rows = list[dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Read the data, pair the texts, write the files; 0 when done, 2 on bad input with nothing written."""
    parser = argparse.ArgumentParser(
        prog="prepare_public_data",
        usage=argparse.SUPPRESS,
        description="Turn public labelled texts into length-matched stimuli files (JSON Lines).",
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the public data")
    parser.add_argument("--out", type=Path, default=Path("runs/public-stimuli"), help="folder to write to")
    parser.add_argument("--scenarios", type=_at_least(1), default=200, help="scenarios wanted per file")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="which texts are drawn")
    parser.add_argument(
        "--read", choices=("mean", "last"), default="mean", help="mean over the whole text, or its last token"
    )
    options = parser.parse_args(argv)
    try:
        files, sources = {}, f"Made by scripts/prepare_public_data.py, seed {options.seed}.\n"
        for folder, (licence, formats) in SOURCES.items():
            origin = read_origin(options.data / folder / "SOURCE.txt")
            for format in formats:
                found = read_public(
                    options.data / folder, format, scenarios=options.scenarios, seed=options.seed, read=options.read
                )  # fmt: skip
                files |= found
                for name, rows in found.items():
                    what = f"\n{name}.jsonl\n  source: {origin}\n  licence: {licence}\n"
                    sources += what + f"  {describe_lengths(rows)}\n"
        for name, rows in files.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_file(options.out / f"{name}.jsonl", "".join(lines).encode())
        write_file(options.out / "SOURCES.txt", sources.encode())
    except InputError as error:
        print(f"prepare_public_data: {error}", file=sys.stderr)
        return 2
    for name, rows in files.items():
        short = len({row["scenario"] for row in rows}) < options.scenarios
        note = f"; {options.scenarios} wanted, no more could be matched" if short else ""
        print(f"{name}: {describe_lengths(rows)}{note}")
    return 0


def read_origin(path: Path) -> str:
    """First line of a folder's `SOURCE.txt`: address and commit."""
    lines = read_text(path).strip().splitlines()
    if not lines:
        raise bad_data(path, 1, "nothing", "the address and commit of the data")
    return lines[0].strip()


def describe_lengths(rows: Rows) -> str:
    """How well the lengths match: exact for the file as it is, hence without an interval.

    The sign is 1 minus 0; over six emotions it is later minus earlier and only the absolute value says much.
    """
    scenarios: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        scenarios[row["scenario"]].append(count_words(row["text"]))
    gaps = [b - a for counts in scenarios.values() for a, b in itertools.combinations(counts, 2)]
    return (
        f"n = {len(scenarios)} scenarios, mean paired length difference {np.mean(gaps):+.3f}, absolute "
        f"{np.mean(np.abs(gaps)):.3f} words"
    )


def _at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from {lowest}; give one")
        return int(text)

    return number


if __name__ == "__main__":
    sys.exit(main())
