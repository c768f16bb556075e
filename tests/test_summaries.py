"""Summaries of mechanisms and dimensions: the mean of their concepts, with what concepts differ by in its interval."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import rows, tiny_llama, word_tokenizer

from empathy_probes.attenuation import measure_attenuation
from empathy_probes.concepts import Concept
from empathy_probes.contrasts import Contrast, compare
from empathy_probes.models import load_model
from empathy_probes.pairs import make_pair
from empathy_probes.report import render_report
from empathy_probes.stimuli import stimuli_from_rows
from empathy_probes.study import Study
from empathy_probes.summaries import SUMMARY_COLUMNS, _mean, _row, summary_frame

NEUTRAL = [row["text"] for row in rows(40, 77, "neutral")]


def measured(
    keep: float,
    generator: np.random.Generator,
    name: str,
    layers: tuple[int, ...] = (0, 1, 2),
    loud: float = 1.0,
) -> Contrast:
    """A concept whose differences are `loud` along one axis (`keep` of it in the aligned model), with noise both models share."""
    n, d = 60, 20
    noise = generator.normal(0, 0.3, size=(n, len(layers), d))
    differences = np.stack([noise, keep * noise + generator.normal(0, 0.05, size=noise.shape)])
    differences[0, :, :, 0] += loud
    differences[1, :, :, 0] += keep * loud
    kernels = np.einsum("mnld,mkld->mlnk", differences, differences)
    return compare(name, [f"{name}-{i}" for i in range(n)], kernels, layers)


def group(keeps: Any, generator: np.random.Generator, name: str) -> list[Contrast]:
    return [measured(keep, generator, f"{name}-{i}") for i, keep in enumerate(keeps)]


def test_specific_holds_the_groups_own_mean_in_about_95_percent_of_samples() -> None:
    held = 0
    for seed in range(150):
        generator = np.random.default_rng(seed)
        # Concepts of a group differ around keep ½, controls around .9: what is asked for is the ratio of the two centres.
        own = group(0.5 * np.exp(generator.normal(0, 0.15, 5)), generator, "t")
        controls = group(0.9 * np.exp(generator.normal(0, 0.1, 8)), generator, "c")
        row = _row(own, _mean(controls))
        held += bool(row["specific_lower"] <= 1 - 0.5 / 0.9 <= row["specific_upper"])
    assert 0.91 <= held / 150 <= 0.99  # ± 2.3 binomial standard errors of .95


@pytest.mark.parametrize("together", [True, False])
def test_concepts_of_the_same_scenarios_count_what_they_share_once(together: bool) -> None:
    """Three copies of one concept are no larger a sample than one, and copies as controls differ from them in nothing."""
    generator = np.random.default_rng(5)
    own = group([0.5, 0.5, 0.5], generator, "t")
    keys = own[0].keys
    copies = [
        replace(own[0], name=f"copy {i}", keys=keys if together else tuple(f"{i}{k}" for k in keys))
        for i in range(3)
    ]
    single = (own[0].influence.mean(0) ** 2).sum() / (own[0].n * (own[0].n - 1))
    found = _mean(copies).variance / single
    assert found == pytest.approx(1 if together else 1 / 3, rel=0.1)
    controls = [
        replace(own[0], name=f"control {i}", keys=keys if together else tuple(f"c{i}{k}" for k in keys))
        for i in range(6)
    ]
    row = _row(copies, _mean(controls))
    assert row["specific"] == pytest.approx(0, abs=1e-12)
    width = row["specific_upper"] - row["specific_lower"]
    # Widths on the scale of log keep: one is of a keep of 1, the other of ½.
    assert (width < 0.3 * (row["attenuation_upper"] - row["attenuation_lower"]) / 0.5) == together


def test_a_concept_that_no_block_carries_is_counted_and_left_out() -> None:
    generator = np.random.default_rng(0)
    own = group([0.5, 0.5, 0.5], generator, "t")
    blank = measured(1.0, np.random.default_rng(1), "s", loud=0.0)
    assert set(blank.form) == {"blank"}
    row = _row([*own, blank], _mean(group([1.0] * 8, generator, "c")))
    assert (row["n_concepts"], row["n_used"]) == (4, 3) and row["attenuation"] == pytest.approx(0.5, abs=0.05)
    alone = _row([blank], _mean([]))
    assert np.isnan(alone["attenuation"]) and alone["flags"] == "base_not_detected;no_controls"


def test_what_is_lost_at_some_blocks_is_not_averaged_over_those_that_survived() -> None:
    """A block before the edit keeps everything; with the others left out, the group would have lost nothing."""
    generator = np.random.default_rng(2)
    d = generator.normal(0, 0.3, size=(2, 60, 3, 20))
    d[:, :, 0] = d[0, :, 0]
    d[0, ..., 0] += 1
    d[1, :, 0, 0] += 1
    found = []
    for i, left in enumerate((0.0, 0.0, 0.0, 0.3)):
        moved = d.copy()
        moved[1, :, 1:, 0] += left
        kernels = np.einsum("mnld,mkld->mlnk", moved, moved)
        found.append(compare(f"t-{i}", [f"t-{i}-{j}" for j in range(60)], kernels, (0, 1, 2)))
    assert found[0].form == ("identical", "fieller", "fieller") and np.isnan(found[0].theta[1:]).all()
    row = _row(found[:3], _mean([]))
    assert np.isnan(row["attenuation"]) and row["attenuation_upper"] == 1 and "at_least" in row["flags"]
    assert row["attenuation_lower"] > 0.3
    alone = _row(found[3:] * 2, _mean([]))
    assert 0.4 < alone["attenuation"] < 0.7 and "at_least" not in alone["flags"]
    assert "control_lost" in _row(found[3:], _mean(found[:3]))["flags"]


def test_one_concept_has_a_mean_and_no_interval_and_few_controls_no_specific() -> None:
    generator = np.random.default_rng(0)
    row = _row(group([0.5], generator, "t"), _mean(group([1.0] * 3, generator, "c")))
    assert np.isnan(row["attenuation_lower"]) and row["attenuation"] == pytest.approx(0.5, abs=0.05)
    assert "specific" not in row and row["flags"] == "single_concept;few_controls"


def test_the_layer_before_the_first_block_does_not_count() -> None:
    generator = np.random.default_rng(0)
    one = measured(0.5, generator, "t", layers=(-1, 0, 1))
    assert _mean([one]).value == pytest.approx(one.theta[1:].mean())


def test_every_mechanism_and_dimension_of_a_finding_has_a_row(tmp_path: Path) -> None:
    pair = make_pair(*(load_model((tiny_llama(seed), word_tokenizer()), device="cpu") for seed in (0, 1)))
    described = {"one": ("sentiment_attenuation", "cognitive"), "two": ("sentiment_attenuation", "relational"),
                 "three": ("conflict_avoidance", "relational")}  # fmt: skip
    targets = [
        Concept(name, "target", *where, "user", "", stimuli_from_rows(rows(30, seed, name), name))
        for seed, (name, where) in enumerate(described.items())
    ]
    finding = measure_attenuation(pair, targets, template="raw", neutral=NEUTRAL, store=str(tmp_path))
    frame = summary_frame(finding)
    assert list(frame.columns) == SUMMARY_COLUMNS
    assert frame[["kind", "group", "n_concepts"]].to_numpy().tolist() == [
        ["mechanism", "conflict_avoidance", 1], ["mechanism", "sentiment_attenuation", 2], ["dimension", "cognitive", 1],
        ["dimension", "relational", 2],
    ]  # fmt: skip
    study = Study("summaries", (finding,))
    assert "By mechanism and dimension" in render_report(study)
