"""Bad input stops a run before work is lost: exit code 2, one message with the fact and what to do, and once mended the
same folder goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.processes import ROOT, has_fp16
from tests.e2e.made import ledger_of, weights_of
from tests.e2e.starts import TINY, Ended, Zygote, on_the_cpu

QUICK = (
    *("ar2.iterations=0", "warmup_retriever.steps=1", "warmup_ranker.steps=1", "evaluation.max_dev_queries=2"),
    *("evaluation.max_test_queries=2", "evaluation.rerank_depth=2", "random_model.hidden_size=16"),
)


@dataclass(frozen=True)
class Undisturbed:
    """A run that had nothing to object to, and its data; tests work on copies."""

    folder: Path
    data: Path

    def copy(self, target: Path) -> tuple[Path, Path]:
        """Return copies of the run folder and of the data, as if the run had been made of the copied data."""
        shutil.copytree(self.folder, target / "run")
        shutil.copytree(self.data, target / "data")
        config = target / "run" / "config.yaml"
        config.write_text(config.read_text().replace(str(self.data), str(target / "data")))
        return target / "run", target / "data"


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = run(zygote, folder, small_data)
    assert ended.code == 0, ended.err[-4000:]
    return Undisturbed(folder, small_data)


@pytest.fixture
def data(small_data: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    shutil.copytree(small_data, folder)
    return folder


def run(zygote: Zygote, folder: Path, data: Path, *words: str) -> Ended:
    return zygote.recipe(f"run.path={folder}", f"data.path={data}", *QUICK, *words).wait()


def assert_refused(ended: Ended, *words: str) -> None:
    shown = ended.out + ended.err
    assert ended.code == 2, shown[-4000:]
    assert shown.count("error: ") == 1, shown
    assert "Traceback" not in shown, shown
    message = shown[shown.index("error: ") :]
    # An error's own sentences, or the preflight's list of problems, each with its remedy on a line below.
    assert "Expected: " in message or "Remedy: " in message or "\n   remedy: " in message, message
    for word in words:
        assert word in message, message


def append(path: Path, line: str) -> int:
    """Add a line and return its number."""
    text = path.read_text() + line + "\n"
    path.write_text(text)
    return text.count("\n")


def record(**fields: object) -> str:
    return json.dumps(fields)


# --- data ------------------------------------------------------------------------------------------------------------

Damage = Callable[[Path], list[str]]
"""Damages a data folder and returns what the message must say."""


def missing_folder(data: Path) -> list[str]:
    shutil.rmtree(data)
    return [str(data)]


def missing_corpus(data: Path) -> list[str]:
    (data / "corpus.jsonl").unlink()
    return ["corpus.jsonl"]


def missing_queries(data: Path) -> list[str]:
    (data / "queries.jsonl").unlink()
    return ["queries.jsonl"]


def missing_train_split(data: Path) -> list[str]:
    (data / "qrels" / "train.tsv").unlink()
    return ["train"]


def empty_corpus(data: Path) -> list[str]:
    (data / "corpus.jsonl").write_text("")
    return ["corpus.jsonl", "empty"]


def empty_queries(data: Path) -> list[str]:
    (data / "queries.jsonl").write_text("")
    return ["queries.jsonl", "empty"]


def empty_train_split(data: Path) -> list[str]:
    (data / "qrels" / "train.tsv").write_text("")
    return ["train.tsv", "empty"]


def malformed_document(data: Path) -> list[str]:
    number = append(data / "corpus.jsonl", '{"_id": "d900", "text": "cut in the mid')
    return ["corpus.jsonl", f"line {number}"]


def malformed_query(data: Path) -> list[str]:
    number = append(data / "queries.jsonl", "no JSON at all")
    return ["queries.jsonl", f"line {number}"]


def document_without_id(data: Path) -> list[str]:
    number = append(data / "corpus.jsonl", record(title="a title", text="a text"))
    return ["corpus.jsonl", f"line {number}", "_id"]


def unknown_qid(data: Path) -> list[str]:
    number = append(data / "qrels" / "train.tsv", "q99999\td1\t1")
    return ["train.tsv", f"line {number}", "q99999"]


def unknown_docid(data: Path) -> list[str]:
    qid = (data / "qrels" / "train.tsv").read_text().splitlines()[1].split("\t")[0]
    number = append(data / "qrels" / "train.tsv", f"{qid}\td99999\t1")
    return ["train.tsv", f"line {number}", "d99999"]


def grade_that_is_no_number(data: Path) -> list[str]:
    number = append(data / "qrels" / "train.tsv", "q1\td1\tgood")
    return ["train.tsv", f"line {number}", "good"]


def queries_without_positives(data: Path) -> list[str]:
    path = data / "qrels" / "train.tsv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *(row.rsplit("\t", 1)[0] + "\t0" for row in rows)]) + "\n")
    return ["train", "positive"]


def empty_document_that_is_judged(data: Path) -> list[str]:
    append(data / "corpus.jsonl", record(_id="void", title="", text="  "))
    qid = (data / "qrels" / "train.tsv").read_text().splitlines()[1].split("\t")[0]
    append(data / "qrels" / "train.tsv", f"{qid}\tvoid\t1")
    return ["void"]


def repeated_document(data: Path) -> list[str]:
    number = append(data / "corpus.jsonl", record(_id="d3", title="again", text="another text"))
    return ["corpus.jsonl", "d3", f"{number}", "4"]


def repeated_query(data: Path) -> list[str]:
    number = append(data / "queries.jsonl", record(_id="q3", text="another question"))
    return ["queries.jsonl", "q3", f"{number}", "4"]


def invalid_utf8(data: Path) -> list[str]:
    with (data / "corpus.jsonl").open("ab") as file:
        file.write(b'{"_id": "x", "text": "caf\xe9"}\n')
    return ["corpus.jsonl", "UTF-8"]


def id_with_white_space(data: Path) -> list[str]:
    append(data / "corpus.jsonl", record(_id="two words", title="", text="some text"))
    return ["two words", "white space"]


DAMAGES: list[Damage] = [
    missing_folder,
    missing_corpus,
    missing_queries,
    missing_train_split,
    empty_corpus,
    empty_queries,
    empty_train_split,
    malformed_document,
    malformed_query,
    document_without_id,
    unknown_qid,
    unknown_docid,
    grade_that_is_no_number,
    queries_without_positives,
    empty_document_that_is_judged,
    repeated_document,
    repeated_query,
    invalid_utf8,
    id_with_white_space,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_bad_data_are_refused_before_anything_is_made(
    damage: Damage, zygote: Zygote, data: Path, tmp_path: Path
) -> None:
    words = damage(data)
    ended = run(zygote, tmp_path / "run", data)
    assert_refused(ended, *words)
    assert not ledger_of(tmp_path / "run")
    assert not (tmp_path / "run" / "shards").exists()


def test_with_the_data_mended_the_same_command_goes_through(
    zygote: Zygote, data: Path, small_data: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    for damage, name in ((malformed_document, "corpus.jsonl"), (queries_without_positives, "qrels/train.tsv")):
        damage(data)
        assert run(zygote, tmp_path / "run", data).code == 2
        shutil.copy(small_data / name, data / name)
    ended = run(zygote, tmp_path / "run", data)
    assert ended.code == 0, ended.err[-4000:]
    assert weights_of(tmp_path / "run") == weights_of(undisturbed.folder), "the refused starts left something behind"


def test_data_that_change_under_a_run_are_refused(zygote: Zygote, undisturbed: Undisturbed, tmp_path: Path) -> None:
    folder, data = undisturbed.copy(tmp_path)
    append(data / "corpus.jsonl", record(_id="new", title="a new", text="document"))
    assert_refused(run(zygote, folder, data), "other files", "restore the data")
    assert weights_of(folder) == weights_of(undisturbed.folder)


def test_an_empty_document_nobody_judges_is_dropped_and_told(zygote: Zygote, data: Path, tmp_path: Path) -> None:
    append(data / "corpus.jsonl", record(_id="void", title="", text=""))
    ended = run(zygote, tmp_path / "run", data)
    assert ended.code == 0, ended.err[-4000:]
    assert "dropped 1: " in ended.err
    assert json.loads((tmp_path / "run" / "shards" / "manifest.json").read_text())["num_documents"] == 80


# --- the configuration -----------------------------------------------------------------------------------------------

UNREADABLE = {
    "misspelt key": (["ar2.num_negativs=4"], ["ar2.num_negativs", "did you mean 'ar2.num_negatives'"]),
    "unknown section": (["optimizer.lr=1"], ["optimizer"]),
    "wrong type": (["ar2.iterations=many"], ["ar2.iterations", "'many'"]),
    "out of range": (["ar2.num_negatives=0"], ["ar2.num_negatives", "greater than or equal to 1"]),
    "no assignment": (["quickly"], ["'quickly'", "section.key=value"]),
    "n above the candidates": (["ar2.num_negatives=21", "ar2.iterations=1"], ["21 negatives", "top 20"]),
    "several at once": (["ar2.iterations=many", "run.sed=3"], ["2 problems", "ar2.iterations", "run.seed"]),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_configuration_that_means_nothing_is_refused_before_the_folder_is_made(
    name: str, zygote: Zygote, data: Path, tmp_path: Path
) -> None:
    words, expected = UNREADABLE[name]
    assert_refused(run(zygote, tmp_path / "run", data, *words), *expected)
    assert not (tmp_path / "run").exists()


UNFIT = {
    "n above the corpus": (["ar2.num_negatives=90", "ar2.top_k=100"], ["80 documents", "90 negatives"]),
    "lists above the corpus": (["index.factory=IVF90,PQ8x4"], ["90 inverted lists", "80"]),
    "factory that FAISS refuses": (['index.factory="IVF8,PQ7x4"'], ["IVF8,PQ7x4"]),
    "model that is no folder": (["retriever.name=/nonexistent/model"], ["/nonexistent/model"]),
    "package without weights": (["ranker.name=package:pyyaml"], ["pyyaml"]),
    "input longer than the model": (["retriever.max_length=600", "random_model.vocab_size=500"], ["600", "512"]),
    "index on GPUs that are not there": (["index.gpu=always"], ["index.gpu is always", "set index.gpu=auto"]),
    "int8 of half precision": (
        ["index.encode_int8=true", "retriever.precision=bf16"],
        ["index.encode_int8 is true", "retriever.precision is bf16"],
    ),
    "DeepSpeed file that is not there": (["ranker.deepspeed=/nonexistent.json"], ["/nonexistent.json"]),
}


def unfit_models(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Make models that no run can take, each refused before the corpus is tokenised."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, T5Config

    from engine.models.random import make_random_model

    names = ("without weights", "with three logits", "with a larger tokenizer", "encoder-decoder")
    bare, logits, larger, decoder = (folder / name.replace(" ", "_") for name in names)
    for one in (bare, logits, larger, decoder):
        make_random_model(one, ["some words for a small vocabulary"], hidden_size=16, num_layers=1)
    (bare / "model.safetensors").unlink()
    AutoModelForSequenceClassification.from_pretrained(logits, num_labels=3).save_pretrained(logits)
    tokenizer = AutoTokenizer.from_pretrained(larger)
    tokenizer.add_tokens(["unheard-of"])
    tokenizer.save_pretrained(larger)
    T5Config(num_layers=1).save_pretrained(decoder)
    return {
        "model without weights": ([f"ranker.name={bare}"], [str(bare), "weights"]),
        "head with three logits": ([f"ranker.name={logits}"], ["3 logits", "1 logit", "ranker.name=FOLDER"]),
        "tokenizer larger than the embeddings": ([f"retriever.name={larger}"], ["its model has", "retriever.name="]),
        "encoder-decoder": ([f"ranker.name={decoder}"], ["encoder-decoder", "ranker.name"]),
    }


def test_a_configuration_that_does_not_fit_is_refused_and_once_corrected_the_folder_is_free(
    zygote: Zygote, data: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    unfit = UNFIT | unfit_models(tmp_path / "models")
    if not has_fp16():
        unfit["precision that the CPU has not"] = ["ranker.precision=fp16"], ["fp16", "set ranker.precision=bf16"]
    for name, (words, expected) in unfit.items():
        ended = run(zygote, tmp_path / "run", data, *words)
        print(name)
        assert_refused(ended, *expected)
        assert not ledger_of(tmp_path / "run"), name
    again = run(zygote, tmp_path / "run", data)
    assert again.code == 0, again.err[-4000:]
    assert weights_of(tmp_path / "run") == weights_of(undisturbed.folder), "the refused starts left something behind"


def test_a_missing_configuration_file_is_refused(zygote: Zygote, tmp_path: Path) -> None:
    ended = zygote.recipe(f"run.path={tmp_path / 'run'}", config=tmp_path / "none.yaml").wait()
    assert_refused(ended, "none.yaml")
    assert not (tmp_path / "run").exists()


# --- the run folder --------------------------------------------------------------------------------------------------


def test_a_run_folder_of_another_configuration_is_refused(
    zygote: Zygote, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    folder, data = undisturbed.copy(tmp_path)
    before = (folder / "config.yaml").read_text()
    ended = run(zygote, folder, data, "ranker.max_length=72", "run.seed=7")
    assert_refused(ended, "ranker.max_length: 64 -> 72", "run.seed: 42 -> 7", "another run.path")
    assert (folder / "config.yaml").read_text() == before
    again = run(zygote, folder, data, "run.log_every_steps=1")
    assert again.code == 0, "how often a run logs changes no result"


def test_a_folder_that_holds_something_else_is_refused(zygote: Zygote, data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert_refused(run(zygote, tmp_path / "run", data), "is not empty")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


# --- through a whole command line ------------------------------------------------------------------------------------


def test_two_ranks_tell_an_error_once(zygote: Zygote, data: Path, tmp_path: Path) -> None:
    malformed_document(data)
    ended = zygote.recipe(f"run.path={tmp_path / 'run'}", f"data.path={data}", *QUICK, num_ranks=2).wait()
    assert_refused(ended, "corpus.jsonl")


def test_the_exit_code_is_that_of_the_process(data: Path, tmp_path: Path) -> None:
    malformed_document(data)
    command = [sys.executable, "launcher/run.py", "--config", str(TINY)]
    ended = subprocess.run(
        [*command, f"run.path={tmp_path / 'run'}", f"data.path={data}", "run.device=cpu"],
        cwd=ROOT,
        env=on_the_cpu(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert_refused(Ended(ended.returncode, ended.stdout, ended.stderr, 0.0), "corpus.jsonl")


def test_a_batch_that_the_ranks_cannot_share_is_refused(zygote: Zygote, data: Path, tmp_path: Path) -> None:
    words = (f"run.path={tmp_path / 'run'}", f"data.path={data}", *QUICK, "warmup_ranker.batch_size=7")
    assert_refused(
        zygote.recipe(*words, num_ranks=2).wait(), "warmup_ranker.batch_size is 7", "2 ranks", "a multiple of 2"
    )
    assert not ledger_of(tmp_path / "run")
