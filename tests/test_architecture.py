"""The floors: a module imports only from floors below its own, and the package stays light to import."""

from __future__ import annotations

import ast
import builtins
import dis
import importlib
import inspect
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import empathy_probes

PACKAGE = Path(empathy_probes.__file__).parent

# The newcomer's map: everything on a line may import from the lines above it.
FLOORS = (
    {"errors"},
    {"arguments"},
    {
        "stats",
        "auroc",
        "sites",
        "interventions",
        "store",
        "batches",
        "roles",
        "lineages",
        "pairing",
        "corpus_files",
    },
    {"goemotions"},
    {"public_data"},
    {"kernels", "jackknife", "stimuli", "activations", "grammar", "results", "weights"},
    {"deviations", "auroc_intervals"},
    {"keeps", "strengths"},
    {"prompts", "probes", "checkpoints", "coding", "concepts", "contrasts", "hooks", "surgery", "alignment"},
    {"models", "controls", "geometry", "nulls", "audit", "leaving_out"},
    {"bits"},
    {"pairs", "extraction", "decisions", "measurements", "lens", "selfchecks", "vectors", "audit_tables"},
    {"design", "planting", "redraws", "rows"},
    {"directions", "gains", "readouts", "writes"},
    {"crossings", "textpairs"},
    {"sweeps"},
    {
        "ablation",
        "attenuation",
        "attribution",
        "doctor",
        "expression",
        "gradients",
        "interchange",
        "patching",
        "steering",
        "stitching",
        "transplants",
        "trends",
    },
    {"metrics", "secondary", "verdicts", "stages", "phantoms"},
    {"scorecard"},
    {"attacks"},
    {"ledger", "specs", "summaries"},
    {"rehearsals"},
    {"study", "populations"},
    {"calibration"},
    {"wording", "drawing"},
    {
        "tables",
        "coupling_plots",
        "stitching_plots",
        "attribution_plots",
        "steering_plots",
        "patching_plots",
        "trend_plots",
    },
    {"plots", "pages"},
    {"effects"},
    {"report"},
    {"scorepage"},
    {"cli"},
    {"__main__"},
)
# Results show themselves: figures and pages are above whatever is measured. A model is checked by running it.
LATE = {("scorecard", "scorepage"), ("results", "plots"), ("results", "report"), ("models", "selfchecks")}


def floor_of(module: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if module in names)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "empathy_probes":
            found |= {alias.name for alias in node.names if (PACKAGE / f"{alias.name}.py").is_file()}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("empathy_probes."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("empathy_probes.")}
    return found


MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def test_every_module_stands_on_exactly_one_floor() -> None:
    placed = [name for floor in FLOORS for name in sorted(floor)]
    assert sorted(placed) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_floors_below(module: str) -> None:
    for other in imports(PACKAGE / f"{module}.py"):
        assert (module, other) in LATE or floor_of(other) < floor_of(module), f"{module} imports {other}"


@pytest.mark.parametrize("module", MODULES)
def test_models_alone_know_transformer_lens_and_hooks_and_checkpoints_transformers(module: str) -> None:
    known = {"models": {"transformer_lens"}, "checkpoints": {"transformers", "peft"}}.get(module, set())
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf8")
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
    assert roots & {"transformers", "transformer_lens", "peft"} == known
    assert module == "models" or ("register_forward" not in source and "fwd_hooks" not in source)


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def functions(owner: Any, module: str) -> Iterator[Any]:
    """All functions and classes that a module (or one of its classes) defines."""
    for member in vars(owner).values():
        found = inspect.unwrap(
            member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        )
        if getattr(found, "__module__", None) != module or not isinstance(found, (type, types.FunctionType)):
            continue
        yield found
        if isinstance(found, type):
            yield from functions(found, module)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__main__"])
def test_every_name_exists(module: str) -> None:
    # Linter and type checker take the axes of a shape for names, and so cannot be asked about names at all.
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf8")
    loaded = importlib.import_module(f"empathy_probes.{module}")
    known = {*vars(loaded), *vars(builtins)}
    for code in list(codes(compile(source, module, "exec")))[1:]:
        used = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
        assert used <= known, f"{module}.{code.co_qualname}"
    for_types = [
        alias.asname or alias.name
        for block in ast.walk(ast.parse(source))
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for line in block.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    ]
    for found in functions(loaded, loaded.__name__):
        typing.get_type_hints(found, localns=dict.fromkeys(for_types, Any))


def test_every_public_name_resolves() -> None:
    for name in empathy_probes.__all__:
        assert getattr(empathy_probes, name) is not None


def test_no_public_function_has_the_name_of_a_module() -> None:
    assert not set(empathy_probes.__all__) & set(MODULES)


@pytest.mark.parametrize("argv", [[], ["--help"], ["compare", "--help"], ["--version"]])
def test_import_and_help_load_neither_torch_nor_transformer_lens(argv: list[str]) -> None:
    code = (
        "import sys, contextlib, io, empathy_probes, empathy_probes.cli as cli\n"
        f"argv = {argv!r}\n"
        "if argv:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        cli.main(argv)\n"
        "print(sorted({'torch', 'transformers', 'transformer_lens', 'pandas', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
