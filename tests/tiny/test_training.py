"""The training: packed questions are single ones, stages learn, runs go on where they were stopped."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    LlavaForConditionalGeneration,
)

from vtprune import _train
from vtprune.cli import main
from vtprune.errors import BackendUnavailable, InvalidOption, VtpruneError
from vtprune.eval.questions import draw_items
from vtprune.eval.subject import Subject
from vtprune.tiny import loading
from vtprune.tiny.clips import CLIP_KINDS, FRAMES, draw_clip
from vtprune.tiny.drawing import Stream
from vtprune.tiny.scenes import KINDS, SHAPES, TRAIN, ask, draw_scene
from vtprune.tiny.training import run
from vtprune.tiny.training.batches import QUESTIONS, SEEDS, Chance, ClipSource, Source
from vtprune.tiny.training.concepts import UNSURE, label_cells
from vtprune.tiny.training.curve import draw_curve
from vtprune.tiny.training.dropping import choose_cells
from vtprune.tiny.training.export import export_llava
from vtprune.tiny.training.loop import Plan, read_notes, run_stage
from vtprune.tiny.training.optimizer import Optimizer
from vtprune.tiny.training.packing import IGNORE, block_mask, pack_questions
from vtprune.tiny.training.stages import Join, Read, See
from vtprune.tiny.training.students import LlavaStudent, VideoStudent
from vtprune.tiny.training.workers import Worker
from vtprune.tiny.words import END, IMAGE, WORD_IDS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def student() -> LlavaStudent:
    torch.manual_seed(0)
    return LlavaStudent().eval()


def test_blocks_see_the_picture_and_themselves_only():
    mask = block_mask(torch.tensor([[1, 1, 2, 2, 0]]), before=3)[0, 0]
    assert mask[4].tolist() == [True] * 5 + [False] * 3
    assert mask[6].tolist() == [True] * 3 + [False] * 2 + [True] * 2 + [False]


def test_targets_are_the_answer_then_the_end_and_early_the_answer_twice():
    (question,) = [q for q in ask(draw_scene(0), Stream(0)) if q.kind == "count"][:1]
    blocks = pack_questions([[question]], CPU)
    ids, answer, early = blocks.ids[0].tolist(), blocks.answer[0].tolist(), blocks.early[0].tolist()
    colon = ids.index(WORD_IDS[":"])
    word = WORD_IDS[question.answer]
    assert answer[colon : colon + 2] == [word, END]
    assert early[colon - 2 : colon] == [word, word]
    assert sum(target != IGNORE for target in answer) == sum(target != IGNORE for target in early) == 2


def test_labels_say_what_is_drawn():
    scene = next(draw_scene(seed) for seed in range(20) if len(draw_scene(seed).things) == 4)
    cells = label_cells([[scene]], 8)
    share = torch.from_numpy(scene.coverage(8)).float()
    for i, thing in enumerate(scene.things):
        cell = thing.y // 8 * 16 + thing.x // 8
        assert cells.centre[0, cell] == 1
        assert (cells.owner[0] == i).sum() >= 1
    assert cells.centre.sum() == len(scene.things)
    assert ((cells.what[0] == UNSURE) == ((share.sum(0).flatten() > 0) & (share.amax(0).flatten() < 0.15))).all()


@pytest.mark.parametrize("count", [1, 14, 255, 256])
def test_chosen_cells_are_ascending_and_as_many_as_asked_for(count):
    share = (torch.rand(8, 256, generator=Generator().manual_seed(1)) < 0.1).float()
    index = choose_cells(share, count, Generator().manual_seed(2), 16)
    assert index.shape == (8, count)
    assert (index.diff(dim=1) > 0).all()


def test_dropout_is_a_mixture_of_denser_and_sparser_choices():
    share = torch.zeros(400, 256)
    share[:, 100:126] = 1
    kept = choose_cells(share, 64, Generator().manual_seed(0), 16)
    dense = ((kept >= 100) & (kept < 126)).sum(dim=1)
    assert (dense > 22).float().mean() > 0.1
    assert (dense < 2).float().mean() > 0.05


def test_a_question_about_a_hidden_thing_has_no_say(student):
    batch = Source(seed=0, stage=1, patch=8).batch(0, range(4), 4)
    assert batch.answerable(torch.full((4, 3), -1)).sum() == 0
    everything = batch.cells.owner
    answerable = batch.answerable(everything)
    for i, row in enumerate(batch.questions):
        seen = set(everything[i].tolist())
        for k, question in enumerate(row):
            assert answerable[i, k] == (set(question.about) <= seen)


def test_a_step_that_nobody_can_answer_teaches_nothing_of_answers(student, monkeypatch):
    batch = Source(seed=0, stage=1, patch=8).batch(0, range(2), 2)
    monkeypatch.setattr(type(batch), "answerable", lambda self, owner: torch.zeros(2, QUESTIONS, dtype=torch.bool))
    loss, metrics = Read().loss(student, batch, Chance.of(0, 0))
    assert loss.item() == 0
    assert metrics == {}


def test_rows_of_workers_make_up_the_batch_and_seeds_stay_in_the_training_range():
    source = Source(seed=3, stage=2, patch=8, crowded=True)
    whole = source.batch(7, range(6), 6)
    halves = [source.batch(7, Worker(rank, 2).rows(6), 6) for rank in range(2)]
    pixels = torch.cat([half.pixels() for half in halves])
    assert torch.equal(whole.pixels(), pixels)
    assert all(len(row) <= QUESTIONS for row in whole.questions)


@pytest.mark.parametrize("stage", [See(), Read(), Join()], ids=lambda stage: stage.name)
def test_a_stage_gets_better_at_one_batch_and_trains_only_its_parts(stage):
    torch.manual_seed(0)
    student = LlavaStudent()
    batch = Source(seed=0, stage=0, patch=8).batch(0, range(4), 4)
    modules = student.parts(stage.parts)
    inside = {id(weight) for module in modules for weight in module.parameters()}
    before = {name: weight.clone() for name, weight in student.named_parameters()}
    optimizer = Optimizer(modules, steps=100, matrix_rate=0.01, rate=1e-3)
    losses = []
    for step in range(6):
        loss, metrics = stage.loss(student, batch, Chance.of(0, 0))
        loss.backward()
        losses.append(loss.item())
        optimizer.step(step + 40)
        assert all(value == value for value in metrics.values())
    assert losses[-1] < 0.8 * losses[0]
    for name, weight in student.named_parameters():
        if id(weight) not in inside:
            assert torch.equal(weight, before[name]), name


def run_read(folder: Path, steps: int, upto: int) -> LlavaStudent:
    """Train the reading stage of a plan of `steps` steps, stopped after `upto`."""
    torch.manual_seed(0)
    student = LlavaStudent()
    plan = Plan(stage=Read(), number=1, steps=steps, size=2)
    worker = Worker(0, 1)
    if upto < steps:
        run_interrupted(plan, student, worker, folder, upto)
    else:
        run_stage(plan, student, worker, folder, 0, "cpu")
    return student


class Stopped(Exception):
    pass


def run_interrupted(plan, student, worker, folder, upto) -> None:
    class Stopping(Read):
        calls = 0

        def loss(self, *args):
            if Stopping.calls == upto:
                raise Stopped
            Stopping.calls += 1
            return super().loss(*args)

    with pytest.raises(Stopped):
        run_stage(replace(plan, stage=Stopping()), student, worker, folder, 0, "cpu")


def test_a_run_that_was_stopped_ends_like_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr("vtprune.tiny.training.loop.SAVE_EVERY_S", 0.0)
    monkeypatch.setattr("vtprune.tiny.training.loop.NOTE_EVERY", 2)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = run_read(tmp_path / "whole", steps=6, upto=6)
    run_read(tmp_path / "parts", steps=6, upto=3)
    again = run_read(tmp_path / "parts", steps=6, upto=6)
    for (name, mine), theirs in zip(whole.language.state_dict().items(), again.language.state_dict().values()):
        assert torch.equal(mine, theirs), name
    assert [note.step for note in read_notes(tmp_path / "parts" / "read.jsonl")] == [2, 4, 6]


def test_notes_of_steps_that_come_again_are_taken_back(tmp_path, monkeypatch):
    monkeypatch.setattr("vtprune.tiny.training.loop.NOTE_EVERY", 1)
    run_read(tmp_path, steps=4, upto=3)
    assert len(read_notes(tmp_path / "read.jsonl")) == 3
    run_read(tmp_path, steps=4, upto=4)
    assert [note.step for note in read_notes(tmp_path / "read.jsonl")] == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Path:
    """What the command leaves behind after one step a stage, in two processes since that is the default."""
    folder = tmp_path_factory.mktemp("run") / "trial"
    assert main(["train", "llava", "--out", str(folder), "--steps", "1", "--workers", "2", "--device", "cpu"]) == 0
    return folder


def test_a_run_leaves_a_model_that_transformers_loads(trial):
    loaded = LlavaForConditionalGeneration.from_pretrained(trial / "model", dtype=torch.float32)
    assert loaded.config.text_config.num_hidden_layers >= 8
    inputs = AutoProcessor.from_pretrained(trial / "model")(
        images=Image.fromarray(draw_scene(2).pixels),
        text="user : <image> where is the ring ? assistant :",
        return_tensors="pt",
    )
    assert (inputs["input_ids"] == IMAGE).sum() == 256
    assert loaded.generate(**inputs).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", ["llava_next_video", "qwen2_5_vl"])
def test_the_other_recipes_leave_models_that_transformers_loads(name, tmp_path):
    assert main(["train", name, "--out", str(tmp_path), "--steps", "1", "--workers", "1", "--device", "cpu"]) == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert loaded.config.model_type == name
    assert loaded.config.text_config.num_hidden_layers >= 8
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 10 << 20
    modality = "video" if name == "llava_next_video" else "image"
    (item,) = draw_items("dev", 0, 1, modality)[:1]
    inputs = Subject(model=loaded, processor=processor).inputs([item], [item.views])
    assert (inputs["input_ids"] == WORD_IDS[f"<{modality}>"]).sum() == (512 if modality == "video" else 256)
    assert loaded.generate(**inputs).shape[1] > inputs["input_ids"].shape[1]


def test_a_recipe_for_clips_needs_torchvision_before_it_begins(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "torchvision_installed", lambda: False)
    for name in ("llava_next_video", "qwen2_5_vl"):
        with pytest.raises(BackendUnavailable, match=r"needs torchvision: pip install 'vtprune\[processors\]'"):
            run.train(name, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_leaves_its_tower_a_second_time_next_to_an_aligned_text_tower(trial):
    clip = CLIPModel.from_pretrained(trial / "model" / "clip", dtype=torch.float32)
    loaded = LlavaForConditionalGeneration.from_pretrained(trial / "model", dtype=torch.float32)
    towers = [dict(tower.named_parameters()) for tower in (loaded.model.vision_tower, clip.vision_model)]
    mine, theirs = ({name.removeprefix("vision_model."): weight for name, weight in tower.items()} for tower in towers)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in mine.items())
    words = AutoTokenizer.from_pretrained(trial / "model" / "clip")("where is the ring ?")["input_ids"]
    assert words[-1] == END


def test_a_run_leaves_a_curve_of_every_stage(trial):
    plans = run.RECIPES["llava"].plans
    assert {path.stem for path in trial.glob("*.jsonl")} == {plan.stage.name for plan in plans}
    with Image.open(trial / "curve.png") as picture:
        assert picture.width > 1000


def test_a_finished_run_is_not_done_again(trial, capsys):
    before = (trial / "join.safetensors").stat().st_mtime_ns
    assert main(["train", "llava", "--out", str(trial), "--steps", "1", "--workers", "2", "--device", "cpu"]) == 0
    assert (trial / "join.safetensors").stat().st_mtime_ns == before
    assert "model saved to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "seed -1: expected 0 to 63"),
        (["--seed", "64"], "seed 64: expected 0 to 63"),
        (["--workers", "0"], "workers 0: expected 1 to 8"),
        (["--workers", "9"], "workers 9: expected 1 to 8"),
        (["--steps", "0"], "--steps 0: expected 1 or more"),
        (["--out", __file__], "this is a file, expected a directory"),
        (["--device", "gpu"], "no such device"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "llava", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_no_recipe_is_a_trial():
    assert all(plan.steps > 100 for recipe in run.RECIPES.values() for plan in recipe.plans)


def test_without_matplotlib_there_is_a_model_and_a_hint(trial, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailable, match=r"vtprune\[plots\]"):
        draw_curve(trial, run.RECIPES["llava"].plans, trial / "curve.png")
    assert main(["train", "llava", "--out", str(trial), "--steps", "1", "--workers", "2", "--device", "cpu"]) == 0
    told = capsys.readouterr()
    assert "vtprune[plots]" in told.err and "model saved to" in told.out


def test_torch_without_muon_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(BackendUnavailable, match=r"torch 2\.9 or newer"):
        run.train("llava", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_recipe(tmp_path):
    with pytest.raises(InvalidOption, match="there are: llava"):
        run.train("lava", tmp_path / "run")


def test_a_damaged_state_is_named(tmp_path):
    run_read(tmp_path, steps=1, upto=1)
    (tmp_path / "read.safetensors").write_bytes(b"no")
    with pytest.raises(VtpruneError, match=r"read.safetensors.*delete it"):
        run_read(tmp_path, steps=1, upto=1)


def test_the_command_names_every_recipe():
    assert tuple(run.RECIPES) == _train._NAMES


def test_no_seed_reaches_pictures_that_others_train_or_are_tested_on():
    starts = [((seed * 8 + stage) << 31) for seed in range(SEEDS) for stage in range(8)]
    longest = max(plan.steps * plan.size for recipe in run.RECIPES.values() for plan in recipe.plans)
    assert len(set(starts)) == len(starts)
    assert longest < 1 << 31
    assert max(starts) + (1 << 31) <= len(TRAIN)


def test_kinds_are_asked_in_about_equal_numbers():
    batch = Source(seed=0, stage=1, patch=8).batch(0, range(200), 200)
    kinds = [question.kind for row in batch.questions for question in row]
    shares = [kinds.count(kind) / len(kinds) for kind in KINDS]
    assert min(shares) > 0.05
    assert max(shares) < 0.3


def test_questions_about_nothing_are_thinned_out_like_the_others():
    batch = Source(seed=0, stage=1, patch=8).batch(0, range(60), 60)
    few = batch.cells.owner[:, torch.randperm(256, generator=Generator().manual_seed(0))[:28]]
    answerable = batch.answerable(few)
    told = [(bool(q.about), bool(answerable[i, k])) for i, row in enumerate(batch.questions) for k, q in enumerate(row)]
    seen, empty = ([say for about, say in told if about == wanted] for wanted in (True, False))
    assert abs(sum(seen) / len(seen) - sum(empty) / len(empty)) < 0.05
    assert 0.1 < sum(seen) / len(seen) < 0.9


def test_the_folder_of_another_run_is_refused(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"name": "llava", "seed": 1, "workers": 2, "recipe": "older"}))
    with pytest.raises(InvalidOption, match="another run"):
        run.train("llava", tmp_path, seed=0)


def test_exported_weights_are_small_and_half_precision(tmp_path, student):
    from safetensors.torch import load_file

    torch.manual_seed(0)
    export_llava(LlavaStudent(), tmp_path)
    for path in (tmp_path / "model.safetensors", tmp_path / "clip" / "model.safetensors"):
        assert path.stat().st_size < 10_000_000
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}


def test_cells_of_a_clip_show_what_is_painted_on_them():
    clip = draw_clip(11)
    cells = label_cells([clip.views], 16)
    assert cells.owner.shape == (1, FRAMES * 64)
    for t in range(FRAMES):
        for cell in range(64):
            top, left = cell // 8 * 16, cell % 8 * 16
            painted = clip.owner[t, top : top + 16, left : left + 16]
            counts = [(painted == i).sum() for i in range(len(clip.things))]
            label = int(cells.owner[0, t * 64 + cell])
            assert label == (int(np.argmax(counts)) if max(counts) > 9.6 else -1)
            thing = clip.things[label] if label >= 0 else None
            expected = 0 if thing is None else 1 + SHAPES.index(thing.shape) if thing.shape else 9 + thing.digit
            assert int(cells.what[0, t * 64 + cell]) == (UNSURE if thing is None and max(counts) > 0 else expected)
        seen = sum(t in clip.frames_with(i) for i in range(len(clip.things)))
        assert cells.centre[0, t * 64 : (t + 1) * 64].sum() == seen


def test_clips_come_whole_thinned_out_and_as_one_frame():
    source = ClipSource(seed=0, stage=1, patch=16)
    for step, frames in enumerate((8, 4, 8, 1)):
        batch = source.batch(step, range(3), 3)
        assert batch.pixels().shape == (3, frames, 3, 128, 128)
        assert batch.cells.owner.shape == (3, frames * 64)
        for views, questions in zip(batch.views, batch.questions):
            assert {question.kind for question in questions} <= set(CLIP_KINDS)
            about = {i for question in questions for i in question.about}
            assert all(any((view.owner == i).any() for view in views) for i in about)


def test_blocks_of_a_clip_prefer_frames():
    share = torch.zeros(600, 512)
    kept = choose_cells(share, 128, Generator().manual_seed(0), side=8)
    assert (kept.diff(dim=1) > 0).all()
    most = torch.stack([(kept // 64 == t).sum(dim=1) for t in range(8)]).amax(dim=0)
    assert (most > 40).float().mean() > 0.1
    assert (most < 28).float().mean() > 0.3


def test_a_clip_student_begins_with_the_bundled_weights():
    bundled, student = loading.load_tiny_model("llava").state_dict(), VideoStudent().vlm.state_dict()
    assert set(bundled) <= set(student)
    assert all(torch.equal(weight, student[name]) for name, weight in bundled.items())
