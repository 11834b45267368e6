"""How long each phase takes: operations by an assumed share of the peak rate, files by an assumed rate of the disk.

Hours of the index come from `engine.index.estimate`. What is assumed is listed by `Rates.assumptions`, each with the
option that sets it; the shares of the peak are the weakest point of all (docs/plan.md has what was seen elsewhere).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.config.recipe import Config
from engine.index.estimate import IndexEstimate
from engine.index.plan import IndexPlan
from launcher.plan.activations import Inputs
from launcher.plan.corpus import Corpus
from launcher.plan.flops import forward_flops, training_flops
from launcher.plan.hardware import Gpu
from launcher.plan.models import ModelShape, Role
from launcher.plan.phases import Work
from launcher.plan.storage import DiskUse, mined_queries
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
    network_bytes: float = 10e9
    """That a rank sends a second, between hosts."""
    gigaflops: float = 720.0
    """Of a rank's CPU cores in a float32 matrix product: FAISS trains and fills there."""
    tokenised: float = 6000.0
    """Passages that a rank tokenises a second."""
    bm25_built: float = 6000.0
    """Passages that rank 0 takes into BM25's index a second (measured on one core: 6,300)."""
    bm25_scored: float = 0.15e9
    """Passages that a rank scores by BM25 a second, over all queries (measured: 0.11e9 with 80,000, more with more)."""

    def assumptions(self, gpu: Gpu, precisions: set[str]) -> list[str]:
        """Say what the hours rest on."""
        peaks = ", ".join(f"{gpu.peak_flops(one) / 1e12:g} TFLOP/s in {one}" for one in sorted(precisions))
        known = "assumed, a core" if gpu.is_cpu else "maker's data, dense"
        return [
            f"{gpu.name}: {peaks} at most ({known})",
            f"training reaches {self.training_share:.0%} of that (--training-share), inference "
            f"{self.inference_share:.0%} (--inference-share)",
            "every input is padded to its max_length in training; the corpus is encoded without padding",
            f"a rank sends {self.network_bytes / 1e9:g} GB/s to others (--network-gbytes) and computes nothing "
            f"meanwhile; the shared file system {self.disk_bytes / 1e9:g} GB/s for all (--disk-gbytes)",
            f"FAISS works on the CPU: {self.gigaflops:g} GFLOP/s a rank (--gflops-per-rank; 8 cores of 90)",
            f"tokenising {self.tokenised:g} passages/s a rank; BM25 {self.bm25_built:g} passages/s built on rank 0, "
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
    shapes: Mapping[Role, ModelShape],
    works: list[Work],
    stages: Mapping[Role, int],
    world_size: int,
    plan: IndexPlan,
    needs: IndexEstimate,
    disk: DiskUse,
    gpu: Gpu,
    rates: Rates,
) -> list[PhaseHours]:
    """Estimate all phases of a recipe in the order in which they run."""
    context = _Context(config, corpus, shapes, stages, world_size, plan, needs, disk, gpu, rates)
    by_name = {work.name: work for work in works}
    refreshes = 1 + config.ar2.iterations + config.evaluation.zero_shot
    mined = 1 + config.ar2.iterations
    found = [
        PhaseHours(
            "shards, BM25",
            1,
            corpus.documents / rates.tokenised / world_size
            + disk.shards / rates.disk_bytes
            + corpus.documents / rates.bm25_built
            + context.bm25_queries * corpus.documents / rates.bm25_scored / world_size,
            0.0,
            "tokenise, index, search once",
        ),
        *[context.training(by_name[name]) for name in ("warm-up retriever", "warm-up ranker") if name in by_name],
        *[context.training(by_name[name]) for name in ("retriever", "ranker") if name in by_name],
        context.encoding(refreshes),
        *context.indexing(refreshes),
        context.mining(mined),
        context.evaluation(),
        context.saving(works),
        PhaseHours("export", 1, 4 * disk.exports / rates.disk_bytes + 10, 0.0, "written, loaded again, compared"),
    ]
    return [phase for phase in found if phase.times and phase.seconds > 0]


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
    shapes: Mapping[Role, ModelShape]
    stages: Mapping[Role, int]
    world_size: int
    plan: IndexPlan
    needs: IndexEstimate
    disk: DiskUse
    gpu: Gpu
    rates: Rates

    @property
    def bm25_queries(self) -> int:
        """Queries whose BM25 candidates are retrieved, and those of the yardstick."""
        settings, warm = self.config.evaluation, self.config.warmup_retriever
        train = self.corpus.train
        if self.config.ar2.mine == "sampled":
            train = min(train, warm.steps * warm.batch_size)
        return train + self.dev + (min(self.corpus.test, settings.max_test_queries or self.corpus.test))

    @property
    def dev(self) -> int:
        return min(self.corpus.dev, self.config.evaluation.max_dev_queries or self.corpus.dev)

    @property
    def test(self) -> int:
        limit = self.config.evaluation.max_test_queries
        return min(self.corpus.test, limit or self.corpus.test) if self.config.evaluation.test_at_end else 0

    def rate(self, role: Role, share: float) -> float:
        """Return the operations a second of all ranks together."""
        section = self.config.retriever if role == "retriever" else self.config.ranker
        return self.gpu.peak_flops(section.precision) * share * self.world_size

    def training(self, work: Work) -> PhaseHours:
        """Estimate a training phase: passes, the frozen ranker's scores, and the reduction of gradients."""
        section = self.config.retriever if work.role == "retriever" else self.config.ranker
        steps = self.world_size * work.steps * work.queries / work.batches[0].rows
        if work.role == "ranker":
            steps = self.world_size * work.steps * work.queries * self._width(work) / work.batches[0].rows
        flops = steps * training_flops(
            self.shapes[work.role], work.batches, checkpointing=section.gradient_checkpointing, cached=work.cached
        )
        seconds = flops / self.rate(work.role, self.rates.training_share)
        if work.opponent:
            scored = steps * forward_flops(self.shapes["ranker"], work.opponent)
            seconds += scored / self.rate("ranker", self.rates.inference_share)
            flops += scored
        sent = gradient_bytes(
            self.shapes[work.role],
            section.precision,
            stage=self.stages[work.role],
            world_size=self.world_size,
            micro_batches=work.micro_batches,
            forwards=1 + work.cached,
        )
        sent += pool_bytes(work, self.config, self.shapes["retriever"].hidden, self.world_size)
        moving = work.steps * sent / self.rates.network_bytes
        times = self.config.ar2.iterations if work.name in ("retriever", "ranker") else 1
        how = f"{work.steps} steps" + (f", {clock(moving)} of it on the network" if moving else "")
        return PhaseHours(_TITLES[work.name], times, seconds + moving, flops, how)

    def encoding(self, times: int) -> PhaseHours:
        """Estimate the encoding of the corpus: packed, so that only real tokens are computed."""
        length = round(min(self.corpus.tokens + 2, self.config.retriever.max_length))
        flops = forward_flops(self.shapes["retriever"], [Inputs(self.corpus.documents, length)])
        computing = flops / self.rate("retriever", self.rates.inference_share)
        moving = (self.disk.shards + self.needs.embeddings_bytes) / self.rates.disk_bytes
        how = f"{length} tokens a passage; each time {clock(moving)} for the disk"
        return PhaseHours("encode", times, times * max(computing, moving), times * flops, how)

    def indexing(self, times: int) -> list[PhaseHours]:
        """Estimate training, filling, merging and tuning of the index."""
        needs, rates = self.needs, self.rates
        exact = self._exact_seconds(self.config.index.audit_queries)
        reading = needs.embeddings_bytes / rates.disk_bytes
        if self.plan.exact:
            return []
        filling = max(60 * needs.add_minutes / self.world_size, reading)
        return [
            PhaseHours("index: train", times, times * 60 * needs.train_minutes, 0.0, "rank 0, the others wait"),
            PhaseHours("index: fill, merge", times, times * (filling + 60 * needs.merge_minutes), 0.0, "all ranks"),
            PhaseHours("index: tune", times, times * max(exact, reading), 0.0, "exact search of the audit queries"),
        ]

    def mining(self, times: int) -> PhaseHours:
        """Estimate the search of the training queries."""
        queries = mined_queries(self.config, self.corpus, 1)
        inputs = [Inputs(queries, self.config.retriever.query_max_length)]
        flops = forward_flops(self.shapes["retriever"], inputs)
        seconds = flops / self.rate("retriever", self.rates.inference_share) + self._search_seconds(queries)
        return PhaseHours("mining search", times, times * seconds, times * flops, f"{queries} queries, {self._probed}")

    def evaluation(self) -> PhaseHours:
        """Estimate re-ranking and search on dev in each iteration, and on test at the end."""
        config, depth = self.config, self.config.evaluation.rerank_depth
        rounds = self.dev * (1 + config.ar2.iterations) + self.test * (1 + (config.ar2.iterations > 0))
        pairs = [Inputs(rounds * depth, config.ranker.max_length)]
        flops = forward_flops(self.shapes["ranker"], pairs)
        searched = rounds + (self.dev + self.test) * config.evaluation.zero_shot
        seconds = flops / self.rate("ranker", self.rates.inference_share) + self._search_seconds(searched)
        how = f"{rounds} queries in all, {depth} documents each re-ranked"
        return PhaseHours("evaluation", 1 + config.ar2.iterations, seconds, flops, how)

    def saving(self, works: list[Work]) -> PhaseHours:
        """Estimate checkpoints and published weights: written, read back."""
        num_bytes, saves = 0.0, 0
        for work in works:
            times = max(1, self.config.ar2.iterations) if work.name in ("retriever", "ranker") else 1
            number = times * -(-work.steps // times // self.config.run.checkpoint_every_steps)
            num_bytes += self.shapes[work.role].parameters * (2 * 12 * number + 4 * times * (3 + self.world_size))
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
        flops = 2.0 * queries * self.corpus.documents * self.shapes["retriever"].hidden
        return flops / (self.gpu.fp32_flops * self.rates.inference_share * self.world_size)

    def _search_seconds(self, queries: int) -> float:
        """Return the time of a search by all ranks: centroids, codes of the visited lists, exact re-scoring."""
        dimension, depth = self.shapes["retriever"].hidden, self.config.ar2.top_k * 5 / 4
        if self.plan.exact:
            return max(self._exact_seconds(queries), self.needs.embeddings_bytes / self.rates.disk_bytes)
        nprobe, refine = self.plan.nprobe or _ASSUMED_NPROBE, self.plan.refine_factor or ASSUMED_REFINE
        compared = min(_VISITS, self.plan.num_lists) if "HNSW" in self.plan.factory else self.plan.num_lists
        visited = nprobe * self.corpus.documents / self.plan.num_lists
        work = 2.0 * compared * dimension + 2.0 * visited * self.plan.code_bytes
        computing = queries * work / (self.rates.gigaflops * 1e9 * _SCAN_SHARE) / self.world_size
        rows = queries * depth * refine * self.needs.embeddings_bytes / self.corpus.documents
        return computing + rows / self.rates.disk_bytes

    def _width(self, work: Work) -> int:
        """Return the documents of a query in a ranker's phase."""
        game = self.config.ar2.num_negatives
        return 1 + (self.config.warmup_ranker.num_negatives if work.name == "warm-up ranker" else game)


_SCAN_SHARE = 0.1
"""Of a matrix product's rate that scanning codes reaches (assumed)."""
_TITLES = {
    "warm-up retriever": "warm-up retriever",
    "warm-up ranker": "warm-up ranker",
    "retriever": "retriever phase",
    "ranker": "ranker phase",
}
