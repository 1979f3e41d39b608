"""The command line, in this process."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vtprune
from tests.test_calibration import SETTINGS, made
from vtprune import _console as console
from vtprune._arguments import check_writable
from vtprune.cli import main
from vtprune.tiny import PICTURE, loading


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What stderr says when the command fails as a user's mistake."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err
    return captured.err.removeprefix("error: ").strip()


def row(output: str, name: str) -> list[str]:
    return next(line.removeprefix(name).split() for line in output.splitlines() if line.startswith(name))


def test_run_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run"]) == 0
    captured = capsys.readouterr()
    shown = captured.out
    assert "Loading weights" not in captured.err
    assert "prompt: what color is the cross ?" in shown
    assert row(shown, "answer") == ["orange", "orange"]
    assert row(shown, "visual tokens") == ["256", "64", "of", "256"]
    assert row(shown, "prompt length") == ["267", "75"]
    assert row(shown, "KV cache saved") == ["0.00", "MiB", "1.50", "MiB"]
    assert row(shown, "select ms")[0] == row(shown, "cut ms")[0] == "-"
    assert "best of 5 on" in shown and "no benchmark; prefill is the language model alone" in shown
    for part in ("encode", "layout", "select", "cut", "prefill", "total"):
        assert float(row(shown, f"{part} ms")[-1]) >= 0


def test_run_with_everything(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report, kept = tmp_path / "runs.jsonl", tmp_path / "kept.png"
    arguments = ["run", "--model", "tiny:llava", "--image", str(PICTURE), "--prompt", "what shape is red ?"]
    arguments += ["--method", "vtprune", "--keep", "32", "--per", "part", "--positions", "keep", "--set", "lam=0.3"]
    arguments += ["--max-new-tokens", "1", "--report", str(report), "--overlay", str(kept), "--device", "cpu"]
    assert main(arguments) == 0
    assert row(capsys.readouterr().out, "answer") == ["circle", "circle"]
    (line,) = report.read_text().splitlines()
    written = json.loads(line)
    assert (written["method"], written["positions"], written["kept"]) == ("vtprune", "keep", 32)
    assert Image.open(kept).size == (384, 384)
    assert main(arguments) == 0
    assert len(report.read_text().splitlines()) == 2


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of the bundled model that was made up."""
    model, _ = vtprune.load_tiny("llava")
    path = tmp_path_factory.mktemp("calibrated") / "tiny.json"
    made(model, settings=SETTINGS, depth=8, horizon=5, pictures=3).write(path)
    return path


@pytest.mark.parametrize(
    ("arguments", "method", "told"),
    [
        (["--method", "fastervlm", "--debias", "trend"], "fastervlm+trend", ""),
        (["--method", "fastv", "--keep", "0.5", "--debias", "recency"], "fastv+recency", "measured on 3 pictures"),
        (["--method", "vflowopt"], "vflowopt", "measured on 3 pictures"),
    ],
)
def test_attention_is_debiased_and_what_was_measured_is_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, calibrated: Path, arguments: list[str], method: str, told: str
) -> None:
    report = tmp_path / "runs.jsonl"
    known = ["--calibration", str(calibrated)] if told else []
    assert main(["run", *arguments, *known, "--max-new-tokens", "1", "--report", str(report)]) == 0
    captured = capsys.readouterr()
    assert row(captured.out, "")[:3] == ["all", "tokens", method] or method in captured.out
    assert captured.err.count("warning") == bool(told) and told in captured.err
    assert json.loads(report.read_text())["method"] == method


def test_a_calibration_that_is_not_used_is_refused(capsys: pytest.CaptureFixture[str], calibrated: Path) -> None:
    """By the method, and by another model."""
    assert "'divprune' uses nothing of it" in failure(
        capsys, "run", "--method", "divprune", "--calibration", str(calibrated)
    )
    arguments = ["--model", "tiny:qwen2_5_vl", "--method", "adaptinfer", "--keep", "0.5"]
    assert "one of mine, and this is another model" in failure(
        capsys, "run", *arguments, "--calibration", str(calibrated)
    )


def test_a_model_in_a_directory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--model", str(loading.tiny_folder("llava")), "--max-new-tokens", "4"]) == 0
    assert row(capsys.readouterr().out, "answer") == ["orange", "orange"]


def test_a_prompt_that_holds_the_image_token_is_taken_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--prompt", "user : what shape is red ? <image> assistant :"]) == 0
    assert row(capsys.readouterr().out, "visual tokens") == ["256", "64", "of", "256"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--keep", "0"], "keep=0: expected at least 1 token"),
        (["--keep", "1.5"], "keep=1.5: expected a share"),
        (["--keep", "nan"], "keep=nan"),
        (["--keep", "lots"], "--keep lots: expected a share such as 0.25"),
        (["--method", "divprun"], "did you mean 'divprune'"),
        (["--keep", "1_0"], "--keep 1_0: expected a share such as 0.25"),
        (["--keep", "\u0661\u0660"], "expected a share such as 0.25"),
        (["--keep", "0_1.5"], "expected a share such as 0.25"),
        (["--method", "identity", "--keep", "0.5"], "use keep=1.0"),
        (["--set", "lam"], "expected NAME=VALUE"),
        (["--set", "lambda=1"], "has no parameter 'lambda'"),
        (["--set", "lam=0.1", "--set", "lam=0.2"], "given twice"),
        (["--set", "lam=2"], "lam=2: expected"),
        (["--model", "tiny:lava"], "did you mean 'llava'"),
        (["--model", "./nowhere"], "there is no such directory"),
        (["--max-new-tokens", "0"], "expected 1 or more"),
        (["--device", "toaster"], "--device toaster: no such device; expected auto, cpu, cuda, cuda:1 or mps"),
        (["--device", "meta"], "--device meta: not usable here"),
        (["--image", "nowhere.png"], "no picture at nowhere.png"),
        (["--image", "."], "is not a file"),
        (["--overlay", "nowhere/kept.png"], "there is no directory"),
        (["--overlay", "kept.docx"], "must end like a picture"),
        (["--overlay", "kept.psd"], "does not write it; try .png"),
        (["--overlay", "kept.mpg"], "does not write it; try .png"),
        (["--report", "."], "it is a directory"),
        (["--report", "x" * 300], "cannot write xxx"),
        (["--report", ""], "--report is empty: expected the name of a file"),
        (["--overlay", ""], "--overlay is empty"),
        (["--image", " "], "--image is empty"),
        (["--prompt", ""], "--prompt is empty: expected a question"),
        (["--prompt", " \t"], "--prompt is empty"),
        (["--prompt", "<image> <image> what ?"], "the processor does not take this"),
        (["--debias", "sink"], "--debias sink: expected one of recency, cubic, sinks, padding, trend"),
        (["--debias", "True"], "--debias True: expected one of"),
        (["--debias", "sinks", "--method", "divprune"], "method 'divprune' looks at no attention"),
        (
            ["--debias", "sinks", "--method", "flowcut"],
            "no attention that debiasers reach: it chooses inside the encod",
        ),
        (["--debias", "trend", "--method", "fastv"], "cuts between layers, where grids have holes"),
        (["--calibration", "nowhere.json"], "calibration='nowhere.json' cannot be read"),
        (["--calibration", ""], "--calibration is empty: expected the name of a file"),
        (["--calibration", "a.json", "--report", "./a.json"], "this is the file of --calibration"),
        (["--calibration", str(PICTURE)], "write one with `vtprune calibrate`"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    message = failure(capsys, "run", *arguments)
    assert says in message and "\n" not in message


def test_outputs_must_not_overwrite_the_picture_or_each_other(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = PICTURE.read_bytes()
    Path("in.png").write_bytes(data)
    Path("link.png").symlink_to("in.png")
    Path("hard.png").hardlink_to("in.png")
    for option in ("--overlay", "--report"):
        for name in ("in.png", str(tmp_path / "in.png"), "link.png", "hard.png"):
            assert "the file of --image" in failure(capsys, "run", "--image", "in.png", option, name)
    assert "the file of --report" in failure(capsys, "run", "--report", "a.png", "--overlay", "./a.png")
    assert Path("in.png").read_bytes() == data and not Path("a.png").exists()


@pytest.mark.parametrize("option", ["--report", "--overlay"])
def test_outputs_are_tried_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    def refuse(**options: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(console, "load_model", None)
    assert "out.png: Permission denied" in failure(capsys, "run", option, str(tmp_path / "out.png"))


def test_trying_an_output_makes_no_file_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor takes one away: another run may have begun to write it."""
    path, real = tmp_path / "out.csv", tempfile.TemporaryFile

    def beside(**options: Any) -> Any:
        assert not path.exists()
        path.write_text("of another run")
        return real(**options)

    monkeypatch.setattr(tempfile, "TemporaryFile", beside)
    check_writable(path)
    assert path.read_text() == "of another run"


def test_a_report_that_cannot_be_written_leaves_the_overlay(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vtprune.PruneReport, "write_jsonl", full)
    kept = tmp_path / "kept.png"
    assert "No space left" in failure(capsys, "run", "--report", str(tmp_path / "r.jsonl"), "--overlay", str(kept))
    assert Image.open(kept).size == (384, 384)


def test_a_warning_is_one_line_without_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--keep", "1", "--max-new-tokens", "1"]) == 0
    told = capsys.readouterr().err
    assert "warning: keep=1 keeps a single token per picture" in told
    assert "UserWarning" not in told and ".py" not in told


def test_identity_keeps_everything_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--method", "identity", "--max-new-tokens", "1"]) == 0
    shown = capsys.readouterr().out
    assert row(shown, "visual tokens") == ["256", "256", "of", "256"] and row(shown, "select ms") == ["-", "-"]


def test_an_unknown_option_shows_the_usage_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", "--fooo"])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "usage: vtprune run" in told and "unrecognized arguments: --fooo" in told


def test_an_interrupt_at_start_up_gives_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vtprune.cli._parser", interrupted)
    assert main(["run"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_directories_that_hold_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "cannot load" in failure(capsys, "run", "--model", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "cannot load" in failure(capsys, "run", "--model", str(tmp_path))


def test_files_that_are_no_pictures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("not a picture")
    cut.write_bytes(PICTURE.read_bytes()[:5000])
    assert "not a picture that Pillow can read" in failure(capsys, "run", "--image", str(text))
    assert "cannot read the picture" in failure(capsys, "run", "--image", str(cut))


@pytest.mark.parametrize("side", [8_000, 100_000])
def test_pictures_too_large_are_refused_before_they_are_decoded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, side: int
) -> None:
    path = tmp_path / "large.ppm"
    path.write_bytes(b"P6 %d %d 255\n" % (side, side))
    assert "at most 50 megapixels" in failure(capsys, "run", "--image", str(path))


@pytest.mark.parametrize("columns", [80, 200])
def test_tables_do_not_break_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for command, names in (("methods", vtprune.list_methods()), ("families", vtprune.list_families())):
        assert main([command]) == 0
        shown = capsys.readouterr().out
        assert set(names) <= {line.split(" ")[0] for line in shown.splitlines()}
        assert max(map(len, shown.splitlines())) <= columns
        assert "importance" in shown or command == "families"


def test_methods_and_families(capsys: pytest.CaptureFixture[str]) -> None:
    for command, names in (("methods", vtprune.list_methods()), ("families", vtprune.list_families())):
        for option in ([], ["--markdown"]):
            assert main([command, *option]) == 0
            shown = capsys.readouterr().out
            assert all(name in shown for name in names)


def test_describe(capsys: pytest.CaptureFixture[str]) -> None:
    for name in vtprune.list_methods():
        assert main(["describe", name]) == 0
        assert capsys.readouterr().out.strip() == str(vtprune.describe(name))
    assert "did you mean 'uniform'" in failure(capsys, "describe", "unifrom")


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    machine = capsys.readouterr().out
    assert "torch " in machine and "torchvision" in machine and "devices cpu" in machine
    assert "kernels t" in machine and "clips pyav reads them; decord" in machine
    assert main(["doctor", "tiny:llava"]) == 0
    shown = capsys.readouterr().out
    assert "seam LlavaModel -> LlamaModel" in shown
    assert "image placeholder id 4; cls_attention" in shown
    assert "cache DynamicCache" in shown
    assert row(shown, "unsupported") == ["nothing"]


def test_doctor_names_what_a_model_cannot_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = json.loads((loading.tiny_folder("llava") / "config.json").read_text())
    config["vision_config"] = {
        "model_type": "pixtral",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["doctor", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "no encoder attention, features only" in shown
    assert "unsupported fastervlm: method 'fastervlm' needs 'importance'" in shown.replace("\n", " ")
    assert "divprune" in " ".join(row(shown, "methods"))


def test_doctor_on_a_model_without_a_seam(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    assert main(["doctor", str(tmp_path)]) == 0
    assert "this model cannot be pruned" in capsys.readouterr().out


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    teaching = (
        (["--help"], "vtprune run --method random"),
        (["run", "--help"], "--set lam=0.3"),
        (["run", "--help"], "--debias recency --calibration"),
        (["calibrate", "--help"], "--keep 0.5 0.25 0.1 --trials 48"),
        (["eval", "--help"], "with and without"),
    )
    for arguments, says in teaching:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert says in capsys.readouterr().out
