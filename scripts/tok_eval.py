"""Measure how a tokenizer compresses: `python -m scripts.tok_eval --tokenizer stdlib --peers-dir FOLDER`."""

from __future__ import annotations

from pathlib import Path

from nanochat import config, errors, files, tok_eval
from nanochat.config import TokEvalArgs
from nanochat.dataset import Corpus
from nanochat.tokenizer import Tokenizer

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
        texts = {args.corpus: tok_eval.validation_text(Corpus.open(args.corpus)), **texts}
    rows = tok_eval.measure(texts, tokenizers)
    print(tok_eval.table(rows, tokenizers))
    for path in tok_eval.write(folder, rows, tokenizers):
        print(path)


if __name__ == "__main__":
    main()
