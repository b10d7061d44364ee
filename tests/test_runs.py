"""The shell drivers: they parse, name what a machine lacks in one line, and redo nothing that is done."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.common import files
from nanochat.data.hub_corpora import HUB_CORPORA
from nanochat.tokenizer.tokenizer import Tokenizer
from tests.conftest import REPO
from tests.hub_server import Hub, environment
from tests.tiny import WORDS
from tests.token_files import NAME, sentences, shard_bytes, token_stream

BASH = shutil.which("bash")
SCRIPTS = sorted([*(REPO / "runs").glob("*.sh"), REPO / ".ci" / "run"])
TOOLS = (
    "awk",
    "bash",
    "cat",
    "cksum",
    "cp",
    "dirname",
    "env",
    "find",
    "grep",
    "mkdir",
    "rm",
    "sed",
    "seq",
    "sort",
    "uname",
)
WORKING = {
    "python3": "exit 0",
    "cargo": "exit 0",
    "rustc": "echo 'rustc 1.99.0 (abc 2026-01-01)'",
    "cc": "exit 0",
    "df": "printf 'head\\n/dev/x 1 1 99000000 1%% /\\n'",
}
# Makes a .venv whose python is a stub, and writes down what it is asked to install.
UV = """
case "$1" in
  venv) for last; do :; done; mkdir -p "$last/bin"; cp "$(command -v python3)" "$last/bin/python" ;;
  pip) for last; do :; done; echo "$last" >>"$UV_LOG" ;;
esac
"""

pytestmark = pytest.mark.skipif(BASH is None, reason="there is no bash on this machine")


class Machine:
    """A copy of the drivers, and a PATH that has only what a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.repo, self.bin, self.log = folder / "repo", folder / "bin", folder / "uv.log"
        shutil.copytree(REPO / "runs", self.repo / "runs")
        shutil.copytree(REPO / "rustbpe", self.repo / "rustbpe", ignore=shutil.ignore_patterns("target"))
        shutil.copy(REPO / "pyproject.toml", self.repo)
        self.environment: dict[str, str] = {}
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        for name, body in WORKING.items():
            self.put(name, body)

    def put(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!{BASH}\n{body}\n", "utf-8")
        path.chmod(0o755)

    def remove(self, *names: str) -> None:
        for name in names:
            (self.bin / name).unlink()

    def bash(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": str(self.bin),
            "HOME": str(self.repo.parent),
            "UV_LOG": str(self.log),
            "NANOCHAT_BASE_DIR": str(self.repo.parent / "base"),
            **self.environment,
        }
        return subprocess.run(
            [str(BASH), *arguments],
            env=environment,
            cwd=cwd or self.repo.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def driver(self, name: str = "quickstart.sh") -> subprocess.CompletedProcess[str]:
        return self.bash(str(self.repo / "runs" / name))

    def call(self, code: str) -> subprocess.CompletedProcess[str]:
        """Run shell code after sourcing what the drivers share."""
        return self.bash("-c", f'source "{self.repo}/runs/_common.sh"\n{code}')

    def installs(self) -> list[str]:
        return self.log.read_text("utf-8").splitlines() if self.log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_parses(script: Path) -> None:
    subprocess.run([str(BASH), "-n", str(script)], check=True)


def test_the_drivers_can_be_executed_as_they_are() -> None:
    for script in SCRIPTS:
        if script.name != "_common.sh":
            assert script.stat().st_mode & stat.S_IXUSR, script


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "runs/test.sh" in (REPO / ".ci" / "run").read_text("utf-8")


@pytest.mark.parametrize("driver", ["quickstart.sh", "test.sh"])
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (("python3",), "no Python 3.10 or newer"),
        (("cargo",), "Rust is not installed"),
        (("rustc",), "Rust is not installed"),
        (("cc",), "no C compiler (cc)"),
    ],
)
def test_what_the_machine_lacks_is_one_line_and_nothing_is_made(
    machine: Machine, driver: str, missing: tuple[str, ...], message: str
) -> None:
    machine.remove(*missing)
    result = machine.driver(driver)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not (machine.repo / ".venv").exists()


@pytest.mark.parametrize(
    ("tool", "body", "message"),
    [
        ("python3", "exit 1", "no Python 3.10 or newer"),
        ("rustc", "echo 'rustc 1.70.0 (abc 2023-01-01)'", "Rust 1.70.0 is too old"),
        ("rustc", "exit 1", "rustup default stable"),
        ("df", "printf 'head\\n/dev/x 1 1 2100000 1%% /\\n'", "2 GB free"),
    ],
)
def test_what_is_too_old_or_too_small_is_one_line(
    machine: Machine, tool: str, body: str, message: str
) -> None:
    machine.put(tool, body)
    result = machine.driver()
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr
    assert not (machine.repo / ".venv").exists()


def test_a_python_without_venv_is_named(machine: Machine) -> None:
    machine.put("python3", 'case "$2" in *ensurepip*) exit 1 ;; esac')
    result = machine.driver()
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "python3-venv" in result.stderr


def test_installation_is_done_once_and_again_only_when_it_must_be(machine: Machine) -> None:
    machine.put("uv", UV)
    for expected in (1, 1):
        assert machine.call("ensure_environment plots").returncode == 0
        assert len(machine.installs()) == expected
    machine.call("ensure_environment plots dev")
    machine.call("ensure_environment plots")  # there already, with more beside it
    assert machine.installs() == [".[plots]", ".[plots,dev]"]
    source = machine.repo / "rustbpe" / "src" / "lib.rs"
    source.write_text(source.read_text("utf-8") + "\n// changed\n", "utf-8")
    machine.call("ensure_environment plots")
    machine.call("ensure_environment plots")
    assert machine.installs()[2:] == [".[plots,dev]"]


def test_an_installation_that_failed_is_tried_again(machine: Machine) -> None:
    machine.put("uv", UV.replace('echo "$last"', 'echo "$last" >>"$UV_LOG"; exit 7; echo'))
    for attempts in (1, 2):
        result = machine.call("ensure_environment plots; echo went on")
        assert result.returncode == 7
        assert "went on" not in result.stdout
        assert "stopped at: installation (exit code 7" in result.stderr
        assert len(machine.installs()) == attempts


def test_a_step_that_fails_stops_the_script_with_its_exit_code(machine: Machine) -> None:
    result = machine.call('step "first" false || true\nstep "second" bash -c "exit 5"\necho went on')
    assert "stopped at: first" in result.stderr
    assert result.returncode == 1
    result = machine.call('step "second" bash -c "exit 5"\necho went on')
    assert (result.returncode, "went on" in result.stdout) == (5, False)


def test_it_works_from_any_directory_and_a_relative_base_directory_is_meant_from_there(
    machine: Machine,
) -> None:
    source = f'export NANOCHAT_BASE_DIR=here; source "{machine.repo}/runs/_common.sh"'
    code = f'{source}; echo "$PWD $NANOCHAT_BASE_DIR"'
    elsewhere = machine.repo.parent / "elsewhere"
    elsewhere.mkdir()
    result = machine.bash("-c", code, cwd=elsewhere)
    assert result.stdout.split() == [str(machine.repo), str(elsewhere / "here")]


# Tells the folders, counts 20 shards, projects a time, writes down what it is asked to run; fails where
# $HOME/fail says so.
PYTHON = """
case "$1" in
  -c) case "$2" in
        *base_dir*) echo "$NANOCHAT_BASE_DIR" ;;
        *run_dir*) echo "$NANOCHAT_BASE_DIR/runs/$3" ;;
      esac ;;
  -) case "$(cat)" in
       *roofline*) echo "Ours: so long, $*" ;;
       *) echo 20 ;;
     esac ;;
  -m) echo "$*" >>"$HOME/calls"
      if [ -f "$HOME/fail" ] && grep -qxF -- "$*" "$HOME/fail"; then exit 9; fi ;;
esac
"""


def smi(name: str, capability: str, gpus: int = 8) -> str:
    """An nvidia-smi that lists these GPUs, and tells of each its name and its compute capability."""
    each = f"for i in $(seq {gpus}); do echo"
    return f"""case "$1" in
  -L) {each} "GPU $i: {name} (UUID: GPU-$i)"; done ;;
  *=name) {each} "{name}"; done ;;
  *=compute_cap) {each} "{capability}"; done ;;
  *) echo "not asked before"; exit 2 ;;
esac"""


@pytest.fixture
def gpus(machine: Machine) -> Machine:
    """A machine with eight GPUs, the CORE tasks, and a python that only writes down what it is asked."""
    machine.put("uv", UV)
    machine.put("python3", PYTHON)
    machine.put("nvidia-smi", smi("NVIDIA H100 80GB HBM3", "9.0"))
    bundle = machine.repo.parent / "base" / "eval_bundle"
    bundle.mkdir(parents=True)
    (bundle / "core.yaml").touch()
    return machine


def calls(machine: Machine) -> list[str]:
    return (machine.repo.parent / "calls").read_text("utf-8").splitlines()


def test_speedrun_chains_the_stages_and_fetches_shards_meanwhile(gpus: Machine) -> None:
    result = gpus.driver("speedrun.sh")
    assert result.returncode == 0, result.stderr
    assert gpus.installs() == [".[plots,gpu]"]
    made = calls(gpus)
    ranks = "-m torch.distributed.run --standalone --nproc_per_node=8 -m scripts"
    assert made[0] == "-m scripts.dataset --corpus fineweb-edu -n 20 --first 8"
    made.remove("-m scripts.dataset --corpus fineweb-edu -n 20")  # in the background: its place may differ
    assert made[1] == "-m scripts.tok_train --corpus fineweb-edu"
    name = "speedrun-d26"
    recipe = "--recipe nanochat-2026-01 --target-param-data-ratio 7.25 --total-batch-size 524288 --fp8"
    flags = f"--depth 26 {recipe} --device-type cuda --run {name} --corpus fineweb-edu"
    assert made[2] == f"{ranks}.base_train -- {flags} --resume auto"
    scoring = f"--run {name} --eval core,bpb,sample --eval-bundle  --device-type cuda"
    assert made[3] == f"{ranks}.base_eval -- {scoring}"
    assert made[4] == f"-m scripts.report --run {name}"
    corpora = ("made", "smoltalk", "mmlu", "gsm8k", "arc-easy", "arc-challenge", "humaneval")
    assert made[5:12] == [f"-m scripts.chat_data --corpus {corpus}" for corpus in corpora]
    mixture = f"--base {name} --run {name}-sft --data runs/chat_mixture.toml"
    assert made[12] == f"{ranks}.chat_sft -- {mixture} --device-type cuda --resume auto"
    assert made[13] == f"{ranks}.chat_eval -- --run {name}-sft --tasks chatcore --device-type cuda"
    assert made[14:] == [f"-m scripts.report --run {name}-sft"]
    told = result.stdout[: result.stdout.index("== first shards")]  # before anything is fetched
    assert f"Recipe: {flags}\n" in told
    assert "2.49 hours, CORE 0.2626 and 0.2729" in told
    assert "pull request 516 of karpathy/nanochat" in told
    assert "otherwise" not in told
    assert f"Ours: so long, - NVIDIA H100 80GB HBM3 fineweb-edu 8 {flags}\n" in told


def test_quickstart_ends_in_a_conversation(machine: Machine) -> None:
    machine.put("uv", UV)
    machine.put("python3", PYTHON)
    result = machine.driver()
    assert result.returncode == 0, result.stderr
    made = calls(machine)
    commands = [call.split()[1].removeprefix("scripts.") for call in made]
    base = ["dataset", "tok_train", "base_train", "base_eval", "report"]
    chat = ["chat_data", "chat_eval", "chat_sft", "chat_eval", "chat_rl", "chat_eval", "chat_eval"]
    assert commands == [*base, *chat, "report", "report", "chat_cli"]
    of_run = [call.split("--run ")[1].split()[0] for call in made if " --run " in call]
    sft, rl = "quickstart-sft", "quickstart-rl"
    assert of_run == [*["quickstart"] * 4, sft, sft, rl, rl, sft, rl, rl]
    assert "--base quickstart --run quickstart-sft " in next(call for call in made if "chat_sft" in call)
    assert "--base quickstart-sft --run quickstart-rl " in next(call for call in made if "chat_rl" in call)
    assert f"-m scripts.chat_eval --compare {sft} {rl}" in made
    assert made[-1].endswith("-p What is 347 + 589?")
    assert "python -m scripts.chat_cli --run quickstart-rl\n" in result.stdout


def test_the_mixture_of_speedrun_is_of_corpora_that_it_fetches() -> None:
    tables = (REPO / "runs" / "chat_mixture.toml").read_text("utf-8")
    named = re.findall(r'^corpus = "([\w-]+)"$', tables, re.MULTILINE)
    keys = set(re.findall(r"^(\w+) = ", tables, re.MULTILINE))
    fetched = re.search(r"for corpus in (.*); do", (REPO / "runs" / "speedrun.sh").read_text("utf-8"))
    assert fetched is not None
    assert len(named) == tables.count("[[source]]\n") == 4
    assert set(named) <= set(fetched[1].split())
    assert keys <= {"corpus", "epochs", "split", "limit"}


@pytest.mark.parametrize(
    ("scores", "asked", "expected"),
    [
        ({}, "calc,unit", True),
        ({}, "made", False),  # all of them
        ({"weights": "of others"}, "calc", False),
        ({"tasks": []}, "calc", False),  # damaged
    ],
)
def test_answers_of_the_newest_checkpoint_are_known(
    scored_run: Path, scores: dict[str, object], asked: str, expected: bool
) -> None:
    task = {
        "accuracy": 1.0,
        "baseline": 0.0,
        "centered": 1.0,
        "commonest": None,
        "examples": 1,
        "interval": [0.5, 1.0],
        "pass_at": {},
        "stderr": 0.0,
        "too_long": 0,
        "unjudged": 0,
    }
    about = {"step": 2, "weights": "of 2", "settings": {}, "means": {}, "answers_sha256": ""}
    entries = about | {"tasks": {"calc": task, "unit": task}} | scores
    files.write_json(scored_run / "chat_eval.json", entries)
    result = call_here(f'chat_scored "{scored_run}" {asked}')
    assert (result.returncode == 0, result.stderr) == (expected, "")


def test_answers_that_are_there_are_not_asked_for_again(machine: Machine) -> None:
    machine.put("python3", PYTHON)  # is_scored: yes
    files.write_json(machine.repo.parent / "base" / "runs" / "r" / "chat_eval.json", {})
    ask = "PYTHON=python3; NPROC=2; ensure_chat_scores {} made --seed 1"
    done = machine.call(ask.format("r"))
    assert (done.returncode, "r is scored already" in done.stdout) == (0, True)
    assert machine.call(ask.format("s")).returncode == 0
    flags = "-- --run s --tasks made --seed 1"
    assert calls(machine) == [
        f"-m torch.distributed.run --standalone --nproc_per_node=2 -m scripts.chat_eval {flags}"
    ]


def test_speedrun_on_the_text_of_the_record_has_its_recipe(gpus: Machine) -> None:
    gpus.environment["CORPUS"] = "climbmix"
    result = gpus.driver("speedrun.sh")
    assert result.returncode == 0, result.stderr
    recipe = "--depth 24 --recipe nanochat-2026-07 --target-param-data-ratio 8 --fp8 --device-type cuda"
    assert [call for call in calls(gpus) if f"-- {recipe} --run speedrun-d24 --corpus climbmix " in call]
    assert "1.65 hours, CORE 0.2626 (mean of five runs)" in result.stdout
    assert "run 6 of the leaderboard of karpathy/nanochat" in result.stdout


@pytest.mark.parametrize(
    ("capability", "fp8"), [("9.0", True), ("10.0", True), ("8.0", False), ("Field is not valid", False)]
)
def test_fp8_is_for_gpus_that_have_it(gpus: Machine, capability: str, fp8: bool) -> None:
    gpus.put("nvidia-smi", smi("NVIDIA GPU", capability))
    result = gpus.driver("speedrun.sh")
    assert result.returncode == 0, result.stderr
    (trained,) = [call for call in calls(gpus) if "base_train" in call]
    assert ("--fp8" in trained.split()) is fp8
    assert ("bf16 instead of fp8" in result.stdout) is not fp8


def test_flags_and_numbers_of_the_user_win_and_the_published_figures_are_not_for_them(gpus: Machine) -> None:
    gpus.environment |= {"DEPTH": "20", "NPROC": "4", "RUN": "mine"}
    result = gpus.bash(str(gpus.repo / "runs" / "speedrun.sh"), "--target-param-data-ratio", "8", "--no-fp8")
    assert result.returncode == 0, result.stderr
    (trained,) = [call for call in calls(gpus) if "base_train" in call]
    assert "--nproc_per_node=4 " in trained
    assert trained.index("ratio 7.25") < trained.index("--target-param-data-ratio 8 --no-fp8 --run mine")
    unlike = "otherwise: depth 20, GPUs: 4, --target-param-data-ratio 8 --no-fp8. Those figures are not for"
    assert unlike in result.stdout


def test_the_race_trains_every_seed_on_all_gpus_and_makes_one_row(gpus: Machine) -> None:
    gpus.environment["SEEDS"] = "0 1"
    files.write_json(gpus.repo.parent / "base" / "runs" / "speedrun-124m-s0" / "config.json", {})
    result = gpus.driver("speedrun_124m.sh")
    assert result.returncode == 0, result.stderr
    ranks = "-m torch.distributed.run --standalone --nproc_per_node=8 -m scripts"
    flags = "--recipe speedrun-124m --depth 12 --device-type cuda --corpus fineweb10B-gpt2"
    train = f"{ranks}.base_train -- {flags}"
    expected = ["-m scripts.dataset --corpus fineweb10B-gpt2 -n 20"]
    for seed in (0, 1):
        name = f"speedrun-124m-s{seed}"
        expected += [
            f"{train} --seed {seed} --run {name} --resume auto",
            f"{ranks}.base_eval -- --run {name} --eval bpb,sample --device-type cuda",
            f"-m scripts.report --run {name}",
        ]
    told = result.stdout[: result.stdout.index("== 20 shards")]
    assert "record 89 of modded-nanogpt" in told
    assert f"Ours: so long, - NVIDIA H100 80GB HBM3 fineweb10B-gpt2 8 {flags}\n" in told
    assert gpus.installs() == [".[plots,gpu]"]
    row = "-m dev.leaderboard --race loss speedrun-124m-s0 speedrun-124m-s1"
    made = calls(gpus)
    declared = made.index("-m dev.significance --declare 2 speedrun-124m-s0")
    assert declared < made.index(expected[2]), "it was declared when the first run had been scored"
    del made[declared]
    assert made == [*expected, row]


def test_a_race_that_ended_at_its_target_makes_no_row(gpus: Machine) -> None:
    folder = gpus.repo.parent / "base" / "runs" / "speedrun-124m-s0"
    files.write_json(folder / "summary.json", {"status": "target_reached"})
    result = gpus.driver("speedrun_124m.sh")
    assert result.returncode == 0, result.stderr
    assert "makes no row" in result.stdout
    assert not [call for call in calls(gpus) if "leaderboard" in call]


def test_the_race_wants_a_gpu(machine: Machine) -> None:
    result = machine.driver("speedrun_124m.sh")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "nvidia-smi lists no GPU" in result.stderr


@pytest.mark.slow
def test_the_race_runs_from_shards_to_row(tmp_path: Path, shared_data: Path) -> None:
    """Small, on a CPU that calls itself a GPU, with a hub on this machine."""
    repo = tmp_path / "repo"
    repo.mkdir()
    for name in ("runs", "nanochat", "scripts", "dev", "pyproject.toml", "rustbpe.pyi"):
        (repo / name).symlink_to(REPO / name)
    (repo / "rustbpe").mkdir()  # sources alone are not the module, which is installed
    python = repo / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!{BASH}\nexec "{sys.executable}" "$@"\n', "utf-8")
    gpu = tmp_path / "bin" / "nvidia-smi"
    gpu.parent.mkdir()
    gpu.write_text(f"#!{BASH}\n{smi('NVIDIA H100', '9.0', gpus=1)}\n", "utf-8")
    for program in (python, gpu):
        program.chmod(0o755)
    gpt2 = Tokenizer.from_gpt2_file(shared_data / "bpe" / "encoder.json")
    tokens = token_stream(gpt2, sentences(300, WORDS))
    names = ["fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    server = Hub({name: shard_bytes(tokens) for name in names}, HUB_CORPORA[NAME].repo)
    vocabulary = (shared_data / "bpe" / "encoder.json").read_bytes()
    server.model_files["openai-community/gpt2/vocab.json"] = vocabulary
    base = tmp_path / "base"
    env = environment(server, base) | {"PATH": f"{gpu.parent}:{os.environ['PATH']}", "SEEDS": "0 1"}
    env["DEVICE_TYPE"] = "cpu"
    key = subprocess.run(
        [str(BASH), "-c", f'source "{repo}/runs/_common.sh"; install_key'],
        env=env,
        capture_output=True,
        text=True,
    ).stdout
    (repo / ".venv" / "nanochat-installed").write_text(f"{key}plots\n", "utf-8")
    flags = (
        "--depth 2 --max-seq-len 32 --aspect-ratio 16 --head-dim 16 --total-batch-size 768 --dtype float32 "
    )
    flags += "--num-iterations 6 --eval-tokens 512 --eval-every 3 --save-every 0"
    driver = [str(BASH), str(repo / "runs" / "speedrun_124m.sh"), *flags.split()]
    try:
        done = subprocess.run(driver, env=env, capture_output=True, text=True, timeout=500)
    finally:
        server.close()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    for seed in (0, 1):
        folder = base / "runs" / f"speedrun-124m-s{seed}"
        summary = files.read_json(folder / "summary.json")
        assert (summary["status"], summary["tokens"]) == ("finished", 256 * (2 + 4 + 6))
        scores = files.read_json(folder / "base_eval.json")
        assert summary["val_loss"] == pytest.approx(scores["loss"]["val"], rel=0.05)
        assert (folder / "report.html").is_file()
    assert "| date | commit |" in done.stdout
    assert re.search(r"Ours: not measured yet. 6 steps, .* of training on 1 x NVIDIA H100, MFU ", done.stdout)


@pytest.mark.parametrize(
    "failing",
    ["-m scripts.dataset --corpus fineweb-edu -n 20 --first 8", "-m scripts.tok_train --corpus fineweb-edu"],
)
def test_speedrun_does_not_train_without_shards_or_tokenizer(gpus: Machine, failing: str) -> None:
    (gpus.repo.parent / "fail").write_text(failing + "\n", "utf-8")
    result = gpus.driver("speedrun.sh")
    assert result.returncode == 9
    assert "stopped at: " in result.stderr
    assert not [call for call in calls(gpus) if "base_train" in call]


def test_speedrun_fetches_the_core_tasks_before_anything_else_and_stops_without_them(gpus: Machine) -> None:
    (gpus.repo.parent / "base" / "eval_bundle" / "core.yaml").unlink()
    assert gpus.driver("speedrun.sh").returncode == 0
    assert calls(gpus)[0] == "-m scripts.core_download"
    (gpus.repo.parent / "calls").unlink()
    (gpus.repo.parent / "fail").write_text("-m scripts.core_download\n", "utf-8")
    result = gpus.driver("speedrun.sh")
    assert result.returncode == 9
    assert "stopped at: the CORE tasks" in result.stderr
    assert calls(gpus) == ["-m scripts.core_download"]


def test_miniseries_does_not_train_again_what_is_finished(gpus: Machine) -> None:
    base = gpus.repo.parent / "base"
    files.write_json(base / "runs" / "miniseries-d8" / "summary.json", {"status": "finished"})
    manifest = base / "runs" / "miniseries-d8" / "checkpoints" / "step_000001" / "MANIFEST.json"
    files.write_json(manifest, {})
    (base / "tokenizers" / "fineweb-edu").mkdir(parents=True)
    (base / "tokenizers" / "fineweb-edu" / "tokenizer.json").touch()
    assert gpus.driver("miniseries.sh").returncode == 0
    made = calls(gpus)
    trained = [call.split("--run ")[1].split()[0] for call in made if "base_train" in call]
    assert trained == [f"miniseries-d{depth}" for depth in (10, 12, 14, 16, 18, 20)]
    assert all(" --device-type cuda " in call for call in made if "base_" in call)
    assert gpus.installs() == [".[plots,gpu]"]
    assert [call for call in made if "base_eval -- --device-type cuda --run miniseries-d8 " in call]
    assert not [call for call in made if "tok_train" in call]


def test_speedrun_says_how_many_gpus_it_found(machine: Machine) -> None:
    result = machine.driver("speedrun.sh")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "NPROC=8 GPUs are asked for and nvidia-smi lists 0" in result.stderr


def test_only_a_run_that_came_to_its_end_is_finished(machine: Machine, tmp_path: Path) -> None:
    for status, expected in (("finished", 0), ("stopped", 1)):
        files.write_json(tmp_path / "run" / "summary.json", {"run": "r", "status": status})
        assert machine.call(f'finished "{tmp_path / "run"}"').returncode == expected
    assert machine.call(f'finished "{tmp_path / "nowhere"}"').returncode == 1


def call_here(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run shell code after sourcing what the drivers share, with this Python."""
    return subprocess.run(
        [str(BASH), "-c", f'source "{REPO}/runs/_common.sh"\nPYTHON="{sys.executable}"\n{code}'],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def scored_run() -> Path:
    """A run of two checkpoints, and scores of the newest."""
    folder = files.run_dir("r")
    for step in (1, 2):
        listed = {"files": {"model.safetensors": {"sha256": f"of {step}"}}}
        files.write_json(folder / "checkpoints" / f"step_{step:06d}" / "MANIFEST.json", listed)
    parts = dict.fromkeys(("core", "bpb"), {})
    files.write_json(folder / "base_eval.json", {"step": 2, "weights": "of 2", "parts": parts})
    return folder


def scored(folder: Path, parts: str = "core,bpb") -> bool:
    result = call_here(f'scored "{folder}" {parts}')
    assert result.stderr == ""
    return result.returncode == 0


def test_scores_of_the_newest_checkpoint_are_not_made_again_whatever_the_clock_says(scored_run: Path) -> None:
    for time in (1, 4_000_000_000):
        os.utime(scored_run / "base_eval.json", (time, time))
        assert scored(scored_run)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"step": 1, "weights": "of 1"}, False),  # of an older checkpoint
        ({"step": 2, "weights": "of others"}, False),  # of another one at this step
        ({"step": 2}, True),  # by a version that wrote neither weights nor parts
        ({"step": 2, "weights": "of 2", "parts": {"core": {}}}, False),  # stopped before all parts were done
        ({}, False),
    ],
)
def test_scores_of_another_checkpoint_are_made_again(
    scored_run: Path, scores: dict[str, object], expected: bool
) -> None:
    files.write_json(scored_run / "base_eval.json", scores)
    assert scored(scored_run) is expected


@pytest.mark.parametrize("contents", ["", "not JSON", "[1]", None])
def test_scores_that_cannot_be_read_are_made_again(scored_run: Path, contents: str | None) -> None:
    path = scored_run / "base_eval.json"
    path.unlink()
    if contents is not None:
        path.write_text(contents)
    assert not scored(scored_run)


# Writes down what pip is asked, and where the user's settings would have it install.
PIP = """
case "$3" in
  --version) cat "$HOME/pip" ;;
  *) set -- "$*" "user=${PIP_USER:-}" "target=${PIP_TARGET:-}" "prefix=${PIP_PREFIX:-}" "root=${PIP_ROOT:-}"
     echo "$*" >>"$HOME/calls" ;;
esac
"""


def pip_calls(machine: Machine, version: str) -> list[str]:
    machine.put("python3", PIP)
    (machine.repo.parent / "pip").write_text(f"pip {version} from /x (python 3.10)\n")
    result = machine.call('PYTHON=python3; pip_install -e ".[plots]"')
    assert result.returncode == 0, result.stderr
    return calls(machine)


@pytest.mark.parametrize("version", ["9.0.1", "19.3", "21.2.4", "21.0"])
def test_a_pip_that_is_too_old_for_us_is_renewed_first(machine: Machine, version: str) -> None:
    renewal, installation = pip_calls(machine, version)
    assert "--upgrade pip " in renewal
    assert "-e .[plots]" in installation


@pytest.mark.parametrize("version", ["21.3", "21.3.1", "22.0", "26.1", "101.0"])
def test_a_pip_that_is_new_enough_is_left_alone(machine: Machine, version: str) -> None:
    (installation,) = pip_calls(machine, version)
    assert "-e .[plots]" in installation


def test_settings_that_install_elsewhere_are_not_ours(machine: Machine) -> None:
    machine.environment = {"PIP_USER": "1", "PIP_TARGET": "/a", "PIP_PREFIX": "/b", "PIP_ROOT": "/c"}
    for call in pip_calls(machine, "21.2.4"):
        assert call.endswith(" user=0 target= prefix= root=")


def test_the_table_of_runs_has_a_row_a_run_and_gaps_where_nothing_is_measured(tmp_path: Path) -> None:
    summary = {"depth": 4, "tokens": 100, "train_seconds": 90.0, "tokens_per_second": 1.5, "mfu": 0.25}
    files.write_json(files.run_dir("a") / "summary.json", {**summary, "val_bpb": 1.25})
    files.write_json(files.run_dir("a") / "base_eval.json", {"core_metric": 0.125, "core_stderr": 0.01})
    table = tmp_path / "out" / "table.csv"
    result = call_here(f'write_table "{table}" a b')
    assert result.returncode == 0, result.stderr
    head, first, second = table.read_text("utf-8").splitlines()
    assert head.split(",")[:4] == ["run", "depth", "tokens", "train_minutes"]
    assert first == "a,4,100,1.5000,1.5000,0.2500,1.2500,0.1250,0.0100"
    assert second == "b,,,,,,,,"
    assert "| a | 4 | 100 |" in result.stdout


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        # 1,000 steps of 2^19 tokens x 4.8 characters / 0.65 kept / 250e6 a shard = 15.49
        ("fineweb-edu 8 --depth 12 --num-iterations 1000 --total-batch-size 524288", 16),
        ("fineweb-edu 8 --depth 12 --num-iterations 1000 --total-batch-size 524288 --keep-tails", 11),
        ("fineweb-edu 1 --depth 4 --num-iterations 1", 8),  # the tokenizer's eight at least
        # 6.5 tokens for each of 123.6 M scaling parameters, 100 million a shard
        ("fineweb10B-gpt2 8 --depth 12 --recipe speedrun-124m", 9),
        ("fineweb10B-gpt2 8 --depth 12 --num-iterations 1 --total-batch-size 524288", 1),
        (
            "fineweb-edu 1 --depth 12 --num-iterations 1000000 --total-batch-size 524288",
            1822,
        ),  # all there are
    ],
)
def test_shards_follow_from_the_plan(flags: str, expected: int) -> None:
    result = call_here(f"shards_needed {flags}")
    assert result.stdout.strip() == str(expected), result.stderr


@pytest.mark.parametrize(
    ("flags", "steps", "unit"),
    [
        # Steps of run 6, of pull request 516, and of the race.
        ("climbmix 8 --depth 24 --target-param-data-ratio 8 --fp8", "5,568", "hours"),
        (
            "fineweb-edu 8 --depth 26 --recipe nanochat-2026-01 --target-param-data-ratio 7.25 --fp8 "
            "--total-batch-size 524288",
            "12,700",
            "hours",
        ),
        pytest.param(
            "fineweb10B-gpt2 8 --depth 12 --recipe speedrun-124m", "3,063", "minutes", marks=pytest.mark.slow
        ),
    ],
)
def test_the_plan_is_the_published_one_and_its_time_is_called_a_projection(
    flags: str, steps: str, unit: str
) -> None:
    result = call_here(f'gpu_query() {{ echo "NVIDIA H100 80GB HBM3"; }}; projected {flags}')
    assert result.returncode == 0, result.stderr
    said = (
        rf"Ours: not measured yet. {steps} steps, .* FLOPs: [\d.]+ {unit} of training on 8 x NVIDIA H100 80GB"
    )
    assert re.match(said, result.stdout), result.stdout
    assert "This is a projection from FLOPs and bytes" in result.stdout


def test_a_card_without_known_rates_has_no_projection() -> None:
    said = call_here(
        'gpu_query() { echo "Some GPU"; }; projected climbmix 1 --depth 4 --num-iterations 7'
    ).stdout
    assert said.startswith("Ours: 7 steps, ")
    assert "no rates of Some GPU" in said


def test_a_gpu_is_asked_for_by_name_where_one_is_listed(machine: Machine) -> None:
    assert machine.call("device_type").stdout == "auto\n"
    machine.put("nvidia-smi", smi("NVIDIA GPU", "8.0", gpus=1))
    assert machine.call("device_type").stdout == "cuda\n"
    machine.environment["CUDA_VISIBLE_DEVICES"] = ""  # hidden on purpose
    assert machine.call("device_type").stdout == "auto\n"


def test_several_machines_ask_for_their_gpus_by_name_and_flags_win(machine: Machine) -> None:
    (machine.bin / "head").symlink_to(str(shutil.which("head")))
    machine.put("scontrol", "echo node1; echo node2")
    machine.put("srun", 'echo "$*" >>"$HOME/calls"')
    slurm = {"SUBMIT_DIR": str(machine.repo), "JOB_NODELIST": "node[1-2]", "NNODES": "2", "JOB_ID": "7"}
    machine.environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    result = machine.bash(str(machine.repo / "runs" / "multinode.sbatch"), "--depth=24", "--device-type=cpu")
    assert result.returncode == 0, result.stderr
    (started,) = calls(machine)
    assert "--nnodes=2 --nproc_per_node=8 " in started
    assert "--rdzv-endpoint=node1:29400 --rdzv-id=job-7" in started
    assert started.endswith("-m scripts.base_train -- --device-type=cuda --depth=24 --device-type=cpu")


def test_a_wrong_flag_stops_before_anything_is_fetched() -> None:
    result = call_here("shards=$(shards_needed fineweb-edu 1 --depth 0); echo went on")
    assert result.returncode == 2
    assert "--depth=0" in result.stderr
    assert "went on" not in result.stdout
