"""The command line and the output folder, as another program meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import CHAT, rows, shared, tiny_llama, word_tokenizer
from safetensors import safe_open

from empathy_probes import cli
from empathy_probes.attenuation import COLUMNS, ONSET_COLUMNS
from empathy_probes.concepts import load_neutral
from empathy_probes.errors import StoreError
from empathy_probes.ledger import LEDGER_COLUMNS
from empathy_probes.study import load_study


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folders: base, aligned (with a chat template), narrow, other."""
    root = tmp_path_factory.mktemp("models")
    for name, seed, template, changes in (
        ("base", 0, None, {}),
        ("aligned", 1, CHAT, {}),
        ("plain", 1, None, {}),
        ("narrow", 2, None, {"hidden_size": 64}),
    ):
        tiny_llama(seed, **changes).save_pretrained(root / name)
        word_tokenizer(template).save_pretrained(root / name)
    (root / "empty").mkdir()
    return root


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with stimuli files in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMPATHY_PROBES_STORE", str(tmp_path / "store"))
    for i, name in enumerate(["colour", *(f"control{k}" for k in range(6))]):
        lines = rows(32, seed=i, concept=name)
        Path(f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf8")
    return tmp_path


def compare(models: Path, *options: str, base: str = "base", aligned: str = "aligned") -> list[str]:
    return [
        "compare",
        str(models / base),
        str(models / aligned),
        "--device",
        "cpu",
        "--draws",
        "199",
        *options,
    ]


CONTROLS = ("--controls", ",".join(f"control{k}.jsonl" for k in range(6)))


def test_compare_writes_the_whole_folder_of_the_contract(models: Path, files: Path, capsys: Any) -> None:
    assert cli.main(compare(models, "--stimuli", "colour.jsonl", *CONTROLS, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    out = files / "runs" / "base-vs-aligned"
    assert printed["report"] == "runs/base-vs-aligned/report.html" and len(printed["headlines"]) == 2
    made = {
        p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and p.parent.name != "vectors"
    }
    assert made == {
        "study.json",
        "attenuation.csv",
        "onset.csv",
        "ledger.csv",
        "summary.csv",
        "arrays.safetensors",
        "report.html",
    }
    for name, columns in (("attenuation", COLUMNS), ("onset", ONSET_COLUMNS), ("ledger", LEDGER_COLUMNS)):
        assert tuple(pd.read_csv(out / f"{name}.csv").columns) == tuple(columns)
    assert "nan" not in (out / "attenuation.csv").read_text().lower()
    with safe_open(out / "vectors" / "colour.aligned.shared.resid_post.safetensors", "pt") as file:
        assert file.get_tensor("direction").shape == (4, 32)
        header = json.loads(file.metadata()["empathy_probes"])
    assert header["concept"] == "colour" and header["layers"] == [0, 1, 2, 3]
    record = json.loads((out / "study.json").read_text())
    assert (
        record["schema_version"] == 1
        and record["manifest"]["base"]["weights"] != record["manifest"]["aligned"]["weights"]
    )


def test_the_same_study_again_is_loaded_and_another_one_there_is_refused(
    models: Path, files: Path, capsys: Any
) -> None:
    command = compare(models, "--stimuli", "colour.jsonl", "--template", "raw", "--out", "out")
    assert cli.main(command) == 0
    first = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    assert cli.main(command) == 0
    assert {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()} == first
    capsys.readouterr()
    assert cli.main([*command, "--seed", "1"]) == 2
    assert "holds another study" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()} == first


def test_report_rebuilds_the_same_bytes_and_notices_a_changed_folder(
    models: Path, files: Path, capsys: Any
) -> None:
    cli.main(compare(models, "--stimuli", "colour.jsonl", "--template", "raw", "--out", "out"))
    before = Path("out/report.html").read_bytes()
    Path("out/report.html").unlink()
    assert cli.main(["report", "out"]) == 0
    assert Path("out/report.html").read_bytes() == before
    with Path("out/attenuation.csv").open("a") as file:
        file.write("x")
    assert cli.main(["report", "out"]) == 2
    assert "was changed" in capsys.readouterr().err
    with pytest.raises(StoreError, match="no study in"):
        load_study(files)


def test_run_reads_a_study_file_and_means_the_same_as_compare(models: Path, files: Path) -> None:
    Path("study.toml").write_text(
        f'base = "{models / "base"}"\naligned = "{models / "aligned"}"\nstimuli = ["colour.jsonl"]\n'
        'template = "raw"\ndevice = "cpu"\ndraws = 199\nlayers = "0,2-3"\n'
    )
    assert cli.main(["run", "study.toml", "--out", "a"]) == 0
    command = compare(
        models, "--stimuli", "colour.jsonl", "--template", "raw", "--layers", "0,2-3", "--out", "b"
    )
    assert cli.main(command) == 0
    for name in (
        "attenuation.csv",
        "onset.csv",
        "ledger.csv",
        "study.json",
        "report.html",
        "arrays.safetensors",
    ):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes(), name


def test_identical_models_need_leave_and_then_nothing_differs(models: Path, files: Path, capsys: Any) -> None:
    same = compare(models, "--stimuli", "colour.jsonl", *CONTROLS, "--out", "same", aligned="base")
    assert cli.main(same) == 2
    assert "identical weights" in capsys.readouterr().err and not Path("same").exists()
    assert cli.main([*same, "--allow-identical"]) == 0
    frame = pd.read_csv("same/attenuation.csv")
    scored = frame[frame.measure == "strength"]
    for column in ("difference", "attenuation", "band_lower", "band_upper"):
        assert (scored[column] == 0).all()
    assert (scored[scored.role == "target"][["specific", "specific_lower", "specific_upper"]] == 0).all(
        axis=None
    )
    assert set(scored.decision) == {"equivalent"}


def test_dry_run_prints_the_plan_and_writes_nothing(models: Path, files: Path, capsys: Any) -> None:
    command = compare(models, "--stimuli", "colour.jsonl", "--dry-run", "--json")
    assert cli.main(command) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (
        plan["prompts"] == (64 + len(load_neutral())) * 2 * 2
        and plan["templates"] == ["raw", "shared"]
        and plan["seconds"] >= 0
    )
    assert plan["layers"] == [-1, 0, 1, 2, 3]
    assert cli.main(command[:-1]) == 0
    assert "about" in capsys.readouterr().out
    assert not Path("runs").exists() and not Path("store").exists()


def test_store_info_and_clear(models: Path, files: Path, capsys: Any) -> None:
    cli.main(compare(models, "--stimuli", "colour.jsonl", "--template", "raw"))
    capsys.readouterr()
    assert cli.main(["store", "--json"]) == 0
    assert (
        json.loads(capsys.readouterr().out)["entries"] == 5
    )  # the concept and the neutral texts in two models, and the measurement
    assert cli.main(["store", "clear"]) == 0
    cli.main(["store", "info", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["entries"] == 0


def test_concepts_lists_what_is_shipped(capsys: Any) -> None:
    assert cli.main(["concepts", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert set(listed[0]) == {"name", "role", "mechanism", "dimension", "speaker", "n_scenarios", "digest"}
    assert {"valence", "distance", "tense", "number"} <= {row["name"] for row in listed}
    assert cli.main(["concepts"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert heads[0] == "sentiment_attenuation" and heads[-1] == "controls" and len(heads) == 5
    assert {line.split()[0] for line in lines if line.startswith(" ")} == {row["name"] for row in listed}


BAD = {
    "unknown model path": (["compare", "/no/such/model", "{m}/base"], "/no/such/model"),
    "no checkpoint there": (["compare", "{m}/empty", "{m}/base"], "no config.json"),
    "mismatched pair": (["compare", "{m}/base", "{m}/narrow", "--stimuli", "colour.jsonl"], "d_model"),
    "no aligned model": (["compare", "{m}/base", "--stimuli", "colour.jsonl"], "got one model"),
    "malformed line": (["compare", "{m}/base", "{m}/plain", "--stimuli", "malformed.jsonl"], "line 2 is not JSON"),
    "missing field": (["compare", "{m}/base", "{m}/plain", "--stimuli", "missing.jsonl"], "field 'label'"),
    "single class": (["compare", "{m}/base", "{m}/plain", "--stimuli", "single.jsonl"], "every label is"),
    "one text": (["compare", "{m}/base", "{m}/plain", "--stimuli", "onetext.jsonl"], "scenario 'lonely'"),
    "empty file": (["compare", "{m}/base", "{m}/plain", "--stimuli", "empty.jsonl"], "holds no stimuli"),
    "too long": (["compare", "{m}/base", "{m}/plain", "--stimuli", "long.jsonl"], "expected at most 64"),
    "not UTF-8": (["compare", "{m}/base", "{m}/plain", "--stimuli", "latin.jsonl"], "not UTF-8"),
    "too few": (["compare", "{m}/base", "{m}/plain", "--stimuli", "few.jsonl"], "expected at least 30"),
    "category missing": (
        ["compare", "{m}/base", "{m}/plain", "--stimuli", "categories.jsonl"], "got no text of "
    ),
    "unknown concept": (["compare", "{m}/base", "{m}/plain", "--concepts", "joy"], "unknown concept 'joy'"),
    "unknown option": (["compare", "{m}/base", "{m}/plain", "--colour", "red"], "unrecognized arguments: --colour"),
    "unknown command": (["measure"], "invalid choice: 'measure'"),
    "no command": ([], "required: COMMAND"),
    "bad template": (["compare", "{m}/base", "{m}/plain", "--template", "both2"], "invalid choice: 'both2'"),
    "template missing": (["compare", "{m}/base", "{m}/plain", "--stimuli", "colour.jsonl", "--template", "shared"], "has none"),
    "bad layers": (["compare", "{m}/base", "{m}/plain", "--stimuli", "colour.jsonl", "--layers", "2-9"], "4 blocks"),
    "bad margin": (["compare", "{m}/base", "{m}/plain", "--stimuli", "colour.jsonl", "--margin", "2"], "margin got 2.0"),
    "bad dtype": (["compare", "{m}/base", "{m}/plain", "--stimuli", "colour.jsonl", "--dtype", "int3"], "unknown dtype"),
    "bad site": (["compare", "{m}/base", "{m}/plain", "--stimuli", "colour.jsonl", "--sites", "resid"], "unknown site"),
    "bad store": (["compare", "{m}/base", "{m}/plain", "--stimuli", "colour.jsonl", "--store", "zz://x"], "cannot be opened"),
    "empty option": (["compare", "{m}/base", "{m}/plain", "--concepts", ""], "--concepts got an empty name"),
    "none and names": (["compare", "{m}/base", "{m}/plain", "--controls", "none,tense"], "none beside names"),
    "abbreviation": (["compare", "{m}/base", "{m}/plain", "--conce", "tense"], "unrecognized arguments"),
    "bad device": (["compare", "{m}/base", "{m}/plain", "--stimuli", "colour.jsonl", "--device", "bogus"], "device 'bogus'"),
    "too many draws": (["compare", "{m}/base", "{m}/plain", "--stimuli", "colour.jsonl", "--draws", "10000000"], "at most"),
    "out under a file": (["compare", "{m}/base", "{m}/plain", "--stimuli", "colour.jsonl", "--out", "colour.jsonl/x"], "cannot be made"),
    "out is here": (["compare", "{m}/base", "{m}/plain", "--stimuli", "colour.jsonl", "--out", "."], "working folder"),
    "store is a file": (["store", "--store", "colour.jsonl"], "is a file"),
    "damaged study": (["report", "damaged"], "study.json is damaged"),
    "out is taken": (["compare", "{m}/base", "{m}/plain", "--stimuli", "colour.jsonl", "--out", "taken"], "other files"),
    "unknown key": (["run", "bad.toml"], "unknown key 'colour'"),
    "wrong type": (["run", "type.toml"], "key 'draws': got 'many'"),
    "no study": (["report", "taken"], "no study.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input_exits_2_with_one_sentence_and_leaves_nothing(
    models: Path, files: Path, capsys: Any, case: str
) -> None:
    lines = rows(32)
    made: dict[str, Any] = {
        "malformed": [lines[0], "{"],
        "missing": [{k: v for k, v in line.items() if k != "label"} for line in lines],
        "single": [{**line, "label": 1} for line in lines],
        "onetext": [*lines, {**lines[0], "id": "x", "scenario": "lonely"}],
        "empty": [],
        "long": [{**line, "text": "the " * 80} for line in lines],
        "few": lines[:20],
        "categories": [
            {**line, "label": "abc"[line["label"] * (1 + (i in (2, 3)))]} for i, line in enumerate(lines)
        ],
    }
    for name, content in made.items():
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in content)
        Path(f"{name}.jsonl").write_text(text, encoding="utf8")
    Path("latin.jsonl").write_bytes('{"id": "é"}'.encode("latin-1"))
    Path("bad.toml").write_text('base = "b"\ncolour = 1\n')
    Path("type.toml").write_text('base = "b"\ndraws = "many"\n')
    Path("damaged").mkdir()
    Path("damaged/study.json").write_text('{"schema_version": 1}')
    Path("taken").mkdir()
    Path("taken/notes.txt").write_text("mine")
    before = sorted(p.as_posix() for p in files.rglob("*"))
    argv, expected = BAD[case]
    assert cli.main([part.replace("{m}", str(models)) for part in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert expected in captured.err and "usage:" not in captured.err
    assert sorted(p.as_posix() for p in files.rglob("*")) == before


def test_quiet_and_verbose_may_stand_after_the_command(capsys: Any) -> None:
    assert cli.main(["concepts", "-q"]) == 0 and cli.main(["-q", "concepts"]) == 0
    assert cli.main(["concepts", "-v", "--json"]) == 0


def test_verbose_says_what_comes_from_the_store(models: Path, files: Path) -> None:
    command = compare(models, "--stimuli", "colour.jsonl", "--template", "raw")
    said = []
    for out in ("one", "two"):
        argv = [sys.executable, "-m", "empathy_probes", "-v", *command, "--out", out]
        said.append(subprocess.run(argv, capture_output=True, text=True, check=True).stderr)
    assert "nothing from the store, resid_post to run" in said[0]
    assert "resid_post from the store, nothing to run" in said[1]


def test_version_and_help_exit_0() -> None:
    for argv in (["--version"], ["--help"], ["compare", "--help"]):
        done = subprocess.run([sys.executable, "-m", "empathy_probes", *argv], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout and not done.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_study_goes_on_and_ends_with_identical_files(
    models: Path, files: Path, how: signal.Signals
) -> None:
    # A suite that runs in the background may have been started with the interrupt ignored, which children inherit.
    slow = (
        "import signal, sys, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from empathy_probes import cli, extraction\nextraction.PART_SECONDS = 0.0\n"
        "real = extraction._run_batch\n"
        "def slowly(*a):\n    time.sleep(0.2)\n    return real(*a)\n"
        "extraction._run_batch = slowly\n"
        "extraction.extract.__kwdefaults__['budget'] = 60\nsys.exit(cli.main(sys.argv[1:]))"
    )
    options = ["--stimuli", "colour.jsonl", "--template", "raw", "--out", "out", "--store", "cut"]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *compare(models, *options)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(Path().glob("cut/*.parts/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(Path().glob("cut/*.parts/*.safetensors")), "no part was written in two minutes"
    process.send_signal(how)
    assert process.wait(60) == (130 if how == signal.SIGINT else -9)
    assert not Path("out").exists()
    assert cli.main(compare(models, *options)) == 0
    whole = [*options[:4], "--out", "whole", "--store", "whole-store"]
    assert cli.main(compare(models, *options[:3], "raw", *whole[4:])) == 0
    for path in Path("whole").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (Path("out") / path.relative_to("whole")).read_bytes(), path


def test_the_real_english_pair_runs_and_a_third_party_model_too(files: Path, capsys: Any) -> None:
    base, aligned = shared("models", "english-base"), shared("models", "english-aligned")
    command = [
        "compare",
        str(base),
        str(aligned),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--layers",
        "0,4,7",
    ]
    assert cli.main([*command, "--concepts", "distance", "--controls", "tense", "--out", "english"]) == 0
    frame = pd.read_csv("english/attenuation.csv")
    assert set(frame.template) == {"raw", "shared", "did"}
    stories = shared("models", "stories260k")
    options = [
        "--allow-identical",
        "--concepts",
        "tense",
        "--controls",
        "none",
        "--out",
        "stories",
        "--device",
        "cpu",
    ]
    assert cli.main(["compare", str(stories), str(stories), *options]) == 0
    assert "no_chat_template" in Path("stories/attenuation.csv").read_text()
    capsys.readouterr()
    assert cli.main(["compare", str(base), str(stories), "--concepts", "tense", "--out", "x"]) == 2
    assert "does not match" in capsys.readouterr().err


def test_the_built_wheel_runs_the_demo_in_an_empty_folder(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "dist"), str(root)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.stat().st_size < 10e6
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    (tmp_path / "empty").mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "site"),
        "EMPATHY_PROBES_STORE": str(tmp_path / "store"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "empathy_probes", "demo"],
        cwd=tmp_path / "empty", env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "valence: Attenuated by block 3" in done.stdout
    others = [
        line
        for line in done.stdout.splitlines()
        if ": " in line and "valence" not in line and "Report" not in line
    ]
    assert others and not any("Attenuated" in line or "Amplified" in line for line in others)
    report = tmp_path / "empty" / "runs" / "demo" / "report.html"
    assert report.is_file() and str(tmp_path / "site") in subprocess.run(
        [sys.executable, "-c", "import empathy_probes; print(empathy_probes.__file__)"],
        cwd=tmp_path / "empty", env=environment, capture_output=True, text=True,
    ).stdout  # fmt: skip


def test_torch_keeps_its_global_state() -> None:
    before = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.initial_seed())
    cli.main(["concepts"])
    assert (torch.is_grad_enabled(), torch.get_default_dtype(), torch.initial_seed()) == before
