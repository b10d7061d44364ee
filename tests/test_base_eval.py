import doctest
import json
import subprocess
import sys

import pytest
import torch

import scripts.base_eval
import scripts.generate
from nanochat import base_eval, checkpoint, dataset, files, scaling, train
from nanochat.config import EvalArgs
from nanochat.core_tasks import Bundle
from nanochat.dataloader import ValBatches
from nanochat.errors import UserError
from nanochat.hardware import Precision
from nanochat.loss_eval import evaluate
from nanochat.tokenizer import Tokenizer
from nanochat.world import World
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
    corpus = dataset.prepare("local", named_files=[str(write_text(tmp_path / "text"))])
    tokenizer = tokenizer_named("local")
    plan = scaling.plan(tiny_args(), tokenizer.vocab_size, 1)
    world = World.solo()
    state = train.create_state(plan, corpus, tokenizer, Precision(torch.float32, "sdpa"), world)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    state.step = 7
    fingerprints = {"corpus": corpus.fingerprint, "tokenizer": tokenizer.fingerprint}
    snapshot = checkpoint.take(state, plan, fingerprints, world)
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
    monkeypatch.setattr("nanochat.core_eval.find_bundle", lambda where: Bundle.from_texts(where, SUITE))
    found = base_eval.run(args(eval_bundle="pets"), World.solo())
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
    found = base_eval.run(args(eval="bpb"), World.solo())
    assert (found["core_metric"], found["tasks"], found["samples"]) == (None, {}, [])
    assert not (files.run_dir("tiny") / "core_predictions.jsonl").exists()


def test_weights_that_give_no_number_are_one_clear_error(state):
    state.model.head.weight.data.fill_(float("nan"))
    corpus = dataset.Corpus.open("local")
    tokenizer = Tokenizer.load(files.tokenizer_dir("local"))
    with pytest.raises(UserError, match="train is not a number"):
        base_eval._score_bpb(state.model, tokenizer, corpus, args(), False, World.solo())


def test_requests_that_cannot_be_met_are_one_clear_error(base_dir):
    for changes, message in [
        ({"eval": "core,poetry"}, "--eval=core,poetry: expected some of core,bpb,sample"),
        ({"eval": ","}, "--eval=,: expected"),
        ({"eval_bundle": "nowhere"}, "nowhere: no such eval bundle"),
        ({"eval": "bpb"}, "unknown run 'tiny'"),
    ]:
        with pytest.raises(UserError, match=message):
            base_eval.run(args(**changes), World.solo())
    with pytest.raises(UserError, match="--run is missing"):
        base_eval.run(EvalArgs(), World.solo())


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
    """CORE by gloo: answers and losses are those of one rank, whatever the batch."""
    alone = {}
    for batch_tokens in (64, 16384):
        base_eval.run(
            args(eval="core", eval_bundle="mini", core_metric_max_per_task=9, eval_batch_tokens=batch_tokens),
            World.solo(),
        )
        alone[batch_tokens] = predictions_of("tiny")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(REPO / "scripts" / "base_eval.py"), "--", "--run=tiny", "--eval=core"]
    command += ["--eval-bundle=mini", "--core-metric-max-per-task=9", "--device-type=cpu", "--dtype=float32"]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    both = predictions_of("tiny")
    assert files.read_json(files.run_dir("tiny") / "base_eval.json")["world_size"] == 2
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
