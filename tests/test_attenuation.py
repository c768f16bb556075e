"""What attenuation must not depend on, what it must be exactly, and what a model against itself is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHAT, rows, tiny_gpt2, tiny_llama, word_tokenizer

from empathy_probes.activations import Activations
from empathy_probes.attenuation import (
    COLUMNS,
    Finding,
    load_finding,
    measure_attenuation,
)
from empathy_probes.coding import scenario_contrasts
from empathy_probes.concepts import Concept
from empathy_probes.controls import build_reference, mean_covariances
from empathy_probes.design import design_study
from empathy_probes.errors import InputError
from empathy_probes.ledger import headlines, ledger_frame
from empathy_probes.measurements import measure_concept
from empathy_probes.models import Model
from empathy_probes.pairs import ModelPair, load_pair
from empathy_probes.report import write_report
from empathy_probes.stimuli import stimuli_from_rows
from empathy_probes.study import Study, load_study

NEUTRAL = [row["text"] for row in rows(40, 77, "neutral")]


def concept(n: int = 40, seed: int = 0, name: str = "demo", role: Any = "target") -> Concept:
    return Concept(
        name, role, "", "", "user", "red against blue", stimuli_from_rows(rows(n, seed, name), name)
    )


def pair_of(base: Any, aligned: Any, template: str | None = None, **options: Any) -> ModelPair:
    return load_pair(
        (base, word_tokenizer(template)), (aligned, word_tokenizer(template)), device="cpu", **options
    )


def measure(pair: ModelPair, tmp_path: Path, *concepts: Concept, **options: Any) -> Finding:
    return measure_attenuation(
        pair,
        concepts or (concept(),),
        store=str(tmp_path / "store"),
        **{"template": "raw", "draws": 199, "neutral": NEUTRAL, **options},
    )


def test_concepts_asked_of_the_same_scenarios_err_together(tmp_path: Path) -> None:
    """One word more in every text of a control, and the same scenarios: what happens to one happens to the other."""
    pair = pair_of(tiny_llama(0), tiny_llama(1))
    texts = [{**row, "text": f"then {row['text']}"} for row in rows(40, 0, "demo")]
    renamed = [{**row, "scenario": f"other-{row['scenario']}"} for row in texts]
    spread, signs = [], []
    for given in (texts, renamed):
        control = Concept("alike", "control", "", "", "user", "", stimuli_from_rows(given, "alike"))
        target, other = (m.contrast for m in measure(pair, tmp_path, concept(), control).measurements)
        shared = mean_covariances(target, build_reference([other]))
        signs.append(set(target.keys) & set(other.keys))
        spread.append(np.abs(shared).max())
    assert len(signs[0]) == 40 and not signs[1]
    assert spread[0] > 0 and spread[1] == 0


def strength(finding: Finding) -> Any:
    frame = finding.to_frame()
    return frame[(frame.measure == "strength") & (frame.template != "did")]


def folded(model: Any) -> Any:
    """The same function with every RMSNorm gain folded into the weights that read it; the embedding stays untied."""
    with torch.no_grad():
        for block in model.model.layers:
            gain = block.input_layernorm.weight
            for read in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                read.weight *= gain
            for read in (block.mlp.gate_proj, block.mlp.up_proj):
                read.weight *= block.post_attention_layernorm.weight
            block.input_layernorm.weight.fill_(1.0)
            block.post_attention_layernorm.weight.fill_(1.0)
        model.lm_head.weight *= model.model.norm.weight
        model.model.norm.weight.fill_(1.0)
    return model


def transformed(model: Any, basis: torch.Tensor) -> Any:
    """Residual stream times `basis` (a rotation, or a multiple of the identity), the function unchanged."""
    inverse = torch.linalg.inv(basis)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ basis)
        for block in model.model.layers:
            a, m = block.self_attn, block.mlp
            for write in (a.o_proj, m.down_proj):
                write.weight.copy_(basis.T @ write.weight)
            if not torch.allclose(
                basis, basis[0, 0] * torch.eye(len(basis))
            ):  # a scale is undone by the norm itself
                for read in (a.q_proj, a.k_proj, a.v_proj, m.gate_proj, m.up_proj):
                    read.weight.copy_(read.weight @ inverse.T)
        if not torch.allclose(basis, basis[0, 0] * torch.eye(len(basis))):
            model.lm_head.weight.copy_(model.lm_head.weight @ inverse.T)
    return model


def gained(seed: int = 0, **changes: Any) -> Any:
    """A Llama whose norm gains are not all 1, so that folding matters."""
    model = tiny_llama(seed, **changes)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def same_function(base: Any, aligned: Any) -> bool:
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        return torch.allclose(base(ids).logits, aligned(ids).logits, atol=1e-4)


def test_a_rescaled_residual_stream_is_no_attenuation(tmp_path: Path) -> None:
    c, eps = 7.0, 1e-3  # eps large enough that forgetting c² would show
    base = gained(rms_norm_eps=eps)
    aligned = transformed(gained(rms_norm_eps=eps * c**2), c * torch.eye(32))
    assert same_function(base, aligned)
    found = strength(measure(pair_of(base, aligned), tmp_path))
    live = found[found.layer >= 0]
    assert live.attenuation.notna().all() and live.attenuation.abs().max() < 1e-4


def test_a_rotated_residual_basis_is_no_attenuation(tmp_path: Path) -> None:
    base, aligned = folded(gained()), folded(gained())
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(4)))[0]
    aligned = transformed(aligned, rotation)
    assert same_function(base, aligned)
    finding = measure(pair_of(base, aligned), tmp_path)
    live = strength(finding)[strength(finding).layer >= 0]
    assert live.attenuation.notna().all() and live.attenuation.abs().max() < 1e-4
    # The directions themselves are far apart: a naive transfer would have called this a loss.
    a, b = finding.measurements[0].directions[:, 0, 1:]
    assert abs((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).max() < 0.9


def test_a_constant_added_to_every_activation_of_a_layernorm_model_is_no_attenuation(tmp_path: Path) -> None:
    base, aligned = tiny_gpt2(0), tiny_gpt2(0)
    with torch.no_grad():
        aligned.transformer.wpe.weight += 3.0  # the mean over d_model, which LayerNorm takes out
    found = strength(measure(pair_of(base, aligned), tmp_path))
    live = found[found.layer >= 0]
    assert live.attenuation.notna().all() and live.attenuation.abs().max() < 1e-3


def test_swapping_base_and_aligned_turns_the_sign(tmp_path: Path) -> None:
    one, other = tiny_llama(0), tiny_llama(1)
    there = strength(measure(pair_of(one, other), tmp_path))
    back = strength(measure(pair_of(other, one), tmp_path))
    live = (
        (there.layer >= 0).to_numpy()
        & there.attenuation.notna().to_numpy()
        & back.attenuation.notna().to_numpy()
    )
    assert live.any()
    kept = (1 - there.attenuation.to_numpy()[live]) * (1 - back.attenuation.to_numpy()[live])
    np.testing.assert_allclose(kept, 1.0, rtol=1e-6)
    np.testing.assert_allclose(there.difference.to_numpy(), -back.difference.to_numpy(), atol=1e-9)


@pytest.mark.parametrize("n_controls", [0, 6])
def test_a_model_against_itself_is_exactly_nothing_everywhere(tmp_path: Path, n_controls: int) -> None:
    pair = pair_of(tiny_llama(0), tiny_llama(0), CHAT, allow_identical=True)
    controls = [concept(40, seed=i + 1, name=f"control-{i}", role="control") for i in range(n_controls)]
    finding = measure(pair, tmp_path, concept(), controls=controls, template="both")
    frame = finding.to_frame()
    for column in ("difference", "difference_lower", "difference_upper"):
        rows_ = frame[frame.site != "text"]
        assert (rows_[column] == 0).all(), column
    scored = strength(finding)
    for column in ("attenuation", "attenuation_lower", "attenuation_upper", "band_lower", "band_upper"):
        assert (scored[column] == 0).all(), column
    if n_controls:
        targets = scored[scored.role == "target"]
        assert (targets[["specific", "specific_lower", "specific_upper"]] == 0).all(axis=None)
    assert set(scored.decision) == {"equivalent"}
    auroc = frame[(frame.measure == "auroc") & (frame.site != "text")]
    assert (auroc[["attenuation", "attenuation_lower", "attenuation_upper"]] == 0).all(axis=None)
    assert scored[scored.layer == -1]["flags"].str.contains("at_chance").all()
    assert all(h.decision == "equivalent" for h in headlines(finding))


def test_duplicating_a_text_inside_its_scenario_does_not_narrow_the_interval(tmp_path: Path) -> None:
    pair = pair_of(tiny_llama(0), tiny_llama(1))
    lines = rows(40)
    doubled = [*lines, *({**line, "id": f"{line['id']}-again"} for line in lines)]
    plain = strength(measure(pair, tmp_path))
    again = strength(
        measure(
            pair, tmp_path, Concept("demo", "target", "", "", "user", "", stimuli_from_rows(doubled, "demo"))
        )
    )
    for column in ("attenuation_lower", "attenuation_upper", "base_lower", "base_upper"):
        np.testing.assert_allclose(plain[column], again[column], rtol=1e-4, atol=1e-5)


def test_clusters_of_correlated_scenarios_are_one_unit() -> None:
    stimuli = stimuli_from_rows([{**row, "cluster": f"c{i // 4}"} for i, row in enumerate(rows(40))], "demo")
    values = np.random.default_rng(0).normal(size=(80, 1, 3))
    differences = scenario_contrasts(values, stimuli)[0]
    assert differences.shape == (20, 1, 3)
    np.testing.assert_allclose(differences[0], (values[0] - values[1] + values[2] - values[3]) / 2)


def test_order_of_texts_changes_nothing(tmp_path: Path) -> None:
    pair, lines = pair_of(tiny_llama(0), tiny_llama(1)), rows(40)
    mixed = [lines[i] for i in np.random.default_rng(1).permutation(len(lines))]
    frames = [
        measure(
            pair, tmp_path, Concept("demo", "target", "", "", "user", "", stimuli_from_rows(r, "demo"))
        ).to_frame()
        for r in (lines, mixed)
    ]
    for column in ("attenuation", "attenuation_lower", "base", "aligned_upper"):
        np.testing.assert_allclose(
            frames[0][column].to_numpy(float), frames[1][column].to_numpy(float), atol=1e-5
        )


def test_rows_follow_the_contract(tmp_path: Path) -> None:
    pair = pair_of(tiny_llama(0), tiny_llama(1), CHAT)
    control = concept(40, 5, "other", "control")
    finding = measure(
        pair, tmp_path, concept(), controls=[control], template="both", sites=("resid_post", "mlp_out")
    )
    frame = finding.to_frame()
    assert tuple(frame.columns) == tuple(COLUMNS)
    assert not frame.duplicated(["concept", "template", "site", "layer", "measure"]).any()
    assert set(frame.template) == {"raw", "shared", "did"} and set(frame.site) == {
        "resid_post",
        "mlp_out",
        "text",
    }
    embedding = frame[frame.layer == -1]
    assert (embedding.depth == 0).all() and set(embedding.site) == {"resid_post"}
    assert (frame[frame.layer == 3].depth == 1).all()
    words = frame[frame.site == "text"]
    assert words.layer.isna().all() and words.depth.isna().all() and (words["flags"] == "lexical_floor").all()
    controls = frame[frame.role == "control"]
    assert controls[["specific", "specific_lower", "specific_upper"]].isna().all(axis=None)
    # A cosine and a transfer have no ratio.
    ratio = ~frame.measure.str.contains("cosine|transfer")
    blanks = frame[frame.attenuation.isna() & (frame.site != "text") & ratio]
    assert (blanks["flags"] != "").all(), "a blank has a flag that says why"
    targets = strength(finding)[(strength(finding).role == "target") & (strength(finding).layer >= 0)]
    assert (targets.decision == "").all() and targets["flags"].str.contains("few_controls").all()


def test_the_lexical_floor_sees_a_keyword_and_the_embedding_of_a_shared_last_token_does_not(
    tmp_path: Path,
) -> None:
    frame = measure(pair_of(tiny_llama(0), tiny_llama(1)), tmp_path).to_frame()
    auroc = frame[frame.measure == "auroc"].set_index("layer")
    assert auroc[auroc.site == "text"].base.item() > 0.95
    assert auroc.loc[-1].base == 0.5


def test_every_site_is_read_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    real = Model.run
    monkeypatch.setattr(Model, "run", lambda self, *a, **k: ran.append(1) or real(self, *a, **k))
    pair = pair_of(tiny_llama(0), tiny_llama(1))
    ran.clear()  # loading checks itself with a run
    measure(pair, tmp_path, sites=("resid_post", "mlp_out", "attn_out"))
    assert len(ran) == 4, "per model, one for the concept and one for the neutral texts"


def test_two_models_without_any_contrast_are_not_called_equivalent(tmp_path: Path) -> None:
    frame = strength(measure(pair_of(tiny_llama(0), tiny_llama(1)), tmp_path))
    embedding = frame[frame.layer == -1].iloc[0]  # the last token is the same in every text
    assert embedding.decision == "" and np.isnan(embedding.attenuation)
    assert "base_not_detected" in embedding["flags"]


def test_a_finding_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    finding = measure(pair_of(tiny_llama(0), tiny_llama(1)), tmp_path)
    finding.save(tmp_path / "finding.safetensors")
    again = load_finding(tmp_path / "finding.safetensors")
    assert again.to_frame().equals(finding.to_frame())
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "finding.safetensors").read_bytes()


def test_where_the_base_carries_nothing_nothing_is_said(tmp_path: Path) -> None:
    lines = rows(40)
    flip = np.random.default_rng(3).permutation(np.repeat([0, 1], 20))
    shuffled = [{**line, "label": line["label"] ^ int(flip[i // 2])} for i, line in enumerate(lines)]
    blind = Concept("blind", "target", "", "", "user", "", stimuli_from_rows(shuffled, "blind"))
    finding = measure(pair_of(tiny_llama(0), tiny_llama(1)), tmp_path, blind)
    (headline,) = headlines(finding)
    blocks = strength(finding)[strength(finding).layer >= 0]
    assert blocks["flags"].str.contains("base_not_detected").all() and blocks.attenuation.isna().all()
    assert headline.decision == "" and headline.layer is None and headline.size is None
    assert "Nothing can be said" in headline.sentence


def test_the_ledger_says_what_is_missing_instead_of_guessing(tmp_path: Path) -> None:
    frame = ledger_frame(measure(pair_of(tiny_llama(0), tiny_llama(1)), tmp_path))
    row = frame.iloc[0]
    assert (row.use, row.express) == ("not_run", "not_run")
    assert row.verdict in {"inconclusive", "amplified"}
    assert row.verdict == "amplified" or "use" in row.missing.split(";")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown template": ({"template": "chat"}, "unknown template 'chat'"),
    "no chat template": ({"template": "shared"}, "tokenizer of aligned .* has none"),
    "unknown site": ({"sites": ("resid",)}, "unknown site 'resid'"),
    "layer outside": ({"layers": (0, 9)}, r"layers got \[9\]"),
    "half a block": ({"layers": (1.0,)}, r"layers got \(1.0,\), expected block indices"),
    "too few scenarios": ({"n": 20}, "20 scenarios, expected at least 30"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_a_design_that_cannot_be_measured_is_refused_before_anything_runs(case: str) -> None:
    options, message = dict(BAD[case][0]), BAD[case][1]
    pair = pair_of(tiny_llama(0), tiny_llama(1))
    with pytest.raises(InputError, match=message):
        design_study(pair, [concept(options.pop("n", 40))], **{"template": "raw", **options})


def test_a_concept_that_is_target_and_control_is_refused() -> None:
    pair = pair_of(tiny_llama(0), tiny_llama(1))
    with pytest.raises(InputError, match="given twice"):
        design_study(pair, [concept()], [replace(concept(), role="control")], template="raw")


def test_where_a_concept_is_given_makes_it_target_or_control() -> None:
    """A file's concept is a target by itself, and was judged as one where it was given as a control."""
    pair = pair_of(tiny_llama(0), tiny_llama(1))
    ruled = replace(concept(), name="ruled", role="target")
    design = design_study(pair, replace(concept(), role="control"), ruled, template="raw")
    assert [(c.name, c.role) for c in design.concepts] == [("demo", "target"), ("ruled", "control")]


def test_what_is_no_concept_and_numbers_out_of_range_are_refused() -> None:
    pair: Any = pair_of(tiny_llama(0), tiny_llama(1))
    wrong: Any = "demo"
    with pytest.raises(InputError, match="targets got 'demo', expected concepts; load each by load_concept"):
        measure_attenuation(pair, wrong, template="raw")
    with pytest.raises(InputError, match="controls got 1"):
        design_study(pair, [concept()], [1, 2], template="raw")  # type: ignore[list-item]
    for option, value in (("margin", 1.5), ("draws", 5), ("seed", -1)):
        with pytest.raises(InputError, match=f"{option} got {value}"):
            measure_attenuation(pair, concept(), template="raw", **{option: value})


def test_a_place_to_which_a_model_writes_nothing_is_named() -> None:
    acts = Activations(np.zeros((4, 2, 3), np.float32), (0, 1), "mlp_out", "m", False)
    acts.acts[:, 0] = 1
    with pytest.raises(InputError, match="'m' writes exactly 0 at mlp_out of layer 1 for every text"):
        _ = acts.normalised


def test_both_templates_fall_back_to_raw_with_a_flag_where_there_is_none() -> None:
    design = design_study(pair_of(tiny_llama(0), tiny_llama(1)), [concept()], template="both")
    assert design.templates == ("raw",) and design.flags == ("no_chat_template",)


def test_raw_text_that_two_tokenizers_split_differently_is_refused() -> None:
    theirs = word_tokenizer(CHAT)
    from tokenizers import processors

    theirs._tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    pair = load_pair((tiny_llama(0), word_tokenizer()), (tiny_llama(1), theirs), device="cpu")
    with pytest.raises(InputError, match="different token ids"):
        design_study(pair, [concept()], template="raw")
    shared = design_study(pair, [concept()], template="shared")
    ours, others = shared.prompts["demo", "shared"]
    assert [p.ids for p in ours] == [p.ids for p in others]


def test_a_study_made_in_a_notebook_is_saved_loaded_and_reported_alike(tmp_path: Path) -> None:
    finding = measure(pair_of(tiny_llama(0), tiny_llama(1)), tmp_path)
    study = Study("By hand", [finding])
    study.save(tmp_path / "study")
    study.save(tmp_path / "study")  # the same study there already is no mistake
    again = load_study(tmp_path / "study")
    now = write_report(study, tmp_path / "now.html").read_bytes()
    assert write_report(again, tmp_path / "later.html").read_bytes() == now
    assert again.digest == study.digest and again.finding.to_frame().equals(finding.to_frame())
    other = measure(pair_of(tiny_llama(0), tiny_llama(2)), tmp_path)
    with pytest.raises(InputError, match="holds another study"):
        Study("By hand", [other]).save(tmp_path / "study")
    with pytest.raises(InputError, match="one of each kind"):
        Study("Two", [finding, other])


MANY = [row["text"] for row in rows(200, 77, "neutral")]


def live(finding: Finding, measure_name: str) -> Any:
    frame = finding.to_frame()
    return frame[(frame.measure == measure_name) & (frame.layer >= 0) & (frame.site != "text")]


def test_a_rotated_twin_keeps_what_a_refit_reads_and_the_map_brings_the_direction_back(
    tmp_path: Path,
) -> None:
    base, aligned = folded(gained()), folded(gained())
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(4)))[0]
    aligned = transformed(aligned, rotation)
    assert same_function(base, aligned)
    finding = measure(pair_of(base, aligned), tmp_path, neutral=MANY)
    assert not finding.measurements[0].views.map_underdetermined
    for name, tolerance in (("d_prime", 1e-3), ("bits", 1e-3), ("auroc", 1e-9)):
        assert live(finding, name).difference.abs().max() < tolerance, name
    plain, mapped = live(finding, "cosine").aligned, live(finding, "cosine_mapped").aligned
    assert plain.notna().all() and plain.abs().max() < 0.9
    assert mapped.min() > 0.999
    for way in ("base_to_aligned", "aligned_to_base"):
        lost = live(finding, f"transfer_{way}").difference.abs()
        kept = live(finding, f"transfer_{way}_mapped").difference.abs()
        assert kept.max() < 0.01 and lost.max() > 0.05, way


def test_a_model_against_itself_has_cosine_exactly_one(tmp_path: Path) -> None:
    finding = measure(pair_of(tiny_llama(0), tiny_llama(0), CHAT, allow_identical=True), tmp_path)
    for name in ("cosine", "cosine_mapped"):
        assert (live(finding, name)[["aligned", "aligned_lower", "aligned_upper"]] == 1).all(axis=None)


def test_neutral_texts_change_no_number_of_strength(tmp_path: Path) -> None:
    pair = pair_of(tiny_llama(0), tiny_llama(1))
    few, many = measure(pair, tmp_path), measure(pair, tmp_path, neutral=MANY)
    numbers = [strength(f).select_dtypes("number").to_numpy(float) for f in (few, many)]
    np.testing.assert_array_equal(*numbers)
    a, b = live(few, "d_prime").base, live(many, "d_prime").base
    assert not np.array_equal(a, b), "while d' does depend on them"


def test_the_unit_of_the_neutral_texts_cancels_in_d_prime() -> None:
    """Neutral texts twice as large in one model say that its concept's states are half as spread, not half as far apart."""
    acts = Activations(
        np.random.default_rng(0).standard_normal((80, 2, 8)).astype(np.float32),
        (0, 1),
        "resid_post",
        "m",
        False,
    )
    texts = Activations(
        np.random.default_rng(1).standard_normal((60, 2, 8)).astype(np.float32),
        (0, 1),
        "resid_post",
        "m",
        False,
    )
    loud = replace(texts, acts=2 * texts.acts)
    one, other = (
        measure_concept(concept(), "raw", (acts, acts), (n, n), np.zeros((1, 80)), 0, True)
        for n in (texts, loud)
    )
    np.testing.assert_allclose(other.views.whitened, one.views.whitened / 4, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(other.kernels, one.kernels)
