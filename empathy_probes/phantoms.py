"""Pairs of small models whose difference is known because it was planted.

A family ships as one base checkpoint and, per twin, only the tensors that differ; `write_phantom` makes both
ordinary checkpoint folders out of them. The truth was measured on fresh scenarios when the twin was made
(`scripts/build_phantoms.py`), not taken from what was intended.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from empathy_probes.concepts import Concept
from empathy_probes.errors import InputError
from empathy_probes.grammar import CONTROLS, TARGETS, stimuli_rows
from empathy_probes.models import load_model
from empathy_probes.pairs import ModelPair, make_pair
from empathy_probes.stimuli import stimuli_from_rows


def _family() -> Path:
    return Path(str(files("empathy_probes"))) / "data" / "phantoms" / "llama"


def list_phantoms() -> tuple[str, ...]:
    """Names of the shipped twins."""
    return tuple(sorted(path.name.removesuffix(".truth.json") for path in _family().glob("*.truth.json")))


def phantom_truth(name: str) -> dict[str, Any]:
    """What was planted in a twin, as measured: the contract's `truth.json`.

    Raises:
        InputError: there is no twin of that name.
    """
    if name not in list_phantoms():
        raise InputError(
            f"unknown phantom '{name}': expected one of {', '.join(list_phantoms())}; choose one of these"
        )
    return json.loads((_family() / f"{name}.truth.json").read_text(encoding="utf8"))


def write_phantom(name: str, out: str | Path) -> Path:
    """Write `out/base`, `out/aligned` and `out/truth.json`: checkpoints any loader opens."""
    truth, out = phantom_truth(name), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for side in ("base", "aligned"):
        shutil.copytree(_family() / "base", out / side, dirs_exist_ok=True)
    weights = out / "aligned" / "model.safetensors"
    tensors = load_file(weights) | load_file(_family() / f"{name}.safetensors")
    save_file(tensors, weights, metadata={"format": "pt"})
    (out / "truth.json").write_text(json.dumps(truth, indent=1), encoding="utf8")
    return out


def load_phantom(name: str) -> ModelPair:
    """Load a shipped base and its twin as a pair.

    Raises:
        InputError: there is no twin of that name.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = write_phantom(name, folder)
        base = load_model(out / "base", name="phantom base", device="cpu")
        aligned = load_model(out / "aligned", name=f"phantom {name}", device="cpu")
    return make_pair(base, aligned)


def load_phantom_concepts(
    n_scenarios: int = 100, seed: int = 0
) -> tuple[tuple[Concept, ...], tuple[Concept, ...]]:
    """Targets and controls of the grammar that phantoms were trained on, from fresh scenarios.

    Args:
        n_scenarios: per concept.
        seed: of the scenarios; another seed gives other scenarios.
    """

    def concept(name: str, role: Any) -> Concept:
        stimuli = stimuli_from_rows(stimuli_rows(name, n_scenarios, seed), name)
        return Concept(name, role, "", "", "user", f"{name} in the phantom grammar", stimuli)

    return tuple(concept(n, "target") for n in TARGETS), tuple(concept(n, "control") for n in CONTROLS)
