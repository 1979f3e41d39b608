"""The house rules that syntax trees can tell: who imports whom, who hooks, what nobody calls, how long things are.

Every rule is tried on a file that breaks it first, so that a rule that finds nothing is known to be able to.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

import vtprune

ROOT = Path(vtprune.__file__).parent
ROWS = (
    ("errors", "_version"),
    ("types", "readings"),
    ("glances",),
    ("kernels", "protocols", "_checks", "_needs", "_storing", "_torchvision"),
    ("picking",),
    (
        "stages",
        "pipeline",
        "positions",
        "masks",
        "schedule",
        "report",
        "estimates",
        "relevance",
        "viz",
        "_prompts",
    ),
    ("cache", "methods", "adapters", "tiny", "_pictures"),
    ("catalog", "calibration", "debiasing", "seam", "_loading"),
    ("inside",),
    ("runtime",),
    ("api",),
    ("comparing",),
    ("video",),
    ("eval",),
    ("demo",),
    (
        "cli",
        "_compare",
        "_console",
        "_demo",
        "_doctor",
        "_evaluate",
        "_arguments",
        "_train",
        "_calibrate",
        "_bench",
        "_video_qa",
        "_video_answers",
        "__main__",
    ),
    ("__init__",),
)
"""Bottom row first. A room may import strictly lower rows; the files of a folder may import each other."""
WALLS = (("stages", "adapters"),)
WITHIN_A_ROW = {
    ("__main__", "cli"),
    ("cli", "_console"),
    ("cli", "_compare"),
    ("cli", "_demo"),
    ("_compare", "_arguments"),
    ("_compare", "_console"),
    ("cli", "_doctor"),
    ("cli", "_evaluate"),
    ("cli", "_arguments"),
    ("cli", "_train"),
    ("_doctor", "_console"),
    ("_train", "_console"),
    ("cli", "_calibrate"),
    ("cli", "_bench"),
    ("cli", "_video_qa"),
    ("_video_qa", "_arguments"),
    ("_video_qa", "_video_answers"),
    ("_bench", "_console"),
    ("_calibrate", "_console"),
    ("_calibrate", "_arguments"),
    ("_evaluate", "_console"),
    ("_evaluate", "_arguments"),
}
"""The command line is one room in several flat files, and uses the package through its public door."""
HOOKING = ("inside", "runtime")
LATE = {
    "triton": ("kernels/triton",),
    "gradio": ("demo/app",),
    "decord": (),
    "av": (),
    "torchcodec": (),
    "open_clip": (),
    "timm": (),
    "torchvision": ("_torchvision",),
    "ray": ("video/ray",),
    "matplotlib": (),
}
"""Packages that may be absent, and the modules (imported late themselves) that may import them at their top."""
ASYNCHRONOUS = ("stages", "kernels", "positions", "picking", "pipeline")
FOR_HOST_TENSORS = ("kernels/host",)
"""Modules that get tensors in host memory only (`host.holds`): reading those waits for nothing."""
SYNCHRONISING = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique"}
ON_THE_PREFILL_PATH = (
    "stages",
    "kernels",
    "positions",
    "picking",
    "pipeline",
    "inside",
    "adapters",
    "cache",
    "runtime",
)
HOST_BORN = {"torch.tensor", "torch.from_numpy", "torch.as_tensor"}
SERIALISERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve"}
FILE_LINES, FUNCTION_LINES = 300, 60


@dataclass(frozen=True)
class Source:
    """A file of the package; `path` is relative to it, with slashes and without suffix."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        return self.path.split("/")[0]

    @property
    def exempt(self) -> bool:
        """Package `__init__` files re-export."""
        return self.path.endswith("__init__")

    @property
    def module(self) -> str:
        parts = [part for part in self.path.split("/") if part != "__init__"]
        return ".".join(["vtprune", *parts])

    @property
    def package(self) -> str:
        return self.module if self.path.endswith("__init__") else self.module.rpartition(".")[0]


def sources() -> list[Source]:
    files = sorted(ROOT.rglob("*.py"))
    return [
        Source(file.relative_to(ROOT).with_suffix("").as_posix(), file.read_text(encoding="utf-8")) for file in files
    ]


MODULES = {source.module for source in sources()}


def imported(source: Source) -> Iterator[tuple[ast.stmt, str]]:
    """Every module that is imported anywhere in the file, by its absolute name."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = source.package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node, full if full in MODULES else base


def room_of(module: str) -> str:
    """The room of a module of the package; the package itself is `__init__`."""
    return ([*module.split("."), "__init__"])[1]


def row_of(room: str) -> int | None:
    return next((number for number, rooms in enumerate(ROWS) if room in rooms), None)


Rule = Callable[[Source], list[str]]


def every_room_has_a_row(source: Source) -> list[str]:
    return [] if row_of(source.room) is not None else [f"{source.room} stands in no row: add it to the table"]


def imports_go_down(source: Source) -> list[str]:
    found = []
    for node, module in imported(source):
        if module.split(".")[0] != "vtprune" or source.exempt:
            continue
        target, own = room_of(module), source.room
        here, there = row_of(own), row_of(target)
        if target == own or (own, target) in WITHIN_A_ROW:
            continue
        if module == "vtprune" and here == row_of("cli"):
            continue
        if here is None or there is None or there >= here:
            found.append(f"line {node.lineno}: {own} (row {here}) imports {target} (row {there})")
    return found


def walls_stand(source: Source) -> list[str]:
    others = [b if source.room == a else a for a, b in WALLS if source.room in (a, b)]
    return [
        f"line {node.lineno}: {source.room} imports {module}"
        for node, module in imported(source)
        if module.startswith("vtprune.") and room_of(module) in others
    ]


def only_the_runtime_hooks(source: Source) -> list[str]:
    if source.room in HOOKING:
        return []
    return [
        f"line {node.lineno}: {node.attr}"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("register_") and "hook" in node.attr
    ]


def optional_packages_are_imported_late(source: Source) -> list[str]:
    found = []
    for node in at_import(source.tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        for name in (name.split(".")[0] for name in names):
            if name in LATE and not any(source.path.startswith(late) for late in LATE[name]):
                found.append(f"line {node.lineno}: {name} at module level")
    return found


def at_import(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when the module is imported: all but those in functions and for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if not (isinstance(node, ast.ImportFrom) and node.level):
                yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from at_import(ast.Module(body=[other], type_ignores=[]))
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from at_import(node)


def nothing_is_executed_or_printed(source: Source) -> list[str]:
    found = [
        f"line {node.lineno}: {node.id}"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Name) and node.id in {"exec", "eval", "compile", "__import__", "print"}
    ]
    for node, module in imported(source):
        if module.split(".")[0] in SERIALISERS:
            found.append(f"line {node.lineno}: {module}")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.save", "builtins.exec"}:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found.append(f"line {node.value.lineno}: trust_remote_code")
    return found


def nothing_waits_for_the_device(source: Source) -> list[str]:
    if source.room not in ASYNCHRONOUS or source.path in FOR_HOST_TENSORS:
        return []
    return [
        f"line {node.lineno}: .{node.func.attr}()"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SYNCHRONISING
    ]


def copies_to_the_device_do_not_wait(source: Source) -> list[str]:
    """A blocking copy of host data waits for everything the device has still to do, like a read."""
    found = []
    for node in ast.walk(source.tree):
        if source.room not in ON_THE_PREFILL_PATH or not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        told = {word.arg for word in node.keywords}
        if name in HOST_BORN and "device" in told:
            found.append(f"line {node.lineno}: {name}(device=...)")
        maker = node.func.value if name.endswith(".to") else None
        if isinstance(maker, ast.Call) and ast.unparse(maker.func) in HOST_BORN and "non_blocking" not in told:
            found.append(f"line {node.lineno}: blocking .to(...)")
    return found


def nothing_is_swallowed(source: Source) -> list[str]:
    """No bare `except`, and none whose body does nothing."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            idle = all(isinstance(step, ast.Pass) or is_constant(step) for step in node.body)
            if node.type is None or idle:
                found.append(f"line {node.lineno}: except")
    return found


def is_constant(step: ast.stmt) -> bool:
    return isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant)


def files_are_short(source: Source) -> list[str]:
    lines = len(source.text.splitlines())
    return [f"{lines} lines, at most {FILE_LINES}"] if lines > FILE_LINES else []


def functions_are_short(source: Source) -> list[str]:
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES:
                found.append(f"line {node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES}")
    return found


def public_functions_are_annotated(source: Source) -> list[str]:
    found = []
    for node in source.tree.body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        for function in members:
            if not isinstance(function, ast.FunctionDef) or function.name.startswith("_"):
                continue
            given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            bare = [arg.arg for arg in given if arg.annotation is None and arg.arg not in ("self", "cls")]
            if bare or function.returns is None:
                found.append(f"line {function.lineno}: {function.name} lacks annotations")
    return found


def options_are_bound_at_the_top(source: Source) -> list[str]:
    """Below `api` a function takes `**kwargs` only to hand a call of the model through."""
    row = row_of(source.room)
    if source.room == "runtime" or row is None or row >= row_of("api"):
        return []
    return [
        f"line {node.lineno}: {node.name}(**{node.args.kwarg.arg})"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef)
        and node.args.kwarg is not None
        and source.room != "cache"
        and source.path != "kernels/backends"
    ]


RULES: dict[Rule, tuple[Source, ...]] = {
    every_room_has_a_row: (Source("attic", "x = 1"), Source("attic/box", "x = 1")),
    imports_go_down: (
        Source("types", "from vtprune.report import PruneReport"),
        Source("report", "from vtprune import positions"),
        Source("stages/scorers", "import vtprune.pipeline"),
        Source("stages/scorers", "from ..runtime.pruner import Pruner"),
        Source("kernels/reference", "def f():\n    from vtprune.api import wrap"),
        Source("runtime/pruner", "import vtprune"),
        Source("comparing", "from vtprune import wrap"),
        Source("_console", "from vtprune.cli import main"),
        Source("methods/random", "from vtprune import wrap"),
        Source("catalog", "if TYPE_CHECKING:\n    from vtprune.seam import find_base"),
    ),
    walls_stand: (
        Source("adapters/llava", "from vtprune.stages.scorers import Constant"),
        Source("stages/scorers", "from vtprune import adapters"),
    ),
    only_the_runtime_hooks: (
        Source("adapters/llava", "module.register_forward_hook(f)"),
        Source("api", "hook = model.register_full_backward_hook"),
        Source("viz", "torch.nn.modules.module.register_module_forward_pre_hook(f)"),
    ),
    optional_packages_are_imported_late: (
        Source("kernels/reference", "import triton.language as tl"),
        Source("viz", "try:\n    from torchvision import io\nexcept ImportError:\n    io = None"),
        Source("tiny/loading", "class A:\n    import timm"),
    ),
    nothing_is_executed_or_printed: (
        Source("viz", "print(1)"),
        Source("viz", "f = eval"),
        Source("cli", "from pickle import loads"),
        Source("tiny/loading", "torch.load(path)"),
        Source("tiny/loading", "AutoModel.from_pretrained(name, trust_remote_code=True)"),
    ),
    nothing_waits_for_the_device: (
        Source("stages/scorers", "x.max().item()"),
        Source("positions", "ids.cpu()"),
        Source("kernels/reference", "for i in x.tolist(): pass"),
    ),
    copies_to_the_device_do_not_wait: (
        Source("runtime/decide", "torch.from_numpy(x).to(device)"),
        Source("adapters/llava", "y = torch.tensor([1, 2], device=x.device)"),
    ),
    nothing_is_swallowed: (
        Source("viz", "try:\n    f()\nexcept:\n    raise"),
        Source("viz", "try:\n    f()\nexcept ValueError:\n    pass"),
        Source("viz", "try:\n    f()\nexcept ValueError:\n    'why not'\n    ..."),
    ),
    files_are_short: (Source("viz", "x = 1\n" * (FILE_LINES + 1)),),
    functions_are_short: (Source("viz", "def f():\n" + "    x = 1\n" * FUNCTION_LINES),),
    public_functions_are_annotated: (
        Source("viz", "def f(x) -> None: ..."),
        Source("viz", "class A:\n    def f(self, x: int): ..."),
    ),
    options_are_bound_at_the_top: (Source("stages/scorers", "def f(x: int, **more: int) -> None: ..."),),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_sees_a_file_that_breaks_it(rule: Rule) -> None:
    assert all(rule(source) for source in RULES[rule])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Rule) -> None:
    broken = [f"{source.path}: {finding}" for source in sources() for finding in rule(source)]
    assert broken == [], "\n".join(broken)


def graph(files: list[Source]) -> dict[str, set[str]]:
    """Imports among the files, packages standing for what their `__init__` does not import back."""
    return {
        file.module: {module for _, module in imported(file) if module in MODULES} for file in files if not file.exempt
    }


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """Some cycle of the graph, empty where there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(edges.get(module, ())):
            found = visit(other, [*path, module])
            if found:
                return found
        done.add(module)
        return []

    return next((found for module in edges if (found := visit(module, []))), [])


def test_a_cycle_is_seen() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_no_file_imports_itself_in_a_circle() -> None:
    edges = graph(sources())
    assert edges["vtprune.api"]
    assert cycle(edges) == []


def test_the_package_was_read() -> None:
    rooms = {source.room for source in sources()}
    assert {"types", "kernels", "stages", "adapters", "methods", "runtime", "api"} <= rooms
    assert sum(1 for source in sources() for _, module in imported(source) if module.startswith("vtprune.")) > 50
