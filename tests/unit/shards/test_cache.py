"""Copies of shards: made once, whole or not at all, and read in place of the shards."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from shards.cache import copies_folder, copy_shard, require_space
from shards.errors import ArtifactError, DataError, DiskFullError
from shards.manifest import CorpusManifest
from shards.reader import CorpusShards
from tests.unit.shards.test_writer_reader import make_documents, write_corpus


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus", make_documents(10), per_shard=4)
    return tmp_path / "corpus"


@pytest.fixture
def manifest(source: Path) -> CorpusManifest:
    return CorpusManifest.load(source)


def copy_all(cache: Path, source: Path, manifest: CorpusManifest) -> int:
    return sum(copy_shard(cache, source, manifest, entry) for entry in manifest.shards)


def test_copies_are_read_in_place_of_the_shards(tmp_path: Path, source: Path, manifest: CorpusManifest) -> None:
    copied = copy_all(tmp_path / "cache", source, manifest)
    assert copied == sum(path.stat().st_size for path in source.glob("0*"))
    corpus = CorpusShards.open(source)
    expected = [(document, ids.tolist()) for document, ids in corpus.iterate(1, "ranker")]
    for path in source.glob("0*"):
        path.unlink()
    read = corpus.read_from(copies_folder(tmp_path / "cache", manifest))
    assert [(document, ids.tolist()) for document, ids in read.iterate(1, "ranker")] == expected
    assert np.array_equal(read.tokens(4, "ranker"), expected[0][1])
    assert read.document(9).id == "d.9"
    assert read.index_of("d.7") == 7


def test_what_is_there_is_not_copied_again(tmp_path: Path, source: Path, manifest: CorpusManifest) -> None:
    copy_all(tmp_path, source, manifest)
    before = {path: path.stat().st_ino for path in copies_folder(tmp_path, manifest).iterdir()}
    assert copy_all(tmp_path, source, manifest) == 0
    assert {path: path.stat().st_ino for path in copies_folder(tmp_path, manifest).iterdir()} == before


def test_a_short_copy_is_made_again(tmp_path: Path, source: Path, manifest: CorpusManifest) -> None:
    copy_all(tmp_path, source, manifest)
    copy = copies_folder(tmp_path, manifest) / "000001.tar"
    copy.write_bytes(copy.read_bytes()[:-512])
    assert copy_all(tmp_path, source, manifest) == (source / "000001.tar").stat().st_size
    assert copy.read_bytes() == (source / "000001.tar").read_bytes()


def test_a_damaged_shard_is_not_copied(tmp_path: Path, source: Path, manifest: CorpusManifest) -> None:
    shard = source / "000001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"corpus/000001\.tar has sha256"):
        copy_all(tmp_path / "cache", source, manifest)
    assert not (copies_folder(tmp_path / "cache", manifest) / "000001.tar").exists()


def test_a_damaged_copy_is_told_apart_from_a_damaged_shard(
    tmp_path: Path, source: Path, manifest: CorpusManifest
) -> None:
    """Symptom: the remedy says to write the shards again, when the file to delete is a copy on one host."""
    copy_all(tmp_path / "cache", source, manifest)
    copies = copies_folder(tmp_path / "cache", manifest)
    data = bytearray((copies / "000000.tar").read_bytes())
    data[700] ^= 1
    (copies / "000000.tar").write_bytes(data)
    corpus = CorpusShards.open(source).read_from(copies)
    with pytest.raises(ArtifactError, match=rf"{copies}/000000\.tar has sha256") as refusal:
        list(corpus.iterate(0, "ranker"))
    assert f"delete {copies}, and the shards are copied again" in str(refusal.value)


def test_a_cache_without_space_is_refused_before_anything_is_copied(
    tmp_path: Path, source: Path, manifest: CorpusManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(DiskFullError, match=r"needs \d+ bytes .* 1000 are free"):
        require_space(tmp_path, source, manifest)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10**12))
    require_space(tmp_path, source, manifest)


def test_a_cache_that_cannot_be_made_is_refused(tmp_path: Path, source: Path, manifest: CorpusManifest) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"shards\.cache"):
        require_space(tmp_path / "file", source, manifest)
