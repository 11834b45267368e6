"""`python -m launcher plan`: what a recipe takes of given machines, said without running it.

    python -m launcher plan --config configs/ar2_nq.yaml --nodes 1 --gpus-per-node 8 --gpu a100-80gb
        --documents 21015324 --queries 58880 --retriever-shape bert-base --ranker-shape bert-large

Nothing is downloaded but a model's configuration, where neither a folder nor a shape on the command line gives it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from launcher.terminal.arguments import positive_number, positive_whole_number, recipe_file, share

if TYPE_CHECKING:  # the words are parsed without reading a configuration
    from engine.config.recipe import Config
    from launcher.plan.hardware import Gpu

_GIB = 2**30


EXAMPLES = (
    "--config configs/ar2_nq.yaml --nodes 2 --gpus-per-node 8 --gpu a100-80gb --documents 21e6 --queries 58880",
    "--config configs/wiki_qa.yaml --gpu cpu --gpus-per-node 2 data.path=data/wiki",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's words."""
    add = parser.add_argument
    add("--config", type=recipe_file, required=True, metavar="FILE", help="the recipe, such as configs/ar2_nq.yaml")
    add("--nodes", type=positive_whole_number, default=1, metavar="N", help="number of hosts (1)")
    add(
        "--gpus-per-node",
        type=positive_whole_number,
        default=1,
        metavar="G",
        help="GPUs of each host, one rank a GPU but for those that ar2.refresh_devices keeps (1)",
    )
    add("--gpu", default="a100-80gb", metavar="NAME", help="such as a100-80gb, h100-80gb, l4, cpu (a100-80gb)")
    add(
        "--gpu-memory",
        type=positive_number,
        metavar="GIB",
        help="GiB of memory of a GPU, or of a rank on the CPU, in place of the table's",
    )
    _add_shapes(parser)
    _add_sizes(parser.add_argument_group("the data"))
    _add_rates(parser.add_argument_group("what the machines reach"))
    add("overrides", nargs="*", metavar="key=value", help="over the recipe, such as ranker.zero_stage=2")


def _add_sizes(group: argparse._ArgumentGroup) -> None:
    """Describe the words for the size of the data."""
    add = group.add_argument
    add(
        "--documents",
        type=positive_whole_number,
        metavar="N",
        help="documents of the corpus, where the data folder does not say",
    )
    add(
        "--queries",
        type=positive_whole_number,
        metavar="N",
        help="number of training queries, where the data folder does not say",
    )
    add("--dev-queries", type=positive_whole_number, metavar="N", help="number of queries of the dev split, likewise")
    add("--test-queries", type=positive_whole_number, metavar="N", help="number of queries of the test split, likewise")
    add(
        "--document-bytes",
        type=positive_number,
        metavar="B",
        help="bytes of a document's text on average (by the size of the corpus file, else 620)",
    )
    add(
        "--document-terms",
        type=positive_number,
        default=180.0,
        metavar="N",
        help="terms of a document in a lexical retriever's vectors on average (180)",
    )


def _add_rates(group: argparse._ArgumentGroup) -> None:
    """Describe the words for speeds."""
    add = group.add_argument
    add("--training-share", type=share, metavar="X", help="share of the peak rate that training reaches (0.3)")
    add("--inference-share", type=share, metavar="X", help="the same for encoding and scoring (0.4)")
    add(
        "--disk-gbytes",
        type=positive_number,
        metavar="X",
        help="GB/s of the shared file system, all ranks together (2)",
    )
    add(
        "--local-disk-gbytes",
        type=positive_number,
        metavar="X",
        help="GB/s of each host's own disk, where index.embeddings=local keeps embeddings there (2)",
    )
    add(
        "--network-gbytes",
        type=positive_number,
        metavar="X",
        help="GB/s that a rank sends (10; on one host by the GPU)",
    )
    add("--gflops-per-rank", type=positive_number, metavar="X", help="GFLOP/s of a rank's CPU cores, for FAISS (720)")


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    """Describe the words for shapes: of any model by its name, and short ones for the names that AR2 gives."""
    add = parser.add_argument
    given: dict[str, Any] = {"dest": "shapes", "action": "append"}
    shape = "bert-base, bert-large, minilm-l6, minilm-l12 or LAYERSxHIDDEN[xHEADS], where the model is not at hand"
    add("--shape", metavar="MODEL=SHAPE", default=[], help=f"of a model of the recipe: {shape}", **given)
    for model in ("retriever", "ranker"):
        add(f"--{model}-shape", metavar="SHAPE", type=f"{model}={{}}".format, help=f"as --shape {model}=SHAPE", **given)


def run_command(arguments: argparse.Namespace) -> int:
    """Print the plan; return 0.

    Raises:
        ConfigError: A word, the recipe or a shape is wrong, the ranks cannot share a batch, or sizes are not known.
        ModelError: A model's configuration cannot be had.
    """
    from engine.config.file import load_config
    from engine.errors import ConfigError
    from launcher.plan.corpus import corpus_of
    from launcher.plan.durations import Rates
    from launcher.plan.estimate import make_plan
    from launcher.plan.hardware import find_gpu
    from launcher.plan.models import shapes_of
    from launcher.plan.report import report

    gpu = find_gpu(arguments.gpu)
    if arguments.gpu_memory is not None:
        gpu = replace(gpu, memory_bytes=int(arguments.gpu_memory * _GIB))
    config = load_config(arguments.config, arguments.overrides)
    if not config.learns_from_queries:
        raise ConfigError(
            f"the recipe {config.recipe} learns from documents alone, and searches nothing",
            expected="a recipe with a retriever, whose index, traffic and hours are planned",
            remedy="plan another recipe; what this one takes of the disk is told by `python -m launcher preflight`",
        )
    corpus = corpus_of(
        config,
        documents=arguments.documents,
        queries=arguments.queries,
        dev=arguments.dev_queries,
        test=arguments.test_queries,
        text_bytes=arguments.document_bytes,
        terms=arguments.document_terms,
    )
    between = Rates().network_bytes if arguments.nodes > 1 else gpu.link_bytes
    given = {
        "training_share": arguments.training_share,
        "inference_share": arguments.inference_share,
        "disk_bytes": _billions(arguments.disk_gbytes),
        "local_disk_bytes": _billions(arguments.local_disk_gbytes),
        "network_bytes": _billions(arguments.network_gbytes) or between,
        "gigaflops": arguments.gflops_per_rank,
    }
    plan = make_plan(
        config,
        corpus,
        shapes_of(config, dict(word.partition("=")[::2] for word in arguments.shapes)),
        gpu,
        nodes=arguments.nodes,
        ranks_per_node=_ranks_per_node(config, arguments.gpus_per_node, gpu),
        rates=replace(Rates(), **{name: value for name, value in given.items() if value is not None}),
    )
    print(report(plan))
    return 0


def _ranks_per_node(config: Config, devices: int, gpu: Gpu) -> int:
    """Return how many of a host's devices ranks have; on CPUs those that refresh come beside them.

    Raises:
        ConfigError: All of them are kept for refreshes.
    """
    from engine.errors import ConfigError

    kept = 0 if gpu.is_cpu else config.refresh_devices
    if devices <= kept:
        raise ConfigError(
            f"--gpus-per-node is {devices}, and ar2.refresh_devices={kept} keeps as many for refreshes",
            expected="a GPU more for each rank",
            remedy=f"give --gpus-per-node {kept + 1} or more, or keep fewer",
        )
    return devices - kept


def _billions(value: float | None) -> float | None:
    return None if value is None else value * 1e9
