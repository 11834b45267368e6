"""The sections of a recipe that any algorithm has: run, data, shards, index, evaluation.

Every field has its unit, range and source under it. Numbers have one owner: batch sizes, learning rates and clipping
live in the configuration and are written into DeepSpeed's by `engine.training.backend`, never the other way round.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from engine.config.metric_names import DEFAULT_METRICS, JUDGED, cutoff_of, family_of
from engine.config.text import absolute_path, is_whole
from engine.errors import ConfigError

LARGEST, LARGEST_WHOLE = 1e15, 2**63 - 1
"""No number of a configuration is larger; beyond it, bytes and seconds leave the range of what computes with them."""


LONGEST_SECONDS = 1e8
"""About three years: longer times leave the range of the clocks that wait for them."""


def _stored_path(value: Any) -> Any:
    return absolute_path(value) if isinstance(value, str | Path) else value


StoredPath = Annotated[Path, BeforeValidator(_stored_path)]
"""A path, made absolute once, when the configuration is read; whoever opens it later may work in another folder."""


class Section(BaseModel):
    """What all sections share: frozen, strict about unknown keys, documented by the docstring under each field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).model_fields:
            raise ConfigError(
                f"a recipe does not change, and {name} was to be set to {value!r}",
                remedy=f"take another one: recipe.changed(SECTION={{'{name}': {value!r}}})",
            )
        super().__setattr__(name, value)

    def is_default(self, name: str) -> bool:
        """Tell whether a field has the value that it has where nobody gives it one."""
        return bool(getattr(self, name) == type(self).model_fields[name].default)

    @field_validator("*")
    @classmethod
    def _is_usable(cls, value: Any) -> Any:
        """Refuse what no field can mean: numbers beyond all sizes, and texts that are not Unicode."""
        for one in value if isinstance(value, tuple | list) else [value]:
            largest = LARGEST if isinstance(one, float) else LARGEST_WHOLE
            if isinstance(one, int | float) and abs(one) > largest:
                raise ValueError(f"is beyond {largest:g}, the largest number that is taken")
            if isinstance(one, str) and not is_whole(one):
                raise ValueError("is no UTF-8, expected a text in it")
        return value


class RunConfig(Section):
    """Where a run lives and how often it saves. `seed` and `keep_best` change what is computed; nothing else does."""

    path: StoredPath
    """Run folder. Started again with the same configuration, a run goes on in it where it stopped."""
    seed: int = Field(42, ge=0)
    """Seeds the order of the queries, the sampling of negatives, dropout, fresh heads and the index's training."""
    checkpoint_every_steps: int = Field(200, ge=1)
    """Steps between two checkpoints inside a phase; a phase's end is always saved. A crash repeats at most these."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept for each model. With 1 there is none to go back to where the newest is damaged."""
    keep_every_steps: int | None = Field(None, ge=1)
    """Also keep the checkpoints whose step in their stage is a multiple of this; left out, none."""
    keep_best: str | None = None
    """Also keep each model's last checkpoint of the iteration in which it was best on dev by this metric, one of
    `evaluation.metrics`. Iterations are compared by it wherever they are (`evaluation.iteration`); left out, by MRR@10
    where it is measured."""
    stop_before: str | None = None
    """Stage, such as `retriever/1`, before which the run ends in order. The same command without it goes on from there,
    and `python -m launcher branch` begins other runs there."""
    max_skipped_steps: int = Field(15, ge=1)
    """fp16's loss scaling may skip fewer steps in a row than this; the scale, first 65536, halves at most of them."""
    collapse_steps: int = Field(100, ge=0)
    """The run stops where the scores of a query were all equal, or the entropy over the candidates 0, for so many steps
    in a row; 0 switches this off."""
    keep_indexes: int = Field(2, ge=1)
    """Indexes of the newest iterations kept, besides those that the last table needs: zero-shot's, the warm-up's and
    that of the iteration that is best so far (`evaluation.iteration`)."""
    log_every_steps: int = Field(10, ge=1)
    """Steps between two points in TensorBoard and metrics.jsonl."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where metrics are shown, beside metrics.jsonl. `wandb` and `trackio` are packages of their own; what they fail
    at is a line of warning (docs/monitoring.md)."""
    timeout_seconds: float = Field(1800.0, gt=0, le=LONGEST_SECONDS)
    """How long a rank waits at a barrier before the run stops and names who is missing."""
    rendezvous_seconds: float = Field(300.0, gt=0, le=LONGEST_SECONDS)
    """How long the ranks wait for each other at the start, before a host that started nothing is named."""
    network: str | None = None
    """Interfaces or subnets over which hosts talk, such as `ib0` or `10.0.0.0/16`; left out, all but containers'."""
    preflight: bool = True
    """Compare the hosts and try the connections before anything is computed."""
    heartbeat_seconds: float = Field(5.0, gt=0, le=LONGEST_SECONDS)
    """Seconds between two heartbeats of a rank; an eighth of `timeout_seconds` at most is taken."""
    preemption_seconds: float = Field(120.0, gt=0, le=LONGEST_SECONDS)
    """How long a run that was asked to stop (SIGTERM, SIGUSR1) may take to its checkpoint before it is ended."""
    force_resume: bool = False
    """Go on although the configuration or the code differs from what began the run; recorded in starts.json."""
    coordinator: Literal["auto", "mpi", "store"] = "auto"
    """What carries barriers: MPI, torch.distributed's store, or MPI exactly where the processes form an MPI world."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the models run; `auto` takes the GPU where there is one."""


class DataConfig(Section):
    """The corpus, the queries and their judgements."""

    path: StoredPath | None = None
    """Data folder. Left out, a small made-up set is generated into the run folder (drills and tests)."""
    format: Literal["auto", "beir", "dpr", "msmarco"] = "auto"
    """Layout of the folder; `auto` looks at the file names."""
    template: str = "{title} {text}"
    """How a document becomes one string for the models; BM25 sees title and text. AR2's released code joins them by
    [SEP]: `{title} [SEP] {text}`."""
    ignore_identical_ids: Literal["auto"] | bool = "auto"
    """Whether a document whose id is the query's is left out of the query's hits, negatives and metrics, as BEIR does:
    it is the query itself (ArguAna, Quora). `true` and `false` say it; `auto` is `true` unless these documents are the
    only positives of most of these queries, which means that queries and documents were numbered alike."""
    fallback_positive: Literal["none", "answer"] = "none"
    """What becomes of a training question of which answers are known and no positive: it is left out (the paper, by its
    sizes of data), or the best passage that BM25 finds with an answer in it becomes its positive (AR2's released code,
    there the best of the current retriever), and it is left out where there is none."""
    fallback_depth: int = Field(100, ge=1)
    """BM25 hits among which that passage is looked for (released code: 100)."""
    positive: Literal["drawn", "first"] = "drawn"
    """Which of a training query's positives stands in a group: one drawn anew at every step, as AR2's follow-up does
    on MS MARCO, or always the first of the judgements, as AR2's released code does on Wikipedia. DPR's files have one:
    only the gold passage is judged. All of them are no negatives, either way."""
    without_given: Literal["error", "random", "bm25"] = "error"
    """What stands in for the data's own negatives where `given` is a source of candidates and a training query has
    none: an error, before any work; documents of the corpus drawn at random, as for a query that finds nothing (in a
    pool, what the others found); or what BM25 finds for it."""
    documents_per_shard: int | None = Field(None, ge=1)
    """Documents in one tar shard, the unit of encoding work and of its recovery; left out, chosen by the corpus."""
    generated_documents: int = Field(300, ge=20)
    """Size of the made-up set, used only without `path`."""

    @model_validator(mode="after")
    def _looks_for_positives(self) -> DataConfig:
        if self.fallback_positive == "none" and not self.is_default("fallback_depth"):
            raise ValueError(
                f"fallback_depth is {self.fallback_depth}, but fallback_positive none looks for no passage: set "
                "fallback_positive to answer, or leave it out"
            )
        return self


class ShardsConfig(Section):
    """Where the shards are read; none of it changes what is computed."""

    cache: StoredPath | None = None
    """Folder on each host's own disk to which the shards are copied, once for all runs; left out, none."""


WHERE_EMBEDDINGS_LIE = {"embeddings", "local_folder", "gather_embeddings"}
"""Fields of `IndexConfig` on which no result depends."""


class IndexConfig(Section):
    """The FAISS index over the document embeddings (AR2 section 3.3)."""

    factory: str = "auto"
    """`auto` (by the corpus and `memory_gib`), `Flat` (exact search, as in AR2's published numbers), or a FAISS factory
    string with inverted lists, such as `OPQ64,IVF16384,PQ64`."""
    memory_gib: float = Field(8.0, gt=0)
    """What the searchable index may take of each rank's memory, in GiB; a larger one is searched from disk. Fixed, and
    not what is free at the moment, so that a run that is resumed elsewhere plans the same."""
    placement: Literal["auto", "memory", "disk", "parts"] = "auto"
    """Merged and loaded; merged and mapped from disk; or searched as unmerged parts mapped from disk. `auto` takes
    `memory` where the index fits and `parts` where it does not."""
    nprobe: int | None = Field(None, ge=1)
    """Inverted lists visited for a query; left out, tuned after each build to reach `recall_target`."""
    refine_factor: int | None = Field(None, ge=1)
    """`refine_factor * top_k` candidates of the index are re-scored exactly from the stored embeddings; left out, tuned
    together with `nprobe`."""
    train_documents: int | None = Field(None, ge=1)
    """Embeddings that train the quantizers; left out, chosen from the number of lists."""
    kmeans_iterations: int = Field(10, ge=1)
    """Iterations of the k-means that trains lists and codebooks, from nothing."""
    warm_start: bool = True
    """Begin an index from the last one of the same retriever: its lists are made anew from the new embeddings of the
    documents that they held, and up to a third of `kmeans_iterations` follow, none where the lists are as good for the
    audit queries as they were; codebooks take a third of the iterations, OPQ stays. Where there is no such index, where
    it does not fit (another factory, dimension or corpus), and where the recall would be below `recall_floor`, all is
    trained from nothing."""
    audit_queries: int = Field(128, ge=1)
    """Training queries on which the search is tuned and its recall against exact search measured, after each build."""
    recall_k: int = Field(100, ge=1)
    """The k of that recall."""
    recall_target: float = Field(0.95, gt=0.0, le=1.0)
    """Recall that tuning aims at with the least work."""
    recall_floor: float = Field(0.9, ge=0.0, le=1.0)
    """The run stops with the reason where the measured recall is below this."""
    encode_int8: bool = False
    """Encode the corpus in int8 on CPUs with int8 dot products (VNNI): 1.6 to 1.8 times as fast, with 0.96 of the ten
    best documents that float32 finds (docs/scale.md). Queries, training and candidates that are scored anew stay in
    float32. For models in `precision: fp32` whose inputs need no padding; refused elsewhere, before any work."""
    tokens_per_batch: Annotated[int, Field(ge=128)] | Literal["auto"] | None = None
    """Tokens in one forward that encodes the corpus; left out, `evaluation.tokens_per_batch`. `auto`: on GPUs as many
    as all of them take, doubled from there by trial until one has no memory or is no faster, logged and kept in the
    run folder; on CPUs `evaluation.tokens_per_batch`. Embeddings differ by rounding alone."""
    gpu: Literal["auto", "always"] = "auto"
    """Where FAISS works. `auto`: on each rank's own GPU where the rank has one, the installed FAISS is `faiss-gpu` or
    `faiss-gpu-cuvs`, and the index is of a kind that it takes there; else on CPUs, as the log says before the run
    begins. `always`: a run that cannot is refused before any work (docs/scale.md)."""
    embedding_dtype: Literal["float16", "float32"] = "float16"
    """Type of the stored embeddings, from which hits are re-scored, and of the weights in a lexical retriever's
    postings. `float16` halves disk and reading; it found the same documents in all but 1 of 10,000 places
    (docs/performance.md). A number beyond its range, 65504, stops the encoding."""
    embeddings: Literal["shared", "local"] = "shared"
    """Where a dense retriever's embeddings of the corpus lie while a run trains. `shared`: in the run folder. `local`:
    in `local_folder`, each part on the disk of the host that encoded it, so that they do not pass through the shared
    file system; what reads a part is the work of that host's ranks. Results are the same (docs/scale.md). Postings of
    lexical retrievers are always in the run folder."""
    local_folder: str | None = None
    """With `embeddings: local`, a folder on each host's own disk, absolute, the same path on all hosts. `~` and
    environment variables such as `$TMPDIR` are each host's own. Changes no result; where another is named for a run
    that goes on, the corpus is encoded again."""
    gather_embeddings: bool = True
    """With `embeddings: local`, copy the embeddings of the retrievers that a run leaves behind into the run folder at
    its end, so that any host can search with them, serve and export them. Without, these commands are refused where
    the hosts that have the embeddings do not run them. Changes no result."""

    @model_validator(mode="after")
    def _names_its_local_folder(self) -> IndexConfig:
        if self.embeddings == "local" and not self.local_folder:
            raise ValueError(
                "index.embeddings is local, but index.local_folder names no folder on the hosts' own disks, such as "
                "/scratch/$USER"
            )
        if self.embeddings == "shared" and self.local_folder:
            raise ValueError(
                f"index.local_folder is {self.local_folder}, but index.embeddings is shared: set "
                "index.embeddings=local, or leave index.local_folder out"
            )
        if self.local_folder and not self.local_folder.startswith(("/", "~", "$")):
            raise ValueError(
                f"index.local_folder is {self.local_folder}: it must be absolute, as hosts may run in different folders"
            )
        return self


class EvaluationConfig(Section):
    """What is measured, on which queries, to which depth (AR2 section 4.1)."""

    metrics: tuple[str, ...] = Field(DEFAULT_METRICS, min_length=1)
    """What is reported, at any rank k: `R@k` (recall), `MRR@k`, `nDCG@k` and `MAP@k` (mean average precision) by
    judgements, `A@k` (a document of the top k has an answer) by answers. The default is what AR2 reports (Tables 2 and
    3), and nDCG@10 as BEIR and TREC do."""
    relevance_threshold: int = Field(1, ge=1)
    """Grade from which a document is relevant, for `R@k`, `MRR@k` and `MAP@k`; TREC's Deep Learning tracks take 2. nDCG
    has the grades themselves as gains."""
    depth: int = Field(100, ge=1)
    """Documents retrieved and kept for a query, at least: as many as the deepest of `metrics` where that is more."""
    rerank_depth: int = Field(100, ge=1)
    """Of these, how many the ranker re-orders; the others stay below them in the retriever's order."""
    max_dev_queries: int | None = Field(None, ge=1)
    """Dev queries used inside the loop, drawn by the seed; left out, all."""
    max_test_queries: int | None = Field(None, ge=1)
    """Test queries used at the end, drawn by the seed; left out, all."""
    test_at_end: bool = True
    """Score the test split once, after the last iteration."""
    iteration: Literal["best", "last"] = "best"
    """Whose models the last table, the exports and the commands take by default: of the iteration whose retriever is
    best on dev, the warm-up included, by `run.keep_best`, else MRR@10 or the first of `metrics` that dev allows; or of
    the last one. Where dev has no queries, the last. The test split decides nothing."""
    zero_shot: bool = True
    """Also measure the retriever before any training."""
    tokens_per_batch: int = Field(16384, ge=128)
    """Tokens in one forward that encodes or scores, padding included where there is any; a CPU thread takes at most
    1024."""
    examples: int = Field(3, ge=0)
    """Dev queries whose hardest negatives and scores are shown as text in TensorBoard."""
    fuse: bool = False
    """Also measure a mixture of the scores of retriever, ranker, further retrievers and BM25, its weights fitted on dev
    (docs/evaluation.md). Off unless it is said, so that a run that was begun without it keeps its table."""
    fusion_candidates: Literal["hybrid", "retriever"] = "hybrid"
    """Documents that the mixture orders: those that all its retrievers found, BM25 among them, one of each in turn
    (hybrid), or those of the first retriever alone. As many as `rerank_depth`, either way."""
    fusion_metric: str = "MRR@10"
    """What the weights are fitted to, by judgements: AR2's and R2ANKER's headline on MS MARCO."""

    @property
    def unread(self) -> dict[str, tuple[str, ...]]:
        """Options that have other values than their defaults and that nothing reads, by why."""
        names = () if self.fuse else ("fusion_candidates", "fusion_metric")
        vain = tuple(f"evaluation.{name}" for name in names if not self.is_default(name))
        return {"evaluation.fuse is false": vain} if vain else {}

    @property
    def search_depth(self) -> int:
        """Documents retrieved and kept for a query, so that every metric sees as many as it is about."""
        return max(self.depth, *(cutoff_of(name) for name in self.metrics))

    def most_queries(self, split: str) -> int | None:
        """Return how many queries of a split are measured at most; None for all."""
        return self.max_dev_queries if split == "dev" else self.max_test_queries

    @field_validator("fusion_metric")
    @classmethod
    def _judged(cls, metric: str) -> str:
        if family_of(metric) not in JUDGED:
            raise ValueError(f"{metric} is made of answers; weights are fitted to judgements: name {', '.join(JUDGED)}")
        return metric

    @field_validator("metrics")
    @classmethod
    def _known(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        for name in metrics:
            cutoff_of(name)
        if repeated := sorted({name for name in metrics if metrics.count(name) > 1}):
            raise ValueError(f"{', '.join(repeated)} stands there more than once")
        return metrics


class RandomModelConfig(Section):
    """Shape of the models named `random`: untrained ones for drills and tests, their tokenizer learnt on the corpus."""

    hidden_size: int = Field(32, ge=8, le=65536)
    """Width, a multiple of `num_heads`."""
    num_layers: int = Field(2, ge=1, le=1000)
    """Layers."""
    num_heads: int = Field(2, ge=1, le=1024)
    """Attention heads."""
    vocab_size: int = Field(2000, ge=100, le=10**7)
    """Entries of the WordPiece vocabulary."""

    @model_validator(mode="after")
    def _heads_make_up_the_width(self) -> RandomModelConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}, expected heads of one "
                f"width: set it to {self.hidden_size + -self.hidden_size % self.num_heads}, or change num_heads"
            )
        return self
