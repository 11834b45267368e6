"""Turns token ids into embeddings: the corpus shard by shard into a store, queries into one array.

Each rank encodes its own shards in its own rhythm, so nothing here may be a collective operation: the encoder must
hold whole weights (a ZeRO-3 engine's forward is a collective, and uneven shards would hang it), and it must be in
evaluation mode, since dropout would show in no error. A shard whose part is finished is skipped, which is all that
resuming an encoding takes.

Inputs are sorted by length before they are batched, so that a batch is padded by little; results go back into the
given order. Shapes: N documents, Q queries, L tokens, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.errors import TrainingError
from engine.models.template import Input, InputTemplate
from shards.embeddings import Stamp, part_is_complete, write_part
from shards.reader import CorpusShards

Encoder = Callable[[dict[str, Tensor]], Tensor]
"""Maps a padded batch (`input_ids` [N, L], ...) to embeddings [N, D]."""

_PAD_TO_MULTIPLE_OF = 8


def encode_documents(
    encoder: Encoder,
    template: InputTemplate,
    shards: CorpusShards,
    stream: str,
    shard_numbers: Sequence[int],
    folder: Path,
    stamp: Stamp,
    *,
    max_length: int,
    tokens_per_batch: int,
    dtype: Literal["float16", "float32"],
    device: torch.device,
    progress: Callable[[int, int], None],
) -> None:
    """Encode shards into an embedding store, those that are there already excepted.

    Args:
        encoder: The document tower, in evaluation mode, on `device`.
        template: Adds the special tokens and pads.
        shards: The corpus.
        stream: The retriever's token stream.
        shard_numbers: The shards that this rank encodes.
        folder: The store's folder.
        stamp: What the encoder's weights and the corpus are.
        max_length: Tokens of a document, special tokens included.
        tokens_per_batch: Padded tokens of a forward at most; a longer document has a forward of its own.
        dtype: Type of the stored embeddings.
        device: Where the encoder is.
        progress: Called with (documents, tokens without padding) after each forward, and with (documents, 0) for a
            shard that was there already.

    Raises:
        ArtifactError: A shard is damaged, or an embedding is not finite in `dtype`.
    """
    for number in shard_numbers:
        entry = shards.manifest.shards[number]
        if part_is_complete(folder, entry, stamp):
            progress(entry.num_documents, 0)
            continue
        # The whole shard is read before any of it is encoded: damage at its end would else show after the work.
        inputs = [template.single(ids.tolist(), max_length) for _, ids in shards.iterate(number, stream)]
        embeddings_ND = _encode(encoder, template, inputs, tokens_per_batch, dtype, device, progress)
        write_part(folder, entry, embeddings_ND, stamp)


def encode_queries(
    encoder: Encoder,
    template: InputTemplate,
    query_ids: Sequence[Sequence[int]],
    *,
    max_length: int,
    tokens_per_batch: int,
    device: torch.device,
) -> npt.NDArray[np.float32]:
    """Encode queries.

    Args:
        encoder: The query tower, in evaluation mode, on `device`.
        template: Adds the special tokens and pads.
        query_ids: Token ids of each query, without special tokens; at least one query.
        max_length: Tokens of a query, special tokens included.
        tokens_per_batch: Padded tokens of a forward at most; a longer query has a forward of its own.
        device: Where the encoder is.

    Returns:
        float32 [Q, D], in the order of `query_ids`.

    Raises:
        TrainingError: An embedding is not finite.
        ValueError: There is no query, so that D is unknown.
    """
    if not query_ids:
        raise ValueError("there is no query to encode")
    inputs = [template.single(ids, max_length) for ids in query_ids]
    queries_QD = _encode(encoder, template, inputs, tokens_per_batch, "float32", device, lambda _queries, _tokens: None)
    bad = np.flatnonzero(~np.isfinite(queries_QD).all(axis=1))
    if bad.size:
        raise TrainingError(
            f"the embedding of query {int(bad[0])} of {len(inputs)} is not finite, as are {bad.size - 1} more",
            expected="finite numbers, which a search can compare",
            remedy="look for a training run that diverged: lower the learning rate or start from an earlier checkpoint",
        )
    return queries_QD


def batches_by_length(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Group inputs of similar length under a budget of padded tokens.

    Args:
        lengths: Tokens of each input, special tokens included.
        tokens_per_batch: Padded tokens of a batch at most; an input that exceeds it alone is a batch of its own.

    Yields:
        Places in `lengths`, longest first, so that a batch that does not fit into memory fails at the start. Every
        place is in one batch; the grouping depends on the lengths alone.
    """
    batch: list[int] = []
    padded = 0
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        if batch and (len(batch) + 1) * padded > tokens_per_batch:
            yield batch
            batch = []
        if not batch:
            padded = -(-lengths[place] // _PAD_TO_MULTIPLE_OF) * _PAD_TO_MULTIPLE_OF
        batch.append(place)
    if batch:
        yield batch


@torch.inference_mode()
def _encode(
    encoder: Encoder,
    template: InputTemplate,
    inputs: Sequence[Input],
    tokens_per_batch: int,
    dtype: Literal["float16", "float32"],
    device: torch.device,
    progress: Callable[[int, int], None],
) -> npt.NDArray[Any]:
    """Return embeddings [N, D] of `dtype`, in the order of the inputs."""
    lengths = [len(one.ids) for one in inputs]
    embeddings_ND: npt.NDArray[Any] | None = None
    for places in batches_by_length(lengths, tokens_per_batch):
        batch = template.pad([inputs[place] for place in places], pad_to_multiple_of=_PAD_TO_MULTIPLE_OF)
        encoded_ND = encoder({name: tensor.to(device) for name, tensor in batch.items()})
        # Rounded by torch: numpy would warn of the overflow that `write_part` turns into an error.
        rounded_ND = encoded_ND.to(torch.float16 if dtype == "float16" else torch.float32).cpu().numpy()
        if embeddings_ND is None:
            embeddings_ND = np.empty((len(inputs), rounded_ND.shape[1]), dtype=dtype)
        embeddings_ND[places] = rounded_ND
        progress(len(places), sum(lengths[place] for place in places))
    assert embeddings_ND is not None  # callers give at least one input: a shard holds one document or more
    return embeddings_ND
