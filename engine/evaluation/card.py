"""The card of an exported model: its README, whose front matter the hub reads, by what the run has recorded.

    metrics   every row of the table, dev and test apart, with standard errors; the model's own also as a model index
    data      fingerprint, sizes, the template of documents
    recipe    the configuration, versions and command of the last start
    limits    which split chose it, and what follows for its numbers
    usage     `engine.models.export_usage`

Nothing is measured here, and nothing is said that no record has. Of absolute paths the last part alone is told, since a
card goes to places where the machine that trained is nobody's business.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from tabulate import tabulate

from engine.config.timetable import Sizes, WeightsOf
from engine.data.tokenization import WrittenCorpus
from engine.evaluation.chosen import plays_iterations
from engine.evaluation.duel import Duel
from engine.evaluation.summary import Row, markdown_tables, rows_by_queries
from engine.evaluation.systems import RANKER
from engine.evaluation.verdict import Taken
from engine.models.export_usage import FOLDER, title_of, usage_of
from engine.models.license import StartModel, start_model
from engine.models.source import saved_metadata
from engine.models.weights import weights_sha256
from engine.reliability.starts import read_starts
from engine.run import SIZES, Run
from shards.files import read_record

_KINDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "retriever": ("sentence-transformers", "sentence-similarity", ("sentence-transformers", "dense-retrieval")),
    "lexical": ("sentence-transformers", "feature-extraction", ("sentence-transformers", "sparse-encoder", "splade")),
    "ranker": ("sentence-transformers", "text-ranking", ("sentence-transformers", "cross-encoder", "reranker")),
}
"""Library, pipeline and tags by the kind of model; `_ENCODER` is for the others."""
_ENCODER = ("transformers", "fill-mask", ("pre-trained",))
_DIGITS = 4
_SEARCHES, _RANKS = ("information-retrieval", "Information retrieval"), ("text-ranking", "Re-ranking")


@dataclass(frozen=True, slots=True)
class Carded:
    """A model whose card is written.

    Attributes:
        run: Its run.
        weights: Which state of which model.
        iteration: That was exported, of models that go through iterations together.
        place: What its snippets load: a folder, or its name on the hub.
    """

    run: Run
    weights: WeightsOf
    iteration: int
    place: str = FOLDER

    @property
    def name(self) -> str:
        """What the table calls it."""
        return self.run.timetable.name_of(self.weights)

    def is_of(self, row: Row) -> bool:
        """Tell whether a row of the table is this model's."""
        return (row.system, row.iteration) == (self.name, self.weights.iteration)


def write_card(folder: Path, carded: Carded) -> None:
    """Write the card of a model into its export, and the file with its start model's terms beside it.

    Args:
        folder: The export, whose other files are written.
        carded: Whose.

    Raises:
        ArtifactError: A record of the run is damaged.
    """
    metadata = saved_metadata(folder)
    start = start_model(carded.run.config.models[carded.weights.model].name)
    groups = rows_by_queries(carded.run.folder)
    parts = [
        f"# {carded.run.folder.path.name}: {carded.name}{_after(carded)}",
        f"{title_of(metadata)}. {_made(carded)}",
        usage_of(folder, metadata, carded.place).rstrip(),
        _metrics(carded, groups),
        _data(carded),
        _recipe(carded),
        _limits(carded, groups, start),
    ]
    front = _front_matter(carded, metadata, start, groups)
    card = ModelCard(f"---\n{front.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n")
    card.save(folder / "README.md")
    if start.license_file is not None:
        shutil.copyfile(start.license_file, folder / start.license_file.name)


def shortened(value: Any) -> Any:
    """Return a setting, or a tree of them, in which absolute paths have their last part alone."""
    if isinstance(value, dict):
        return {key: shortened(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(one) for one in value]
    if isinstance(value, str):
        key, sign, path = value.rpartition("=") if re.match(r"[\w.-]+=[/~]", value) else ("", "", value)
        return f"{key}{sign}…/{Path(path).name}" if path.startswith(("/", "~/")) else value
    return value


def _front_matter(
    carded: Carded, metadata: dict[str, Any], start: StartModel, groups: Sequence[Sequence[Row]]
) -> ModelCardData:
    library, pipeline, tags = _KINDS.get(metadata["model"], _ENCODER)
    results = [result for rows in groups for row in rows if carded.is_of(row) for result in _results(carded, row)]
    return ModelCardData(
        library_name=library,
        pipeline_tag=pipeline,
        tags=[*tags, carded.run.config.recipe, "sparring"],
        base_model=start.base_model,
        license=start.license,
        license_name=start.license_name,
        license_link=start.license_link,
        model_name=f"{carded.run.folder.path.name} {carded.name}",
        eval_results=results or None,
    )


def _results(carded: Carded, row: Row) -> list[EvalResult]:
    """Return a row's metrics as a model index has them."""
    config, fingerprint = carded.run.config, _fingerprint(carded.run)
    data = config.data.path.name if config.data.path else "made-up documents"
    task, in_words = _RANKS if row.over else _SEARCHES
    over = f"top {row.rerank_depth} of {row.over}" if row.over else None
    return [
        EvalResult(
            task_type=task,
            task_name=in_words,
            dataset_type=re.sub(r"[^\w.-]+", "-", data),
            dataset_name=data,
            dataset_config=over,
            dataset_split=row.split,
            dataset_revision=fingerprint,
            dataset_args={"queries": row.num_queries} if row.num_queries is not None else None,
            metric_type=name.lower(),
            metric_name=name,
            metric_value=round(value, _DIGITS),
            metric_args=_standard_error(row, name),
        )
        for name, value in row.metrics.items()
    ]


def _standard_error(row: Row, metric: str) -> dict[str, float] | None:
    one = row.headline
    if one is None or one.metric != metric or one.standard_error is None:
        return None
    return {"standard_error": round(one.standard_error, _DIGITS)}


def _after(carded: Carded) -> str:
    state = carded.weights.iteration
    return "" if state is None or carded.run.timetable.ends is not None else f", iteration {state}"


def _made(carded: Carded) -> str:
    base = shortened(carded.run.config.models[carded.weights.model].name)
    started = "It began with random weights" if base == "random" else f"It began as `{base}`"
    return f"{started} and was trained by Sparring, recipe `{carded.run.config.recipe}`."


def _metrics(carded: Carded, groups: Sequence[Sequence[Row]]) -> str:
    if not groups:
        return ""
    texts = ["## Metrics", f"This model is `{carded.name}`{_after(carded)} in the tables, which are the run's own."]
    for rows in groups:
        heading = f"### {rows[0].split}"
        if not any(carded.is_of(row) for row in rows):
            heading += " (this model was not measured there)"
        texts += [heading, markdown_tables(rows)]
    if carded.run.folder.duel.exists():
        texts.append(read_record(carded.run.folder.duel, Duel, "the verdict of the game").told)
    return "\n\n".join(texts)


def _data(carded: Carded) -> str:
    run, rows = carded.run, []
    if (written := run.result_of("shards", WrittenCorpus)) is not None:
        rows = [("fingerprint (SHA-256)", f"`{written.dataset_sha256}`"), ("documents", f"{written.documents:,}")]
        rows += [(f"tokens of documents ({stream})", f"{number:,}") for stream, number in written.tokens.items()]
    if run.config.learns_from_queries and (sizes := run.result_of(SIZES, Sizes)) is not None:
        rows.append(("training queries", f"{sizes.queries:,}"))
    for group in rows_by_queries(run.folder):
        if (queries := group[0].split_queries) is not None:
            rows.append((f"queries of {group[0].split}", f"{queries:,}, {group[0].num_queries:,} of them measured"))
    path = run.config.data.path
    name = f"The data folder `{path.name}`" if path else "Made-up data, by a generator"
    table = tabulate(list(dict(rows).items()), headers=["", ""], tablefmt="github", disable_numparse=True)
    template = (
        f"A document became one string by the template `{run.config.data.template}`; where it has no title, or no"
    )
    return f"## Data\n\n{name}.\n\n{table}\n\n{template} text, the other stands alone."


def _recipe(carded: Carded) -> str:
    run = carded.run
    settings = yaml.safe_dump(shortened(run.config.model_dump(mode="json")), sort_keys=False, allow_unicode=True)
    parts = ["## Recipe"]
    if starts := read_starts(run.folder.path):
        last = starts[-1]
        versions = ", ".join(f"{name} {version}" for name, version in last.versions.items() if version)
        parts += [
            f"Trained with {versions}, Python {last.python}; commit {last.git or 'not known'}; "
            f"{last.num_ranks} rank(s) in the last of {len(starts)} start(s), whose command was",
            f"```\n{shlex.join(shortened(last.argv))}\n```",
        ]
    weights = run.folder.weights(carded.weights.model, carded.weights.state)
    parts += [
        f"SHA-256 of the weights, by which the run's artifacts name them: `{weights_sha256(weights)}`.",
        f"<details><summary>The whole configuration</summary>\n\n```yaml\n{settings}```\n\n</details>",
    ]
    return "\n\n".join(parts)


def _limits(carded: Carded, groups: Sequence[Sequence[Row]], start: StartModel) -> str:
    config = carded.run.config
    points = [_chosen(carded)]
    sampled = [rows[0] for rows in groups if rows[0].num_queries != rows[0].split_queries]
    points += [
        f"The numbers on {row.split} are of {row.num_queries} of its {row.split_queries} queries." for row in sampled
    ]
    if config.learns_from_queries:
        points.append("It was measured on queries and documents like those it was trained on, and on no others.")
    if config.models[carded.weights.model].kind == RANKER:
        points.append("It was measured at putting what a retriever found into another order, not at searching.")
    points.append(f"{start.told} The data that it was trained on may have conditions of their own.")
    return "## Limits\n\n" + "\n".join(f"- {point}" for point in points)


def _chosen(carded: Carded) -> str:
    """Say which split chose the weights, and so whose numbers are too good."""
    run, iteration = carded.run, carded.iteration
    if not plays_iterations(run.config):
        return "No split chose among states of this model: it is the one that the recipe leaves behind."
    taken = run.result_of("take", Taken)
    if taken is None:
        return f"Iteration {iteration} is what was exported; the run has recorded no choice among its iterations."
    if taken.iteration != iteration:
        return f"Iteration {iteration} was asked for by hand. The run itself takes {taken.iteration}: {taken.why}."
    if not taken.why.startswith("best on dev"):
        return f"No split chose it: iteration {iteration} is {taken.why}."
    last = run.timetable.iterations
    return (
        f"**Dev chose it**: of the iterations 0 to {last}, {iteration} is {taken.why}, the retriever's. So its "
        "numbers on dev are those of a choice, and higher than those of new queries; test chose nothing."
    )


def _fingerprint(run: Run) -> str | None:
    written = run.result_of("shards", WrittenCorpus)
    return None if written is None else written.dataset_sha256
