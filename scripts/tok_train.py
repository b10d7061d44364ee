"""Train a tokenizer on a corpus: `python -m scripts.tok_train --corpus stdlib --vocab-size 8192`."""

from __future__ import annotations

from nanochat.common import errors, files
from nanochat.common.errors import UserError
from nanochat.config import arguments
from nanochat.config.arguments import TokTrainArgs
from nanochat.data import tokenizer_texts
from nanochat.data.corpus import Corpus
from nanochat.tokenizer.tokenizer import Tokenizer


@errors.cli
def main() -> None:
    """Read the corpus, train, save, say how well it compresses."""
    args = arguments.parse(TokTrainArgs)
    folder = files.tokenizer_dir(args.name or args.corpus)
    if (folder / "tokenizer.json").exists() and not args.overwrite:
        tokenizer = Tokenizer.load(folder)
        if args.vocab_size not in (None, tokenizer.vocab_size, tokenizer.trained_on.get("asked_vocab_size")):
            raise UserError(
                f"{folder} holds {tokenizer.vocab_size} entries, and --vocab-size={args.vocab_size}. "
                "Name another with --name, or train it again with --overwrite."
            )
        print(f"{folder} is there already: {tokenizer.vocab_size} entries. Train it again with --overwrite.")
        return
    corpus = Corpus.open(args.corpus)
    files.require_writable(folder)
    tokenizer = tokenizer_texts.train(corpus, args)
    tokenizer.save(folder)
    print(folder)
    sample = corpus.read_block(corpus.val_shards[0], 0)
    ids, _ = tokenizer.encode_batch(sample)
    n_bytes = sum(len(text.encode("utf-8")) for text in sample)
    print(f"validation text: {n_bytes / len(ids):.3f} bytes a token")


if __name__ == "__main__":
    main()
