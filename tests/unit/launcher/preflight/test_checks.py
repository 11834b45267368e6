"""Each problem that a preflight can find, from made-up facts: found, told with its host and remedy, and never alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from launcher.preflight.checks import examine
from launcher.preflight.connections import judge_network, judge_programs
from launcher.preflight.outcome import Outcome
from launcher.preflight.records import Facts, Interfaces, Judgement, Listening, NoAnswer
from launcher.preflight.report import listing, problems, table, verdict
from launcher.preflight.space import PlannedIndex, Space
from shards.files import parse_record

GIB = 2**30
Change = Callable[[dict[str, Any]], object]


def host(name: str, *changes: Change) -> Facts:
    """A host on which all is well, then changed."""
    facts: dict[str, Any] = {
        "host": name,
        "boots": [f"boot of {name}"] * 2,
        "software": {
            "python": "3.11.7",
            "sources": "0a1b",
            "sparring": "0.1.0",
            "torch": "2.13.0",
            "MPI": "Open MPI v5",
        },
        "errors": {},
        "configuration": [],
        "user": [1000, "ada"],
        "cores": 64,
        "memory_bytes": 512 * GIB,
        "gpus": [gpu(), gpu()],
        "driver": "580.1",
        "gpu_error": None,
        "slots": 2,
        "device": "auto",
        "run_folder": {
            "path": "/shared/run",
            "seen": True,
            "error": None,
            "free_bytes": 100 * GIB,
            "free_inodes": None,
            "mount": {"type": "nfs4", "source": "server:/home", "point": "/shared"},
            "clock_seconds": 0.01,
        },
        "local": [
            {"purpose": "temporary files", "path": "/tmp", "free_bytes": 9 * GIB, "error": None},
            {"purpose": "shared memory", "path": "/dev/shm", "free_bytes": 99 * GIB, "error": None},
        ],
        "data": {"path": "/shared/data", "files": 4, "digest": "d1", "error": None},
        "models": [{"name": "bert", "where": "cache", "digest": "m1", "error": None, "warning": None}],
        "environment": {"NCCL_DEBUG": "WARN"},
        "clock": {"offset_seconds": 0.0, "uncertainty_seconds": 0.001},
        "network": {"found": "", "problems": []},
        "ranks": [{"rank": 0, "device": "cuda:0", "collective": {"error": None, "seconds": 0.01}}],
        "barrier": {"found": "", "problems": []},
        "refreshers": {"found": "", "problems": []},
    }
    for change in changes:
        change(facts)
    return parse_record(facts, Facts, "made-up facts")


def gpu(name: str = "A100", memory: int = 80 * GIB, free: int | None = None) -> dict[str, Any]:
    return {"name": name, "memory_bytes": memory, "free_bytes": memory if free is None else free}


def put(path: str, value: Any) -> Change:
    """Return a change that sets the fact at a dotted path; numbers are places in a list."""

    def change(facts: dict[str, Any]) -> None:
        node: Any = facts
        *parents, leaf = path.split(".")
        for parent in parents:
            node = node[int(parent) if isinstance(node, list) else parent]
        node[int(leaf) if isinstance(node, list) else leaf] = value

    return change


def found_in(outcomes: list[Outcome]) -> list[tuple[str, tuple[str, ...], str, str]]:
    return [(p.check, p.hosts, str(p), p.severity) for outcome in outcomes for p in outcome.problems]


def test_where_all_is_well_there_is_nothing_to_tell() -> None:
    hosts = [host("a"), host("b"), host("c")]
    outcomes = examine(hosts, Space({"shards": GIB}))
    assert found_in(outcomes) == []
    assert verdict(outcomes) == f"all {len(outcomes)} checks passed"
    rows = table(outcomes, ["a", "b", "c"]).splitlines()
    assert [row.split()[0] for row in rows[2:] if "ok" in row][:2] == ["reach", "software"]
    assert "PROBLEM" not in table(outcomes, ["a", "b", "c"])
    assert "-" not in [cell for row in rows[2:] for cell in row.split()[1:4]]


PROBLEMS = [
    ("software", "error", put("software.torch", "2.12.0"), "torch is unlike: 2.13.0 on a, c; 2.12.0 on b"),
    ("software", "error", put("software.torch", None), "torch is unlike: 2.13.0 on a, c; none on b"),
    ("software", "error", put("software.sources", "ffff"), "the code of Sparring itself is unlike: 0a1b on a, c; ffff"),
    ("software", "error", put("software.MPI", "MPICH 4"), "MPI is unlike: Open MPI v5 on a, c; MPICH 4 on b"),
    ("software", "error", put("errors", {"faiss": "ImportError: libgomp"}), "faiss cannot be imported: ImportError"),
    ("configuration", "error", put("configuration", ["data.path: '/x' -> '/y'"]), "rank 0's: data.path: '/x' -> '/y'"),
    ("devices", "error", put("gpus", []), "no GPU is seen, where other hosts have some"),
    ("devices", "error", put("gpu_error", "CUDA driver is too old"), "CUDA driver is too old"),
    ("devices", "error", put("slots", 3), "3 process(es) are to start here (slots), but there are 2 GPU(s)"),
    ("devices", "warning", put("slots", 1), "1 process(es) are to start here (slots), but there are 2 GPU(s)"),
    ("devices", "error", put("refresh_devices", 1), "2 GPU(s), of which ar2.refresh_devices keeps 1 for the refresh"),
    (
        "refresh",
        "error",
        put("refreshers", {"found": "", "problems": [["none is left", "keep fewer", "error"]]}),
        "none is left",
    ),
    ("devices", "warning", put("gpus", [gpu("V100", 32 * GIB)] * 2), "2 x A100 80 GiB on a, c; 2 x V100 32 GiB on b"),
    ("devices", "warning", put("gpus.1.free_bytes", 40 * GIB), "GPU 1 has 40 GiB of 80 GiB in use"),
    ("devices", "warning", put("driver", "550.2"), "GPU drivers are unlike: 580.1 on a, c; 550.2 on b"),
    ("cores, memory", "warning", put("cores", 32), "numbers of cores are unlike: 64 on a, c; 32 on b"),
    (
        "cores, memory",
        "warning",
        put("memory_bytes", 256 * GIB),
        "less memory than elsewhere: 256 GiB, others have 512",
    ),
    ("user", "warning", put("user", [1001, "ada"]), "users are unlike: ada (1000) on a, c; ada (1001) on b"),
    ("run folder", "error", put("run_folder.seen", False), "/shared/run is not the folder of a: a file written there"),
    ("run folder", "error", put("run_folder.error", "Permission denied"), "/shared/run cannot be written: Permission"),
    ("run folder", "error", put("run_folder.free_inodes", 12), "there is room for 12 more files only"),
    ("local disk", "error", put("local.0.error", "Read-only file system"), "/tmp (temporary files) cannot be written"),
    ("local disk", "error", put("local.0.free_bytes", 2**20), "1 MiB are free in /tmp (temporary files)"),
    ("local disk", "error", put("local.1.error", "Permission denied"), "/dev/shm (shared memory) cannot be written"),
    (
        "local disk",
        "warning",
        put("local.1.free_bytes", 64 * 2**20),
        "64 MiB are free in /dev/shm (shared memory), thr",
    ),
    ("data", "error", put("data.error", "No such file or directory"), "/shared/data cannot be read: No such file"),
    ("data", "error", put("data.digest", "d2"), "/shared/data holds other files than elsewhere"),
    ("models", "error", put("models.0.error", "not in the cache"), "bert: not in the cache"),
    ("models", "warning", put("models.0.warning", "each host will download it"), "bert: each host will download it"),
    ("models", "error", put("models.0.digest", "m2"), "bert is not the same everywhere"),
    ("environment", "warning", put("environment", {}), "NCCL_DEBUG is unlike: =WARN on a, c; not set on b"),
    ("clock", "warning", put("clock.offset_seconds", -7.5), "the clock is 7.5 s behind that of a"),
    ("clock", "error", put("clock.offset_seconds", 75.2), "the clock is 75.2 s ahead of that of a"),
    ("clock", "error", put("run_folder.clock_seconds", 3600.0), "is 3600.0 s behind that of the run folder's file sys"),
    (
        "collective",
        "error",
        put("ranks.0.collective.error", "gloo failed: timed out"),
        "rank 0: gloo failed: timed out",
    ),
    ("reach", "error", put("boots", ["one", "two"]), "2 machines call themselves so"),
    ("network", "error", put("network.problems", [["a is not reached", "open it", "error"]]), "a is not reached"),
]


@pytest.mark.parametrize(("check", "severity", "change", "text"), PROBLEMS, ids=[p[3][:40] for p in PROBLEMS])
def test_problem_on_one_host_of_three_is_told_with_it(check: str, severity: str, change: Change, text: str) -> None:
    outcomes = examine([host("a"), host("b", change), host("c")], Space({"shards": GIB}))
    ((found_check, hosts, told, found_severity),) = found_in(outcomes)
    assert (found_check, hosts, found_severity) == (check, ("b",), severity)
    assert text in told
    assert len(told.partition("Remedy: ")[2]) > 5
    word = "PROBLEM" if severity == "error" else "warning"
    (row,) = [line for line in table(outcomes, ["a", "b", "c"]).splitlines() if word in line]
    assert row.removeprefix(check).split()[:3] == ["ok", word, "ok"]


def test_all_problems_are_told_at_once() -> None:
    """Symptom: a user mended one thing, started again, waited in the queue, and was told the next."""
    at_once = [entry for entry in PROBLEMS if entry[2] not in (PROBLEMS[1][2], PROBLEMS[9][2], PROBLEMS[10][2])]
    hosts = [host("a"), host("c"), host("d")]
    for number, (_, _, change, _) in enumerate(at_once):
        hosts.append(host(f"b{number}", change))
    outcomes = examine(hosts, Space({"shards": GIB}))
    told = listing(problems(outcomes))
    bad = {name for problem in problems(outcomes) for name in problem.hosts}
    assert bad == {f"b{number}" for number in range(len(at_once))}
    assert told.count("remedy: ") == len(problems(outcomes)) >= 28
    assert all(f"b{number}:" in told or f"b{number}," in told for number in range(len(at_once)))
    first_warning = told.index(". warning, ")
    assert told.rindex("b0: software") < first_warning  # what stops the run comes first


def test_a_host_that_does_not_answer_hides_nothing_of_the_others() -> None:
    gone = Facts("b", way="ssh", unreachable=NoAnswer("it refuses the login", "ssh-copy-id b"))
    outcomes = examine([host("a"), gone, host("c", put("cores", 2))], None)
    assert [entry[:2] for entry in found_in(outcomes)] == [("reach", ("b",)), ("cores, memory", ("a", "c"))]
    software = next(line for line in table(outcomes, ["a", "b", "c"]).splitlines() if line.startswith("software"))
    assert software.split()[1:4] == ["ok", "-", "ok"]


def test_of_two_unlike_hosts_none_is_taken_for_the_odd_one() -> None:
    outcomes = examine([host("a"), host("b", put("software.torch", "2.12.0"))], None)
    assert found_in(outcomes)[0][1] == ("a", "b")


def test_uncertain_clocks_are_no_problem() -> None:
    slow = [put("clock.offset_seconds", 65.0), put("clock.uncertainty_seconds", 62.0)]
    assert found_in(examine([host("a"), host("b", *slow)], None)) == []


def test_hosts_on_processors_need_no_large_shared_memory() -> None:
    small = [put("gpus", []), put("local.1.free_bytes", 2**20)]
    assert found_in(examine([host("a", *small), host("b", *small)], None)) == []
    asked = examine([host("a", *small, put("device", "cuda")), host("b", *small)], None)
    assert "run.device is cuda, but torch sees no GPU here" in found_in(asked)[0][2]
    crowded = examine([host("a", *small, put("slots", 65)), host("b", *small)], None)
    assert "65 processes are to start here (slots), but there are 64 cores" in found_in(crowded)[0][2]


def test_space_is_compared_with_what_the_recipe_writes() -> None:
    hosts = [host("a"), host("b")]
    ((check, told_of, text, severity),) = found_in(examine(hosts, Space({"shards": 30 * GIB, "index": 90 * GIB})))
    assert (check, told_of, severity) == ("space", ("a", "b"), "error")
    assert "100 GiB are free for /shared/run; the recipe will write about 120 GiB (index 90 GiB, shards 30 GiB)" in text
    ((*_, severity),) = found_in(examine(hosts, Space({"shards": 90 * GIB})))
    assert severity == "warning"
    assert found_in(examine(hosts, Space({"shards": 120 * GIB}, present_bytes=60 * GIB))) == []
    assert found_in(examine(hosts, None)) == []
    unknown = examine(hosts, Space({}, ("the corpus",)))
    assert found_in(unknown) == []
    assert "100 GiB free; what is needed is unknown, as the corpus cannot" in " ".join(
        table(unknown, ["a", "b"]).split()
    )


def test_an_index_is_told_where_it_will_be_and_refused_where_it_must_and_cannot() -> None:
    """Symptom: hours into a run, an index is made on CPUs that was meant for GPUs."""
    with_gpus, without = put("software.faiss-gpu", "1.15.1"), put("software.faiss-gpu", None)
    able, unable = host("a", with_gpus), host("b", without)

    def told(*hosts: Facts, obstacle: str = "", required: bool = False) -> tuple[list[str], str]:
        index = PlannedIndex("IVF4,PQ8x4fs", obstacle, "name another", required)
        outcomes = examine(hosts, Space({"shards": GIB}, index=index))
        names = [facts.host for facts in hosts]
        return [text for check, _, text, _ in found_in(outcomes) if check == "index"], " ".join(
            table(outcomes, names).split()
        )

    for hosts in ((unable,), (able, unable)):
        assert told(*hosts)[0] == []
    assert "index" not in told(unable)[1], "nobody asks for GPUs"
    assert "IVF4,PQ8x4fs by FAISS on each rank's GPU" in told(able)[1]
    assert "IVF4,PQ8x4fs on CPUs: codes of 4 bits" in told(able, obstacle="codes of 4 bits")[1]
    assert told(able, required=True)[0] == []
    (text,) = told(able, unable, required=True)[0]
    assert text.startswith("b: index: index.gpu is always, but there is no GPU, or no FAISS that works on it")
    assert len(told(unable, obstacle="codes of 4 bits", required=True)[0]) == 2
    assert told(host("c", with_gpus, put("gpus", [])), required=True)[0], "FAISS for GPUs, and no GPU"


def test_a_full_disk_in_place_of_the_shared_folder_is_told_of_that_host_alone() -> None:
    own = [put("run_folder.seen", False), put("run_folder.free_bytes", 1024)]
    found = found_in(examine([host("a"), host("b", *own)], Space({"shards": GIB})))
    assert [(check, hosts) for check, hosts, *_ in found] == [("run folder", ("b",)), ("space", ("b",))]
    assert "1 KiB are free" in found[1][2]


def test_many_hosts_share_columns() -> None:
    hosts = [host(f"n{number}", *([put("cores", 8)] if number == 7 else [])) for number in range(30)]
    outcomes = examine(hosts, None)
    header = table(outcomes, [facts.host for facts in hosts]).splitlines()[0]
    assert header.split("  ")[0] == "check"
    assert "n0 and 28 more" in header
    assert "n7" in header
    assert "n8" not in header
    assert "64 on n0, n1, n2, n3, n4, n5 and 23 more; 8 on n7" in found_in(outcomes)[0][2]


# --- the ways between hosts ------------------------------------------------------------------------------------------

LISTENING = Listening(7, [("docker0", "172.17.0.1"), ("eth0", "10.0.0.1")], "172.17.0.1")


def with_interfaces(name: str, address: str, error: str | None = None) -> Facts:
    return Facts(name, interfaces=Interfaces([("eth0", address)], error))


def judged(reached: dict[str, str | None], taken: str | None, error: str | None = None) -> dict[str, Judgement]:
    hosts = {"a": with_interfaces("a", "10.0.0.1"), "b": with_interfaces("b", "10.0.0.2", error)}
    return judge_network(hosts, LISTENING, {"b": reached}, taken=taken)


def test_address_that_all_reach_is_told() -> None:
    facts = judged({"172.17.0.1": "refused", "10.0.0.1": None, "a": None}, None)
    assert facts["a"].found == "a is reached at 10.0.0.1 (eth0)"
    assert facts["b"].problems == []


def test_master_address_that_nobody_reaches_has_a_remedy() -> None:
    """Symptom: `deepspeed` took the address of docker0, and all ranks waited for rank 0 until the timeout."""
    ((fact, remedy, severity),) = judged(
        {"172.17.0.1": "refused", "10.0.0.1": None, "a": "no such name"}, "172.17.0.1"
    )["b"].problems
    assert "172.17.0.1 of a (the first word of `hostname -I`, which deepspeed takes) is not reached" in fact
    assert (remedy, severity) == ("start with --master_addr 10.0.0.1", "error")
    ((fact, _, severity),) = judged({"172.17.0.1": "refused", "10.0.0.1": None, "a": None}, "172.17.0.1")["b"].problems
    assert "ranks will look for a by its name instead" in fact
    assert severity == "warning"


def test_firewall_and_absent_interface_are_errors() -> None:
    facts = judged({"172.17.0.1": "refused", "10.0.0.1": "timed out", "a": None}, None, "b has no interface ib0")
    told = [fact for fact, _, severity in facts["b"].problems if severity == "error"]
    assert (
        told[0]
        == "a is not reached at any of its addresses (172.17.0.1 (docker0): refused; 10.0.0.1 (eth0): timed out)"
    )
    assert told[1] == "b has no interface ib0"


def test_absent_programs_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("launcher.preflight.connections.sys.executable", "/nowhere/python")
    facts = judge_programs("pdsh", {"a": {"prted": None}, "b": {"prted": None}}, hosts=2)
    assert [fact.split()[0] for fact, *_ in facts["a"].problems] == ["deepspeed", "pdsh", "ssh"]
    assert facts["b"].problems == []
    facts = judge_programs("openmpi", {"a": {"prted": "/x"}, "b": {"prted": None}}, hosts=2)
    assert [fact.split()[0] for fact, *_ in facts["b"].problems] == ["prted,"]
