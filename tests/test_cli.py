"""The command line, in this process and in others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vtprune
from vtprune import _console as console
from vtprune.cli import main
from vtprune.tiny import PICTURE, loading

ROOT = Path(__file__).parents[1]


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
    shown = capsys.readouterr().out
    assert "prompt: what color is the cross ?" in shown
    assert row(shown, "answer") == ["orange", "orange"]
    assert row(shown, "visual tokens") == ["256", "64", "of", "256"]
    assert row(shown, "prompt length") == ["267", "75"]
    assert row(shown, "KV cache saved") == ["-", "0.75", "MiB"]
    for part in ("encode", "layout", "select", "cut", "prefill"):
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
        (["--method", "identity"], "use keep=1.0"),
        (["--set", "lam"], "expected NAME=VALUE"),
        (["--set", "lambda=1"], "has no parameter 'lambda'"),
        (["--set", "lam=0.1", "--set", "lam=0.2"], "given twice"),
        (["--set", "lam=2"], "lam=2: expected"),
        (["--model", "tiny:lava"], "did you mean 'llava'"),
        (["--model", "./nowhere"], "there is no such directory"),
        (["--max-new-tokens", "0"], "expected 1 or more"),
        (["--device", "toaster"], "--device toaster: not usable here"),
        (["--image", "nowhere.png"], "no picture at nowhere.png"),
        (["--image", "."], "is not a file"),
        (["--overlay", "nowhere/kept.png"], "there is no directory"),
        (["--overlay", "kept.docx"], "must end like a picture"),
        (["--report", "."], "it is a directory"),
        (["--prompt", "<image> <image> what ?"], "the processor does not take this"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    message = failure(capsys, "run", *arguments)
    assert says in message and "\n" not in message


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


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_pictures_of_any_mode_are_read_as_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.tiff"
    Image.open(PICTURE).convert(mode).save(path)
    picture = console.read_picture(path)
    assert (picture.mode, picture.size) == ("RGB", (128, 128)) and np.asarray(picture).std() > 0


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
    assert "unsupported fastervlm: method 'fastervlm' needs encoder attention" in shown.replace("\n", " ")
    assert "divprune" in " ".join(row(shown, "methods"))


def test_doctor_on_a_model_without_a_seam(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    assert main(["doctor", str(tmp_path)]) == 0
    assert "this model cannot be pruned" in capsys.readouterr().out


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, says in ((["--help"], "vtprune run --method random"), (["run", "--help"], "--set lam=0.3")):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert says in capsys.readouterr().out


def python(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )


def test_as_a_module(tmp_path: Path) -> None:
    done = python(tmp_path, "-m", "vtprune", "run", "--keep", "0.11")
    assert done.returncode == 0, done.stderr
    assert row(done.stdout, "visual tokens") == ["256", "28", "of", "256"]
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_run_where_torchvision_is_absent(tmp_path: Path) -> None:
    code = """
import importlib.util, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torchvision" else find(name, package)
from vtprune.cli import main
code = main(["run"])
assert not any(name.startswith("torchvision") for name in sys.modules)
sys.exit(code)
"""
    done = python(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert row(done.stdout, "answer") == ["orange", "orange"]


def test_help_and_the_parser_import_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys; from vtprune.cli import main, _parser; _parser()\n"
    code += "print([name for name in ('torch', 'transformers', 'numpy', 'PIL', 'rich') if name in sys.modules])"
    done = python(tmp_path, "-c", code)
    assert done.stdout.strip() == "[]", done.stderr
