"""What a recipe does from end to end: data, shards, both models, the game, the test split, exports.

Heavy imports happen here and below, after the configuration was found valid and the world is open.
"""

from __future__ import annotations

from pathlib import Path

from engine.ar2 import train_ar2, train_ar2_released
from engine.config.recipe import Config
from engine.data.batches import BatchPlan
from engine.data.corpus import (
    Data,
    copy_shards,
    model_texts,
    open_data,
    random_model_folder,
    require_enough_documents,
    require_same_files,
    require_training_queries,
    write_shards,
)
from engine.errors import ConfigError
from engine.evaluation.evaluate import evaluate_systems
from engine.evaluation.summary import summary_table
from engine.evaluation.systems import every_system
from engine.index.plan import plan_index
from engine.log import get_logger
from engine.models.export import export_ranker, export_retriever
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever
from engine.models.weights import iteration_name
from engine.run import Run, Stage
from engine.training.backend import Models, TrainedModel, deepspeed_config
from engine.training.resume import restore_training
from launcher.world.world import World
from shards.formats import Checked, open_dataset
from shards.made.generated import generate_dataset
from shards.records import Dataset

log = get_logger(__name__)


def play(config: Config, world: World) -> None:
    """Run the whole recipe of a configuration."""
    run = Run.open(config, world.coordinator, world.device, watched=True)
    log.info("run folder %s", run.folder.path)
    dataset = _dataset(run)
    names = _model_names(run, dataset)
    with run.coordinator.agreement("check models and sizes"):
        check_settings(run, dataset)
        retriever, ranker = load_models(config, *names)
        check_sizes(config, dataset, retriever, ranker)
    data = _data(run, dataset, names)
    models = make_engines(run, retriever, ranker)
    algorithm = train_ar2 if config.ar2.order == "paper" else train_ar2_released
    algorithm(models, data, run)
    if config.evaluation.test_at_end:
        systems = every_system(zero_shot=config.evaluation.zero_shot, last=config.ar2.iterations)
        run.once("evaluate/test", evaluate_systems, data, run.folder, "test", systems)
    run.once("export", export_models, iteration=config.ar2.iterations)
    run.metrics.close()
    if run.is_main:
        log.info("results (%s)\n\n%s\n", run.folder.summary, summary_table(run.folder))


def load_models(config: Config, retriever_name: str, ranker_name: str) -> tuple[Retriever, Ranker]:
    """Load both models as they are before any training, on the CPU.

    Raises:
        ModelError: A model cannot be found or loaded.
    """
    g, d = config.retriever, config.ranker
    retriever = Retriever.load(
        retriever_name,
        pooling=g.pooling,
        similarity=g.similarity,
        tied=g.tied,
        num_layers=g.num_layers,
        dropout=g.dropout,
        attention=g.attention,
        gradient_checkpointing=g.gradient_checkpointing,
    )
    ranker = Ranker.load(
        ranker_name,
        num_layers=d.num_layers,
        dropout=d.dropout,
        attention=d.attention,
        gradient_checkpointing=d.gradient_checkpointing,
        seed=config.run.seed,
    )
    return retriever, ranker


def check_settings(run: Run, dataset: Dataset) -> None:
    """Refuse what needs no model to be refused, before any work is done.

    Raises:
        ConfigError: A batch cannot be shared by the ranks, or a DeepSpeed file is not usable.
        DataError: There is no training query.
    """
    config, coordinator = run.config, run.coordinator
    require_training_queries(dataset)
    deepspeed_config(config.retriever, config.warmup_retriever.optim)
    deepspeed_config(config.ranker, config.warmup_ranker.optim)
    for stream, phase in (
        ("warmup_retriever", config.warmup_retriever),
        ("warmup_ranker", config.warmup_ranker),
        ("retriever", config.ar2.retriever),
        ("ranker", config.ar2.ranker),
    ):
        BatchPlan(stream, config.run.seed, phase.batch_size, 0, coordinator.rank, coordinator.world_size)


def check_sizes(config: Config, dataset: Dataset, retriever: Retriever, ranker: Ranker) -> None:
    """Refuse lengths that a model cannot take, and a corpus that is too small, before any work is done.

    Raises:
        ConfigError: An input is longer than a model's positions, or the corpus is too small for the index.
        DataError: The corpus is too small for the negatives.
    """
    for name, max_length, longest in (
        ("retriever", config.retriever.max_length, retriever.longest_input),
        ("ranker", config.ranker.max_length, ranker.longest_input),
    ):
        if longest is not None and max_length > longest:
            raise ConfigError(
                f"{name}.max_length is {max_length}, but the model takes {longest} tokens",
                expected=f"at most {longest}",
                remedy=f"set {name}.max_length={longest}, or name a model for longer inputs",
            )
    require_enough_documents(config, dataset)
    plan_index(config.index, num_documents=dataset.num_documents, dimension=retriever.dimension)


def make_engines(run: Run, retriever: Retriever, ranker: Ranker) -> Models:
    """Give each model its DeepSpeed engine and bring them to where the newest checkpoints are.

    Raises:
        ArtifactError: A checkpoint is damaged.
    """
    config = run.config
    models = Models(
        TrainedModel("retriever", retriever, config.retriever, config.warmup_retriever.optim),
        TrainedModel("ranker", ranker, config.ranker, config.warmup_ranker.optim),
    )
    for model in (models.retriever, models.ranker):
        restore_training(run, model)
    models.rest(models.retriever, models.ranker)
    return models


def export_models(stage: Stage, *, iteration: int) -> dict[str, str]:
    """Write both models of an iteration as other libraries load them."""
    run, name = stage.run, iteration_name(iteration)

    def export() -> None:
        export_retriever(run.folder.weights("retriever", name), run.folder.export("retriever"))
        export_ranker(run.folder.weights("ranker", name), run.folder.export("ranker"))

    run.coordinator.only_rank_zero(f"{stage.name}: write", export)
    return {"retriever": str(run.folder.export("retriever")), "ranker": str(run.folder.export("ranker"))}


def _dataset(run: Run) -> Dataset:
    path = run.config.data.path
    if path is None:
        path = run.folder.path / "data"
        count, seed = run.config.data.generated_documents, run.config.run.seed
        run.once("generate", _generate, path=path, num_documents=count, seed=seed)
    dataset = _open_together(run, path)
    with run.coordinator.agreement("check data"):
        if run.is_finished("shards"):
            require_same_files(run.result_of("shards")["_dataset_sha256"], dataset)
    splits = ", ".join(f"{split} {len(qrels)}" for split, qrels in dataset.qrels.items())
    log.info("data %s: %d documents, queries: %s", path, dataset.num_documents, splits)
    for reason, number in sorted(dataset.dropped.items()):
        log.info("  dropped %d: %s", number, reason)
    return dataset


def _open_together(run: Run, path: Path) -> Dataset:
    """Open the data on all ranks; one of them goes through the corpus."""
    opened: list[Dataset] = []

    def check() -> list[str | int]:
        opened.append(open_dataset(path, run.config.data.format))
        return [opened[0].fingerprint, opened[0].num_documents]

    fingerprint, num_documents = run.coordinator.only_rank_zero("check data", check)
    with run.coordinator.agreement("read data"):
        return (
            opened[0]
            if opened
            else open_dataset(path, run.config.data.format, checked=Checked(fingerprint, num_documents))
        )


def _generate(stage: Stage, *, path: Path, num_documents: int, seed: int) -> dict[str, int]:
    def write() -> None:
        generate_dataset(path, num_documents=num_documents, seed=seed)

    stage.run.coordinator.only_rank_zero("generate data", write)
    return {"documents": num_documents}


def _model_names(run: Run, dataset: Dataset) -> tuple[str, str]:
    names = run.config.retriever.name, run.config.ranker.name
    if "random" in names:
        folder = run.coordinator.only_rank_zero(
            "make random model", lambda: str(random_model_folder(run.config, dataset, run.folder))
        )
        return tuple(folder if name == "random" else name for name in names)  # type: ignore[return-value]
    return names


def _data(run: Run, dataset: Dataset, names: tuple[str, str]) -> Data:
    with run.coordinator.agreement("load tokenizers"):
        texts = model_texts(run.config, *names)
    run.once("shards", write_shards, dataset, texts, run.folder)
    with run.coordinator.agreement("open shards"):
        data = open_data(run.config, dataset, texts, run.folder)
    return copy_shards(data, run)
