"""Measure how a tokenizer compresses: `python -m scripts.tok_eval --tokenizer stdlib --peers-dir FOLDER`."""

from __future__ import annotations

from pathlib import Path

from nanochat.common import errors, files
from nanochat.config import arguments
from nanochat.config.arguments import TokEvalArgs
from nanochat.data.corpus import Corpus
from nanochat.data.tokenizer_texts import validation_text
from nanochat.tokenizer import compression
from nanochat.tokenizer.tokenizer import Tokenizer

SAMPLES = Path(__file__).resolve().parent.parent / "dev" / "samples"


@errors.cli
def main() -> None:
    """Read the texts, encode them with every vocabulary, print and write what came of it."""
    args = arguments.parse(TokEvalArgs)
    folder = files.tokenizer_dir(args.tokenizer)
    peers = Path(args.peers_dir) if args.peers_dir else None
    tokenizers = compression.vocabularies(Tokenizer.load(folder), peers)
    texts = compression.samples(Path(args.samples) if args.samples else SAMPLES)
    if args.corpus:
        texts = {args.corpus: validation_text(Corpus.open(args.corpus), compression.MAX_CHARS), **texts}
    rows = compression.measure(texts, tokenizers)
    print(compression.table(rows, tokenizers))
    for path in compression.write(folder, rows, tokenizers):
        print(path)


if __name__ == "__main__":
    main()
