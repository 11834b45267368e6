"""What is known of a host, as records: JSON between processes, checked where it arrives.

What nobody has examined on a host is None; the checks leave it out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What was judged where it was found: the state of things, and (fact, remedy, severity) of each problem."""

    found: str = ""
    problems: list[tuple[str, str, Severity]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Mark:
    """A file with a random name in the run folder, left by one host for the others to find."""

    nonce: str
    made: list[str]
    """Folders that had to be made for it, outermost first."""
    error: str | None
    """Why there is no file; None where there is one."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A file system: `type` such as nfs4, `source` such as `server:/export`, `point` where it is mounted."""

    type: str
    source: str
    point: str


@dataclass(frozen=True, slots=True)
class SharedFolder:
    """The run folder, seen from a host."""

    path: str
    seen: bool | None = None
    """Whether the mark is there; None where there is none to be seen."""
    error: str | None = None
    """Why this host cannot write there."""
    clock_seconds: float | None = None
    """How far the file system's clock is ahead of this host's."""
    free_bytes: int | None = None
    free_inodes: int | None = None
    """None: not limited, or not known."""
    mount: Mount | None = None


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder that each host has for itself."""

    purpose: str
    path: str
    free_bytes: int
    error: str | None


@dataclass(frozen=True, slots=True)
class OwnFolder:
    """`index.local_folder`, which is to be on each host's own disk."""

    path: str
    mark: Mark | None = None
    """Left there for the other hosts to look for; None where it could not be tried."""
    error: str | None = None
    """Why it cannot be used here."""
    free_bytes: int = 0
    present_bytes: int = 0
    """Of the same run, which count as written."""
    mount: Mount | None = None
    seen_of: list[str] = field(default_factory=list)
    """Other hosts whose marks are there: it is one folder."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Names of those whose marks are in a folder."""

    of: list[str]


@dataclass(frozen=True, slots=True)
class DataFolder:
    """The data, seen from a host."""

    path: str
    files: int = 0
    digest: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a host has a model: `folder`, `cache`, `hub` or `made by the run`."""

    name: str
    where: str
    digest: str | None = None
    error: str | None = None
    warning: str | None = None
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU; `free_bytes` is None where it was not measured."""

    name: str
    memory_bytes: int
    free_bytes: int | None


@dataclass(frozen=True, slots=True)
class Interfaces:
    """The (interface, address) pairs by which ranks of other hosts may come, or why there are none."""

    found: list[tuple[str, str]]
    error: str | None


@dataclass(frozen=True, slots=True)
class Clock:
    """How far a host's clock is ahead of the first host's."""

    offset_seconds: float
    uncertainty_seconds: float


@dataclass(frozen=True, slots=True)
class Collective:
    """A small collective operation on one rank: why it failed, or None, and how long it took."""

    error: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Listening:
    """Where a host listens, and at which (interface, address) pairs it might be reached."""

    port: int
    addresses: list[tuple[str, str]]
    first_told: str | None
    """The first word of `hostname -I`; None where there is none."""


@dataclass(frozen=True, slots=True)
class RankFacts:
    """What a rank knows of itself."""

    rank: int
    device: str
    collective: Collective
    free_bytes: int | None = None
    """On its GPU."""
    cores: list[int] = field(default_factory=list)
    """That it may use."""
    configuration: list[str] = field(default_factory=list)
    """What it has read differently from rank 0, one text a difference."""


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """Why a host cannot be asked, and what to do."""

    fact: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known of one host."""

    host: str
    """The name by which it is told."""
    way: str = ""
    """How it was reached, such as `ssh`."""
    unreachable: NoAnswer | None = None
    """Nothing else is known of it then."""
    boots: list[str] = field(default_factory=list)
    """The kernel's id of the last start, of each machine that calls itself by this name."""
    software: dict[str, str | None] | None = None
    """Package -> version, None where it is not installed; python, sources (a hash), MPI, NCCL, CUDA."""
    errors: dict[str, str] = field(default_factory=dict)
    """Import errors, by package."""
    user: tuple[int, str] | None = None
    cores: int | None = None
    memory_bytes: int | None = None
    gpus: list[Gpu] | None = None
    driver: str | None = None
    gpu_error: str | None = None
    slots: int | None = None
    """Processes that it is to take."""
    device: str | None = None
    """`run.device`, where no rank has come yet."""
    refresh_devices: int = 0
    """Devices that are kept for refreshes, likewise."""
    refreshers: Judgement | None = None
    """Whether they are there, where ranks have come; None where none are kept."""
    run_folder: SharedFolder | None = None
    local: list[LocalFolder] | None = None
    own_folder: OwnFolder | None = None
    """Where embeddings are kept on the hosts; None where they are not."""
    data: DataFolder | None = None
    """None where the run makes its own."""
    models: list[ModelSource] | None = None
    environment: dict[str, str] | None = None
    """Variables that should be alike."""
    interfaces: Interfaces | None = None
    clock: Clock | None = None
    configuration: list[str] | None = None
    """What its ranks read differently from rank 0."""
    ranks: list[RankFacts] | None = None
    programs: Judgement | None = None
    network: Judgement | None = None
    barrier: Judgement | None = None
    world: Judgement | None = None
