"""Importing vtprune changes nothing in the process, and neither does pruning anything that is not the model."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parents[1]
ABSENT = ("triton", "gradio", "decord", "av", "open_clip", "timm", "torchvision", "ray", "peft", "vllm", "matplotlib")

SNAPSHOT = """
import importlib.util, json, logging, os, signal, socket, sys, threading, warnings

# As where there is no torchvision: transformers would import it by itself.
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torchvision" else find_spec(name, package)

def refuse(*args, **kwargs):
    raise AssertionError("network")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
warnings.simplefilter("default")

import torch, transformers
from transformers import cache_utils, masking_utils, modeling_utils
from transformers.models.llava import modeling_llava
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

CLASSES = (
    torch.Tensor, torch.nn.Module, torch.nn.Linear,
    cache_utils.Cache, cache_utils.DynamicCache, cache_utils.StaticCache,
    modeling_utils.PreTrainedModel, transformers.GenerationMixin, modeling_llava.LlavaModel,
    modeling_llava.LlavaForConditionalGeneration, modeling_qwen2_5_vl.Qwen2_5_VLModel,
)
MODULES = (
    torch, torch.nn.functional, transformers.generation.utils, masking_utils, modeling_llava, modeling_qwen2_5_vl,
)
TABLES = (modeling_utils.ALL_ATTENTION_FUNCTIONS, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS)
LOGGERS = (logging.getLogger(), logging.getLogger("transformers"), logging.getLogger("torch"))
KEPT = []

def members(thing):
    KEPT.append(dict(vars(thing)))
    return {name: id(value) for name, value in vars(thing).items() if name not in ("__warningregistry__", "__doc__")}

def snapshot():
    return {
        "classes": {cls.__qualname__: members(cls) for cls in CLASSES},
        "modules": {module.__name__: members(module) for module in MODULES},
        "attention": [{name: id(table[name]) for name in table.valid_keys()} for table in TABLES],
        "loggers": [(x.level, [id(h) for h in x.handlers], x.propagate, x.disabled) for x in LOGGERS],
        "last resort": id(logging.lastResort),
        "warning filters": [str(entry) for entry in warnings.filters],
        "showwarning": id(warnings.showwarning),
        "environment": dict(os.environ),
        "path": list(sys.path),
        "hooks": [id(f) for f in (sys.excepthook, sys.displayhook, *sys.meta_path, *sys.path_hooks)],
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "threads": [thread.name for thread in threading.enumerate()],
        "dtype": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "thread count": torch.get_num_threads(),
        "generator": torch.get_rng_state().tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "module hooks": [
            len(getattr(torch.nn.modules.module, name)) for name in vars(torch.nn.modules.module)
            if name.startswith("_global") and name.endswith("hooks")
        ],
        "cuda": torch.cuda.is_initialized(),
        "working directory": os.getcwd(),
    }
"""
CHANGES = """
def changes(before, after):
    before, after = (json.loads(json.dumps(x)) for x in (before, after))
    found = []
    for name in before:
        if before[name] == after[name]:
            continue
        if isinstance(before[name], dict):
            inner = [key for key in {**before[name], **after[name]} if before[name].get(key) != after[name].get(key)]
            found.append([name, sorted(inner)])
        else:
            found.append([name, [str(before[name])[:200], str(after[name])[:200]]])
    return found
"""
IMPORT_EVERYTHING = """
import importlib, pkgutil
import vtprune
for name in vtprune.__all__:
    getattr(vtprune, name)
dir(vtprune)
imported = []
for module in pkgutil.walk_packages(vtprune.__path__, "vtprune."):
    late = "triton" in module.name or module.name.startswith("vtprune.demo.app")
    if not module.name.endswith("__main__") and not late:
        importlib.import_module(module.name)
        imported.append(module.name)
"""
PRUNE = """
from tests import models
for name, method in (("llava", "vtprune"), ("qwen2_5_vl", "fastervlm")):
    model = models.build(name)
    inputs = models.inputs(name)
    torch.manual_seed(0)
    before = snapshot() if name == "llava" else before
    vtprune.wrap(model, method)
    kept = model.generate(**inputs, max_new_tokens=3).shape[0] and model.vtprune.last.kept
    during = snapshot()
    vtprune.unwrap(model)
    torch.manual_seed(0)
"""


def run(*parts: str) -> Any:
    """What a fresh interpreter prints as JSON after running the parts."""
    code = "\n".join(textwrap.dedent(part) for part in parts)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_alone_loads_neither_torch_nor_transformers() -> None:
    loaded = run("import vtprune, sys, json; print(json.dumps(sorted(sys.modules)))")
    assert "vtprune" in loaded
    assert not {"torch", "transformers", "numpy", "PIL", "rich"} & set(loaded)


def test_import_alone_says_nothing_and_warns_of_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import vtprune"], capture_output=True, text=True, cwd=HERE, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def after_importing_everything() -> dict[str, Any]:
    return run(
        SNAPSHOT,
        CHANGES,
        "loaded, before = set(sys.modules), snapshot()",
        IMPORT_EVERYTHING,
        "found = {'changes': changes(before, snapshot()), 'imported': imported}",
        "print(json.dumps({**found, 'loaded': sorted(set(sys.modules) - loaded)}))",
    )


def test_importing_every_module_changes_nothing(after_importing_everything: dict[str, Any]) -> None:
    assert after_importing_everything["changes"] == []
    imported = set(after_importing_everything["imported"])
    assert {"vtprune.api", "vtprune.runtime.pruner", "vtprune.adapters.llava"} <= imported


def test_importing_every_module_loads_nothing_optional(after_importing_everything: dict[str, Any]) -> None:
    loaded = {name.split(".")[0] for name in after_importing_everything["loaded"]}
    assert "vtprune" in loaded
    assert not loaded & set(ABSENT)


def test_every_module_is_importable_without_optional_packages() -> None:
    """A package that is absent raises on import, as these are made to."""
    code = f"import sys, json; sys.modules.update(dict.fromkeys({ABSENT!r}))"
    assert len(run(code, IMPORT_EVERYTHING, "print(json.dumps(imported))")) > 20


def test_pruning_changes_nothing_but_the_model() -> None:
    found = run(
        SNAPSHOT,
        CHANGES,
        IMPORT_EVERYTHING,
        PRUNE,
        "del during['generator'], before['generator']",
        "after = snapshot(); del after['generator']",
        "print(json.dumps({'kept': kept, 'during': changes(before, during), 'after': changes(before, after)}))",
    )
    assert found["kept"] > 0
    assert found["during"] == []
    assert found["after"] == []


def test_the_snapshot_sees_mischief_and_the_network_is_cut() -> None:
    mischief = """
        before = snapshot()
        warnings.simplefilter("ignore")
        logging.basicConfig()
        os.environ["TOKENIZERS_PARALLELISM"] = "x"
        torch.nn.Module.__call__ = lambda *a: None
        modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"] = print
        torch.manual_seed(7)
        modeling_llava.LlavaModel.forward = print
        torch.nn.functional.softmax = print
        try:
            socket.create_connection(("localhost", 9))
        except AssertionError as error:
            os.environ["NETWORK"] = str(error)
        assert os.environ["NETWORK"] == "network"
        print(json.dumps(sorted(name for name, _ in changes(before, snapshot()))))
    """
    assert run(SNAPSHOT, CHANGES, mischief) == [
        "attention",
        "classes",
        "environment",
        "generator",
        "loggers",
        "modules",
        "warning filters",
    ]
