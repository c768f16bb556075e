"""The verbs of a study on a GPU and on the CPU, beside one another. Skipped where torch sees no CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import empathy_probes as ep

DEVICE = "cuda"
CLOSE = 2e-3  # of a column's largest value; float32 kernels of two devices add up in another order

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no CUDA device: this compares one with the CPU"
)


def assert_same(here: pd.DataFrame, there: pd.DataFrame) -> None:
    """Both tables say the same: words exactly, numbers closely."""
    assert list(here.columns) == list(there.columns)
    assert len(here) == len(there)
    for column in here.columns.difference(["device"]):
        first, second = here[column].reset_index(drop=True), there[column].reset_index(drop=True)
        if pd.api.types.is_float_dtype(first):
            scale = max([1.0, *first[np.isfinite(first)].abs()])
            np.testing.assert_allclose(second, first, rtol=0, atol=CLOSE * scale, err_msg=column)
        else:
            pd.testing.assert_series_equal(first, second, check_names=False)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pairs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """One planted pair on the CPU and on the GPU."""
    name = {"llama": "planted-valence", "gpt2": "gpt2-unread"}[request.param]
    folder = ep.write_phantom(name, tmp_path_factory.mktemp("pair"))
    on = [ep.load_pair(folder / "base", folder / "aligned", device=device) for device in ("cpu", DEVICE)]
    assert [str(pair.base.device.type) for pair in on] == ["cpu", DEVICE]
    return on[0], on[1]


def few() -> Any:
    """A planted concept in a few texts, for what runs the model hundreds of times per text."""
    return ep.load_phantom_concepts(6)[0][0]


VERBS: dict[str, Callable[[Any, Any, Any, str], Any]] = {
    "attenuation": lambda p, t, c, s: ep.measure_attenuation(p, t, c, template="raw", store=s),
    "coupling": lambda p, t, c, s: ep.measure_coupling(p, t, c, template="raw", store=s),
    "stitching": lambda p, t, c, s: ep.stitch(p, t, template="raw", store=s),
    "transplants": lambda p, t, c, s: ep.transplant(p, t, template="raw", store=s),
    "patching": lambda p, t, c, s: ep.patch(p.aligned, few()),
    "estimated patching": lambda p, t, c, s: ep.attribution_patch(p.aligned, few(), sample=4),
    "dose response": lambda p, t, c, s: ep.dose_response(
        p, t, template="raw", layers=[3], doses=(-0.1, 0.0, 0.1, 0.5), store=s
    ),
    "attribution": lambda p, t, c, s: ep.attribute(p, t, template="raw", store=s),
    "ablation": lambda p, t, c, s: ep.ablate(p.base, t[0], store=s),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_gpu_measures_what_the_cpu_measures(verb: str, pairs: tuple[Any, Any]) -> None:
    targets, controls = ep.load_phantom_concepts(40)
    here, there = (
        VERBS[verb](pair, targets[:1], controls, f"memory://cuda-{verb}-{pair.base.name}-{i}").to_frame()
        for i, pair in enumerate(pairs)
    )
    assert_same(here, there)


def test_a_vector_steers_on_a_gpu_as_on_the_cpu(pairs: tuple[Any, Any]) -> None:
    targets, controls = ep.load_phantom_concepts(40)
    finding = ep.measure_attenuation(
        pairs[0], targets[:1], controls, template="raw", store="memory://cuda-vector"
    )
    vector = finding.vector("base", layer=3)
    said = []
    for pair in pairs:
        plain = pair.base.generate("We met at the office.")
        with vector.apply(pair.base, dose=0.5):
            steered = pair.base.generate("We met at the office.")
        assert pair.base.generate("We met at the office.") == plain
        said.append((plain, steered))
    assert said[0] == said[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_a_gpu_finds_what_float32_finds(dtype: str, tmp_path: Path) -> None:
    folder = ep.write_phantom("planted-valence", tmp_path)
    targets, _ = ep.load_phantom_concepts(60)
    here, there = (
        ep.measure_attenuation(
            ep.load_pair(folder / "base", folder / "aligned", dtype=each, device=device),
            targets[0], template="raw", store=f"memory://cuda-half-{each}",
        ).to_frame()["attenuation"]
        for each, device in (("float32", "cpu"), (dtype, DEVICE))
    )  # fmt: skip
    np.testing.assert_allclose(there, here, rtol=0, atol=0.03)


def test_a_checkup_passes_on_a_gpu(tmp_path: Path) -> None:
    folder = ep.write_phantom("gpt2-unread", tmp_path)
    here, there = (ep.examine(folder / "base", device=device).to_frame() for device in ("cpu", DEVICE))
    pd.testing.assert_frame_equal(here[["check", "verdict"]], there[["check", "verdict"]])
