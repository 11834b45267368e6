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
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.docids import NAMES as DOCID_FILES
from shards.docids import check_docid, write_docids
from shards.errors import ArtifactError, DataError
from shards.files import fsync, read_json, read_record, sha256_file, write_atomically, write_json
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


def _finished_entries(folder: Path) -> dict[int, ShardEntry]:
    """Return the shards in a folder whose record was written, which is done last, and whose files have its sizes."""
    entries = {}
    for path in sorted(folder.glob("[0-9]*.entry.json")):
        try:
            entry = read_record(path, ShardEntry, "the record of a shard")
            whole = (folder / entry.name).stat().st_size == entry.num_bytes and (folder / entry.offsets_name).is_file()
        except (ArtifactError, OSError):
            continue  # this shard is written again
        if whole:
            entries[entry.number] = entry
    return entries


def write_shard(
    documents: Sequence[Document],
    folder: Path,
    number: int,
    first_document: int,
    streams: Sequence[Tokenization],
    template: str,
) -> ShardEntry:
    """Tokenise documents and write them as one shard, byte for byte the same every time.

    Args:
        documents: The shard's documents, at least one, in the order of their global indices.
        folder: The corpus folder; made if needed.
        number: The shard's number, 0 for the first.
        first_document: Global index of `documents[0]`.
        streams: The tokenisations, at least one.
        template: How a document becomes a string; see `render`.

    Returns:
        What the manifest says about the shard; it is also recorded next to the tar until the manifest is published.

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
        )
    for document in documents:
        check_docid(document.id)
    ids = [_tokenize(documents, tokenization, template) for tokenization in streams]
    names = [tokenization.stream.name for tokenization in streams]

    tar_path = folder / name
    with write_atomically(tar_path) as temporary:
        offsets = _write_tar(temporary, documents, first_document, names, ids)
        num_bytes, tar_sha256 = temporary.stat().st_size, sha256_file(temporary)
    buffer = io.BytesIO()
    np.save(buffer, offsets, allow_pickle=False)
    entry = ShardEntry(
        name=name,
        num_bytes=num_bytes,
        sha256=tar_sha256,
        num_documents=len(documents),
        first_document=first_document,
        offsets_sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
        num_tokens={name: sum(map(len, per_document)) for name, per_document in zip(names, ids, strict=True)},
    )
    with write_atomically(folder / entry.offsets_name) as temporary:
        temporary.write_bytes(buffer.getvalue())
    write_json(folder / _entry_name(number), asdict(entry))
    return entry


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
        docids: All docids in the order of the global indices.
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


def _write_tar(
    path: Path,
    documents: Sequence[Document],
    first_document: int,
    names: Sequence[str],
    ids: Sequence[Sequence[npt.NDArray[np.uint32]]],
) -> npt.NDArray[np.int64]:
    """Write the tar and return (offset, length) of each payload, int64 [num_documents, 1 + num_streams, 2]."""
    offsets = np.zeros((len(documents), 1 + len(names), 2), dtype=np.int64)
    with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, document in enumerate(documents):
            record = {"id": document.id, "title": document.title, "text": document.text}
            payloads = [(member_name(first_document + row, "json"), _encode(record))]
            for stream, name in enumerate(names):
                payloads.append((member_name(first_document + row, f"{name}.ids"), ids[stream][row].tobytes()))
            for column, (member, payload) in enumerate(payloads):
                header = tarfile.TarInfo(member)  # its time, owner and group are 0 and empty unless set
                header.size, header.mode = len(payload), 0o644
                tar.addfile(header, io.BytesIO(payload))
                padded = -(-len(payload) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                offsets[row, column] = file.tell() - padded, len(payload)
    return offsets


def member_name(document: int, suffix: str) -> str:
    """Return the name of a document's member in the tar.

    Args:
        document: Its global index.
        suffix: `json`, or `<stream>.ids`.
    """
    return f"{document:09d}.{suffix}"


def _encode(record: Mapping[str, str]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"document {record['id']!r} is not valid Unicode ({error})") from error
