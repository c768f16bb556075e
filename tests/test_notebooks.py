"""The notebooks run from the first cell to the last, and show figures, not tracebacks."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

# What the notebook is about, found and printed.
FOUND = {
    "01_attenuation": "valence    Attenuated by block 3",
    "02_patching": "planted at block 3",
    "03_steering": "nats per dose, n = 40",
    "04_attribution": "L3 MLP        base  0.013   aligned -0.392",
}
NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_cells_only_import_call_and_narrate(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMPATHY_PROBES_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # of the kernel's own libraries
    notebook = nbformat.read(path, as_version=4)
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert "def " not in source
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("text/html" in out.get("data", {}) for out in outputs)
    printed = "".join(out.get("text", "") for out in outputs)
    assert FOUND[path.stem] in printed
