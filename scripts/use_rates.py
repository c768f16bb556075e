"""How often use and express say of a planted pair what was planted: rates over redrawn scenarios, with binomial intervals.

    python scripts/use_rates.py --out docs/scorecard/use.csv

Each pair is measured once on a population of scenarios; then samples of n of them are judged as a study judges them: where
stitching places the loss, what became of coupling against eight controls, and what became of the gain.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from empathy_probes.design import Settings, design_study
from empathy_probes.expression import Coupling, couple
from empathy_probes.gains import Gain
from empathy_probes.grammar import CONTROLS, neutral_texts
from empathy_probes.phantoms import load_phantom_concepts
from empathy_probes.planting import list_bases, open_twin
from empathy_probes.readouts import with_readout
from empathy_probes.stats import binomial_interval
from empathy_probes.steering import dose_response_design
from empathy_probes.stitching import Stitching, stitch_design
from empathy_probes.store import open_store
from empathy_probes.verdicts import Used, use_word

LAYER, N_CONTROLS = 3, 8
# Family → what should be said of valence: use, coupling, gain.
EXPECTED = {
    "identical": ("kept", "equivalent", "equivalent"),
    "rotated": ("kept", "equivalent", "equivalent"),
    "erased": (f"lost at {LAYER}", "attenuated", None),
    "planted": (f"lost at {LAYER}", "attenuated", None),
    "unread": (f"lost at {LAYER}", "attenuated", "attenuated"),
    "unsaid": ("lost at head", "attenuated", "attenuated"),
}


def measured(base: str, family: str, population: int) -> tuple[Stitching, Coupling, Gain]:
    """Everything that is judged, on the whole population."""
    pair = open_twin(list_bases()[base], family, "valence", None if family == "unsaid" else LAYER, 0.25)
    targets, controls = load_phantom_concepts(population, seed=7, names=("valence", *CONTROLS[:N_CONTROLS]))
    design = design_study(
        pair, targets, controls, template="raw", neutral=neutral_texts(320), layers=(1, LAYER)
    )
    store, settings = open_store(tempfile.mkdtemp()), Settings()
    alone = replace(design, concepts=targets)
    quiet = replace(
        design, concepts=(*targets, *(replace(c, stimuli=with_readout(c.stimuli, None)) for c in controls))
    )
    return (
        stitch_design(alone, settings, store),
        couple(design, settings, store),
        dose_response_design(quiet, settings, store, doses=(-0.1, 0.0, 0.1)),
    )


def said(
    stitching: Stitching, coupling: Coupling, gain: Gain, chosen: np.ndarray, n_layers: int
) -> tuple[str, str, str]:
    """What a study of these scenarios says of valence."""
    units = tuple(stitching.concepts[0].units[i] for i in chosen)
    stitched = replace(
        stitching.concepts[0], units=units, coupling=stitching.concepts[0].coupling[..., chosen]
    )
    coupled = replace(
        coupling,
        concepts=tuple(
            replace(c, units=tuple(c.units[i] for i in chosen), coupling=c.coupling[:, chosen])
            for c in coupling.concepts
        ),
    )
    steered = gain.concepts[0]
    part = replace(
        steered, units=units, readouts=steered.readouts[..., chosen], coupling=steered.coupling[:, chosen],
        tangents=steered.tangents[..., chosen],
    )  # fmt: skip
    return (
        use_word(Used(replace(stitching, concepts=(stitched,)).loss(stitched), None), n_layers),
        coupled.decision(coupled.select("raw", "target")[0]),
        replace(gain, concepts=(part,)).decision("valence", "raw"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="docs/scorecard/use.csv")
    parser.add_argument("--population", type=int, default=240)
    parser.add_argument("--redraws", type=int, default=100)
    parser.add_argument("--sizes", type=int, nargs="+", default=[40, 100])
    args = parser.parse_args()
    rows = []
    for base in list_bases():
        for family, expected in EXPECTED.items():
            results = measured(base, family, args.population)
            for n in args.sizes:
                generator = np.random.default_rng([n, len(rows)])
                found = [
                    said(*results, generator.choice(args.population, n, replace=False), results[0].n_layers)
                    for _ in tqdm(range(args.redraws), desc=f"{base} {family} {n}", leave=False)
                ]
                for i, stage in enumerate(("use", "coupling", "gain")):
                    if expected[i] is None:
                        continue
                    words = [f[i] for f in found]
                    rate = binomial_interval(sum(word == expected[i] for word in words), len(words))
                    others = pd.Series([w or "undecided" for w in words if w != expected[i]]).value_counts()
                    rows.append(
                        {
                            "base": base, "family": family, "n": n, "stage": stage, "expected": expected[i],
                            "rate": rate.value, "lower": rate.lower, "upper": rate.upper, "redraws": len(words),
                            "instead": "; ".join(f"{word} {count}" for word, count in others.items()),
                        }
                    )  # fmt: skip
            pd.DataFrame(rows).to_csv(args.out, index=False, float_format="%.4g")
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
