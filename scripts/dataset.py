"""Make, verify or list corpora: `python -m scripts.dataset --corpus stdlib`."""

from __future__ import annotations

from nanochat.common import errors, files
from nanochat.config import arguments
from nanochat.data.corpus import Corpus, all_of, prepare, summary, verify_all


@errors.cli
def main() -> None:
    """Make, verify or list corpora."""
    args = arguments.parse(arguments.DatasetArgs)
    if args.list:
        for corpus in all_of(Corpus):
            print(summary(corpus))
    elif args.verify:
        verify_all(Corpus.read_manifest(files.data_dir(args.name or args.corpus)))
    else:
        corpus = prepare(
            args.corpus,
            num_shards=args.num_shards,
            first=args.first,
            named_files=args.files,
            val_file=args.val_file,
            name=args.name,
        )
        print(summary(corpus))
        if args.files and not args.val_file:
            print("No --val-file was named: the end of the text is validation.")


if __name__ == "__main__":
    main()
