"""The bundled model answers its question, loads without network, and says so when its files are damaged."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from PIL import Image

import vtprune
from vtprune.errors import BackendUnavailable, InvalidOption, VtpruneError
from vtprune.tiny import ANSWER, PICTURE, QUESTION, list_tiny, load_tiny_clip, loading


def ask(model: torch.nn.Module, processor: object, question: str) -> str:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=Image.open(PICTURE), text=text, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=4)
    return processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a bundled model needs no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("no_network")
def test_it_answers_with_all_tokens_and_with_a_quarter() -> None:
    model, processor = vtprune.load_tiny()
    assert ask(model, processor, QUESTION) == ANSWER
    with vtprune.pruning(model) as pruner:
        assert ask(model, processor, QUESTION) == ANSWER
        assert (pruner.last.kept, pruner.last.tokens) == (64, 256)


def test_it_is_in_fp32_on_the_cpu_and_not_in_training() -> None:
    model, _ = vtprune.load_tiny("llava")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert not model.training


def test_the_question_looks_at_the_picture() -> None:
    model, processor = vtprune.load_tiny()
    answers = {
        question: ask(model, processor, question) for question in ("what shape is red ?", "where is the cross ?")
    }
    assert answers == {"what shape is red ?": "circle", "where is the cross ?": "bottomleft"}


@pytest.mark.parametrize("name", ["lava", "LLAVA", "", None, "../llava"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(InvalidOption, match=r"unknown tiny model .* there are: llava"):
        vtprune.load_tiny(name)


def test_a_near_name_is_suggested() -> None:
    with pytest.raises(InvalidOption, match="did you mean 'llava'"):
        vtprune.load_tiny("llawa")


@pytest.fixture
def copied_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(loading.tiny_folder("llava"), tmp_path / "llava")
    monkeypatch.setattr(loading, "_WEIGHTS", tmp_path)
    return tmp_path / "llava"


def test_missing_weights(copied_weights: Path) -> None:
    (copied_weights / "model.safetensors").unlink()
    with pytest.raises(VtpruneError, match=r"cannot read model.safetensors.*install vtprune again"):
        vtprune.load_tiny()


@pytest.mark.parametrize("damage", ["truncated", "bit", "pointer"])
def test_damaged_weights(copied_weights: Path, damage: str) -> None:
    path = copied_weights / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    damaged = {"truncated": bytes(data[:1000]), "bit": bytes(data), "pointer": b"version https://git-lfs\n"}
    path.write_bytes(damaged[damage])
    with pytest.raises(VtpruneError, match=r"model.safetensors has SHA-256"):
        vtprune.load_tiny()


def test_a_changed_word_list_is_noticed(copied_weights: Path) -> None:
    path = copied_weights / "tokenizer.json"
    text = path.read_text().replace('"red"', '"swap"').replace('"green"', '"red"').replace('"swap"', '"green"')
    path.write_text(text)
    with pytest.raises(VtpruneError, match=r"tokenizer.json has SHA-256"):
        vtprune.load_tiny()


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_damaged_checksums(copied_weights: Path, damage: str) -> None:
    path = copied_weights / "SHA256SUMS"
    path.unlink() if damage == "missing" else path.write_text("" if damage == "empty" else path.read_text()[:40])
    with pytest.raises(VtpruneError, match="SHA256SUMS"):
        vtprune.load_tiny()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_text_tower(copied_weights: Path, name: str) -> None:
    (copied_weights / "clip" / name).unlink()
    with pytest.raises(VtpruneError, match=rf"cannot read {name}"):
        load_tiny_clip()
    assert vtprune.load_tiny()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("text", [None, "{", "[]", "{}"], ids=["missing", "cut", "list", "empty"])
def test_damaged_settings(copied_weights: Path, name: str, text: str | None) -> None:
    (copied_weights / name).unlink() if text is None else (copied_weights / name).write_text(text)
    with pytest.raises(VtpruneError, match="missing or damaged"):
        vtprune.load_tiny()


def test_every_name_loads_and_has_a_card() -> None:
    for name in list_tiny():
        assert (loading.tiny_folder(name) / "CARD.md").is_file()


def test_without_torchvision_a_processor_for_clips_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "torchvision_installed", lambda: False)
    for name in set(list_tiny()) - {"llava"}:
        with pytest.raises(BackendUnavailable, match=r"needs torchvision: pip install 'vtprune\[processors\]'"):
            vtprune.load_tiny(name)
        assert loading.load_tiny_model(name).config.model_type == name
    assert vtprune.load_tiny("llava")


def test_a_model_without_a_text_tower_says_so() -> None:
    with pytest.raises(InvalidOption, match="llava_next_video has no aligned text tower; there is one for: llava"):
        load_tiny_clip("llava_next_video")
