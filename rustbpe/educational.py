"""Byte-level BPE in plain Python: the rules that the Rust of this folder follows, without its speed.

Read it beside the crate: each function names the file that does the same for gigabytes. The results are equal
(tests/test_educational.py); the crate differs in that it counts on all cores, keeps the places of every pair
instead of counting anew, and remembers pieces that it has encoded. This page is not part of the installed
package, and needs the module `regex`, which knows classes of Unicode and possessive quantifiers.

    pieces = count_pieces(["some text", "more text"], PATTERN)
    merges = train(pieces, 100)
    tokens = tokens_of(merges)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    assert decode(encode("some text", PATTERN, ranks), tokens) == "some text"
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import regex

Pair = tuple[int, int]

# GPT-4's: contractions, words with one character before them, one to three digits, other characters, spaces.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


def split(text: str, pattern: str) -> list[bytes]:
    """The pieces of a text, in UTF-8 (split.rs).

    No token crosses the border of two pieces: "dog." and "dog!" have the token of "dog" in common. What the
    pattern does not match belongs to no piece; the patterns in use match everything.
    """
    return [piece.encode("utf-8") for piece in regex.findall(pattern, text) if piece]


def count_pieces(texts: Iterable[str], pattern: str) -> Counter[bytes]:
    """How often each distinct piece occurs (count.rs).

    Training looks at nothing else, so a corpus of gigabytes is a table of some million pieces, and the order
    of the texts does not matter.
    """
    pieces: Counter[bytes] = Counter()
    for text in texts:
        pieces.update(split(text, pattern))
    return pieces


def train(pieces: Mapping[bytes, int], merges: int) -> list[Pair]:
    """The pairs of ids to merge, in order (train.rs); the i-th makes the id 256 + i.

    At first every piece is a sequence of its bytes, whose ids are 0 to 255. Then, again and again, the most
    frequent pair of neighbours becomes a token. Of pairs with equal counts it is the one whose left id is
    smaller, then the one whose right id is. It ends early where no pair is left.
    """
    words = [(list(piece), count) for piece, count in pieces.items()]
    done: list[Pair] = []
    while len(done) < merges:
        counts: Counter[Pair] = Counter()
        for ids, count in words:
            for pair in zip(ids, ids[1:], strict=False):
                counts[pair] += count  # "aaa" holds the pair (a, a) twice, although only one can be merged
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [(merge(ids, best, 256 + len(done)), count) for ids, count in words]
        done.append(best)
    return done


def merge(ids: Sequence[int], pair: Pair, made: int) -> list[int]:
    """Replace a pair by the id that it makes, from left to right: of "aaa" the first two."""
    out: list[int] = []
    at = 0
    while at < len(ids):
        is_pair = tuple(ids[at : at + 2]) == pair
        out.append(made if is_pair else ids[at])
        at += 2 if is_pair else 1
    return out


def tokens_of(merges: Sequence[Pair]) -> list[bytes]:
    """The byte string of each id (vocab.rs): the 256 bytes, then the two halves of each merge."""
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens


def encode(text: str, pattern: str, ranks: Mapping[bytes, int]) -> list[int]:
    """The ids of a text (encode.rs); `ranks` holds the id of each byte string, which is also its rank."""
    return [rank for piece in split(text, pattern) for rank in encode_piece(piece, ranks)]


def encode_piece(piece: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """The ids of one piece (merge.rs).

    A piece that is a token is that token. Of any other, the two neighbours whose joined bytes have the lowest
    rank are joined, the leftmost where there are several, until no two neighbours make a token. So the merges
    happen in the order in which training found them.
    """
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        joined = [left + right for left, right in zip(parts, parts[1:], strict=False)]
        known = [(ranks[token], at) for at, token in enumerate(joined) if token in ranks]
        if not known:
            return [ranks[part] for part in parts]
        _, at = min(known)
        parts[at : at + 2] = [joined[at]]


def decode(ids: Iterable[int], tokens: Sequence[bytes]) -> str:
    """The text of ids (vocab.rs): their bytes end to end. Bytes that are not UTF-8 become U+FFFD.

    That happens where ids were cut apart or made up: a character of several bytes may be several tokens.
    """
    return b"".join(tokens[i] for i in ids).decode("utf-8", errors="replace")
