"""Plan of a run: shape, batch, horizon, learning rates and weight decay, all derived from depth.

Pure (no torch, clock or machine), so that the same arguments give the same plan and --dry-run prints it.
Formulas: docs/recipe.md (RECIPE 1.1, 1.5, 2.2).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from nanochat.common.errors import UserError
from nanochat.config.arguments import TrainArgs, require_possible
from nanochat.config.model_config import (
    ATTENTION_KINDS,
    MODEL_FLAGS,
    GPTConfig,
    ParamCounts,
    count_params,
    flops_per_token,
    round_up,
)
from nanochat.config.recipes import (
    RECIPES,
    REFERENCE_BATCH_TOKENS,
    REFERENCE_DEPTH,
    REFERENCE_WIDTH,
    GroupRecipe,
    Recipe,
)
from nanochat.config.schedule import Schedule, batch_units, units_until, window_share

DEFAULT_CONTEXT = 2048
MAX_LANES = 16  # each opens with a block of about a million tokens: start-up time and memory
MICRO_BATCH_CONTEXT = 2048  # context for which RECIPE 1.5 gives rows of a micro-batch
ADAM_EPS = 1e-10
ADAMW_GROUPS = ("embedding", "value_embedding", "unembedding", "resid", "x0", "smear", "share")


@dataclass(frozen=True)
class GroupPlan:
    """How one kind of parameter is updated; learning rates are final but for the schedule."""

    optimizer: str  # "muon", "soap" or "adamw"
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def _not_compared() -> Any:
    """A field of Plan that a resumed run may change, or that follows from those that it may not."""
    return field(metadata={"resume": "free"})


@dataclass(frozen=True)
class Finetune:
    """What a run of SFT or RL begins with and learns from.

    Attributes:
        stage: "sft" or "rl".
        base: name of the run whose weights and moments it begins with.
        base_step: the step of its checkpoint.
        base_sha256: hex digest of the manifest of that checkpoint.
        settings: the flags of the stage that decide what is learned, by name.
    """

    stage: str
    base: str
    base_step: int
    base_sha256: str
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything derived from the arguments. config.json holds it whole.

    A resumed run has to have the plan that it began with, but for the fields made by `_not_compared`.

    Attributes:
        args: what was asked.
        world_size: ranks it is for.
        model: shape of the model.
        params: parameters by kind.
        flops_per_token: training FLOPs of a token, at the windows that the run ends with.
        batch_tokens: tokens of a global batch; of the largest where the batch grows.
        batch_rows: rows of a global batch, or of the unit of which batches that grow are multiples.
        device_batch_size: rows of a micro-batch of one rank.
        grad_accum_steps: micro-batches of one rank a step; in the largest batch where it grows.
        lanes: independent streams of data.
        steps: optimizer steps.
        groups: how each kind of parameter is updated.
        polar_norm_factor: Muon's safety factor on the norm before Polar Express.
        schedule: shape of the run over its steps.
        finetune: what SFT or RL begins with; None for pretraining.
        notices: what was adjusted, for the console.
    """

    args: TrainArgs
    world_size: int = _not_compared()
    model: GPTConfig
    params: ParamCounts = _not_compared()
    flops_per_token: float = _not_compared()
    batch_tokens: int
    batch_rows: int
    device_batch_size: int = _not_compared()
    grad_accum_steps: int = _not_compared()
    lanes: int
    steps: int
    groups: dict[str, GroupPlan]
    polar_norm_factor: float
    schedule: Schedule
    finetune: Finetune | None = None
    notices: tuple[str, ...] = _not_compared()

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.tokens_until(self.steps)

    def units_at(self, step: int) -> int:
        """How many times `batch_rows` rows make the batch of a step."""
        return batch_units(step, self.schedule)

    def tokens_at(self, step: int) -> int:
        """Tokens of the batch of a step."""
        return self.units_at(step) * self.batch_rows * self.model.sequence_len

    def tokens_until(self, step: int) -> int:
        """Tokens of all steps before a step."""
        return units_until(step, self.schedule) * self.batch_rows * self.model.sequence_len

    def windows_at(self, step: int) -> tuple[int, ...]:
        """The attention window of each layer at a step."""
        return self.model.windows_at(window_share(step, self.schedule))

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON holds it, totals included."""
        derived = {"tokens": self.tokens, "total_flops": self.tokens * self.flops_per_token}
        return {**dataclasses.asdict(self), **derived}


def model_config(args: TrainArgs, vocab_size: int, depth: int) -> GPTConfig:
    """The model of a depth: width = depth * aspect ratio raised to whole heads (RECIPE 1.1)."""
    width = round_up(depth * args.aspect_ratio, args.head_dim)
    heads, recipe = width // args.head_dim, RECIPES[args.recipe]
    flags = {name: getattr(args, name) for name in MODEL_FLAGS}
    return GPTConfig(
        n_layer=depth,
        n_embd=width,
        n_head=heads,
        n_kv_head=heads,
        head_dim=args.head_dim,
        vocab_size=vocab_size,
        sequence_len=args.max_seq_len or DEFAULT_CONTEXT,
        recipe=args.recipe,
        **flags,
        **recipe.model_constants() | {"document_mask": args.document_mask or recipe.document_mask},
    )


def plan(args: TrainArgs, vocab_size: int, world_size: int = 1) -> Plan:
    """Derive everything from the arguments.

    Hyperparameters were tuned at depth 12, the reference; scaling rules carry them over to other depths.

    Args:
        args: the flags.
        vocab_size: entries of the tokenizer.
        world_size: number of ranks.

    Raises:
        UserError: an argument out of range, or a batch that the context or the ranks do not divide.
    """
    require_possible(args)
    context, keep_tails = args.max_seq_len or DEFAULT_CONTEXT, bool(args.keep_tails)
    args = dataclasses.replace(args, max_seq_len=context, keep_tails=keep_tails)
    recipe = RECIPES[args.recipe]
    # 1. Horizon: tokens are proportional to parameters, as compute-optimal training has it.
    model, reference = (model_config(args, vocab_size, depth) for depth in (args.depth, REFERENCE_DEPTH))
    ratio = args.target_param_data_ratio or recipe.target_param_data_ratio
    horizon_tokens = ratio * count_params(model).scaling
    reference_tokens = ratio * count_params(reference).scaling
    # 2. Batch: B = B_ref (D / D_ref)^0.383, at the nearest power of two (Power Lines, arXiv 2505.13738).
    batch_tokens = args.total_batch_size or recipe.batch_tokens
    if batch_tokens is None:
        tokens = REFERENCE_BATCH_TOKENS * (horizon_tokens / reference_tokens) ** recipe.batch_exponent
        batch_tokens = int(2 ** round(math.log2(tokens)))
    rows, micro_rows, notices = _split_batch(args, recipe, batch_tokens, context, world_size)
    # 3. Steps: from the flag, else from the FLOPs or the horizon and the mean batch.
    flops = flops_per_token(model)
    steps = args.num_iterations or _steps(args, horizon_tokens, batch_tokens * _mean_batch(recipe), flops)
    # 4. Learning rates (_groups): lr ~ sqrt(B); of embeddings and head also ~ 1 / sqrt(width).
    # 5. Weight decay: w ~ sqrt(B) / D keeps the time scale of the weights constant (arXiv 2405.13698). That
    #    paper studies AdamW, not Muon: that the rule carries over is an assumption.
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
        grad_accum_steps=batch_tokens // (context * micro_rows * world_size),
        lanes=math.gcd(rows, MAX_LANES),
        steps=steps,
        groups=_groups(args, recipe, model.n_embd, batch_tokens, weight_decay),
        polar_norm_factor=recipe.polar_norm_factor,
        schedule=_schedule(args, recipe, steps, weight_decay),
        notices=notices,
    )


def with_micro_batch(p: Plan, rows: int) -> Plan:
    """The same plan in micro-batches of `rows` rows, a divisor of a rank's; the global batch stays."""
    micro_tokens = rows * p.model.sequence_len * p.world_size
    return dataclasses.replace(p, device_batch_size=rows, grad_accum_steps=p.batch_tokens // micro_tokens)


def with_precision(p: Plan, dtype: str, fp8: bool) -> Plan:
    """The same plan with the dtype that "auto" has become here: it decides the weights."""
    return dataclasses.replace(p, args=dataclasses.replace(p.args, dtype=dtype, fp8=fp8))


def _mean_batch(recipe: Recipe) -> float:
    """Mean batch of a run as a fraction of its largest batch."""
    stages = recipe.batch_stages
    if not stages:
        return 1.0
    ends = [*(first for first, _ in stages[1:]), 1.0]
    units = sum(units * (end - first) for (first, units), end in zip(stages, ends, strict=True))
    return units / max(units for _, units in stages)


def _steps(args: TrainArgs, horizon_tokens: float, batch_tokens: float, flops: float) -> int:
    """Steps of the run: from the FLOPs asked for, else from the ratio of tokens to parameters."""
    if args.target_flops is not None:
        return max(1, round(args.target_flops / (flops * batch_tokens)))
    return max(1, int(horizon_tokens / batch_tokens))


def _split_batch(
    args: TrainArgs, recipe: Recipe, batch_tokens: int, context: int, world_size: int
) -> tuple[int, int, tuple[str, ...]]:
    """Rows of the global batch or of its unit, rows of a micro-batch, and what had to be adjusted."""
    parts = max((units for _, units in recipe.batch_stages), default=1)
    whole = context * world_size * parts
    if batch_tokens % whole:
        grows = f", {parts} times, since the batch grows with --recipe={args.recipe}" if parts > 1 else ""
        raise UserError(
            f"--total-batch-size={batch_tokens}: expected a multiple of {whole} tokens "
            f"({world_size} ranks of rows of --max-seq-len={context}{grows})."
        )
    rows = batch_tokens // (context * parts)
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
    """Learning rates of every kind of parameter: base x width rule x batch rule (RECIPE 1.3, 2.2).

    One flag moves the rates of both kinds of embedding, and one those of both kinds of residual scalar, which
    keep the ratio that the recipe has: as in karpathy/nanochat.
    """
    asked = {"matrix": args.matrix_lr, "embedding": args.embedding_lr, "unembedding": args.unembedding_lr}
    if args.embedding_lr is not None:
        asked["value_embedding"] = args.embedding_lr * (recipe.value_embedding.lr / recipe.embedding.lr)
    if args.scalar_lr is not None:
        asked |= {"x0": args.scalar_lr, "resid": args.scalar_lr * (recipe.resid.lr / recipe.x0.lr)}

    def group(kind: str, base: GroupRecipe, optimizer: str = "adamw") -> GroupPlan:
        given = asked.get(kind)
        lr = base.lr if given is None else given
        lr *= (width / REFERENCE_WIDTH) ** -0.5 if base.scales_with_width else 1.0
        lr *= (batch_tokens / REFERENCE_BATCH_TOKENS) ** 0.5 if base.scales_with_batch else 1.0
        decay = matrix_weight_decay if kind == "matrix" else base.weight_decay
        return GroupPlan(optimizer, lr, base.beta1, base.beta2, ADAM_EPS, decay)

    matrix = group("matrix", recipe.matrix_group(args.matrix_optimizer), args.matrix_optimizer)
    kinds = ADAMW_GROUPS if ATTENTION_KINDS[args.attention_kind].vectors else ADAMW_GROUPS[:-1]
    return {"matrix": matrix} | {kind: group(kind, getattr(recipe, kind)) for kind in kinds}


def _schedule(args: TrainArgs, recipe: Recipe, steps: int, matrix_weight_decay: float) -> Schedule:
    """The recipe's schedule, with what the arguments override."""

    def given(value: Any, default: Any) -> Any:
        return default if value is None else value

    return Schedule(
        steps=steps,
        warmup_steps=given(args.warmup_steps, min(recipe.warmup_steps, int(recipe.warmup_share * steps))),
        warmdown_steps=round(given(args.warmdown_ratio, recipe.warmdown_ratio) * steps),
        final_lr_frac=given(args.final_lr_frac, recipe.final_lr_frac),
        momentum_start=recipe.momentum_start,
        momentum_peak=recipe.momentum_peak,
        momentum_warmup_steps=recipe.momentum_warmup_steps,
        momentum_final=recipe.momentum_final,
        matrix_weight_decay=matrix_weight_decay,
        weight_decay_shape=recipe.weight_decay_shape,
        batch_stages=tuple((round(at * steps), units) for at, units in recipe.batch_stages),
        window_stages=tuple((round(at * steps), share) for at, share in recipe.window_stages),
    )


def describe(p: Plan) -> list[str]:
    """The plan in a few lines, for the console."""
    m, s = p.model, p.schedule
    grows = [f"{p.tokens_at(first):,} tokens from step {first:,}" for first, _ in s.batch_stages]
    widen = [f"{share:.0%} from step {first:,}" for first, share in s.window_stages]
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
        + f"; weight decay of the matrices {s.matrix_weight_decay:.4g}",
        *([f"the batch grows: {', '.join(grows)}"] if grows else []),
        *([f"attention windows grow: {', '.join(widen)}"] if widen else []),
    ]
