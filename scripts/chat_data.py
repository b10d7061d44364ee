"""Make, fetch or list corpora of conversations: `python -m scripts.chat_data --corpus made`."""

from __future__ import annotations

from nanochat.chat.corpus import ChatCorpus, prepare, summary
from nanochat.common import errors
from nanochat.config import arguments
from nanochat.data.corpus import all_of


@errors.cli
def main() -> None:
    """Make, fetch or list corpora of conversations."""
    args = arguments.parse(arguments.ChatDataArgs)
    for corpus in all_of(ChatCorpus) if args.list else [prepare(args)]:
        print(summary(corpus))


if __name__ == "__main__":
    main()
