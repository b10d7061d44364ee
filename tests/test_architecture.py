"""The rules of the house, read from the syntax tree: order, doors, sizes, what files and imports may not."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev.bench.imports import listed
from nanochat.config.model_config import ATTENTION_KINDS
from nanochat.config.recipes import MATRIX_OPTIMIZERS
from tests.conftest import REPO

# A folder or a module at the top imports those before it here. A new module in a folder needs no entry.
ORDER = (
    "common",
    "config",
    "distributed",
    "tokenizer",
    "optim",
    "model",
    "data",
    "checkpoint",
    "engine",
    "evaluation",
    "export",
    "report",
    "train",
    "chat",
    "serve",
)
COMMANDS_OF_0_1 = ("dataset", "core_download", "__main__")  # they lead to scripts/

# Methods that the io module calls on a raw stream.
CALLED_BY_PYTHON = {"nanochat/common/checksums.py: seekable", "nanochat/data/text_files.py: readinto"}
LIBRARY = sorted((REPO / "nanochat").rglob("*.py"))
SCRIPTS = sorted((REPO / "scripts").glob("*.py"))
CODE = [*LIBRARY, *SCRIPTS]

READ_ENVIRONMENT = ("files", "machine", "world")
PURE = (
    "common.typed_json",
    "common.files",
    "config.arguments",
    "config.recipes",
    "config.schedule",
    "config.model_config",
    "config.plan",
    "common.charts",
    "report",
    "data.corpus",
)  # without torch
OPTIONAL = {
    "datasets",
    "flash_attn",
    "flash_attn_interface",
    "kernels",
    "matplotlib",
    "tiktoken",
    "tokenizers",
    "transformers",
    "wandb",
}
EXECUTES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
MAX_FUNCTION_LINES, MAX_FILE_LINES, MAX_BASE_TRAIN_LINES = 60, 450, 200


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), filename=str(path))


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def imported(node: ast.AST) -> Iterator[str]:
    """Full names that an import statement may bind: of `from a import b`, both a and a.b."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "a relative import"
        yield str(node.module)
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: not those for the type checker, not `__main__`'s."""
    for node in body:
        if isinstance(node, ast.If) and "__main__" in ast.dump(node.test):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        for inner in ("body", "orelse", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from at_import(getattr(node, inner, []))


def values_at_import(node: ast.stmt) -> Iterator[ast.expr]:
    """Expressions of one statement that are evaluated at import: values, defaults, decorators, conditions."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        defaults = [default for default in node.args.kw_defaults if default is not None]
        yield from (*node.decorator_list, *node.args.defaults, *defaults)
    else:
        yield from (child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr))


def names_called(node: ast.expr) -> Iterator[str]:
    """Last names of what an expression calls: of `Path(x).read_text()`, read_text and Path."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call):
            yield ast.unparse(part.func).rpartition(".")[2]


def module_of(path: Path) -> str:
    """nanochat/data/corpus.py -> nanochat.data.corpus; of a package, the package."""
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in LIBRARY}


def modules_imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of each module of the library that a file imports, here or later."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = list(imported(node))
            for name in names[1:] if isinstance(node, ast.ImportFrom) else names:
                module = name if name in MODULES else name.rpartition(".")[0]
                if module in MODULES:
                    yield node.lineno, module


def place_of(module: str) -> str:
    """The entry of ORDER that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_a_module_imports_only_what_comes_before_it(path: Path) -> None:
    if path.stem in COMMANDS_OF_0_1:
        return
    if path.stem == "__init__":
        assert not list(tree_of(path).body[1:]), "an __init__.py holds a docstring, nothing else"
        return
    here = place_of(module_of(path))
    assert here in ORDER, f"{here} has no place in ORDER"
    for line, module in modules_imported(path):
        there = place_of(module)
        assert there in ORDER[: ORDER.index(here) + 1], f"line {line}: {here} must not import {there}"
    for node in ast.walk(tree_of(path)):
        for name in imported(node):
            if name.split(".")[0] in ("scripts", "tests", "dev", "runs"):
                assert path.name == "report.py", f"line {node.lineno}: {name}"  # a command of 0.1, too


def test_no_module_imports_itself_through_others() -> None:
    imports = {name: {module for _, module in modules_imported(path)} for name, path in MODULES.items()}
    list(graphlib.TopologicalSorter(imports).static_order())


def test_every_place_in_the_order_is_taken() -> None:
    tops = {place_of(name) for name in MODULES} - {""}
    assert tops - set(COMMANDS_OF_0_1) == set(ORDER)


FOLDERS_OF_THE_LIBRARY = sorted(path.parent for path in LIBRARY if path.name == "__init__.py")[1:]


@pytest.mark.parametrize("folder", FOLDERS_OF_THE_LIBRARY, ids=name_of)
def test_a_folder_names_its_rooms(folder: Path) -> None:
    rooms = {
        path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    specs = [kind.module for kind in ATTENTION_KINDS.values()] + [o.rule for o in MATRIX_OPTIMIZERS.values()]
    by_table = {MODULES[spec.split(":")[0]] for spec in specs if spec}  # all of them exist
    rooms -= {"__init__", "__main__", *(path.stem for path in by_table if path.parent == folder)}
    assert set(listed(folder, "Rooms, in reading order")) == rooms


@pytest.mark.parametrize("folder", FOLDERS_OF_THE_LIBRARY, ids=name_of)
def test_others_come_in_by_the_doors(folder: Path) -> None:
    """Each door is used, and nobody outside of the folder imports another room of it."""
    used = set()
    for path in CODE:
        if path.parent == folder:
            continue
        for line, module in modules_imported(path):
            if MODULES[module].parent == folder:
                used.add(module.rpartition(".")[2])
                assert used <= set(listed(folder, "Doors")), f"{name_of(path)}, line {line}: {module}"
    assert used == set(listed(folder, "Doors"))


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_a_script_imports_no_other_script(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        for name in imported(node):
            assert not name.startswith("scripts"), f"line {node.lineno}"


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_nothing_in_a_file_can_be_executed_by_reading_it(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        for name in imported(node):
            assert name.split(".")[0] not in EXECUTES, f"line {node.lineno}: {name}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            forbidden = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "os.system"}
            assert called not in forbidden, f"line {node.lineno}: {called}"
            for keyword in node.keywords:
                assert keyword.arg not in ("shell", "allow_pickle"), f"line {node.lineno}: {keyword.arg}"


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_the_environment_is_read_in_three_places(path: Path) -> None:
    if path.stem in READ_ENVIRONMENT:
        return
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("os.environ", "os.getenv", "os.putenv"), f"line {node.lineno}"
        for name in imported(node):
            assert name not in ("os.environ", "os.getenv"), f"line {node.lineno}"


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    for node in at_import(tree_of(path).body):
        for name in imported(node):
            assert name.split(".")[0] not in OPTIONAL, f"line {node.lineno}: {name}"


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_a_module_does_no_work_at_import(path: Path) -> None:
    """Statements that run at import define names; none is called for its effect, and none reads a file."""
    for node in at_import(tree_of(path).body):
        reads = {"open", "read_text", "read_bytes", "read_json", "iterdir", "glob", "rglob", "exists", "stat"}
        called = {name for value in values_at_import(node) for name in names_called(value)}
        assert not called & reads, f"line {node.lineno}: {ast.unparse(node)[:60]}"
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_docstring or not isinstance(node, ast.Expr | ast.For | ast.While | ast.With), (
            f"line {node.lineno}: {ast.unparse(node)[:60]}"
        )


def test_no_public_name_of_the_library_is_for_tests_alone() -> None:
    """What only tests call is no part of the library: a slow twin lives in tests/."""
    callers = [*LIBRARY, *SCRIPTS, *(REPO / "dev").rglob("*.py"), *(REPO / "runs").glob("*.sh")]
    callers += (REPO / "nanochat").rglob("*.jinja")
    used = Counter(re.findall(r"\w+", "\n".join(path.read_text("utf-8") for path in callers)))
    lone = [
        f"{path.relative_to(REPO)}: {node.name}"
        for path in LIBRARY
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and used[node.name] == 1
    ]
    assert set(lone) == CALLED_BY_PYTHON


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_files_and_functions_fit(path: Path) -> None:
    limit = MAX_BASE_TRAIN_LINES - 1 if path.name == "base_train.py" else MAX_FILE_LINES
    assert len(path.read_text("utf-8").splitlines()) <= limit
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = int(node.end_lineno or 0) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name}: {lines} lines"


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_code_is_ascii(path: Path) -> None:
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        assert line.isascii(), f"line {number}: {line}"


# One interpreter imports all modules, in the order of their layers, and tells what each did besides: files,
# output, connections, changes of the environment. torch is imported first: what it does is not ours.
WATCH = """
import importlib, json, os, sys, tempfile
import torch

events = []
opened = set()
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        events.append(event)
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        opened.add(str(args[0]))
base, names = sys.argv[1], sys.argv[2:]
told = {}
report = os.dup(1)
with tempfile.TemporaryFile() as sink:
    sys.addaudithook(watch)
    os.dup2(sink.fileno(), 1)
    os.dup2(sink.fileno(), 2)
    before = dict(os.environ)
    for name in names:
        importlib.import_module(name)
        sys.stdout.flush()
        done = [*events, *("opened " + path for path in opened if not path.endswith(".pyc"))]
        sink.seek(0)
        if output := sink.read():
            done.append("printed " + output.decode(errors="replace"))
        sink.truncate(0)
        sink.seek(0)
        if os.path.exists(base):
            done.append("made " + base)
        if dict(os.environ) != before:
            done.append("changed the environment")
        if done:
            told[name] = done
        events.clear()
        opened.clear()
        before = dict(os.environ)
os.write(report, json.dumps(told).encode())
"""


def test_importing_any_module_leaves_no_file_no_output_and_no_connection(tmp_path: Path) -> None:
    base = tmp_path / "base"
    modules = [*MODULES, *(f"scripts.{path.stem}" for path in SCRIPTS)]
    if importlib.util.find_spec("triton") is None:  # as on a Mac: kernels are imported where they run
        line = "\nimport triton\n"
        needing = {name for name, path in MODULES.items() if line in path.read_text("utf-8")}
        modules = [name for name in modules if name not in needing]
    result = subprocess.run(
        [sys.executable, "-B", "-c", WATCH, str(base), *modules],
        cwd=REPO,
        env={**clean_environment(), "NANOCHAT_BASE_DIR": str(base)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {}


def test_what_decides_a_plan_or_serves_the_data_needs_no_torch() -> None:
    code = (
        "import sys, importlib\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    print(name, 'torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *(f"nanochat.{name}" for name in PURE)],
        cwd=REPO,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines() == [f"nanochat.{name} False" for name in PURE]


def clean_environment() -> dict[str, str]:
    """Only what a program needs to start."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}


# -----------------------------------------------------------------------------
# Tracked files


def tracked() -> list[Path]:
    if shutil.which("git") is None or not (REPO / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True)
    return [REPO / name for name in listed.stdout.split("\0") if name and (REPO / name).is_file()]


# Written in pieces, so that this file does not hold what it looks for.
HOSTS = ("py" + "pi.org", "py" + "thonhosted.org", "cra" + "tes.io/", "npm" + "js.org", "anaconda" + ".org")
FOLDERS = "|".join(("wor" + "k", "roo" + "t", "hom" + "e/[a-z]", "User" + "s/[a-z]", "tm" + "p/[a-z]"))


def test_tracked_files_name_no_registry_and_no_path_of_one_machine() -> None:
    machine = re.compile(rf"(?<![\w.~$}}/-])/(?:{FOLDERS})[\w/]")
    for path in tracked():
        if path.suffix in (".lock", ".png", ".zip", ".parquet"):
            continue
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), start=1):
            where = f"{name_of(path)}, line {number}: {line.strip()[:100]}"
            assert not machine.search(line), where
            assert not any(host in line for host in HOSTS), where


def test_no_tracked_file_is_large() -> None:
    for path in tracked():
        assert path.stat().st_size < 250_000 or path.suffix == ".lock", name_of(path)


def test_every_module_has_a_place_in_the_description_of_the_house() -> None:
    text = (REPO / "dev" / "ARCHITECTURE.md").read_text("utf-8")
    for path in LIBRARY:
        assert path.name == "__init__.py" or f"`{path.name}`" in text, name_of(path)
