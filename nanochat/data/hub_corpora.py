"""Data sets on the Hugging Face hub that can be fetched as corpora: a table of their repositories and shards.

It is apart from the client (`hub.py`), whose library takes half a second to import: only downloads pay that.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HubCorpus:
    """A data set on the hub, in numbered shards.

    Attributes:
        repo: name of the data set.
        last: how many shards are for training.
        names: how the file of a training shard is called, by its number.
        first: number of the first.
        val: file of the validation shard; "" for the number after the last.
        vocabulary: model on the hub whose vocab.json made the tokens; "" where the shards hold text.
    """

    repo: str
    last: int
    names: str = "shard_{:05d}.parquet"
    first: int = 0
    val: str = ""
    vocabulary: str = ""

    def shard(self, index: int) -> str:
        """File name of a training shard, counted from 0."""
        return self.names.format(self.first + index)

    @property
    def val_shard(self) -> str:
        """File name of the validation shard."""
        return self.val or self.shard(self.last)


HUB_CORPORA = {
    "fineweb-edu": HubCorpus("karpathy/fineweb-edu-100b-shuffle", 1822),
    "climbmix": HubCorpus("karpathy/climbmix-400b-shuffle", 6542),
    "fineweb10B-gpt2": HubCorpus(
        "kjj0/fineweb10B-gpt2",
        103,
        names="fineweb_train_{:06d}.bin",
        first=1,
        val="fineweb_val_000000.bin",
        vocabulary="openai-community/gpt2",
    ),
}


def name_of(source: str) -> str:
    """Which of these corpora a manifest's source, `repo@commit`, belongs to; "" for none."""
    return next((name for name, remote in HUB_CORPORA.items() if source.startswith(f"{remote.repo}@")), "")
