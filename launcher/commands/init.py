"""`sparring init DIR`: write a commented recipe that fits a data folder, its models and this machine.

    sparring init data/mine --hours 8
    sparring train --config recipe.yaml

Lengths come from the texts, batches from the memory, steps from the hours, all by the estimates of `plan`. Nothing is
downloaded, and nothing is overwritten. What was seen and why stands in the file as comments.
"""

from __future__ import annotations

import argparse
import os
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.terminal.arguments import positive_number, typed_path
from launcher.terminal.next_steps import installed_program

if TYPE_CHECKING:
    from launcher.plan.draft import Asked, Draft
    from launcher.plan.survey import Start

EXAMPLES = (
    "data/mine --hours 8",
    "data/mine --model microsoft/mpnet-base --ranker bert-base-uncased --run runs/mine --out mine.yaml",
)
_COLUMNS = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    add = parser.add_argument
    add("data", type=typed_path, metavar="DIR", help="data folder, in the BEIR, DPR or MS MARCO layout")
    add("--model", metavar="NAME", help="what the retriever starts from: folder, hub id, package:NAME (a small MiniLM)")
    add("--ranker", metavar="NAME", help="what the ranker starts from (as --model)")
    add("--hours", type=positive_number, default=8.0, metavar="H", help="hours that the whole run may take here (8)")
    add("--run", metavar="DIR", help="run folder that the recipe names (runs/NAME, after DIR)")
    add("--out", type=typed_path, default="recipe.yaml", metavar="FILE", help="file to write (recipe.yaml)")
    shape = (
        "minilm-l6, bert-base, bert-large or LAYERSxHIDDEN, to plan with where its files are not at hand (bert-base)"
    )
    add("--retriever-shape", metavar="SHAPE", help=f"of the retriever: {shape}")
    add("--ranker-shape", metavar="SHAPE", help="of the ranker, likewise")


def run_command(arguments: argparse.Namespace) -> int:
    """Look, draft and write; return 0.

    Raises:
        ConfigError: The file is there already, or no recipe fits.
        DataError: The folder has no known layout, or is not valid.
        ModelError: A model that is named by folder or package is not there.
    """
    from engine.config.file import load_config
    from engine.errors import ConfigError
    from launcher.plan.draft import Asked, draft_recipe
    from launcher.plan.survey import default_model, look_at_machine, look_at_model, look_at_texts
    from launcher.world.starters import look_around
    from shards.files import write_atomically
    from shards.formats import open_dataset

    if arguments.out.exists():
        raise ConfigError(f"{arguments.out} is there already", remedy="name another file by --out, or move it away")
    model = arguments.model or default_model()
    retriever, ranker = look_at_model(model), look_at_model(arguments.ranker or model)
    dataset = open_dataset(arguments.data)
    place = look_around(os.environ)
    asked = Asked(
        dataset=dataset,
        texts=look_at_texts(dataset, retriever),
        retriever=retriever,
        ranker=ranker,
        machine=look_at_machine(place.gpus, place.cores),
        hours=arguments.hours,
        data_path=os.fspath(arguments.data),
        run_path=arguments.run or f"runs/{arguments.data.name}",
        shapes=_shape_words(arguments, retriever, ranker),
    )
    draft = draft_recipe(asked)
    with write_atomically(arguments.out) as temporary:
        temporary.write_text(recipe_text(draft, asked, arguments.out), encoding="utf-8")
        load_config(temporary)
    print(f"{arguments.out}: {_in_short(draft)}")
    hardware = f"--gpu {asked.machine.device.name} --gpus-per-node {asked.machine.ranks}"
    program = installed_program()
    print(f"  look     {program} plan --config {shlex.quote(str(arguments.out))} {hardware}")
    print(f"  start    {program} train --config {shlex.quote(str(arguments.out))}")
    for doubt in _doubts(asked):
        print(f"  note     {doubt}")
    return 0


def _shape_words(arguments: argparse.Namespace, retriever: Start, ranker: Start) -> dict[str, str]:
    """Return the words for the shapes of models whose files are not at hand."""
    given = {"retriever": arguments.retriever_shape, "ranker": arguments.ranker_shape}
    unseen = {name: "bert-base" for name, start in (("retriever", retriever), ("ranker", ranker)) if not start.at_hand}
    return unseen | {name: words for name, words in given.items() if words is not None}


def recipe_text(draft: Draft, asked: Asked, out: Path) -> str:
    """Return the recipe as YAML with comments.

    Args:
        draft: The recipe.
        asked: What it was made for.
        out: Where it will lie.
    """
    seen = [
        f"A recipe for {asked.data_path}, drafted by `sparring init` for {asked.hours:g} h on this machine.",
        "",
        f"  data      {asked.dataset.format}: {asked.dataset.num_documents} documents; queries: {_splits(asked)}",
        *[f"            left out: {number} x {reason}" for reason, number in sorted(asked.dataset.dropped.items())],
        f"  lengths   of {asked.texts.how}",
        f"  language  {_language(asked)}",
        f"  machine   {asked.machine.told}: {asked.machine.ranks} ranks",
        *[f"  {name:9} {_about(name, asked, draft)}" for name in ("retriever", "ranker")],
        f"  plan      {_in_short(draft)}; an estimate, often off by a factor of two",
        "",
        f"  sparring train --config {shlex.quote(out.name)} --ranks {asked.machine.ranks}",
        "",
        *[line for doubt in _doubts(asked) for line in (*textwrap.wrap(f"Note: {doubt}.", _COLUMNS), "")],
        "`sparring options WORD` says what a key means.",
    ]
    head = [f"# {line}".rstrip() for line in seen]
    return "\n".join([*head, *_rendered(draft.tree, draft.notes, "", "")]) + "\n"


def _language(asked: Asked) -> str:
    if asked.texts.language is None:
        return "not told by the texts: BM25 reads them as English (bm25.language)"
    return f"{asked.texts.language.title()}, by its frequent words or its script"


def _doubts(asked: Asked) -> list[str]:
    """Say what the user should mend or decide before hours are spent."""
    from launcher.plan.survey import reads_english_alone

    found = []
    starts = dict.fromkeys(start.name for start in (asked.retriever, asked.ranker))
    if asked.texts.language not in (None, "english") and (names := [*filter(reads_english_alone, starts)]):
        found.append(f"{names[0]} has learnt English alone: name a multilingual model by --model and --ranker")
    if unseen := [start.name for start in (asked.retriever, asked.ranker) if not start.at_hand]:
        told = " and ".join(dict.fromkeys(unseen))
        found.append(f"{told}: not at hand, so lengths, hours and pooling are guessed; draft again after `hf download`")
    if "dev" not in asked.dataset.qrels:
        found.append(
            "there is no dev split: models are chosen by none, and nothing says whether training pays; hold out some "
            "queries for it"
        )
    return found


def _splits(asked: Asked) -> str:
    answers = ", with answers" if any(query.answers for query in asked.dataset.queries.values()) else ""
    return ", ".join(f"{len(judged)} {split}" for split, judged in asked.dataset.qrels.items()) + answers


def _about(name: str, asked: Asked, draft: Draft) -> str:
    start = asked.retriever if name == "retriever" else asked.ranker
    shape = draft.plan.shapes[name]
    size = f"{shape.layers} layers of {shape.hidden}, {shape.parameters / 1e6:.3g} million parameters"
    return f"{start.name}: {size}" + ("" if start.at_hand else f" (assumed: {asked.shapes[name]}; not at hand)")


def _in_short(draft: Draft) -> str:
    from launcher.plan.durations import clock

    hours = clock(draft.seconds)
    return (
        f"about {hours}, {draft.tree['ar2']['iterations']} iterations, {draft.plan.disk.peak / 2**30:.2g} GiB of disk"
    )


def _rendered(tree: Mapping[str, Any], notes: Mapping[str, str], prefix: str, indent: str) -> Iterator[str]:
    """Yield the lines of a mapping, what is said of a key above it."""
    for name, value in tree.items():
        if note := notes.get(f"{prefix}{name}"):
            yield from textwrap.wrap(note, _COLUMNS, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        if isinstance(value, dict) and name != "optim":
            yield f"{indent}{name}:"
            yield from _rendered(value, notes, f"{prefix}{name}.", f"{indent}  ")
        else:
            yield f"{indent}{name}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    """Write a value in one line of YAML."""
    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
