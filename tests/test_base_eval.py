import doctest
import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch

import scripts.base_eval
import scripts.generate
from nanochat.checkpoint import state as checkpoint_state
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.config.arguments import EvalArgs, TrainArgs
from nanochat.data import corpus as corpus_module
from nanochat.data.train_loader import ValBatches
from nanochat.distributed.world import World
from nanochat.evaluation import base_eval
from nanochat.evaluation.bits_per_byte import evaluate
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train import run as train_run
from nanochat.train.stage import Pretraining
from tests.bundles import bundle_of
from tests.conftest import REPO
from tests.tiny import tiny_args, tokenizer_named, write_text

SUITE = {
    "core.yaml": "icl_tasks: [{label: pets, dataset_uri: pets, num_fewshot: 1, icl_task_type: schema}]",
    "eval_meta_data.csv": "Eval Task,Random baseline\npets,50\n",
    "eval_data/pets": '{"context_options": ["the cat", "a mat"], "continuation": "sat", "gold": 0}\n' * 6,
}


@pytest.fixture
def state(base_dir, tmp_path):
    """A run whose weights are random and whose checkpoint is of step 7."""
    corpus = corpus_module.prepare("local", named_files=[str(write_text(tmp_path / "text"))])
    tokenizer = tokenizer_named("local")
    plan = planning.plan(tiny_args(), tokenizer.vocab_size, 1)
    world = World.single_process()
    state = train_run.create_state(
        plan, Pretraining(corpus, tokenizer), Precision(torch.float32, "sdpa"), world
    )
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    state.step = 7
    fingerprints = {"corpus": corpus.fingerprint, "tokenizer": tokenizer.fingerprint}
    snapshot = checkpoint_state.snapshot(state, plan, fingerprints, world)
    assert snapshot is not None
    snapshot.write()
    state.expected = evaluate(
        state.model,
        ValBatches(corpus, tokenizer, sequence_len=32, rows=3, world=world, max_tokens=512, keep_tails=False),
        tokenizer.token_bytes(),
        world,
    )
    return state


def args(**changes):
    return EvalArgs(
        run="tiny",
        eval_tokens=512,
        device_batch_size=4,
        max_new_tokens=4,
        device_type="cpu",
        dtype="float32",
        **changes,
    )


def test_a_checkpoint_is_scored_into_the_files_of_its_run(state, monkeypatch, capsys):
    monkeypatch.setattr(
        "nanochat.evaluation.core.evaluate.find_bundle", lambda where: bundle_of(where, SUITE)
    )
    found = base_eval.run(args(eval_bundle="pets"), World.single_process())
    folder = files.run_dir("tiny")
    assert files.read_json(folder / "base_eval.json") == json.loads(json.dumps(found))
    assert (found["step"], found["bundle"], found["tasks"]["pets"]["examples"]) == (7, "pets", 6)
    # Bits per byte of the loaded weights are those of the weights that were saved.
    assert found["bpb"]["val"] == pytest.approx(state.expected.bpb, rel=1e-6)
    assert found["bpb"]["train"] > 0
    places = found["bpb_profile"]["val"]["positions"]
    assert [first for first, _, _ in places] == [1, 2, 4, 8, 16, 32]
    assert len(found["samples"]) == 6
    lines = [json.loads(line) for line in (folder / "core_predictions.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(6))
    right = sum(line["answer"] == line["gold"] for line in lines) / 6
    assert found["tasks"]["pets"]["accuracy"] == right
    assert found["core_metric"] == pytest.approx(2 * right - 1)
    used = found["core_matmul"]
    seconds = found["core_seconds"]["forward"] + found["core_seconds"]["scoring"]
    assert used["share"] == pytest.approx(used["flops"] / seconds / used["measured_flops_per_s"])
    assert used["flops"] > 0
    printed = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert f"{used['share']:.0%} of the time of forward and scoring" in printed
    assert "pets" in printed
    assert f"CORE {found['core_metric']:.4f}" in printed


def test_only_what_is_asked_for_is_done(state):
    found = base_eval.run(args(eval="bpb"), World.single_process())
    assert (found["core_metric"], found["tasks"], found["samples"]) == (None, {}, [])
    assert not (files.run_dir("tiny") / "core_predictions.jsonl").exists()


def score(eval_parts, **changes):
    return base_eval.run(args(eval=eval_parts, eval_bundle="pets", **changes), World.single_process())


@pytest.fixture
def pets(monkeypatch):
    monkeypatch.setattr(
        "nanochat.evaluation.core.evaluate.find_bundle", lambda where: bundle_of(where, SUITE)
    )


def test_a_part_that_was_not_asked_for_keeps_what_it_had(state, pets):
    whole = score("core,bpb")
    answers = (files.run_dir("tiny") / "core_predictions.jsonl").read_bytes()
    found = score("sample")
    for name in ("core_metric", "tasks", "bpb", "loss", "bpb_profile", "bundle", "answers_sha256", "weights"):
        assert found[name] == whole[name] != None, name  # noqa: E711
    assert len(found["samples"]) == 6
    assert set(found["parts"]) == {"core", "bpb", "sample"}
    assert files.read_json(files.run_dir("tiny") / "base_eval.json") == json.loads(json.dumps(found))
    assert (files.run_dir("tiny") / "core_predictions.jsonl").read_bytes() == answers


def another_checkpoint(step):
    """Step 7 again, as that of another step with other weights."""
    folder = checkpoint_state.checkpoint_format.folder_of("tiny", 7)
    meta = files.read_json(folder / "state.json")
    tensors = checkpoint_state.checkpoint_format.read_tensors(folder / "model.safetensors")
    optimizer = checkpoint_state.checkpoint_format.read_tensors(folder / "optimizer.safetensors")
    first = next(iter(tensors))
    tensors[first] = tensors[first] + 0.01
    meta = {name: value for name, value in meta.items() if name not in ("format", "made_by")} | {"step": step}
    other = checkpoint_state.checkpoint_format.folder_of("tiny", step)
    checkpoint_state.checkpoint_format.Snapshot(other, tensors, optimizer, meta).write()


def test_scores_of_another_step_are_set_aside_and_come_back(state, pets, capsys):
    seven = score("core", step=7)
    another_checkpoint(9)
    nine = score("sample", step=9)
    assert (nine["step"], nine["core_metric"]) == (9, None)
    assert "it is now base_eval_step_000007.json" in capsys.readouterr().out
    again = score("bpb", step=7)
    assert (again["step"], again["core_metric"]) == (7, seven["core_metric"])
    names = {path.name for path in files.run_dir("tiny").iterdir()}
    assert {"base_eval.json", "core_predictions.jsonl", "base_eval_step_000009.json"} <= names
    assert "base_eval_step_000007.json" not in names
    assert score("bpb", step=9)["samples"] == nine["samples"]


def test_scores_of_other_weights_at_the_same_step_are_not_mixed(state, pets):
    score("core")
    shutil.rmtree(
        checkpoint_state.checkpoint_format.folder_of("tiny", 7).with_name("step_000009"), ignore_errors=True
    )
    another_checkpoint(9)
    folder = checkpoint_state.checkpoint_format.folder_of("tiny", 9)
    path = files.run_dir("tiny") / "base_eval.json"
    files.write_json(path, files.read_json(path) | {"step": 9})  # trained anew to the same step
    assert score("sample", step=9)["core_metric"] is None
    assert folder.exists()


def test_scores_of_an_older_version_are_kept_too(state, pets):
    whole = score("core,bpb")
    path = files.run_dir("tiny") / "base_eval.json"
    old = {name: value for name, value in whole.items() if name not in ("weights", "parts", "answers_sha256")}
    files.write_json(path, old | {"crop_tokens": 32, "finished_tokens": 7})
    found = score("sample")
    assert (found["core_metric"], found["crop_tokens"]) == (whole["core_metric"], 32)
    assert found["finished_tokens"] == 7  # of versions whose last layer skipped positions


@pytest.mark.parametrize("text", ["", "[]", "{", '{"step": ' + "9" * 5000 + "}"])
def test_damaged_scores_are_set_aside(state, pets, text):
    path = files.run_dir("tiny") / "base_eval.json"
    path.write_text(text)
    score("sample")
    assert path.with_name("base_eval_damaged.json").read_text() == text


@pytest.mark.parametrize("name", ["base_eval.json", "core_predictions.jsonl"])
def test_a_full_disk_under_the_scores_loses_nothing_that_was_computed(state, pets, monkeypatch, capsys, name):
    atomic_write = files.atomic_write

    def full(path, data):
        if path.name == name:
            raise OSError(28, "No space left on device", str(path))
        atomic_write(path, data)

    monkeypatch.setattr(files, "atomic_write", full)
    with pytest.raises(UserError, match=rf"{name}: No space left .*printed above.* Free some space"):
        score("core,bpb,sample")
    printed = capsys.readouterr().out
    assert "pets" in printed
    assert "bits per byte, val" in printed
    assert printed.count("-" * 40) >= 6
    if name == "core_predictions.jsonl":  # the scores fit: they are there, without answers to compare
        assert files.read_json(files.run_dir("tiny") / "base_eval.json")["core_metric"] is not None
    monkeypatch.undo()


def test_what_is_missing_is_said_before_core_is_scored(state, pets, monkeypatch):
    shutil.rmtree(files.data_dir("local"))
    monkeypatch.setattr("nanochat.evaluation.core.evaluate.evaluate", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(UserError, match="local"):
        score("core,bpb")


def test_core_is_on_the_disk_before_the_next_part_begins(state, pets, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("nanochat.evaluation.base_eval.sample_texts", killed)
    with pytest.raises(KeyboardInterrupt):
        score("core,sample")
    assert files.read_json(files.run_dir("tiny") / "base_eval.json")["core_metric"] is not None


def test_answers_say_their_step_and_the_scores_their_hash(state, pets):
    found = score("core")
    data = (files.run_dir("tiny") / "core_predictions.jsonl").read_bytes()
    assert {json.loads(line)["step"] for line in data.splitlines()} == {7}
    assert found["answers_sha256"] == hashlib.sha256(data).hexdigest()


def test_weights_that_give_no_number_are_one_clear_error(state):
    state.model.head.weight.data.fill_(float("nan"))
    corpus = corpus_module.Corpus.open("local")
    tokenizer = Tokenizer.load(files.tokenizer_dir("local"))
    with pytest.raises(UserError, match="train is not a number"):
        base_eval._score_bpb(state.model, tokenizer, corpus, args(), TrainArgs(), World.single_process())


def test_requests_that_cannot_be_met_are_one_clear_error(base_dir):
    for changes, message in [
        ({"eval": "core,poetry"}, "--eval=core,poetry: expected some of core,bpb,sample"),
        ({"eval": ","}, "--eval=,: expected"),
        ({"eval_bundle": "nowhere"}, "nowhere: no such eval bundle"),
        ({"eval": "bpb"}, "unknown run 'tiny'"),
    ]:
        with pytest.raises(UserError, match=message):
            base_eval.run(args(**changes), World.single_process())
    with pytest.raises(UserError, match="--run is missing"):
        base_eval.run(EvalArgs(), World.single_process())


def run_script(script, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", [script.__name__, "--device-type=cpu", *arguments])
    script.main()


def test_the_scripts_end_with_code_2_and_one_line(base_dir, monkeypatch, capsys):
    for script, arguments, message in [
        (scripts.base_eval, ["--run", "absent", "--eval", "bpb"], "unknown run 'absent'"),
        (scripts.generate, ["--run", "absent", "hello"], "unknown run 'absent'"),
        (scripts.generate, ["--run", "absent"], "name a run and give a prompt"),
        (scripts.generate, ["--run", "absent", "hello", "--temperature=-1"], "--temperature=-1.0"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            run_script(script, monkeypatch, *arguments)
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error


def test_generate_prints_the_prompt_and_what_follows(state, monkeypatch, capsys):
    def printed(*arguments):
        run_script(scripts.generate, monkeypatch, "--run=tiny", "--max-new-tokens=5", *arguments)
        return capsys.readouterr().out

    one = printed("the cat")
    assert one.startswith("the cat")
    assert len(one) > len("the cat\n")
    # The same seed gives the first prompt the same text in company.
    both = printed("the cat", "a mat")
    assert both.startswith(one)
    assert "\na mat" in both
    assert printed("the cat", "--num-samples=2").startswith(one)


def test_the_example_in_the_docstring_holds():
    results = doctest.testmod(base_eval)
    assert (results.attempted, results.failed) == (1, 0)


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(state, base_dir):
    """By gloo: CORE's answers and losses are those of one rank, whatever the batch; samples to the letter."""
    alone = {}
    samples = base_eval.run(args(eval="sample"), World.single_process())["samples"]
    for batch_tokens in (64, 16384):
        base_eval.run(
            args(eval="core", eval_bundle="mini", core_metric_max_per_task=9, eval_batch_tokens=batch_tokens),
            World.single_process(),
        )
        alone[batch_tokens] = predictions_of("tiny")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [
        str(REPO / "scripts" / "base_eval.py"),
        "--",
        "--run=tiny",
        "--eval=core,sample",
        "--max-new-tokens=4",
    ]
    command += ["--eval-bundle=mini", "--core-metric-max-per-task=9", "--device-type=cpu", "--dtype=float32"]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    both = predictions_of("tiny")
    scores = files.read_json(files.run_dir("tiny") / "base_eval.json")
    assert (scores["world_size"], scores["samples"]) == (2, samples)
    assert len(both) == 54
    for other in alone.values():
        for one, two in zip(both, other, strict=True):
            assert one["losses"] == pytest.approx(two["losses"], abs=1e-4)
            assert {name: one[name] for name in ("task", "line", "answer")} == {
                name: two[name] for name in ("task", "line", "answer")
            }


def predictions_of(run):
    text = (files.run_dir(run) / "core_predictions.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
