"""Train a model: `torchrun --nproc_per_node=8 scripts/base_train.py --depth=12`, or alone with python.

What is imported here loads no libraries: signals are heard before those are loaded, which takes seconds.
"""

from __future__ import annotations

import json

from nanochat.common import errors
from nanochat.common.stop_signals import heeding_signals


@errors.cli
def main() -> None:
    """Listen, train, and leave with the exit code that says how the run has ended."""
    heeding_signals(train_as_asked)


def train_as_asked() -> str:
    """Parse, plan, train, report; the status of the run."""
    from nanochat.common import files
    from nanochat.config import arguments
    from nanochat.config.arguments import TrainArgs
    from nanochat.data.corpus import MANIFEST, Corpus
    from nanochat.distributed import world
    from nanochat.model import attention_backends
    from nanochat.tokenizer.tokenizer import Tokenizer
    from nanochat.train import run as train_run
    from nanochat.train import small_text
    from nanochat.train.stage import Pretraining

    args = arguments.parse(TrainArgs)
    with world.join(args.device_type, args.dist_timeout) as ranks:
        tokenizer = Tokenizer.load(files.tokenizer_dir(args.tokenizer_name))
        if args.dry_run:  # the manifest says enough, and without one the recipe's numbers are shown
            folder = files.data_dir(args.corpus)
            corpus = Corpus.read_manifest(folder) if (folder / MANIFEST).is_file() else None
        else:
            corpus = Corpus.open(args.corpus)
        plan = small_text.plan_for(args, corpus, tokenizer, ranks.size)
        if corpus is None or args.dry_run:
            ranks.print0(json.dumps(plan.to_dict(), indent=2))
            return "planned"
        precision = train_run.announce(plan, ranks)
        if hint := attention_backends.window_hint(plan.model, precision.attention, ranks.device):
            ranks.print0(hint)
        summary = train_run.run(plan, Pretraining(corpus, tokenizer), precision, ranks)
        return train_run.conclude(summary, ranks)


if __name__ == "__main__":
    main()
