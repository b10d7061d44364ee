"""Files made at f4eb7ef are still read: a checkpoint, which goes on, a run, a tokenizer, corpora."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import export, report
from nanochat.checkpoint import format as checkpoint_format
from nanochat.checkpoint import state as checkpoint_state
from nanochat.checkpoint.compatibility import RECIPE_CONSTANTS, RETIRED_FLAGS, completed
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.config import arguments
from nanochat.config import plan as planning
from nanochat.config.arguments import EvalArgs, ExportArgs, TrainArgs
from nanochat.config.model_config import MODEL_CONSTANTS
from nanochat.config.recipes import NANOCHAT_2026_07, OLD_NAMES, RECIPES
from nanochat.data.corpus import Corpus
from nanochat.distributed.world import World
from nanochat.evaluation import base_eval
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train import run as train_run
from nanochat.train.stage import Pretraining
from tests.conftest import REPO
from tests.test_train import CLOCK
from tests.tiny import read_metrics

OLD = REPO / "tests" / "data" / "f4eb7ef"
CPU, FP32 = torch.device("cpu"), Precision(torch.float32, "sdpa")
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text("utf-8"))
# Other kernels round otherwise.
SAME_KERNELS = (EXPECTED["torch"], EXPECTED["cpu"]) == (
    torch.__version__,
    torch.backends.cpu.get_cpu_capability(),
)


@pytest.fixture(autouse=True)
def old(base_dir: Path) -> None:
    """The old base directory, in this test's own."""
    shutil.copytree(OLD, base_dir)


def asked_then() -> TrainArgs:
    """The arguments that the old run's config.json holds."""
    path = files.run_dir("old") / "config.json"
    given = files.read_json(path, dict)["args"]
    kept = {name: value for name, value in given.items() if name not in RETIRED_FLAGS}
    return arguments.from_dict(TrainArgs, kept, path)


def go_on(**changes: Any) -> dict[str, Any]:
    """Resume the old run with the arguments that its config.json holds."""
    args = dataclasses.replace(asked_then(), resume="auto", **changes)
    tokenizer = Tokenizer.load(files.tokenizer_dir(args.tokenizer_name))
    plan = planning.plan(args, tokenizer.vocab_size)
    return train_run.run(plan, Pretraining(Corpus.open(args.corpus), tokenizer), FP32, World.single_process())


def metrics() -> list[dict[str, Any]]:
    entries = read_metrics(files.run_dir("old") / "metrics.jsonl")
    skip = (*CLOCK, "mfu_measured", "lr_mult")  # the last two are not written any more
    return [{k: v for k, v in e.items() if k not in skip} for e in entries if e["kind"] in ("step", "eval")]


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in OLD.rglob("*") if path.is_file()) < 300_000


def test_the_table_of_what_recipes_said_then_is_complete() -> None:
    for name, constants in RECIPE_CONSTANTS.items():
        assert set(constants) == set(MODEL_CONSTANTS), name
        today = RECIPES[OLD_NAMES.get(name, name)].model_constants()
        assert constants == today, "as long as no recipe has changed"


def test_the_model_is_computed_as_then() -> None:
    model, tokenizer, meta = checkpoint_state.load_model("old", device=CPU, precision=FP32)
    want = EXPECTED["logits_4"]
    assert tokenizer.encode("the cat sat on a mat and saw", bos=True) == want["ids"]
    got = model.logits(torch.tensor([want["ids"]]))[0, -1, :16].tolist()
    assert got == pytest.approx([float.fromhex(x) for x in want["last"]], abs=1e-5)
    if SAME_KERNELS:
        assert [x.hex() for x in got] == want["last"]
    assert "softcap" not in meta["plan"]["model"]


def test_todays_recipe_plays_no_part_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([EXPECTED["logits_4"]["ids"]])
    before = checkpoint_state.load_model("old", device=CPU, precision=FP32)[0].logits(ids)
    july = dataclasses.replace(
        NANOCHAT_2026_07, softcap=30.0, rope_base=500.0, qk_scale=2.0, value_gate_scale=1.0
    )
    monkeypatch.setitem(RECIPES, "nanochat-2026-07", july)
    assert torch.equal(checkpoint_state.load_model("old", device=CPU, precision=FP32)[0].logits(ids), before)
    with pytest.raises(UserError, match=r"model\.softcap: 15\.0 then, 30\.0 now"):
        go_on()


def test_the_run_goes_on_as_that_commit_would_have() -> None:
    before = metrics()
    assert go_on()["status"] == "finished"
    weights = (checkpoint_format.folder_of("old", 8) / checkpoint_format.MODEL).read_bytes()
    if SAME_KERNELS:
        assert hashlib.sha256(weights).hexdigest() == EXPECTED["weights_8"]
        assert metrics() == before
    else:
        assert [e.get("loss") for e in metrics()] == pytest.approx([e.get("loss") for e in before], abs=1e-5)


def test_with_a_retired_flag_it_is_scored_and_not_resumed() -> None:
    """The old run as it would be under a technique that this version has no more."""
    folder = checkpoint_format.folder_of("old", 4)
    for path in (folder / checkpoint_format.STATE, files.run_dir("old") / "config.json"):
        path.write_text(path.read_text("utf-8").replace('"z_loss": 0.0', '"z_loss": 0.001'))
    manifest = folder / checkpoint_format.MANIFEST
    listed = files.read_json(manifest, dict)
    state = folder / checkpoint_format.STATE
    listed["files"]["state.json"] = {"bytes": state.stat().st_size, "sha256": files.sha256(state)}
    manifest.write_text(json.dumps(listed))
    with pytest.raises(UserError, match=r"step_000004: cannot be resumed.*--z-loss: 0\.001 then"):
        go_on()
    args = EvalArgs(run="old", step=4, eval="bpb", eval_tokens=512, device_type="cpu", dtype="float32")
    assert base_eval.run(args, World.single_process())["bpb"]["val"] > 1


def test_its_rows_of_a_micro_batch_are_kept() -> None:
    """They are in the plan of that version alone."""
    args = asked_then()
    tokenizer = Tokenizer.load(files.tokenizer_dir("texts"))
    plan = planning.plan(args, tokenizer.vocab_size)
    state = train_run.create_state(
        plan, Pretraining(Corpus.open("texts"), tokenizer), FP32, World.single_process()
    )
    hashes = {"corpus": Corpus.open("texts").fingerprint, "tokenizer": tokenizer.fingerprint}
    checkpoint_state.load(state, checkpoint_format.folder_of("old", 4), plan, hashes)
    assert state.resumed == checkpoint_state.MicroBatch(rows=4, asked=None)
    state.loader.close()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "--seed"),
        ({"dtype": "bfloat16"}, "--dtype"),
        ({"document_mask": True}, "model.document_mask"),
    ]
    + [({"scalar_lr": 0.1}, "groups.resid.lr"), ({"embedding_lr": 0.1}, "groups.value_embedding.lr")],
)
def test_another_run_is_refused(changes: dict[str, Any], named: str) -> None:
    if "dtype" in changes:
        asked = dataclasses.replace(asked_then(), resume="auto", **changes)
        half = Precision(torch.bfloat16, "sdpa")
        tokenizer = Tokenizer.load(files.tokenizer_dir("texts"))
        with pytest.raises(UserError, match=f"{named}: .* then, .* now"):
            train_run.run(
                planning.plan(asked, tokenizer.vocab_size),
                Pretraining(Corpus.open("texts"), tokenizer),
                half,
                World.single_process(),
            )
        return
    with pytest.raises(UserError, match=f"{named}: .* then, .* now"):
        go_on(**changes)


def test_it_is_scored_exported_and_reported() -> None:
    shutil.copytree(files.run_dir("old"), files.run_dir("again"))
    args = EvalArgs(run="again", eval="bpb", eval_tokens=512, device_type="cpu", dtype="float32")
    assert base_eval.run(args, World.single_process())["bpb"]["val"] > 1
    assert (export.run(ExportArgs(run="old")) / "model.safetensors").is_file()
    text = report.write_report("old").read_text("utf-8")
    assert "validation" in text


def test_the_tokenizer_gives_the_same_ids() -> None:
    want, tokenizer = EXPECTED["tokenizer"], Tokenizer.load(files.tokenizer_dir("texts"))
    assert tokenizer.fingerprint == want["fingerprint"]
    assert tokenizer.encode(want["text"]) == want["ids"]
    assert tokenizer.decode(want["ids"]) == want["text"]


@pytest.mark.parametrize("name", ["texts", "tokens"])
def test_the_corpora_are_the_same(name: str) -> None:
    corpus = Corpus.open(name)
    assert corpus.fingerprint == EXPECTED["corpora"][name]["fingerprint"]
    if name == "texts":
        assert corpus.read_block(corpus.train_shards[0], 0)[0] == EXPECTED["corpora"]["texts"]["first"]
    else:
        assert corpus.read_rows(corpus.train_shards[0], 0, 33, 280).shape == (18, 33)


@pytest.mark.parametrize("recipe", list(RECIPE_CONSTANTS))
def test_a_plan_of_that_version_is_completed_from_its_recipe(recipe: str) -> None:
    meta = checkpoint_format.read_state(checkpoint_format.folder_of("old", 4))["plan"]
    meta["model"]["recipe"] = recipe
    found = completed(meta)["model"]
    assert {name: found[name] for name in MODEL_CONSTANTS} == RECIPE_CONSTANTS[recipe]
    assert found["recipe"] == OLD_NAMES.get(recipe, recipe)
    meta["args"]["document_mask"] = True
    assert completed(meta)["model"]["document_mask"] is True
    meta["model"]["softcap"] = 3.0  # what a checkpoint says of itself stands
    assert completed(meta)["model"]["softcap"] == 3.0
