"""What a recipe does from end to end: data, shards, both models, the game, the test split, exports.

Heavy imports happen here and below, after the configuration was found valid and the world is open.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from engine.config.models import RetrieverConfig
from engine.config.recipe import Config
from engine.config.timetable import Sizes
from engine.data.batches import require_equal_shares
from engine.data.corpus import Data, ModelText, copy_shards, model_texts, open_data, random_model_folder, write_shards
from engine.data.given import require_given, require_given_documents
from engine.data.label_files import require_label_files, require_same_labels, with_labels
from engine.data.requirements import require_enough_documents, require_same_files, require_training_queries
from engine.data.scored_files import require_readable
from engine.data.tokenization import WrittenCorpus
from engine.data.told import tell_data
from engine.evaluation.chosen import plays_iterations, require_decidable
from engine.evaluation.evaluate import evaluate_systems, require_measurable_splits
from engine.evaluation.exported import export_iteration
from engine.evaluation.fusion import evaluate_fused, fit_on_dev, require_fusable
from engine.evaluation.mixture import fitted_system
from engine.evaluation.summary import summary_table
from engine.evaluation.systems import end_states, every_system, fused_system
from engine.evaluation.verdict import take_iteration
from engine.index.gpu import require_gpu_index
from engine.index.plan import plan_index
from engine.log import get_logger, is_bold
from engine.models.agreement import Note, require_agreement, require_trained_teachers
from engine.models.kinds import Model, load_untrained
from engine.models.retriever import Retriever
from engine.models.trial import Proof, require_forward
from engine.refresh.fallback import require_fallback, trained_questions, with_fallback_positives
from engine.refresh.sources import require_sources
from engine.results import LAST_STAGE
from engine.retrievers.dense import require_int8
from engine.retrievers.kinds import dense
from engine.retrievers.places import gather_embeddings
from engine.run import SIZES, Run, Stage, StopReached
from engine.training.backend import deepspeed_config, require_precision
from engine.training.models import Models
from launcher.plan.models import shapes_of
from launcher.plan.recomputation import decide_recomputation, device_here
from launcher.terminal.aside import lead_into
from launcher.terminal.next_steps import next_steps
from launcher.world.opening import World
from launcher.world.refreshers import refreshers_of, told_of
from shards.files import parse_record
from shards.formats import open_dataset
from shards.formats.seen import record_check, recorded_check
from shards.made.generated import generate_dataset
from shards.records import Checked, Dataset

log = get_logger(__name__)
COMPANION = (sys.executable, str(Path(__file__).parent / "commands" / "companion.py"))
"""Words that start a process beside a rank."""


@dataclass(frozen=True, slots=True)
class Generated:
    """How many documents were made up."""

    documents: int


@dataclass(frozen=True, slots=True)
class Exported:
    """Where each model was written for other libraries."""

    folder: dict[str, str]


def play(
    config: Config,
    world: World,
    *,
    watched: bool = True,
    listeners: Sequence[Callable[[str, int, Mapping[str, float]], None]] = (),
) -> None:
    """Run the whole recipe of a configuration.

    Args:
        config: The recipe.
        world: The ranks.
        watched: As of `Run.open`.
        listeners: Told of each measured point on rank 0: stage, step, name to value.
    """
    run = Run.open(config, world.coordinator, world.device, watched=watched)
    run.metrics.listeners.extend(listeners)
    lead_into(run.folder.path / "logs" / f"rank-{world.rank:05d}.log")
    run.companion_command = COMPANION
    cores = run.coordinator.gather("processor cores", sorted(os.sched_getaffinity(0)))
    with run.coordinator.agreement("devices of the refresh"):
        run.refreshers = refreshers_of(world, config.refresh_devices, cores)
    if run.refreshers:
        log.info("kept for refreshes beside training: %s", told_of(run.refreshers))
    log.info("run folder %s", run.folder.path)
    try:
        dataset = _dataset(run)
        if config.counts_epochs:
            run.size(run.once(SIZES, _count, dataset))
            config = run.config
        names = _model_names(run, dataset)
        with run.coordinator.agreement("check models and sizes"):
            check_settings(run, dataset)
            check_starts(run, names)
            texts = model_texts(config, names)
            modules = load_models(_decided(run), names)
            _tell(run, require_trained_teachers(config, modules))
            check_sizes(config, dataset, modules, run.device)
            _tell(run, try_models(config, modules, texts, run.device))
        data = _data(run, dataset, texts)
        require_sources(run, data)
        models = Models.open(run, modules)
        importlib.import_module(config.algorithm).train(models, data, run)
        taken = run.timetable.iterations
        if plays_iterations(config):
            taken = run.once("take", take_iteration, data).iteration
        if config.learns_from_queries:
            measure_at_end(run, data, taken)
            gather_at_end(run, data, taken)
        run.once(LAST_STAGE, export_models, iteration=taken)
    except StopReached as stop:
        log.info("%s", stop)
        return
    finally:
        run.metrics.close()
    if (before := config.run.stop_before) is not None and not run.is_finished(before):
        log.warning("run.stop_before is %s, a stage that this run does not have: it has run to its end", before)
    if run.is_main:
        tell_end(run, dataset)


def tell_end(run: Run, dataset: Dataset) -> None:
    """Log the table of results, and commands to go on with."""
    if not run.config.learns_from_queries:
        log.info("to go on with:\n%s", next_steps(run.folder.path, None))
        return
    asked = (qid for split in ("dev", "test", "train") for qid in dataset.qrels.get(split, {}))
    question = next((dataset.queries[qid].text for qid in asked if qid in dataset.queries), "")
    steps = next_steps(run.folder.path, question)
    table = summary_table(run.folder, bold=is_bold())
    log.info("results (%s)\n\n%s\n\nto go on with:\n%s", run.folder.summary, table, steps)


def open_beside(run: Run) -> Data:
    """Open the data of a run that a start works in, as its ranks have opened them, in their companions.

    Args:
        run: Whose stages of data and shards are finished.
    """
    dataset = _dataset(run)
    return _data(run, dataset, model_texts(run.config, _model_names(run, dataset)))


def measure_at_end(run: Run, data: Data, taken: int) -> None:
    """Fit a mixture of what was trained on dev, where that is asked for, and measure all systems on the test split.

    Args:
        run: The run.
        data: Its data.
        taken: The iteration whose models are measured, beside those of the warm-up.
    """
    settings = run.config.evaluation
    if settings.fuse:
        run.once("fusion/dev", fit_on_dev, data, fused_system(run.config, taken=taken))
    if settings.test_at_end:
        run.once("evaluate/test", evaluate_systems, data, run.folder, "test", every_system(run.config, taken=taken))
    if settings.fuse and settings.test_at_end:
        run.once(
            "fusion/test", evaluate_fused, data, run.folder, "test", fitted_system(run.folder, run.config, taken=taken)
        )


def gather_at_end(run: Run, data: Data, taken: int) -> None:
    """Bring embeddings that lie on the hosts into the run folder, of the retrievers that the run leaves behind.

    Args:
        run: The run.
        data: Its data.
        taken: The iteration whose models are.
    """
    if run.config.index.embeddings != "local" or not run.config.index.gather_embeddings:
        return
    for weights in end_states(run.timetable, list(run.config.models), taken).values():
        name = run.timetable.artifact(weights)
        if isinstance(run.config.models[weights.model], RetrieverConfig) and run.is_finished(f"index/{name}"):
            run.once(f"gather/{name}", gather_embeddings, data, dense(weights))


def _decided(run: Run) -> Config:
    """Decide what the recipe leaves to the memory of the devices at hand."""
    config, coordinator = run.config, run.coordinator
    if all(section.gradient_checkpointing != "auto" for section in config.models.values()):
        return config
    own = device_here(run.device, len(coordinator.ranks_of_host))
    # All ranks alike, for the smallest device: under ZeRO-3 a recomputed forward is a collective, too.
    gpu = replace(own, memory_bytes=min(coordinator.gather("memory of the devices", own.memory_bytes)))
    found = decide_recomputation(config, shapes_of(config), gpu, coordinator.world_size)
    chosen = {name: section.gradient_checkpointing for name, section in found.models.items()}
    log.info("gradient checkpointing: %s", ", ".join(f"{name} {'yes' if on else 'no'}" for name, on in chosen.items()))
    return found


def load_models(config: Config, sources: Mapping[str, str]) -> dict[str, Model]:
    """Load all models as they are before any training, on the CPU.

    Args:
        config: Their sections.
        sources: Model's name to its weights: a hub id, a folder, or `package:NAME`.

    Raises:
        ModelError: A model cannot be found or loaded.
    """
    seed = config.run.seed
    return {name: load_untrained(config.models[name], source, seed=seed, name=name) for name, source in sources.items()}


def check_settings(run: Run, dataset: Dataset) -> None:
    """Refuse what needs no model to be refused, before any work is done.

    Raises:
        ConfigError: A batch cannot be shared by the ranks, a DeepSpeed file is not usable, this machine does not train
            in a numeric type, a split has nothing that the metrics are made of, or `run.stop_before` is not to come.
        DataError: There is no training query, no judgement reaches the threshold of relevance, or a file of labels,
            of scores or a ranking is missing or does not fit the queries.
    """
    run.require_end_ahead()
    if run.config.learns_from_queries:
        splits = ["dev", *(["test"] if run.config.evaluation.test_at_end else [])]
        require_training_queries(dataset, finds_positives=run.config.data.fallback_positive != "none")
        require_fallback(run.config, dataset)
        require_measurable_splits(run.config, dataset, splits)
        require_decidable(run.config, dataset)
        if run.config.evaluation.fuse:
            require_fusable(run.config, dataset)
        require_label_files(run.timetable, dataset)
        if run.is_main:  # it goes through all training records
            trained = trained_questions(run.config, dataset)
            require_given(run.timetable, dataset, trained, run.config.data.without_given)
            if (distillation := run.config.distillation) is not None:
                require_readable(distillation)
    for why, options in run.config.unread.items() if run.is_main else ():
        log.warning("%s, so that nothing reads %s", why, ", ".join(options))
    for name, section in run.config.models.items():
        require_precision(section, name)
    for phase in run.timetable.phases:
        deepspeed_config(run.config.models[phase.model], phase.optim)
        require_equal_shares(phase, run.coordinator.world_size)


def check_starts(run: Run, sources: Mapping[str, str]) -> None:
    """Compare what the models' folders say of them with the recipe, before any of them is loaded.

    Args:
        run: Its configuration has the models' sections.
        sources: As in `load_models`.

    Raises:
        ModelError: The recipe contradicts a folder, or a folder has what is not kept.
    """
    for name, source in sources.items():
        _tell(run, require_agreement(run.config.models[name], source, name))


def _tell(run: Run, notes: Sequence[Note]) -> None:
    for note in notes if run.is_main else ():
        log.log(logging.WARNING if note.warns else logging.INFO, "%s", note.text)


def check_sizes(config: Config, dataset: Dataset, modules: Mapping[str, Model], device: torch.device) -> None:
    """Refuse a corpus that is too small, and an index that cannot be where it must, before any work is done.

    Raises:
        ConfigError: The corpus is too small for the index, FAISS does not take the index on the rank's GPU, or the
            corpus cannot be encoded in int8 here.
        DataError: The corpus is too small for the negatives.
    """
    require_enough_documents(config, dataset)
    for name, module in modules.items():
        if isinstance(module, Retriever):
            require_int8(config, name, module, device)
            plan = plan_index(config.index, num_documents=dataset.num_documents, dimension=module.dimension)
            if told := require_gpu_index(config.index, plan, module.dimension, device):
                log.info("%s", told)


def try_models(
    config: Config, modules: Mapping[str, Model], texts: Mapping[str, ModelText], device: torch.device
) -> list[Note]:
    """Compute one batch with each model, of the longest inputs of the recipe and in its settings.

    Returns:
        What is to be told.

    Raises:
        ConfigError: An input is longer than a model's positions.
        ModelError: A model cannot compute it, or does not fit its tokenizer.
    """
    notes: list[Note] = []
    for name, module in modules.items():
        text = texts[name]
        proof = Proof(name, config.models[name], config.query_max_length, text.tokenizer, text.template, device)
        notes += require_forward(module, proof)
    return notes


def export_models(stage: Stage, *, iteration: int) -> Exported:
    """Write all models of an iteration as other libraries load them, and by which weights their scores are mixed."""
    run = stage.run

    def export() -> dict[str, str]:
        folders = export_iteration(run, iteration, run.folder.path / "export")
        return {model: str(folder) for model, folder in folders.items()}

    return Exported(run.coordinator.only_rank_zero(f"{stage.name}: write", export))


def _count(stage: Stage, dataset: Dataset) -> Sizes:
    train = dataset.qrels.get("train", {})
    return Sizes(sum(bool(dataset.positives("train", qid)) for qid in train), dataset.num_documents)


def _dataset(run: Run) -> Dataset:
    path = run.data_path
    if run.config.data.path is None:
        count, seed = run.config.data.generated_documents, run.config.run.seed
        run.once("generate", _generate, path=path, num_documents=count, seed=seed)
    dataset = _open_together(run, path)
    with run.coordinator.agreement("check data"):
        if (written := run.result_of("shards", WrittenCorpus)) is not None:
            require_same_files(written.dataset_sha256, dataset)
    tell_data(dataset, warns=run.is_main and run.config.learns_from_queries)
    return dataset


def _open_together(run: Run, path: Path) -> Dataset:
    """Open the data on all ranks; one of them goes through the corpus, unless an earlier start has."""
    opened: list[Dataset] = []
    data, needs_queries, record = run.config.data, run.config.learns_from_queries, run.folder.data_check

    def check() -> object:
        known = recorded_check(record, path)
        opened.append(open_dataset(path, data.format, checked=known, needs_queries=needs_queries))
        if known is None:
            record_check(record, opened[0])
        return asdict(opened[0].checked) if opened[0].checked else None

    found = run.coordinator.only_rank_zero("check data", check)
    with run.coordinator.agreement("read data"):
        if opened:
            return opened[0]
        checked = parse_record(found, Checked, "what rank 0 found of the data")
        return open_dataset(path, data.format, checked=checked, needs_queries=needs_queries)


def _generate(stage: Stage, *, path: Path, num_documents: int, seed: int) -> Generated:
    def write() -> None:
        generate_dataset(path, num_documents=num_documents, seed=seed)

    stage.run.coordinator.only_rank_zero("generate data", write)
    return Generated(num_documents)


def _model_names(run: Run, dataset: Dataset) -> dict[str, str]:
    """Return where each model's weights are; those named `random` are made."""
    names = {name: section.name for name, section in run.config.models.items()}
    if "random" in names.values():
        folder = run.coordinator.only_rank_zero(
            "make random model", lambda: str(random_model_folder(run.config, dataset, run.folder))
        )
        names = {model: folder if name == "random" else name for model, name in names.items()}
    return names


def _data(run: Run, dataset: Dataset, texts: Mapping[str, ModelText]) -> Data:
    require_same_labels(run)
    run.once("shards", write_shards, dataset, texts, run.folder)
    with run.coordinator.agreement("open shards"):
        judged = open_data(run.config, dataset, texts, run.folder)
        data = with_labels(judged, run.timetable)
        if run.is_main:
            require_given_documents(run.timetable, dataset, data.shards.docids.index_of)
    data = copy_shards(data, run)
    if not run.config.learns_from_queries or run.config.data.fallback_positive == "none":
        return data
    found = with_fallback_positives(run, replace(data, train=judged.train))
    with run.coordinator.agreement("labels of all training queries"):
        return with_labels(found, run.timetable)
