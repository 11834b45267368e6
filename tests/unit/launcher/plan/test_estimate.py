from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from engine.reliability.exit_codes import EXIT_REFUSED
from launcher.ending import guarded
from launcher.plan.command import add_arguments, run_command
from launcher.plan.durations import Rates
from launcher.plan.hardware import find_gpu

ROOT = Path(__file__).parents[4]
NQ = ["--documents", "21015324", "--queries", "58880", "--retriever-shape", "bert-base", "--ranker-shape", "bert-large"]


def plan(recipe: str, *words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args(["--config", str(ROOT / "configs" / recipe), *words])
    return guarded(None, lambda: run_command(arguments))


def row(text: str, *cells: str) -> list[str]:
    """The cells of the first line that begins with these."""
    start = r"\s+".join(map(re.escape, cells)) + r"(\s\s|$)"
    line = next(line for line in text.splitlines() if re.match(start, line))
    return re.split(r"\s{2,}", line)


def test_the_smallest_recipe_is_planned_from_its_file_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("tiny.yaml", "--gpus-per-node", "2", "--gpu", "cpu") == 0
    text = capsys.readouterr().out
    assert "1 x 2 CPU rank" in text
    assert "300 documents, 420 training queries" in text
    for heading in ("Memory of a device while", "Memory of a device by phase", "Memory of the host", "Disk of the run",
                    "Moved in one iteration", "Time\n", "Assumed\n"):  # fmt: skip
        assert heading in text
    for stage in ("0", "1", "2*", "3"):
        assert row(text, "ranker", stage)[-1] == "yes"
    assert "engines at rest" in text  # on a CPU they have nowhere else to be


def test_the_papers_recipe_on_eight_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("ar2_nq.yaml", "--gpus-per-node", "8", "--gpu", "a100-80gb", *NQ) == 0
    text = capsys.readouterr().out
    assert "217,783,296 parameters" in text
    assert "OPQ96,IVF18336_HNSW32,PQ96" in text
    assert row(text, "retriever", "1*")[-1] == "yes"
    assert row(text, "retriever", "1*")[8] == "639 MiB"  # the frozen ranker: 335 million numbers of two bytes
    assert row(text, "encode")[1] == "12"  # before any training, after the warm-up, and ten iterations
    assert "is taken to have the shape bert-large" in text


def test_devices_that_refreshes_keep_have_no_rank(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("tiny.yaml", "ar2.overlap=split", "ar2.refresh_devices=2", "--gpus-per-node")
    assert plan(*words, "4") == 0
    assert "each: 2 ranks, and 1 x 2 for refreshes beside the ranker's phase" in capsys.readouterr().out
    assert plan(*words, "2") == 2
    assert "--gpus-per-node is 2, and ar2.refresh_devices=2 keeps as many" in capsys.readouterr().err
    assert plan(*words, "2", "--gpu", "cpu") == 0
    assert "each: 2 ranks, and 1 x 2 for" in capsys.readouterr().out, "companions come beside the ranks"


def test_what_does_not_fit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ranker.precision=fp32", "ranker.gradient_checkpointing=false", "warmup_ranker.micro_batch_size=64"]
    assert plan("ar2_nq.yaml", "--gpu", "l4", *NQ, *words) == 0
    text = capsys.readouterr().out
    assert row(text, "ranker", "1*")[-1] == "NO"
    assert "ranker: no stage fits. Lower micro_batch_size" in text


def test_more_gpus_take_less_time_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for nodes in ("1", "4"):
        assert plan("ar2_nq.yaml", "--nodes", nodes, "--gpus-per-node", "8", *NQ) == 0
        text = capsys.readouterr().out
        found.append((float(row(text, "retriever phase")[3]), float(row(text, "retriever", "1*")[11].split()[0])))
    assert found[0][0] / 4 < found[1][0] < found[0][0]  # not a quarter: gradients go over a slower network
    assert found[1][1] < found[0][1]


def test_a_shape_is_given_by_the_models_name_or_by_its_own_option(capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for words in (
        ["--ranker-shape", "1x64"],
        ["--shape", "ranker=1x64"],
        ["--ranker-shape", "2x64", "--shape", "ranker=1x64"],
    ):
        assert plan("tiny.yaml", *words) == 0
        told.append(capsys.readouterr().out)
    assert "ranker: 1x64, 1 layers of 64" in told[0]
    assert told[0] == told[1] == told[2]  # of two for the same model the later one counts


def test_an_index_that_is_searched_on_gpus_is_held_there(capsys: pytest.CaptureFixture[str]) -> None:
    nq = ["--gpu", "a100-80gb", *NQ, "index.factory=IVF16384,PQ64", "index.memory_gib=8"]
    needed = []
    for words in ([], ["index.gpu=always"]):
        assert plan("ar2_nq.yaml", *nq, *words) == 0
        text = capsys.readouterr().out
        needed.append(float(row(text, "encode, mine")[2].removesuffix(" GiB")))
    index = (21_015_324 * (64 + 8) + 16384 * 768 * 4 + 64 * 256 * 12 * 4) / 2**30  # codes, ids, centroids, codebooks
    assert needed[1] - needed[0] == pytest.approx(1.06 * (index + 1.5), abs=0.05), "FAISS's scratch is 1.5 GiB"


def test_words_override_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("tiny.yaml", "ranker.zero_stage=3") == 0
    assert row(capsys.readouterr().out, "ranker", "3*")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "a100-80g"], "did you mean 'a100-80gb'"),
        (["--gpu", "H100"], "did you mean 'h100-80gb'"),
        (["--nodes", "3"], "3 ranks cannot share"),
        (["--ranker-shape", "bert-huge"], "no shape of a model"),
        (["--shape", "ranker"], "'' is no shape of a model"),
        (["--shape", "teacher=bert-base"], "a shape is given for teacher"),
        (["ranker.max_length=600"], "the model takes 512 tokens"),
        (["ranker.max_lenght=60"], "did you mean 'ranker.max_length'"),
        (["index.factory=IVF4096,PQ8x4"], "4096 inverted lists"),
        (["index.factory=IVF4,PQ8x4fs", "index.gpu=always"], "set index.factory=IVF4,PQ32, or index.gpu=auto"),
        (["index.factory=IVF4,PQ32", "index.gpu=always", "--gpu", "cpu"], "the ranks are planned on CPUs"),
    ],
)
def test_bad_words_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("tiny.yaml", *words) == EXIT_REFUSED
    told = capsys.readouterr()
    assert message in told.err
    assert not told.out  # half a plan would be taken for one


def test_a_gpu_is_found_in_any_case() -> None:
    assert find_gpu("A100-80GB").peak_flops("bf16") == 312e12
    assert find_gpu("a100-80gb").peak_flops("fp32") == 19.5e12


def test_assumptions_name_the_options_that_change_them() -> None:
    told = "\n".join(Rates(training_share=0.25).assumptions(find_gpu("l4"), {"bf16"}))
    for word in ("25%", "--training-share", "--inference-share", "--disk-gbytes", "--network-gbytes", "121 TFLOP/s"):
        assert word in told
