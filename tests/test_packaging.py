"""The wheel: the package and its compiled module, and nothing else; it works where it is all there is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPO

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None  # type: ignore[assignment]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cargo") is None, reason="building the wheel needs Rust"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout. The installed maturin builds it: nothing is fetched."""
    pytest.importorskip("maturin")
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
    ]
    if importlib.util.find_spec("pip") is None:  # an environment made by uv
        command = ["uv", "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "-o", folder]
    result = subprocess.run([*command, REPO], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_one_wheel_serves_every_python_from_3_10_on(wheel: Path) -> None:
    assert wheel.name.startswith(f"nanochat-{importlib.metadata.version('nanochat')}-cp310-abi3-")


def test_it_holds_the_package_and_the_compiled_module_and_nothing_of_the_checkout(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"nanochat", "rustbpe"}
    assert "nanochat/py.typed" in names
    packaged = {name for name in names if name.startswith("nanochat/") and not name.endswith("/")}
    assert packaged == {
        path.relative_to(REPO).as_posix()
        for path in (REPO / "nanochat").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }  # with the page of the report and the model of the export, which are no modules
    compiled = [name for name in names if name.endswith((".so", ".pyd", ".dylib"))]
    assert [name.split("/")[0].split(".")[0] for name in compiled] == ["rustbpe"]
    assert "rustbpe/__init__.pyi" in names  # maturin takes it from rustbpe.pyi beside pyproject.toml
    assert not [name for name in names if "__pycache__" in name or name.endswith((".rs", "educational.py"))]


def test_it_declares_its_dependencies_and_extras(wheel: Path) -> None:
    if tomllib is None:
        pytest.skip("reading pyproject.toml needs Python 3.11")
    project = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode("utf-8")
    for extra in ("wandb", "data", "plots", "gpu", "eval", "dev"):
        assert extra in project["optional-dependencies"]
        assert f"Provides-Extra: {extra}" in metadata
    required = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and ";" not in line
    ]
    assert len(required) == len(project["dependencies"])
    assert "Requires-Python: >=3.10" in metadata


USE = """
import sys
import nanochat, rustbpe
from nanochat.config import arguments, plan as planning
from nanochat.tokenizer.tokenizer import Tokenizer

for module in (nanochat, rustbpe):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
text = "Hello world, caf\\u00e9 42 \\U0001f600\\n"
tokenizer = Tokenizer.train([text] * 3, 300)
assert tokenizer.decode(tokenizer.encode(text)) == text
assert planning.plan(arguments.TrainArgs(depth=4), tokenizer.vocab_size).steps > 0
print("ok")
"""


def test_installed_alone_it_imports_and_encodes(wheel: Path, tmp_path: Path) -> None:
    """Installed into an empty folder; the dependencies come from here, our own packages do not."""
    target, dependencies = tmp_path / "installed", tmp_path / "dependencies"
    with zipfile.ZipFile(wheel) as archive:  # what installing a wheel without scripts is
        archive.extractall(target)
    dependencies.mkdir()
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if (
            not path.name.startswith(("nanochat", "rustbpe", "__pycache__", "__editable__"))
            and path.suffix != ".pth"
        ):
            (dependencies / path.name).symlink_to(path)
    paths = f"import sys; sys.path[:0] = [{str(target)!r}, {str(dependencies)!r}]"
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"{paths}\n{USE}", str(target)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "ok"


def test_the_extra_of_a_gpu_is_installed_as_it_is_built(tmp_path: Path) -> None:
    """Its packages are wheels: nobody needs a compiler of CUDA, or an hour, to install a fast kernel."""
    if tomllib is None:
        pytest.skip("this Python reads no TOML")
    wanted = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(tmp_path),
    ]
    done = subprocess.run([*command, *wanted["gpu"]], capture_output=True, text=True, timeout=120)
    if done.returncode and "Temporary failure in name resolution" in done.stderr:
        pytest.skip("there is no network")
    assert done.returncode == 0, done.stderr
    assert [path.suffix for path in tmp_path.iterdir()] == [".whl"] * len(wanted["gpu"])
