"""`vtprune bench`: what it lists, runs and hands on; and what benchmarks share, on small things. Nothing is timed."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.test_cli import failure
from vtprune import _bench, load_tiny
from vtprune.cli import main
from vtprune.errors import VtpruneError
from vtprune.eval.questions import draw_items
from vtprune.eval.subject import Answers, Subject

ROOT = Path(__file__).parents[1]
NAMES = ["demo", "frame_budgets", "house_default", "inside", "kernels", "photos", "prefill", "selection", "video"]
STUB = '''"""A stub: what it was told.

More of it.
"""

import os
import signal
import sys


def main() -> None:
    print(sys.argv[1:], flush=True)
    if "--help" in sys.argv:
        sys.exit(0)
    if "--die" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(sys.argv[1]))


main()
'''
SLEEPER = '''"""A sleeper."""

import sys
import time


def main() -> None:
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("told", flush=True)
        sys.exit(130)


main()
'''


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of benchmarks that do next to nothing, in place of the real one."""
    (tmp_path / "recording.py").write_text('"""What they share."""\n')
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    monkeypatch.setattr(_bench, "folder", lambda: tmp_path)
    return tmp_path


@pytest.mark.parametrize("arguments", [[], ["--list"]])
def test_benchmarks_are_listed_with_their_rows(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(["bench", *arguments]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line[0] != " " and line[0] != "b"] == NAMES
    rows = len((ROOT / "benchmarks" / "results" / f"{NAMES[-1]}.csv").read_text().splitlines()) - 1
    assert shown.split()[-1] == str(rows)


def test_rows_that_hold_no_times_are_counted_apart(capsys: pytest.CaptureFixture[str], stubs: Path) -> None:
    (stubs / "results").mkdir()
    (stubs / "results" / "stub.csv").write_text("arm,measured\na,yes\nb,not measured\nc,\n")
    assert main(["bench"]) == 0
    shown = capsys.readouterr().out
    assert "A stub: what it was told." in shown and "More" not in shown
    assert "3 (1 not measured)" in shown and "recording" not in shown


def test_every_benchmark_says_what_it_is() -> None:
    found = _bench.benchmarks(_bench.folder())
    assert list(found) == NAMES
    assert all(benchmark.about.endswith((".", "?")) for benchmark in found.values())


@pytest.mark.parametrize(("name", "says"), [("kernel", "did you mean 'kernels'?"), ("recording", "expected one of")])
def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str], name: str, says: str) -> None:
    message = failure(capsys, "bench", name)
    assert says in message and f"there is no benchmark {name!r}" in message


def test_a_missing_folder_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bench, "__file__", str(tmp_path / "vtprune" / "_bench.py"))
    assert "run this in a checkout" in failure(capsys, "bench", "kernels")


def test_an_installed_package_has_the_benchmarks_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "vtprune" / "_benchmarks"
    inside.mkdir(parents=True)
    (inside / "recording.py").touch()
    monkeypatch.setattr(_bench, "__file__", str(tmp_path / "vtprune" / "_bench.py"))
    assert _bench.folder() == inside


@pytest.mark.parametrize(
    ("arguments", "code"), [(["0", "--csv", "a b"], 0), (["7"], 7), (["--help"], 0), (["--die"], 137)]
)
def test_arguments_and_exit_codes_are_handed_through(
    capfd: pytest.CaptureFixture[str], stubs: Path, arguments: list[str], code: int
) -> None:
    assert main(["bench", "stub", *arguments]) == code
    assert capfd.readouterr().out.strip() == str(arguments)


@pytest.mark.skipif(os.name == "nt", reason="interrupts are sent to a process")
def test_an_interrupt_ends_the_benchmark_too(stubs: Path) -> None:
    code = "import sys; from pathlib import Path; from vtprune import _bench, cli; _bench._PATIENCE = 0.2; "
    code += f"_bench.folder = lambda: Path({str(stubs)!r}); sys.exit(cli.main(['bench', 'sleeper']))"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stdout.read() == "told\n"
        assert process.stderr.read() == "interrupted\n"


def test_help_names_what_to_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0 and "vtprune bench kernels --csv" in capsys.readouterr().out


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets modules of the folder be imported as the scripts there do, and forgets them afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setitem(sys.modules, "kernels", None)
    yield
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"kernels"}
    for name in names & (set(sys.modules) - before):
        del sys.modules[name]


@pytest.fixture
def recording(scripts: None) -> ModuleType:
    import recording

    return recording


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_appended_under_one_header(recording: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    recording.append_rows(path, [{"arm": "x", "ms": 1.5}])
    recording.append_rows(path, [{"arm": "y"}, {"ms": 2, "arm": "z"}])
    assert path.read_text().splitlines() == ["arm,ms", "x,1.5", "y,", "z,2"]


def test_new_columns_are_added_to_an_old_file(recording: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('arm,ms\r\n"a, b",1\r\n')
    recording.append_rows(path, [{"shape": "large", "arm": "c", "ms": None}])
    old, new = rows_of(path)
    assert old == {"arm": "a, b", "ms": "1", "shape": ""} and new == {"arm": "c", "ms": "", "shape": "large"}
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]


def test_a_row_of_a_wrong_length_is_not_guessed_at(recording: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("arm,ms\nx,1,2\n")
    with pytest.raises(SystemExit, match="more cells than the header"):
        recording.append_rows(path, [{"arm": "y", "ms": 1}])
    assert path.read_text() == "arm,ms\nx,1,2\n"


def test_what_was_not_measured_is_said_once_until_it_is(recording: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    unknown = {"arm": "x", "N": 4, "ms": "", "measured": "not measured", "commit": "one"}
    for commit in ("one", "two"):
        recording.append_rows(path, [unknown | {"commit": commit}, unknown | {"N": 5}])
    assert [(row["N"], row["commit"]) for row in rows_of(path)] == [("4", "one"), ("5", "one")]
    recording.append_rows(path, [unknown | {"ms": 2.0, "measured": "yes", "commit": "three"}])
    assert [(row["N"], row["measured"]) for row in rows_of(path)] == [("5", "not measured"), ("4", "yes")]


def test_kernels_choose_what_the_step_loops_choose(scripts: None) -> None:
    import kernel_choices
    from kernel_cases import Setting

    shape = {"S": 2, "N": 40, "K": 7, "D": 16}
    for name in kernel_choices.RULES:
        case = kernel_choices.choice_case(Setting(device="cpu", dtype=torch.float32), name, shape)
        inputs = case.draw(torch.Generator().manual_seed(0))
        case.check(inputs)
        assert case.agreement is not None and case.agreement(inputs, case.arm("ours")) > 0.8, name


def test_arms_that_choose_otherwise_are_found_out(scripts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import kernel_choices
    from kernel_cases import Arm, Disagreement

    rule = kernel_choices.RULES["mmr"]
    wrong = Arm(name="wrong", run=lambda inputs: kernel_choices._loop(rule, inputs).flip(1))
    with pytest.raises(Disagreement, match="wrong chooses"):
        kernel_choices._check(rule, [wrong], "cpu")


def test_a_floor_is_the_larger_of_two(scripts: None) -> None:
    from kernel_cases import Bound, Work

    work = Work(bytes=100, operations=300)
    assert work.floor_ms(10, 100) == (10, "bytes") and work.floor_ms(100, 10) == (30, "operations")
    assert Bound(column="ratio", sign=">=", value=20).holds({"ratio": 20.5})
    assert not Bound(column="ratio", sign="<=", value=0.3).holds({"ratio": 0.4})


def test_large_shapes_have_the_sizes_of_their_checkpoints(scripts: None) -> None:
    import shapes
    from transformers import AutoModelForImageTextToText

    wanted = {"llava-1.5-7b": 7.06, "llava-next-7b": 7.06, "qwen2.5-vl-7b": 8.29}
    for name, billions in wanted.items():
        shape = shapes.SHAPES[name]
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(shape.config(shape))
        assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(billions, abs=5e-3)


def test_arms_of_frame_budgets_keep_equally_many_tokens(scripts: None) -> None:
    """Two questions about a clip for development; intervals of so few are the whole range."""
    import frame_budgets

    items = draw_items("dev", 5, 1, "video")[:2]
    model, processor = load_tiny("llava_next_video")
    right = frame_budgets.right_answers(Subject(model=model, processor=processor), items)
    rows = frame_budgets.rows_of(right, items, "dev")
    assert len(rows) == 11 and {(row["clips"], row["questions"], row["low"], row["high"]) for row in rows} == {
        (1, 2, 0.0, 1.0)
    }
    apart = {row["arm"]: row["minus_equal"] for row in rows if row["minus_equal"] is not None}
    assert list(apart) == ["quota pool yes", "quota pool change", "quota prune yes", "quota prune change"]
    accuracy = {row["arm"]: row["accuracy"] for row in rows}
    assert apart["quota pool yes"] == pytest.approx(accuracy["quota pool yes"] - accuracy["quota pool equal"])
    assert "| quota prune equal |" in frame_budgets.table(rows)
    with pytest.raises(VtpruneError, match="quota pool yes kept 7, 8 tokens of a clip, expected 8"):
        frame_budgets.checked(frame_budgets.ARMS[0], Answers(words=("a", "b"), kept=(8.0, 7.0), tokens=None), 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be measured")
def test_without_a_gpu_its_rows_are_marked(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    arguments = ["--preset", "gpu", "--kernels", "mmr", "cls_attention", "--csv", str(path)]
    assert main(["bench", "kernels", *arguments]) == 0
    rows = rows_of(path)
    assert {row["measured"] for row in rows} == {"not measured"}
    assert not any(row[name] for row in rows for name in ("median_ms", "ratio", "floor_ms", "device", "within"))
    assert {row["bound"] for row in rows if row["kernel"] == "mmr" and row["arm"] == "per-step loop"} == {
        "ratio >= 20",
        "ratio >= 10",
    }
