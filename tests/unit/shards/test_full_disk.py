"""A full disk is named with path and bytes, leaves what was finished, and work goes on once there is space."""

from __future__ import annotations

import json
from pathlib import Path

from tests.small_disk import run_on_small_disk

SHARDS = """
import json
from shards.docids import write_docids
from shards.errors import DiskFullError
from shards.manifest import TokenStream
from shards.reader import CorpusShards
from shards.records import Document
from shards.writer import Tokenization, begin_corpus, publish_manifest, write_shard

stream = TokenStream("retriever", "1" * 64, 500)
tokenizations = [Tokenization(stream, lambda texts: [[ord(c) for c in text] for text in texts])]
documents = [Document(f"d{i}", "", "text " * 50) for i in range(100)]

def write():
    finished = begin_corpus(disk / "corpus", {"dataset_sha256": "a"})
    for number in range(10):
        if number not in finished:
            first = 10 * number
            write_shard(documents[first : first + 10], disk / "corpus", number, first, tokenizations, "{text}")
    docids = [document.id for document in documents]
    publish_manifest(disk / "corpus", docids, dataset_sha256="a", template="{text}", streams=[stream])
    return len(finished)

try:
    write()
    raise SystemExit("it fits")
except DiskFullError as error:
    print(error)
print(json.dumps(sorted(path.name for path in (disk / "corpus").glob("*.tar"))))
print(json.dumps(sorted(path.name for path in (disk / "corpus").glob(".*"))))
enlarge("10m")
print("finished before:", write())
print(CorpusShards.open(disk / "corpus", verify=True).num_documents)
"""


def test_writing_shards_stops_and_goes_on(tmp_path: Path) -> None:
    lines = run_on_small_disk(tmp_path / "disk", "120k", SHARDS).splitlines()
    assert lines[0].startswith("the disk is full: ")
    assert "/disk/corpus/00000" in lines[0]
    assert "bytes were free" in lines[0]
    assert "Remedy: make space" in lines[0]
    kept = json.loads(lines[1])
    assert 1 <= len(kept) < 10
    assert lines[2] == "[]", "nothing half-written stays"
    assert lines[3] in {f"finished before: {len(kept)}", f"finished before: {len(kept) - 1}"}
    assert lines[4] == "100"


EMBEDDINGS = """
import numpy as np
from shards.embeddings import EmbeddingStore, Stamp, part_is_complete, write_part
from shards.errors import DiskFullError
from shards.manifest import ShardEntry, shard_name

stamp = Stamp("000", "a" * 64, "b" * 64)
entries = [ShardEntry(shard_name(i), 1, "c" * 64, 100, 100 * i, "d" * 64, {"retriever": 1}) for i in range(5)]
def write():
    for entry in entries:
        if not part_is_complete(disk / "store", entry, stamp):
            write_part(disk / "store", entry, np.full((100, 64), entry.number, np.float32), stamp)
try:
    write()
    raise SystemExit("it fits")
except DiskFullError as error:
    print(error)
print(sum(part_is_complete(disk / "store", entry, stamp) for entry in entries))
enlarge("10m")
write()
print(sum(part_is_complete(disk / "store", entry, stamp) for entry in entries))
"""


def test_writing_embeddings_stops_and_goes_on(tmp_path: Path) -> None:
    lines = run_on_small_disk(tmp_path / "disk", "80k", EMBEDDINGS).splitlines()
    assert "needs about 25600 bytes" in lines[0]
    assert "part-00000" in lines[0]
    assert 1 <= int(lines[1]) < 5
    assert lines[2] == "5"
