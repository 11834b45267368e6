"""Sparring from Python: what its users write, as scripts, in processes that have imported everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import ROOT
from tests.e2e.conftest import QUICK
from tests.e2e.made import ledger_of, weights_of
from tests.e2e.starts import TIMEOUT_SECONDS, Ended, Started, Zygote

EXAMPLES = ROOT / "examples"


def finished(zygote: Zygote, script: Path, *words: str) -> Ended:
    ended = Started([zygote.begin(str(script), *words, module="")]).wait()
    assert ended.code == 0, ended.out[-1000:] + ended.err[-3000:]
    return ended


@pytest.fixture(scope="module")
def session(zygote: Zygote, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that was stopped by a callback and gone on with, and what was seen of it."""
    folder = tmp_path_factory.mktemp("python") / "run"
    changes: dict[str, Any] = {}
    for word in QUICK:
        key, _, value = word.partition("=")
        *parents, leaf = key.split(".")
        section = changes
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = json.loads(value)
    ended = finished(
        zygote, Path(__file__).with_name("api_session.py"), str(folder), str(small_data), json.dumps(changes)
    )
    told: dict[str, Any] = json.loads(ended.out.splitlines()[-1])
    return folder, told


def test_a_run_of_python_is_the_run_of_a_command(session: tuple[Path, dict[str, Any]], quick_run: Path) -> None:
    """Stopped by a callback and gone on with, it has the very weights of a start by `launcher/run.py`."""
    folder, told = session
    assert weights_of(folder) == weights_of(quick_run)
    assert list(ledger_of(folder)) == list(ledger_of(quick_run))
    stopped, *files = told["stopped"]
    assert files == [False, True], "the folder is free after an error"
    assert told["stages"][stopped - 1] == "warmup_ranker"
    assert told["stages"].count("retriever/1") >= 1
    assert told["again"] == [0, True]
    assert told["environment"]
    assert not told["lock"]
    assert set(told["systems"]) == {"BM25", "G0", "D0", "G", "hybrid", "D", "fused"}
    assert told["table"]


def test_a_searcher_says_what_the_models_say(session: tuple[Path, dict[str, Any]]) -> None:
    _, told = session
    together, alone = told["docids"]
    assert together == alone
    assert told["orders"] == [True, True]
    assert told["retriever"][0] == pytest.approx(told["retriever"][1], rel=1e-2)  # stored in half precision
    assert told["ranker"][0] == pytest.approx(told["ranker"][1], abs=1e-5)
    assert told["places"] == [3, 2, 1, 0]
    assert told["export"] == pytest.approx([0, told["own"]], abs=1e-5)
    assert told["mixed"] == [True, True], "by BM25 alone, a document's own text finds it first"
    assert told["shapes"] == [[32], [2, 32]]


def test_what_cannot_be_done_is_told(session: tuple[Path, dict[str, Any]]) -> None:
    refused = session[1]["refused"]
    for name, words in {
        "search in an export": "neither an index nor a corpus",
        "unknown part": "weights of G, D, BM25",
        "weights": "sum to 1",
        "k": "k is 0",
        "no question": "a question is empty",
        "text": "expected: a text",
        "half a pair": "no Unicode text",
        "no text": "there is no text to encode",
        "side": "there is no side 'title'",
        "order": "there is no order 'x'",
        "folder": "neither a run nor an export",
        "one text": "a list of texts",
        "ranks": "one of several ranks",
    }.items():
        assert words.lower() in refused[name].lower(), refused[name]


@pytest.fixture(scope="module")
def own(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """The example that begins with texts."""
    folder = tmp_path_factory.mktemp("examples") / "own"
    return folder, finished(zygote, EXAMPLES / "own_data.py", "--out", str(folder))


def test_own_data(own: tuple[Path, Ended]) -> None:
    folder, ended = own
    assert (folder / "recipe.yaml").exists()
    assert "retriever/1" in ended.out
    _, _, answers = ended.out.rpartition("how do I wrap a paragraph of text?\n")
    assert len(answers.splitlines()) == 3


@pytest.mark.parametrize(("example", "last"), [("harden_ranker", "wrap a paragraph of text"), ("distil", "scores: [[")])
def test_an_example(example: str, last: str, own: tuple[Path, Ended], zygote: Zygote, tmp_path: Path) -> None:
    words = ("--data", str(own[0] / "data"), "--out", str(tmp_path / "run"), "--steps", "2")
    assert last in finished(zygote, EXAMPLES / f"{example}.py", *words).out


def test_the_notebook(own: tuple[Path, Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("SPARRING_RUN", str(own[0] / "run"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(EXAMPLES / "search.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is kept without outputs"
    nbclient.NotebookClient(notebook, timeout=TIMEOUT_SECONDS, kernel_name="python3").execute()
    outputs = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if output.get("name") != "stderr"
    ]
    told = [output.get("text") or output["data"]["text/plain"] for output in outputs]
    assert "Searcher(" in told[0]
    assert len(told[1].splitlines()) == 5
    assert told[2].count("[") == 3
    assert "wrap a paragraph" in told[-1]
