"""The typed configuration of a run; `engine.config.file` reads it from YAML and the command line.

Every field has its unit, range and source under it. Numbers have one owner: batch sizes, learning rates
and clipping live here and are written into DeepSpeed's configuration by `engine.training.backend`, never the other way
round.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Section(BaseModel):
    """What all sections share: frozen, strict about unknown keys, documented by the docstring under each field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class RunConfig(_Section):
    """Where a run lives and how often it saves; none of it changes what is computed."""

    path: Path
    """Run folder. Started again with the same configuration, a run goes on in it where it stopped."""
    seed: int = Field(42, ge=0)
    """Seeds the order of the queries, the sampling of negatives, dropout, fresh heads and the index's training."""
    checkpoint_every_steps: int = Field(200, ge=1)
    """Steps between two checkpoints inside a phase; a phase's end is always saved. A crash repeats at most these."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept for each model. With 1 there is none to go back to where the newest is damaged."""
    keep_every_steps: int | None = Field(None, ge=1)
    """Also keep the checkpoints whose step in their stage is a multiple of this; left out, none."""
    keep_best: Literal["MRR@10", "R@1", "A@1"] | None = None
    """Also keep each model's last checkpoint of the iteration in which it was best on dev by this metric."""
    max_skipped_steps: int = Field(15, ge=1)
    """fp16's loss scaling may skip fewer steps in a row than this; the scale, first 65536, halves at most of them."""
    collapse_steps: int = Field(100, ge=0)
    """The run stops where the scores of a query were all equal, or the entropy over the candidates 0, for so many steps
    in a row; 0 switches this off."""
    keep_indexes: int = Field(2, ge=1)
    """Indexes of the newest iterations kept, besides the zero-shot and the warm-up one that the last table needs."""
    log_every_steps: int = Field(10, ge=1)
    """Steps between two points in TensorBoard and metrics.jsonl."""
    timeout_seconds: float = Field(1800.0, gt=0)
    """How long a rank waits at a barrier before the run stops and names who is missing."""
    rendezvous_seconds: float = Field(300.0, gt=0)
    """How long the ranks wait for each other at the start, before a host that started nothing is named."""
    network: str | None = None
    """Interfaces or subnets over which hosts talk, such as `ib0` or `10.0.0.0/16`; left out, all but containers'."""
    preflight: bool = True
    """Compare the hosts and try the connections before anything is computed."""
    heartbeat_seconds: float = Field(5.0, gt=0)
    """Seconds between two heartbeats of a rank; an eighth of `timeout_seconds` at most is taken."""
    preemption_seconds: float = Field(120.0, gt=0)
    """How long a run that was asked to stop (SIGTERM, SIGUSR1) may take to its checkpoint before it is ended."""
    force_resume: bool = False
    """Go on although the configuration or the code differs from what began the run; recorded in starts.json."""
    coordinator: Literal["auto", "mpi", "store"] = "auto"
    """What carries barriers: MPI, torch.distributed's store, or MPI exactly where the processes form an MPI world."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the models run; `auto` takes the GPU where there is one."""


class DataConfig(_Section):
    """The corpus, the queries and their judgements."""

    path: Path | None = None
    """Data folder. Left out, a small made-up set is generated into the run folder (drills and tests)."""
    format: Literal["auto", "beir", "dpr", "msmarco"] = "auto"
    """Layout of the folder; `auto` looks at the file names."""
    template: str = "{title} {text}"
    """How a document becomes one string. AR2's released code joins title and text by [SEP]: `{title} [SEP] {text}`."""
    documents_per_shard: int | None = Field(None, ge=1)
    """Documents in one tar shard, the unit of encoding work and of its recovery; left out, chosen by the corpus."""
    generated_documents: int = Field(300, ge=20)
    """Size of the made-up set, used only without `path`."""


class ShardsConfig(_Section):
    """Where the shards are read; none of it changes what is computed."""

    cache: Path | None = None
    """Folder on each host's own disk to which the shards are copied, once for all runs; left out, none."""


class IndexConfig(_Section):
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
    """Iterations of the k-means that trains lists and codebooks."""
    audit_queries: int = Field(128, ge=1)
    """Training queries on which the search is tuned and its recall against exact search measured, after each build."""
    recall_k: int = Field(100, ge=1)
    """The k of that recall."""
    recall_target: float = Field(0.95, gt=0.0, le=1.0)
    """Recall that tuning aims at with the least work."""
    recall_floor: float = Field(0.9, ge=0.0, le=1.0)
    """The run stops with the reason where the measured recall is below this."""
    embedding_dtype: Literal["float16", "float32"] = "float32"
    """Type of the stored embeddings, from which hits are re-scored."""


class OptimConfig(_Section):
    """AdamW with a linear schedule (AR2 Table 9)."""

    lr: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay; biases and LayerNorm weights take none."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of the schedule's steps in which the rate rises linearly from 0."""
    schedule: Literal["linear", "constant"] = "linear"
    """After the rise: linear decay to 0 at the last step of the schedule, or constant."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradient norm is clipped to this; 0 switches it off. AR2's released code clips at 2.0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""


class ModelConfig(_Section):
    """What both models share: which weights, which numeric type, which ZeRO stage."""

    name: str
    """Hub id, local folder, `package:NAME` (an installed package that carries weights), or `random`."""
    num_layers: int | None = Field(None, ge=1)
    """Keep only the first layers of the backbone; left out, all."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout of hidden states and attention; left out, the model's own."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (non-reentrant: the reentrant form breaks siamese encoders)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Numeric type of weights and activations in training and inference; fp16 scales its loss dynamically."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage; takes configs/deepspeed/zero{stage}.json."""
    deepspeed: Path | None = None
    """A DeepSpeed JSON file to use in place of that one."""
    max_length: int = Field(128, ge=8)
    """Tokens of an input, special tokens included: a document for the retriever, query and document for the ranker."""


class RetrieverConfig(ModelConfig):
    """The dual encoder G (AR2 Eq. 1 and 4)."""

    query_max_length: int = Field(32, ge=4)
    """Tokens of a query, special tokens included (AR2: 32)."""
    pooling: Literal["cls", "mean"] = "cls"
    """What of the last layer is the embedding. AR2: CLS."""
    similarity: Literal["dot", "cosine"] = "dot"
    """Inner product of the embeddings as they are (AR2), or of their unit vectors."""
    tied: bool = True
    """One tower for queries and documents; AR2's released code uses two."""
    score_scale: float = Field(1.0, gt=0)
    """The tau of Eq. 2 for the retriever's scores: it multiplies. Cosine similarity wants about 20."""


class RankerConfig(ModelConfig):
    """The cross-encoder D (AR2 Eq. 4)."""

    max_length: int = Field(160, ge=8)
    """Tokens of query and document together, special tokens included."""
    score_scale: float = Field(1.0, gt=0)
    """The tau of Eq. 6 for the ranker's scores: it multiplies."""


class WarmupRetrieverConfig(_Section):
    """G0: contrastive warm-up with in-batch and BM25 negatives (Algorithm 1 line 2, Eq. 2)."""

    steps: int = Field(1000, ge=0)
    """Optimizer steps; 0 leaves the pre-trained retriever as G0."""
    batch_size: int = Field(128, ge=1)
    """Queries of a step over all ranks; their positives and hard negatives are shared in one pool."""
    micro_batch_size: int = Field(128, ge=1)
    """Queries a rank holds in memory at once; more are taken by gradient caching, which changes no number."""
    hard_negatives: int = Field(1, ge=0)
    """BM25 negatives of each query, added to the shared pool."""
    bm25_depth: int = Field(100, ge=1)
    """BM25 hits from which they are drawn."""
    gather_negatives: bool = True
    """Share the pool across ranks (with gradients); without it, each rank has the pool of its own queries."""
    optim: OptimConfig = OptimConfig(lr=1e-5)
    """Optimizer of this warm-up."""


class WarmupRankerConfig(_Section):
    """D0: listwise warm-up on negatives from G0 (Algorithm 1 line 5, Eq. 7)."""

    steps: int = Field(2000, ge=0)
    """Optimizer steps; 0 leaves the ranker's head untrained."""
    batch_size: int = Field(64, ge=1)
    """Queries of a step over all ranks."""
    micro_batch_size: int = Field(8, ge=1)
    """Queries of one forward on one rank; DeepSpeed accumulates the rest."""
    num_negatives: int = Field(15, ge=1)
    """Negatives of a query (n)."""
    optim: OptimConfig = OptimConfig(lr=1e-5)
    """Optimizer of this warm-up."""


class PhaseConfig(_Section):
    """One side of the adversarial game in every iteration."""

    steps: int = Field(1500, ge=0)
    """Optimizer steps in one iteration."""
    batch_size: int = Field(64, ge=1)
    """Queries of a step over all ranks."""
    micro_batch_size: int = Field(8, ge=1)
    """Queries of one forward on one rank; DeepSpeed accumulates the rest."""
    optim: OptimConfig = OptimConfig(lr=1e-5)
    """Optimizer; its moments and its schedule go on from iteration to iteration."""


class Ar2Config(_Section):
    """The adversarial game (AR2 Algorithm 1 lines 6-16, Table 9)."""

    order: Literal["paper", "released"] = "paper"
    """`paper`: retriever, refresh, ranker. `released`: ranker and retriever on the same candidates, then refresh."""
    iterations: int = Field(10, ge=0)
    """Iterations of the game (AR2: 10)."""
    num_negatives: int = Field(15, ge=1)
    """Negatives of a query, drawn afresh at every step (n)."""
    top_k: int = Field(100, ge=1)
    """Depth of the candidates from which they are drawn, positives taken out."""
    mine: Literal["all", "sampled"] = "all"
    """Training queries searched at a refresh: all, or those that the next phases draw (trains the same)."""
    remove_answers: bool = True
    """Also take out documents that contain an answer, where the query has answers."""
    adversarial: Literal["paper", "with_positive", "released"] = "paper"
    """Form of Eq. 9: as printed (softmax over the negatives), with the positive in it, or as AR2's code has it."""
    adversarial_reduction: Literal["mean", "sum"] = "mean"
    """Mean over the queries, or the sum of the released code (which grows with the batch)."""
    adversarial_weight: float = Field(1.0, ge=0)
    """Weight of Eq. 9. The paper gives none; 1.0 is our reading. Released README: 0.5."""
    distillation_weight: float = Field(1.0, ge=0)
    """Weight of Eq. 12. The paper gives none; 1.0 is our reading. Released README: 0.5."""
    reference_batch_size: int = Field(8, ge=1)
    """Queries to which `sum` is scaled, so that the form does not depend on the number of ranks (README: 8 a GPU)."""
    retriever: PhaseConfig = PhaseConfig(steps=1500, optim=OptimConfig(lr=1e-5))
    """The retriever's phase (lines 7-10)."""
    ranker: PhaseConfig = PhaseConfig(steps=500, optim=OptimConfig(lr=1e-6))
    """The ranker's phase (lines 12-15)."""


class EvaluationConfig(_Section):
    """What is measured, on which queries, to which depth (AR2 section 4.1)."""

    depth: int = Field(100, ge=1)
    """Documents retrieved for a query."""
    rerank_depth: int = Field(100, ge=1)
    """Of these, how many the ranker re-orders; the others stay below them in the retriever's order."""
    max_dev_queries: int | None = Field(None, ge=1)
    """Dev queries used inside the loop, drawn by the seed; left out, all."""
    max_test_queries: int | None = Field(None, ge=1)
    """Test queries used at the end, drawn by the seed; left out, all."""
    test_at_end: bool = True
    """Score the test split once, after the last iteration."""
    zero_shot: bool = True
    """Also measure the retriever before any training."""
    pairs_per_batch: int = Field(64, ge=1)
    """Query-document pairs in one forward of the ranker."""
    tokens_per_batch: int = Field(16384, ge=128)
    """Tokens in one forward of an encoder, padding included where there is any; a CPU thread takes at most 1024."""
    examples: int = Field(3, ge=0)
    """Dev queries whose hardest negatives and scores are shown as text in TensorBoard."""


class RandomModelConfig(_Section):
    """Shape of the models named `random`: untrained ones for drills and tests, their tokenizer learnt on the corpus."""

    hidden_size: int = Field(32, ge=8)
    """Width."""
    num_layers: int = Field(2, ge=1)
    """Layers."""
    num_heads: int = Field(2, ge=1)
    """Attention heads."""
    vocab_size: int = Field(2000, ge=100)
    """Entries of the WordPiece vocabulary."""


class Config(_Section):
    """A whole recipe."""

    run: RunConfig
    """Where the run lives."""
    data: DataConfig = DataConfig()
    """Corpus, queries, judgements."""
    shards: ShardsConfig = ShardsConfig()
    """Copies of the shards."""
    retriever: RetrieverConfig
    """G."""
    ranker: RankerConfig
    """D."""
    random_model: RandomModelConfig = RandomModelConfig()
    """Shape of models named `random`."""
    index: IndexConfig = IndexConfig()
    """The document index."""
    warmup_retriever: WarmupRetrieverConfig = WarmupRetrieverConfig()
    """G0."""
    warmup_ranker: WarmupRankerConfig = WarmupRankerConfig()
    """D0."""
    ar2: Ar2Config = Ar2Config()
    """The game."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Measurements."""

    @model_validator(mode="before")
    @classmethod
    def _index_by_name(cls, values: Any) -> Any:
        """Read `index: auto` (or a factory string) as the section with that factory."""
        if isinstance(values, dict) and isinstance(values.get("index"), str):
            return values | {"index": {"factory": values["index"]}}
        return values

    @model_validator(mode="after")
    def _values_agree(self) -> Config:
        deepest = max(self.ar2.num_negatives, self.warmup_ranker.num_negatives)
        if deepest > self.ar2.top_k:
            raise ValueError(
                f"{deepest} negatives are drawn from the top {self.ar2.top_k} candidates: "
                "num_negatives must be at most ar2.top_k"
            )
        if self.warmup_retriever.hard_negatives > self.warmup_retriever.bm25_depth:
            raise ValueError(
                f"warmup_retriever.hard_negatives is {self.warmup_retriever.hard_negatives}, drawn from the top "
                f"{self.warmup_retriever.bm25_depth} of BM25: it must be at most warmup_retriever.bm25_depth"
            )
        if self.evaluation.rerank_depth > self.evaluation.depth:
            raise ValueError(
                f"evaluation.rerank_depth {self.evaluation.rerank_depth} is deeper than evaluation.depth "
                f"{self.evaluation.depth}"
            )
        if self.retriever.query_max_length > self.retriever.max_length:
            raise ValueError(
                f"retriever.query_max_length {self.retriever.query_max_length} exceeds retriever.max_length "
                f"{self.retriever.max_length}, the length of a document"
            )
        return self
