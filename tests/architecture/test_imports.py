"""Who may import whom, and how large things may grow. Modules are parsed, not run, so imports inside functions count as well.

A room that is not in RULES fails the test: whoever builds one writes down here what it may use.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "agentlightning"
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 80
TOP_LEVEL = {"pyproject.toml", "README.md", "Dockerfile", "LICENSE", PACKAGE, "configs", "examples", "scripts", "tests"}
VERSION = "__version__"


@dataclass(frozen=True)
class Rule:
    """What a room may import: names inside the package, and libraries beside the standard one (None: any)."""

    rooms: tuple[str, ...]
    libraries: tuple[str, ...] | None = None
    lazy: tuple[str, ...] = ()  # libraries allowed inside functions only


WORKER_BASICS = ("workers.messages", "workers.logical_shards", "workers.optimizer", "workers.settings", "workers.shards")
CHECKPOINT_PARTS = ("checkpoint.snapshot", "checkpoint.manifest", "checkpoint.preemption")
RULES = {  # the longest name that fits a module holds for it
    "errors": Rule((), ()),
    "types": Rule((), ("numpy",)),
    "algorithms": Rule(("algorithms",), ("torch",)),
    "checkpoint": Rule(("checkpoint", "errors", VERSION), ("numpy", "xxhash")),
    "checkpoint.snapshot": Rule(("checkpoint", "errors"), ("numpy",), lazy=("torch",)),
    "checkpoint.record": Rule(("checkpoint", "errors"), ("numpy",), lazy=("torch",)),
    "checkpoint.remote": Rule(("checkpoint", "errors"), ("numpy",), lazy=("fsspec",)),
    # A custom loop's way to its records: no library at all, and the store only inside functions.
    "checkpoint_utils": Rule(("checkpoint", "errors"), ()),
    "calculator": Rule(()),
    "rewards": Rule(("rewards", "errors")),
    "models": Rule(("models", "types", "errors")),
    "rollout": Rule(("rollout", "models", "algorithms", "types", "errors")),
    # The workers hold the host buffers that a checkpoint is written from, and hear the signals that ask a run to leave.
    "workers": Rule((*CHECKPOINT_PARTS, "workers", "rollout", "models", "algorithms", "types", "errors")),
    **{name: Rule((*WORKER_BASICS, "models", "algorithms", "types", "errors")) for name in WORKER_BASICS},
    "workers.actor": Rule((*WORKER_BASICS, "models", "algorithms", "types", "errors")),
    "workers.critic": Rule((*WORKER_BASICS, "workers.actor", "models", "algorithms", "types", "errors")),
    # models.chat is the tokenizer, which the controller needs as well; the model code stays with the workers.
    # From tinker the words alone: the trainer's client answers as a loop's own does.
    "verl": Rule(
        (
            *("verl", "workers", "models.chat", "rewards", "algorithms", "checkpoint", "types", "errors", VERSION),
            *("tinker.futures", "tinker.types"),
        )
    ),
    # Doors two and three. What a loop of one's own imports (types, clients) must be light; the engine holds the model code.
    "tinker": Rule(("tinker", "workers", "rollout", "models", "algorithms", "checkpoint", "types", "errors", VERSION)),
    "tinker.types": Rule((), ("numpy", "torch")),  # torch for type checkers alone, see test_light_imports
    "tinker.engine_api": Rule(("tinker.types",), ()),
    # The service knows the engine's protocol alone; the command line opens one.
    "tinker.server": Rule(("tinker.server", "tinker.types", "tinker.engine_api", "checkpoint", "errors", VERSION)),
    # What is done with a run directory from outside; the command line knows the tools and how to start a run.
    "tools": Rule(("tools", "checkpoint", "verl.plot", "verl.metrics", "verl.tracking", "errors")),
    "cli": Rule(
        ("tools", "verl.entrypoint", "verl.metrics", "tinker.server", "tinker.engine", "tinker.engine_api", "errors", VERSION),
        (),
    ),
    "__main__": Rule(("cli",), ()),
}
# DESIGN lets only verl/entrypoint import verl/trainer; verl/launch is the entrypoint's heavy half, which it alone may import.
ONLY_IMPORTER = {"verl.trainer": "verl.launch", "verl.launch": "verl.entrypoint"}
# What a worker holds (Actor, Critic, Engine) runs under a debugger without it.
KNOW_RAY = (
    *("workers.ray_backend", "workers.ray_cluster", "workers.ray_session", "workers.signs_of_life"),
    *("verl", "tinker.ray_engine"),
)


# ---- the checks: a folder that holds the package goes in, one line for each fault comes out


def modules(root: Path) -> Iterator[tuple[str, Path, ast.Module]]:
    """(name without the package's, file, tree); the package's own __init__ has the name ''."""
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, path, ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(tree: ast.Module, path: Path, root: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, full dotted name, whether inside a function) of every import; `from a import b` gives `a.b`."""
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    package = path.parent.relative_to(root).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, node in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{prefix}.{alias.name}", node in inside) for alias in node.names)


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def rule_of(module: str) -> Rule | None:
    fitting = [name for name in RULES if within(module, (name,))]
    return RULES[max(fitting, key=len)] if fitting else None


def import_faults(root: Path) -> list[str]:
    faults: list[str] = []
    for module, path, tree in modules(root):
        if not module:
            continue  # the package's own __init__ is lazy; what it really imports is tested below
        rule = rule_of(module)
        if rule is None:
            faults.append(f"{module}: no rule says what this room may import")
            continue
        for line, target, is_lazy in imported(tree, path, root):
            fault = import_fault(module, rule, target, is_lazy)
            if fault:
                faults.append(f"{path.relative_to(root)}:{line}: {fault}")
    return faults


def import_fault(module: str, rule: Rule, target: str, is_lazy: bool) -> str | None:
    top, _, name = target.partition(".")
    if top == PACKAGE:
        for trainer, importer in ONLY_IMPORTER.items():
            if within(name, (trainer,)) and module not in (importer, trainer):
                return f"{module} imports {target}, which only {importer} may import"
        allowed = within(name, rule.rooms) or (not name and VERSION in rule.rooms)
        return None if allowed else f"{module} imports {target}, it may import {', '.join(rule.rooms) or 'no room'}"
    if top == "ray" and not within(module, KNOW_RAY):
        return f"{module} imports {target}, only {', '.join(KNOW_RAY)} may"
    if rule.libraries is None or top in sys.stdlib_module_names or top in rule.libraries:
        return None
    if top in rule.lazy:
        return None if is_lazy else f"{module} imports {target} at its top level, it may only inside a function"
    return f"{module} imports {target}, it may import {', '.join(rule.libraries) or 'the standard library'}"


def size_faults(root: Path) -> list[str]:
    faults: list[str] = []
    for _, path, tree in modules(root):
        where = path.relative_to(root)
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            faults.append(f"{where}: {lines} lines, more than {MAX_FILE_LINES}")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    faults.append(f"{where}:{node.lineno}: {node.name} has {length} lines, more than {MAX_FUNCTION_LINES}")
    return faults


def habit_faults(root: Path) -> list[str]:
    """Prints outside the console, and errors that are swallowed whatever they are."""
    faults: list[str] = []
    for _, path, tree in modules(root):
        where = path.relative_to(root)
        for node in ast.walk(tree):
            if is_call_of(node, "print") and path.name != "console.py":
                faults.append(f"{where}:{node.lineno}: print outside console.py")
            if isinstance(node, ast.ExceptHandler) and is_broad(node.type) and not isinstance(node.body[-1], ast.Raise):
                faults.append(f"{where}:{node.lineno}: broad except that does not end in raise")
            if is_call_of(node, "suppress") and any(is_broad(argument) for argument in node.args):
                faults.append(f"{where}:{node.lineno}: broad suppress")
    return faults


def is_call_of(node: ast.AST, name: str) -> TypeGuard[ast.Call]:
    """Whether it reads `name(...)` or `something.name(...)`."""
    return isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == name


def is_broad(caught: ast.expr | None) -> bool:
    if isinstance(caught, ast.Tuple):
        return any(is_broad(element) for element in caught.elts)
    return caught is None or (isinstance(caught, ast.Name) and caught.id in ("Exception", "BaseException"))


# ---- the package as it is


def test_rooms_import_only_what_they_may():
    assert import_faults(ROOT) == []


def test_files_and_functions_stay_small():
    assert size_faults(ROOT) == []


def test_nothing_prints_or_swallows_errors():
    assert habit_faults(ROOT) == []


def test_the_checks_see_the_whole_package():
    found = {name for name, _, _ in modules(ROOT)}
    assert {"", "errors", "algorithms.advantages", "checkpoint.store", "workers.actor", "verl.config"} <= found


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("agentlightning", {"torch", "ray", "numpy", "transformers"}),
        ("agentlightning.checkpoint", {"torch", "ray", "transformers"}),
        ("agentlightning.checkpoint_utils", {"torch", "ray", "numpy", "transformers", "asyncio"}),
        ("agentlightning.tinker.engine_api", {"torch", "ray", "transformers", "pydantic"}),
        ("agentlightning.tinker.service_client", {"torch", "ray", "transformers", "pydantic"}),
        ("agentlightning.verl.entrypoint", {"torch", "ray", "transformers"}),
    ],
)
def test_light_imports(module: str, forbidden: set[str]):
    code = f"import sys, {module}; sys.stdout.write(' '.join({forbidden!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "", f"import {module} also imports {done.stdout}"


def test_top_level_holds_only_what_the_design_lists():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {name.split("/")[0] for name in listed.split("\0") if name}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


# ---- the checks can fail


def write(root: Path, path: str, source: str) -> None:
    file = root / PACKAGE / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)


@pytest.mark.parametrize(
    ("path", "source", "words"),
    [
        ("algorithms/a.py", "from agentlightning.models import base", "algorithms.a imports agentlightning.models.base"),
        ("algorithms/a.py", "import numpy as np", "algorithms.a imports numpy"),
        ("algorithms/a.py", "from agentlightning.errors import UserError", "algorithms.a imports agentlightning.errors"),
        ("types.py", "def f():\n    import torch", "types imports torch"),
        ("checkpoint/store.py", "import torch", "checkpoint.store imports torch"),
        ("checkpoint/store.py", "def f():\n    import ray", "checkpoint.store imports ray"),
        ("checkpoint/record.py", "import torch", "at its top level"),
        ("models/m.py", "from ..rollout import engine", "models.m imports agentlightning.rollout.engine"),
        ("models/sub/__init__.py", "from ...rollout.engine import Engine", "imports agentlightning.rollout.engine.Engine"),
        ("models/m.py", "from .. import rollout", "models.m imports agentlightning.rollout"),
        ("models/m.py", "from agentlightning.modelsmith import x", "models.m imports agentlightning.modelsmith"),
        ("workers/actor.py", "import agentlightning.rollout.engine", "workers.actor imports agentlightning.rollout.engine"),
        ("workers/settings.py", "from agentlightning.workers.group import G", "workers.settings imports"),
        ("workers/group.py", "import agentlightning.checkpoint", "workers.group imports agentlightning.checkpoint"),
        ("verl/data.py", "from agentlightning.models.base import load_base", "verl.data imports agentlightning.models.base"),
        ("verl/data.py", "from agentlightning.verl import trainer", "only verl.launch may import"),
        ("verl/__main__.py", "def f():\n    import agentlightning.verl.trainer", "only verl.launch may import"),
        ("verl/entrypoint.py", "from .trainer import AgentLightningTrainer", "only verl.launch may import"),
        ("verl/data.py", "from agentlightning.verl.launch import launch", "only verl.entrypoint may import"),
        ("rollout/engine.py", "def f():\n    from ray.util import placement_group", "rollout.engine imports ray"),
        ("workers/worker.py", "import ray", "workers.worker imports ray"),
        ("newroom/n.py", "x = 1", "newroom.n: no rule"),
    ],
)
def test_forbidden_imports_are_found(tmp_path: Path, path: str, source: str, words: str):
    write(tmp_path, path, source)
    (fault,) = import_faults(tmp_path)
    assert words in fault


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "from agentlightning.verl import config"),
        ("algorithms/a.py", "import math\nfrom torch import Tensor\nfrom .aggregation import agg_loss"),
        ("checkpoint/record.py", "def f():\n    import torch"),
        ("checkpoint/manifest.py", "from agentlightning import __version__\nimport xxhash"),
        ("verl/entrypoint.py", "from agentlightning.verl.launch import launch"),
        ("verl/launch.py", "from agentlightning.verl.trainer import AgentLightningTrainer"),
        ("workers/critic.py", "from agentlightning.workers.actor import Actor\nimport torch"),
        ("workers/ray_backend.py", "import ray"),
    ],
)
def test_allowed_imports_pass(tmp_path: Path, path: str, source: str):
    write(tmp_path, path, source)
    assert import_faults(tmp_path) == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1\n" * 501, "501 lines"),
        ("def long():\n" + "    x = 1\n" * 80, "long has 81 lines"),
        ("class C:\n    async def long(self):\n" + "        x = 1\n" * 80, "long has 81 lines"),
    ],
)
def test_oversize_is_found(tmp_path: Path, source: str, words: str):
    write(tmp_path, "verl/big.py", source)
    (fault,) = size_faults(tmp_path)
    assert words in fault


def test_the_limits_themselves_pass(tmp_path: Path):
    write(tmp_path, "verl/big.py", "def long():\n" + "    x = 1\n" * 79 + "x = 1\n" * 420)
    assert size_faults(tmp_path) == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("print(1)", "print"),
        ("try:\n    x = 1\nexcept Exception:\n    pass", "broad except"),
        ("try:\n    x = 1\nexcept:\n    x = 2", "broad except"),
        ("try:\n    x = 1\nexcept (OSError, BaseException) as e:\n    if x:\n        raise\n    x = 2", "broad except"),
        ("import contextlib\nwith contextlib.suppress(Exception):\n    x = 1", "broad suppress"),
    ],
)
def test_bad_habits_are_found(tmp_path: Path, source: str, words: str):
    write(tmp_path, "verl/bad.py", source)
    (fault,) = habit_faults(tmp_path)
    assert words in fault


def test_good_habits_pass(tmp_path: Path):
    write(tmp_path, "verl/console.py", "print(1)")
    write(
        tmp_path,
        "verl/good.py",
        "try:\n    x = 1\nexcept OSError:\n    x = 2\nexcept Exception as e:\n    raise ValueError from e",
    )
    assert habit_faults(tmp_path) == []
