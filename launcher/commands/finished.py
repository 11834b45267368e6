"""Opening a run that is over (or between two starts) to use what it made: search, evaluation, exports."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from engine.config.file import with_overrides
from engine.config.timetable import Sizes, WeightsOf
from engine.coordination.coordinator import Coordinator, LocalTransport
from engine.data.corpus import Data, ModelText, model_texts, open_corpus, open_data
from engine.data.tokenization import WrittenCorpus
from engine.errors import ArtifactError, ConfigError, DataError
from engine.evaluation.chosen import taken_iteration
from engine.evaluation.systems import end_states
from engine.reliability.run_lock import hold, require_free
from engine.run import SIZES, Run, RunFolder
from shards.files.unusable import is_writable, require_writable
from shards.formats import open_dataset
from shards.formats.seen import recorded_check
from shards.manifest import MANIFEST_NAME
from shards.records import Dataset


def open_run(path: Path, coordinator: Coordinator | None = None, device: torch.device | None = None) -> Run:
    """Open a run folder without changing anything in it.

    Args:
        path: The run folder.
        coordinator: Of the processes that use it; by default a world of one.
        device: Where models are loaded; by default the GPU where there is one.

    Raises:
        ConfigError: The folder holds no run.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Run.reopen(path, coordinator or Coordinator(LocalTransport()), device)


def change_settings(run: Run, words: Sequence[str]) -> None:
    """Change settings of an opened run; what is known of its data stays known.

    Args:
        run: Its configuration is replaced, not that in its folder.
        words: `key=value` words.

    Raises:
        ConfigError: A key is unknown, a value does not fit it, or values contradict each other.
    """
    run.config = with_overrides(run.config, words)
    if (sizes := run.result_of(SIZES, Sizes)) is not None:
        run.size(sizes)


def place_for(named: Path | None, usual: Path) -> Path:
    """Return where results go, and refuse a folder that cannot be written before they are computed.

    Args:
        named: What `--out` names; None where it is left out.
        usual: Where they go then, below a run.

    Raises:
        FileError: It may not be written to, or a file is there.
    """
    place = named or usual
    require_writable(place, remedy=f"name {'another place' if named else 'a place outside of the run'} by --out")
    return place


def keep_others_out(stack: ExitStack, folder: RunFolder, run: Run, *, reads_only: bool = False) -> None:
    """Keep other starts out of what is written: a training run out of its own folder, or a twin of this command.

    Args:
        stack: Lets them in again when it is closed.
        folder: The run's, or one below it.
        run: For the settings and the ranks.
        reads_only: Whether results go elsewhere, so that a folder which may not be written to is good enough.

    Raises:
        ConfigError: Another start works in the folder.
        FileError: The folder may not be written to.
    """
    seconds = run.config.run.heartbeat_seconds
    if reads_only and not is_writable(folder.path):
        require_free(folder.lock, patience_seconds=6 * seconds)
        return
    require_writable(
        folder.path,
        remedy=f"work on a copy that is yours (`cp -r {run.folder.path} COPY`, `chmod -R u+w COPY`); matrix, analyse, "
        "compare, report and export need none where --out names another place",
    )
    ranks = run.coordinator.world_size
    stack.enter_context(hold(folder.lock, num_ranks=ranks, touch_seconds=seconds, patience_seconds=6 * seconds))


def require_search(run: Run) -> None:
    """Refuse a run whose models search nothing.

    Raises:
        ConfigError: It pre-trains on documents alone.
    """
    if not run.config.learns_from_queries:
        exported = run.folder.export(next(iter(run.config.models)))
        raise ConfigError(
            f"the run in {run.folder.path} is of the recipe {run.config.recipe}, which pre-trains on documents alone",
            expected="a run whose models answer queries",
            remedy=f"train one that starts from what was pre-trained, such as by retriever.name={exported}",
        )


def last_iteration(run: Run) -> int:
    """Return the newest iteration whose models are all finished; 0 of models that go through none together.

    Raises:
        ConfigError: Not even the warm-up is, or what the recipe leaves behind.
    """
    for iteration in range(run.timetable.iterations, -1, -1):
        states = states_of(run, iteration).values()
        if all((run.folder.weights(one.model, one.state) / "weights.json").exists() for one in states):
            return iteration
    raise ConfigError(
        f"the run in {run.folder.path} has not finished its warm-ups",
        expected="weights of all models",
        remedy="start the run again with the same command; it goes on where it stopped",
    )


def taken_of(run: Run) -> int:
    """Return the finished iteration that is taken where none is named: the best on dev, or the newest.

    Raises:
        ConfigError: As of `last_iteration`.
    """
    return taken_iteration(run, last_iteration(run))


def states_of(run: Run, iteration: int) -> dict[str, WeightsOf]:
    """Return the states of all models that belong to an iteration, or those that the recipe leaves behind."""
    return end_states(run.timetable, list(run.config.models), iteration)


def texts_of(run: Run, iteration: int) -> dict[str, ModelText]:
    """Load the tokenizers that were saved with an iteration's weights."""
    states = states_of(run, iteration)
    return model_texts(run.config, {model: run.folder.weights(model, one.state) for model, one in states.items()})


def corpus_of(run: Run, iteration: int, shards: Path | None = None) -> Data:
    """Open a run's corpus from its shards, which hold the texts too: the data folder may be gone.

    Args:
        run: The run.
        iteration: With whose weights tokenizers were saved.
        shards: Where shards that were prepared beside the data lie now; None for where the run read them.

    Raises:
        ArtifactError: The shards are missing, damaged, or made with other tokenizers.
    """
    folder = shards or shards_of(run)
    if not (folder / MANIFEST_NAME).exists():
        raise ArtifactError(
            f"the shards of the run, with the texts of its corpus, are not in {folder}",
            expected=f"a folder with {MANIFEST_NAME}, its tar files and docids: RUN/shards, or the one beside the data "
            "(DATA/shards/NAME) where they were prepared for many runs",
            remedy="name the folder that holds them now by --shards, or restore it",
        )
    return open_corpus(folder, texts_of(run, iteration))


def fingerprint_of(run: Run) -> str | None:
    """Return the fingerprint of the data that a run was trained on; None where the run has not come so far."""
    written = run.result_of("shards", WrittenCorpus)
    return None if written is None else written.dataset_sha256


def shards_of(run: Run) -> Path:
    """Return the folder from which a run read its shards: its own, or one beside its data.

    Args:
        run: The run.
    """
    written = run.result_of("shards", WrittenCorpus)
    if written is not None and written.prepared is not None:
        return Path(written.prepared)
    return run.folder.shards


def dataset_of(run: Run, named: Path | None = None) -> Dataset:
    """Open the data folder of a run; what the run has found of files that are as they were is taken over.

    Args:
        run: Its recipe says where they lie, and in which layout.
        named: Where a word says that they lie now.

    Raises:
        DataError: The folder is not there, or not readable.
    """
    path = named or run.data_path
    if not path.is_dir():
        raise DataError(
            f"there is no folder {path}",
            expected=f"the data of the run in {run.folder.path}",
            remedy="name the folder where they lie now by --data",
        )
    known, needs_queries = recorded_check(run.folder.data_check, path), run.config.learns_from_queries
    return open_dataset(path, run.config.data.format, checked=known, needs_queries=needs_queries)


def data_of(run: Run, iteration: int, dataset: Dataset | None = None, folder: RunFolder | None = None) -> Data:
    """Open a run's data, or another data set whose shards lie in `folder`.

    Raises:
        DataError: The data is no longer readable.
        ArtifactError: The shards are damaged, or the data changed since.
    """
    return open_data(run.config, dataset or dataset_of(run), texts_of(run, iteration), folder or run.folder)
