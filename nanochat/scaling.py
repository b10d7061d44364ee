"""All that depth decides: shape, batch, horizon, learning rates, decay. Pure: no torch, clock or machine.

Formulas: RECIPE 1.1, 1.5 and 2.2. The same arguments give the same plan.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from nanochat.config import ATTENTION_KINDS, TrainArgs
from nanochat.errors import UserError
from nanochat.recipe import (
    RECIPES,
    REFERENCE_BATCH_TOKENS,
    REFERENCE_DEPTH,
    REFERENCE_WIDTH,
    GroupRecipe,
    Recipe,
)
from nanochat.schedule import Schedule

VOCAB_MULTIPLE = 64
WINDOW_MULTIPLE = 128
MAX_LANES = 16  # each opens with a block of about a million tokens: start-up time and memory
MICRO_BATCH_CONTEXT = 2048  # context for which RECIPE 1.5 gives rows of a micro-batch
ADAM_EPS = 1e-10


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not below n.

    >>> round_up(770, 128)
    896
    """
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class GPTConfig:
    """Shape and constants of a model (RECIPE 1.1, 1.2, 2.4).

    Attributes:
        n_layer: number of blocks.
        n_embd: model width C.
        n_head: query heads.
        n_kv_head: key and value heads; divides n_head.
        head_dim: width D of a head, even.
        vocab_size: entries of the tokenizer.
        sequence_len: context length T.
        window_pattern: S and L, tiled over layers; the last layer is always L.
        recipe: name of the set of constants.
        attention_kind: one of config.ATTENTION_KINDS.
        bigram: whether pairs of neighbouring tokens have a table.
    """

    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    head_dim: int
    vocab_size: int
    sequence_len: int
    window_pattern: str = "SSSL"
    recipe: str = "july"
    attention_kind: str = "softmax"
    bigram: bool = False

    @property
    def constants(self) -> Recipe:
        """The constants of the recipe."""
        return RECIPES[self.recipe]

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the tables: the vocabulary, raised to a multiple of 64."""
        return round_up(self.vocab_size, VOCAB_MULTIPLE)

    @property
    def n_map(self) -> int:
        """Attention maps of a layer, each with its own queries: two a head under differential attention."""
        return self.n_head if self.attention_kind == "softmax" else 2 * self.n_head

    @property
    def qk_dim(self) -> int:
        """Width of a query and of a key: under diff1 the two maps of a head share the width of the head."""
        return self.head_dim // 2 if self.attention_kind == "diff1" else self.head_dim

    @property
    def windows(self) -> tuple[int, ...]:
        """How many earlier tokens each layer sees beside the current one."""
        full = self.sequence_len
        short = min(full, round_up(-(-full // self.constants.short_window_divisor), WINDOW_MULTIPLE))
        kinds = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer - 1)] + ["L"]
        return tuple(short if kind == "S" else full for kind in kinds)

    @property
    def bigram_rows(self) -> int:
        """Rows of the table of pairs, which share them by a hash: five times the vocabulary's (RECIPE 3)."""
        return 5 * self.padded_vocab_size if self.bigram else 0

    def has_value_embedding(self, layer: int) -> bool:
        """Every other layer owns a value table, the last one included."""
        return layer % 2 == (self.n_layer - 1) % 2

    @property
    def value_gate_channels(self) -> int:
        """Channels of the attention input that the value gate reads."""
        return min(self.constants.value_gate_channels, self.n_embd)

    @property
    def smear_gate_channels(self) -> int:
        """Channels of the embedding that the smear gate reads (RECIPE 2.4)."""
        return min(24, self.n_embd)


@dataclass(frozen=True)
class ParamCounts:
    """Parameters by kind, padded rows included; the table of pairs is one of the value tables."""

    matrix: int
    unembedding: int
    embedding: int
    value_embedding: int
    scalars: int

    @property
    def scaling(self) -> int:
        """The N of the scaling rules: block matrices and output head."""
        return self.matrix + self.unembedding

    @property
    def total(self) -> int:
        """All parameters."""
        return self.matrix + self.unembedding + self.embedding + self.value_embedding + self.scalars


def count_params(c: GPTConfig) -> ParamCounts:
    """Parameters of a model, without building it."""
    q_width, out_width, kv_width = c.n_map * c.qk_dim, c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    value_layers = sum(c.has_value_embedding(i) for i in range(c.n_layer))
    shares = c.n_head if c.attention_kind == "diff2" else 0
    attention = c.n_embd * (q_width + out_width + 2 * kv_width + shares)
    share_vectors = 4 * c.qk_dim if c.attention_kind == "diff1" else 0
    mlp = 2 * c.n_embd * 4 * c.n_embd
    gates = value_layers * c.n_kv_head * c.value_gate_channels
    table = c.padded_vocab_size * c.n_embd
    return ParamCounts(
        matrix=c.n_layer * (attention + mlp) + gates,
        unembedding=table,
        embedding=table,
        value_embedding=value_layers * c.padded_vocab_size * kv_width + c.bigram_rows * c.n_embd,
        scalars=c.n_layer * (2 + c.bigram + share_vectors) + c.smear_gate_channels + 2,
    )


def flops_per_token(c: GPTConfig) -> float:
    """Training FLOPs a token (RECIPE 1.5): 6 a matmul weight, 12 C min(window, T) a layer for attention.

    Of the 12 C, 6 are for scores and 6 for values: diff1 takes the second twice (5.2), diff2 both.
    """
    width = c.n_map * (c.qk_dim + c.head_dim)
    attention = sum(6 * width * min(window, c.sequence_len) for window in c.windows)
    return 6 * count_params(c).scaling + attention


@dataclass(frozen=True)
class GroupPlan:
    """How one kind of parameter is updated; learning rates are final but for the schedule."""

    optimizer: str  # "muon", "soap" or "adamw"
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class Plan:
    """Everything derived from the arguments. config.json holds it whole.

    Attributes:
        args: what was asked.
        world_size: ranks it is for.
        model: shape of the model.
        params: parameters by kind.
        flops_per_token: training FLOPs of a token.
        batch_tokens: tokens of a global batch.
        batch_rows: rows of a global batch.
        device_batch_size: rows of a micro-batch of one rank.
        grad_accum_steps: micro-batches of one rank a step.
        lanes: independent streams of data.
        steps: optimizer steps.
        groups: how each kind of parameter is updated.
        schedule: shape of the run over its steps.
        notices: what was adjusted, for the console.
    """

    args: TrainArgs
    world_size: int
    model: GPTConfig
    params: ParamCounts
    flops_per_token: float
    batch_tokens: int
    batch_rows: int
    device_batch_size: int
    grad_accum_steps: int
    lanes: int
    steps: int
    groups: dict[str, GroupPlan]
    schedule: Schedule
    notices: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.batch_tokens

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON holds it, totals included."""
        derived = {"tokens": self.tokens, "total_flops": self.tokens * self.flops_per_token}
        return {**dataclasses.asdict(self), **derived}


def model_config(args: TrainArgs, vocab_size: int, depth: int) -> GPTConfig:
    """The model of a depth: width = depth * aspect ratio raised to whole heads (RECIPE 1.1)."""
    width = round_up(depth * args.aspect_ratio, args.head_dim)
    heads = width // args.head_dim
    return GPTConfig(
        n_layer=depth,
        n_embd=width,
        n_head=heads,
        n_kv_head=heads,
        head_dim=args.head_dim,
        vocab_size=vocab_size,
        sequence_len=args.max_seq_len,
        window_pattern=args.window_pattern,
        recipe=args.recipe,
        attention_kind=args.attention_kind,
        bigram=args.bigram,
    )


def plan(args: TrainArgs, vocab_size: int, world_size: int = 1) -> Plan:
    """Derive everything from the arguments.

    Args:
        args: what was asked.
        vocab_size: entries of the tokenizer.
        world_size: number of ranks.

    Raises:
        UserError: an argument out of range, or a batch that the context or the ranks do not divide.
    """
    _check(args)
    _check_techniques(args)
    recipe = RECIPES[args.recipe]
    model, reference = (model_config(args, vocab_size, depth) for depth in (args.depth, REFERENCE_DEPTH))
    ratio = args.target_param_data_ratio or recipe.target_param_data_ratio
    horizon_tokens = ratio * count_params(model).scaling
    reference_tokens = ratio * count_params(reference).scaling
    batch_tokens = args.total_batch_size or _batch_tokens(recipe, horizon_tokens / reference_tokens)
    rows, micro_rows, notices = _split_batch(args, batch_tokens, world_size)
    flops = flops_per_token(model)
    steps = args.num_iterations or _steps(args, horizon_tokens, batch_tokens, flops)
    matrix = recipe.matrix_group(args.matrix_optimizer)
    weight_decay = matrix.weight_decay if args.weight_decay is None else args.weight_decay
    if recipe.weight_decay_follows == "depth":
        weight_decay *= (REFERENCE_DEPTH / args.depth) ** 2
    else:
        weight_decay *= math.sqrt(batch_tokens / REFERENCE_BATCH_TOKENS) * reference_tokens / horizon_tokens
    return Plan(
        args=args,
        world_size=world_size,
        model=model,
        params=count_params(model),
        flops_per_token=flops,
        batch_tokens=batch_tokens,
        batch_rows=rows,
        device_batch_size=micro_rows,
        grad_accum_steps=rows // (micro_rows * world_size),
        lanes=math.gcd(rows, MAX_LANES),
        steps=steps,
        groups=_groups(args, recipe, model.n_embd, batch_tokens, weight_decay),
        schedule=_schedule(args, recipe, steps, weight_decay),
        notices=notices,
    )


def with_micro_batch(p: Plan, rows: int) -> Plan:
    """The same plan in micro-batches of `rows` rows, a divisor of a rank's; the global batch stays."""
    return dataclasses.replace(
        p, device_batch_size=rows, grad_accum_steps=p.batch_rows // (rows * p.world_size)
    )


def _check(args: TrainArgs) -> None:
    """Refuse arguments that no model can have."""
    positive = ("depth", "max_seq_len", "aspect_ratio", "head_dim", "num_iterations", "total_batch_size")
    for name in (
        *positive,
        "device_batch_size",
        "target_param_data_ratio",
        "target_flops",
        "keep_last",
        "soap_every",
    ):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')}={value}: expected a number above 0.")
    if args.head_dim % 2:
        raise UserError(
            f"--head-dim={args.head_dim}: expected an even number: rotary embeddings pair halves."
        )
    if args.attention_kind not in ATTENTION_KINDS:
        raise UserError(
            f"--attention-kind={args.attention_kind}: expected one of {', '.join(ATTENTION_KINDS)}."
        )
    if args.attention_kind == "diff1" and args.head_dim % 4:
        raise UserError(
            f"--head-dim={args.head_dim}: --attention-kind=diff1 halves a head, and rotary embeddings each "
            "half: expected a multiple of 4."
        )
    if not args.window_pattern or set(args.window_pattern) - {"S", "L"}:
        raise UserError(f"--window-pattern={args.window_pattern!r}: expected letters S and L, such as SSSL.")
    if args.warmdown_ratio is not None and not 0 <= args.warmdown_ratio <= 1:
        raise UserError(f"--warmdown-ratio={args.warmdown_ratio}: expected a share between 0 and 1.")
    cadences = ("eval_every", "sample_every", "save_every", "save_minutes", "keep_every", "check_ranks_every")
    for name in (*cadences, "core_metric_every", "warmup_steps", "seed"):
        if (value := getattr(args, name)) is not None and value < 0:
            raise UserError(f"--{name.replace('_', '-')}={value}: expected 0 or more.")


def _check_techniques(args: TrainArgs) -> None:
    """Refuse what the optional techniques cannot do."""
    if args.two_timescale and args.matrix_optimizer != "muon":
        raise UserError(
            f"--two-timescale with --matrix-optimizer={args.matrix_optimizer}: it is Muon's. Leave one out."
        )
    if not 0 <= args.tail_average <= 1:
        raise UserError(f"--tail-average={args.tail_average}: expected a share between 0 and 1.")
    if not 0 <= args.z_loss < math.inf:
        raise UserError(f"--z-loss={args.z_loss}: expected 0 or more, such as 1e-4.")


def _batch_tokens(recipe: Recipe, horizon_share: float) -> int:
    """Tokens of a batch: 2^19 (D / D_ref)^0.383, at the nearest power of two (RECIPE 2.2)."""
    return int(2 ** round(math.log2(REFERENCE_BATCH_TOKENS * horizon_share**recipe.batch_exponent)))


def _steps(args: TrainArgs, horizon_tokens: float, batch_tokens: int, flops: float) -> int:
    """Steps of the run: from the FLOPs asked for, else from the ratio of tokens to parameters."""
    if args.target_flops is not None:
        return max(1, round(args.target_flops / (flops * batch_tokens)))
    return max(1, int(horizon_tokens / batch_tokens))


def _split_batch(args: TrainArgs, batch_tokens: int, world_size: int) -> tuple[int, int, tuple[str, ...]]:
    """Rows of the global batch, rows of a micro-batch, and what had to be adjusted."""
    context = args.max_seq_len
    if batch_tokens % (context * world_size):
        raise UserError(
            f"--total-batch-size={batch_tokens}: expected a multiple of {context * world_size} tokens "
            f"({world_size} ranks of rows of --max-seq-len={context})."
        )
    rows = batch_tokens // context
    rows_per_rank = rows // world_size
    default = (32 if args.depth < 20 else 16 if args.depth < 28 else 8) * MICRO_BATCH_CONTEXT // context
    asked = args.device_batch_size or max(1, default)
    micro_rows = next(n for n in range(min(asked, rows_per_rank), 0, -1) if rows_per_rank % n == 0)
    if args.device_batch_size is None or micro_rows == asked:
        return rows, micro_rows, ()
    notice = (
        f"--device-batch-size={asked} does not divide the {rows_per_rank} rows of a rank: using {micro_rows}."
    )
    return rows, micro_rows, (notice,)


def _groups(
    args: TrainArgs, recipe: Recipe, width: int, batch_tokens: int, matrix_weight_decay: float
) -> dict[str, GroupPlan]:
    """Learning rates of every kind of parameter: base x width rule x batch rule (RECIPE 1.3, 2.2)."""
    asked = {"matrix": args.matrix_lr, "embedding": args.embedding_lr, "unembedding": args.unembedding_lr}

    def group(kind: str, base: GroupRecipe, optimizer: str = "adamw") -> GroupPlan:
        given = asked.get(kind)
        lr = base.lr if given is None else given
        lr *= (width / REFERENCE_WIDTH) ** -0.5 if base.scales_with_width else 1.0
        lr *= (batch_tokens / REFERENCE_BATCH_TOKENS) ** 0.5 if base.scales_with_batch else 1.0
        decay = matrix_weight_decay if kind == "matrix" else base.weight_decay
        return GroupPlan(optimizer, lr, base.beta1, base.beta2, ADAM_EPS, decay)

    groups = {
        "matrix": group("matrix", recipe.matrix_group(args.matrix_optimizer), args.matrix_optimizer),
        "embedding": group("embedding", recipe.embedding),
        "value_embedding": group("value_embedding", recipe.value_embedding),
        "unembedding": group("unembedding", recipe.unembedding),
        "resid": group("resid", recipe.resid),
        "x0": group("x0", recipe.x0),
        "smear": group("smear", recipe.smear),
    }
    return groups | ({"share": group("share", recipe.share)} if args.attention_kind == "diff1" else {})


def _schedule(args: TrainArgs, recipe: Recipe, steps: int, matrix_weight_decay: float) -> Schedule:
    """The recipe's schedule, with what the arguments override."""

    def given(value: Any, default: Any) -> Any:
        return default if value is None else value

    return Schedule(
        steps=steps,
        warmup_steps=given(args.warmup_steps, recipe.warmup_steps),
        warmdown_steps=round(given(args.warmdown_ratio, recipe.warmdown_ratio) * steps),
        final_lr_frac=given(args.final_lr_frac, recipe.final_lr_frac),
        momentum_start=recipe.momentum_start,
        momentum_peak=recipe.momentum_peak,
        momentum_warmup_steps=recipe.momentum_warmup_steps,
        momentum_final=recipe.momentum_final,
        matrix_weight_decay=matrix_weight_decay,
        weight_decay_shape=recipe.weight_decay_shape,
    )


def describe(p: Plan) -> list[str]:
    """The plan in a few lines, for the console."""
    m = p.model
    return [
        f"model: depth {m.n_layer}, width {m.n_embd}, {m.n_head} heads of {m.head_dim} ({m.attention_kind}), "
        f"context {m.sequence_len}, vocabulary {m.vocab_size:,}; {p.params.total / 1e6:,.1f} M parameters, "
        f"{p.params.scaling / 1e6:,.1f} M of them scaling",
        f"batch: {p.batch_tokens:,} tokens = {p.device_batch_size} rows x {m.sequence_len} tokens x "
        f"{p.grad_accum_steps} micro-batches x {p.world_size} ranks, {p.lanes} lanes",
        f"horizon: {p.steps:,} steps, {p.tokens:,} tokens ({p.tokens / p.params.scaling:.1f} a scaling "
        f"parameter), {p.tokens * p.flops_per_token:.2e} FLOPs",
        "learning rates: "
        + ", ".join(f"{kind} {group.lr:.4g}" for kind, group in p.groups.items())
        + f"; weight decay of the matrices {p.schedule.matrix_weight_decay:.4g}",
    ]
