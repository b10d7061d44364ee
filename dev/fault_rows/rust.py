"""Rows of the tokenizer's crate, of its installation, and of the drivers in runs/."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dev.fault_box import ROOT, TINY, Box, Skip, expect_ok, row


@row("R1", "ids beside tiktoken's, for random vocabularies and texts that are tokens", wanted="all equal")
def r1(box: Box) -> None:
    result = box.execute([sys.executable, "-m", "dev.fuzz_ids", "--cases=20000", "--seed=7"])
    expect_ok(result)
    assert ": 0 differ" in result.stdout, result.stdout


PLAIN_USER = [
    "setpriv",
    f"--ruid={54_000 + os.getpid() % 1000}",
    "--euid=0",
    "--clear-groups",
    "--inh-caps=-all",
]
PLAIN_USER.append("--bounding-set=-sys_resource,-sys_admin")  # whom the limits of processes bind


@row("B17", "tok_train where no thread can be had (ulimit -u)", wanted="trained with fewer threads, or rc 2")
def b17(box: Box) -> None:
    if os.getuid() != 0 or not all(map(shutil.which, ("setpriv", "prlimit"))):
        raise Skip("limits of processes bind a plain user; to become one needs root, setpriv and prlimit")
    box.tiny()
    command = box.argv("tok_train", "--corpus=tiny", "--vocab-size=300")
    for limit in (1, 3):
        limited = ["prlimit", f"--nproc={limit}", *PLAIN_USER, *command, f"--name=n{limit}"]
        expect_ok(box.execute(limited))
        tokenizers = box.base / "tokenizers"
        made, usual = (
            json.loads((tokenizers / n / "tokenizer.json").read_text()) for n in (f"n{limit}", "tiny")
        )
        assert made["model"]["vocab"] == usual["model"]["vocab"], "another vocabulary than with threads"


@row("B19", "tok_train and base_train with 16 to 64 open files (ulimit -n)", wanted="rc 0")
def b19(box: Box) -> None:
    box.tiny()
    for limit in (16, 64):
        train = f"$PY -m scripts.tok_train --corpus=tiny --name=n{limit} --vocab-size=300"
        expect_ok(box.shell(f"ulimit -n {limit}; exec {train}"))
    expect_ok(box.shell("ulimit -n 64; exec $PY -m scripts.base_train $TINY --run=files --num-iterations=2"))


def checkout(box: Box, name: str) -> Path:
    """A checkout of another name, whose .venv has this Python and counts as installed."""
    repo = box.folder / name
    repo.mkdir()
    for part in ("runs", "nanochat", "scripts", "dev", "pyproject.toml", "rustbpe.pyi"):
        (repo / part).symlink_to(ROOT / part)
    (repo / "rustbpe").mkdir()  # sources alone are not the module, which is installed
    (repo / "rustbpe" / "Cargo.toml").write_bytes((ROOT / "rustbpe" / "Cargo.toml").read_bytes())
    shutil.copytree(ROOT / "runs", repo / "runs.copy")
    (repo / "runs").unlink()
    (repo / "runs.copy").rename(repo / "runs")
    python = repo / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    key = driver(box, repo, "install_key")
    expect_ok(key)
    (repo / ".venv" / "nanochat-installed").write_text(f"{key.stdout}plots\n")
    return repo


def driver(box: Box, repo: Path, code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run shell code after what the drivers share, as each of them begins."""
    return box.execute(["bash", "-c", f'source "{repo}/runs/_common.sh"\n{code}'], env=env)


@row("B23", "drivers in a checkout whose name has blanks and accents, with CONDA_PREFIX set", wanted="works")
def b23(box: Box) -> None:
    repo = checkout(box, "my co (\u00e9)")
    base = box.folder / "d\u00e4ta of mine"
    (box.folder / "a text.txt").write_text("some text about a cat and a dog\n" * 3000)
    train = " ".join(TINY).replace("--corpus=tiny", "--corpus=n")
    result = driver(
        box,
        repo,
        f"""ensure_environment plots
        step corpus "$PYTHON" -m scripts.dataset --corpus local --name n --files "{box.folder}/a text.txt"
        train_tokenizer n --vocab-size 300
        step training launch 1 scripts.base_train {train} --run q --num-iterations 2
        step evaluation launch 1 scripts.base_eval --run q --eval bpb --eval-tokens 512 --device-type cpu
        scored "$(run_dir q)" bpb && say scored
        write_table "$(base_dir)/a table.csv" q""",
        NANOCHAT_BASE_DIR=str(base),
        CONDA_PREFIX="/opt/conda of another",
        VIRTUAL_ENV="/else where/.venv",
    )
    expect_ok(result)
    assert "scored" in result.stdout.splitlines(), result.stdout[-600:]
    assert (base / "a table.csv").is_file()


OLD_PIP = """
if [ "$1 $2" = "-m pip" ]; then
  shift 2
  echo "pip $* (user=${PIP_USER:-unset} target=${PIP_TARGET:-unset})" >>"$CALLS"
  case "$1" in --version) cat "$CALLS.version" ;; *--upgrade*) ;; esac
  case " $* " in *" --upgrade pip "*) echo "pip 26.1 from x (python 3.10)" >"$CALLS.version" ;; esac
  case " $* " in
    *" -e "*) grep -q "pip 2[2-9]" "$CALLS.version" || { echo 'File "setup.py" not found' >&2; exit 1; } ;;
  esac
fi
"""


def pip_calls(box: Box, version: str, **env: str) -> list[str]:
    """What the drivers ask of a pip of this version to install a folder."""
    repo, calls = box.folder / "repo", box.folder / "calls"
    shutil.copytree(ROOT / "runs", repo / "runs", dirs_exist_ok=True)
    stub = box.folder / "python"
    stub.write_text(f"#!/bin/bash\n{OLD_PIP}")
    stub.chmod(0o755)
    Path(f"{calls}.version").write_text(f"pip {version} from x (python 3.10)\n")
    without_uv = 'have() { [ "$1" != uv ] && command -v "$1" >/dev/null 2>&1; }'
    code = f'PYTHON="{stub}"; {without_uv}; pip_install -e ".[plots]"'
    expect_ok(driver(box, repo, code, CALLS=str(calls), **env))
    return [line for line in calls.read_text().splitlines() if "--version" not in line]


@row("B24", "PIP_USER=1, PIP_TARGET or pip.conf user=true at the installation", wanted="installed into .venv")
def b24(box: Box) -> None:
    calls = pip_calls(box, "26.1", PIP_USER="1", PIP_TARGET="/somewhere")
    assert len(calls) == 1, calls
    assert calls[0].endswith("(user=0 target=unset)"), calls
    # The real pip, in an environment, with the settings of both kinds: it installs nothing for the user.
    venv, package = box.folder / "venv", box.folder / "package"
    package.mkdir()
    (package / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "b"\nbackend-path = ["."]\n'
    )
    (package / "b.py").write_text(BACKEND)
    expect_ok(box.execute([sys.executable, "-m", "venv", str(venv)]))
    (box.folder / "pip.conf").write_text("[install]\nuser = true\n")
    code = f'PYTHON="{venv}/bin/python"; pip_here --no-index "{package}"; "$PYTHON" -c "import tiny_package"'
    for env in ({"PIP_USER": "1"}, {"PIP_CONFIG_FILE": str(box.folder / "pip.conf")}):
        expect_ok(driver(box, box.folder / "repo", code, HOME=str(box.folder), **env))


BACKEND = """
import zipfile
def build_wheel(folder, config_settings=None, metadata_directory=None):
    name, info = "tiny_package-1-py3-none-any.whl", "tiny_package-1.dist-info"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        wheel.writestr("tiny_package.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: tiny_package\\nVersion: 1\\n")
        kind = "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr(f"{info}/WHEEL", kind)
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""


@row(
    "B25", "pip 21.2.4, which Python 3.10.0 to 3.10.2 put into an environment", wanted="pip is renewed first"
)
def b25(box: Box) -> None:
    calls = pip_calls(box, "21.2.4")
    assert len(calls) == 2, calls
    assert "--upgrade pip" in calls[0], calls
    assert "-e .[plots]" in calls[1], calls


@row("B26", "commands from another folder, and with a foreign `scripts` on PYTHONPATH", wanted="ours run")
def b26(box: Box) -> None:
    foreign = box.folder / "foreign"
    (foreign / "scripts").mkdir(parents=True)
    (foreign / "scripts" / "__init__.py").write_text("")
    elsewhere = {"PYTHONPATH": str(ROOT)}  # as an editable installation has it
    expect_ok(box.run("tok_train", "--help", env=elsewhere, cwd=box.folder))
    expect_ok(box.run("tok_train", "--help", env={"PYTHONPATH": str(foreign)}, cwd=ROOT))


@row("B27", "where torch.compile keeps what it makes", wanted="below the base directory")
def b27(box: Box) -> None:
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise Skip("torch.compile needs a C++ compiler on a CPU")
    box.tiny()
    (box.folder / "tmp").mkdir()
    env = {"TMPDIR": str(box.folder / "tmp"), "TORCH_COMPILE_THREADS": "1"}
    train = [*TINY, "--run=c", "--num-iterations=1", "--depth=1", "--eval-every=0"]
    expect_ok(box.run("base_train", *train, "--compile=on", env=env, timeout=600))
    assert any((box.base / "compiled").rglob("*.so")), "nothing was kept below the base directory"
    # Torch compiles the headers of its generated C++ once a user, and has no setting for where.
    kept = {path.name for path in (box.folder / "tmp").glob("torchinductor_*/*")} - {"precompiled_headers"}
    assert not kept, f"in the temporary folder: {sorted(kept)}"


@contextlib.contextmanager
def half_a_core() -> Iterator[list[Path]]:
    """A control group of this machine that may use half a core."""
    roots = [Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")]
    group = next((root for root in roots if root.is_dir()), roots[0]) / f"faults-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        raise Skip(f"no control group can be made here ({error})") from None
    try:
        if (group / "cpu.cfs_quota_us").exists():
            (group / "cpu.cfs_quota_us").write_text("50000")
        else:
            (group / "cpu.max").write_text("50000 100000")
        yield [group / "cgroup.procs"]
    except FileNotFoundError as error:
        raise Skip(f"control groups have no quota of cores here ({error})") from None
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


@row(
    "B28",
    "a container that may use half of the cores that it sees, started by hand",
    wanted="a hint is printed",
)
def b28(box: Box) -> None:
    box.tiny()
    with half_a_core() as (procs,):
        code = f'echo $$ >"{procs}" && exec $PY -m scripts.base_train $TINY --num-iterations=1 --run='
        two = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "ACTIVE"}
        spinning = box.shell(f"{code}a", env=two, timeout=600)
        passive = box.shell(f"{code}b", env=two | {"OMP_WAIT_POLICY": "PASSIVE"}, timeout=600)
    for result in (spinning, passive):
        expect_ok(result)
    assert "may use 0.5 cores" in spinning.stdout, spinning.stdout[-600:]
    assert "OMP_WAIT_POLICY=PASSIVE" in spinning.stdout
    assert "hint:" not in passive.stdout, "the remedy was followed, and the hint is still there"


@row("B30", "the clock set back after training: a checkpoint newer than its score", wanted="not scored again")
def b30(box: Box) -> None:
    box.tiny()
    repo = checkout(box, "repo")
    expect_ok(box.run("base_train", *TINY, "--run=r", "--num-iterations=2", "--save-every=1"))
    run = box.base / "runs" / "r"
    asked = f'scored "{run}" bpb && echo yes || echo no'

    def scored() -> bool:
        result = driver(box, repo, asked)
        expect_ok(result)
        return result.stdout.split() == ["yes"]

    assert not scored(), "there is no score"
    expect_ok(box.run("base_eval", "--run=r", "--eval=bpb", "--eval-tokens=512", "--device-type=cpu"))
    assert scored()
    os.utime(run / "base_eval.json", (1, 1))
    assert scored(), "older by its time than the checkpoint that it is of"
    manifest = run / "checkpoints" / "step_000002" / "MANIFEST.json"
    listed = json.loads(manifest.read_text())
    listed["files"]["model.safetensors"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(listed))
    os.utime(manifest, (1, 1))
    assert not scored(), "the checkpoint is another one"


@row("C2", "vocabularies around 65,536: trained, decoded, saved and read by tokenizers", wanted="same ids")
def c2(box: Box) -> None:
    for size in (65535, 65536, 65537, 70000):
        result = box.python(AROUND_65536, size)
        expect_ok(result)
        assert result.stdout.split() == [str(size), "same", "same", "same"], result.stdout


AROUND_65536 = """
import random, sys
from pathlib import Path
import tokenizers
from nanochat.tokenizer.tokenizer import Tokenizer

size, rng = int(sys.argv[1]), random.Random(0)
words = ["".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(2, 9))) for _ in range(60_000)]
ours = Tokenizer.train([" ".join(words)], size)
folder = Path(f"tokenizer-{size}")
ours.save(folder)
theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
text = " ".join(words[::7]) + " 12345 na\\u00efve"
ids = ours.encode(text)
assert max(ids) > 60_000, max(ids)
print(ours.vocab_size)
loaded = Tokenizer.load(folder).encode(text)
for same in (theirs.encode(text).ids == ids, ours.decode(ids) == text, loaded == ids):
    print("same" if same else "other")
"""
