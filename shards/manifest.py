"""The corpus manifest: the file that says which shards make up a corpus, and whose presence says they are finished.

It is written last. Its hash names the corpus everywhere else: embeddings, indexes and candidates carry it, so that
nothing made from another corpus, another tokenizer or another template is ever mixed in.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from shards.errors import ArtifactError
from shards.files import canonical_json, parse_record, read_json, write_json

VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_SHARDS = 10**6
"""Their names have six digits."""
MAX_DOCUMENTS = 10**12
"""Keys in the tar have nine digits, or as many more as a document's index needs; every array of indices is int64."""

_STREAM_NAME = re.compile(r"[a-z][a-z0-9_]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class TokenStream:
    """One tokenisation of the corpus, such as the retriever's or the ranker's."""

    name: str
    """Lower-case letters, digits and underscores: it is part of file names inside the tar, where a dot would end it."""
    tokenizer_sha256: str
    """Fingerprint of the tokenizer that made the ids."""
    max_tokens: int
    """Ids kept of a document at most, without special tokens."""

    def __post_init__(self) -> None:
        if not _STREAM_NAME.fullmatch(self.name):
            raise ValueError(f"a token stream cannot be named {self.name!r}: lower-case letters, digits, underscores")
        if self.max_tokens < 1:
            raise ValueError(f"token stream {self.name}: max_tokens is {self.max_tokens}, it must be at least 1")


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard: a tar file with consecutive documents, and the offsets file next to it."""

    name: str
    """File name of the tar: six digits and `.tar`."""
    num_bytes: int
    sha256: str
    """Hash of the tar's bytes."""
    num_documents: int
    first_document: int
    """Global index of its first document."""
    offsets_sha256: str
    """Hash of the bytes of the offsets file."""
    num_tokens: dict[str, int]
    """Ids it holds, by stream."""

    @property
    def number(self) -> int:
        """The shard's number, 0 for the first."""
        return int(self.name.removesuffix(".tar"))

    @property
    def offsets_name(self) -> str:
        """File name of the offsets next to the tar."""
        return f"{self.number:06d}.offsets.npy"

    @property
    def documents(self) -> range:
        """Global indices of its documents."""
        return range(self.first_document, self.first_document + self.num_documents)


def shard_name(number: int) -> str:
    """Return the file name of a shard's tar.

    Args:
        number: The shard's number, 0 to 999999.
    """
    if not 0 <= number < MAX_SHARDS:
        raise ValueError(
            f"shard number {number} is not between 0 and {MAX_SHARDS - 1}: put more documents into a shard"
        )
    return f"{number:06d}.tar"


@dataclass(frozen=True)
class CorpusManifest:
    """What a folder of shards holds."""

    # The hash would not vouch for what is passed over.
    __pydantic_config__ = ConfigDict(extra="forbid")
    dataset_sha256: str
    """Fingerprint of the source files."""
    template: str
    """How a document became the string that was tokenised."""
    streams: tuple[TokenStream, ...]
    shards: tuple[ShardEntry, ...]
    num_documents: int
    num_tokens: dict[str, int]
    """Ids in the whole corpus, by stream."""
    docids_sha256: str
    """Hash of the bytes of `docids.txt`."""
    producer: dict[str, Any] = field(default_factory=dict)
    """Who wrote it, with which versions; not part of the corpus's identity."""
    version: int = VERSION

    @cached_property
    def sha256(self) -> str:
        """The hash that names this corpus; the same documents, tokenizers and shard size give the same one."""
        content = {name: value for name, value in asdict(self).items() if name != "producer"}
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()

    def stream_index(self, name: str) -> int:
        """Return the place of a stream among the streams.

        Raises:
            ArtifactError: The corpus was not tokenised for it.
        """
        names = [stream.name for stream in self.streams]
        if name not in names:
            raise ArtifactError(
                f"the corpus has no token stream {name!r}",
                expected=f"one of {', '.join(names)}",
                remedy="write the shards again with this stream",
            )
        return names.index(name)

    def save(self, folder: Path) -> None:
        """Publish the manifest, after which the folder counts as a corpus.

        Raises:
            ArtifactError: The entries do not make up a corpus.
        """
        self.validate(folder)
        write_json(folder / MANIFEST_NAME, asdict(self) | {"sha256": self.sha256})

    @classmethod
    def load(cls, folder: Path) -> CorpusManifest:
        """Read and check a manifest; the shards themselves are checked by `CorpusShards.open`.

        Raises:
            ArtifactError: It is missing, damaged, of another version, or contradicts itself.
        """
        path = folder / MANIFEST_NAME
        values = read_json(path, "the corpus manifest")
        if not isinstance(values, dict) or values.get("version") != VERSION:
            version = values.get("version") if isinstance(values, dict) else None
            raise _damaged(folder, f"version {version!r}", f"version {VERSION}")
        recorded = values.pop("sha256", None)
        manifest = parse_record(values, cls, f"the corpus manifest {path}", remedy=_remedy(folder))
        if manifest.sha256 != recorded:
            raise _damaged(folder, f"the hash {recorded} but content that hashes to {manifest.sha256}", "equal hashes")
        manifest.validate(folder)
        return manifest

    def validate(self, folder: Path) -> None:
        """Check that the shards are disjoint and complete and that the counts add up.

        Args:
            folder: Where the manifest lies or will lie, for the message.

        Raises:
            ArtifactError: They do not.
        """
        names = [stream.name for stream in self.streams]
        if not self.shards:
            raise _damaged(folder, "no shard", "at least one document")
        if not names or len(set(names)) < len(names):
            raise _damaged(folder, f"the token streams {names}", "at least one, with different names")
        first = 0
        for number, entry in enumerate(self.shards):
            where = f"shard {entry.name}"
            if entry.name != shard_name(number):
                raise _damaged(folder, f"{where} at place {number}", f"{shard_name(number)} there")
            if entry.first_document != first:
                raise _damaged(folder, f"{where} that starts at document {entry.first_document}", f"document {first}")
            if entry.num_documents < 1 or entry.num_bytes < 1:
                raise _damaged(folder, f"{where} with {entry.num_documents} documents", "at least one")
            if not (_SHA256.fullmatch(entry.sha256) and _SHA256.fullmatch(entry.offsets_sha256)):
                raise _damaged(folder, f"{where} with malformed hashes", "64 hexadecimal digits")
            if sorted(entry.num_tokens) != sorted(names):
                raise _damaged(folder, f"{where} with tokens of {sorted(entry.num_tokens)}", f"tokens of {names}")
            first += entry.num_documents
        if first != self.num_documents:
            raise _damaged(folder, f"{self.num_documents} documents in all", f"{first}, the sum over its shards")
        tokens = sum_tokens(self.shards)
        if tokens != self.num_tokens:
            raise _damaged(folder, f"{self.num_tokens} tokens in all", f"{tokens}, the sum over its shards")


def sum_tokens(entries: Sequence[ShardEntry]) -> dict[str, int]:
    """Add up the ids of several shards.

    Args:
        entries: The shards.

    Returns:
        Number of ids by stream.
    """
    totals: dict[str, int] = {}
    for entry in entries:
        for stream, count in entry.num_tokens.items():
            totals[stream] = totals.get(stream, 0) + count
    return totals


def _remedy(folder: Path) -> str:
    return f"delete {folder} and write the shards again"


def _damaged(folder: Path, fact: str, expected: str) -> ArtifactError:
    return ArtifactError(
        f"the corpus manifest {folder / MANIFEST_NAME} has {fact}",
        expected=expected,
        remedy=_remedy(folder),
    )
