"""Where alignment tuning attenuates affect and relational stance inside a language model.

    import empathy_probes as ep

    pair = ep.load_pair("path/to/base", "path/to/aligned")
    finding = ep.measure_attenuation(pair, ep.load_concept("valence"), controls=ep.load_controls())

Importing this package loads neither torch nor TransformerLens; each name is imported when first used.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())

_MODULES = {
    "attribution": ("attribute", "attribute_design"),
    "ablation": ("Ablation", "ablate"),
    "attenuation": ("Finding", "load_finding", "measure", "measure_attenuation"),
    "audit": ("Audit", "audit_concept", "audit_concepts", "audit_library"),
    "calibration": ("calibrate",),
    "concepts": (
        "Concept", "list_concepts", "load_concept", "load_concept_file", "load_controls", "load_neutral", "load_targets",
    ),
    "design": ("Design", "Settings", "design_study"),
    "doctor": ("Checkup", "examine"),
    "expression": ("Coupling", "measure_coupling"),
    "directions": ("difference_of_means", "fit_vector", "pca_of_differences", "probe_weights"),
    "errors": ("EmpathyProbesError", "InputError", "NonFiniteError", "ProvenanceError", "StoreError"),
    "gains": ("Gain",),
    "interchange": ("Written", "read_vector", "write_vector"),
    "interventions": (
        "add_vector", "at_positions", "cap_component", "mean_ablate", "project_out", "replace_component", "replace_with",
    ),
    "gradients": ("EstimatedPatching", "attribution_patch"),
    "ledger": ("Headline", "headlines"),
    "lens": ("LogitLens", "logit_lens"),
    "lineages": ("Lineage", "Stage", "list_lineages", "load_lineage"),
    "models": ("Model", "Run", "load_model"),
    "patching": ("Patching", "patch"),
    "pairs": ("ModelPair", "load_pair", "make_pair"),
    "phantoms": ("build_phantom", "list_phantoms", "load_phantom", "load_phantom_concepts", "phantom_truth", "write_phantom"),
    "report": ("write_report",),
    "scorecard": ("Scorecard", "load_scorecard"),
    "sites": ("Site",),
    "stats": ("Estimate",),
    "stages": ("STAGES", "load_result"),
    "steering": ("dose_response", "dose_response_design"),
    "sweeps": ("sites_of",),
    "transplants": ("Transplants", "transplant"),
    "stimuli": ("StimulusSet", "load_stimuli", "stimuli_from_rows"),
    "stitching": ("Stitching", "stitch"),
    "store": ("open_store",),
    "specs": ("StudySpec", "read_spec", "resolve"),
    "study": ("Study", "load_study", "run_study"),
    "vectors": ("SteeringVector", "from_position", "neutral_rms", "only_positions"),
    "writes": ("Attribution", "largest_writers", "load_attribution"),
    "trends": ("LineageTrend", "load_trend", "measure_lineage", "trace_design"),
}  # fmt: skip
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from empathy_probes.ablation import Ablation, ablate
    from empathy_probes.attenuation import Finding, load_finding, measure, measure_attenuation
    from empathy_probes.attribution import attribute, attribute_design
    from empathy_probes.audit import Audit, audit_concept, audit_concepts, audit_library
    from empathy_probes.calibration import calibrate
    from empathy_probes.concepts import (
        Concept,
        list_concepts,
        load_concept,
        load_concept_file,
        load_controls,
        load_neutral,
        load_targets,
    )
    from empathy_probes.design import Design, Settings, design_study
    from empathy_probes.directions import difference_of_means, fit_vector, pca_of_differences, probe_weights
    from empathy_probes.doctor import Checkup, examine
    from empathy_probes.errors import (
        EmpathyProbesError,
        InputError,
        NonFiniteError,
        ProvenanceError,
        StoreError,
    )
    from empathy_probes.expression import Coupling, measure_coupling
    from empathy_probes.gains import Gain
    from empathy_probes.gradients import EstimatedPatching, attribution_patch
    from empathy_probes.interchange import Written, read_vector, write_vector
    from empathy_probes.interventions import (
        add_vector,
        at_positions,
        cap_component,
        mean_ablate,
        project_out,
        replace_component,
        replace_with,
    )
    from empathy_probes.ledger import Headline, headlines
    from empathy_probes.lens import LogitLens, logit_lens
    from empathy_probes.lineages import Lineage, Stage, list_lineages, load_lineage
    from empathy_probes.models import Model, Run, load_model
    from empathy_probes.pairs import ModelPair, load_pair, make_pair
    from empathy_probes.patching import Patching, patch
    from empathy_probes.phantoms import (
        build_phantom,
        list_phantoms,
        load_phantom,
        load_phantom_concepts,
        phantom_truth,
        write_phantom,
    )
    from empathy_probes.report import write_report
    from empathy_probes.scorecard import Scorecard, load_scorecard
    from empathy_probes.sites import Site
    from empathy_probes.specs import StudySpec, read_spec, resolve
    from empathy_probes.stages import STAGES, load_result
    from empathy_probes.stats import Estimate
    from empathy_probes.steering import dose_response, dose_response_design
    from empathy_probes.stimuli import StimulusSet, load_stimuli, stimuli_from_rows
    from empathy_probes.stitching import Stitching, stitch
    from empathy_probes.store import open_store
    from empathy_probes.study import Study, load_study, run_study
    from empathy_probes.sweeps import sites_of
    from empathy_probes.transplants import Transplants, transplant
    from empathy_probes.trends import LineageTrend, load_trend, measure_lineage, trace_design
    from empathy_probes.vectors import SteeringVector, from_position, neutral_rms, only_positions
    from empathy_probes.writes import Attribution, largest_writers, load_attribution
