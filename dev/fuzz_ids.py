"""Ids beside tiktoken's, for vocabularies and texts that are made at random.

    python -m dev.fuzz_ids --cases 1000000 --seed 0 [--json FILE]

A case is a vocabulary and a text. Vocabularies are of every kind that ranks can have: made by merges or not
reached by any, ranks in order or shuffled, single bytes anywhere among them, tokens from 1 to 300 bytes.
Half of the texts are tokens, or tokens side by side. Every text is encoded by itself with a cold cache and a
warm one, and with all others on one thread and on two. Exit code 1, and the case, where an id differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import string
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

import rustbpe
from nanochat.tokenizer.tokenizer import GPT2_PATTERN, PATTERN

ONE_PIECE = r"(?s).+"  # the text as it is, so that merging sees all of it
PATTERNS = (PATTERN, GPT2_PATTERN, ONE_PIECE, PATTERN.replace("{1,2}", "{1,3}"), r"\w+|[^\w\s]+|\s+")
ALPHABETS = (
    "ab",
    "abc ",
    "aA1 .",
    "etaoin shrdlu",
    "a\u00e9\u4e2d\U0001f600 ",
    "\n\r\t a'",
    "xyz\x00\u0301\u2003",
)
TEXTS = 2500  # of one vocabulary
FULL = 140_000  # bytes of a batch, at which two threads are at work


@dataclass
class Case:
    """A vocabulary, and texts that are encoded with it."""

    ranks: dict[bytes, int]
    pattern: str
    texts: list[str]


def random_string(rng: random.Random, alphabet: str, longest: int) -> str:
    """Characters of the alphabet, at times one many times or a few again and again."""
    length = rng.randint(1, longest)
    kind = rng.random()
    if kind < 0.2:
        return rng.choice(alphabet) * length
    if kind < 0.4:
        unit = "".join(rng.choices(alphabet, k=rng.randint(1, 5)))
        return (unit * length)[:length]
    return "".join(rng.choices(alphabet, k=length))


def random_ranks(rng: random.Random, alphabet: str) -> dict[bytes, int]:
    """All single bytes and up to 400 other tokens, some made of two others and some of nothing."""
    made = [bytes([byte]) for byte in range(256)]
    letters = [bytes([byte]) for byte in sorted(set(alphabet.encode()))]
    tokens, seen = list(letters), set(made)
    share, longest = rng.random(), rng.choice((4, 6, 8, 12, 14, 15, 16, 17, 20, 30, 66, 200))
    for _ in range(rng.randint(1, 400)):
        if rng.random() < share:
            token = rng.choice(tokens) + rng.choice(tokens)
        else:
            token = random_string(rng, alphabet, longest).encode()
            if rng.random() < 0.1:
                token = token[rng.randrange(len(token)) :]  # may begin within a character
        if token not in seen and len(token) <= 600:
            seen.add(token)
            tokens.append(token)
            made.append(token)
    order = rng.random()
    if order < 0.4:
        rng.shuffle(made)
    elif order < 0.7:
        made[256:] = rng.sample(made[256:], len(made) - 256)
    return {token: rank for rank, token in enumerate(made)}


def random_text(rng: random.Random, tokens: list[str], alphabet: str) -> str:
    """A token, some tokens, a token that was changed, or characters of the alphabet."""
    kind = rng.random()
    if kind < 0.25:
        return rng.choice(tokens)
    if kind < 0.5:
        return rng.choice(("", " ")).join(rng.choices(tokens, k=rng.randint(2, 4)))
    if kind < 0.7:
        token = rng.choice(tokens)
        at = rng.randint(0, len(token))
        return token[:at] + rng.choice((*alphabet, "")) + token[at + rng.randint(0, 1) :]
    return random_string(rng, alphabet, rng.choice((3, 6, 12, 24, 80)))


def random_case(rng: random.Random, texts: int) -> Case:
    """A vocabulary and as many different texts, or fewer where it has no more to give."""
    alphabet = rng.choice(ALPHABETS)
    ranks = random_ranks(rng, alphabet)
    valid = [text for token in ranks if (text := token.decode("utf-8", errors="ignore")).encode() == token]
    own = [text for text in valid if len(text) > 1] or valid
    made = {random_text(rng, own, alphabet): None for _ in range(texts)}
    return Case(ranks, rng.choice(PATTERNS), list(made))


def filling() -> str:
    """So many different pieces that no cache has a free place left."""
    return " ".join(map("".join, itertools.product(string.ascii_letters, *["etaoinshrd"] * 4)))


def differing(case: Case, warm: str) -> Iterator[dict[str, Any]]:
    """Every way of encoding in which a text has not tiktoken's ids."""
    theirs_of = tiktoken.Encoding(
        "case", pat_str=case.pattern, mergeable_ranks=case.ranks, special_tokens={}
    ).encode_ordinary
    ours = rustbpe.Tokenizer.from_ranks(case.ranks, case.pattern)
    expected = [theirs_of(text) for text in case.texts]
    for way in ("cold", "warm"):
        for text, theirs in zip(case.texts, expected, strict=True):
            if (found := ours.encode(text)) != theirs:
                yield {"way": way, "text": text, "theirs": theirs, "ours": found}
        if way == "cold" and warm:
            ours.encode_numpy(warm)
    ids = np.concatenate([np.array(part, dtype=np.uint32) for part in expected])
    lengths = np.array([len(part) for part in expected])
    times = FULL // max(1, sum(len(text.encode()) for text in case.texts)) + 1
    for threads, repeated in ((1, 1), (2, times)):
        found, offsets = ours.encode_batch_numpy(case.texts * repeated, threads)
        same = np.array_equal(found, np.tile(ids, repeated))
        if not same or not np.array_equal(np.diff(offsets), np.tile(lengths, repeated)):
            yield {"way": f"batch on {threads} threads", "texts": len(case.texts) * repeated}


def fuzz(cases: int, seed: int, told: float = 60.0) -> dict[str, Any]:
    """Try at least so many cases; what was tried, and what differs, up to ten."""
    rng, warm = random.Random(seed), filling()
    done, vocabularies, failures = 0, 0, 0
    shown: list[dict[str, Any]] = []
    began = last = time.monotonic()
    while done < cases:
        case = random_case(rng, min(TEXTS, cases - done))
        # Filling a cache takes as long as some thousand texts.
        different = list(differing(case, warm if vocabularies % 32 == 0 else ""))
        if different and len(shown) < 10:
            ranks = [[token.hex(), rank] for token, rank in case.ranks.items()]
            shown.append({"ranks": ranks, "pattern": case.pattern, "differing": different[:3]})
        done, vocabularies, failures = done + len(case.texts), vocabularies + 1, failures + len(different)
        if time.monotonic() - last > told:
            last = time.monotonic()
            print(f"{done:,} cases, {vocabularies:,} vocabularies, {failures} differ", flush=True)
    seconds = round(time.monotonic() - began, 1)
    counts = {"cases": done, "vocabularies": vocabularies, "seed": seed, "differ": failures}
    return counts | {"tiktoken": tiktoken.__version__, "seconds": seconds, "shown": shown}


def main() -> None:
    """Run the fuzz and say how many cases differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="pairs of a vocabulary and a text")
    parser.add_argument("--seed", type=int, default=0, help="other seeds make other cases")
    parser.add_argument("--json", type=Path, help="also write the outcome to this file")
    args = parser.parse_args()
    found = fuzz(args.cases, args.seed)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    for case in found.pop("shown"):
        print(json.dumps(case))
    print(f"{found['cases']:,} cases of {found['vocabularies']:,} vocabularies: {found['differ']} differ")
    sys.exit(1 if found["differ"] else 0)


if __name__ == "__main__":
    main()
