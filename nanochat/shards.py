"""Shards on the disk: parquet with one text column, written with page checksums and read within limits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat import files
from nanochat.errors import UserError

TEXT_COLUMN = "text"
GROUP_DOCUMENTS = 1000  # documents of a row group, which is the block that the loader packs
GROUP_CHARS = 64 << 20  # a row group ends early beyond this, so that long documents cannot fill the memory
SHARD_CHARS = 64 << 20  # text of a shard, about 20 MB compressed
MAX_GROUP_ROWS = 1 << 16  # limits on what is read, far above what any corpus here has (1,024 rows, 5 MB)
MAX_GROUP_BYTES = 1 << 30
SCHEMA = pa.schema([(TEXT_COLUMN, pa.string())])


@dataclass(frozen=True)
class Shard:
    """One file of a corpus, as its manifest describes it.

    Attributes:
        name: file name in the corpus folder.
        split: "train" or "val".
        bytes: size of the file.
        documents: its rows.
        row_groups: its blocks.
        sha256: hex digest of the file.
    """

    name: str
    split: str
    bytes: int
    documents: int
    row_groups: int
    sha256: str


def write_shards(documents: Iterable[str], folder: Path, split: str, first_index: int) -> list[Shard]:
    """Write documents, in their order, as shard_NNNNN.parquet from `first_index` on."""
    shards: list[Shard] = []
    groups = _grouped(documents)
    group = next(groups, None)
    while group is not None:
        path = folder / f"shard_{first_index + len(shards):05d}.parquet"
        chars = 0
        with pq.ParquetWriter(
            path,
            SCHEMA,
            compression="zstd",
            compression_level=3,
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
            store_schema=False,
        ) as writer:
            while group is not None and chars < SHARD_CHARS:
                writer.write_table(pa.table({TEXT_COLUMN: group}, schema=SCHEMA), row_group_size=len(group))
                chars += sum(map(len, group))
                group = next(groups, None)
        shards.append(describe(path, split))
    return shards


def _grouped(documents: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    chars = 0
    for document in documents:
        group.append(document)
        chars += len(document)
        if len(group) == GROUP_DOCUMENTS or chars >= GROUP_CHARS:
            yield group
            group, chars = [], 0
    if group:
        yield group


def describe(path: Path, split: str, sha256: str | None = None) -> Shard:
    """What the manifest says of a file; hashes it unless the digest is known.

    Raises:
        UserError: not a parquet file with a column `text` of strings.
    """
    try:
        with pq.ParquetFile(path) as file:
            _check_schema(path, file.schema_arrow)
            documents, row_groups = file.metadata.num_rows, file.metadata.num_row_groups
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({_first_line(error)}).") from None
    return Shard(
        name=path.name,
        split=split,
        bytes=path.stat().st_size,
        documents=documents,
        row_groups=row_groups,
        sha256=sha256 or files.sha256(path),
    )


def _check_schema(path: Path, schema: pa.Schema) -> None:
    at = schema.get_all_field_indices(TEXT_COLUMN)
    if len(at) != 1:
        raise UserError(
            f"{path}: expected one column named {TEXT_COLUMN!r}, found {schema.names}. "
            "Rename the column that holds the text."
        )
    kind = schema.field(at[0]).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: column {TEXT_COLUMN!r} holds {kind}, expected strings.")


def read_texts(path: Path, row_group: int) -> list[str]:
    """The documents of one row group, page checksums verified; nulls and empty strings are dropped.

    Raises:
        UserError: the file is absent, damaged, of another schema, or the row group is over the limits.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_schema(path, file.schema_arrow)
            assert 0 <= row_group < file.metadata.num_row_groups, f"row group {row_group} of {path}"
            group = file.metadata.row_group(row_group)
            if group.num_rows > MAX_GROUP_ROWS or group.total_byte_size > MAX_GROUP_BYTES:
                raise UserError(
                    f"{path}: row group {row_group} has {group.num_rows} rows and {group.total_byte_size} "
                    f"bytes, at most {MAX_GROUP_ROWS} rows and {MAX_GROUP_BYTES} bytes are read at a time. "
                    f"Rewrite the file with row groups of {GROUP_DOCUMENTS}."
                )
            column = file.read_row_group(row_group, columns=[TEXT_COLUMN], use_threads=False).column(0)
            if len(column) != group.num_rows:
                raise UserError(
                    f"{path}: row group {row_group} holds {len(column)} rows, not {group.num_rows}."
                )
            texts: list[str | None] = column.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: row group {row_group} cannot be read ({_first_line(error)}).") from None
    return [text for text in texts if text]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
