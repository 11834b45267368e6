"""What a host tells of itself, the mark by which a folder is found to be shared, and the estimate of the space."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from transformers import T5Config

from engine.config.file import load_config
from engine.config.recipe import Config
from engine.models.random import make_random_model
from launcher.preflight import folder
from launcher.preflight.disks import check_models
from launcher.preflight.facts import ROOT, Needs, collect_facts, environment, sources_digest
from launcher.preflight.folder import leave_mark, look_for_mark, mount_of, remove_mark
from launcher.preflight.records import ModelSource, Mount
from launcher.preflight.space import Space, estimate_space
from shards.files import parse_record

R = TypeVar("R")
TINY = ROOT / "configs" / "tiny.yaml"


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "_PATIENCE_SECONDS", 0.1)


def config_of(tmp_path: Path, *words: str) -> Config:
    return load_config(TINY, [f"run.path={tmp_path}/run", *words])


# --- the shared folder -----------------------------------------------------------------------------------------------


def test_mark_is_seen_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a" / "run"
    mark = leave_mark(path)
    assert mark.made == [str(tmp_path / "a"), str(path)]
    facts = look_for_mark(path, mark)
    assert (facts.seen, facts.error) == (True, None)
    assert abs(facts.clock_seconds) < 5
    assert facts.free_bytes > 0
    assert [entry.name for entry in path.iterdir()] == [f".preflight-{mark.nonce}"]
    remove_mark(path, mark, keep_folder=True)
    assert list(path.iterdir()) == []
    remove_mark(path, mark, keep_folder=False)
    assert list(tmp_path.iterdir()) == []


def test_mark_of_another_file_system_is_not_seen(tmp_path: Path) -> None:
    mark = leave_mark(tmp_path / "here")
    facts = look_for_mark(tmp_path / "there" / "run", mark)
    assert facts.seen is False
    assert not (tmp_path / "there").exists(), "a host must not make the folder on its own disk"


def test_folder_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    mark = leave_mark(tmp_path / "file" / "run")
    assert "Not a directory" in mark.error
    facts = look_for_mark(tmp_path / "file" / "run", mark)
    assert facts.seen is None  # nobody can say


def test_what_another_start_works_on_stays(tmp_path: Path) -> None:
    for name in ("run.lock", "ledger.json"):
        (tmp_path / name).write_text("theirs")
    other, mark = leave_mark(tmp_path), leave_mark(tmp_path)
    old = tmp_path / ".preflight-0123"
    old.write_text("")
    os.utime(old, (1, 1))
    remove_mark(tmp_path, mark, keep_folder=False)
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {"run.lock", "ledger.json", f".preflight-{other.nonce}"}  # the killed one's mark is gone too
    assert (tmp_path / "run.lock").read_text() == "theirs"


def test_file_system_of_a_path_is_the_last_mounted_above_it() -> None:
    mounts = """\
21 1 8:1 / / rw - ext4 /dev/sda1 rw
40 21 0:50 / /shared rw,relatime shared:5 - nfs4 server:/export rw
41 40 0:51 / /shared/my\\040data rw - lustre mds@tcp:/lfs rw
42 21 0:52 / /sharedother rw - xfs /dev/sdb rw
"""
    assert mount_of(Path("/shared/run"), mounts) == Mount("nfs4", "server:/export", "/shared")
    assert mount_of(Path("/shared/my data/x"), mounts).type == "lustre"
    assert mount_of(Path("/home"), mounts).type == "ext4"
    assert mount_of(Path("/tmp"), "") is None


# --- a host ----------------------------------------------------------------------------------------------------------


def travelled(record: R) -> R:
    """Return a record as it arrives after a way as JSON."""
    return parse_record(json.loads(json.dumps(asdict(record))), type(record), "a record")  # type: ignore[call-overload]


def test_facts_of_this_host(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "corpus.jsonl").write_text("{}\n")
    config = config_of(tmp_path, f"data.path={data}", f"shards.cache={tmp_path}/cache")
    mark = leave_mark(config.run.path)
    facts = travelled(collect_facts(Needs.of(config), mark))
    assert facts.software["torch"] == torch.__version__
    assert facts.software["sources"] == sources_digest()
    assert facts.software["deepspeed"]
    assert facts.cores == len(os.sched_getaffinity(0))
    assert facts.user[0] == os.geteuid()
    assert (facts.data.files, facts.data.error) == (1, None)
    assert facts.run_folder.seen is True
    assert [place.purpose for place in facts.local] == ["temporary files", "shared memory", "shards.cache"]
    assert facts.models == [ModelSource("random", "made by the run")]
    assert travelled(Needs.of(config)) == Needs.of(config)
    (data / "more.jsonl").write_text("{}\n")
    assert collect_facts(Needs.of(config), mark).data.digest != facts.data.digest


def test_data_and_models_that_cannot_be_read_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = tmp_path / "model"
    model.mkdir()
    words = [f"data.path={tmp_path}/none", f"retriever.name={model}", "ranker.name=someone/a-model"]
    config = config_of(tmp_path, *words)
    facts = collect_facts(Needs.of(config), leave_mark(config.run.path))
    assert facts.data.error == "No such file or directory"
    assert "no config.json" in facts.models[0].error
    assert "HF_HUB_OFFLINE is set" in facts.models[1].error
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    facts = collect_facts(Needs.of(config), leave_mark(config.run.path))
    assert "each host will download it" in facts.models[1].warning


def test_a_model_may_have_its_transformers_in_folders_of_their_own(tmp_path: Path) -> None:
    """Symptom: a host was said to lack config.json of a model that every run takes."""
    model = tmp_path / "model"
    for tower in ("query", "document"):
        make_random_model(model / tower, ["what a host tells of itself"], hidden_size=8, num_heads=1)
    prefix = "sentence_transformers.models."
    (model / "modules.json").write_text(json.dumps([{"path": "", "type": f"{prefix}Router"}]))
    structure = {tower: [tower] for tower in ("query", "document")}
    router = {"types": dict.fromkeys(structure, f"{prefix}Transformer"), "structure": structure}
    (model / "router_config.json").write_text(json.dumps(router))
    config = config_of(tmp_path, f"retriever.name={model}", "ranker.name=random")
    facts = collect_facts(Needs.of(config), leave_mark(tmp_path / "run"))
    assert {found.name: found.error for found in facts.models} == {str(model): None, "random": None}
    (model / "query" / "config.json").unlink()
    facts = collect_facts(Needs.of(config), leave_mark(tmp_path / "run"))
    assert any("query has no config.json" in (found.error or "") for found in facts.models)


def test_a_model_that_no_run_takes_is_found_on_every_host(tmp_path: Path) -> None:
    """The preflight passed what the run then refused."""
    model = tmp_path / "model"
    T5Config(num_layers=1).save_pretrained(model)
    (model / "model.safetensors").touch()
    config = config_of(tmp_path, f"ranker.name={model}")
    facts = collect_facts(Needs.of(config), leave_mark(config.run.path))
    assert [found.error is None for found in facts.models] == [True, False]
    assert "encoder-decoder" in facts.models[1].error
    assert "ranker.name" in facts.models[1].remedy
    problems = check_models([facts]).problems
    assert [problem.remedy for problem in problems] == [facts.models[1].remedy]


def test_environment_holds_no_secret_and_nothing_that_may_differ() -> None:
    picked = environment(
        {
            "HF_TOKEN": "hf_secret",
            "HF_HOME": "/cache",
            "NCCL_DEBUG": "INFO",
            "NCCL_SOCKET_IFNAME": "eth0",
            "HOME": "/root",
            "UCX_TLS": "tcp",
            "AWS_SECRET_ACCESS_KEY": "x",
        }
    )
    assert picked == {"HF_HOME": "/cache", "NCCL_DEBUG": "INFO", "UCX_TLS": "tcp"}


def test_sources_differ_by_one_edit(tmp_path: Path) -> None:
    for name in ("engine", "launcher", "shards"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("x = 1\n")
    before = sources_digest(tmp_path)
    assert sources_digest(tmp_path) == before
    (tmp_path / "shards" / "a.py").write_text("x = 2\n")
    assert sources_digest(tmp_path) != before


# --- space -----------------------------------------------------------------------------------------------------------


def test_space_of_a_recipe_counts_what_is_there(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    space = estimate_space(config)
    assert {"token shards", "embeddings", "index", "checkpoints"} <= set(space.parts)
    assert min(space.parts.values()) >= 0
    assert space.unknown == ()
    config.run.path.mkdir()
    (config.run.path / "part").write_bytes(b"x" * 2**21)
    again = estimate_space(config)
    assert again.needed_bytes == space.needed_bytes - 2**21
    assert "2 MiB of which are there" in again.words


def test_space_of_a_large_corpus_is_more_than_its_embeddings(tmp_path: Path) -> None:
    corpus = tmp_path / "data" / "collection.tsv"
    corpus.parent.mkdir()
    with open(corpus, "wb") as file:
        file.truncate(650_000_000)  # a hole: it takes no space
    config = config_of(tmp_path, f"data.path={corpus.parent}", "index=auto")
    space = estimate_space(config)
    assert space.needed_bytes > 1_000_000 * 32 * 4
    assert space.parts["BM25 index"] > 1_000_000 * 40 * 6, "40 different words of 100 and more, 6 bytes each"
    assert "BM25 index" in space.words, "a disk without room for it is refused with these words"
    without = config_of(
        tmp_path, f"data.path={corpus.parent}", "index=auto", "bm25.enabled=false", "warmup_retriever.hard_negatives=0"
    )
    # The candidates of the warm-up, which nothing draws, are gone as well.
    assert estimate_space(without).needed_bytes < space.needed_bytes - space.parts["BM25 index"]


def test_space_says_what_it_does_not_know(tmp_path: Path) -> None:
    config = config_of(tmp_path, f"data.path={tmp_path}/none", "retriever.name=someone/not-here")
    assert estimate_space(config) == Space({}, ("the retriever's weights", "the corpus"))
    with_lists = config_of(tmp_path, "index.factory=IVF900,PQ8x4")
    assert estimate_space(with_lists).unknown == ("the index",)


def test_what_is_there_is_not_needed_again() -> None:
    assert Space({"a": 5}, present_bytes=9).needed_bytes == 0
