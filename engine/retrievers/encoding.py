"""A pass over the corpus by all ranks with the weights of an encoder, whatever it makes of a document.

Shards are handed out one by one, the longest first; those whose part is finished are not encoded again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from engine.config.timetable import WeightsOf
from engine.data.corpus import Data
from engine.data.reuse import take_over_same_weights
from engine.errors import ArtifactError
from engine.index.held.deal import Deal
from engine.log import get_logger
from engine.models.source import saved_metadata
from engine.models.weights import weights_sha256
from engine.reliability.pace import Pace, slow_ranks, slowest_share
from engine.reliability.progress import progress_bar
from engine.retrievers.choice import Choice
from engine.run import Run, Stage
from shards.embeddings import Stamp
from shards.manifest import ShardEntry

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EncodedCorpus:
    """Result of a stage `encode/ITERATION`."""

    documents: int
    encoded: int
    """Documents that were not encoded already."""
    documents_per_second: float | None = None
    """Of all ranks together; None where there was nothing to do."""
    tokens_per_second: float | None = None


def stamp_of_weights(run: Run, data: Data, choice: Choice) -> Stamp:
    """Return what must be carried by all that published weights make of a corpus: vectors, index and candidates.

    Raises:
        ArtifactError: There are no such weights, or they were published with other prompts than texts now get.
    """
    weights = choice.trained
    folder = run.folder.weights(weights.model, weights.state)
    digest = weights_sha256(folder)
    published, now = saved_metadata(folder).get("prompts", {}), data.texts[weights.model].prompts
    if published != now:
        raise ArtifactError(
            f"the weights in {folder} were published with the prompts {published}, texts now get {now}",
            expected="the same, as vectors of two prompts cannot be compared",
            remedy=f"set {weights.model}.query_prompt and {weights.model}.document_prompt back, or begin another run",
        )
    return Stamp(run.timetable.artifact(weights), digest, data.shards.manifest.sha256)


def encode_over_ranks(
    stage: Stage,
    data: Data,
    weights: WeightsOf,
    index: Path,
    stamp: Stamp,
    *,
    is_complete: Callable[[ShardEntry], bool],
    encode: Callable[[Iterator[int], Callable[[int, int], None]], None],
    deal: Callable[[], Deal] | None = None,
) -> EncodedCorpus:
    """Encode the corpus with all ranks; shards that are encoded already, or by the same weights before, are not again.

    Args:
        stage: Where this runs.
        data: The corpus.
        weights: Those that encode.
        index: Folder that takes the vectors; it may take over a sibling's.
        stamp: Of the weights and the corpus.
        is_complete: Whether a shard is encoded already.
        encode: Takes the numbers of the shards that this rank is handed, and whom to tell of (documents, tokens).
            Called only where there is something to do.
        deal: Decides what each host encodes, where vectors stay on the hosts; called by all ranks alike, and
            `is_complete` is then not asked.
    """
    run, stream, entries = stage.run, data.texts[weights.model].stream, data.shards.manifest.shards

    def plan() -> list[int]:
        take_over_same_weights(index, stamp)
        if deal is not None:
            return []
        missing = [entry for entry in entries if not is_complete(entry)]
        # The longest first, so that no rank is left with a long one at the end.
        return [entry.number for entry in sorted(missing, key=lambda entry: (-entry.num_tokens[stream], entry.number))]

    missing: list[int] = run.coordinator.only_rank_zero(f"{stage.name}: plan", plan)
    homes: list[str] | None = None
    if deal is not None:
        dealt = deal()
        missing, homes = dealt.missing, dealt.homes
    num_missing = sum(entries[number].num_documents for number in missing)
    start, own = time.monotonic(), Pace()
    with (
        run.coordinator.agreement(f"{stage.name}: encode"),
        progress_bar(stage.name, num_missing, "doc", shown=run.is_main) as bar,
    ):
        if missing:
            handed_out = run.coordinator.hand_out(stage.name, missing, homes=homes)
            with own.timed(_with_progress(handed_out, missing, entries, bar)) as units:
                encode(units, own.count)
        if homes is not None:  # a host has its share, however slow it is: one may take twice as long as another
            patience = max(run.coordinator.timeout_seconds, time.monotonic() - start)
            run.coordinator.barrier(f"{stage.name}: the shares of all hosts", patience)
    paces = [Pace(*one) for one in run.coordinator.gather(f"{stage.name}: pace", astuple(own))]
    seconds = max(time.monotonic() - start, 1e-9)
    tokens = sum(pace.tokens for pace in paces)
    if not missing:
        return EncodedCorpus(data.shards.num_documents, 0)
    speed = {"documents_per_second": num_missing / seconds, "tokens_per_second": tokens / seconds}
    share = slowest_share(paces)
    measured = speed if share is None else speed | {"slowest_rank": share}
    run.metrics.write(stage.name, weights.iteration or 0, {f"encode/{key}": value for key, value in measured.items()})
    if run.is_main and (slow := slow_ranks(paces, run.coordinator.hosts)):
        log.warning("%s: %s", stage.name, slow)
    return EncodedCorpus(data.shards.num_documents, num_missing, **speed)


def _with_progress(
    handed_out: Iterator[int], order: Sequence[int], entries: Sequence[ShardEntry], bar: Any
) -> Iterator[int]:
    """Yield what is handed out; all that stands before it in the order has been taken, by whichever rank."""
    sizes = [entries[number].num_documents for number in order]
    taken_before = dict(zip(order, accumulate(sizes, initial=0), strict=False))
    for number in handed_out:
        bar.update(taken_before[number] - bar.n)
        yield number
