"""Other tools' vector files: every number arrives on the block it was meant for."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from empathy_probes import cli, interchange
from empathy_probes.errors import InputError
from empathy_probes.interchange import FORMATS, HEADED, OWN, read_vector, write_vector
from empathy_probes.store import write_file
from empathy_probes.vectors import SteeringVector, make_vector

D = 6
NAMES = {
    OWN: "v.safetensors", "gguf": "v.gguf", "persona_vectors": "v.pt", "caa": "caa", "numpy": "v.npz", "neuronpedia": "v.json",
}  # fmt: skip


def a_vector(*layers: int, site: str = "resid_post") -> SteeringVector:
    rows = np.random.default_rng(0).standard_normal((len(layers), D)).astype(np.float32) * 3
    model = {
        "name": "org/some-llama",
        "revision": None,
        "weights": "w" * 64,
        "architecture": "LlamaForCausalLM",
    }
    return make_vector(
        rows, layers, concept="valence", model=model, n_layers=6, rms=(1.5,) * len(layers), site=site
    )


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_what_is_written_is_read_back_on_the_same_blocks(tmp_path: Path, name: str) -> None:
    vector = a_vector(1, 3, 4)
    done = write_vector(vector, tmp_path / NAMES[name], name)
    assert done.layers == (1, 3, 4) and done.left_out == () and done.format == name
    again = read_vector(tmp_path / NAMES[name])
    for layer in vector.layers:
        np.testing.assert_array_equal(again.at(layer).direction, vector.at(layer).direction)
    if name in (OWN, "gguf"):  # these carry the header too
        assert again.layers == vector.layers and again.model == vector.model and again.rms == vector.rms
    one = read_vector(tmp_path / NAMES[name], layer=3)
    np.testing.assert_array_equal(one.direction, vector.direction[[1]])


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_multiple_is_written_as_it_is_and_the_length_of_a_dose_is_kept_or_said(
    tmp_path: Path, name: str
) -> None:
    vector = -2 * a_vector(1, 3)
    done = write_vector(vector, tmp_path / NAMES[name], name)
    for layer in vector.layers:
        again = read_vector(tmp_path / NAMES[name], name, layer)
        np.testing.assert_array_equal(again.direction, vector.at(layer).direction)
        expected = vector.at(layer).relative / (1 if name in HEADED else 2)
        np.testing.assert_allclose(again.relative, expected, rtol=1e-6)
    said = [sentence for sentence in done.left_out if "rows of 2 to 2 doses" in sentence]
    assert len(said) == len(done.left_out) == (name not in HEADED)


def test_a_gguf_file_holds_what_llama_cpp_looks_for(tmp_path: Path) -> None:
    vector = a_vector(1, 3)
    write_vector(vector, tmp_path / "v.gguf")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    text = {
        key: reader.get_field(key).contents() for key in ("general.architecture", "controlvector.model_hint")
    }
    assert text == {"general.architecture": "controlvector", "controlvector.model_hint": "llama"}
    assert reader.get_field("controlvector.layer_count").contents() == 2
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert sorted(found) == ["direction.1", "direction.3"]
    for layer, row in zip(vector.layers, vector.direction, strict=True):
        tensor = found[f"direction.{layer}"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and list(tensor.shape) == [D]
        np.testing.assert_array_equal(tensor.data, row)


def test_block_0_cannot_go_into_a_gguf_file_and_nobody_is_left_to_guess(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = write_vector(a_vector(0, 2), tmp_path / "v.gguf")
    assert done.layers == (2,) and "block 0 is left out" in done.left_out[0]
    assert "block 0 is left out" in caplog.text
    assert read_vector(tmp_path / "v.gguf").layers == (2,)
    with pytest.raises(InputError, match="block 0 alone"):
        write_vector(a_vector(0), tmp_path / "alone.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["v.gguf"]


def finish(writer: gguf.GGUFWriter) -> None:
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()


def control_vector(path: Path, tensors: dict[str, Any], header: str = "") -> Path:
    writer = gguf.GGUFWriter(path, "controlvector")
    if header:
        writer.add_string("controlvector.empathy_probes", header)
    for name, array in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if array.dtype == np.uint8 else None
        writer.add_tensor(name, array, raw_dtype=kind)
    finish(writer)
    return path


ROW = np.linspace(-1, 1, 32, dtype=np.float32)


@pytest.mark.parametrize(
    "tensors",
    [
        {"direction.1": gguf.quants.quantize(ROW, gguf.GGMLQuantizationType.Q8_0)},
        {"direction.1": np.stack([ROW, ROW])},
        {"direction.1": ROW.astype(np.float64)},
        {"direction.0": ROW, "direction.1": ROW},
        {"direction.1": ROW, "direction.x": ROW},
    ],
)
def test_what_llama_cpp_refuses_is_not_read(tmp_path: Path, tensors: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"expected direction.N of N from 1 on, of type F32 or F16"):
        read_vector(control_vector(tmp_path / "v.gguf", tensors))


def test_half_precision_is_read_exactly(tmp_path: Path) -> None:
    half = ROW.astype(np.float16)
    found = read_vector(control_vector(tmp_path / "v.gguf", {"direction.2": half}))
    assert found.layers == (2,) and found.direction.dtype == np.float32
    np.testing.assert_array_equal(found.direction[0], half)


def a_header(*layers: int) -> str:
    return json.dumps(a_vector(*layers).header())


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        ({"direction.1": ROW}, "not json", "is not JSON"),
        ({"direction.1": ROW}, "[1]", "a header that is a list"),
        ({}, a_header(1), "holds no vector"),
        ({"direction.1": ROW, "direction.3": ROW}, a_header(1), r"blocks \[1, 3\] and names \[1\]"),
        ({"direction.1": ROW, "direction.3": ROW}, a_header(2), r"blocks \[1, 3\] and names \[2\]"),
    ],
)
def test_a_header_of_ours_that_does_not_fit_is_one_sentence(
    tmp_path: Path, tensors: dict[str, Any], header: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_vector(control_vector(tmp_path / "v.gguf", tensors, header))
    assert "\n" not in str(caught.value)


def test_a_control_vector_that_repeng_wrote_lands_on_its_blocks(tmp_path: Path) -> None:
    rows = {layer: np.full(D, layer, np.float32) for layer in (2, 5, 11)}
    writer = gguf.GGUFWriter(tmp_path / "happy.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", len(rows))
    for layer, row in rows.items():
        writer.add_tensor(f"direction.{layer}", row)
    finish(writer)
    found = read_vector(tmp_path / "happy.gguf")
    assert found.layers == (2, 5, 11) and found.concept == "happy" and found.model == {"name": "mistral"}
    np.testing.assert_array_equal(found.direction[:, 0], [2, 5, 11])
    np.testing.assert_allclose(np.linalg.norm(found.relative, axis=1), 1)


def test_index_i_of_a_persona_vector_is_block_i_minus_1(tmp_path: Path) -> None:
    # 4 blocks; index 0 is the embedding.
    whole = torch.arange(5.0)[:, None].expand(5, D).clone() + 10
    torch.save(whole.to(torch.bfloat16), tmp_path / "evil_response_avg_diff.pt")
    found = read_vector(tmp_path / "evil_response_avg_diff.pt")
    assert found.layers == (0, 1, 2, 3) and found.n_layers == 4
    assert found.direction[:, 0].tolist() == [11, 12, 13, 14]
    assert found.notes == ("index 0, the embedding, is no block",)
    write_vector(found.at(2), tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.shape == (5, D) and back[3, 0] == 13 and not back[[0, 1, 2, 4]].any()


def test_caa_counts_blocks_and_a_single_file_says_where_or_is_told(tmp_path: Path) -> None:
    (tmp_path / "vectors").mkdir()
    for layer in (2, 10):
        torch.save(torch.full((D,), float(layer)), tmp_path / "vectors" / f"vec_layer_{layer}.pt")
    torch.save(torch.ones(D), tmp_path / "direction.pt")
    found = read_vector(tmp_path / "vectors")
    assert found.layers == (2, 10) and found.direction[:, 0].tolist() == [2, 10]
    assert read_vector(tmp_path / "vectors" / "vec_layer_10.pt").layers == (10,)
    assert read_vector(tmp_path / "direction.pt", "caa", layer=7).layers == (7,)
    with pytest.raises(InputError, match="does not say which block"):
        read_vector(tmp_path / "direction.pt", "caa")


def test_arrays_are_blocks_by_row_or_by_the_last_number_of_their_name(tmp_path: Path) -> None:
    whole = np.arange(4.0)[:, None] * np.ones(D)
    np.save(tmp_path / "all.npy", whole)
    np.savez(tmp_path / "some.npz", layer_3=whole[3], model2_layer_1=whole[1])
    (tmp_path / "folder").mkdir()
    for layer in (0, 2):
        np.save(tmp_path / "folder" / f"direction_layer{layer}.npy", whole[layer])
    for name, layers in (("all.npy", (0, 1, 2, 3)), ("some.npz", (1, 3)), ("folder", (0, 2))):
        found = read_vector(tmp_path / name)
        assert found.layers == layers and found.direction[:, 0].tolist() == list(layers)
    np.savez(tmp_path / "twice.npz", a_1=whole[0], b_1=whole[1])
    with pytest.raises(InputError, match="two arrays for block 1"):
        read_vector(tmp_path / "twice.npz")


def single(path: Path, value: float, shape: tuple[int, ...] = (D,)) -> Path:
    array = np.full(shape, value)
    if path.suffix == ".pt":
        torch.save(torch.tensor(array), path)
    elif path.suffix == ".npy":
        np.save(path, array)
    else:
        np.savez(path, **{path.stem: array})
    return path


@pytest.mark.parametrize("name", ["vec_layer_5.pt", "layer_5.npy", "L5_seed0.npy", "joy_block5.npz", "5.npy"])
def test_a_layer_never_moves_a_vector_that_says_its_block(tmp_path: Path, name: str) -> None:
    path = single(tmp_path / name, 5.0)
    assert read_vector(path).layers == read_vector(path, layer=5).layers == (5,)
    with pytest.raises(InputError, match="named as the vector of block 5, but layer 7 was asked for"):
        read_vector(path, layer=7)


@pytest.mark.parametrize(
    "name", ["joy.npy", "gpt2_joy.npz", "llama-3-8b_joy.npy", "L3_L4.npy", "layer_-1.npy"]
)
def test_a_name_that_says_no_one_block_needs_a_layer(tmp_path: Path, name: str) -> None:
    path = single(tmp_path / name, 1.0)
    with pytest.raises(InputError, match="does not say which block"):
        read_vector(path)
    assert read_vector(path, layer=7).layers == (7,)


def test_one_row_is_one_vector_and_rows_of_one_layer_are_refused(tmp_path: Path) -> None:
    for name in ("layer_7.npz", "layer_7.npy"):
        found = read_vector(single(tmp_path / name, 7.0, (1, D)))
        assert found.layers == (7,) and found.direction.shape == (1, D) and found.n_layers is None
    with pytest.raises(InputError, match="does not say which block"):
        read_vector(single(tmp_path / "joy.npy", 1.0, (1, D)))
    with pytest.raises(InputError, match=r"holds float64 of shape \[2, 3, 4\]"):
        read_vector(single(tmp_path / "cube.npy", 1.0, (2, 3, 4)))
    with pytest.raises(InputError, match="holds 4 rows named 'layer_7'"):
        read_vector(single(tmp_path / "layer_7.npz", 1.0, (4, D)))
    # Given no name, an array is called arr_0 and the file's own name counts.
    np.savez(tmp_path / "layer_3.npz", np.ones(D))
    assert read_vector(tmp_path / "layer_3.npz").layers == (3,)
    (tmp_path / "versions").mkdir()
    for layer in (3, 4):
        single(tmp_path / "versions" / f"layer{layer}_v2.npy", 1.0)
    assert read_vector(tmp_path / "versions").layers == (3, 4)


def test_neuronpedia_means_the_input_of_the_next_block(tmp_path: Path) -> None:
    vector = a_vector(1, 5)
    done = write_vector(vector, tmp_path / "v.json")
    (entry,) = json.loads((tmp_path / "v.json").read_text())
    assert (
        entry["layer_num"] == 2
        and entry["hook_type"] == "hook_resid_pre"
        and entry["model_id"] == "org/some-llama"
    )
    np.testing.assert_allclose(entry["vector"], vector.direction[0])
    # What the last of six blocks leaves is nobody's input.
    assert done.layers == (1,) and "block 5 is left out" in done.left_out[0]
    with pytest.raises(InputError, match="after the last block alone"):
        write_vector(a_vector(5), tmp_path / "last.json")
    again = read_vector(tmp_path / "v.json")
    assert again.layers == (1,) and again.concept == "valence" and again.model == {"name": "org/some-llama"}


def test_only_one_vectors_inputs_are_read_from_neuronpedia(tmp_path: Path) -> None:
    entry = {
        "label": "joy", "model_id": "gpt2", "layer_num": 3, "hook_type": "hook_resid_pre", "vector": [1.0, 2],
        "default_steer_strength": 40,
    }  # fmt: skip
    path = tmp_path / "v.json"
    path.write_text(json.dumps(entry))
    found = read_vector(path)
    assert found.layers == (2,) and found.direction.tolist() == [[1, 2]] and "strength 40" in found.notes[0]
    for entries, message in (
        ([entry, entry], "expected each layer once"),
        ([entry | {"layer_num": 0}], "layer_num 0 of hook_resid_pre"),
        ([entry | {"layer_num": "3"}], "layer_num 3"),
        ([entry | {"hook_type": "hook_z"}], "of hook_z"),
        ([entry, entry | {"label": "fear", "layer_num": 4}], "fear of gpt2; joy of gpt2"),
        ([entry | {"vector": [[1], [2, 3]]}], "cannot be read as Neuronpedia vectors"),
        ([entry | {"vector": ["a"]}], "expected one vector"),
        ([entry | {"default_steer_strength": [1]}], "cannot be read as Neuronpedia vectors"),
        ([{"values": [1.0]}], "KeyError"),
        ([], "holds no vector"),
        (7, "cannot be read as Neuronpedia vectors"),
    ):
        path.write_text(json.dumps(entries))
        with pytest.raises(InputError, match=message) as caught:
            read_vector(path)
        assert "\n" not in str(caught.value)
    path.write_text("[{")
    with pytest.raises(InputError, match="JSONDecodeError"):
        read_vector(path)


def test_parameters_and_sparse_tensors_are_read_as_what_they_hold(tmp_path: Path) -> None:
    whole = torch.arange(4.0)[:, None].expand(4, D).clone()
    for name, content in (("parameter", torch.nn.Parameter(whole)), ("sparse", whole.to_sparse())):
        torch.save(content, tmp_path / f"{name}.pt")
        assert read_vector(tmp_path / f"{name}.pt").direction[:, 0].tolist() == [1, 2, 3]
    torch.save(torch.nn.Parameter(whole[3]), tmp_path / "vec_layer_3.pt")
    assert read_vector(tmp_path / "vec_layer_3.pt").direction.tolist() == [[3.0] * D]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("persona.pt", torch.ones(4, D, dtype=torch.complex64)),
        ("vec_layer_1.pt", torch.ones(D, dtype=torch.complex64)),
        ("vec_layer_2.pt", [torch.ones(2), torch.ones(3)]),
        ("width.pt", torch.ones(4, 0)),
        ("words.npy", np.array([["a", "b"], ["c", "d"]])),
        ("imaginary.npy", np.ones((2, 3)) * 1j),
        ("half.npz", b"PK\x03\x04 and then nothing"),
        ("flipped.npz", None),
        ("cut.npz", None),
    ],
)
def test_files_of_no_numbers_and_damaged_ones_are_one_sentence(
    tmp_path: Path, name: str, content: Any
) -> None:
    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save(content, path)
    elif path.suffix == ".npy":
        np.save(path, content)
    elif content is not None:
        path.write_bytes(content)
    else:
        np.savez(path, layer_1=np.ones(D))
        whole = path.read_bytes()
        path.write_bytes(
            whole[: len(whole) // 2] if name == "cut.npz" else whole[:60] + b"x" * 8 + whole[68:]
        )
    with pytest.raises(InputError) as caught:
        read_vector(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


class Code:
    def __reduce__(self) -> Any:
        return (print, ("this ran",))


def test_no_file_can_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Code()))
    torch.save({"layer": Code()}, tmp_path / "worse.pt")
    np.save(tmp_path / "bad.npy", np.array([Code()], dtype=object), allow_pickle=True)
    capsys.readouterr()
    for name in ("bad.pt", "worse.pt", "bad.npy"):
        with pytest.raises(InputError, match="cannot be read as"):
            read_vector(tmp_path / name)
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "expected a tensor \\[n_layers"),
        ({"a": torch.ones(3)}, "holds a dict"),
        (torch.ones(2, 3, 4), "shape \\[2, 3, 4\\]"),
    ],
)
def test_a_torch_file_of_another_shape_is_named(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(InputError, match=message):
        read_vector(tmp_path / "v.pt")


def test_what_cannot_be_told_or_held_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "notes.gguf").write_text("not a file of that kind")
    other = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for step in (
        other.write_header_to_file,
        other.write_kv_data_to_file,
        other.write_tensors_to_file,
        other.close,
    ):
        step()
    for path, options, message in (
        (tmp_path / "v.xyz", {}, "cannot be told from its name"),
        (tmp_path / "v.gguf", {}, "no vector at"),
        (tmp_path / "notes.gguf", {}, "is no GGUF file"),
        (tmp_path / "model.gguf", {}, "of the architecture 'llama'"),
        (tmp_path / "v.pt", {"format": "onnx"}, "unknown vector format 'onnx'"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            read_vector(path, **options)
        assert "\n" not in str(caught.value)
    for name in sorted(set(FORMATS) - {OWN}):
        with pytest.raises(InputError, match="expected one at resid_post"):
            write_vector(a_vector(1, site="mlp_out"), tmp_path / "x", name)


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"caa"}))
def test_a_file_is_never_written_into_a_folder_of_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / NAMES[name]).mkdir()
    with pytest.raises(InputError, match=r"is a folder, expected a file|Is a directory") as caught:
        write_vector(a_vector(1), tmp_path / NAMES[name], name)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*")] == [NAMES[name]]


@pytest.mark.parametrize("name", ["caa", "numpy"])
def test_two_vectors_never_share_a_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("somebody's notes")
    first = write_vector(a_vector(1, 3), folder, name)
    held = sorted(path.name for path in tmp_path.rglob("*"))
    assert first.layers == (1, 3) and not any("partial" in path for path in held)
    with pytest.raises(InputError, match=r"already holds .*; choose another folder"):
        write_vector(a_vector(5), folder, name)
    assert read_vector(folder).layers == (1, 3) and sorted(p.name for p in tmp_path.rglob("*")) == held


@pytest.mark.parametrize("name", ["caa", "numpy", "persona_vectors"])
def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    room = [1] if name != "persona_vectors" else []

    def write_while_there_is_room(path: Path, data: bytes) -> None:
        if not room:
            raise InputError("no room")
        room.pop()
        write_file(path, data)

    monkeypatch.setattr(interchange, "write_file", write_while_there_is_room)
    with pytest.raises(InputError, match="no room"):
        write_vector(a_vector(1, 3), tmp_path / "v", name)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- command line


def test_convert_says_what_was_written_and_what_could_not_be_carried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(torch.arange(4.0)[:, None] * torch.ones(4, D) + 1, "evil.pt")
    assert cli.main(["-q", "vector", "convert", "evil.pt", "evil.gguf", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["layers"] == [1, 2] and printed["format"] == "gguf" and printed["d_model"] == D
    assert [sentence[:7] for sentence in printed["left_out"]] == ["index 0", "block 0"]
    assert cli.main(["vector", "convert", "evil.gguf", "out", "--to", "caa", "--layer", "2"]) == 0
    assert (
        capsys.readouterr().out
        == f"out (caa): blocks 2, width {D}\nnot carried: index 0, the embedding, is no block\n"
    )
    # Index 3 of the first file, row 2 of its blocks, file 2 of the last.
    assert torch.load("out/vec_layer_2.pt", weights_only=True).tolist() == [4.0] * D


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["missing.gguf", "out.pt"], "no vector at missing.gguf"),
        (["evil.pt", "out.gguf", "--layer", "9"], "layer 9 of the vector"),
        (["layer_1.npy", "out.gguf", "--layer", "5"], "named as the vector of block 1, but layer 5"),
        (["evil.pt", "out.gguf", "--from", "nothing"], "unknown vector format 'nothing'"),
        (["evil.pt", "out.nothing"], "cannot be told from its name"),
        (["evil.pt", "evil", "--to", "empathy_probes"], "evil is a folder, expected a file"),
        (["evil.pt"], "the following arguments are required: OUT"),
    ],
)
def test_a_bad_conversion_is_one_line_and_exit_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(torch.ones(4, D), "evil.pt")
    np.save("layer_1.npy", np.ones(D))
    Path("evil").mkdir()
    assert cli.main(["vector", "convert", *options]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["evil", "evil.pt", "layer_1.npy"]
