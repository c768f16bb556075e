"""Patching: nothing into itself, everything through the last state, and the same numbers as TransformerLens's helpers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import stimuli

from empathy_probes.concepts import Concept
from empathy_probes.models import Model
from empathy_probes.patching import patch
from empathy_probes.readouts import Asked
from empathy_probes.sites import Site
from empathy_probes.stimuli import ReadoutSpec, stimuli_from_rows
from empathy_probes.textpairs import pair_texts

ANSWERS = ReadoutSpec("answers", (" sun", " day"), (" night", " rain"))
CONTINUATIONS = ReadoutSpec("continuations", (" the sun was very large",), (" rain",))
# Float32 through four small blocks in batches of another size, of readouts of a few nats.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def concept_of(n: int = 6, readout: ReadoutSpec = ANSWERS) -> Concept:
    from empathy_probes.readouts import with_readout

    return Concept("demo", "target", "", "", "user", "", with_readout(stimuli(n), readout))


def equal_lengths(n: int = 4, length: int = 7) -> Asked:
    """Prompts of one length as token ids, clean and corrupted in turn, with one answer token a side."""
    generator = np.random.default_rng(0)
    prompts = [(1, *map(int, generator.integers(7, 50, length))) for _ in range(2 * n)]
    every = range(2 * n)
    return Asked(
        "demo", "answers", tuple(f"{i}" for i in every), tuple(prompts), tuple((length,) for _ in every),
        tuple((20,) for _ in every), tuple((30,) for _ in every),
    )  # fmt: skip


def paired(asked: Asked) -> Any:
    rows = [
        {"id": f"{i}", "scenario": f"{i // 2}", "text": f"{i}", "label": 1 - i % 2}
        for i in range(len(asked.items))
    ]
    return pair_texts(asked, stimuli_from_rows(rows, "demo"))


@pytest.mark.parametrize("readout", [ANSWERS, CONTINUATIONS], ids=["answers", "continuations"])
def test_the_last_state_at_the_last_token_is_the_whole_effect_where_the_answer_follows_it(
    model: Model, readout: ReadoutSpec
) -> None:
    concept = concept_of(readout=readout)
    last = Site(model.n_layers - 1)
    found = patch(model, concept, sites=[last], positions=["last", "before"]).concepts[0]
    recovered = found.moved[:, 0].mean(-1) / found.effect.mean()
    if readout is ANSWERS:
        np.testing.assert_allclose(found.moved[:, 0], np.stack([found.effect] * 2), **CLOSE)
    else:  # the first token of each continuation follows the prompt's last state, the others do not
        assert (np.abs(recovered - 1) > 1e-3).all()
    # What both texts share at their start cannot know what comes later.
    np.testing.assert_allclose(found.moved[:, 1], 0, atol=1e-4)
