"""Which devices of a host are kept for refreshes, as the starters show them."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.errors import ConfigError
from launcher.world import refreshers
from launcher.world.opening import _share_cores
from launcher.world.refreshers import kept_gpus, refreshers_of, told_of, visible_gpus


def world(device: str, *, first: bool = True, ranks: int = 3) -> Any:
    coordinator = SimpleNamespace(is_first_of_host=first, ranks_of_host=list(range(ranks)))
    return SimpleNamespace(device=torch.device(device), coordinator=coordinator)


def test_the_ranks_have_the_first_that_are_visible() -> None:
    assert kept_gpus(["0", "1", "2", "3"], [], num_ranks=2, wanted=1) == ["2"]
    assert kept_gpus(["4", "7", "1"], [], num_ranks=1, wanted=2) == ["7", "1"]
    assert kept_gpus(["0", "1"], ["GPU-a", "GPU-b"], num_ranks=2, wanted=2) == ["GPU-a", "GPU-b"], "deepspeed's slots"
    assert kept_gpus(["0", "1", "2"], ["GPU-a"], num_ranks=2, wanted=2) == ["2", "GPU-a"]


@pytest.mark.parametrize(
    ("shown", "num_ranks", "wanted", "remedy"),
    [
        (8, 8, 2, "start 6 ranks on each host"),
        (8, 7, 2, "start 6 ranks on each host"),
        (2, 1, 2, "set ar2.refresh_devices to 1 at most"),
        (1, 1, 1, "set ar2.overlap=ranker"),
    ],
)
def test_too_few_are_told_with_what_helps(shown: int, num_ranks: int, wanted: int, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"of the {shown} here {num_ranks} rank.*{remedy}"):
        kept_gpus([str(number) for number in range(shown)], [], num_ranks=num_ranks, wanted=wanted)


def test_gpus_are_called_as_the_variable_calls_them() -> None:
    assert visible_gpus({}, 2) == ["0", "1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, 0) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "5, GPU-1f,6"}, 3) == ["5", "GPU-1f", "6"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3,-1,2"}, 1) == ["3"], "CUDA ends at the first that is none"


def test_the_first_rank_of_a_host_has_them_and_with_them_the_threads_of_the_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Symptom: two processes would make the index with the threads that six ranks leave to each other."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CROSS_SIZE", raising=False)
    found = refreshers_of(world("cuda"), 2)
    assert [(one.device, one.environ) for one in found] == [
        ("cuda:0", {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "6"}) for gpu in ("3", "4")
    ]
    assert told_of(found) == "GPU 3, GPU 4"
    bound = refreshers_of(world("cuda"), 1, [[4, 5], [6, 7], [0], [8]])
    assert bound[0].cores == (0, 4, 5, 6, 7), "its rank is bound to two of them, and the fourth is on another host"
    assert told_of(refreshers_of(world("cpu"), 1)) == "1 companion of each host"
    assert refreshers_of(world("cuda", first=False), 2) == ()
    assert refreshers_of(world("cuda"), 0) == ()
    assert [(one.device, one.environ) for one in refreshers_of(world("cpu"), 2)] == [("cpu", {})] * 2
    with pytest.raises(ConfigError, match="start 2 ranks"):
        refreshers_of(world("cuda"), 3)


def test_deepspeed_shows_its_ranks_no_more_than_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Symptom: a host of four GPUs, two of them slots, would be said to have none for the refresh."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    of_number = ("1f-0", "1f-2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=of_number[number]))
    told = "GPU-1f-0\nGPU-1f-1\nGPU-1f-2\nGPU-1f-3\n"
    monkeypatch.setattr(refreshers.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=told))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("CROSS_SIZE", raising=False)
    with pytest.raises(ConfigError, match="of the 2 here 2 ranks leave 0"):
        refreshers_of(world("cuda", ranks=2), 2)  # started by somebody else, who has hidden the others
    monkeypatch.setenv("CROSS_SIZE", "1")
    found = refreshers_of(world("cuda", ranks=2), 2)
    assert [one.environ["CUDA_VISIBLE_DEVICES"] for one in found] == ["GPU-1f-1", "GPU-1f-3"]

    monkeypatch.setenv("SPARRING_REFRESH_GPUS", "5,7")  # of those that the one who started has chosen
    found = refreshers_of(world("cuda", ranks=2), 1)
    assert [one.environ["CUDA_VISIBLE_DEVICES"] for one in found] == ["5"]
    monkeypatch.delenv("SPARRING_REFRESH_GPUS")

    def absent(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(refreshers.subprocess, "run", absent)
    with pytest.raises(ConfigError, match="leave 0"):
        refreshers_of(world("cuda", ranks=2), 2)


def test_on_cpus_companions_have_their_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Symptom: beside the training, twice as many threads would compute as there are cores."""
    environ: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    meeting: Any = SimpleNamespace(gather=lambda _, own: [own] * 3, hosts=["a", "a", "b"], rank=0)
    for companions in (0, 1, 2, 50):
        environ.clear()
        _share_cores(meeting, companions)
    assert given == [6, 4, 3, 1]
