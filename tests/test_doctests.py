"""The examples of the docstrings give what they say."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

import empathy_probes

PACKAGE = Path(empathy_probes.__file__).parent
SOURCES = {path.stem: path.read_text(encoding="utf8") for path in sorted(PACKAGE.glob("*.py"))}
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if ">>> " in source])
def test_the_examples_of_a_module_give_what_they_say(name: str) -> None:
    module = importlib.import_module(f"empathy_probes.{name}")
    parser, runner, said = doctest.DocTestParser(), doctest.DocTestRunner(), []
    # From the source: functions whose annotations are checked are wrapped, and doctest's own search passes them over.
    for node in ast.walk(ast.parse(SOURCES[name])):
        if isinstance(node, DOCUMENTED):
            of = getattr(node, "name", name)
            examples = parser.get_doctest(ast.get_docstring(node) or "", vars(module).copy(), of, name, None)
            runner.run(examples, out=said.append)
    assert runner.failures == 0, "".join(said)
    assert runner.tries == SOURCES[name].count(">>> ") > 0
