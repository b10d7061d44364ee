"""Roofline of a training step: the time of each part, projected from FLOPs and bytes, for a depth and a card.

    python -m dev.bench.roofline [--depth 24] [--ranks 8] [--card h100] [--fp8] [--dollars 3]
    python -m dev.bench.roofline --readme             renew the table of dev/bench/README.md
    python -m dev.bench.roofline --measured out/gpu.json

A part takes its FLOPs over the card's rate of products, or its bytes over the card's rate of memory: parts
follow each other, and launches take no time. Attention is a flash kernel that skips what is outside a window.
The bytes are counted without a GPU, in the code that Inductor generates for an H100: bytes.json beside this
file, which tests/gpuless/ratchet.py writes. The rates are those that a card reaches in such a step, not those
of its data sheet.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat.common import files
from nanochat.common.errors import UserError, cli
from nanochat.common.machine import PEAK_BF16_FLOPS_PER_S
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.config.model_config import GPTConfig
from nanochat.config.plan import Plan
from nanochat.train import memory

VOCAB = 32_768
TILE = 128  # keys and queries that a flash kernel takes at a time, or skips
POLAR_STEPS = 5
PASSES = ("fused", "eager", "triton")  # kinds of kernels whose time is that of memory
TABLE_DEPTHS, TABLE_RANKS, TABLE_CARD = (12, 20, 24, 26), 8, "h100"
COUNTED, README = (Path(__file__).with_name(name) for name in ("bytes.json", "README.md"))
BEGIN, END = "<!-- projections -->", "<!-- end of projections -->"


@dataclass(frozen=True)
class Card:
    """Rates that one GPU reaches in a training step.

    Attributes:
        name: part of the name that the driver reports, in lower case; the key of its bf16 peak.
        gemm: products of the blocks in bf16, FLOP/s.
        head: products of the output head in bf16, FLOP/s.
        fp8: products in fp8, forward and backward, FLOP/s; None where training has no fp8.
        attention: forward and backward passes of a flash kernel, FLOP/s of the tiles it computes.
        memory_rate: kernels that are bound by memory, bytes/s.
        link_rate: a collective within a machine, bytes/s through a rank (busbw of nccl-tests).
        memory: bytes of the card.
        dollars: an assumed price of an hour.
        source: where the rates are from.
    """

    name: str
    gemm: float
    head: float
    fp8: tuple[float, float] | None
    attention: float
    memory_rate: float
    link_rate: float
    memory: float
    dollars: float
    source: str

    @property
    def peak(self) -> float:
        """Dense bf16 FLOP/s of the data sheet."""
        return PEAK_BF16_FLOPS_PER_S[self.name]


CARDS = {
    "h100": Card(
        "h100", 650e12, 600e12, (1100e12, 850e12), 400e12, 2.7e12, 370e9, 85.0e9, 3.0,
        "rates that public training runs of this size reach; collectives as nccl-tests gives on NVLink 4",
    ),
    "h200": Card(
        "h200", 650e12, 600e12, (1100e12, 850e12), 400e12, 3.87e12, 370e9, 150.0e9, 3.5,
        "the chip of an H100, so its rates; memory as the same share (0.81) of 4.8 TB/s",
    ),
    "a100": Card(
        "a100", 240e12, 220e12, None, 150e12, 1.65e12, 230e9, 85.0e9, 1.8,
        "estimate: 0.77 of the peak, 0.81 of 2.04 TB/s; collectives as nccl-tests gives on NVLink 3",
    ),
    "4090": Card(
        "rtx 4090", 150e12, 145e12, None, 110e12, 0.92e12, 10e9, 25.4e9, 0.4,
        "estimate: 0.9 of the peak and of 1.01 TB/s; PCIe 4 without peer access",
    ),
    "5090": Card(
        "rtx 5090", 200e12, 195e12, (370e12, 330e12), 140e12, 1.6e12, 20e9, 34.2e9, 0.7,
        "estimate: 0.95 of the peak (torch.matmul was measured above it), 0.9 of 1.79 TB/s; PCIe 5",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Traffic:
    """Bytes that a step moves through memory beside its products, by the unit that each kind grows with.

    Attributes:
        forward: fused kernels of the blocks, a token, layer and channel.
        backward: the same of the backward pass.
        weights: copies of weights in the dtypes of products, a matrix weight and step.
        loss: softcap and cross-entropy with their gradients, a logit.
        accumulation: rows of tables, and gradients added to earlier ones, a parameter and micro-batch.
        stacks: matrices and gradients copied into stacks and back, a matrix weight and step.
        muon: Muon's kernels, a matrix weight of the rank's shard and step.
        adam: AdamW's kernels, another parameter of the rank's shard and step.
        reduce: gradients on the wire, a parameter and step.
        reduce_exposed: fraction of that time in which nothing else is computed.
        gather: weights on the wire, a parameter and step.
        gather_exposed: fraction of that time in which nothing else is computed.
    """

    forward: float
    backward: float
    weights: float = 48.0
    loss: float = 60.0
    accumulation: float = 9.0
    stacks: float = 16.0
    muon: float = 320.0
    adam: float = 28.0
    reduce: float = 4.0
    reduce_exposed: float = 1.0
    gather: float = 4.0
    gather_exposed: float = 0.7


# By dtype of the products: the count of the first review, at depth 24 with 32,768 tokens a micro-batch. The
# blocks moved 69.1 + 97.6 GB in bf16 and 89.8 + 152.3 GB in fp8, weights included.
FIRST_COUNT = {
    "bf16": Traffic(forward=53.8, backward=77.4),
    "fp8": Traffic(forward=70.4, backward=118.8, weights=80.0),
}


@dataclass(frozen=True)
class Projection:
    """A projected step and the run that is made of such steps.

    Attributes:
        plan: of the run.
        card: that every rank has.
        parts: seconds of a step by part, in the order of the step.
    """

    plan: Plan
    card: Card
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all ranks a second."""
        return self.plan.batch_tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Fraction of the bf16 peak of all ranks, by the FLOPs of the scaling rules."""
        return self.tokens_per_s * self.plan.flops_per_token / (self.plan.world_size * self.card.peak)

    @property
    def hours(self) -> float:
        """Hours of the plan's horizon, without evaluation, checkpoints and start."""
        return self.plan.tokens / self.tokens_per_s / 3600


def traffic_of(fp8: bool, file: Path = COUNTED) -> Traffic:
    """The bytes that were counted last at depth 24, or those of the first review where none are in the file.

    Args:
        fp8: of a step whose wide products are in fp8.
        file: what tests/gpuless/ratchet.py writes.
    """
    steps = files.read_json(file)["steps"] if file.exists() else {}
    counted = steps.get("d24-fp8" if fp8 else "d24")
    if counted is None:
        return FIRST_COUNT["fp8" if fp8 else "bf16"]
    return units_of({**steps.get("d24", {}), **counted}, fp8)  # updates may be counted in bf16 alone


def units_of(step: dict[str, Any], fp8: bool) -> Traffic:
    """What a counted step moves, by the units that it grows with.

    Args:
        step: an entry of bytes.json, with the bytes of products and collectives beside the others.
        fp8: of the products.
    """
    shape = step["shape"]
    plan = planning.plan(TrainArgs(depth=shape["depth"], fp8=fp8), shape["vocabulary"], shape["ranks"])
    default = Traffic(0, 0)
    update = _bytes(step["update"], PASSES) / update_bytes(plan, default)
    batches, tokens = step["batches"], shape["tokens"] * shape["micro_batches"]
    blocks, logits = tokens * shape["depth"] * shape["width"], tokens * shape["vocabulary"]
    # What runs beside the compiled blocks: rows of tables, and sums of gradients.
    beside = sum(_bytes(batches[phase], ("eager",)) for phase in ("forward", "backward"))
    return Traffic(
        forward=_bytes(batches["forward"], ("fused", "triton")) / blocks,
        backward=_bytes(batches["backward"], ("fused", "triton")) / blocks,
        weights=_bytes(step["copies"], PASSES) / plan.params.matrix,
        loss=_bytes(batches["loss"], PASSES) / logits,
        accumulation=beside / shape["micro_batches"] / plan.params.total,
        stacks=default.stacks * update,
        muon=default.muon * update,
        adam=default.adam * update,
    )


def _bytes(kinds: dict[str, dict[str, float]], wanted: tuple[str, ...]) -> float:
    return 1e9 * sum(kind["gb"] for name, kind in kinds.items() if name in wanted)


def update_bytes(plan: Plan, traffic: Traffic) -> float:
    """Bytes that one rank's optimizer moves in a step, products included."""
    matrix, others = plan.params.matrix, plan.params.total - plan.params.matrix
    return traffic.stacks * matrix + (traffic.muon * matrix + traffic.adam * others) / plan.world_size


def plan_for(depth: int, ranks: int, card: Card, **flags: Any) -> Plan:
    """The plan of a run, with as many rows in a micro-batch as the card is estimated to hold.

    Raises:
        UserError: one row needs more memory than the card has, or the card has no fp8 for training.
    """
    plan = planning.plan(TrainArgs(depth=depth, **flags), VOCAB, ranks)
    if plan.args.fp8 and card.fp8 is None:
        raise UserError(f"--fp8: training on a {card.name} has none. Leave it out or take another --card.")
    rows, per_rank = plan.device_batch_size, plan.batch_rows // ranks
    while memory.estimate(plan, rows, torch.bfloat16, "cuda").total > memory.USABLE * card.memory:
        if rows == 1:
            raise UserError(
                f"--depth={depth}: one row needs more than the {card.memory / 1e9:.0f} GB of a {card.name} "
                "with these ranks. Lower --depth or raise --ranks."
            )
        rows = memory.divisor_below(per_rank, rows)
    return planning.with_micro_batch(plan, rows)


def project(plan: Plan, card: Card, traffic: Traffic) -> Projection:
    """The time of each part of a step on one rank, in seconds."""
    model, params, ranks = plan.model, plan.params, plan.world_size
    tokens = plan.batch_tokens / ranks
    forward_rate, backward_rate = card.fp8 if plan.args.fp8 and card.fp8 else (card.gemm, card.gemm)
    blocks = 2 * params.matrix * tokens
    kinds = {
        "fused kernels of the blocks": (traffic.forward + traffic.backward)
        * (tokens * model.n_layer * model.n_embd),
        "copies of weights": traffic.weights * params.matrix,
        "loss": traffic.loss * tokens * model.padded_vocab_size,
        "tables, sums of gradients": traffic.accumulation * params.total * plan.grad_accum_steps,
    }
    update = update_bytes(plan, traffic) / card.memory_rate + muon_flops(model, ranks) / card.gemm
    reduced = traffic.reduce / 2 if plan.args.grad_reduce_dtype == "bfloat16" else traffic.reduce
    exposed = reduced * traffic.reduce_exposed + traffic.gather * traffic.gather_exposed
    return Projection(
        plan,
        card,
        {
            "products of the blocks": blocks / forward_rate + 2 * blocks / backward_rate,
            "products of the head": 6 * params.unembedding * tokens / card.head,
            "attention": attention_flops(model) * tokens / card.attention,
            **{kind: moved / card.memory_rate for kind, moved in kinds.items()},
            "optimizer": update,
            "collectives, not hidden": exposed * params.total * (ranks - 1) / ranks / card.link_rate,
        },
    )


def attention_flops(model: GPTConfig) -> float:
    """FLOPs a token of a flash kernel: 2 products forward, 5 backward, over the tiles that it visits."""
    width = model.n_head * model.kind.maps * (model.qk_dim + model.head_dim)
    return sum(7 * width * keys_met(model.sequence_len, window) for window in model.windows)


def keys_met(t: int, window: int) -> float:
    """Keys that a query of a causal row meets on average, by whole tiles.

    >>> keys_met(2048, 512), keys_met(2048, 2048)
    (560.0, 1088.0)
    """
    reach = math.ceil(window / TILE)
    return TILE * statistics.mean(min(tile, reach) + 1 for tile in range(math.ceil(t / TILE)))


def muon_flops(model: GPTConfig, ranks: int) -> float:
    """FLOPs of Polar Express for the matrices of one rank: X X^T, its square, and their product with X."""
    c, keys = model.n_embd, model.n_kv_head * model.head_dim
    queries, out = model.n_head * model.kind.maps * model.qk_dim, model.n_head * model.head_dim
    shapes = [(queries, c), (keys, c), (keys, c), (c, out), (4 * c, c), (c, 4 * c)] * model.n_layer
    total = 0
    for shape, count in Counter(shapes).items():
        m, n = sorted(shape)
        total += math.ceil(count / ranks) * POLAR_STEPS * (4 * m * m * n + 2 * m**3)
    return total


def report(projection: Projection, dollars: float) -> Iterator[str]:
    """The parts of a step, and what follows for the run."""
    plan, card = projection.plan, projection.card
    dtype = "fp8" if plan.args.fp8 else "bf16"
    yield (
        f"projected, nothing is measured: depth {plan.args.depth}, {dtype}, {plan.world_size} x {card.name}, "
        f"{plan.batch_tokens:,} tokens a step, {plan.device_batch_size} rows x {plan.grad_accum_steps} a rank"
    )
    yield f"rates of the card: {card.source}"
    for part, seconds in projection.parts.items():
        yield f"{part:32}{1e3 * seconds:10,.1f} ms{seconds / projection.seconds:7.1%}"
    yield f"{'step':32}{1e3 * projection.seconds:10,.1f} ms"
    yield (
        f"{projection.tokens_per_s:,.0f} tokens/s, MFU {projection.mfu:.1%}; {plan.steps:,} steps in "
        f"{projection.hours:.2f} h, ${projection.hours * plan.world_size * dollars:,.0f} at an assumed "
        f"${dollars:.2f} a GPU and hour"
    )


def table() -> Iterator[str]:
    """The projections of dev/bench/README.md, in Markdown."""
    card = CARDS[TABLE_CARD]
    yield "| depth | products | step, ms | tokens/s | MFU | steps | hours | dollars |"
    yield "|---|---|---|---|---|---|---|---|"
    for depth in TABLE_DEPTHS:
        for fp8 in (False, True):
            found = project(plan_for(depth, TABLE_RANKS, card, fp8=fp8), card, traffic_of(fp8))
            yield (
                f"| {depth} | {'fp8' if fp8 else 'bf16'} | {1e3 * found.seconds:,.0f} | "
                f"{found.tokens_per_s:,.0f} | {found.mfu:.1%} | {found.plan.steps:,} | {found.hours:.2f} | "
                f"{found.hours * TABLE_RANKS * card.dollars:,.0f} |"
            )
    yield ""
    yield from parts_table()


def parts_table(depth: int = 24) -> Iterator[str]:
    """Parts of a projected step, with the bytes of the first count and of now, in Markdown."""
    card = CARDS[TABLE_CARD]
    columns = [
        project(plan_for(depth, TABLE_RANKS, card, fp8=fp8), card, traffic)
        for fp8, dtype in ((False, "bf16"), (True, "fp8"))
        for traffic in (FIRST_COUNT[dtype], traffic_of(fp8))
    ]
    heads = "bf16, first count | bf16 now | fp8, first count | fp8 now"
    yield f"| part of a step at depth {depth}, ms | {heads} |"
    yield "|---|---|---|---|---|"
    for part in columns[0].parts:
        yield f"| {part} | {' | '.join(f'{1e3 * found.parts[part]:,.1f}' for found in columns)} |"
    yield f"| step | {' | '.join(f'{1e3 * found.seconds:,.0f}' for found in columns)} |"


def write_table(readme: Path = README) -> None:
    """Put the table of now between the marks in the file."""
    before, _, rest = readme.read_text("utf-8").partition(f"{BEGIN}\n")
    files.atomic_write(readme, before + "\n".join([BEGIN, *table(), END]) + rest.partition(END)[2])


def compare(path: Path) -> Iterator[str]:
    """What `gpu.sh` measured beside what is projected for the same work on the same card.

    Args:
        path: the file of dev.bench.gpu.

    Raises:
        UserError: there is no such file, or its figures are of a card that is not in the table.
    """
    found = files.read_json(path, dict[str, Any], advice="Make it: bash dev/bench/gpu.sh")
    device = str(found["machine"]["device"])
    card = next((card for card in CARDS.values() if card.name in device.lower()), None)
    if card is None:
        raise UserError(f"{path}: measured on {device}, and the cards are {', '.join(CARDS)}.")
    yield f"{device}: measured beside projected"
    forward, backward = card.fp8 or (0.0, 0.0)
    rates = {
        "matmul_block": card.gemm,
        "matmul_fp8_forward": forward,
        "matmul_fp8_backward": backward,
        "memory_rate": card.memory_rate,
    }
    for row in found["rows"]:
        metric = row.get("metric", "")
        if rate := rates.get(metric):
            yield _beside(metric, rate / 1e12, row["ours"] / 1e12, f"T{row['unit']}")
        elif metric == "step_time" and row["recipe"] == TrainArgs.recipe:
            seconds = project(_plan_of(row), card, traffic_of(row["dtype"] == "fp8")).seconds
            name = f"step d{row['depth']} {row['dtype']} {row['backend']}"
            yield _beside(name, 1e3 * seconds, 1e3 * row["ours"], "ms")


def _plan_of(row: dict[str, Any]) -> Plan:
    """The plan whose step was measured on one GPU."""
    args = TrainArgs(
        depth=row["depth"],
        fp8=row["dtype"] == "fp8",
        max_seq_len=row["context"],
        total_batch_size=row["tokens"],
        device_batch_size=row["rows"],
    )
    return planning.plan(args, VOCAB)


def _beside(name: str, projected: float, measured: float, unit: str) -> str:
    difference = measured / projected - 1
    mark = "  <- more than 15 % apart" if abs(difference) > 0.15 else ""
    return f"{name:28}{projected:12,.2f} projected{measured:12,.2f} measured {unit}{difference:+8.1%}{mark}"


@cli
def main() -> None:
    """Print one projection, renew the table, or the comparison with what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--ranks", type=int, default=TABLE_RANKS, help="GPUs of one machine")
    parser.add_argument("--card", choices=tuple(CARDS), default=TABLE_CARD)
    parser.add_argument("--fp8", action="store_true", help="wide products in fp8")
    parser.add_argument("--dollars", type=float, help="price of a GPU and hour; by default an assumption")
    parser.add_argument("--readme", action="store_true", help="renew the table of dev/bench/README.md")
    parser.add_argument("--measured", type=Path, help="compare with the figures of dev/bench/gpu.sh")
    args = parser.parse_args()
    card = CARDS[args.card]
    if args.readme:
        write_table()
        lines = table()
    elif args.measured:
        lines = compare(args.measured)
    else:
        plan = plan_for(args.depth, args.ranks, card, fp8=args.fp8)
        dollars = card.dollars if args.dollars is None else args.dollars
        lines = report(project(plan, card, traffic_of(args.fp8)), dollars)
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
