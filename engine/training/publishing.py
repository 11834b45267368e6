"""Publishing: gather a model's weights from its engine and leave them where everyone finds them.

Under ZeRO-3 the weights lie in pieces on all ranks. `engine.models.weights` reads what is published here.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from engine.config.models import RankerConfig
from engine.config.recipe import Config
from engine.config.timetable import ZERO_SHOT
from engine.data.tokenization import ModelText
from engine.errors import ArtifactError
from engine.models.weights import MARKER, PublishedWeights, digest_of, weight_files, words_of
from engine.run import Run
from engine.training.backend import TrainedModel
from shards.files import write_json


def publish_weights(run: Run, model: TrainedModel, text: ModelText, name: str) -> str:
    """Gather a model's weights and publish them under an iteration's name. A collective.

    Args:
        run: Whose folder takes them.
        model: The engine; its state is on the device.
        text: The tokenizer that goes with it.
        name: Iteration's name.

    Returns:
        The weights' sha256.
    """
    state = model.full_state_dict()
    folder = run.folder.weights(model.name, name)
    metadata = describe_model(run.config, model.name)
    return str(
        run.coordinator.only_rank_zero(
            f"publish {model.name} {name}", lambda: _write(folder, model, text, state, metadata)
        )
    )


def publish_start(run: Run, model: TrainedModel, text: ModelText) -> None:
    """Publish a model as it came, unless it has learnt since: then that is what must be there already. A collective.

    A run that begins with what another has finished may measure again what comes before its first step.

    Args:
        run: Whose folder takes the weights.
        model: The engine.
        text: The tokenizer that goes with it.

    Raises:
        ArtifactError: It has learnt, and what it was before is not there.
    """
    phases = run.timetable.phases_of(model.name)
    learnt = [visit.stage for phase in phases for visit in phase.visits if run.is_finished(visit.stage)]
    if not learnt:
        publish_weights(run, model, text, ZERO_SHOT)
    elif not (folder := run.folder.weights(model.name, ZERO_SHOT)).exists():
        raise ArtifactError(
            f"{folder} is missing, and {model.name} cannot be had there as it came: it has learnt in {learnt[0]}",
            expected="the weights before any training, where they are measured or trained from again",
            remedy="begin a run of its own, or undo the settings that ask for it (evaluation.zero_shot, or candidates "
            "that are mined with it)",
        )


def describe_model(config: Config, name: str) -> dict[str, Any]:
    """Return what a saved model must carry beside its weights to give the same scores elsewhere, as JSON."""
    section, added = config.models[name], dict[str, Any]()
    if isinstance(section, RankerConfig):
        added |= {"bm25_prior" if prior.weights is None else "prior": prior.scale for prior in config.priors}
    if isinstance(section, RankerConfig) and section.pair_words is not None:
        added["pair_template"] = section.pair_words
    return added | {
        "model": section.kind,
        "base": section.name,
        "attention": section.attention,
        "max_length": section.max_length,
        "score_scale": section.score_scale,
        "template": config.data.template,
        "query_max_length": config.query_max_length,
    }


def _write(
    folder: Path, model: TrainedModel, text: ModelText, state: dict[str, torch.Tensor], metadata: dict[str, Any]
) -> str:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.module.save(temporary, text.tokenizer, state_dict=state, metadata=metadata)  # type: ignore[operator]
    files = weight_files(temporary)
    digest = digest_of(files, words_of(temporary))
    write_json(temporary / MARKER, asdict(PublishedWeights(digest, files)))
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    return digest
