"""CORE on the public bundle, by one rank and by two, in batches of 1 to 64 rows: the plain answers."""

import math
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch

from dev.bench import naive_core
from nanochat.checkpoint import state as checkpoint_state
from nanochat.common import files
from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.config.arguments import EvalArgs
from nanochat.data import corpus as corpus_module
from nanochat.distributed.world import World
from nanochat.evaluation import base_eval
from nanochat.evaluation.core import bundle as core_bundle
from nanochat.evaluation.core.scoring import ROTARY_CONTEXTS
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train import run as train_run
from nanochat.train.stage import Pretraining
from tests.conftest import REPO
from tests.test_base_eval import predictions_of
from tests.tiny import tiny_args, train_tiny

CONTEXT = 128
EXAMPLES = 3  # of each task
PRECISION = Precision(torch.float32, "sdpa")
SHAPE = {"depth": 4, "max_seq_len": CONTEXT, "total_batch_size": 8192}


def make_run(shared_data, trained):
    """A run of a small model, trained on 2.1 M tokens of prose or with random weights; returns its model."""
    shard = shared_data / "prose" / "shard_00010.parquet"
    corpus = corpus_module.prepare("local", named_files=[str(shard)])
    texts = pq.read_table(shard, columns=["text"])["text"].to_pylist()
    tokenizer = Tokenizer.train(texts[:200], 1024)
    tokenizer.save(files.tokenizer_dir("local"))
    if trained:
        train_tiny(**SHAPE, device_batch_size=64, num_iterations=256, eval_every=256, save_every=256)
    else:
        plan = planning.plan(tiny_args(**SHAPE), tokenizer.vocab_size, 1)
        state = train_run.create_state(
            plan, Pretraining(corpus, tokenizer), PRECISION, World.single_process()
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        fingerprints = {"corpus": corpus.fingerprint, "tokenizer": tokenizer.fingerprint}
        checkpoint_state.snapshot(state, plan, fingerprints, World.single_process()).write()
    return checkpoint_state.load_model("tiny", device=torch.device("cpu"), precision=PRECISION)


def plain_answers(model, tokenizer, path, crop):
    """(task, answer) of every example, in order, from prompts of at most so many tokens."""
    model.reserve_positions(crop)
    bundle = core_bundle.open_bundle(path)
    return [
        (task, answer)
        for task in core_bundle.load_tasks(bundle)
        for answer in naive_core.answers(
            model, tokenizer, task, core_bundle.load_examples(bundle, task), EXAMPLES, crop
        )
    ]


def assert_equal(found, plain):
    """Losses within 1e-4, answers the same but for exact ties."""
    assert len(found) == len(plain)
    for mine, (task, other) in zip(found, plain, strict=True):
        assert (mine["task"], mine["line"]) == (task.label, other.line)
        losses = [math.nan if nats is None else nats for nats in mine["losses"]]
        assert losses == pytest.approx(other.losses, abs=1e-4, nan_ok=True)
        if mine["answer"] != other.answer:
            assert task.kind != "language_modeling", mine
            assert other.losses[mine["answer"]] == pytest.approx(other.losses[other.answer], abs=1e-6), mine


@pytest.mark.slow
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "random"])
def test_every_answer_on_the_public_bundle_is_the_plain_scorers(shared_data, base_dir, trained):
    model, tokenizer, _ = make_run(shared_data, trained)
    path = shared_data / "eval_bundle.zip"
    plain = plain_answers(model, tokenizer, path, ROTARY_CONTEXTS * CONTEXT)
    assert len({task.label for task, _ in plain}) == 22
    assert len({answer.answer for _, answer in plain}) > 4  # -1, 0 and most choices
    asked = {
        "run": "tiny",
        "eval": "core",
        "eval_bundle": str(path),
        "device_type": "cpu",
        "dtype": "float32",
    }
    asked |= {"core_metric_max_per_task": EXAMPLES}
    for rows in (1, 2, 5, 16, 64):
        base_eval.run(EvalArgs(**asked, eval_batch_tokens=rows * CONTEXT), World.single_process())
        assert_equal(predictions_of("tiny"), plain)
    base_eval.run(EvalArgs(**asked, core_crop_tokens=CONTEXT), World.single_process())
    assert_equal(predictions_of("tiny"), plain_answers(model, tokenizer, path, CONTEXT))
    for rows in (1, 64):
        asked["eval_batch_tokens"] = rows * CONTEXT
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in asked.items()]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command += [str(REPO / "scripts" / "base_eval.py"), "--", *flags]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        assert files.read_json(files.run_dir("tiny") / "base_eval.json")["world_size"] == 2
        assert_equal(predictions_of("tiny"), plain)
