"""A manifest describes a whole corpus or is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from shards.errors import ArtifactError
from shards.files import parse_record
from shards.manifest import CorpusManifest, ShardEntry, TokenStream, shard_name

HASH = "a" * 64


def entry(number: int, first: int, count: int, **changes: Any) -> ShardEntry:
    values: dict[str, Any] = {
        "name": shard_name(number),
        "num_bytes": 1024,
        "sha256": HASH,
        "num_documents": count,
        "first_document": first,
        "offsets_sha256": HASH,
        "num_tokens": {"retriever": 10 * count},
    }
    return ShardEntry(**(values | changes))


def manifest(**changes: Any) -> CorpusManifest:
    values: dict[str, Any] = {
        "dataset_sha256": HASH,
        "template": "{title} {text}",
        "streams": (TokenStream("retriever", HASH, 64),),
        "shards": (entry(0, 0, 5), entry(1, 5, 5), entry(2, 10, 2)),
        "num_documents": 12,
        "num_tokens": {"retriever": 120},
        "docids_sha256": HASH,
        "producer": {"version": "1"},
    }
    return CorpusManifest(**(values | changes))


def test_comes_back_as_it_went(tmp_path: Path) -> None:
    saved = manifest()
    saved.save(tmp_path)
    loaded = CorpusManifest.load(tmp_path)
    assert loaded == saved
    assert loaded.sha256 == saved.sha256


def test_entries_travel_as_json() -> None:
    one = entry(3, 7, 2)
    assert parse_record(json.loads(json.dumps(dataclasses.asdict(one))), ShardEntry, "an entry") == one
    assert (one.number, one.offsets_name, list(one.documents)) == (3, "000003.offsets.npy", [7, 8])


def test_the_hash_names_the_content_and_not_the_producer() -> None:
    base = manifest().sha256
    assert manifest(producer={"version": "2"}).sha256 == base
    for change in (
        {"template": "{text}"},
        {"dataset_sha256": "b" * 64},
        {"docids_sha256": "b" * 64},
        {"streams": (TokenStream("retriever", "b" * 64, 64),)},
        {"streams": (TokenStream("retriever", HASH, 63),)},
        {"shards": (entry(0, 0, 5, sha256="b" * 64), entry(1, 5, 5), entry(2, 10, 2))},
    ):
        assert manifest(**change).sha256 != base


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"shards": (entry(0, 0, 5), entry(1, 6, 5), entry(2, 11, 2))}, "000001.tar that starts at document 6"),
        ({"shards": (entry(0, 0, 5), entry(1, 4, 5), entry(2, 9, 3))}, "000001.tar that starts at document 4"),
        ({"shards": (entry(0, 0, 5), entry(2, 5, 5), entry(3, 10, 2))}, "000002.tar at place 1"),
        ({"shards": (entry(0, 0, 5), entry(1, 5, 5), entry(2, 10, 3))}, "12 documents in all"),
        ({"shards": (entry(0, 0, 12), entry(1, 12, 0))}, "with 0 documents"),
        ({"shards": (), "num_documents": 0, "num_tokens": {}}, "no shard"),
        ({"shards": (entry(0, 0, 12, sha256="short"),)}, "malformed hashes"),
        ({"shards": (entry(0, 0, 12, num_tokens={"ranker": 120}),)}, "tokens of"),
        ({"num_tokens": {"retriever": 121}}, "121"),
        ({"streams": ()}, "token streams"),
        ({"streams": (TokenStream("retriever", HASH, 64),) * 2}, "token streams"),
    ],
)
def test_shards_must_be_disjoint_complete_and_add_up(tmp_path: Path, change: dict[str, Any], fact: str) -> None:
    with pytest.raises(ArtifactError, match=fact):
        manifest(**change).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    manifest().save(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace("{title} {text}", "{text} {title}"))
    with pytest.raises(ArtifactError, match=r"(?s)hash.*write the shards again"):
        CorpusManifest.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"version": 2}, "version 2"),
        ({"surprise": 1}, "surprise"),
        ({"shards": [1]}, r"manifest.json is damaged: shards\.0.*write the shards again"),
        (
            {"streams": [{"name": "A.b", "tokenizer_sha256": HASH, "max_tokens": 4}]},
            r"streams\.0.*cannot be named 'A.b'",
        ),
        ({"shards": [dataclasses.asdict(entry(0, 0, 12)) | {"num_bytes": "1024"}]}, r"shards\.0\.num_bytes"),
        ({"num_tokens": {"retriever": 1.5}}, r"num_tokens\.retriever"),
        ({"sha256": None}, "the hash None"),
    ],
)
def test_malformed_fields_are_refused(tmp_path: Path, change: dict[str, Any], fact: str) -> None:
    manifest().save(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match=fact):
        CorpusManifest.load(tmp_path)


def test_half_a_manifest_and_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="corpus manifest is missing"):
        CorpusManifest.load(tmp_path)
    manifest().save(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ArtifactError, match="corpus manifest is damaged"):
        CorpusManifest.load(tmp_path)


@pytest.mark.parametrize("name", ["", "a.b", "Retriever", "a b", "1a", "json/x"])
def test_a_stream_name_must_fit_into_a_member_name(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be named"):
        TokenStream(name, HASH, 64)


def test_an_unknown_stream_is_named_with_the_known_ones() -> None:
    two = manifest(streams=(TokenStream("retriever", HASH, 64), TokenStream("ranker", HASH, 64)))
    assert (two.stream_index("retriever"), two.stream_index("ranker")) == (0, 1)
    with pytest.raises(ArtifactError, match=r"(?s)'reranker'.*retriever, ranker"):
        two.stream_index("reranker")


def test_a_manifest_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        manifest().num_documents = 1  # type: ignore[misc]
