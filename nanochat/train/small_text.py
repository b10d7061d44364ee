"""Settings for the size of a text: context, batch, horizon and remainders. Those of the command line stay.

The recipe's numbers are for billions of tokens. On a megabyte they give rows longer than the documents, and
batches of which one is most of the text. Corpora of the hub and shards of tokens are never small: they keep
the recipe's numbers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from nanochat.checkpoint import format as checkpoint_format
from nanochat.common import files
from nanochat.common.errors import UserError
from nanochat.config import arguments
from nanochat.config import plan as planning
from nanochat.config.arguments import TrainArgs
from nanochat.config.plan import DEFAULT_CONTEXT, Plan
from nanochat.config.recipes import RECIPES
from nanochat.data.corpus import Corpus
from nanochat.data.text_size import TextSize, epochs_for, is_measured, measure
from nanochat.tokenizer.tokenizer import Tokenizer

MIN_CONTEXT = 64
CONTEXT_ROWS = 1_000  # rows that an epoch has at least, so that a batch of some is not the whole text
MAX_EPOCHS = 10  # four are nearly as good as new text, sixteen are worth little more (arXiv 2305.16264)
MIN_STEPS = 400  # of a whole run: warmup, momentum and decay need hundreds of steps to mean anything
MIN_ROWS = 8  # of a batch
MOST_CROPPED = 2 / 3  # fraction of the tokens that no row would hold, from which on remainders are kept

# Arguments that a resumed run keeps from its beginning, where the command does not give them again.
DECIDED = ("max_seq_len", "total_batch_size", "keep_tails", "target_param_data_ratio")


def _power_below(value: float) -> int:
    """The largest power of two that is not above a value; 1 for values below 1."""
    return 1 << int(math.log2(max(1.0, value)))


def fit(args: TrainArgs, vocab_size: int, text: TextSize) -> tuple[TrainArgs, tuple[str, ...]]:
    """Give values that suit the text to what the arguments leave open. Pure.

    A text that is large enough for the recipe's numbers gets the recipe's numbers.

    Returns:
        The arguments, and a line for each decision that differs from the recipe.
    """
    recipe = RECIPES[args.recipe]
    changes: dict[str, Any] = {}
    told: list[str] = []
    fitting = min(DEFAULT_CONTEXT, max(MIN_CONTEXT, _power_below(text.tokens / CONTEXT_ROWS)))
    context = args.max_seq_len or fitting
    if args.max_seq_len is None and context < DEFAULT_CONTEXT:
        changes["max_seq_len"] = context
        told.append(f"context {context}, so that there are rows to choose from (--max-seq-len)")
    of_recipe = dataclasses.replace(args, max_seq_len=None, total_batch_size=None, device_batch_size=None)
    usual = planning.plan(of_recipe, vocab_size)
    ratio = args.target_param_data_ratio or recipe.target_param_data_ratio
    wanted = ratio * usual.params.scaling
    limit = min(wanted, MAX_EPOCHS * text.tokens)
    given = (args.num_iterations, args.target_flops, args.target_param_data_ratio)
    if limit < wanted and given == (None, None, None):
        changes["target_param_data_ratio"] = limit / usual.params.scaling
        told.append(
            f"{MAX_EPOCHS} epochs at most, since more teach it by heart, instead of the "
            f"{wanted / text.tokens:,.0f} of the recipe (--num-iterations)"
        )
    is_small = limit < wanted or text.tokens < CONTEXT_ROWS * DEFAULT_CONTEXT
    if is_small and args.total_batch_size is None and recipe.batch_tokens is None:
        batch = max(MIN_ROWS, _power_below(limit / MIN_STEPS / context)) * context
        if batch < usual.batch_tokens:
            changes["total_batch_size"] = batch
            told.append(f"batches of {batch:,} tokens, so that there are enough steps (--total-batch-size)")
    cropped = text.cropped_fraction(context)
    if args.keep_tails is None and (cropped > MOST_CROPPED or "max_seq_len" in changes):
        changes["keep_tails"] = True
        told.append(f"remainders of long documents are kept: {cropped:.0%} would be lost (--no-keep-tails)")
    return dataclasses.replace(args, **changes), tuple(told)


def as_begun(args: TrainArgs) -> TrainArgs:
    """The arguments of a run that has checkpoints; those that are not given now are as at its beginning.

    Another version of this program, or another size of the text, may decide otherwise today: the run goes on
    as it began.
    """
    path = files.run_dir(args.run_name) / "config.json"
    try:
        then = files.read_json(path, dict[str, Any]).get("args")
    except UserError:
        then = None
    if not isinstance(then, dict):
        return args  # what the checkpoint holds is compared in any case
    kept = {name: then[name] for name in DECIDED if getattr(args, name) is None and then.get(name)}
    if (args.num_iterations, args.target_flops) != (None, None):
        kept.pop("target_param_data_ratio", None)
    return arguments.from_dict(TrainArgs, dataclasses.asdict(args) | kept, path)


def plan_for(args: TrainArgs, corpus: Corpus | None, tokenizer: Tokenizer, world_size: int) -> Plan:
    """The plan of a run on a corpus: what is not given suits its text, and notices say what and why.

    Args:
        args: what was asked.
        corpus: the text; None where there is none yet, and the recipe's numbers hold.
        tokenizer: its tokenizer.
        world_size: number of ranks.

    Raises:
        UserError: as `config.plan.plan`; a shard is absent or damaged; or the text fills no row.
    """
    arguments.require_possible(args)
    text = measure(corpus, tokenizer) if corpus is not None and is_measured(corpus) else None
    told: tuple[str, ...] = ()
    if checkpoint_format.steps_of(args.run_name):
        args = as_begun(args)
    elif text is not None:
        args, told = fit(args, tokenizer.vocab_size, text)
    plan = planning.plan(args, tokenizer.vocab_size, world_size)
    if text is not None:
        text.require_rows(plan)
        told = (text.describe(plan), *told)
    elif corpus is not None and not args.dry_run and (n := epochs_for(corpus, tokenizer, plan.tokens)) > 1:
        told = (f"the corpus is smaller than the horizon: it will be read about {n:.1f} times", *told)
    return dataclasses.replace(plan, notices=(*told, *plan.notices))
