"""Batches of conversations: every supervised target once an epoch, whatever the ranks, and after a resume."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.chat import conversation, loader, made, packing, token_cache
from nanochat.chat.corpus import Mixture, Source
from nanochat.chat.loader import ChatLoader
from nanochat.common.errors import UserError
from nanochat.common.stop_signals import Stopped
from nanochat.data.train_loader import Batch
from nanochat.distributed.world import World
from nanochat.tokenizer.tokenizer import Tokenizer
from tests.chat import corpora

T = 64
Target = tuple[tuple[int, ...], int]  # the tokens before it in its conversation, and the token


def mixture_of(count: int = 60, epochs: int = 2, longest: int = 12) -> Mixture:
    """Two corpora, one of them several times an epoch."""
    one = corpora.write("one", corpora.random_rows(count, 1, longest), corpora.random_rows(9, 2))
    two = corpora.write("two", corpora.random_rows(count // 3, 3), corpora.random_rows(5, 4))
    return (Source(one), Source(two, epochs=epochs))


def open_loader(mixture: Mixture, rank: int = 0, size: int = 1, **changes: Any) -> ChatLoader:
    options: dict[str, Any] = {"sequence_len": T, "rows_per_batch": 8, "seed": 5, "device_batch_size": 2}
    world = World(rank, size, torch.device("cpu"), None)
    return ChatLoader(mixture, corpora.tokenizer(), world=world, **{**options, **changes})


def rejoined(micro_batches: list[Batch]) -> tuple[torch.Tensor, ...]:
    """Inputs, targets and weights of this rank's rows."""
    return tuple(
        torch.cat([part for part in parts if part is not None]) for parts in zip(*micro_batches, strict=True)
    )


def targets_of(inputs: torch.Tensor, targets: torch.Tensor) -> Counter[Target]:
    """The targets that count, each with what stands before it from the bos of its conversation on."""
    bos = corpora.tokenizer().bos_id
    found: Counter[Target] = Counter()
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert row[0] == bos, "a row begins with a conversation"
        begin = 0
        for at, (token, target) in enumerate(zip(row, wanted, strict=True)):
            begin = at if token == bos else begin
            if target >= 0:
                found[tuple(row[begin : at + 1]), target] += 1
    return found


def expected_of(mixture: Mixture, context: int = T) -> Counter[Target]:
    """The slow twin: each conversation rendered, cut and shifted by itself."""
    tokenizer = corpora.tokenizer()
    end_id = tokenizer.special_id("<|assistant_end|>")
    wanted: Counter[Target] = Counter()
    for source in mixture:
        for where, row in source.corpus.rows(source.split):
            ids, supervised, _ = conversation.render(tokenizer, [conversation.read(row, where)])
            signed = [
                token if counts else ~token for token, counts in zip(ids.tolist(), supervised, strict=True)
            ]
            length = kept_length(signed, context + 1, end_id)
            for at in range(1, length):
                if supervised[at]:
                    wanted[tuple(ids[:at].tolist()), int(ids[at])] += source.epochs
    return wanted


def kept_length(signed: list[int], slots: int, end_id: int) -> int:
    """How much of a conversation a row keeps."""
    ends = [at + 1 for at, token in enumerate(signed[:slots]) if token == end_id]
    return len(signed) if len(signed) <= slots else ends[-1] if ends else slots


@pytest.mark.parametrize("longest", [6, 40])
def test_every_supervised_target_comes_once_an_epoch(longest: int) -> None:
    """With long conversations, of which some are cut and some dropped, and with short ones."""
    mixture = mixture_of(longest=longest)
    rows = open_loader(mixture, rows_per_batch=1)
    found: Counter[Target] = Counter()
    documents = 0
    for _ in range(rows.rows_per_epoch):
        inputs, targets, weights = rejoined(rows.next_batch())
        found += targets_of(inputs, targets)
        count = int((targets >= 0).sum())
        assert count > 0
        assert torch.equal(weights, (targets >= 0).float() / count)
        begins = int((inputs == corpora.tokenizer().bos_id).sum())
        assert rows.metrics["documents"] == begins
        assert rows.metrics["supervised_tokens"] == count
        documents += begins
    assert found == expected_of(mixture)
    counts = rows.counts
    assert documents == sum(
        source.epochs * (counts[name]["conversations"] - counts[name]["dropped_conversations"])
        for source, name in zip(mixture, counts, strict=True)
    )
    assert rows.state_dict()["cursor"] == [1, 0]
    if longest == 40:
        assert counts["one"]["cut_conversations"] > 5
        assert counts["one"]["dropped_conversations"] > 0


def test_what_is_cut_and_dropped_is_counted_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    mixture = mixture_of(longest=40)
    opened = open_loader(mixture)
    tokenizer, end_id = corpora.tokenizer(), corpora.tokenizer().special_id("<|assistant_end|>")
    expected = Counter(dict.fromkeys(opened.counts["one"], 0))
    for where, row in mixture[0].corpus.rows("train"):
        ids, supervised, _ = conversation.render(tokenizer, [conversation.read(row, where)])
        signed = [token if counts else ~token for token, counts in zip(ids.tolist(), supervised, strict=True)]
        length = kept_length(signed, T + 1, end_id)
        kind = "dropped" if not supervised[:length].any() else "cut" if length < len(ids) else ""
        expected.update(conversations=1, tokens=len(ids))
        if kind:
            lost = len(ids) - (length if kind == "cut" else 0)
            expected.update({f"{kind}_conversations": 1, f"{kind}_tokens": lost})
    assert opened.counts["one"] == dict(expected)
    said = capsys.readouterr().out
    assert said.startswith(
        f"one: a row has 64 tokens. Of 60 conversations, {expected['cut_conversations']} are cut"
    )
    open_loader(mixture, rank=1, size=2)
    open_loader((Source(corpora.write("short", made_rows(9))),), sequence_len=512)
    assert not capsys.readouterr().out


def test_global_batches_do_not_depend_on_ranks_or_micro_batches() -> None:
    mixture = mixture_of()
    first: list[tuple[torch.Tensor, ...]] = []
    for size, rows in ((1, 1), (1, 8), (2, 2), (4, 1), (4, 2), (8, 1)):
        ranks = [open_loader(mixture, rank, size, device_batch_size=rows) for rank in range(size)]
        for number in range(12):  # more than an epoch
            batches = [rank.next_batch() for rank in ranks]
            assert {len(batch) for batch in batches} == {8 // size // rows}
            parts = [rejoined(batch) for batch in batches]
            whole = tuple(
                torch.stack([part[k][i // size] for i in range(8) for part in [parts[i % size]]])
                for k in range(3)
            )
            whole = (*whole[:2], whole[2] / size)
            assert float(whole[2].sum()) == pytest.approx(1)
            assert len({float(weight) for weight in whole[2].flatten()}) == 2
            if size == rows == 1:
                first.append(whole)
            for ours, theirs in zip(whole, first[number], strict=True):
                assert torch.allclose(ours, theirs, rtol=1e-6)
        assert len({json.dumps(rank.state_dict()) for rank in ranks}) == 1
        assert ranks[0].metrics["epoch"] > 1


def test_epochs_seeds_and_sources_change_the_order() -> None:
    mixture = mixture_of()
    plans = [open_loader(mixture, seed=seed) for seed in (5, 6)]
    assert plans[0].fingerprint != plans[1].fingerprint
    assert open_loader(mixture[:1]).fingerprint != plans[0].fingerprint
    assert open_loader(mixture).fingerprint == plans[0].fingerprint
    every = [rejoined(plan.next_batch())[0] for plan in plans]
    assert not torch.equal(*every)
    conversations = loader.Conversations(mixture, corpora.tokenizer(), T + 1)
    orders = [conversations.epoch(0, number).packed.conversations.tolist() for number in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_repetitions_are_spread_over_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BLOCK", 4)
    source = Source(corpora.write("one", corpora.random_rows(400, 1, 3)), epochs=4)
    placed = loader.Conversations((source,), corpora.tokenizer(), T + 1).epoch(0, 0).packed.conversations
    for part in range(4):
        mine = placed[part * 400 : part * 400 + 400]
        assert len(set(mine.tolist())) == 400
    assert not (placed[:400] == placed[400:800]).all()


def test_a_limit_takes_the_same_conversations_for_every_seed() -> None:
    corpus = corpora.write("one", corpora.random_rows(100, 1, 3))
    few = loader.Conversations((Source(corpus, limit=10),), corpora.tokenizer(), T + 1)
    assert few.counts["one"]["conversations"] == 10
    taken = [set(few.epoch(seed, 0).packed.conversations.tolist()) for seed in (0, 1)]
    assert taken[0] == taken[1]
    assert len(taken[0]) == 10
    assert taken[0] != set(range(10))


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """At every batch of one epoch and a half, with other ranks, and after batches were put back."""
    mixture = mixture_of(30)
    whole = open_loader(mixture)
    expected, states = [], []
    while whole.state_dict()["cursor"][0] < 2:
        states.append(json.loads(json.dumps(whole.state_dict())))
        expected.append(rejoined(whole.next_batch()))
    assert len(expected) > 5
    for at, state in enumerate(states):
        again = open_loader(mixture)
        again.load_state_dict(state)
        for ours, theirs in zip(rejoined(again.next_batch()), expected[at], strict=True):
            assert torch.equal(ours, theirs)
    ranks = [open_loader(mixture, rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(states[3])
    assert torch.equal(rejoined(ranks[1].next_batch())[0], expected[3][0][1::2])

    drawing = open_loader(mixture)
    drawing.fetch(2)
    drawing.put_back()
    assert drawing.state_dict() == states[0]
    drawing.fetch(2)
    for theirs in expected[:2]:
        assert torch.equal(rejoined(drawing.next_batch())[0], theirs[0])
    assert drawing.state_dict() == states[2]


def test_a_signal_while_rows_are_read_leaves_nothing_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture, blocked = mixture_of(), threading.Event()
    opened = open_loader(mixture)
    read = loader.Conversations.read
    monkeypatch.setattr(loader, "POLL_S", 0.01)
    monkeypatch.setattr(loader.Conversations, "read", lambda *args: [blocked.wait(), read(*args)][1])
    with pytest.raises(Stopped):
        opened.fetch(1, lambda: True)
    assert opened.state_dict()["cursor"] == [0, 0]
    blocked.set()
    opened.fetch(1)
    assert len(opened.next_batch()) == 4
    opened.close()


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"cursor": None},
        {"cursor": [0]},
        {"cursor": [0, -1]},
        {"cursor": [0, 1 << 50]},
        {"cursor": [True, 0]},
        {"cursor": [1 << 60, 0]},
        {"cursor": [0, 0, 0]},
        {"conversations": "others"},
    ],
)
def test_a_state_of_something_else_is_refused(change: dict[str, Any]) -> None:
    opened = open_loader(mixture_of(9))
    with pytest.raises(UserError, match="loader's state"):
        opened.load_state_dict({**opened.state_dict(), **change})
    assert opened.state_dict()["cursor"] == [0, 0]


def test_a_row_beyond_the_epoch_leads_to_the_next_one() -> None:
    opened = open_loader(mixture_of(9))
    opened.load_state_dict({**opened.state_dict(), "cursor": [0, 1 << 20]})
    opened.next_batch()
    assert opened.metrics["epoch"] > 1


def test_conversations_without_a_reply_that_fits_are_refused() -> None:
    with pytest.raises(UserError, match="no conversation has a reply within 3 tokens: one. Begin with"):
        open_loader(mixture_of()[:1], sequence_len=3)


def made_rows(count: int) -> list[dict[str, Any]]:
    return [made.row("train", 0, index) for index in range(count)]


def test_made_conversations_fill_rows_of_256() -> None:
    rows = made_rows(3000)
    corpus = corpora.write("made", rows)
    texts = [str(message["content"]) for row in rows[:1000] for message in row["messages"]]
    conversations = loader.Conversations((Source(corpus),), Tokenizer.train(texts, 2000), 257)
    epoch = conversations.epoch(0, 0)
    assert epoch.filled.sum() / len(epoch.filled) / 257 >= 0.95


# -----------------------------------------------------------------------------
# Validation


@pytest.mark.parametrize("size", [1, 2, 3])
def test_validation_is_the_replies_of_each_corpus(size: int) -> None:
    mixture = mixture_of()
    options: dict[str, Any] = {"sequence_len": T, "rows": 2, "max_tokens": 1 << 20}
    worlds = [World(rank, size, torch.device("cpu"), None) for rank in range(size)]
    ranks = [loader.validation(mixture, corpora.tokenizer(), world=world, **options) for world in worlds]
    for source in mixture:
        name = source.corpus.name
        found: Counter[Target] = Counter()
        for inputs, targets in itertools.chain.from_iterable(rank[name] for rank in ranks):
            assert inputs.shape == targets.shape
            assert len(inputs) <= 2
            assert int(inputs.min()) >= 0
            assert int(targets.min()) == -1
            found += targets_of(inputs, targets)
        assert found == expected_of((Source(source.corpus, "val"),))


def test_validation_takes_as_many_tokens_as_are_asked_for() -> None:
    world = World.single_process()
    options: dict[str, Any] = {"sequence_len": T, "rows": 4, "world": world}
    found = loader.validation(mixture_of(), corpora.tokenizer(), max_tokens=3 * T, **options)
    assert [sum(len(inputs) for inputs, _ in found[name]) for name in ("one", "two")][0] == 3
    alone = (Source(corpora.write("alone", corpora.random_rows(9, 0))),)
    assert loader.validation(alone, corpora.tokenizer(), max_tokens=100, **options) == {}


# -----------------------------------------------------------------------------
# Token caches


def test_a_cache_is_made_once_by_many_and_again_where_it_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = corpora.write("one", corpora.random_rows(50, 1), corpora.random_rows(5, 2))
    made_by: list[str] = []
    render = token_cache._render

    def spy(*args: Any) -> Any:
        made_by.append(args[1])
        return render(*args)

    monkeypatch.setattr(token_cache, "_render", spy)

    def tokens() -> bytes:
        opened = token_cache.open_split(corpus, "train", corpora.tokenizer())
        return opened.read(0, int(opened.offsets[-1])).tobytes() + opened.offsets.tobytes()

    with ThreadPoolExecutor(6) as pool:
        [first] = {future.result() for future in [pool.submit(tokens) for _ in range(6)]}
    assert made_by == ["train", "val"]
    [folder] = corpus.folder.glob("tokens-*")
    for name in ("train", "val", "manifest.json"):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        assert tokens() == first
        assert (folder / name).read_bytes() != data or name == "val"
    token_cache.open_split(corpus, "train", corpora.tokenizer(299))
    assert len(list(corpus.folder.glob("tokens-*"))) == 2


@pytest.mark.parametrize("held", [0, 1 << 26])
def test_conversations_are_read_by_slices_and_scanned_in_parts(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "SCANNED_TOKENS", 100)
    monkeypatch.setattr(token_cache, "RENDERED_AT_ONCE", 7)
    monkeypatch.setattr(token_cache, "MAX_HELD_TOKENS", held)
    rows = corpora.random_rows(40, 1)
    opened = token_cache.open_split(corpora.write("one", rows), "train", corpora.tokenizer())
    expected = conversation.render(corpora.tokenizer(), [conversation.read(row, "") for row in rows])
    assert opened.offsets.tolist() == expected.offsets.tolist()
    scanned = list(opened.scan())
    assert len(scanned) > 10
    assert sum(len(offsets) - 1 for _, offsets in scanned) == 40
    at = 0
    for tokens, offsets in scanned:
        for first, last in itertools.pairwise(offsets.tolist()):
            start, end = (int(edge) for edge in expected.offsets[at : at + 2])
            assert opened.read(start, end).tolist() == tokens[first:last].tolist()
            ids = [
                int(i) if counts else ~int(i)
                for i, counts in zip(expected.ids[start:end], expected.supervised[start:end], strict=True)
            ]
            assert tokens[first:last].tolist() == ids
            at += 1


def test_a_cache_that_changes_while_it_is_read_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "MAX_HELD_TOKENS", 0)
    mixture = mixture_of()
    opened = open_loader(mixture)
    opened.next_batch()
    [path] = mixture[0].corpus.folder.glob("tokens-*/train")
    data = path.read_bytes()
    path.write_bytes(bytes(byte ^ 1 for byte in data))
    with pytest.raises(UserError, match="have changed since the file was hashed"):
        for _ in range(10):
            opened.next_batch()


def test_a_corpus_with_a_conversation_that_cannot_be_used_names_it() -> None:
    bad = corpora.random_rows(3, 1)
    del bad[1]["messages"][-1]
    corpus = corpora.write("one", bad)
    with pytest.raises(UserError, match=r"shard_00000.parquet: row group 0, row 1: .*expected a reply"):
        open_loader((Source(corpus),))
    assert not list(corpus.folder.glob("*tokens-*"))
