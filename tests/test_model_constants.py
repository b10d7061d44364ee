"""A model's constants are its own: it is computed with them, and a resume with others is refused."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import export
from nanochat.checkpoint import format as checkpoint_format
from nanochat.checkpoint import state as checkpoint_state
from nanochat.checkpoint.format import MODEL
from nanochat.checkpoint.resume import require_same_run
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.config.arguments import EvalArgs, ExportArgs, TrainArgs
from nanochat.config.model_config import MODEL_CONSTANTS, GPTConfig
from nanochat.config.plan import Plan
from nanochat.config.recipes import NANOCHAT_2026_07, RECIPES, GroupRecipe, Recipe
from nanochat.distributed.world import World
from nanochat.engine import Engine, Sampling
from nanochat.evaluation import base_eval
from tests.conftest import REPO
from tests.tiny import train_tiny, trained_base

CPU, FP32 = torch.device("cpu"), Precision(torch.float32, "sdpa")

# Runs such that every field of a recipe reaches one of them.
RUNS = [
    TrainArgs(depth=4, max_seq_len=256, total_batch_size=2**15, num_iterations=100),
    TrainArgs(depth=4, max_seq_len=256),
    TrainArgs(depth=4, max_seq_len=256, num_iterations=1000, matrix_optimizer="soap"),
    TrainArgs(depth=4, max_seq_len=256, num_iterations=1000, matrix_optimizer="adamw"),
    TrainArgs(depth=4, max_seq_len=256, num_iterations=1000, attention_kind="diff1"),
]
STAGES: dict[str, Any] = {
    "batch_exponent": 0.0,
    "batch_tokens": 2**18,
    "batch_stages": ((0.0, 1), (0.5, 2)),
    "window_stages": ((0.0, 0.5), (0.5, 1.0)),
    "weight_decay_follows": "depth",
    "weight_decay_shape": "linear",
}


def other(name: str, value: Any) -> Any:
    """Another value for a constant."""
    if name in STAGES:
        return STAGES[name]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value * 1.25 + 0.01


def changed_recipes() -> dict[str, Recipe]:
    """July with one constant changed, by the name of the constant."""
    out = {}
    for item in dataclasses.fields(Recipe):
        value = getattr(NANOCHAT_2026_07, item.name)
        if not isinstance(value, GroupRecipe):
            out[item.name] = dataclasses.replace(NANOCHAT_2026_07, **{item.name: other(item.name, value)})
            continue
        for part in dataclasses.fields(GroupRecipe):
            group = dataclasses.replace(value, **{part.name: other(part.name, getattr(value, part.name))})
            out[f"{item.name}.{part.name}"] = dataclasses.replace(NANOCHAT_2026_07, **{item.name: group})
    return out


CHANGED = changed_recipes()


def resumed(plan: Plan, now: Plan) -> None:
    """What a resume asks: the plan of a checkpoint against the plan of now."""
    meta = {"plan": json.loads(json.dumps(plan.to_dict())), "fingerprints": {}}
    require_same_run(meta, now, {}, Path("step_000001"))


@pytest.mark.parametrize("name", list(CHANGED))
def test_a_resume_under_another_constant_is_refused_with_both_values(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [planning.plan(args, 512) for args in RUNS]
    monkeypatch.setitem(RECIPES, "nanochat-2026-07", CHANGED[name])
    after = [planning.plan(args, 512) for args in RUNS]
    refused = []
    for then, now in zip(before, after, strict=True):
        if then == now:  # then it does not reach this run: only the plan is made of the recipe
            continue
        with pytest.raises(UserError, match=r"cannot be resumed.* then, .* now.*has changed since") as error:
            resumed(then, now)
        refused.append(str(error.value))
    assert refused, f"{name} reaches no run"
    if name in MODEL_CONSTANTS:
        then, now = getattr(NANOCHAT_2026_07, name), getattr(CHANGED[name], name)
        assert all(f"model.{name}: {then!r} then, {now!r} now" in text for text in refused)
        assert len(refused) == len(RUNS)


def test_nothing_but_the_plan_is_made_of_a_recipe() -> None:
    users = []
    for path in sorted((REPO / "nanochat").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "nanochat.config.recipes":
                users += [(path.stem, alias.name) for alias in node.names]
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            )
            assert "recipe" not in names, path
    planners = {"arguments", "plan", "small_text"}  # flags, what follows from them, and what makes flags
    # The others take an old name of a recipe for the new one, and the class that a plan's group names.
    assert {name for module, name in users if module not in planners} == {"current_name", "MATRIX_OPTIMIZERS"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with a run of the July of today."""
    return trained_base(tmp_path_factory.mktemp("trained"), num_iterations=4)


def answers() -> dict[str, Any]:
    """What the checkpoint says through every door that computes with it."""
    model, tokenizer, _ = checkpoint_state.load_model("tiny", device=CPU, precision=FP32)
    ids = torch.tensor([tokenizer.encode("the cat sat on a mat and saw two dogs", bos=True)])
    engine = Engine(model, tokenizer)
    sampling = Sampling(max_tokens=8, temperature=0.0)
    folder = export.run(ExportArgs(run="tiny", out=str(files.base_dir() / "exported")))
    exported = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    shutil.rmtree(folder)
    return {
        "logits": hashlib.sha256(model.logits(ids).detach().numpy().tobytes()).hexdigest(),
        "text": engine.generate(ids.tolist(), sampling),
        "exported": exported,
    }


@pytest.mark.parametrize("name", MODEL_CONSTANTS)
def test_a_checkpoint_is_computed_with_its_own_constants(
    name: str, trained: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, base_dir)
    before = answers()
    monkeypatch.setitem(RECIPES, "nanochat-2026-07", CHANGED[name])
    assert answers() == before
    with pytest.raises(UserError, match=rf"model\.{name}: "):
        train_tiny(num_iterations=4, resume="auto")


def test_scores_are_those_of_its_own_constants(
    trained: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, base_dir)
    args = EvalArgs(run="tiny", eval="bpb", eval_tokens=512, device_type="cpu", dtype="float32")
    before = base_eval.run(args, World.single_process())["bpb"]
    values = {name: getattr(CHANGED[name], name) for name in MODEL_CONSTANTS}
    monkeypatch.setitem(RECIPES, "nanochat-2026-07", dataclasses.replace(NANOCHAT_2026_07, **values))
    assert base_eval.run(args, World.single_process())["bpb"] == before


def test_every_constant_that_a_pass_reads_changes_what_is_computed(trained: Path, base_dir: Path) -> None:
    """So that the equality above is not that of constants which nothing reads."""
    shutil.copytree(trained, base_dir)
    folder = checkpoint_format.folder_of("tiny", 4)
    meta, weights = checkpoint_format.read_state(folder), checkpoint_format.read_tensors(folder / MODEL)
    own = checkpoint_state._model_config(meta["plan"]["model"], weights, folder)
    ids = torch.tensor([[5, 300 - 1, 7, 9, 11, 13, 17, 19]])

    def logits(config: GPTConfig) -> torch.Tensor:
        model = checkpoint_state.GPT(config, FP32)
        model.load_state_dict(weights)
        return model.logits(ids)

    for name in ("rope_base", "softcap", "qk_scale", "value_gate_scale"):
        changed = dataclasses.replace(own, **{name: other(name, getattr(own, name))})
        assert not torch.equal(logits(changed), logits(own)), name


def test_a_constant_of_a_later_version_is_refused_by_name(trained: Path, base_dir: Path) -> None:
    shutil.copytree(trained, base_dir)
    folder = checkpoint_format.folder_of("tiny", 4)
    weights = checkpoint_format.read_tensors(folder / MODEL)
    model = checkpoint_format.read_state(folder)["plan"]["model"]
    with pytest.raises(UserError, match=r"'warp'.*later"):
        checkpoint_state._model_config({**model, "warp": 2.0}, weights, folder)
    for bad in (float("nan"), float("inf"), "15", None, True, 10**400, 0.0, -1.0):
        with pytest.raises(UserError, match="the model it describes"):
            checkpoint_state._model_config({**model, "softcap": bad}, weights, folder)
    assert checkpoint_state._model_config({**model, "softcap": 20}, weights, folder).softcap == 20
