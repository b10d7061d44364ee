"""Measure how a tokenizer compresses: `python -m scripts.tok_eval --tokenizer stdlib --peers-dir FOLDER`."""

from __future__ import annotations

from pathlib import Path

from nanochat.common import errors, files
from nanochat.config import arguments as config
from nanochat.config.arguments import TokEvalArgs
from nanochat.data.corpus import Corpus
from nanochat.data.tokenizer_texts import validation_text
from nanochat.tokenizer import compression as tok_eval
from nanochat.tokenizer.tokenizer import Tokenizer

SAMPLES = Path(__file__).resolve().parent.parent / "dev" / "samples"


@errors.cli
def main() -> None:
    """Read the texts, encode them with every vocabulary, print and write what came of it."""
    args = config.parse(TokEvalArgs)
    folder = files.tokenizer_dir(args.tokenizer)
    peers = Path(args.peers_dir) if args.peers_dir else None
    tokenizers = tok_eval.vocabularies(Tokenizer.load(folder), peers)
    texts = tok_eval.samples(Path(args.samples) if args.samples else SAMPLES)
    if args.corpus:
        texts = {args.corpus: validation_text(Corpus.open(args.corpus), tok_eval.MAX_CHARS), **texts}
    rows = tok_eval.measure(texts, tokenizers)
    print(tok_eval.table(rows, tokenizers))
    for path in tok_eval.write(folder, rows, tokenizers):
        print(path)


if __name__ == "__main__":
    main()
