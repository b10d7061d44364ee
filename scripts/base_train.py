"""Train a model: `torchrun --nproc_per_node=8 scripts/base_train.py --depth=12`, or alone with python."""

from __future__ import annotations

import json
import sys

from nanochat import backends, config, errors, files, scaling, small_text, train, world
from nanochat.attention_times import AttentionShape
from nanochat.config import TrainArgs
from nanochat.dataset import Corpus
from nanochat.report import write_report
from nanochat.stopping import STOPPED
from nanochat.tokenizer import Tokenizer


@errors.cli
def main() -> None:
    """Parse, plan, train."""
    args = config.parse(TrainArgs)
    with world.join(args.device_type, args.dist_timeout) as ranks:
        tokenizer = Tokenizer.load(files.tokenizer_dir(args.tokenizer_name))
        corpus = small_text.planned_corpus(args.corpus) if args.dry_run else Corpus.open(args.corpus)
        plan = small_text.plan_for(args, corpus, tokenizer, ranks.size)
        if corpus is None or args.dry_run:
            ranks.print0(json.dumps(plan.to_dict(), indent=2))
            return
        shape = AttentionShape.of(plan.model, plan.model.document_mask)
        precision, reason = backends.choose_precision(
            ranks.device, args.dtype, args.attention, args.fp8, shape, ranks
        )
        for line in (reason, *scaling.describe(plan), *plan.notices):
            ranks.print0(line)
        summary = train.run(plan, corpus, tokenizer, precision, ranks)
        if ranks.is_main:
            status = summary["status"].replace("_", " ")
            print(f"{status} after {summary['steps']} steps, validation bpb {summary['val_bpb']}")
            print(f"report: {write_report(args.run_name)}")
    if summary["status"] == "stopped":
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
