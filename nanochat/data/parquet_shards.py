"""Parquet shards: files with one column of texts, written with page checksums and read within limits.

A manifest lists the digest of each, so that damage is noticed before use; the limits are there because what a
footer says of sizes can be a lie. A shard may also hold tokens: see `token_shards`.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanochat.common.checksums import BrokenFileError, ChecksummedFile
from nanochat.common.errors import UserError
from nanochat.data import token_shards

TEXT_COLUMN, CHAT_COLUMN = "text", "conversation"  # documents; or conversations, each the JSON of a row
SPLITS = ("train", "val")
RAW = "raw"
GROUP_DOCUMENTS = 1000  # documents of a row group, of which the loader makes rows
GROUP_CHARS = 16 << 20  # a row group ends early beyond this, so that long documents cannot fill the memory
SHARD_CHARS = 64 << 20  # text of a shard, about 20 MB compressed
MAX_GROUP_ROWS = 1 << 16  # limits on what is read, far above what any corpus here has (1,024 rows, 5 MB)
MAX_GROUP_BYTES = 1 << 27
MIN_GROUP_BYTES = 32  # the footer alone has more for each row group, so a shard cannot claim more of them
BATCH_ROWS = 4  # decoded at a time: what a footer says of sizes can be a lie


@dataclass(frozen=True)
class Shard:
    """One file of a corpus, as its manifest describes it.

    Attributes:
        name: file name in the corpus folder.
        split: "train" or "val", in a corpus of conversations also "test"; RAW for a file of the hub that is
            in a schema of its own, of which only the bytes are known.
        bytes: size of the file.
        documents: its rows; 0 for a shard of tokens, which does not count them.
        row_groups: its row groups; of a shard of tokens, the chunks that `token_shards` reads.
        sha256: hex digest of the file.
    """

    name: str
    split: str
    bytes: int
    documents: int
    row_groups: int
    sha256: str

    @property
    def holds_tokens(self) -> bool:
        """True for token ids, False for text."""
        return self.name.endswith(token_shards.SUFFIX)

    @property
    def tokens(self) -> int:
        """Token ids in a shard of them."""
        assert self.holds_tokens, self.name
        return max(0, self.bytes - token_shards.HEADER_BYTES) // token_shards.TOKEN_BYTES


def write_shards(
    documents: Iterable[str], folder: Path, split: str, first_index: int, column: str = TEXT_COLUMN
) -> list[Shard]:
    """Write documents, in their order, as shard_NNNNN.parquet from `first_index` on."""
    schema = pa.schema([(column, pa.string())])
    shards: list[Shard] = []
    groups = _grouped(documents)
    group = next(groups, None)
    while group is not None:
        path = folder / f"shard_{first_index + len(shards):05d}.parquet"
        chars = 0
        with pq.ParquetWriter(
            path,
            schema,
            compression="zstd",
            compression_level=3,
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
            store_schema=False,
        ) as writer:
            while group is not None and chars < SHARD_CHARS:
                writer.write_table(pa.table({column: group}, schema=schema), row_group_size=len(group))
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


def describe(path: Path, split: str) -> Shard:
    """What the manifest says of a file of ours; hashes it.

    Raises:
        UserError: not a parquet file with a column `text` of strings.
    """
    try:
        file = ChecksummedFile(path)
        documents, row_groups = counts(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({first_line(error)}).") from None
    return Shard(path.name, split, file.bytes, documents, row_groups, file.sha256)


def counts(source: ChecksummedFile | pa.NativeFile) -> tuple[int, int]:
    """Documents and row groups of a shard, or of the end of a parquet file, which holds its footer.

    Raises:
        UserError: it has no column `text` of strings, or is no file of tokens.
        pyarrow.ArrowException, OSError: it is no parquet file.
    """
    name: Path | str = "the file"
    if isinstance(source, ChecksummedFile):
        if source.path.suffix == token_shards.SUFFIX:
            return 0, token_shards.chunks(token_shards.count_file(source))
        name, source = source.path, source.open()
    with pq.ParquetFile(source) as file:
        _find_column(name, file.schema_arrow)
        return file.metadata.num_rows, file.metadata.num_row_groups


def open_shard(path: Path, shard: Shard) -> ChecksummedFile:
    """Hash a file and compare it with what the manifest says; what is read of it later are the same bytes.

    Raises:
        BrokenFileError: what is wrong with it.
    """
    try:
        file = ChecksummedFile(path)
    except FileNotFoundError:
        raise BrokenFileError(f"{path}: the shard is missing; expected sha256 {shard.sha256}.") from None
    except OSError as error:
        raise BrokenFileError(f"{path}: cannot be read ({error.strerror}).") from None
    if (file.bytes, file.sha256) != (shard.bytes, shard.sha256):
        raise BrokenFileError(
            f"{path}: the shard is damaged: {file.bytes} bytes with sha256 {file.sha256}, "
            f"expected {shard.bytes} bytes with sha256 {shard.sha256}."
        )
    if shard.split == RAW:
        return file
    try:
        documents, row_groups = counts(file)
    except (UserError, pa.ArrowException, OSError) as error:
        raise BrokenFileError(f"{path}: not a shard ({first_line(error)}).") from None
    if (documents, row_groups) != (shard.documents, shard.row_groups):
        raise BrokenFileError(
            f"{path}: {documents} documents in {row_groups} row groups, "
            f"expected {shard.documents} in {shard.row_groups}."
        )
    return file


def problem(path: Path, shard: Shard) -> str:
    """What is wrong with a file that should be `shard`, hashed now; "" if nothing is."""
    try:
        open_shard(path, shard)
    except UserError as error:
        return str(error)
    return ""


def from_manifest(
    items: list[dict[str, Any]], splits: Sequence[str] = SPLITS, required: Sequence[str] = SPLITS
) -> list[Shard]:
    """Shards as a manifest lists them, checked: nothing that no manifest of ours would hold is taken.

    Args:
        items: what it lists.
        splits: those that shards may be of.
        required: those that have to have one.

    Raises:
        KeyError, TypeError, ValueError: a field is missing or has a wrong value.
    """
    kinds = typing.get_type_hints(Shard)
    members = [Shard(**{field: item[field] for field in kinds}) for item in items]
    for shard in members:
        for field, kind in kinds.items():
            value = getattr(shard, field)
            if type(value) is not kind or (isinstance(value, int) and value < 0):
                raise ValueError(f"shard {shard.name!r} has {field} {value!r}")
        # Whoever plans an epoch takes memory for every row group, before any shard has been looked at.
        if shard.row_groups > shard.bytes // MIN_GROUP_BYTES + 1:
            raise ValueError(f"shard {shard.name!r} has {shard.row_groups} row groups in {shard.bytes} bytes")
        # Names become paths.
        if not re.fullmatch(r"[\w-][\w.-]*\.(parquet|bin)", shard.name) or shard.split not in splits:
            raise ValueError(f"shard {shard.name!r} of split {shard.split!r}")
    if len({shard.name for shard in members}) != len(members):
        raise ValueError("a shard is listed twice")
    if len({shard.holds_tokens for shard in members}) > 1:
        raise ValueError("some shards hold text and some tokens")
    for split in required:
        if not any(shard.split == split and shard.row_groups for shard in members):
            raise ValueError(f"no shard of split {split!r}")
    return members


def _find_column(path: Path | str, schema: pa.Schema) -> str:
    """The column of the texts: `text`, or where there is none `conversation`."""
    column = CHAT_COLUMN if schema.names == [CHAT_COLUMN] else TEXT_COLUMN
    kinds = [str(schema.field(at).type) for at in schema.get_all_field_indices(column)]
    if len(kinds) != 1:
        raise UserError(
            f"{path}: expected one column named {TEXT_COLUMN!r}, found {schema.names}. "
            "Rename the column that holds the text."
        )
    if kinds[0] not in ("string", "large_string"):
        raise UserError(f"{path}: column {column!r} holds {kinds[0]}, expected strings.")
    return column


def read_column(source: ChecksummedFile, row_group: int) -> pa.Array:
    """The documents of one row group as an array of Arrow, nulls and "" dropped.

    Every byte that is decoded, the footer's too, has been compared with the checksums of `source` as it was
    read. Page checksums are verified as well, where the file has them: they are older than the first hash.

    Raises:
        BrokenFileError: the file is absent, damaged, or has changed.
        UserError: it is of another schema, or the row group is over the limits.
    """
    path = source.path
    try:
        with pq.ParquetFile(source.open(), page_checksum_verification=True, pre_buffer=False) as file:
            column_name = _find_column(path, file.schema_arrow)
            if not 0 <= row_group < file.metadata.num_row_groups:
                raise BrokenFileError(
                    f"{path}: row group {row_group} was asked for, it has {file.metadata.num_row_groups}."
                )
            group = file.metadata.row_group(row_group)
            if group.num_rows > MAX_GROUP_ROWS or group.total_byte_size > MAX_GROUP_BYTES:
                raise UserError(
                    f"{path}: row group {row_group} has {group.num_rows} rows and {group.total_byte_size} "
                    f"bytes, at most {MAX_GROUP_ROWS} rows and {MAX_GROUP_BYTES} bytes are read at a time. "
                    f"Rewrite the file with row groups of {GROUP_DOCUMENTS}."
                )
            column = _read_group(file, row_group, column_name)
            if len(column) != group.num_rows:
                raise BrokenFileError(
                    f"{path}: row group {row_group} holds {len(column)} rows, not {group.num_rows}."
                )
            column.validate(full=True)  # UTF-8 too
            return column.filter(pc.greater(pc.binary_length(column), 0))
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise BrokenFileError(
            f"{path}: row group {row_group} cannot be read ({first_line(error)})."
        ) from None


def _read_group(file: pq.ParquetFile, row_group: int, column: str) -> pa.Array:
    """All rows of a group, decoded a few at a time; stops where they are more than the footer may say."""
    parts: list[pa.Array] = []
    left = MAX_GROUP_BYTES
    batches = file.iter_batches(BATCH_ROWS, row_groups=[row_group], columns=[column], use_threads=False)
    for batch in batches:
        left -= batch.nbytes
        if left < 0:
            raise OSError(f"it holds more than {MAX_GROUP_BYTES} bytes")
        parts.append(batch.column(0))
    return pa.concat_arrays(parts) if parts else pa.array([], pa.string())


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
