"""How many tokens a corpus is encoded by at once: what the recipe says, or the most that all ranks' devices take.

What was found stays in the run folder, so that later refreshes and later starts on the same kind of device take it
without a trial. It changes how fast a corpus is encoded, and embeddings by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.config.timetable import AUTO, WeightsOf
from engine.data.corpus import Data
from engine.log import get_logger
from engine.models.encode import Encoder, forward_of
from engine.models.largest_batch import BatchTrial, fastest_of, full_inputs, try_batches
from engine.run import Stage
from shards.files import read_record, write_json

log = get_logger(__name__)
_READ_DOCUMENTS = 64
"""Documents whose tokens the trial's inputs are made of."""


@dataclass(frozen=True, slots=True)
class FoundBatch:
    """The batch that devices take, for one model.

    Attributes:
        tokens: At once, on every rank.
        device: Kind of the device of rank 0.
    """

    tokens: int
    device: str


@dataclass(frozen=True, slots=True)
class _Record:
    """The file: what was found, by model."""

    models: dict[str, FoundBatch]


def tokens_per_batch(
    stage: Stage, data: Data, weights: WeightsOf, encoder: Callable[[], Encoder], convert: Callable[[Tensor], Tensor]
) -> int:
    """Return how many tokens each rank encodes at once; with `auto` on GPUs, a collective that may make a trial.

    Args:
        stage: Where this runs.
        data: The corpus.
        weights: Of the model that encodes.
        encoder: Its document tower, loaded when it is asked for.
        convert: What is made of its output, on the device.
    """
    run, settings = stage.run, stage.run.config.index
    default = run.config.evaluation.tokens_per_batch
    if settings.tokens_per_batch is None or (settings.tokens_per_batch == AUTO and run.device.type == "cpu"):
        return default
    if settings.tokens_per_batch != AUTO:
        return settings.tokens_per_batch
    max_length = run.config.models[weights.model].max_length

    def trial() -> list[BatchTrial]:
        return trials_of(data, weights.model, encoder(), convert, run.device, max_length=max_length, first=default)

    return agreed_tokens(stage, weights.model, torch.cuda.get_device_name(run.device), trial)


def trials_of(
    data: Data,
    model: str,
    encoder: Encoder,
    convert: Callable[[Tensor], Tensor],
    device: torch.device,
    *,
    max_length: int,
    first: int,
) -> list[BatchTrial]:
    """Encode larger and larger batches of the longest inputs, made of the corpus' own words.

    Args:
        data: The corpus.
        model: Name of the model, whose tokens are taken.
        encoder: Its document tower.
        convert: What is made of its output, on the device.
        device: Where the encoder is.
        max_length: Tokens of a document, special tokens included.
        first: Tokens of the first batch.
    """
    text, shards = data.texts[model], data.shards
    template = text.template.for_documents()
    numbers = range(min(_READ_DOCUMENTS, shards.num_documents))
    documents = [shards.tokens(number, text.stream).tolist() for number in numbers]

    def forward(tokens: int) -> None:
        ids: Sequence[Sequence[int]] = full_inputs(documents, template, max_length, tokens)
        forward_of(encoder, template, ids, convert, max_length=max_length, device=device)([*range(len(ids))]).cpu()

    return try_batches(forward, device, first=first)


def agreed_tokens(stage: Stage, model: str, device: str, trial: Callable[[], list[BatchTrial]]) -> int:
    """Return the batch that the devices of all ranks take: what the run has recorded, or the least of a trial's.

    Args:
        stage: Where this runs.
        model: Name of the model.
        device: Kind of this rank's device; what was found on another kind is found anew.
        trial: Makes this rank's trials.
    """
    coordinator, path = stage.run.coordinator, stage.run.folder.encode_batches
    name = f"{stage.name}: tokens of a batch"
    known: int | None = coordinator.only_rank_zero(f"{name}, known", lambda: _read(path, model, device))
    if known is not None:
        return known
    with coordinator.agreement(name):
        trials = trial()
    found: int = min(coordinator.gather(f"{name}, found", fastest_of(trials)))
    coordinator.only_rank_zero(f"{name}, kept", lambda: _write(path, model, FoundBatch(found, device)))
    if stage.run.is_main:
        told = ", ".join(
            f"{one.tokens}: " + ("out of memory" if one.tokens_per_second is None else f"{one.tokens_per_second:.0f}/s")
            for one in trials
        )
        log.info("%s: %d tokens are encoded at once on each rank (rank 0 tried %s)", stage.name, found, told)
    return found


def _read(path: Path, model: str, device: str) -> int | None:
    if not path.exists():
        return None
    found = read_record(path, _Record, "the record of encoded batches").models.get(model)
    return found.tokens if found is not None and found.device == device else None


def _write(path: Path, model: str, found: FoundBatch) -> None:
    known = read_record(path, _Record, "the record of encoded batches").models if path.exists() else {}
    write_json(path, asdict(_Record({**known, model: found})))
