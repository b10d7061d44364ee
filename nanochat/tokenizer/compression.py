"""Compression of a vocabulary: bytes of text per token, beside other vocabularies.

A model of a given size reads more text where its tokens are longer, so the figure is worth comparing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import charts, files
from nanochat.common.errors import UserError
from nanochat.tokenizer.tokenizer import GPT2_PATTERN, Tokenizer

# File of ranks and pattern of each, as OpenAI publishes them.
PEERS = {
    "GPT-2": ("r50k_base.tiktoken", GPT2_PATTERN),
    "cl100k": (
        "cl100k_base.tiktoken",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
        r"|\s*[\r\n]|\s+(?!\S)|\s",
    ),
}
MAX_CHARS = 4_000_000  # of a text: more would not change the digits shown


@dataclass(frozen=True)
class Row:
    """One text: its name, its size in bytes, and the bytes per token of each vocabulary."""

    text: str
    bytes: int
    bytes_per_token: Mapping[str, float]


def vocabularies(tokenizer: Tokenizer, peers_dir: Path | None) -> dict[str, Tokenizer]:
    """Ours and, with a folder of their ranks, GPT-2's and cl100k's.

    Raises:
        UserError: a file of ranks is absent or damaged.
    """
    tokenizers = {"ours": tokenizer}
    if peers_dir is not None:
        for name, (file, pattern) in PEERS.items():
            tokenizers[name] = Tokenizer.from_ranks_file(peers_dir / file, pattern)
    return tokenizers


def samples(folder: Path) -> dict[str, str]:
    """The .txt files of a folder by their names, and the code of this library.

    Raises:
        UserError: no such file, or one that is not UTF-8.
    """
    code = sorted(Path(__file__).parents[1].rglob("*.py"))
    texts = {"code": "".join(path.read_text("utf-8") for path in code)}
    for path in sorted(folder.glob("*.txt")):
        try:
            texts[path.stem] = path.read_text("utf-8")[:MAX_CHARS]
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error}). Convert it, or take it out.") from None
    if len(texts) == 1:
        raise UserError(f"{folder}: no .txt file there. Name a folder of texts with --samples.")
    return texts


def measure(texts: Mapping[str, str], tokenizers: Mapping[str, Tokenizer]) -> list[Row]:
    """Bytes per token of every text in every vocabulary; empty texts are left out."""
    rows = []
    for name, text in texts.items():
        size = len(text.encode("utf-8"))
        if size:
            ratios = {who: size / len(tokenizer.encode(text)) for who, tokenizer in tokenizers.items()}
            rows.append(Row(name, size, ratios))
    return rows


def table(rows: Sequence[Row], tokenizers: Mapping[str, Tokenizer]) -> str:
    """Bytes per token as text: a line a text, a column a vocabulary."""
    names = list(tokenizers)
    lines = [
        f"{'bytes per token':20}{'bytes':>10}" + "".join(f"{name:>10}" for name in names),
        f"{'entries':20}{'':10}" + "".join(f"{tokenizers[name].vocab_size:10,}" for name in names),
    ]
    for row in rows:
        ratios = "".join(f"{row.bytes_per_token[name]:10.3f}" for name in names)
        lines.append(f"{row.text:20}{row.bytes:10,}{ratios}")
    return "\n".join(lines)


def write(folder: Path, rows: Sequence[Row], tokenizers: Mapping[str, Tokenizer]) -> list[Path]:
    """Write tok_eval.json and, where matplotlib is installed, tok_eval.svg into a tokenizer's folder."""
    document = {
        "vocab_size": {name: tokenizer.vocab_size for name, tokenizer in tokenizers.items()},
        "texts": [dataclasses.asdict(row) for row in rows],
    }
    written = [folder / "tok_eval.json"]
    files.write_json(written[0], document)
    if charts.available():
        bars = [(f"{row.text}, {name}", ratio) for row in rows for name, ratio in row.bytes_per_token.items()]
        labels, values = zip(*bars, strict=True)
        svg = charts.bar_chart("tok_eval", labels, values, [0.0] * len(bars), "bytes per token")
        written.append(folder / "tok_eval.svg")
        files.atomic_write(written[1], svg)
    return written
