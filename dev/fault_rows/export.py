"""Rows of the exported folder, in transformers and in lm-evaluation-harness, and of generation."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

from dev.fault_box import TINY, Box, Skip, expect_error, expect_ok, row, wait_until

WITH_NAN = """
import sys, json, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from nanochat.common import files
folder = next(Path(sys.argv[1]).glob("runs/a/checkpoints/step_*"))
path, manifest = folder / "model.safetensors", folder / "MANIFEST.json"
tensors = load_file(path)
tensors["blocks.1.mlp.up.weight"][3, 4] = float("nan")
save_file(tensors, path)
listed = json.loads(manifest.read_text())
listed["files"]["model.safetensors"] = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
manifest.write_text(json.dumps(listed))
"""


def trained(box: Box) -> None:
    """A run "a" of a few steps."""
    box.tiny()
    expect_ok(box.run("base_train", *TINY, "--num-iterations=6", "--run=a"))


def transformers_or_skip(box: Box) -> None:
    """The packages of the extra eval are there, or the row is skipped."""
    if box.python("import transformers").returncode:
        raise Skip("transformers is not installed (extra eval)")


def exported(box: Box) -> None:
    """The run "a", and the folder that transformers loads; skipped where transformers is not installed."""
    transformers_or_skip(box)
    trained(box)
    expect_ok(box.run("export", "--run=a"))


def generated(box: Box, *flags: str) -> str:
    """What generate prints."""
    result = box.run("generate", "--run=a", "--device-type=cpu", *flags)
    expect_ok(result)
    return result.stdout


@row("T61", "NaN in the weights of a checkpoint: generate, base_eval, export", wanted="refused, tensor named")
def t61(box: Box) -> None:
    """Each of the three commands."""
    trained(box)
    expect_ok(box.python(WITH_NAN, box.base))
    for command in (
        ["generate", "--run=a", "cat"],
        ["base_eval", "--run=a", "--eval=bpb"],
        ["export", "--run=a"],
    ):
        expect_error(box.run(*command), "blocks.1.mlp.up.weight", "not finite")
    assert not (box.base / "runs" / "a" / "hf").exists()


@row("T85", "escape sequences in what is printed on a terminal", wanted="replaced")
def t85(box: Box) -> None:
    """The prompt is printed again, so it stands for what a model writes."""
    trained(box)
    ours, theirs = pty.openpty()
    argv = box.argv(
        "generate", "--run=a", "--max-new-tokens=2", "--device-type=cpu", "cat \x1b]0;owned\x07 :fire:"
    )
    subprocess.run(argv, env=box.env, cwd=box.folder, stdout=theirs, stderr=subprocess.DEVNULL, timeout=240)
    os.close(theirs)
    shown = os.read(ours, 65536).decode("utf-8", "replace")
    assert "cat" in shown, shown
    assert ":fire:" in shown, shown
    assert "\x1b]" not in shown, shown
    assert "\x07" not in shown, shown


@row("T89", "the disk is full, or fails, while a model is exported", wanted="one line, nothing half")
def t89(box: Box) -> None:
    """A file that may not grow beyond 40 kB stands for a full disk."""
    trained(box)
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); sys.argv = ['export', '--run=a'];"
        "from scripts import export; export.main()"
    )
    expect_error(box.python(code), "model.safetensors")
    assert sorted(path.name for path in (box.base / "runs" / "a").glob("*hf*")) == []


@row("T91", "logits of the exported folder in transformers", wanted="equal")
@row("E12", "greedy text of the exported folder in transformers", wanted="equal")
def t91(box: Box) -> None:
    """Both, beside ours."""
    exported(box)
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from nanochat.checkpoint import state as checkpoint
from nanochat.common.machine import Precision
theirs = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = AutoTokenizer.from_pretrained(sys.argv[1])("the cat sat", return_tensors="pt").input_ids
ours = checkpoint.load_model("a", device=torch.device("cpu"), precision=Precision(torch.float32, "sdpa"))[0]
with torch.no_grad():
    assert (theirs(ids).logits - ours.logits(ids)).abs().max() < 2e-5
    row = ids
    for _ in range(5):
        row = torch.cat((row, ours.logits(row)[:, -1:].argmax(-1)), 1)
for cached in (True, False):
    greedy = theirs.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cached)
    assert greedy.tolist()[0] == row.tolist()[0][:greedy.size(1)]
"""
    expect_ok(box.python(code, box.base / "runs" / "a" / "hf"))


@row("T92", "a text that spells <|bos|>, encoded by the exported tokenizer", wanted="our ids")
@row("E13", "a text that spells <|bos|> in transformers", wanted="our ids")
def t92(box: Box) -> None:
    """Also other specials, and in a batch."""
    exported(box)
    code = """
import sys
from transformers import AutoTokenizer
from nanochat.common import files
from nanochat.tokenizer.tokenizer import Tokenizer
theirs, ours = AutoTokenizer.from_pretrained(sys.argv[1]), Tokenizer.load(files.tokenizer_dir("tiny"))
texts = ["a <|bos|> b", "<|bos|>", "<|user_start|>x<|assistant_end|>", "<|bos|"]
assert theirs(texts)["input_ids"] == [ours.encode(text, bos=True) for text in texts]
"""
    expect_ok(box.python(code, box.base / "runs" / "a" / "hf"))


@row("T93", "log-likelihoods of lm-eval on the exported folder", wanted="ours")
def t93(box: Box) -> None:
    """`lm_eval --model hf` as a library; what a task may ask of it is its own matter."""
    exported(box)
    if box.python("import lm_eval, accelerate").returncode:
        raise Skip("lm-eval is not installed (extra eval)")
    code = """
import sys, torch
from types import SimpleNamespace
from lm_eval.models.huggingface import HFLM
from nanochat.checkpoint import state as checkpoint
from nanochat.common.machine import Precision
fp32 = Precision(torch.float32, "sdpa")
model, tokenizer, _ = checkpoint.load_model("a", device=torch.device("cpu"), precision=fp32)
theirs = HFLM(sys.argv[1], trust_remote_code=True, dtype="float32", device="cpu", batch_size=2)
pairs = [("the cat", " sat on a mat"), ("two dogs near", " their red house"), ("", "rain fell")]
found = theirs.loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)
for (context, continuation), (value, _) in zip(pairs, found):
    ids = torch.tensor([tokenizer.encode(context + continuation, bos=True)])
    start = len(tokenizer.encode(context, bos=True))
    with torch.no_grad():
        logs = model.logits(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])[0, start - 1 :]
    assert abs(logs.sum().item() - value) < 1e-4, (context, continuation)
"""
    expect_ok(box.python(code, box.base / "runs" / "a" / "hf"))


@row("B13", "the base directory is read-only: generate, export --out, verify", wanted="they work")
def b13(box: Box) -> None:
    """As a user without rights to write there; root would be let through."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        raise Skip("needs root and setpriv to become a user without rights")
    trained(box)
    out = box.folder / "out"
    out.mkdir(mode=0o777)
    out.chmod(0o777)
    box.folder.chmod(0o755)
    box.folder.parent.chmod(0o755)
    as_user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-m"]
    for words in (
        ["scripts.generate", "--run=a", "--max-new-tokens=2", "cat"],
        ["scripts.export", "--run=a", f"--out={out}/hf"],
        ["scripts.checkpoint", "verify", "a"],
    ):
        result = box.execute([*as_user, *words])
        if "Permission denied" in result.stderr and "python" in result.stderr:
            raise Skip("another user cannot start this Python")
        expect_ok(result)


@row("E1", "temperature 0, -1, nan, inf, 1e308, 1e-40", wanted="right, or one line")
@row("E2", "temperature 1e-46", wanted="the greedy text")
def e1(box: Box) -> None:
    """The smallest ones are the greedy text."""
    trained(box)
    greedy = generated(box, "--max-new-tokens=6", "--temperature=0", "the cat")
    for cold in ("1e-40", "1e-46", "5e-324"):
        assert generated(box, "--max-new-tokens=6", f"--temperature={cold}", "the cat") == greedy, cold
    for wrong in ("-1", "nan", "inf"):
        expect_error(box.run("generate", "--run=a", f"--temperature={wrong}", "the cat"), "--temperature")
    generated(box, "--max-new-tokens=6", "--temperature=1e308", "the cat")


@row(
    "E3", "prompts: empty, emoji, special tokens, too long, --top-k -1 and 10^6", wanted="right, or one line"
)
def e3(box: Box) -> None:
    """Each alone."""
    trained(box)
    for prompt in ("", "\U0001f600", "<|bos|>", "a\nb"):
        assert generated(box, "--max-new-tokens=2", "--top-k=1000000", prompt).startswith(prompt)
    expect_error(box.run("generate", "--run=a", "the cat sat " * 40), "context")
    expect_error(box.run("generate", "--run=a", "--top-k=-1", "x"), "--top-k")


@row("E4", 'a prompt "-hello"; two prompts with --run between them', wanted="works, or one clear line")
def e4(box: Box) -> None:
    """A prompt after -- is a prompt; without it the line says so."""
    trained(box)
    flags = ["--max-new-tokens=2", "--device-type=cpu"]
    both = box.run("generate", *flags, "the cat", "--run=a", "the dog")
    expect_ok(both)
    assert both.stdout.count("-" * 40) == 2, both.stdout
    expect_ok(box.run("generate", *flags, "--run=a", "--", "-hello"))
    said = "A prompt that begins with - comes last, after --"
    expect_error(box.run("generate", *flags, "--run=a", "-hello"), said)


@row("E5", "--num-samples 100000", wanted="text comes as it is made, memory is bounded")
def e5(box: Box) -> None:
    """The first samples are there long before the last."""
    trained(box)
    process = box.start("generate", "--run=a", "--num-samples=100000", "--max-new-tokens=30", "the cat")
    wait_until(lambda: box.output().count("the cat") > 20, 120, "no samples")
    status = Path(f"/proc/{process.pid}/status").read_text()
    memory = int(status.split("VmHWM:")[1].split()[0]) / 1024
    assert memory < 4000, f"{memory:.0f} MB"


@row("E11", "export into a folder that exists, and into an empty one", wanted="refused; written")
def e11(box: Box) -> None:
    """`mktemp -d` gives an empty one."""
    trained(box)
    empty, full = box.folder / "empty", box.folder / "full"
    empty.mkdir()
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    expect_ok(box.run("export", "--run=a", "--out", empty))
    assert json.loads((empty / "config.json").read_text())["vocab_size"] > 0
    expect_error(box.run("export", "--run=a", "--out", full), str(full), "--out")
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
    modes = {oct(path.stat().st_mode & 0o777) for path in empty.iterdir()}
    assert len(modes) == 1, f"other modes than the umask gives: {modes}"


@row("E14", "two prompts of different length in one generate() of transformers", wanted="works")
def e14(box: Box) -> None:
    """Padded at either side, each gives what it gives alone."""
    exported(box)
    code = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
def added(texts, side):
    ids = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    return out[:, ids["input_ids"].size(1):].tolist()
texts = ["the cat sat on a mat", "dogs"]
alone = [added([text], "left")[0] for text in texts]
assert added(texts, "left") == alone and added(texts, "right") == alone
"""
    expect_ok(box.python(code, box.base / "runs" / "a" / "hf"))


@row("E15", "base_eval --hf on our own exported folder", wanted="one line, no question")
def e15(box: Box) -> None:
    """Nothing waits for an answer on the console."""
    exported(box)
    result = box.run(
        "base_eval", "--hf", box.base / "runs" / "a" / "hf", "--eval-bundle=mini", stdin=subprocess.DEVNULL
    )
    expect_error(result, "--hf")
    assert "y/N" not in result.stdout + result.stderr
