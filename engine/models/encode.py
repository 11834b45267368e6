"""Turns token ids into embeddings: the corpus shard by shard into a store, queries into one array.

`engine.models.encode_sparse` does the same for vectors over a vocabulary, by `encode_shards` and `encode_batches`.

Each rank encodes its own shards in its own rhythm, so nothing here may be a collective operation: the encoder must
hold whole weights (a ZeRO-3 engine's forward is a collective, and uneven shards would hang it), and it must be in
evaluation mode, since dropout would show in no error. A shard whose part is finished is skipped, which is all that
resuming an encoding takes.

Inputs are sorted by length before they are batched (`engine.models.inference`); results go back into the given order.
A `PackedEncoder` computes no padding at all, another encoder little of it. Batches are formed within a shard, by
lengths alone: an embedding's bytes do not depend on who encodes the shard, nor on the number of threads.

Shapes: N documents, Q queries, L tokens, D embedding dimension.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.errors import TrainingError
from engine.models.dual import PaddedEncoder
from engine.models.inference import PAD_TO_MULTIPLE_OF, compute_by_length
from engine.models.packed import PackedEncoder
from engine.models.template import InputTemplate
from shards.embeddings import Stamp, part_is_complete, write_part
from shards.files.overlap import WriteBehind, read_ahead
from shards.manifest import ShardEntry
from shards.reader import CorpusShards

Encoder = PackedEncoder | PaddedEncoder
"""`Retriever.document_encoder()` and `query_encoder()` return the best for a model."""

TokenIds = npt.NDArray[np.uint32]
"""Of one input, [L]."""

V = TypeVar("V")


def encode_documents(
    encoder: Encoder,
    template: InputTemplate,
    shards: CorpusShards,
    stream: str,
    shard_numbers: Iterable[int],
    folder: Path,
    stamp: Stamp,
    *,
    max_length: int,
    tokens_per_batch: int,
    dtype: Literal["float16", "float32"],
    device: torch.device,
    progress: Callable[[int, int], None],
    write: Callable[[ShardEntry, npt.NDArray[Any]], None] | None = None,
) -> None:
    """Encode shards into an embedding store, those that are there already excepted.

    Args:
        encoder: The document tower, in evaluation mode, on `device`.
        template: Adds the special tokens and pads.
        shards: The corpus.
        stream: The retriever's token stream.
        shard_numbers: The shards that this rank encodes, asked for as `encode_shards` says.
        folder: The store's folder.
        stamp: What the encoder's weights and the corpus are.
        max_length: Tokens of a document, special tokens included.
        tokens_per_batch: Tokens of a forward at most, padding included; a longer document has a forward of its own.
            On a CPU 1024 at most, which is faster.
        dtype: Type of the stored embeddings.
        device: Where the encoder is.
        progress: Called with (documents, tokens without padding) after each forward, and with (documents, 0) for a
            shard that was there already.
        write: Takes a shard and its embeddings, in place of the folder; every shard is then encoded.

    Raises:
        ArtifactError: A shard is damaged, or an embedding is not finite in `dtype`.
    """
    encode_shards(
        shards,
        stream,
        shard_numbers,
        is_complete=lambda entry: write is None and part_is_complete(folder, entry, stamp, dtype),
        encode=lambda ids, tell: embeddings_of(
            encoder, template, ids, max_length, tokens_per_batch, dtype, device, progress=tell
        ),
        write=write or (lambda entry, embeddings_ND: write_part(folder, entry, embeddings_ND, stamp)),
        progress=progress,
    )


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
        tokens_per_batch: Tokens of a forward at most, padding included; a longer query has a forward of its own. On
            a CPU 1024 at most, which is faster.
        device: Where the encoder is.

    Returns:
        float32 [Q, D], in the order of `query_ids`.

    Raises:
        TrainingError: An embedding is not finite.
        ValueError: There is no query, so that D is unknown.
    """
    if not query_ids:
        raise ValueError("there is no query to encode")
    queries_QD = embeddings_of(
        encoder,
        template,
        [np.asarray(ids, dtype=np.uint32) for ids in query_ids],
        max_length,
        tokens_per_batch,
        "float32",
        device,
        lambda _queries, _tokens: None,
    )
    bad = np.flatnonzero(~np.isfinite(queries_QD).all(axis=1))
    if bad.size:
        raise TrainingError(
            f"the embedding of query {int(bad[0])} of {len(query_ids)} is not finite, as are {bad.size - 1} more",
            expected="finite numbers, which a search can compare",
            remedy="look for a training run that diverged: lower the learning rate or start from an earlier checkpoint",
        )
    return queries_QD


def encode_shards(
    shards: CorpusShards,
    stream: str,
    shard_numbers: Iterable[int],
    *,
    is_complete: Callable[[ShardEntry], bool],
    encode: Callable[[list[TokenIds], Callable[[int, int], None]], V],
    write: Callable[[ShardEntry, V], None],
    progress: Callable[[int, int], None],
) -> None:
    """Encode shard by shard; while one is computed, a thread writes the last and another reads the next.

    The next shard is asked for when half of this one is encoded: soon enough to be there in time, and so late that a
    slow rank does not sit on a whole one. A process that is killed loses the shard that it computes, and one more where
    that is not written yet.

    Args:
        shards: The corpus.
        stream: The model's token stream.
        shard_numbers: Those to encode; asked for one by one, by a thread after the first.
        is_complete: Whether a shard is encoded already.
        encode: Takes the token ids of a shard's documents and whom to tell of (documents, tokens).
        write: Takes a shard and what `encode` made of it; run by a thread, one at a time, in order.
        progress: Told by the calling thread of what `encode` tells, and (documents, 0) for a shard that is complete.

    Raises:
        ArtifactError: A shard is damaged, or what was made of it cannot be written.
    """
    numbers = iter(shard_numbers)
    try:
        first = next(numbers)  # here, since ranks may meet at the first
    except StopIteration:
        return
    may_take, left = threading.Semaphore(0), threading.Event()

    def read() -> Iterator[tuple[ShardEntry, list[TokenIds] | None]]:
        for number in chain([first], numbers):
            entry = shards.manifest.shards[number]
            # The whole shard is read before any of it is encoded: damage at its end would else show after the work.
            yield entry, None if is_complete(entry) else [ids_L for _, ids_L in shards.iterate(number, stream)]
            may_take.acquire()
            if left.is_set():
                return

    with WriteBehind() as behind, read_ahead(read()) as given:
        try:
            for entry, ids in given:
                if ids is not None:
                    made = encode(ids, _telling_half(len(ids), may_take, progress))
                    behind.write(partial(write, entry, made))
                else:
                    progress(entry.num_documents, 0)
                    may_take.release()
        finally:
            left.set()
            may_take.release()


def _telling_half(
    num_documents: int, half_done: threading.Semaphore, progress: Callable[[int, int], None]
) -> Callable[[int, int], None]:
    """Return a progress that also tells, once, when half of some documents are done."""
    done = 0

    def tell(documents: int, tokens: int) -> None:
        nonlocal done
        before, done = done, done + documents
        if 2 * before < num_documents <= 2 * done:
            half_done.release()
        progress(documents, tokens)

    return tell


def encode_batches(
    encoder: Encoder,
    template: InputTemplate,
    ids: Sequence[TokenIds],
    convert: Callable[[Tensor], Tensor],
    keep: Callable[[list[int], Tensor], None],
    *,
    max_length: int,
    tokens_per_batch: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> None:
    """Encode inputs in batches of similar length, as fast as the device allows.

    Args:
        encoder: A tower, in evaluation mode, on `device`.
        template: Adds the special tokens and pads.
        ids: Of each input, without special tokens.
        convert: Takes what the encoder gives for a batch, and gives what is kept of it, on the device; called by the
            thread that encodes, in inference mode.
        keep: Takes places in `ids` and the converted rows, on the CPU; called by one thread, in any order.
        max_length: Tokens of an input, special tokens included.
        tokens_per_batch: As in `encode_documents`.
        device: Where the encoder is.
        progress: Called with (inputs, tokens without padding) after each batch.
    """
    lengths = [min(len(ids_L) + template.num_special_single, max_length) for ids_L in ids]
    forward = forward_of(encoder, template, ids, convert, max_length=max_length, device=device)

    def keep_and_tell(places: list[int], rows: Tensor) -> None:
        keep(places, rows)
        progress(len(places), sum(lengths[place] for place in places))

    padded = not isinstance(encoder, PackedEncoder)
    compute_by_length(forward, lengths, keep_and_tell, tokens_per_batch=tokens_per_batch, padded=padded, device=device)


def forward_of(
    encoder: Encoder,
    template: InputTemplate,
    ids: Sequence[Sequence[int] | TokenIds],
    convert: Callable[[Tensor], Tensor],
    *,
    max_length: int,
    device: torch.device,
) -> Callable[[list[int]], Tensor]:
    """Return a function from places in `ids` to their rows on the device, as one batch; as `encode_batches`."""

    @torch.inference_mode()  # here, because the mode is a thread's own
    def forward(places: list[int]) -> Tensor:
        batch = [template.single(ids[place], max_length) for place in places]
        if isinstance(encoder, PackedEncoder):
            return convert(encoder(batch))
        padded = template.pad(batch, pad_to_multiple_of=PAD_TO_MULTIPLE_OF)
        return convert(encoder({name: tensor.to(device) for name, tensor in padded.items()}))

    return forward


def embeddings_of(
    encoder: Encoder,
    template: InputTemplate,
    ids: Sequence[TokenIds],
    max_length: int,
    tokens_per_batch: int,
    dtype: Literal["float16", "float32"],
    device: torch.device,
    progress: Callable[[int, int], None],
) -> npt.NDArray[Any]:
    """Encode inputs into one array.

    Args:
        encoder: A tower, in evaluation mode, on `device`.
        template: Adds the special tokens and pads.
        ids: Token ids of each input, without special tokens; at least one input.
        max_length: Tokens of an input, special tokens included.
        tokens_per_batch: As in `encode_documents`.
        dtype: Type of the embeddings; what it cannot hold is infinite.
        device: Where the encoder is.
        progress: Called with (inputs, tokens without padding) after each batch.

    Returns:
        [N, D] of `dtype`, in the order of the inputs.
    """
    found: list[npt.NDArray[Any]] = []

    def keep(places: list[int], rows_ND: Tensor) -> None:
        if not found:
            found.append(np.empty((len(ids), rows_ND.shape[1]), dtype=dtype))
        found[0][places] = rows_ND.numpy()

    encode_batches(
        encoder,
        template,
        ids,
        # Rounded by torch: numpy would warn of the overflow that `write_part` turns into an error.
        lambda rows_ND: rows_ND.to(torch.float16 if dtype == "float16" else torch.float32),
        keep,
        max_length=max_length,
        tokens_per_batch=tokens_per_batch,
        device=device,
        progress=progress,
    )
    return found[0]  # callers give at least one input: a shard holds one document or more
