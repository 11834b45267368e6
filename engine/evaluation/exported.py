"""What a run leaves for others of an iteration: its models with their cards, and how their scores are mixed.

Used by the last stage of a run, and by whoever writes another iteration, or other forms, later on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.config.models import RetrieverConfig
from engine.config.timetable import WeightsOf
from engine.data.corpus import Data
from engine.errors import ConfigError
from engine.evaluation.card import Carded, write_card
from engine.evaluation.evaluate import retriever_of
from engine.evaluation.fusion import export_fusion
from engine.evaluation.mixture import fitted_system
from engine.evaluation.systems import end_states, system_of
from engine.index.dense import MANIFEST
from engine.models.export import export_model
from engine.models.export_onnx import export_onnx
from engine.models.export_usage import FOLDER
from engine.retrievers.dense import export_dense
from engine.run import Run


def export_iteration(
    run: Run,
    iteration: int,
    target: Path,
    *,
    models: Sequence[str] | None = None,
    onnx: bool = False,
    places: Mapping[str, str] | None = None,
) -> dict[str, Path]:
    """Write all models of an iteration as other libraries load them, and by which weights their scores are mixed.

    Args:
        run: Which has finished the iteration.
        iteration: 0 is the warm-up.
        target: Folder that gets one for each model, by its name in the recipe.
        models: Which of them; None for all.
        onnx: Also write what onnxruntime reads.
        places: Names on the hub of models that are to be published, which their cards load.

    Returns:
        Folder of each model.

    Raises:
        ArtifactError: As of `engine.models.export.export_model`, or a record of the run is damaged.
        ModelError: An ONNX file was asked for and cannot be made.
    """
    every = end_states(run.timetable, list(run.config.models), iteration)
    states = {model: weights for model, weights in every.items() if models is None or model in models}
    folders = {model: target / model for model in states}
    for model, weights in states.items():
        source = run.folder.weights(model, weights.state)
        carded = Carded(run, weights, iteration, (places or {}).get(model, FOLDER))

        def complete(folder: Path, source: Path = source, carded: Carded = carded) -> None:
            if onnx:
                export_onnx(source, folder)
            write_card(folder, carded)

        export_model(source, folders[model], complete)
    if run.config.learns_from_queries and states == every:
        export_fusion(run, fitted_system(run.folder, run.config, taken=iteration), target / "fusion")
    return folders


def export_indexes(
    run: Run, data: Data, iteration: int, target: Path, models: Sequence[str] | None = None
) -> dict[str, Path]:
    """Write the indexes of an iteration's dense retrievers as files that FAISS opens by itself.

    Args:
        run: Which has finished the iteration.
        data: Its corpus.
        iteration: 0 is the warm-up.
        target: Folder that gets `index/MODEL`.
        models: Of which of them; None for all.

    Returns:
        Folder of each model that has an index.

    Raises:
        ConfigError: As of `require_indexes`.
        ArtifactError: As of `engine.index.plain.export_index`.
    """
    folders = {}
    for weights in require_indexes(run, iteration, models):
        folders[weights.model] = target / "index" / weights.model
        choice = retriever_of(system_of(run.config, weights))
        export_dense(run, data, run.folder, choice, folders[weights.model])
    return folders


def require_indexes(run: Run, iteration: int, models: Sequence[str] | None = None) -> list[WeightsOf]:
    """Return the states of an iteration's dense retrievers whose indexes are there.

    Args:
        run: The run.
        iteration: 0 is the warm-up.
        models: Which of them count; None for all.

    Raises:
        ConfigError: None is a dense retriever, or the index of none is there any more.
    """
    states = end_states(run.timetable, list(run.config.models), iteration)
    asked = [one for model, one in states.items() if models is None or model in models]
    dense = [one for one in asked if isinstance(run.config.models[one.model], RetrieverConfig)]
    indexes = {one: run.folder.index(run.timetable.artifact(one)) for one in dense}
    found = [one for one, index in indexes.items() if (index / MANIFEST).exists()]
    if not dense:
        raise ConfigError(
            "there is no index to write: none of the models is a dense retriever",
            expected="one among them",
            remedy="leave --index out, or name such a model by --models, too, where the run has one",
        )
    if not found:
        raise ConfigError(
            f"there is no index to write for iteration {iteration}: {indexes[dense[0]]} has none",
            expected="an iteration whose index the run has kept: the newest ones, and the one that it takes",
            remedy="name another --iteration, or leave --index out",
        )
    return found
