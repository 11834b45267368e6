"""Writes a corpus: documents tokenised once, into tar shards that later stages only read.

Any rank may write any shard and leaves a record next to it; the rank that publishes collects the records and writes
the manifest last. A shard that has its record is finished: a writing that was interrupted goes on with the others. Its
bytes depend on its documents and streams alone, so writing it again gives the same file. In the tar, document 42 is

    000000042.json              {"id": ..., "title": ..., "text": ...}
    000000042.<stream>.ids      token ids, little-endian uint32, no special tokens

and `000000.offsets.npy` next to the tar says where each payload starts and how long it is. Keys are numbers because a
docid may hold anything, and a dot in a key would merge two documents when the tar is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.docids import NAMES as DOCID_FILES
from shards.docids import check_docid, write_docids
from shards.errors import ArtifactError, DataError
from shards.files import fsync, read_json, read_record, write_atomically, write_json
from shards.files.tar import end_of_archive, member_header, padding
from shards.manifest import (
    MANIFEST_NAME,
    MAX_DOCUMENTS,
    CorpusManifest,
    ShardEntry,
    TokenStream,
    shard_name,
    sum_tokens,
)
from shards.records import Document

_PLAN = "plan.json"
TOKEN_DTYPE = np.dtype("<u4")
_DOCUMENTS_PER_CALL = 1000
"""Documents given to the tokenizer at a time: enough for its threads, little memory."""
_BYTES_PER_WRITE = 1 << 20
_as_json = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True, slots=True)
class Tokenization:
    """A token stream and the function that makes it."""

    stream: TokenStream
    tokenize: Callable[[list[str]], list[list[int]]]
    """Turns strings into ids without special tokens and without truncation (the writer cuts to `max_tokens`)."""


@lru_cache(maxsize=16)
def check_template(template: str) -> None:
    """Check a document template.

    Args:
        template: A string with `{text}` once and `{title}` at most once; a literal brace is doubled.

    Raises:
        DataError: It is anything else.
    """
    try:
        fields = [(name, spec, conv) for _, name, spec, conv in string.Formatter().parse(template) if name is not None]
    except ValueError:
        fields = []
    names = [name for name, _, _ in fields]
    plain = all(not spec and conv is None for _, spec, conv in fields)
    if not plain or names.count("text") != 1 or names.count("title") > 1 or not set(names) <= {"text", "title"}:
        raise DataError(
            f"the document template {template!r} cannot be used",
            expected="{text} once, {title} at most once, and nothing else in braces",
            remedy='use a template such as "{title} {text}" or "{title} [SEP] {text}"',
        )


def render(template: str, document: Document) -> str:
    """Make one string of a document, the one that is tokenised.

    Args:
        template: A string with `{text}` once and `{title}` at most once.
        document: The document; when either part is blank the other stands alone, without what the template puts
            between them.

    Returns:
        The string.

    Raises:
        DataError: The template is malformed.
    """
    check_template(template)
    if not document.title.strip():
        return document.text
    if not document.text.strip():
        return document.title
    return template.format(title=document.title, text=document.text)


def begin_corpus(folder: Path, made_of: Mapping[str, Any]) -> set[int]:
    """Get a folder ready for a corpus to be written into it, and find out what an interrupted writing left.

    Afterwards the folder holds no manifest, no shard of another corpus and no half-written file. Only one rank may call
    this, before any rank writes.

    Args:
        folder: The corpus folder; made if needed.
        made_of: All that the shards' bytes depend on, as JSON: the source's fingerprint, template, streams, shard size.

    Returns:
        Numbers of the shards that are finished and need not be written again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    fsync(folder)
    finished: dict[int, ShardEntry] = {}
    try:
        if read_json(folder / _PLAN, "the plan of the corpus") == made_of:
            finished = _finished_entries(folder)
    except ArtifactError:
        pass  # there is none, or half of one: nothing to go on with
    keep = {name for entry in finished.values() for name in (entry.name, entry.offsets_name, _entry_name(entry.number))}
    patterns = ("[0-9]*.tar", "[0-9]*.offsets.npy", "[0-9]*.entry.json", *DOCID_FILES, ".*.tmp-*")
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink(missing_ok=True)
    write_json(folder / _PLAN, made_of)
    return set(finished)


@dataclass(frozen=True, slots=True)
class _Record:
    """What is kept of a shard until the corpus is published."""

    entry: ShardEntry
    docids: list[str]


def _finished_entries(folder: Path) -> dict[int, ShardEntry]:
    """Return the shards in a folder whose record was written, which is done last, and whose files have its sizes."""
    entries = {}
    for path in sorted(folder.glob("[0-9]*.entry.json")):
        try:
            entry = _read_record(path).entry
            whole = (folder / entry.name).stat().st_size == entry.num_bytes and (folder / entry.offsets_name).is_file()
        except (ArtifactError, OSError):
            continue  # this shard is written again
        if whole:
            entries[entry.number] = entry
    return entries


def _read_record(path: Path) -> _Record:
    return read_record(path, _Record, "the record of a shard")


def recorded_docids(folder: Path) -> Iterator[str]:
    """Yield the docids of all shards whose records `write_tokenized` left, in the order of the global indices.

    So that whoever publishes a corpus needs not read its source once more.

    Args:
        folder: The corpus folder, before its manifest is published.

    Raises:
        ArtifactError: A record is damaged.
    """
    paths = {int(path.name.partition(".")[0]): path for path in folder.glob("[0-9]*.entry.json")}
    for _, path in sorted(paths.items()):
        yield from _read_record(path).docids


@dataclass(frozen=True, slots=True)
class TokenizedShard:
    """A shard whose documents are tokenised and checked, ready to be written.

    Attributes:
        documents: In the order of their global indices.
        number: The shard's number.
        first_document: Global index of `documents[0]`.
        ids: Stream -> the ids of each document.
    """

    documents: Sequence[Document]
    number: int
    first_document: int
    ids: dict[str, list[npt.NDArray[np.uint32]]]


def tokenize_shard(
    documents: Sequence[Document], number: int, first_document: int, streams: Sequence[Tokenization], template: str
) -> TokenizedShard:
    """Tokenise the documents of a shard.

    Args:
        documents: The shard's documents, at least one, in the order of their global indices.
        number: The shard's number, 0 for the first.
        first_document: Global index of `documents[0]`.
        streams: The tokenisations, at least one.
        template: How a document becomes a string; see `render`.

    Raises:
        DataError: A docid, a template, a stream or what a tokenizer returns cannot be stored.
    """
    name = shard_name(number)
    if not documents or not streams:
        raise ValueError(f"shard {name} needs documents and streams, got {len(documents)} and {len(streams)}")
    if first_document < 0 or first_document + len(documents) > MAX_DOCUMENTS:
        raise DataError(
            f"shard {name} reaches document {first_document + len(documents)}",
            expected=f"at most {MAX_DOCUMENTS} documents in a corpus",
            remedy="split the corpus, and search its parts one by one",
        )
    for document in documents:
        check_docid(document.id)
    ids = {tokenization.stream.name: _tokenize(documents, tokenization, template) for tokenization in streams}
    return TokenizedShard(documents, number, first_document, ids)


def write_tokenized(shard: TokenizedShard, folder: Path) -> ShardEntry:
    """Write a tokenised shard, byte for byte the same every time.

    Args:
        shard: The shard.
        folder: The corpus folder; made if needed.

    Returns:
        What the manifest says about the shard. It is also recorded next to the tar, with the docids, until the manifest
        is published.

    Raises:
        DataError: A document is not valid Unicode.
    """
    name = shard_name(shard.number)
    with write_atomically(folder / name) as temporary:
        offsets, num_bytes, tar_sha256 = _write_tar(temporary, shard)
    buffer = io.BytesIO()
    np.save(buffer, offsets, allow_pickle=False)
    entry = ShardEntry(
        name=name,
        num_bytes=num_bytes,
        sha256=tar_sha256,
        num_documents=len(shard.documents),
        first_document=shard.first_document,
        offsets_sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
        num_tokens={name: sum(map(len, per_document)) for name, per_document in shard.ids.items()},
    )
    with write_atomically(folder / entry.offsets_name) as temporary:
        temporary.write_bytes(buffer.getvalue())
    record = _Record(entry, [document.id for document in shard.documents])
    write_json(folder / _entry_name(shard.number), asdict(record))
    return entry


def write_shard(
    documents: Sequence[Document],
    folder: Path,
    number: int,
    first_document: int,
    streams: Sequence[Tokenization],
    template: str,
) -> ShardEntry:
    """Tokenise documents and write them as one shard: `tokenize_shard`, then `write_tokenized`."""
    return write_tokenized(tokenize_shard(documents, number, first_document, streams, template), folder)


def _entry_name(number: int) -> str:
    return f"{number:06d}.entry.json"


def publish_manifest(
    folder: Path,
    docids: Iterable[str],
    *,
    dataset_sha256: str,
    template: str,
    streams: Sequence[TokenStream],
    producer: Mapping[str, Any] | None = None,
) -> CorpusManifest:
    """Write the docids and then the manifest, after which the folder is a corpus.

    Args:
        folder: Where all shards lie by now, with the records that `write_shard` left on every rank.
        docids: All docids in the order of the global indices, such as `recorded_docids`.
        dataset_sha256: Fingerprint of the source files.
        template: The one given to `write_shard`.
        streams: The token streams, in the order given to `write_shard`.
        producer: Who wrote it, with which versions; kept for the reader, not part of the corpus's hash.

    Returns:
        The manifest.

    Raises:
        ArtifactError: The shards overlap, leave a hole, or do not match the docids.
        DataError: A docid repeats or cannot be stored.
    """
    shards = tuple(entry for _, entry in sorted(_finished_entries(folder).items()))
    num_docids, docids_sha256 = write_docids(folder, docids)
    manifest = CorpusManifest(
        dataset_sha256=dataset_sha256,
        template=template,
        streams=tuple(streams),
        shards=shards,
        num_documents=num_docids,
        num_tokens=sum_tokens(shards),
        docids_sha256=docids_sha256,
        producer=dict(producer or {}),
    )
    manifest.save(folder)
    for path in (folder / _PLAN, *folder.glob("[0-9]*.entry.json")):
        path.unlink(missing_ok=True)
    return manifest


def _tokenize(documents: Sequence[Document], tokenization: Tokenization, template: str) -> list[npt.NDArray[np.uint32]]:
    """Return the ids of each document, cut to the stream's length."""
    stream = tokenization.stream
    result: list[npt.NDArray[np.uint32]] = []
    for start in range(0, len(documents), _DOCUMENTS_PER_CALL):
        texts = [render(template, document) for document in documents[start : start + _DOCUMENTS_PER_CALL]]
        ids = tokenization.tokenize(texts)
        if len(ids) != len(texts):
            raise DataError(
                f"the tokenizer of stream {stream.name} returned {len(ids)} lists for {len(texts)} texts",
                expected="one list of ids for each text",
            )
        try:
            result += [np.asarray(one[: stream.max_tokens], dtype=TOKEN_DTYPE) for one in ids]
        except (OverflowError, ValueError, TypeError) as error:
            raise DataError(
                f"the tokenizer of stream {stream.name} returned ids that are not token ids ({error})",
                expected=f"whole numbers from 0 to {2**32 - 1}",
            ) from error
    return result


def _write_tar(path: Path, shard: TokenizedShard) -> tuple[npt.NDArray[np.int64], int, str]:
    """Write the tar; return (offset, length) of each payload [num_documents, 1 + num_streams, 2], bytes and sha256."""
    offsets: list[tuple[int, int]] = []
    digest, num_bytes, waiting, num_waiting = hashlib.sha256(), 0, list[bytes](), 0
    streams = [(f"{name}.ids", ids) for name, ids in shard.ids.items()]
    with open(path, "wb", buffering=0) as file:

        def write(pieces: list[bytes]) -> None:
            block = b"".join(pieces)
            digest.update(block)
            left = memoryview(block)
            while left:
                left = left[file.write(left) :]

        for row, document in enumerate(shard.documents):
            number = shard.first_document + row
            members = [(member_name(number, "json"), _encode(document))]
            members += [(member_name(number, suffix), ids[row].tobytes()) for suffix, ids in streams]
            for member, payload in members:
                pieces = [member_header(member.encode(), len(payload)), payload, padding(len(payload))]
                offsets.append((num_bytes + len(pieces[0]), len(payload)))
                num_bytes += sum(map(len, pieces))
                waiting += pieces
            if num_bytes - num_waiting >= _BYTES_PER_WRITE:
                write(waiting)
                waiting, num_waiting = [], num_bytes
        end = end_of_archive(num_bytes)
        write([*waiting, end])
    table = np.array(offsets, dtype=np.int64).reshape(len(shard.documents), 1 + len(streams), 2)
    return table, num_bytes + len(end), digest.hexdigest()


def member_name(document: int, suffix: str) -> str:
    """Return the name of a document's member in the tar.

    Args:
        document: Its global index.
        suffix: `json`, or `<stream>.ids`.
    """
    return f"{member_key(document)}.{suffix}"


def member_key(document: int) -> str:
    """Return what the names of a document's members begin with: its global index, in nine digits or more."""
    return f"{document:09d}"


def _encode(document: Document) -> bytes:
    try:
        return _as_json({"id": document.id, "title": document.title, "text": document.text}).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"document {document.id!r} is not valid Unicode ({error})") from error
