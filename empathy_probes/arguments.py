"""What the command line takes: every command with its arguments, and nothing about what they do."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from empathy_probes import __version__
from empathy_probes.errors import InputError

# Names given separated by commas, in one option or several.
MANY: dict[str, Any] = {"action": "append", "default": []}


class _Parser(argparse.ArgumentParser):
    """argparse without the usage block: an error is one sentence."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; run '{self.prog} --help' for what is expected")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `command` of what it parses is the command's name."""
    parser = _Parser(
        prog="empathy-probes",
        description="Where alignment tuning attenuates affect and relational stance inside a language model.",
    )
    parser.add_argument("--version", action="version", version=f"empathy-probes {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no warnings")
    # The same after the command, where they say nothing unless they are given.
    anywhere = _Parser(add_help=False)
    anywhere.add_argument(
        "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    anywhere.add_argument(
        "-q", "--quiet", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    _add_demo(commands, anywhere)
    _add_compare(commands, anywhere)
    _add_run(commands, anywhere)
    _add_report(commands, anywhere)
    _add_concepts(commands, anywhere)
    _add_lineages(commands, anywhere)
    _add_phantom(commands, anywhere)
    _add_doctor(commands, anywhere)
    _add_calibrate(commands, anywhere)
    _add_vector(commands, anywhere)
    _add_store(commands, anywhere)
    return parser


def _add_demo(commands: Any, anywhere: argparse.ArgumentParser) -> None:
    demo = commands.add_parser(
        "demo", parents=[anywhere], help="a study of a shipped pair with a planted difference, offline"
    )
    demo.add_argument("--out", default="runs/demo", help="output folder (default %(default)s)")
    demo.add_argument("--store", help="activation store: a folder or any fsspec URL")
    demo.add_argument("--json", action="store_true", help="print the headlines as JSON")
    demo.set_defaults(command="demo")


def _add_run(commands: Any, anywhere: argparse.ArgumentParser) -> None:
    run = commands.add_parser("run", parents=[anywhere], help="a full study from a TOML file")
    run.add_argument("study", metavar="STUDY.toml")
    run.add_argument("--out", help="output folder; wins over the file's")
    run.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    run.add_argument("--json", action="store_true", help="print the headlines (or the plan) as JSON")
    run.set_defaults(command="run")


def _add_report(commands: Any, anywhere: argparse.ArgumentParser) -> None:
    report = commands.add_parser("report", parents=[anywhere], help="rebuild report.html of a saved study")
    report.add_argument("folder", metavar="DIR")
    report.set_defaults(command="report")


def _add_concepts(commands: Any, anywhere: argparse.ArgumentParser) -> None:
    concepts = commands.add_parser(
        "concepts", parents=[anywhere], help="list the shipped concepts, or audit texts"
    )
    concepts.add_argument(
        "action", nargs="?", choices=("audit",), metavar="audit", help="audit instead of listing; exit 3 if a check fails"
    )  # fmt: skip
    concepts.add_argument(
        "names",
        nargs="*",
        metavar="NAME|FILE",
        help="shipped concepts or stimuli files (default: all shipped)",
    )
    concepts.add_argument("--json", action="store_true", help="print rows (or audits) as JSON")
    concepts.add_argument("--markdown", action="store_true", help="print the audit as docs/concepts.md")
    concepts.set_defaults(command="concepts")


def _add_lineages(commands: Any, anywhere: argparse.ArgumentParser) -> None:
    lineages = commands.add_parser(
        "lineages", parents=[anywhere], help="list known chains of checkpoints, from base to aligned"
    )
    lineages.add_argument("--json", action="store_true", help="print rows as JSON")
    lineages.set_defaults(command="lineages")


def _add_doctor(commands: Any, anywhere: argparse.ArgumentParser) -> None:
    doctor = commands.add_parser(
        "doctor",
        parents=[anywhere],
        help="try on a checkpoint what measurements rest on: one verdict line each",
    )
    doctor.add_argument("model", metavar="MODEL", help="hub id, ID@REVISION, or folder")
    doctor.add_argument("--dtype", help="default: the checkpoint's")
    doctor.add_argument("--device", help="default: the best there is")
    doctor.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the checkpoint brings along"
    )
    doctor.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    doctor.set_defaults(command="doctor")


def _add_calibrate(commands: Any, anywhere: argparse.ArgumentParser) -> None:
    calibrate = commands.add_parser(
        "calibrate", parents=[anywhere], help="measure the instrument on pairs of known truth: its scorecard"
    )
    calibrate.add_argument(
        "--quick", action="store_true", help="a few twins of the shipped bases: minutes, not hours"
    )
    calibrate.add_argument("--out", default="runs/scorecard", help="output folder (default %(default)s)")
    calibrate.add_argument(
        "--phantoms", metavar="DIR", help="more bases, as scripts/build_phantoms.py writes them"
    )
    calibrate.add_argument("--bases", nargs="+", metavar="BASE", help="only these, such as llama-0 gpt2-1")
    calibrate.add_argument("--redraws", type=int, default=1000, help="per cell (default %(default)s)")
    calibrate.add_argument("--workers", type=int, help="processes (default: one per core)")
    calibrate.add_argument("--seed", type=int, default=0)
    calibrate.add_argument("--json", action="store_true", help="print what was missed as JSON")
    calibrate.set_defaults(command="calibrate")


def _add_store(commands: Any, anywhere: argparse.ArgumentParser) -> None:
    store = commands.add_parser(
        "store", parents=[anywhere], help="size of the activation store, or emptying it"
    )
    store.add_argument("action", nargs="?", choices=("info", "clear"), default="info")
    store.add_argument("--store", help="activation store: a folder or any fsspec URL")
    store.add_argument("--json", action="store_true", help="print as JSON")
    store.set_defaults(command="store")


def _add_compare(commands: Any, anywhere: argparse.ArgumentParser) -> None:
    compare = commands.add_parser(
        "compare",
        parents=[anywhere],
        help="attenuation between a base and an aligned checkpoint",
        description="Hub ids, ID@REVISION, or folders.",
    )
    compare.add_argument("base", metavar="BASE")
    compare.add_argument("aligned", metavar="ALIGNED", nargs="?", help="may be left out with --adapter")
    compare.add_argument(
        "--concepts", **MANY, help="shipped concepts, comma-separated (default: all targets)"
    )
    compare.add_argument(
        "--stimuli",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="stimuli files of your own, or public corpora as FORMAT:PATH",
    )
    compare.add_argument("--controls", **MANY, help="names, files or FORMAT:PATH, comma-separated, or none")
    compare.add_argument(
        "--template", default="both", choices=("raw", "shared", "own", "both"), help="default %(default)s"
    )
    compare.add_argument("--sites", **MANY, help="comma-separated, such as resid_post,mlp_out")
    compare.add_argument("--layers", default="all", help="all, 0,5,11 or 2-5 (block indices)")
    compare.add_argument("--stages", **MANY, help="comma-separated: encode,use,express (default encode)")
    compare.add_argument("--readout", metavar="FILE", help="JSON: what is asked, for all or per concept")
    compare.add_argument(
        "--margin",
        type=float,
        default=0.10,
        help="δ: the change that counts, and within which a plain one is equivalent (default %(default)s); one relative to controls is within .20",
    )
    compare.add_argument("--draws", type=int, default=1000, help="multiplier draws (default %(default)s)")
    compare.add_argument("--seed", type=int, default=0)
    compare.add_argument("--dtype", help="for both models (default: the checkpoint's)")
    compare.add_argument("--device", help="for both models (default: the best there is)")
    compare.add_argument("--adapter", metavar="DIR", help="LoRA/PEFT adapter that makes the aligned side")
    compare.add_argument("--allow-identical", action="store_true", help="accept two equal checkpoints")
    compare.add_argument(
        "--trust-remote-code", action="store_true", help="run code that a checkpoint brings along"
    )
    compare.add_argument("--store", metavar="URL", help="activation store: a folder or any fsspec URL")
    compare.add_argument("--out", metavar="DIR", help="default runs/<BASE>-vs-<ALIGNED>")
    compare.add_argument("--dry-run", action="store_true", help="print the plan, memory and time, and stop")
    compare.add_argument("--json", action="store_true", help="print the headlines (or the plan) as JSON")
    compare.set_defaults(command="compare")


def _add_phantom(commands: Any, anywhere: argparse.ArgumentParser) -> None:
    phantom = commands.add_parser(
        "phantom",
        parents=[anywhere],
        help="a twin of a checkpoint with a planted difference, to try the instrument on",
        description="Writes DIR/base, DIR/aligned and DIR/truth.json; compare the two as you would any pair.",
    )
    phantom.add_argument("model", metavar="MODEL", help="hub id, or folder")
    phantom.add_argument("--family", required=True, help="planted, erased, local, rotated, rescaled, …")
    phantom.add_argument("--concept", help="a shipped concept")
    phantom.add_argument("--stimuli", metavar="FILE", help="or stimuli of your own")
    phantom.add_argument("--layer", type=int, help="0-based block (default: the middle one)")
    phantom.add_argument("--through", type=int, help="last block of scaled_writes (default: the last one)")
    phantom.add_argument("--keep", type=float, help="what is left of it (default 0.25)")
    phantom.add_argument(
        "--others", **MANY, metavar="NAMES",
        help="shipped concepts to leave alone and to measure, comma-separated, or none (default: all; fewer are sooner done)",
    )  # fmt: skip
    phantom.add_argument("--seed", type=int, default=0)
    phantom.add_argument("--out", required=True, metavar="DIR", help="new or empty folder")
    phantom.add_argument("--json", action="store_true", help="print the truth as JSON")
    phantom.set_defaults(command="phantom")


def _add_vector(commands: Any, anywhere: argparse.ArgumentParser) -> None:
    vector = commands.add_parser(
        "vector", parents=[anywhere], help="steering vectors in other tools' formats"
    )
    actions = vector.add_subparsers(metavar="ACTION", required=True, parser_class=_Parser)
    convert = actions.add_parser(
        "convert",
        parents=[anywhere],
        help="from one format to another",
        description="Formats: empathy_probes (.safetensors), gguf, persona_vectors (.pt), caa (a folder of vec_layer_N.pt), "
        "numpy (.npz or a folder of .npy), neuronpedia (.json). Layers are 0-based blocks.",
    )
    convert.add_argument("source", metavar="IN", help="file or folder")
    convert.add_argument("target", metavar="OUT", help="file, or folder where a format has a file per layer")
    convert.add_argument("--from", dest="source_format", metavar="FORMAT", help="told by the name by default")
    convert.add_argument("--to", dest="target_format", metavar="FORMAT", help="told by the name by default")
    convert.add_argument(
        "--layer", type=int, help="0-based block: the only one to keep, or where a single vector belongs"
    )
    convert.add_argument("--json", action="store_true", help="print what was written as JSON")
    convert.set_defaults(command="convert")
