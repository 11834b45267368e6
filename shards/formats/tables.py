"""Tables: Parquet files, and Hugging Face data sets as `datasets` saves them (Arrow streams) or the hub holds them.

pyarrow reads both a batch of rows at a time; it is imported where it is used, since most conversions need none of it.
A saved data set is a folder with `state.json`, which lists its files, or a folder of such folders with
`dataset_dict.json`; nothing in either is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shards.errors import DataError

_BATCH_ROWS = 256
_HUB_FILES = [
    "**/*.parquet",
    "**/*.jsonl",
    "**/*.jsonl.gz",
    "**/*.jsonl.zst",
    "**/*.tsv",
    "*.parquet",
    "*.jsonl*",
    "*.tsv",
]


def hf_files(path: Path) -> list[Path]:
    """List the data files of a folder that `datasets` saved.

    Args:
        path: Any folder.

    Returns:
        The files in their order; empty where the folder is no such data set.

    Raises:
        DataError: Its description is damaged, or names a file outside it.
    """
    try:
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            return [file for split in splits for file in hf_files(_inside(path, split))]
        if not (path / "state.json").is_file():
            return []
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = [_inside(path, entry["filename"]) for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is a damaged data set: {type(error).__name__}: {error}",
            expected="a folder that the library `datasets` saved",
            remedy="save it again with save_to_disk",
        ) from None
    if state.get("_indices_data_files"):
        raise DataError(f"{path} selects rows of another table", remedy="call flatten_indices() before save_to_disk")
    return files


def _inside(path: Path, name: object) -> Path:
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
        raise DataError(
            f"{path} names {name!r} as a part of it",
            expected="the name of a file or folder inside it",
            remedy="save the data set again with save_to_disk",
        )
    return path / name


def fetch_from_hub(name: str) -> Path:
    """Fetch a data set from the Hugging Face hub into its cache: its files, and no code.

    Args:
        name: Its name on the hub, such as `owner/name`.

    Returns:
        The folder of the fetched files.

    Raises:
        DataError: It cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        found = snapshot_download(name, repo_type="dataset", allow_patterns=_HUB_FILES)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise DataError(
            f"the data set {name!r} cannot be fetched from the hub: {str(error).splitlines()[0]}",
            expected="the name of a data set on the hub, and a network; or a folder that exists",
            remedy="fetch it where there is a network, save it with save_to_disk, and name the folder",
        ) from error
    return Path(found)


def columns_of(path: Path) -> list[str]:
    """Return the names of a table's columns.

    Raises:
        DataError: The file is damaged.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    with _ExplainedErrors(path):
        if path.suffix == ".parquet":
            return list(pyarrow.parquet.read_schema(path).names)
        with pa.OSFile(str(path)) as file:
            return list(_arrow(file).schema.names)


def read_rows(
    path: Path, columns: list[str], skip: int, consumed: Callable[[int], None] | None
) -> Iterator[dict[str, Any]]:
    """Stream the rows of a Parquet or Arrow file.

    Args:
        path: The file.
        columns: The columns that are wanted.
        skip: Rows to leave out at the beginning.
        consumed: Told of the bytes of the file that were read; for Parquet, those of its row groups.

    Yields:
        Column -> value.

    Raises:
        DataError: The file is damaged.
    """
    with _ExplainedErrors(path):
        for batch in (
            _parquet(path, columns, consumed) if path.suffix == ".parquet" else _stream(path, columns, consumed)
        ):
            if skip >= batch.num_rows:
                skip -= batch.num_rows
                continue
            for start in range(skip, batch.num_rows, _BATCH_ROWS):
                yield from batch.slice(start, _BATCH_ROWS).to_pylist()
            skip = 0


def _parquet(path: Path, columns: list[str], consumed: Callable[[int], None] | None) -> Iterator[Any]:
    import pyarrow.parquet

    # Without its own buffering pyarrow reads page by page instead of a row group at once.
    with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            yield from file.iter_batches(_BATCH_ROWS, row_groups=[number], columns=columns, use_threads=False)
            if consumed is not None:
                consumed(sum(group.column(place).total_compressed_size for place in range(group.num_columns)))


def _stream(path: Path, columns: list[str], consumed: Callable[[int], None] | None) -> Iterator[Any]:
    import pyarrow as pa

    # Read, not memory-mapped: mapped pages would count as memory of this process.
    with pa.OSFile(str(path)) as file:
        told = 0
        for batch in _arrow(file):
            if consumed is not None:
                consumed(file.tell() - told)
                told = file.tell()
            yield batch.select(columns)


def _arrow(file: Any) -> Any:
    import pyarrow as pa
    import pyarrow.ipc  # type: ignore[import-untyped]

    try:
        return pyarrow.ipc.open_stream(file)
    except pa.ArrowInvalid:
        file.seek(0)
        opened = pyarrow.ipc.open_file(file)
        return pa.RecordBatchReader.from_batches(
            opened.schema, (opened.get_batch(number) for number in range(opened.num_record_batches))
        )


class _ExplainedErrors:
    """Turns pyarrow's errors about a file into ours."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        if not self._path.is_file():
            raise DataError(f"there is no file {self._path}", remedy="check the folder, or put the file there")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        import pyarrow as pa

        if isinstance(error, (pa.ArrowException, OSError, UnicodeDecodeError)):
            raise DataError(
                f"{self._path} is damaged, or no table: {str(error).splitlines()[0]}",
                expected="a whole Parquet or Arrow file",
                remedy="fetch it again, and compare its size and checksum with those that its source gives",
            ) from None
