"""How long each phase takes: operations by an assumed share of the peak rate, files by an assumed rate of the disk.

Hours of the index come from `engine.index.estimate`. What is assumed is listed by `Rates.assumptions`, each with the
option that sets it; the shares of the peak are the weakest point of all (docs/plan.md has what was seen elsewhere).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from engine.config.recipe import Config
from engine.config.timetable import Mining
from engine.index.estimate import IndexEstimate
from engine.index.plan import IndexPlan
from launcher.plan.activations import Inputs
from launcher.plan.bm25 import bm25_use, searches_bm25
from launcher.plan.corpus import Corpus
from launcher.plan.flops import forward_flops, training_flops
from launcher.plan.hardware import Gpu
from launcher.plan.models import ModelShape, encoder_of, reranker_of
from launcher.plan.phases import Work
from launcher.plan.postings import PostingsUse
from launcher.plan.storage import DiskUse, mined_queries, mining_of_start, refreshes, searches_start, shard_sizes
from launcher.plan.traffic import ASSUMED_REFINE, gradient_bytes, pool_bytes

_ASSUMED_NPROBE = 64
_VISITS = 1500


@dataclass(frozen=True, slots=True)
class Rates:
    """What is assumed of the machines."""

    training_share: float = 0.30
    """Of the peak rate that forward and backward reach."""
    inference_share: float = 0.40
    """The same for passes without gradients."""
    disk_bytes: float = 2e9
    """Of the shared file system, all ranks together, in bytes a second."""
    local_disk_bytes: float = 2e9
    """Of a host's own disk, in bytes a second."""
    local_disks: int = 0
    """Hosts whose own disks have the embeddings; 0 where the shared file system has them."""
    network_bytes: float = 10e9
    """That a rank sends a second, between hosts."""
    gigaflops: float = 720.0
    """Of a rank's CPU cores in a float32 matrix product: FAISS trains and fills there."""
    tokenised: float = 6000.0
    """Passages that a rank tokenises a second."""
    bm25_built: float = 6000.0
    """Passages that a rank takes into BM25's index a second, its counting and its weights (measured on one core)."""
    bm25_scored: float = 0.15e9
    """Passages that a rank scores by BM25 a second, over all queries (measured: 0.11e9 with 80,000, more with more)."""
    postings_scored: float = 0.028e9
    """Passages that a rank scores by a lexical retriever a second, over all queries (measured on one core by scipy; by
    numba 0.126e9)."""

    @property
    def embeddings_read(self) -> float:
        """Bytes of embeddings that all ranks together read or write a second."""
        return self.local_disks * self.local_disk_bytes or self.disk_bytes

    def of_hosts(self, config: Config, nodes: int) -> Rates:
        """Return the same for a recipe on so many hosts, whose disks may have the embeddings."""
        return replace(self, local_disks=nodes if config.index.embeddings == "local" else 0)

    def assumptions(self, gpu: Gpu, precisions: set[str]) -> list[str]:
        """Say what the hours rest on."""
        peaks = ", ".join(f"{gpu.peak_flops(one) / 1e12:g} TFLOP/s in {one}" for one in sorted(precisions))
        known = "assumed, a core" if gpu.is_cpu else "maker's data, dense"
        own = f", a host's own disk {self.local_disk_bytes / 1e9:g} (--local-disk-gbytes)" if self.local_disks else ""
        return [
            f"{gpu.name}: {peaks} at most ({known})",
            f"training reaches {self.training_share:.0%} of that (--training-share), inference "
            f"{self.inference_share:.0%} (--inference-share)",
            "every input is padded to its max_length in training; the corpus is encoded without padding",
            f"a rank sends {self.network_bytes / 1e9:g} GB/s to others (--network-gbytes) and computes nothing "
            f"meanwhile; the shared file system {self.disk_bytes / 1e9:g} GB/s for all (--disk-gbytes){own}",
            f"FAISS works on the CPU: {self.gigaflops:g} GFLOP/s a rank (--gflops-per-rank; 8 cores of 90)",
            f"tokenising {self.tokenised:g} passages/s a rank; BM25 {self.bm25_built:g} passages/s built and "
            f"{self.bm25_scored / 1e6:g} million scored a rank",
        ]


@dataclass(frozen=True, slots=True)
class PhaseHours:
    """Time of one phase over the whole recipe."""

    name: str
    times: int
    """How often it runs."""
    seconds: float
    """Of all of them."""
    flops: float
    """Of the models, all ranks, all times."""
    how: str


def phase_hours(
    config: Config,
    corpus: Corpus,
    shapes: Mapping[str, ModelShape],
    works: list[Work],
    stages: Mapping[str, int],
    machines: tuple[int, int],
    plan: IndexPlan,
    needs: IndexEstimate,
    postings: PostingsUse | None,
    disk: DiskUse,
    gpu: Gpu,
    rates: Rates,
) -> list[PhaseHours]:
    """Estimate all phases of a recipe in the order in which they run, on so many hosts of so many ranks."""
    nodes, ranks_per_node = machines
    context = _Context(config, corpus, shapes, stages, nodes * ranks_per_node, plan, needs, disk, gpu, rates)
    mined = len(refreshes(config.timetable))
    encoded = mined + searches_start(config)
    found = [
        context.preparing(),
        *[context.training(work) for work in works],
        context.encoding(context.encoder, encoded, needs.embeddings_bytes / rates.embeddings_read),
        *context.indexing(encoded),
        *context.mining(mined),
        *context.rescoring(),
        *context.lexical(postings),
        context.evaluation(),
        context.saving(works),
        PhaseHours(
            *("gather embeddings", int(bool(disk.gathered)), (disk.gathered or 0) / rates.disk_bytes, 0.0),
            "copied from the hosts to the run folder",
        ),
        PhaseHours("export", 1, 4 * disk.exports / rates.disk_bytes + 10, 0.0, "written, loaded again, compared"),
    ]
    found = _overlapped(config, [phase for phase in found if phase.times], gpu, ranks_per_node)
    return [phase for phase in found if phase.seconds > 0]


def _overlapped(config: Config, found: list[PhaseHours], gpu: Gpu, ranks_per_node: int) -> list[PhaseHours]:
    """Leave out of a refresh's hours what the ranker's phase hides, where they run beside it.

    Devices that are kept for that encode and search as fast as so many ranks; the index is made by processors, of which
    companions have as many as the ranks where all compute on GPUs.
    """
    table, kept = config.timetable, config.refresh_devices
    if not table.beside:
        return found
    room = sum(phase.seconds for phase in found if phase.name == "ranker phase")
    left = []
    for phase in found:
        is_index = phase.name.startswith("index: ")
        if is_index or phase.name == "mining search" or (table.encodes_beside and phase.name == "encode"):
            share = min(1.0, table.iterations_with("index") / phase.times)
            by_ranks = not kept or (is_index and not gpu.is_cpu)
            takes = phase.seconds * share * (1.0 if by_ranks else ranks_per_node / kept)
            hidden = min(room, takes)
            room -= hidden
            how = f"{phase.how}; {clock(hidden)} more beside the ranker's phase"
            phase = replace(phase, seconds=phase.seconds * (1 - share) + takes - hidden, how=how)
        left.append(phase)
    return left


def clock(seconds: float) -> str:
    """Write a duration as a person reads it, to two digits."""
    for unit, one in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= one:
            return f"{seconds / one:.2g} {unit}"
    return f"{seconds * 1000:.2g} ms"


@dataclass(frozen=True, slots=True)
class _Context:
    config: Config
    corpus: Corpus
    shapes: Mapping[str, ModelShape]
    stages: Mapping[str, int]
    world_size: int
    plan: IndexPlan
    needs: IndexEstimate
    disk: DiskUse
    gpu: Gpu
    rates: Rates

    @property
    def encoder(self) -> str:
        return encoder_of(self.config)

    @property
    def mined(self) -> Mining | None:
        """What stands for each refresh: the last one, as warm-ups draw from the first; None without any."""
        found = refreshes(self.config.timetable)
        return found[-1] if found else None

    def preparing(self) -> PhaseHours:
        """Estimate the shards, and BM25: built by all ranks, as far as there are parts, and asked once."""
        documents, rates = self.corpus.documents, self.rates
        seconds = documents / rates.tokenised / self.world_size + self.disk.shards / rates.disk_bytes
        use = bm25_use(self.config, self.corpus, shard_sizes(self.config, documents))
        if not use.num_parts:
            return PhaseHours("shards", 1, seconds, 0.0, "tokenise; no BM25")
        seconds += documents / rates.bm25_built / min(self.world_size, use.num_parts)
        seconds += self.bm25_queries * documents / rates.bm25_scored / self.world_size
        return PhaseHours("shards, BM25", 1, seconds, 0.0, f"tokenise, index {use.num_parts} parts, search once")

    @property
    def bm25_queries(self) -> int:
        """Queries whose BM25 candidates are retrieved, and those of the yardstick."""
        table, settings = self.config.timetable, self.config.evaluation
        asked = [mining for mining in table.minings if searches_bm25(self.config, mining.retriever)]
        train = sum(mined_queries(table, self.corpus, mining) for mining in asked)
        return train + self.dev + (min(self.corpus.test, settings.max_test_queries or self.corpus.test))

    @property
    def dev(self) -> int:
        return min(self.corpus.dev, self.config.evaluation.max_dev_queries or self.corpus.dev)

    @property
    def test(self) -> int:
        limit = self.config.evaluation.max_test_queries
        return min(self.corpus.test, limit or self.corpus.test) if self.config.evaluation.test_at_end else 0

    def rate(self, model: str, share: float) -> float:
        """Return the operations a second of all ranks together."""
        return self.gpu.peak_flops(self.config.models[model].precision) * share * self.world_size

    def training(self, work: Work) -> PhaseHours:
        """Estimate a training phase: passes, the opponent's scores, and the reduction of gradients."""
        section, shape, steps = self.config.models[work.model], self.shapes[work.model], work.phase.total_steps
        micro_batches = self.world_size * steps * work.queries / work.micro_queries
        flops = micro_batches * training_flops(
            shape, work.batches, checkpointing=section.gradient_checkpointing is True, cached=work.cached
        )
        seconds = flops / self.rate(work.model, self.rates.training_share)
        if work.phase.opponent is not None:
            scored = micro_batches * forward_flops(self.shapes[work.phase.opponent], work.scored)
            seconds += scored / self.rate(work.phase.opponent, self.rates.inference_share)
            flops += scored
        sent = gradient_bytes(
            shape,
            section.precision,
            stage=self.stages[work.model],
            world_size=self.world_size,
            micro_batches=work.micro_batches,
            forwards=1 + work.cached,
        )
        sent += pool_bytes(work, shape.dimension, self.world_size)
        moving = steps * sent / self.rates.network_bytes
        title = work.name if work.phase.is_warmup else f"{work.name} phase"
        how = f"{steps} steps" + (f", {clock(moving)} of it on the network" if moving else "")
        return PhaseHours(title, work.visits, seconds + moving, flops, how)

    def encoding(self, model: str, times: int, writing: float, title: str = "encode") -> PhaseHours:
        """Estimate the encoding of the corpus: packed, so only real tokens count; `writing` in seconds."""
        length = round(min(self.corpus.tokens + 2, self.config.models[model].max_length))
        flops = forward_flops(self.shapes[model], [Inputs(self.corpus.documents, length)])
        computing = flops / self.rate(model, self.rates.inference_share)
        moving = self.disk.shards / self.rates.disk_bytes + writing
        how = f"{length} tokens a passage; each time {clock(moving)} for the disk"
        return PhaseHours(title, times, times * max(computing, moving), times * flops, how)

    def lexical(self, use: PostingsUse | None) -> list[PhaseHours]:
        """Estimate the encoding and the exact search of lexical retrievers, for negatives and for measurements."""
        if use is None:
            return []
        writing = use.num_bytes / self.rates.disk_bytes
        encoded = [self.encoding(model, times, writing, f"encode {model}") for model, times in use.states.items()]
        scoring = use.queries * self.corpus.documents / self.rates.postings_scored / self.world_size
        reading = use.passes * use.num_bytes / self.rates.disk_bytes
        how = (
            f"{use.queries} queries, exact; mining reads all postings {use.passes} times, {clock(reading)} of the disk"
        )
        return [*encoded, PhaseHours("lexical search", len(use.states), max(scoring, reading), 0.0, how)]

    def indexing(self, times: int) -> list[PhaseHours]:
        """Estimate training, filling, merging and tuning of the index."""
        needs, rates = self.needs, self.rates
        exact = self._exact_seconds(self.config.index.audit_queries)
        reading = needs.embeddings_bytes / rates.embeddings_read
        if self.plan.exact:
            return []
        filling = max(60 * needs.add_minutes / self.world_size, reading)
        begun = {mining.model for mining in refreshes(self.config.timetable)}
        warm = self.config.index.warm_start * max(0, times - len(begun) - searches_start(self.config))
        exchanging = self.plan.num_iterations * needs.exchange_bytes * self.world_size / rates.disk_bytes
        anew = 60 * (needs.train_minutes / self.world_size + needs.rotate_minutes) + exchanging
        followed = 60 * needs.warm_minutes / self.world_size + exchanging * needs.warm_minutes / needs.train_minutes
        how = f"all ranks; {warm} begin from the last index" if warm else "all ranks, from nothing"
        return [
            PhaseHours("index: train", times, (times - warm) * anew + warm * followed, 0.0, how),
            PhaseHours("index: fill, merge", times, times * (filling + 60 * needs.merge_minutes), 0.0, "all ranks"),
            PhaseHours("index: tune", times, times * max(exact, reading), 0.0, "exact search of the audit queries"),
        ]

    def mining(self, times: int) -> list[PhaseHours]:
        """Estimate the search of the training queries; nothing where no model's index is mined."""
        of_start = mining_of_start(self.config.timetable)
        found = [("mining search", times, self.mined), ("mining search, zero-shot", 1, of_start)]
        return [self._searched_for(name, often, one) for name, often, one in found if one is not None]

    def _searched_for(self, name: str, times: int, mining: Mining) -> PhaseHours:
        queries = mined_queries(self.config.timetable, self.corpus, mining)
        flops = forward_flops(self.shapes[self.encoder], [Inputs(queries, self.config.query_max_length)])
        seconds = flops / self.rate(self.encoder, self.rates.inference_share)
        seconds += self._search_seconds(queries, mining.top_k)
        how = f"{queries} queries, {self._probed}"
        return PhaseHours(name, times, times * seconds, times * flops, how)

    def rescoring(self) -> list[PhaseHours]:
        """Estimate new scores of older candidates: their documents encoded anew, or read where the corpus has been."""
        table, shape, model = self.config.timetable, self.shapes[self.encoder], self.config.models[self.encoder]
        length = round(min(self.corpus.tokens + 2, model.max_length))
        row_bytes = self.needs.embeddings_bytes / self.corpus.documents
        flops, most, moved = 0.0, 0, 0.0
        for visits in table.rescored.values():
            queries, weights = sum(len(visit.places) for visit in visits), visits[0].rescored_by
            pairs = min(self.corpus.train, queries) * table.mining(visits[0].candidates).top_k
            newest = weights.iteration if weights is not None and not table.encodes_beside else None
            is_stored = newest is not None and table.is_refreshed(newest)
            encoded = 0 if is_stored else min(self.corpus.documents, pairs)
            flops += forward_flops(shape, [Inputs(encoded, length)])
            moved += (pairs + encoded) * row_bytes + encoded * self.disk.shards / self.corpus.documents
            most = max(most, encoded)
        seconds = max(flops / self.rate(self.encoder, self.rates.inference_share), moved / self.rates.disk_bytes)
        how = f"{most} documents at most encoded at once; fewer, where queries share them"
        return [PhaseHours("new scores", len(table.rescored), seconds, flops, how)]

    def evaluation(self) -> PhaseHours:
        """Estimate re-ranking and search on dev in each iteration, and on test at the end."""
        settings, iterations = self.config.evaluation, self.config.timetable.iterations_with("evaluate")
        rounds = self.dev * (1 + iterations) + self.test * (1 + (iterations > 0))
        flops, seconds, how = 0.0, 0.0, f"{rounds} queries in all"
        if (ranker := reranker_of(self.config)) is not None:
            scored = rounds * settings.rerank_depth + self._pairs_of_others()
            flops = forward_flops(self.shapes[ranker], [Inputs(scored, self.config.models[ranker].max_length)])
            seconds = flops / self.rate(ranker, self.rates.inference_share)
            how += f", {settings.rerank_depth} documents each re-ranked"
        seconds += self._search_seconds(rounds + (self.dev + self.test) * settings.zero_shot, settings.search_depth)
        return PhaseHours("evaluation", 1 + iterations, seconds, flops, how)

    def _pairs_of_others(self) -> int:
        """Return how many pairs a mixture has the ranker score at most that it has not scored behind its retriever."""
        settings, searching = self.config.evaluation, len(self.config.timetable.encoders) + self.config.bm25.enabled
        if not settings.fuse or settings.fusion_candidates == "retriever":
            return 0
        return (self.dev + self.test) * settings.rerank_depth * (searching - 1) // searching

    def saving(self, works: list[Work]) -> PhaseHours:
        """Estimate checkpoints and published weights: written, read back."""
        num_bytes, saves = 0.0, 0
        for work in works:
            number = work.visits * -(-work.phase.steps // self.config.run.checkpoint_every_steps)
            loaded = 4 * work.visits * (3 + self.world_size)
            num_bytes += self.shapes[work.model].parameters * (2 * 12 * number + loaded)
            saves += number
        return PhaseHours(
            "checkpoints, weights", saves, num_bytes / self.rates.disk_bytes, 0.0, "times are checkpoints"
        )

    @property
    def _probed(self) -> str:
        if self.plan.exact:
            return "exact"
        nprobe, refine = self.plan.nprobe or _ASSUMED_NPROBE, self.plan.refine_factor or ASSUMED_REFINE
        chosen = "" if self.plan.nprobe and self.plan.refine_factor else " (tuned in the run; assumed here)"
        return f"nprobe {nprobe}, refine {refine}{chosen}"

    def _exact_seconds(self, queries: int) -> float:
        """Return the time in which all ranks multiply queries with the whole corpus, in float32."""
        flops = 2.0 * queries * self.corpus.documents * self.shapes[self.encoder].dimension
        return flops / (self.gpu.fp32_flops * self.rates.inference_share * self.world_size)

    def _search_seconds(self, queries: int, top_k: int) -> float:
        """Return the time of a search by all ranks: centroids, codes of the visited lists, exact re-scoring."""
        dimension = self.shapes[self.encoder].dimension
        depth = top_k * 5 / 4
        if self.plan.exact:
            return max(self._exact_seconds(queries), self.needs.embeddings_bytes / self.rates.embeddings_read)
        nprobe, refine = self.plan.nprobe or _ASSUMED_NPROBE, self.plan.refine_factor or ASSUMED_REFINE
        compared = min(_VISITS, self.plan.num_lists) if "HNSW" in self.plan.factory else self.plan.num_lists
        visited = nprobe * self.corpus.documents / self.plan.num_lists
        work = 2.0 * compared * dimension + 2.0 * visited * self.plan.code_bytes
        computing = queries * work / (self.rates.gigaflops * 1e9 * _SCAN_SHARE) / self.world_size
        rows = queries * depth * refine * self.needs.embeddings_bytes / self.corpus.documents
        return computing + rows / self.rates.embeddings_read


_SCAN_SHARE = 0.1
"""Of a matrix product's rate that scanning codes reaches (assumed)."""
