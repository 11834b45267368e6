"""A sweep on runs that are made up: what is read, started, branched, gone on with, and compared in the end."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from engine.errors import ConfigError
from engine.evaluation.summary import read_rows
from engine.evaluation.systems import RANKER, fused_system, trained_systems
from engine.reliability.exit_codes import EXIT_PREEMPTED
from engine.reliability.failure import record_failure
from engine.reliability.starts import Start, record_start
from launcher.commands.sweep import finished_groups, play_sweep, run_logged, submit_all
from launcher.commands.sweep_board import metrics_of, settings_of, write_board
from launcher.commands.sweep_file import Sweep, read_sweep, require_shared_alike
from launcher.commands.sweep_slots import Slots
from shards.records import Dataset
from tests.distributed.processes import ROOT
from tests.unit.launcher.commands.made_runs import TINY, MadeRun, made_data
from tests.unit.launcher.commands.test_compare import run_command

SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return made_data(tmp_path_factory.mktemp("data") / "data")


def sweep_file(folder: Path, share: str = "", **keys: str) -> Path:
    """Write a sweep of two settings and two seeds; a key that is given as nothing is left out."""
    given = {
        "base": f"{{config: {TINY}, set: [evaluation.max_dev_queries=null]}}",
        "variants": "{with: [], without: {ar2.distillation_weight: 0}}",
        "seeds": "[1, 2]",
        "out": f"{folder / 'out'}",
        "share": share,
        **keys,
    }
    path = folder / "sweep.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in given.items() if value))
    return path


class StandIn:
    """Runs commands by making up what they would leave behind.

    Args:
        dataset: Of all runs.
        fails: Run folders, or ends of them, whose start is refused.
    """

    def __init__(self, dataset: Dataset, *fails: str) -> None:
        self.dataset, self.fails = dataset, fails
        self.calls: list[str] = []

    def __call__(self, command: Sequence[str], file: Path) -> int:
        words = dict(word.split("=", 1) for word in command if "=" in word)
        if "branch" in command:
            place = command.index("branch")
            source, target = Path(command[place + 1]), Path(command[place + 2])
            self.calls.append(f"branch {source.parent.name}/{source.name} {target.parent.name}/{target.name}")
            assert (source / "ledger.json").exists(), "what is shared comes first"
            assert command[-2:] == ["--before", "retriever/1"]
            assert words["run.stop_before"] == "null"
            begin(target)
            return 0
        folder = Path(words["run.path"])
        self.calls.append(f"{command[0]} {folder.parent.name}/{folder.name}")
        if any(str(folder).endswith(end) for end in self.fails):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("12:00:00 begins\nerror: no space is left\n")
            return 2
        if "run.stop_before" in words:
            begin(folder)
            return 0
        shutil.rmtree(folder, ignore_errors=True)
        own = [f"{key}={value}" for key, value in words.items() if key != "run.path"]
        MadeRun(folder, self.dataset, *own, better=float("without" not in str(folder)))
        return 0


def begin(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "ledger.json").write_text(json.dumps({"stages": {"warmup_retriever": {"seconds": 1.0, "result": None}}}))
    record_start(folder, Start.now("1", 2, "store", []))


def read(folder: Path, dataset: Dataset, share: str = "", **keys: str) -> Sweep:
    return read_sweep(sweep_file(folder, share, **keys), [f"data.path={dataset.path}"])


def test_every_setting_and_seed_is_a_run_of_its_own(tmp_path: Path, dataset: Dataset) -> None:
    sweep = read(tmp_path, dataset)
    assert [(run.variant, run.seed, run.folder.relative_to(tmp_path / "out")) for run in sweep.runs] == [
        (variant, seed, Path(variant) / f"seed-{seed}") for seed in (1, 2) for variant in ("with", "without")
    ]
    by_label = {run.label: run.config for run in sweep.runs}
    assert by_label["without seed 2"].run.seed == 2
    assert "ar2.distillation_weight=0" in sweep.runs[1].words
    assert {config.evaluation.max_dev_queries for config in by_label.values()} == {None}


@pytest.mark.parametrize("name", ["tiny", "tiny.yaml", "configs/tiny.yaml", str(TINY)])
def test_the_recipe_is_named_as_for_a_training(
    name: str, tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symptom: of `config: tiny` there was no configuration file, and the remedy was to name tiny."""
    monkeypatch.chdir(tmp_path)
    for base in (name, f"{{config: {name}, set: [run.log_every_steps=1]}}"):
        sweep = read(tmp_path, dataset, base=base)
        assert sweep.recipe.is_absolute()
        assert sweep.recipe.samefile(TINY)


def test_a_file_of_ones_own_comes_before_a_recipe_that_comes_along(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY.read_text().replace("top_k: 20", "top_k: 19"))
    assert read(tmp_path, dataset, base="tiny.yaml").runs[0].config.ar2.top_k == 19
    with pytest.raises(ConfigError, match=r"no configuration file .*own\.yaml.* one of those that come along: .*tiny"):
        read(tmp_path, dataset, base="own.yaml")
    with pytest.raises(ConfigError, match=r"base\.config is '': is empty"):
        read(tmp_path, dataset, base='{config: ""}')


def test_a_setting_may_be_without_the_stage_before_which_it_begins(tmp_path: Path) -> None:
    """AR2, IRGAN and ANCE begin from one G0, and ANCE trains no D0."""
    variants = "{ar2: [], irgan: {ar2.objective: irgan}, ance: {ar2.objective: ance}}"
    assert read_sweep(sweep_file(tmp_path, "warmup_ranker", variants=variants)).share == "warmup_ranker"
    with pytest.raises(ConfigError, match="the base has no stage 'student' of training"):
        read_sweep(sweep_file(tmp_path, "student", variants=variants))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_that_comes_along_is_read_in_any_folder(
    path: Path, tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Symptom: each asked for `configs/*.yaml` below the working directory, which is the repository's alone."""
    monkeypatch.chdir(tmp_path)
    run_command("sweep", f"sweeps/{path.stem}", f"data.path={dataset.path}", "--print")
    assert f"runs/sweeps/{path.stem}/" in capsys.readouterr().out


def test_runs_are_started_once_and_compared_in_the_end(
    tmp_path: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, run = read(tmp_path, dataset), StandIn(dataset)
    outcome = play_sweep(sweep, Slots(1, ["deepspeed"]), run)
    assert run.calls == [f"deepspeed {name}/seed-{seed}" for seed in (1, 2) for name in ("with", "without")]
    assert (outcome.code, outcome.failed) == (0, {})
    play_sweep(sweep, Slots(1, ["deepspeed"]), run)
    assert len(run.calls) == 4, "what is finished is not run again"
    words = [str(tmp_path / "sweep.yaml"), f"data.path={dataset.path}", "--no-figure"]
    run_command("sweep", *words)
    told = capsys.readouterr().out
    assert "4 of 4 runs are finished" in told
    assert "of 2" in next(line for line in told.splitlines() if line.startswith("G ") and " without " in line)
    assert (tmp_path / "out" / "comparison" / "compare-dev-MRR@10.csv").exists()


def test_a_finished_run_of_other_settings_is_not_taken_for_the_one_that_is_asked_for(
    tmp_path: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    """Symptom: with `ar2.iterations` changed in the file, all runs were called finished, and the old ones compared."""
    words = [f"data.path={dataset.path}", "--no-figure"]
    play_sweep(read(tmp_path, dataset), Slots(1, ["deepspeed"]), StandIn(dataset))
    changed = sweep_file(tmp_path, variants="{with: {ar2.iterations: 1}, without: {ar2.distillation_weight: 0}}")
    for option in ([], ["--print"], ["--slurm", "--nodes 1"]):
        with pytest.raises(ConfigError) as error:
            run_command("sweep", str(changed), *words, *option)
        told = ("with seed 1", f"{tmp_path}/out/with/seed-1", "ar2.iterations: 2 -> 1", "move the folder away")
        assert all(one in str(error.value) for one in told)
    assert "finished" not in capsys.readouterr().out
    run_command("sweep", str(sweep_file(tmp_path)), "run.heartbeat_seconds=7", *words)
    assert "4 of 4 runs are finished" in capsys.readouterr().out, "how it is run is no other setting"
    shutil.rmtree(tmp_path / "out" / "with")
    run = StandIn(dataset)
    play_sweep(read_sweep(changed, words[:1]), Slots(1, ["deepspeed"]), run)
    assert run.calls == ["deepspeed with/seed-1", "deepspeed with/seed-2"]


def test_what_settings_share_is_computed_once_a_seed(tmp_path: Path, dataset: Dataset) -> None:
    sweep, run = read(tmp_path, dataset, "retriever/1"), StandIn(dataset)
    play_sweep(sweep, Slots(1, ["mpirun"]), run)
    assert run.calls == [
        call
        for seed in (1, 2)
        for call in (
            f"mpirun .shared/seed-{seed}",
            *(f"branch .shared/seed-{seed} with/seed-{seed}", f"mpirun with/seed-{seed}"),
            *(f"branch .shared/seed-{seed} without/seed-{seed}", f"mpirun without/seed-{seed}"),
        )
    ]
    run.calls.clear()
    shutil.rmtree(tmp_path / "out" / "without" / "seed-2")
    play_sweep(sweep, Slots(1, ["mpirun"]), run)
    assert run.calls == ["branch .shared/seed-2 without/seed-2", "mpirun without/seed-2"], "a setting may come later"
    assert len(finished_groups(sweep)) == 2, "what is shared is no result"


@pytest.mark.parametrize(
    ("setting", "share", "told"),
    [
        ("{warmup_retriever.steps: 11}", "retriever/1", r"warmup_retriever .* with warmup_retriever\.steps: 10 -> 11"),
        ("{ar2.top_k: 12}", "retriever/1", r"warmup_ranker .* with other candidates \(000\)"),
        ("{ar2.objective: irgan}", "retriever/1", "another length, schedule or objective of its phase"),
        ("{ar2.adversarial_weight: 0.9}", "ranker/1", r"retriever/1 .*adversarial_weight"),
        ("{bm25.k1: 0.5}", "warmup_ranker", r"bm25\.k1"),
        ("{data.template: '{text}'}", "warmup_retriever", r"cannot change data\.template"),
    ],
)
def test_a_setting_that_changes_what_is_shared_is_refused_before_that_is_computed(
    setting: str, share: str, told: str, tmp_path: Path, dataset: Dataset
) -> None:
    """Symptom: its branch told it, after the hours of both warm-ups. One that has begun is gone on with."""
    sweep = read(tmp_path, dataset, share, variants=f"{{same: [], other: {setting}}}")
    with pytest.raises(ConfigError, match=rf"other cannot share what comes before {share}: .*{told}"):
        require_shared_alike(sweep)
    for run in sweep.runs:
        if run.variant == "other":
            begin(run.folder)
    require_shared_alike(sweep)


def test_settings_of_a_recipe_in_epochs_share(tmp_path: Path) -> None:
    """Symptom: epochs "cannot be turned into steps before the data is opened", though a stage's name has none in it."""
    base = str(TINY.with_name("r2anker_tiny.yaml"))
    words = "{a: [], b: {r2anker.student.epochs: 2}, c: {ranker.max_length: 40}}"
    with pytest.raises(ConfigError, match=r"c cannot share .*: ranker .* with ranker\.max_length: "):
        require_shared_alike(read_sweep(sweep_file(tmp_path, "student", base=base, variants=words)))
    words = "{a: [], c: {ranker.max_length: 40}}"
    require_shared_alike(read_sweep(sweep_file(tmp_path, "ranker", base=base, variants=words)))


def test_what_goes_beyond_an_earlier_stage_is_shared_as_it_is(tmp_path: Path, dataset: Dataset) -> None:
    """Symptom: with `share` moved to a finished stage, the base's whole game was played in the hidden folder."""
    sweep, run = read(tmp_path, dataset, "retriever/1"), StandIn(dataset)
    play_sweep(sweep, Slots(1, ["mpirun"]), run, shared_only=True)
    for seed in (1, 2):
        ledger = sweep.shared_folder(seed) / "ledger.json"
        finished = {stage: {"seconds": 1.0, "result": None} for stage in ("warmup_retriever", "warmup_ranker")}
        ledger.write_text(json.dumps({"stages": finished}))
    run.calls.clear()
    play_sweep(read(tmp_path, dataset, "warmup_ranker"), Slots(1, ["mpirun"]), run, shared_only=True)
    assert run.calls == []


def test_a_starter_that_cannot_be_started_is_refused(tmp_path: Path) -> None:
    """Symptom: of a file that is no program there was a traceback of PermissionError."""
    file = tmp_path / "start.sh"
    file.write_text("")
    for words in ([str(file)], [str(tmp_path / "none")], [str(file / "below")]):
        with pytest.raises(ConfigError, match=r"cannot be started.*--starter"):
            run_logged(words, tmp_path / "log")


def test_a_run_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, run = read(tmp_path, dataset), StandIn(dataset, "with/seed-1")
    outcome = play_sweep(sweep, Slots(1, ["deepspeed"]), run)
    assert len(run.calls) == 4
    assert outcome.code == 2
    assert set(outcome.failed) == {"with seed 1"}
    assert "no space is left" in outcome.failed["with seed 1"]
    assert "with-seed-1.log" in outcome.failed["with seed 1"]
    assert finished_groups(sweep) == [f"{name}={tmp_path}/out/{name}/seed-2" for name in ("with", "without")]
    run.fails = ()
    assert play_sweep(sweep, Slots(1, ["deepspeed"]), run).code == 0
    assert run.calls[4:] == ["deepspeed with/seed-1"]


def test_settings_wait_for_what_they_share_and_other_seeds_do_not(tmp_path: Path, dataset: Dataset) -> None:
    sweep, run = read(tmp_path, dataset, "retriever/1"), StandIn(dataset, ".shared/seed-1")
    outcome = play_sweep(sweep, Slots(1, ["deepspeed"]), run)
    assert set(outcome.failed) == {"shared seed 1"}
    assert [call for call in run.calls if "seed-1" in call] == ["deepspeed .shared/seed-1"]
    assert len(finished_groups(sweep)) == 2


def test_a_sweep_that_is_asked_to_stop_stops(tmp_path: Path, dataset: Dataset) -> None:
    calls: list[Sequence[str]] = []

    def preempted(command: Sequence[str], file: Path) -> int:
        calls.append(command)
        return 85

    outcome = play_sweep(read(tmp_path, dataset), Slots(1, ["deepspeed"]), preempted)
    assert (len(calls), outcome.stopped, outcome.code) == (1, True, 85)


@pytest.mark.parametrize("share", ["", "retriever/1"])
def test_a_sweep_stops_whatever_its_starter_makes_of_a_runs_exit_code(
    tmp_path: Path, dataset: Dataset, share: str
) -> None:
    """Symptom: stopped before what settings share was there, a sweep went on with the next seed."""
    calls: list[Sequence[str]] = []

    def interrupted(command: Sequence[str], file: Path) -> int:
        calls.append(command)
        begin(folder := Path(next(word for word in command if word.startswith("run.path="))[len("run.path=") :]))
        told = {"stage": "warmup_retriever", "step": 3, "kind": "Preempted", "message": "stopped at step 3"}
        record_failure(folder, attempt="1", rank=0, code=EXIT_PREEMPTED, **told)
        return 1

    outcome = play_sweep(read(tmp_path, dataset, share), Slots(1, ["deepspeed"]), interrupted)
    assert (len(calls), outcome.stopped, outcome.code) == (1, True, EXIT_PREEMPTED)


def test_so_many_runs_go_at_once_each_in_a_place_and_at_a_port_of_its_own(tmp_path: Path, dataset: Dataset) -> None:
    """Each start waits for another one beside it, and would fail without."""
    sweep, made, pair = read(tmp_path, dataset, "retriever/1"), StandIn(dataset), threading.Barrier(2)
    seen: list[tuple[str, str, str]] = []

    def beside_another(command: Sequence[str], file: Path) -> int:
        if "branch" not in command:
            folder = Path(next(word.split("=")[1] for word in command if word.startswith("run.path=")))
            seen.append((folder.parent.name, command[1], command[2]))
            pair.wait(timeout=60)
        return made(command, file)

    outcome = play_sweep(sweep, Slots(2, ["starter", "gpu:{slot}", "port:{port}"]), beside_another)
    assert (outcome.code, outcome.failed) == (0, {})
    assert [name for name, *_ in seen[:2]] == [".shared"] * 2
    assert sorted(name for name, *_ in seen[2:]) == ["with", "with", "without", "without"]
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert {first[1], second[1]} == {"gpu:0", "gpu:1"}
        assert first[2] != second[2]
    assert all(int(port.removeprefix("port:")) > 1023 for *_, port in seen)
    assert len(finished_groups(sweep)) == 2


def test_runs_at_once_stop_together(tmp_path: Path, dataset: Dataset) -> None:
    calls, pair = [], threading.Barrier(2)

    def preempted(command: Sequence[str], file: Path) -> int:
        calls.append(command)
        pair.wait(timeout=60)
        return EXIT_PREEMPTED

    outcome = play_sweep(read(tmp_path, dataset), Slots(2, ["python"]), preempted)
    assert (outcome.stopped, outcome.code, len(calls)) == (True, EXIT_PREEMPTED, 2)


def test_runs_at_one_port_are_refused(tmp_path: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(sweep_file(tmp_path)), f"data.path={dataset.path}", "--jobs", "2"]
    with pytest.raises(ConfigError, match=r"2 runs at once, started by deepspeed, would listen at one port.*\{port\}"):
        run_command("sweep", *words)
    with pytest.raises(ConfigError, match="--jobs and --slurm are both given"):
        run_command("sweep", *words, "--starter", "python", "--slurm", "--nodes 1")


def test_the_commands_are_printed_as_they_would_be_typed(
    tmp_path: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sweep_file(tmp_path, "retriever/1", compare='[--metric, "R@5"]')
    words = [f"data.path={dataset.path}", "--starter", "deepspeed --num_accelerators 2", "--print"]
    run_command("sweep", str(path), *words)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (1 + 2 * 2) + 1
    shared, branch, start = lines[:3]
    assert shared.startswith("deepspeed --num_accelerators 2 launcher/run.py --config ")
    assert shared.endswith(f"run.seed=1 run.stop_before=retriever/1 run.path={tmp_path}/out/.shared/seed-1")
    assert f"-m launcher branch {tmp_path}/out/.shared/seed-1 {tmp_path}/out/with/seed-1 " in branch
    assert start.endswith(f"data.path={dataset.path} run.seed=1 run.path={tmp_path}/out/with/seed-1")
    assert "launcher compare with=" in lines[-1]
    assert lines[-1].endswith("--metric R@5")
    assert not (tmp_path / "out").exists(), "nothing is begun"


def test_runs_are_handed_to_slurm_when_what_they_share_is_there(tmp_path: Path, dataset: Dataset) -> None:
    sweep, run = read(tmp_path, dataset, "retriever/1"), StandIn(dataset)
    with pytest.raises(ConfigError, match="is not there for the seeds 1, 2") as error:
        submit_all(sweep, ["--nodes", "1"], run)
    assert "--shared-only" in str(error.value)
    play_sweep(sweep, Slots(1, ["deepspeed"]), run, shared_only=True)
    assert run.calls == ["deepspeed .shared/seed-1", "deepspeed .shared/seed-2"]
    commands: list[Sequence[str]] = []

    def taken(command: Sequence[str], file: Path) -> int:
        commands.append(command)
        return 0 if "branch" in command else 2 * ("without" in str(command))

    assert submit_all(sweep, ["--nodes", "1"], taken) == 2
    submitted = [command for command in commands if "submit" in command]
    assert len(submitted) == 4, "one that is not taken stops no other"
    assert {"--nodes", "with-seed-1", "run.seed=1", f"run.path={tmp_path}/out/with/seed-1"} <= set(submitted[0])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"variants": ""}, "has no variants"),
        ({"variants": "{a/b: []}"}, "'a/b' cannot name a folder"),
        ({"variants": "{a: [ar2.num_negative=1]}"}, "did you mean 'ar2.num_negatives'"),
        ({"variants": "{a: [run.seed=3]}"}, "a has run.seed=3"),
        ({"variants": "{a: {ar2: {iterations: 1}}}"}, "variants.a is"),
        ({"seeds": "[1, 1]"}, "a seed twice"),
        ({"seeds": "[one]"}, "seeds is ['one']"),
        ({"out": ""}, "does not say where the runs go"),
        ({"base": "{set: []}"}, "base names no recipe"),
        ({"base": "configs/none.yaml"}, "there is no configuration file"),
        ({"share": "evaluate/0"}, "no stage 'evaluate/0' of training"),
        ({"repeat": "3"}, "is no sweep with repeat"),
        ({"compare": "[--against, other]"}, "--against other, which is no setting. Expected: one of with, without"),
        ({"compare": "[--metrik, MRR@10]"}, "compare: unrecognized arguments: --metrik"),
        ({"compare": "[MRR@10]"}, "compare: MRR@10 is no option"),
        ({"compare": "[--metric, X@3]"}, "'X@3' is no metric"),
    ],
)
def test_a_file_of_another_form_is_refused_before_any_run(tmp_path: Path, keys: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_sweep(sweep_file(tmp_path, **keys))
    assert message in str(error.value)


@pytest.mark.parametrize("path", SWEEPS, ids=[path.stem for path in SWEEPS])
def test_the_sweeps_that_come_along_are_valid(path: Path, tmp_path: Path) -> None:
    sweep = read_sweep(path, [f"data.path={tmp_path}"], tmp_path / "out")
    require_shared_alike(sweep)
    assert len({run.variant for run in sweep.runs}) > 1
    assert sweep.share is not None


def test_the_board_has_what_each_run_was_set_to_and_what_came_of_it(tmp_path: Path, dataset: Dataset) -> None:
    """TensorBoard's HParams, with the metrics of the runs' own summaries; an unfinished run has no row."""
    sweep = read_sweep(sweep_file(tmp_path), [f"data.path={dataset.path}"], None)
    assert write_board(sweep) is None
    for run in sweep.runs[:-1]:
        MadeRun(run.folder, dataset, *run.words)
    assert write_board(sweep) == sweep.out
    first, last = sweep.runs[0], sweep.runs[-1]
    assert sorted(path.name for path in (sweep.out / "tensorboard").iterdir()) == sorted(
        f"{run.variant}-seed-{run.seed}" for run in sweep.runs[:-1]
    )
    settings = settings_of(sweep)
    assert settings[last.label] == {"setting": "without", "seed": 2, "ar2.distillation_weight": 0.0}
    assert settings[first.label].keys() == {"setting", "seed", "ar2.distillation_weight"}
    board = EventAccumulator(str(sweep.out / "tensorboard" / f"{first.variant}-seed-{first.seed}"))
    board.Reload()
    content = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    session = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    shown = {name: value.string_value or value.number_value for name, value in session.hparams.items()}
    assert shown == settings[first.label]
    summary = {(row.split, row.kind): row for row in read_rows(first.folder / "results" / "summary.json")}
    assert metrics_of(first)
    for name in metrics_of(first):
        split, kind, metric = name.split("/")
        assert board.Scalars(name)[0].value == pytest.approx(summary[split, kind].metrics[metric], rel=1e-6)


def test_the_board_compares_like_with_like_whatever_was_measured_last(tmp_path: Path, dataset: Dataset) -> None:
    """Symptom: the ranker's column had D over hybrid of one run, D over G of another, a sample's value of a third."""
    sweep = read_sweep(sweep_file(tmp_path), [f"data.path={dataset.path}"], None)
    made = MadeRun(sweep.runs[0].folder, dataset, *sweep.runs[0].words)
    before = metrics_of(sweep.runs[0])
    assert {name.rpartition("/")[0] for name in before} == {
        *(f"dev/{role}" for role in ("retriever", "ranker", "fused")),
        *(f"test/{role}" for role in ("retriever", "ranker")),
    }
    mixture = fused_system(made.config, taken=2)
    ranker = next(part for part in mixture.parts if part.kind == RANKER)
    assert ranker.orders_hybrid
    for split in ("dev", "test"):
        made.record(ranker, split)
        for system in trained_systems(made.config, [2]):
            made.record(system, split, limit=4)
    assert metrics_of(sweep.runs[0]) == before
