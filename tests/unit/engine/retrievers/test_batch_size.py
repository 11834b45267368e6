"""The largest batch: an encoder that runs out of memory, through the forward that encodes a corpus; ranks agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertTokenizer

from engine.config.sections import IndexConfig
from engine.config.timetable import WeightsOf
from engine.coordination.coordinator import Coordinator
from engine.errors import ConfigError, ModelError
from engine.models import largest_batch
from engine.models.encode import embeddings_of
from engine.models.largest_batch import BatchTrial, fastest_of
from engine.models.template import InputTemplate
from engine.retrievers.batch_size import agreed_tokens, tokens_per_batch, trials_of
from engine.run import Run, Stage
from tests.threads_as_ranks import on_ranks

Open = Callable[..., Run]
CPU, MAX_LENGTH = torch.device("cpu"), 16
VOCAB = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"])}


class Device:
    """An encoder on a device with memory for so many tokens, whose clock it moves by what a batch takes."""

    def __init__(self, limit: int, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> None:
        self.batches: list[tuple[int, ...]] = []
        self._limit, self._seconds, self._now = limit, seconds, 0.0
        monkeypatch.setattr(largest_batch, "time", SimpleNamespace(perf_counter=lambda: self._now))

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        self.batches.append(tuple(ids.shape))
        if ids.numel() > self._limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self._now += self._seconds(ids.numel())
        return ids.float().sum(1, keepdim=True) + torch.arange(3.0)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> InputTemplate:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(VOCAB))
    return InputTemplate.from_tokenizer(BertTokenizer(str(path)))


def tried(template: InputTemplate, encoder: Device, first: int = 128) -> list[BatchTrial]:
    text = SimpleNamespace(template=template, stream="s")
    shards = SimpleNamespace(num_documents=3, tokens=lambda number, stream: np.array([5, 6, 5][: number + 1]))
    data: Any = SimpleNamespace(texts={"retriever": text}, shards=shards)
    return trials_of(data, "retriever", encoder, lambda rows: rows, CPU, max_length=MAX_LENGTH, first=first)


def test_batches_double_until_the_memory_ends(template: InputTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(3000, monkeypatch, lambda tokens: 1.0 + tokens / 1e6)  # a launch takes most of the time
    trials = tried(template, device)
    assert [(one.tokens, one.tokens_per_second is None) for one in trials] == [
        *((128, False), (256, False), (512, False), (1024, False), (2048, False), (4096, True)),
    ]
    assert {length for _, length in device.batches} == {MAX_LENGTH}, "the longest inputs, which take most memory"
    assert device.batches[-1] == (4096 // MAX_LENGTH, MAX_LENGTH), "once, where it fails"
    assert fastest_of(trials) == 2048


def test_a_larger_batch_that_is_no_faster_is_not_taken(
    template: InputTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Beyond 512 tokens a device is full.
    trials = tried(template, Device(10**9, monkeypatch, lambda tokens: max(tokens, 512) / 1e4))
    assert [one.tokens for one in trials] == [128, 256, 512, 1024]
    assert fastest_of(trials) == 512


def test_a_first_batch_that_does_not_fit_is_halved(template: InputTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = tried(template, Device(300, monkeypatch, lambda tokens: 1.0), first=1000)
    assert [(one.tokens, one.tokens_per_second is None) for one in trials] == [(1000, True), (500, True), (250, False)]
    assert fastest_of(trials) == 250
    with pytest.raises(ModelError, match="no memory to encode 128 tokens at once"):
        tried(template, Device(100, monkeypatch, lambda tokens: 1.0), first=1000)


def test_an_error_that_is_not_of_memory_is_not_taken_for_one(
    template: InputTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(tokens: int) -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        tried(template, Device(10**9, monkeypatch, fails))


def test_ranks_take_what_the_smallest_device_takes_and_a_later_start_the_same(open_run: Open) -> None:
    asked: list[int] = []

    def find(coordinator: Coordinator, limits: tuple[int, ...], device: str = "H100") -> int:
        run = open_run("run.force_resume=true")
        run.coordinator.close()
        run.coordinator = coordinator

        def trial() -> list[BatchTrial]:
            asked.append(coordinator.rank)
            return [BatchTrial(512, 1.0), BatchTrial(limits[coordinator.rank], 2.0)]

        return agreed_tokens(Stage(run, "encode/001"), "retriever", device, trial)

    assert on_ranks(2, lambda coordinator: find(coordinator, (4096, 2048))) == [2048, 2048]
    assert sorted(asked) == [0, 1]
    kept = json.loads((open_run("run.force_resume=true").folder.path / "encode_batches.json").read_text())
    assert kept == {"models": {"retriever": {"tokens": 2048, "device": "H100"}}}
    assert on_ranks(2, lambda coordinator: find(coordinator, (9, 9))) == [2048, 2048]
    assert len(asked) == 2, "what is known is not tried again"
    assert on_ranks(1, lambda coordinator: find(coordinator, (1024,), "A100")) == [1024], "another device is"


def test_without_a_gpu_auto_is_the_default_and_makes_no_trial(open_run: Open) -> None:
    def never() -> Any:
        raise AssertionError("the encoder is not asked for")

    for words, expected in (
        (("index.tokens_per_batch=auto", "evaluation.tokens_per_batch=4096"), 4096),
        (("evaluation.tokens_per_batch=4096",), 4096),
        (("index.tokens_per_batch=256", "evaluation.tokens_per_batch=4096"), 256),
    ):
        stage = Stage(open_run(*words, "run.force_resume=true"), "encode/001")
        data: Any = None
        assert tokens_per_batch(stage, data, WeightsOf("retriever", 1), never, lambda rows: rows) == expected
    with pytest.raises(ConfigError, match="tokens_per_batch"):
        open_run("index.tokens_per_batch=64", "run.force_resume=true")
    assert IndexConfig().tokens_per_batch is None


def test_embeddings_do_not_depend_on_the_batch(template: InputTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(10**9, monkeypatch, lambda tokens: 1.0)
    ids = [np.array([5] * length, dtype=np.uint32) for length in (3, 9, 1, 14, 7)]
    found = [
        embeddings_of(device, template, ids, MAX_LENGTH, tokens, "float32", CPU, lambda *_: None)
        for tokens in (16, 1024)
    ]
    np.testing.assert_array_equal(found[0], found[1])
