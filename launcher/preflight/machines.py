"""Judges what the machines are: reachable, alike in software, devices, users, clocks and variables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from launcher.preflight.outcome import Groups, Outcome, Problem, having
from launcher.preflight.records import Facts, Gpu
from launcher.preflight.space import Space
from shards.errors import counted
from shards.files.sizes import size

CLOCK_WARNING_SECONDS, CLOCK_ERROR_SECONDS = 5.0, 60.0
_ALIKE = 0.05
"""Share by which memories of like hosts may differ."""
_USED = 0.1
"""Share of a GPU's memory above which somebody else is on it."""
_SHOWN = ("sparring", "torch", "deepspeed", "faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "MPI", "NCCL")


def check_reach(hosts: Sequence[Facts]) -> Outcome:
    """Find hosts that did not answer, and machines that cannot be told apart."""
    problems = [
        Problem("reach", (facts.host,), facts.unreachable.fact, facts.unreachable.remedy)
        for facts in hosts
        if facts.unreachable is not None
    ]
    for facts in hosts:
        if len(set(facts.boots)) > 1:
            fact = f"{len(set(facts.boots))} machines call themselves so, by which the ranks of a host are found"
            remedy = "give each machine a host name of its own (hostnamectl set-hostname NAME)"
            problems.append(Problem("reach", (facts.host,), fact, remedy))
    answered = sum(facts.unreachable is None for facts in hosts)
    found = f"{answered} of {counted(len(hosts), 'host')}"
    ways = sorted({facts.way for facts in hosts if facts.way})
    if ways:
        found += f" by {', '.join(ways)}"
    return Outcome("reach", found, problems, tuple(facts.host for facts in hosts))


def check_software(hosts: Sequence[Facts]) -> Outcome:
    """Find versions that differ, and packages that do not load."""
    known, examined = having(hosts, lambda facts: facts.software)
    problems = []
    repair = "repair the environment on this host (reinstall the package), or share one environment by all hosts"
    for facts, _ in known:
        for package, error in facts.errors.items():
            fact = f"{package} cannot be imported: {error}"
            problems.append(Problem("software", (facts.host,), fact, repair))
    for package in dict.fromkeys(package for _, software in known for package in software):
        groups = Groups((facts.host, software.get(package)) for facts, software in known)
        if not groups.unlike:
            continue
        fact, remedy = (
            f"{package} is unlike: {groups}",
            "install the same version on all hosts, or share one environment",
        )
        if package == "sources":
            fact = f"the code of Sparring itself is unlike: {groups} (a hash of its files)"
            remedy = "run from one checkout that all hosts share, or bring all of them to the same commit"
        problems.append(Problem("software", groups.outliers, fact, remedy))
    told = known[0][1] if known else {}
    found = ", ".join(str(told[name]) if name == "MPI" else f"{name} {told[name]}" for name in _SHOWN if told.get(name))
    return Outcome("software", "unlike" if problems else found, problems, examined)


def check_devices(hosts: Sequence[Facts]) -> Outcome:
    """Find GPUs that are not seen, unlike, in use by others, or fewer than processes and what refreshes keep."""
    known, examined = having(hosts, lambda facts: facts.gpus)
    problems = []
    for facts, gpus in known:
        if facts.gpu_error:
            remedy = "look at nvidia-smi on this host: the driver must be loaded, and as new as torch's CUDA wants it"
            problems.append(Problem("devices", (facts.host,), facts.gpu_error, remedy))
        problems += _slots(facts, len(gpus))
        problems += _memory_in_use(facts.host, gpus)
    bare = tuple(facts.host for facts, gpus in known if not gpus)
    if 0 < len(bare) < len(known):
        remedy = "look at nvidia-smi and CUDA_VISIBLE_DEVICES there, or leave these hosts out"
        problems.append(Problem("devices", bare, "no GPU is seen, where other hosts have some", remedy))
    groups = Groups((facts.host, _gpu_words(gpus)) for facts, gpus in known if gpus)
    if groups.unlike:
        remedy = "choose hosts with the same GPUs: the slowest sets the pace, the smallest the batch"
        problems.append(Problem("devices", groups.outliers, f"GPUs are unlike: {groups}", remedy, "warning"))
    drivers = Groups((facts.host, facts.driver) for facts, gpus in known if gpus)
    if drivers.unlike:
        fact = f"GPU drivers are unlike: {drivers}"
        problems.append(Problem("devices", drivers.outliers, fact, "bring them to one version", "warning"))
    found = Groups((facts.host, _gpu_words(gpus)) for facts, gpus in known)
    return Outcome(
        "devices", "unlike" if found.unlike else _gpu_words(known[0][1]) if known else "", problems, examined
    )


def _gpu_words(gpus: Sequence[Gpu]) -> str:
    if not gpus:
        return "CPU"
    kinds = {f"{gpu.name} {size(gpu.memory_bytes)}" for gpu in gpus}
    return f"{len(gpus)} x {' and '.join(sorted(kinds))}"


def _slots(facts: Facts, gpus: int) -> list[Problem]:
    """Compare the processes that a host is to take with what it has for them."""
    slots, kept, host = facts.slots, facts.refresh_devices, (facts.host,)
    if slots is None:
        return []
    beside = f", of which ar2.refresh_devices keeps {kept} for the refresh" if kept else ""
    if facts.device == "cuda" and not gpus:
        remedy = "look at nvidia-smi and at CUDA_VISIBLE_DEVICES there, and whether torch was built with CUDA"
        return [Problem("devices", host, "run.device is cuda, but torch sees no GPU here", remedy)]
    if gpus and facts.device != "cpu":
        fact = f"{slots} process(es) are to start here (slots), but there are {gpus} GPU(s){beside}"
        free = gpus - kept
        if slots > free:
            fewer = f"write slots={free}" if free > 0 else "set ar2.overlap=ranker and leave ar2.refresh_devices out"
            remedy = f"{fewer}, or make the missing GPUs visible (CUDA_VISIBLE_DEVICES)"
            return [Problem("devices", host, fact, remedy)]
        if slots < free:
            return [Problem("devices", host, fact, f"write slots={free} to use all of them", "warning")]
    elif facts.cores is not None and slots + kept > facts.cores:
        fact = f"{slots} processes are to start here (slots), but there are {facts.cores} cores{beside}"
        return [Problem("devices", host, fact, f"write slots={max(1, facts.cores - kept)} or less", "warning")]
    return []


def _memory_in_use(host: str, gpus: Sequence[Gpu]) -> list[Problem]:
    used = []
    for number, gpu in enumerate(gpus):
        taken = 0 if gpu.free_bytes is None else gpu.memory_bytes - gpu.free_bytes
        if taken > _USED * gpu.memory_bytes:
            used.append(f"GPU {number} has {size(taken)} of {size(gpu.memory_bytes)} in use")
    if not used:
        return []
    remedy = "see with nvidia-smi whose process it is; end it, or choose other GPUs with CUDA_VISIBLE_DEVICES"
    return [Problem("devices", (host,), "; ".join(used), remedy, "warning")]


def check_index(hosts: Sequence[Facts], space: Space | None) -> Outcome:
    """Find hosts whose FAISS has no GPUs for an index that must be there, and tell where it will be.

    Args:
        hosts: Facts of each host.
        space: Has the index; None where it was not estimated.
    """
    index = None if space is None else space.index
    known, examined = having(hosts, _faiss_with_gpus)
    if index is None or not (index.required or any(able for _, able in known)):
        return Outcome("index", "")
    problems = []
    if index.required and index.obstacle:
        problems.append(Problem("index", examined, f"index.gpu is always, but {index.obstacle}", index.remedy))
    if index.required and (without := tuple(facts.host for facts, able in known if not able)):
        fact = "index.gpu is always, but there is no GPU, or no FAISS that works on it"
        remedy = "install faiss-gpu or faiss-gpu-cuvs in place of faiss-cpu where a GPU is, or set index.gpu=auto"
        problems.append(Problem("index", without, fact, remedy))
    place = f"on CPUs: {index.obstacle}" if index.obstacle else "by FAISS on each rank's GPU"
    return Outcome("index", "cannot be on GPUs" if problems else f"{index.factory} {place}", problems, examined)


def _faiss_with_gpus(facts: Facts) -> bool | None:
    """Tell whether a host has GPUs and a FAISS for them; None where that is not known."""
    if facts.software is None or facts.gpus is None:
        return None
    return bool(facts.gpus) and any(facts.software.get(name) for name in ("faiss-gpu", "faiss-gpu-cuvs"))


def check_cores_and_memory(hosts: Sequence[Facts]) -> Outcome:
    """Find hosts with fewer cores or less memory than the others."""
    known, examined = having(hosts, _cores_and_memory)
    if not known:
        return Outcome("cores, memory", "")
    problems = []
    groups = Groups((facts.host, cores) for facts, (cores, _) in known)
    if groups.unlike:
        fact = f"numbers of cores are unlike: {groups}"
        remedy = (
            "look whether the scheduler gives all that a host has (srun --cpus-per-task, mpirun --bind-to none); else "
            "the host with the fewest sets the pace"
        )
        problems.append(Problem("cores, memory", groups.outliers, fact, remedy, "warning"))
    middle = statistics.median_high(memory for _, (_, memory) in known)
    if less := [(facts.host, memory) for facts, (_, memory) in known if memory < (1 - _ALIKE) * middle]:
        fact = f"less memory than elsewhere: {size(less[0][1])}, others have {size(middle)}"
        remedy = "choose index.memory_gib by the smallest host"
        problems.append(Problem("cores, memory", tuple(host for host, _ in less), fact, remedy, "warning"))
    cores, memory = known[0][1]
    found = f"{counted(cores, 'core')}, {size(memory)}"
    return Outcome("cores, memory", "unlike" if problems else found, problems, examined)


def _cores_and_memory(facts: Facts) -> tuple[int, int] | None:
    return None if facts.cores is None or facts.memory_bytes is None else (facts.cores, facts.memory_bytes)


def check_user(hosts: Sequence[Facts]) -> Outcome:
    """Find processes that belong to somebody else."""
    known, examined = having(hosts, lambda facts: facts.user)
    groups = Groups((facts.host, f"{name} ({number})") for facts, (number, name) in known)
    problems = []
    if groups.unlike:
        remedy = "log in as the same user with the same number on all hosts, or files of one are closed to the others"
        problems.append(Problem("user", groups.outliers, f"users are unlike: {groups}", remedy, "warning"))
    return Outcome("user", "unlike" if problems else str(groups.members[0][0]) if known else "", problems, examined)


def check_environment(hosts: Sequence[Facts]) -> Outcome:
    """Find variables that decide on networks, devices or caches and differ."""
    known, examined = having(hosts, lambda facts: facts.environment)
    problems = []
    variables = sorted({name for _, environment in known for name in environment})
    for variable in variables:
        groups = Groups(
            (facts.host, f"={value}" if (value := environment.get(variable)) is not None else "not set")
            for facts, environment in known
        )
        if groups.unlike:
            remedy = "set it alike on all hosts, unless it has to differ (such as the name of an interface)"
            fact = f"{variable} is unlike: {groups}"
            problems.append(Problem("environment", groups.outliers, fact, remedy, "warning"))
    compared = f"{counted(len(variables), 'variable')} compared"
    return Outcome("environment", compared, problems, examined)


def check_clock(hosts: Sequence[Facts]) -> Outcome:
    """Find clocks that are apart from the first host's, or from that of the run folder's file system."""
    known, examined = having(hosts, lambda facts: facts.clock)
    problems, largest = [], 0.0
    for facts, clock in known:
        largest = max(largest, abs(clock.offset_seconds))
        first = f"that of {known[0][0].host}"
        problems += _clock_problem(facts.host, clock.offset_seconds, clock.uncertainty_seconds, first)
        ahead = facts.run_folder.clock_seconds if facts.run_folder else None
        if ahead is not None:
            problems += _clock_problem(facts.host, -ahead, 0.0, "that of the run folder's file system")
    return Outcome("clock", f"{largest:.3f} s apart at most", problems, examined)


def _clock_problem(host: str, offset: float, uncertainty: float, other: str) -> list[Problem]:
    least = abs(offset) - uncertainty
    if least <= CLOCK_WARNING_SECONDS:
        return []
    fact = f"the clock is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} {other}"
    remedy = "set the clocks by one server (timedatectl set-ntp true, or chrony)"
    return [Problem("clock", (host,), fact, remedy, "error" if least > CLOCK_ERROR_SECONDS else "warning")]
