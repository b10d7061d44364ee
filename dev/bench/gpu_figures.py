"""Figures of dev.bench.gpu: rates of the machine, a training step and its parts, decoding, scoring, tests.

Each function measures one thing and returns its rows. Steps are `train_step` of the trainer on a real state;
parts are the functions that such a step calls. Tokens and weights are random: none of the figures depends on
them. On a CPU everything has toy sizes, so that each line runs where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from nanochat.checkpoint.state import TrainState
from nanochat.common import machine
from nanochat.common.errors import UserError
from nanochat.common.machine import Precision
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.config.plan import Plan
from nanochat.data.train_loader import Batch
from nanochat.distributed.world import World
from nanochat.engine import Engine, Sampling
from nanochat.evaluation.core import evaluate
from nanochat.evaluation.core.scoring import GPTScorer
from nanochat.model.attention import Layout, attention, block_masks
from nanochat.model.attention_backends import choose_precision
from nanochat.model.gpt import GPT
from nanochat.model.loss import softcapped_cross_entropy
from nanochat.optim.loss_scale import LossScale
from nanochat.optim.muon_adamw import MuonAdamW
from nanochat.optim.rates import MatrixOptions
from nanochat.tokenizer.tokenizer import Tokenizer
from nanochat.train import memory
from nanochat.train import run as train_run

Row = dict[str, Any]
REPO = Path(__file__).resolve().parents[2]
RANKS = 8  # a step is the share that one of so many GPUs has of the batch of the plan
DOCUMENT = 617  # tokens between two beginnings of documents, where the recipe masks them


@dataclass(frozen=True)
class Size:
    """How large the work is.

    Attributes:
        flags: of the plan.
        vocab: entries of the tokenizer.
        batch: tokens of a step; None for the share of one rank of the plan.
        tokens: tokens of a part that is measured by itself.
        square: rows and columns of a square product.
        memory: bytes that a copy reads.
        seconds: how long steps are repeated.
        decoded: tokens that are decoded.
        examples: of each task that are scored.
    """

    flags: dict[str, Any]
    vocab: int
    batch: int | None
    tokens: int
    square: int
    memory: int
    seconds: float
    decoded: int
    examples: int


FULL = Size({"max_seq_len": 2048}, 32_768, None, 32_768, 8192, 1 << 30, 4.0, 128, 60)
TOY = Size({"max_seq_len": 64, "aspect_ratio": 16, "head_dim": 16}, 512, 384, 128, 128, 1 << 16, 0.0, 4, 1)


def size_for(device: torch.device) -> Size:
    """Real sizes on a GPU, toy sizes elsewhere."""
    return FULL if device.type == "cuda" else TOY


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, work: Callable[[], object], times: int = 10) -> float:
    """Median seconds of `work`, after two runs that are not counted: the first one compiles."""
    seconds = []
    for _ in range(times + 2):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def row(metric: str, value: float, unit: str, **setting: object) -> Row:
    """One figure of ours; no peer runs here."""
    peer = {"peer": None, "theirs": None, "ratio": None}
    return {"metric": metric, **peer, "ours": value, "unit": unit, **setting}


def plan_of(size: Size, depth: int, **flags: Any) -> Plan:
    """The plan of this depth on one rank, at toy width on a CPU."""
    return planning.plan(TrainArgs(depth=depth, **size.flags, **flags), size.vocab)


def step_plan(size: Size, depth: int, **flags: Any) -> Plan:
    """The plan of one rank whose step is the share that it would have among RANKS."""
    args = TrainArgs(depth=depth, num_iterations=1000, **size.flags, **flags)
    batch = size.batch or planning.plan(args, size.vocab, RANKS).batch_tokens // RANKS
    return plan_of(size, depth, num_iterations=1000, total_batch_size=batch, **flags)


def products(x: Tensor, *weights: Tensor) -> Callable[[], None]:
    """Forward and backward products of linear layers in a row, and nothing between them."""
    outs = list(itertools.accumulate(weights, lambda y, w: y @ w.t(), initial=x))

    def work() -> None:
        for y, w in zip(outs, weights, strict=False):
            _ = y @ w.t()
        for y, w, grad in zip(outs, weights, outs[1:], strict=False):
            _, _ = grad @ w, grad.t() @ y

    return work


def machine_rates(device: torch.device) -> list[Row]:
    """Products as a square and as a block of d24 has them, memory, and launches."""
    size, dtype = size_for(device), torch.bfloat16
    speed = machine.speed(device, dtype)
    model = plan_of(size, 24).model
    width, tokens = model.n_embd, size.tokens
    a = torch.randn(tokens, width, device=device, dtype=dtype)
    b = torch.randn(width, 4 * width, device=device, dtype=dtype)
    flops = 2 * tokens * width * 4 * width
    source = torch.zeros(size.memory, dtype=torch.uint8, device=device).view(dtype)
    target, one = torch.empty_like(source), torch.zeros(1, device=device)

    def launches() -> None:
        for _ in range(1000):
            one.add_(1)

    return [
        row("peak_flops", speed.peak_flops, "FLOP/s", source=speed.peak_source),
        row("matmul_square", speed.matmul_flops, "FLOP/s"),
        row("matmul_block", flops / timed(device, lambda: a @ b), "FLOP/s"),
        row("memory_rate", 2 * size.memory / timed(device, lambda: torch.mul(source, 2, out=target)), "B/s"),
        row("launch_time", timed(device, launches, 3) / 1000, "s"),
        row("launch_and_wait", timed(device, lambda: one.add_(1), 50), "s"),
    ]


def fp8_rates(device: torch.device) -> list[Row]:
    """Products of a block of d24 in fp8: those of the forward pass, and those with gradients in e5m2."""
    size = size_for(device)
    width, tokens = plan_of(size, 24).model.n_embd, size.tokens
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    weight = torch.randn(4 * width, width, device=device).to(torch.float8_e4m3fn)
    scale, flops, rows = torch.ones((), device=device), 2 * tokens * width * 4 * width, []
    for metric, dtype, out in (
        ("matmul_fp8_forward", torch.float8_e4m3fn, torch.bfloat16),
        ("matmul_fp8_backward", torch.float8_e5m2, torch.float32),
    ):
        call = partial(torch._scaled_mm, x.to(dtype), weight.t(), scale, scale, out_dtype=out)
        rows.append(row(metric, flops / timed(device, call), "FLOP/s"))
    return rows


class RandomBatches:
    """In the place of the loader: the same random tokens each step, in documents where the model masks."""

    metrics: ClassVar[dict[str, float]] = {}

    def __init__(self, plan: Plan, device: torch.device) -> None:
        """Draw the rows of a batch, or of its unit where it grows."""
        self.device_batch_size = plan.device_batch_size
        shape = (plan.batch_rows, plan.model.sequence_len + 1)
        generator = torch.Generator(device).manual_seed(0)
        self._tokens = torch.randint(1, plan.model.vocab_size, shape, generator=generator, device=device)
        self._tokens[:, ::DOCUMENT] = 0

    def next_batch(self) -> list[Batch]:
        """Micro-batches of (inputs, targets), each (rows, T) int64."""
        parts = torch.split(self._tokens, self.device_batch_size)
        return [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts]


def state_of(plan: Plan, precision: Precision, world: World) -> TrainState:
    """A run at step 0, as the trainer makes it, on random tokens."""
    with world.device:
        model = GPT(plan.model, precision, 0 if plan.model.document_mask else None)
    model.init_weights(0)
    model.recompute = plan.args.recompute
    params, kinds = dict(model.named_parameters()), model.parameter_kinds()
    options = MatrixOptions(plan.polar_norm_factor)
    optimizer = MuonAdamW(params, kinds, plan.groups, world, precision.compute_dtype, options)
    loader: Any = RandomBatches(plan, world.device)
    return TrainState(0, model, optimizer, loader, LossScale(precision.compute_dtype, world.device))


def training_step(
    device: torch.device, depth: int, dtype: str, backend: str = "auto", recipe: str = TrainArgs.recipe
) -> list[Row]:
    """One rank's share of a step: its time, tokens a second, MFU, memory, and the time of the first one.

    It is the last step of a run, which has the largest batch and windows where they grow.
    """
    size, world = size_for(device), World.single_process(device)
    precision, _ = choose_precision(device, "auto", backend, fp8=dtype == "fp8")
    plan = step_plan(size, depth, recipe=recipe, fp8=precision.fp8)
    state = state_of(plan, precision, world)
    state.step = plan.steps - 1
    plan = train_run._prepare(plan, state, precision, world)
    state.model.use_windows(plan.windows_at(state.step))
    speed = machine.speed(device, precision.compute_dtype)

    def steps(count: int) -> float:
        wait(device)
        start = time.perf_counter()
        for _ in range(count):
            result = train_run.train_step(plan, state, world)
        if not torch.isfinite(result.loss).item():
            raise UserError("the loss is not finite.")
        return (time.perf_counter() - start) / count

    first, second = steps(1), steps(1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = steps(max(2, min(20, int(size.seconds / second))))
    rows, tokens = state.loader.device_batch_size, plan.tokens_at(state.step)
    needed = memory.estimate(plan, rows, precision.compute_dtype, device.type)
    setting = {"depth": depth, "dtype": dtype, "backend": precision.attention, "recipe": recipe}
    setting |= {"rows": rows, "context": plan.model.sequence_len, "tokens": tokens}
    mfu = tokens / seconds * plan.flops_per_token / speed.peak_flops
    return [
        row("step_time", seconds, "s", **setting),
        row("tokens_per_second", tokens / seconds, "tokens/s", **setting),
        row("mfu", mfu, "share of bf16 peak", **setting),
        row("peak_memory", machine.peak_memory_bytes(device), "B", estimated=needed.total, **setting),
        row("first_step", first, "s", **setting),
    ]


def loss_of_tokens(device: torch.device, depth: int) -> list[Row]:
    """Head, softcap and cross-entropy of a micro-batch with gradients, and the products alone."""
    size, dtype = size_for(device), torch.bfloat16
    model = plan_of(size, depth).model
    x = torch.randn(size.tokens, model.n_embd, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(model.padded_vocab_size, model.n_embd, device=device, requires_grad=True)
    targets = torch.randint(0, size.vocab, (size.tokens,), device=device)

    def work() -> None:
        loss = softcapped_cross_entropy(x, weight, targets, model.softcap, vocab_size=size.vocab)
        torch.autograd.grad(loss, (x, weight))

    setting = {"depth": depth, "tokens": size.tokens}
    alone = products(x.detach(), weight.detach().to(dtype))
    return [
        row("loss_time", timed(device, work), "s", **setting),
        row("head_products_time", timed(device, alone), "s", **setting),
    ]


def mlp(device: torch.device, depth: int, dtype: str) -> list[Row]:
    """An MLP forward and backward as the step computes it, and its products in bf16 alone."""
    size = size_for(device)
    precision = Precision(torch.bfloat16, "sdpa", dtype == "fp8")
    model = plan_of(size, depth).model
    with device:
        module: Any = GPT(dataclasses.replace(model, n_layer=1), precision).blocks[0].mlp
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x = torch.randn(1, size.tokens, model.n_embd, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    call = torch.compile(module, dynamic=False) if machine.choose_compile(device)[0] else module
    weights = [parameter.detach().to(torch.bfloat16) for parameter in module.parameters()]
    setting = {"depth": depth, "dtype": dtype, "tokens": size.tokens}
    alone = products(x.detach()[0], *weights)

    def work() -> None:
        module.zero_grad()
        x.grad = None
        call(x).backward(grad)

    return [
        row("mlp_time", timed(device, work), "s", **setting),
        row("mlp_products_time", timed(device, alone), "s", **setting),
    ]


def attention_kernel(device: torch.device, depth: int, backend: str) -> list[Row]:
    """Forward and backward of one layer with a short and with the full window, compiled as a step is."""
    size = size_for(device)
    model = plan_of(size, depth).model
    t, windows = model.sequence_len, sorted(set(model.windows))
    shape = (size.tokens // t, t, model.n_head, model.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    layout, grad, rows = Layout(block_masks=block_masks(backend, t, windows, device)), torch.randn_like(q), []
    for window in windows:
        call: Callable[..., Tensor] = partial(attention, window=window, backend=backend, layout=layout)
        if machine.choose_compile(device)[0]:
            call = torch.compile(call, dynamic=False)
        work = partial(_forward_and_backward, call, (q, k, v), grad)
        setting = {"depth": depth, "backend": backend, "window": window, "tokens": size.tokens}
        rows.append(row("attention_time", timed(device, work), "s", **setting))
    return rows


def _forward_and_backward(call: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> None:
    torch.autograd.grad(call(*inputs), inputs, grad)


def optimizer_update(device: torch.device, depth: int) -> list[Row]:
    """The update of all parameters on one rank, compiled where the step compiles it."""
    world = World.single_process(device)
    precision, _ = choose_precision(device)
    plan = plan_of(size_for(device), depth, total_batch_size=size_for(device).batch)
    state = state_of(plan, precision, world)
    if machine.choose_compile(device)[0]:
        state.optimizer.compile_updates()
    gradients = [(p, torch.randn_like(p)) for p in state.model.parameters()]

    def work() -> None:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        state.optimizer.step(0.01, 0.95, 0.0)

    return [row("optimizer_time", timed(device, work, 5), "s", depth=depth)]


def random_model(device: torch.device, depth: int) -> tuple[GPT, Tokenizer]:
    """A model with initial weights as evaluation loads it, and a small tokenizer for its texts."""
    size = size_for(device)
    precision, _ = choose_precision(device)
    with device:
        model = GPT(plan_of(size, depth).model, precision)
    model.init_weights(0)
    texts = [path.read_text("utf-8") for path in sorted((REPO / "dev" / "samples").glob("*.txt"))]
    return model, Tokenizer.train(texts, min(size.vocab, 2048))


def decoding(device: torch.device, depth: int) -> list[Row]:
    """Tokens a second behind a cache, for one row and for 64."""
    size = size_for(device)
    model, tokenizer = random_model(device, depth)
    engine, rows = Engine(model, tokenizer), []
    for count in (1, 64):
        prompts = [[1 + (i % 100)] * (model.config.sequence_len // 8) for i in range(count)]
        found = []
        for _ in range(2):  # the first one compiles
            start = time.perf_counter()
            done = engine.generate(prompts, Sampling(max_tokens=size.decoded))
            tokens = sum(len(completion.ids) for prompt in done for completion in prompt)
            found.append(tokens / (time.perf_counter() - start))
        rows.append(row("decoding", found[-1], "tokens/s", depth=depth, rows=count))
    return rows


def core_scoring(device: torch.device, depth: int) -> list[Row]:
    """Examples of the small CORE suite a second, at the first pass and when every shape has been met."""
    model, tokenizer = random_model(device, depth)
    bundle, world = evaluate.find_bundle("mini"), World.single_process(device)
    rows = []
    for metric in ("core_scoring_first", "core_scoring"):
        examples = size_for(device).examples
        result = evaluate.evaluate(GPTScorer(model), tokenizer, bundle, max_per_task=examples, world=world)
        rows.append(row(metric, result.examples_per_second, "examples/s", depth=depth))
    return rows


class Outcomes:
    """A plugin of pytest that counts how tests end."""

    def __init__(self) -> None:
        self.passed, self.skipped, self.failed = 0, 0, list[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the body of a test; a setup that fails or skips has none."""
        self.passed += report.when == "call" and report.passed
        self.skipped += report.skipped
        if report.failed:
            self.failed.append(report.nodeid)


def tests(device: torch.device, chosen: list[str]) -> list[Row]:
    """Tests that need a GPU, by their names for pytest.

    Raises:
        UserError: one of them failed.
    """
    outcomes = Outcomes()
    code = pytest.main([*(str(REPO / name) for name in chosen), "-p", "no:cacheprovider"], [outcomes])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise UserError(
            f"pytest ended with {code}, tests that failed: {', '.join(outcomes.failed) or 'none'}"
        )
    return [row("tests_passed", outcomes.passed, "tests", skipped=outcomes.skipped, chosen=chosen)]


FIGURES: dict[str, Callable[..., list[Row]]] = {
    function.__name__: function
    for function in (
        machine_rates,
        fp8_rates,
        training_step,
        loss_of_tokens,
        mlp,
        attention_kernel,
        optimizer_update,
        decoding,
        core_scoring,
        tests,
    )
}
