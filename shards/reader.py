"""Reads a corpus: in order for encoding, at random for training and search.

A damaged tar is not an error to webdataset or tarfile: cut between two members, or with one header overwritten, it
just ends early. So nothing here trusts the tar: sizes are compared with the manifest when a corpus is opened, a pass
compares the shard's hash before it gives anything out, and whatever is read is found by its offset and must have its
name. (To walk through a tar by its headers takes 60 microseconds a document, longer than a GPU takes to encode one.)
"""

from __future__ import annotations

import json
import mmap
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.docids import DOCIDS_NAME, Docids
from shards.docids import NAMES as DOCID_FILES
from shards.errors import ArtifactError, DataError
from shards.files import OpenFiles, sha256_file
from shards.manifest import CorpusManifest, ShardEntry
from shards.records import Document
from shards.writer import TOKEN_DTYPE, member_name


@dataclass(frozen=True, slots=True)
class _OpenShard:
    tar: mmap.mmap
    offsets: npt.NDArray[np.int64]


class CorpusShards:
    """A corpus on disk. Cheap to open; shards are mapped into memory at first use.

    Threads, forked workers and spawned ones (it pickles as its folder and manifest) may read through one object.

    Args:
        folder: The corpus folder.
        manifest: Its manifest. `CorpusShards.open` reads and checks both.
        copies: Where the shards are read instead, such as a folder of `shards.cache`; left out, in `folder`.
    """

    def __init__(self, folder: Path, manifest: CorpusManifest, copies: Path | None = None) -> None:
        self.folder, self.manifest = Path(folder), manifest
        self.copies = Path(copies or folder)
        self._first_documents = [entry.first_document for entry in manifest.shards]
        self._shards: OpenFiles[_OpenShard] = OpenFiles(self._open_shard)

    @classmethod
    def open(cls, folder: Path, expect: Mapping[str, str] | None = None, *, verify: bool = False) -> CorpusShards:
        """Open a corpus and check that it is whole.

        Args:
            folder: The corpus folder.
            expect: Tokenizer fingerprint by stream name: the streams that the caller is going to read.
            verify: Hash every file too (reads the whole corpus); without it files are checked by size, which
                leaves flipped bits unseen.

        Returns:
            The corpus.

        Raises:
            ArtifactError: The manifest, a shard or a stream is missing, damaged or made by another tokenizer.
        """
        folder = Path(folder)
        manifest = CorpusManifest.load(folder)
        corpus = cls(folder, manifest)
        for stream, fingerprint in (expect or {}).items():
            found = manifest.streams[manifest.stream_index(stream)].tokenizer_sha256
            if found != fingerprint:
                raise ArtifactError(
                    f"the {stream} tokens in {folder} were made by tokenizer {found}",
                    expected=f"tokenizer {fingerprint}",
                    remedy=f"delete {folder} and write the shards again",
                )
        known = {entry.name for entry in manifest.shards}
        extra = sorted(path.name for path in folder.glob("*.tar") if path.name not in known)
        if extra:
            raise ArtifactError(
                f"{folder} holds {extra[0]}, which is not in its manifest ({len(extra)} such file(s))",
                expected=f"{len(known)} shards, {min(known)} to {max(known)}",
                remedy=f"delete {folder / extra[0]} if it is a leftover, else write the shards again",
            )
        for entry in manifest.shards:
            corpus._check_files(entry, verify)
        if verify:
            _ = corpus.docids
        for name in DOCID_FILES:
            if not (folder / name).is_file():
                raise corpus._broken(name, "is missing", "")
        return corpus

    def __reduce__(self) -> tuple[type[CorpusShards], tuple[Path, CorpusManifest, Path]]:
        return CorpusShards, (self.folder, self.manifest, self.copies)

    def read_from(self, copies: Path) -> CorpusShards:
        """Return the same corpus with its shards read from copies; docids stay where they are.

        Args:
            copies: A folder with a copy of every shard and its offsets.

        Raises:
            ArtifactError: A copy is missing or has another size.
        """
        corpus = CorpusShards(self.folder, self.manifest, copies)
        for entry in self.manifest.shards:
            corpus._check_files(entry, verify=False)
        return corpus

    @property
    def num_documents(self) -> int:
        """Number of documents in the corpus."""
        return self.manifest.num_documents

    @cached_property
    def docids(self) -> Docids:
        """All docids by global index; opened, and their file hashed, at first use.

        Raises:
            ArtifactError: They are missing or not the corpus's.
        """
        return Docids(self.folder, self.num_documents, self.manifest.docids_sha256)

    def index_of(self, docid: str) -> int:
        """Return a document's global index.

        Args:
            docid: Its id.

        Raises:
            DataError: The corpus has no such document.
        """
        index = self.docids.index_of(docid)
        if index is None:
            raise DataError(
                f"there is no document {docid!r} in the corpus",
                expected=f"one of the {self.num_documents} docids in {self.folder / DOCIDS_NAME}",
            )
        return index

    def iterate(self, shard_number: int, stream: str) -> Iterator[tuple[int, npt.NDArray[np.uint32]]]:
        """Read the token ids of a shard from first to last, after its bytes were found to have the recorded hash.

        Args:
            shard_number: The shard, 0 <= shard_number < len(manifest.shards).
            stream: The token stream.

        Yields:
            (global document index, ids uint32 [L] without special tokens), every document of the shard once.

        Raises:
            ArtifactError: The shard is not the one that the manifest names, or its offsets name other members.
        """
        column = 1 + self.manifest.stream_index(stream)
        entry = self.manifest.shards[shard_number]
        self._check_files(entry, verify=True)
        shard, suffix = self._open_shard(shard_number), f"{stream}.ids"  # not kept open: a pass comes by once
        for document, place in zip(entry.documents, shard.offsets[:, column].tolist(), strict=True):
            yield document, self._ids(entry, self._member(entry, shard, place, member_name(document, suffix)))

    def tokens(self, doc_index: int, stream: str) -> npt.NDArray[np.uint32]:
        """Read a document's token ids.

        Args:
            doc_index: Its global index, 0 <= doc_index < num_documents.
            stream: The token stream.

        Returns:
            Ids, uint32 [L], without special tokens.

        Raises:
            ArtifactError: The shard or its offsets are damaged.
            IndexError: There is no such document.
        """
        column = 1 + self.manifest.stream_index(stream)
        entry, payload = self._payload(doc_index, column, f"{stream}.ids")
        return self._ids(entry, payload)

    def num_tokens(self, doc_index: int, stream: str) -> int:
        """Return the number of a document's token ids, without reading them; as `tokens`."""
        column = 1 + self.manifest.stream_index(stream)
        entry, shard = self._place(doc_index)
        return int(shard.offsets[doc_index - entry.first_document, column, 1]) // TOKEN_DTYPE.itemsize

    def document(self, doc_index: int) -> Document:
        """Read a document's id, title and text.

        Args:
            doc_index: Its global index, 0 <= doc_index < num_documents.

        Raises:
            ArtifactError: The shard or its offsets are damaged.
            IndexError: There is no such document.
        """
        entry, payload = self._payload(doc_index, 0, "json")
        return self._document(entry, doc_index, payload)

    def documents(self, shard_number: int) -> Iterator[Document]:
        """Read the documents of a shard from first to last, after its bytes were found to have the recorded hash.

        It is read, and not mapped: its pages do not count as this process's memory.

        Args:
            shard_number: The shard, 0 <= shard_number < len(manifest.shards).

        Yields:
            Every document of the shard once.

        Raises:
            ArtifactError: The shard or its offsets are damaged.
        """
        entry = self.manifest.shards[shard_number]
        self._check_files(entry, verify=True)
        offsets_N2 = np.load(self.copies / entry.offsets_name, allow_pickle=False)[:, 0]
        with open(self.copies / entry.name, "rb") as file:
            for doc_index, (offset, length) in zip(entry.documents, offsets_N2.tolist(), strict=True):
                file.seek(offset)
                yield self._document(entry, doc_index, file.read(length))

    def _document(self, entry: ShardEntry, doc_index: int, payload: bytes) -> Document:
        try:
            record = json.loads(payload)
            return Document(id=record["id"], title=record["title"], text=record["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._broken(entry.name, f"holds a document {doc_index} that cannot be read ({error})", "") from error

    def _payload(self, doc_index: int, column: int, suffix: str) -> tuple[ShardEntry, bytes]:
        doc_index = int(doc_index)
        entry, shard = self._place(doc_index)
        place = shard.offsets[doc_index - entry.first_document, column].tolist()
        return entry, self._member(entry, shard, place, member_name(doc_index, suffix))

    def _member(self, entry: ShardEntry, shard: _OpenShard, place: list[int], name: str) -> bytes:
        """Return a member's payload after a look at its header."""
        offset, length = place
        header, wanted = offset - tarfile.BLOCKSIZE, name.encode() + b"\0"
        inside = header >= 0 and 0 <= length <= len(shard.tar) - offset
        if not inside or shard.tar[header : header + len(wanted)] != wanted:
            raise self._broken(entry.name, f"has no {name} at byte {offset}", "it there, by the offsets")
        return shard.tar[offset : offset + length]

    def _place(self, doc_index: int) -> tuple[ShardEntry, _OpenShard]:
        if not 0 <= doc_index < self.num_documents:
            raise IndexError(f"document {doc_index} of a corpus of {self.num_documents}")
        number = bisect_right(self._first_documents, doc_index) - 1
        return self.manifest.shards[number], self._shards[number]

    def _ids(self, entry: ShardEntry, payload: bytes) -> npt.NDArray[np.uint32]:
        if len(payload) % TOKEN_DTYPE.itemsize:
            raise self._broken(entry.name, f"holds {len(payload)} bytes of token ids", "a multiple of four")
        return np.frombuffer(payload, dtype=TOKEN_DTYPE).astype(np.uint32)

    def _open_shard(self, number: int) -> _OpenShard:
        entry = self.manifest.shards[number]
        try:
            offsets = np.load(self.copies / entry.offsets_name, mmap_mode="r", allow_pickle=False)
            with open(self.copies / entry.name, "rb") as file:
                tar = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise self._broken(entry.name, f"or its offsets cannot be opened ({error})", "") from error
        shape = (entry.num_documents, 1 + len(self.manifest.streams), 2)
        if offsets.shape != shape or offsets.dtype != np.int64:
            raise self._broken(entry.offsets_name, f"has {offsets.dtype} {offsets.shape}", f"int64 {shape}")
        return _OpenShard(tar, offsets)

    def _check_files(self, entry: ShardEntry, verify: bool) -> None:
        for name, sha256 in ((entry.name, entry.sha256), (entry.offsets_name, entry.offsets_sha256)):
            path = self.copies / name
            if not path.is_file():
                raise self._broken(name, "is missing", f"{len(self.manifest.shards)} shards in {self.copies}")
            if name == entry.name and path.stat().st_size != entry.num_bytes:
                raise self._broken(name, f"has {path.stat().st_size} bytes", f"{entry.num_bytes} bytes")
            if verify:
                found = sha256_file(path)
                if found != sha256:
                    raise self._broken(name, f"has sha256 {found}", f"sha256 {sha256}")

    def _broken(self, name: str, fact: str, expected: str) -> ArtifactError:
        copied = self.copies != self.folder and name not in DOCID_FILES
        return ArtifactError(
            f"the shard file {(self.copies if copied else self.folder) / name} {fact}",
            expected=expected,
            remedy=f"delete {self.copies}, and the shards are copied again"
            if copied
            else f"delete {self.folder} and write the shards again",
        )
