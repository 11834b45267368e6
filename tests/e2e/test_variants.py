"""Other choices of the recipe, each on one short run: what must not change a number does not, the rest runs through."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from engine.data.corpus import sample_queries
from engine.errors import ModelError
from launcher.commands.finished import open_run, states_of, taken_of
from launcher.commands.text_models import TextModels
from shards.formats import open_dataset
from tests.e2e.made import ledger_of, losses_of, measured, metrics_of, ranking_of, summary_of, weights_of
from tests.e2e.starts import TINY, Zygote, refused

SHORT = (
    *("ar2.iterations=1", "evaluation.zero_shot=false", "run.log_every_steps=1"),
    *("warmup_retriever.steps=4", "warmup_ranker.steps=4", "ar2.retriever.steps=3", "ar2.ranker.steps=2"),
)


class Runs:
    """Makes short runs, each in a folder of its own."""

    def __init__(self, zygote: Zygote, data: Path, folder: Path) -> None:
        self._zygote, self._data, self._folder = zygote, data, folder

    def make(self, name: str, *words: str, num_ranks: int = 1, data: Path | None = None) -> Path:
        folder = self._folder / name
        start = self._zygote.recipe(
            f"run.path={folder}",
            f"data.path={data or self._data}",
            "evaluation.fuse=false",
            *SHORT,
            *words,
            num_ranks=num_ranks,
        )
        ended = start.wait()
        assert ended.code == 0, ended.err[-6000:]
        return folder


@pytest.fixture(scope="module")
def runs(zygote: Zygote, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(zygote, small_data, tmp_path_factory.mktemp("variants"))


@pytest.fixture(scope="module")
def plain(runs: Runs) -> Path:
    return runs.make("plain")


def systems_of(folder: Path) -> list[str]:
    return [f"{row['split']} {row['system']}" for row in summary_of(folder)]


def assert_same_losses(folder: Path, plain: Path) -> None:
    ours, expected = losses_of(folder), losses_of(plain)
    assert list(ours) == list(expected)
    assert list(ours.values()) == pytest.approx(list(expected.values()), rel=1e-4)


def test_the_plain_run_measures_all_systems_but_the_one_left_out(plain: Path) -> None:
    assert systems_of(plain) == [
        *("dev BM25", "dev G0", "dev D0", "dev G", "dev D"),
        *("test BM25", "test G0", "test D0", "test G", "test D"),
    ]


def test_zero_3_for_both_models_gives_the_same_losses_weights_and_exports(runs: Runs, plain: Path) -> None:
    folder = runs.make("zero3", "retriever.zero_stage=3", "ranker.zero_stage=3", num_ranks=2)
    assert_same_losses(folder, plain)
    assert systems_of(folder) == systems_of(plain)
    for model in ("retriever", "ranker"):
        ours, expected = (load_file(path / "export" / model / "model.safetensors") for path in (folder, plain))
        assert ours.keys() == expected.keys()
        for name, weight in expected.items():
            # Softmax cancels these: their gradients are rounding, which Adam makes a step of.
            if name.endswith("key.bias") or name == "classifier.bias":
                continue
            np.testing.assert_allclose(ours[name], weight, atol=2e-4, err_msg=name)


def test_micro_batches_change_no_number(runs: Runs, plain: Path) -> None:
    sections = ("warmup_retriever", "warmup_ranker", "ar2.retriever", "ar2.ranker")
    folder = runs.make("whole", *(f"{section}.micro_batch_size=16" for section in sections))
    assert_same_losses(folder, plain)


def test_mining_only_what_will_be_drawn_trains_the_same(runs: Runs, plain: Path) -> None:
    # A ranker that begins again from D0 in the first iteration begins where it is.
    folder = runs.make("sampled", "ar2.mine=sampled", "ar2.ranker_restarts=warmup")
    assert losses_of(folder) == losses_of(plain)
    assert weights_of(folder) == weights_of(plain)
    queries = [line["candidates/queries"] for path in (folder, plain) for line in metrics_of(path)
               if line["stage"] == "candidates/001" and "candidates/queries" in line]  # fmt: skip
    assert queries[0] < queries[1]


def test_the_order_and_the_form_of_the_released_code(runs: Runs, plain: Path) -> None:
    words = ("ar2.order=released", "ar2.adversarial=released", "ar2.adversarial_reduction=sum", "ar2.teacher=always")
    head = ("ranker.head=cls", "warmup_ranker.optim.head_lr_scale=10")
    folder = runs.make("released", *words, *head, "ar2.adversarial_weight=0.5", "ar2.distillation_weight=0.5")
    stages = [stage for stage in ledger_of(folder) if stage.endswith("1")]
    refresh = ["encode/001", "index/001", "candidates/001", "staleness/1"]
    assert stages == ["ranker/1", "retriever/1", *refresh, "evaluate/1"]
    for ranker in ("weights/ranker/000", "weights/ranker/001", "export/ranker"):
        assert (folder / ranker / "head" / "model.safetensors").exists()
    lines = [line for line in metrics_of(folder) if "retriever/loss" in line]
    for line in lines:
        assert line["retriever/adversarial"] > 0
        parts = 0.5 * (line["retriever/adversarial"] + line["retriever/distillation"])
        assert line["retriever/loss"] == pytest.approx(parts, rel=1e-5)
    assert systems_of(folder) == systems_of(plain)


def test_a_duel_that_does_not_raise_the_retriever_leaves_the_warm_up(runs: Runs, zygote: Zygote) -> None:
    """Symptom: the game made the retriever no better than the one that went into it, and was exported all the same.

    The learning rate is too small to change a weight, so that both retrievers are the same on dev.
    """
    words = ("evaluation.iteration=best", "run.keep_best=MRR@10")
    by_dev = ("ar2.teacher=dev", "ar2.adversarial_from=lead")
    folder = runs.make("level", *words, *by_dev, "ar2.retriever.optim.lr=1.0e-30", "evaluation.fuse=true")
    weights, taken = weights_of(folder), ledger_of(folder)["take"]["result"]
    assert weights["ranker/000"] != weights["ranker/001"]
    assert (taken["iteration"], taken["why"]) == (0, "best on dev by MRR@10")
    assert taken["verdict"].startswith("The duel did NOT pay: G0 is taken, and no iteration is above G0")
    rows = {(row["system"], row["iteration"]) for row in summary_of(folder) if row["split"] == "test"}
    assert rows == {("BM25", None), ("G0", 0), ("hybrid", 0), ("D0", 0), ("fused", 0)}
    by_model = {
        score["model"]: score["metrics"]["MRR@10"] for score in ledger_of(folder)["evaluate/0"]["result"]["scores"]
    }
    odds = {model: (value + 0.001) / (1.001 - value) for model, value in by_model.items()}
    trust, leads = odds["ranker"] / sum(odds.values()), by_model["ranker"] > by_model["retriever"]
    lines = [line for line in metrics_of(folder) if "retriever/loss" in line]
    assert lines
    for line in lines:
        assert line["retriever/taught"] == pytest.approx(trust, rel=1e-6)
        parts = line["retriever/distillation"] + line["retriever/label"]
        parts += 0.3 * line["retriever/adversarial"] * leads
        assert line["retriever/loss"] == pytest.approx(parts, rel=1e-5)
    for model in ("retriever", "ranker"):
        exported = (folder / "export" / model / "model.safetensors").read_bytes()
        assert exported == (folder / "weights" / model / "000" / "model.safetensors").read_bytes()
    assert (folder / "export" / "fusion" / "fusion.json").exists()
    for command in (["search", str(folder), "a question"], ["export", str(folder), "--out", str(folder / "again")]):
        ended = zygote.launcher(*command)
        assert ended.code == 0, ended.err
    assert "iteration 0 exported" in ended.err


def test_a_game_on_joint_negatives(runs: Runs, plain: Path, small_data: Path, tmp_path: Path) -> None:
    """BM25's hits join the retriever's, are filtered, and drawn by their distance from the positive."""
    judged = [line.split("\t") for line in (small_data / "qrels" / "train.tsv").read_text().splitlines()[1:]]
    docids = [docid for _, docid, _ in judged[:20]]
    (tmp_path / "more.tsv").write_text("".join(f"{qid}\t{docid}\n" for qid, *_ in judged for docid in docids))
    filters = f"[{{name: additions, file: {tmp_path}/more.tsv}}, {{name: margin, share: 0.9}}]"
    words = f"ar2.negatives={{filters: {filters}, sampler: {{name: simans, a: 0.5}}}}", "ar2.further_retrievers=[bm25]"
    folder = runs.make("joint", *words)
    first, last = (ledger_of(folder)[f"negatives/{name}"]["result"] for name in ("000", "001"))
    assert first["entries"] > first["documents"], "both found some"
    assert min(first["rejected"]["additions"], first["rejected"]["margin"], last["rejected"]["margin"]) > 0
    assert any("negatives/rejected/margin" in line for line in metrics_of(folder))
    ours, theirs = losses_of(folder), losses_of(plain)
    warmup = {key: value for key, value in theirs.items() if key[0] == "warmup_retriever"}
    assert warmup.items() <= ours.items(), "G0 draws what it always drew"
    assert {key for key in theirs if ours[key] != theirs[key]} >= {key for key in theirs if key[0] == "ranker/1"}


def test_bm25_left_out_and_its_candidates_from_a_run_file(
    runs: Runs, plain: Path, small_data: Path, tmp_path: Path, zygote: Zygote
) -> None:
    """Another system's BM25, whose candidates are the same, makes the same run, without an index and without a row."""
    docids = [json.loads(line)["_id"] for line in (small_data / "corpus.jsonl").read_text().splitlines()]
    qids = json.loads((plain / "candidates" / "bm25" / "candidates.json").read_text())["qids"]
    documents = np.load(plain / "candidates" / "bm25" / "documents.npy").tolist()
    lines = [
        f"{qid} Q0 {docids[document]} {rank + 1} {-rank} theirs\n"
        for qid, own in zip(qids, documents, strict=True)
        for rank, document in enumerate(own)
        if document >= 0
    ]
    (tmp_path / "theirs.trec").write_text("".join(lines))
    folder = runs.make("without_bm25", "bm25.enabled=false", f"warmup_retriever.candidates={tmp_path}/theirs.trec")
    assert_same_losses(folder, plain)
    assert systems_of(folder) == [row for row in systems_of(plain) if not row.endswith(" BM25")]
    assert systems_of(folder) != systems_of(plain)
    assert not (folder / "bm25").exists()
    assert "bm25" not in ledger_of(folder)
    words = ("--data", str(small_data), "--split", "dev", "--candidates", "bm25")
    refused(zygote.launcher("evaluate", str(folder), *words), "bm25.enabled is false in", "name a file")
    words = ("--data", str(small_data), "--no-figure", "--train-queries", "8")
    refused(
        zygote.launcher("analyse", "progress", str(folder), *words), "bm25.enabled is false in", "by the command matrix"
    )


def test_negatives_that_the_retriever_found_before_any_training(runs: Runs, plain: Path, small_data: Path) -> None:
    """G0 draws from what the start finds, which nobody measures; the game from that and from what G0 finds."""
    words = "warmup_retriever.candidates=zero_shot", "ar2.further_retrievers=[zero_shot]", "bm25.enabled=false"
    folder = runs.make("zero_shot", *words)
    stages, start = list(ledger_of(folder)), json.loads((folder / "candidates/zero-shot/candidates.json").read_text())
    made = ["starts", "encode/zero-shot", "index/zero-shot", "candidates/zero-shot", "warmup_retriever", "encode/000"]
    assert [stage for stage in stages if stage in made] == made
    published = json.loads((folder / "weights/retriever/zero-shot/weights.json").read_text())
    assert start["stamp"]["weights_sha256"] == published["sha256"]
    assert ledger_of(folder)["negatives/001"]["result"]["entries"] > 0
    assert not (folder / "bm25").exists()
    assert not any("zero-shot" in row for row in systems_of(folder)), "it was not asked to be measured"
    differing = {key[0] for key, loss in losses_of(plain).items() if losses_of(folder)[key] != loss}
    assert {"warmup_retriever", "ranker/1"} <= differing


def test_exact_search(runs: Runs, plain: Path) -> None:
    folder = runs.make("flat", "index.factory=Flat", "index.nprobe=null", "index.refine_factor=null")
    recalls = [value for (_, _, name), value in measured(folder).items() if name == "index/recall"]
    assert recalls == [1.0, 1.0]
    assert not list((folder / "index").glob("*/*.faiss"))
    warmup = {key: value for key, value in losses_of(plain).items() if key[0] == "warmup_retriever"}
    assert warmup.items() <= losses_of(folder).items()
    assert systems_of(folder) == systems_of(plain)


@pytest.mark.parametrize(("placement", "num_ranks"), [("disk", 1), ("parts", 2)])
def test_where_the_index_lies_changes_no_number(runs: Runs, plain: Path, placement: str, num_ranks: int) -> None:
    """Symptom: an index that is searched from disk, or in unmerged parts by two ranks, gives other negatives."""
    folder = runs.make(placement, f"index.placement={placement}", "data.documents_per_shard=30", num_ranks=num_ranks)
    for name in ("bm25", "000", "001") if num_ranks == 1 else ("bm25", "000"):
        ours, expected = (np.load(path / "candidates" / name / "documents.npy") for path in (folder, plain))
        assert np.array_equal(ours, expected), name
    assert_same_losses(folder, plain)
    files = {path.name for path in (folder / "index" / "000").iterdir()}
    assert ("index.faiss" in files) == (placement == "disk"), files


def test_a_recipe_without_warm_up_takes_over_the_zero_shot_index(runs: Runs) -> None:
    """Symptom: the corpus is encoded twice with the same weights before anything is trained."""
    words = ("evaluation.zero_shot=true", "warmup_retriever.steps=0", "ar2.retriever.steps=0")
    folder = runs.make("trained", *words)
    encoded = {name: stage["result"]["encoded"] for name, stage in ledger_of(folder).items() if "encode/" in name}
    assert encoded == {"encode/zero-shot": 80, "encode/000": 0, "encode/001": 0}
    assert ledger_of(folder)["index/001"]["result"]["reused"] is True
    candidates = [np.load(folder / "candidates" / name / "documents.npy") for name in ("000", "001")]
    assert np.array_equal(*candidates)


def test_two_towers_with_cosine_similarity(runs: Runs, plain: Path) -> None:
    folder = runs.make("untied", "retriever.tied=false", "retriever.similarity=cosine", "retriever.score_scale=20")
    assert systems_of(folder) == systems_of(plain)
    query, document = (load_file(folder / "export" / "retriever" / side / "model.safetensors")
                       for side in ("query", "document"))  # fmt: skip
    assert any(not np.array_equal(query[name], document[name]) for name in query), "each tower was trained"
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder / "export" / "retriever"), device="cpu")
    own_D = model.encode_query("gozesafu tezamifu")
    other_D = model.encode_document("gozesafu tezamifu")
    assert np.linalg.norm(own_D) == pytest.approx(1, abs=1e-5)
    assert not np.allclose(own_D, other_D, atol=1e-3)


def test_layers_and_prompts_of_a_sentence_transformers_folder_are_trained_and_exported(
    runs: Runs, plain: Path, tmp_path: Path
) -> None:
    """Symptom: the transformer alone was trained, and the export gave embeddings of another length."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    start = tmp_path / "start"
    modules = [Transformer(str(plain / "export" / "retriever")), Pooling(32, "mean"), Dense(32, 8)]
    prompts = {"query": "ask: ", "document": ""}
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save_pretrained(str(start))
    folder = runs.make("dense", f"retriever.name={start}", "retriever.zero_stage=3", num_ranks=2)
    exported = folder / "export" / "retriever"
    model = SentenceTransformer(str(exported), device="cpu")
    assert model.encode_query("gozesafu").shape == (8,)
    assert model.prompts == prompts
    ours, before = (load_file(path / "2_Dense" / "model.safetensors") for path in (exported, start))
    assert all(not np.array_equal(ours[name], before[name]) for name in before), "the layer was trained"
    found = np.load(folder / "index" / "001" / "embeddings" / "part-000000.npy").astype(np.float32)
    assert found.shape[1] == 8


def test_without_iterations_the_warm_ups_are_the_result(runs: Runs) -> None:
    folder = runs.make("pipeline", "ar2.iterations=0")
    assert systems_of(folder) == ["dev BM25", "dev G0", "dev D0", "test BM25", "test G0", "test D0"]
    assert sorted(weights_of(folder)) == ["ranker/000", "retriever/000"]
    assert (folder / "export" / "ranker" / "model.safetensors").exists()


def test_data_without_dev_and_test_trains_all_the_same(runs: Runs, small_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(small_data, data)
    for split in ("dev", "test"):
        (data / "qrels" / f"{split}.tsv").unlink()
    folder = runs.make("unjudged", data=data)
    assert sorted(weights_of(folder)) == ["ranker/000", "ranker/001", "retriever/000", "retriever/001"]
    assert (folder / "export" / "retriever" / "model.safetensors").exists()
    assert json.loads((folder / "ledger.json").read_text())["stages"]["evaluate/1"]["result"] == {"scores": []}


def test_irgan_on_one_rank_and_on_two(runs: Runs, plain: Path) -> None:
    """The game of Table 5 begins from AR2's G0, has its own D0, and leaves what AR2 leaves."""
    # In float16, two models that differ by rounding may find other negatives.
    words = ("ar2.objective=irgan", "ar2.ranker_restarts=pretrained", "index.embedding_dtype=float32")
    folder, shared = runs.make("irgan", *words), runs.make("irgan2", *words, num_ranks=2)
    assert_same_losses(shared, folder)
    ours, theirs = losses_of(folder), losses_of(plain)
    assert {key: ours[key] for key in theirs if key[0] == "warmup_retriever"}.items() <= theirs.items()
    assert weights_of(folder)["retriever/000"] == weights_of(plain)["retriever/000"]
    assert not {key for key in ours.keys() & theirs.keys() if key[0] != "warmup_retriever" and ours[key] == theirs[key]}
    assert systems_of(folder) == systems_of(plain)
    points = measured(folder)
    for stage, name in (("warmup_ranker", "warmup_ranker"), ("ranker/1", "ranker")):
        assert points[stage, 1, f"{name}/loss"] > 0
        assert 0 < points[stage, 1, f"{name}/believed_negative"] < 1
    assert "ranker/zero-shot" in weights_of(folder), "from which each iteration's ranker begins"
    assert points["retriever/1", 1, "retriever/loss"] < 0 < points["retriever/1", 1, "retriever/reward"]


def test_the_contrast_of_the_batch_beside_the_game(runs: Runs, plain: Path) -> None:
    """Another game from the same G0, over the documents of both ranks."""
    folder = runs.make("contrast", "ar2.contrastive_weight=0.5", "ar2.in_batch_negatives=world", num_ranks=2)
    ours, theirs = losses_of(folder), losses_of(plain)
    same = {key: ours[key] for key in theirs if key[0] == "warmup_retriever"}
    assert list(same.values()) == pytest.approx([theirs[key] for key in same], rel=1e-4)
    assert weights_of(folder)["retriever/001"] != weights_of(plain)["retriever/001"]
    of = measured(folder)
    for step in (1, 2, 3):
        game, contrast, loss = (
            sum(weight * of["retriever/1", step, f"retriever/{name}"] for name, weight in parts.items())
            for parts in ({"distillation": 1, "label": 1, "adversarial": 0.3}, {"contrastive": 0.5}, {"loss": 1})
        )
        assert contrast > 0
        assert loss == pytest.approx(game + contrast, rel=1e-5)


def test_ance_trains_and_measures_no_ranker(runs: Runs, plain: Path, zygote: Zygote, small_data: Path) -> None:
    """Figure 4's other curve, from the same G0: nothing of a ranker is loaded, measured or exported."""
    folder = runs.make("ance", "ar2.objective=ance", "ar2.mine=sampled", "ar2.in_batch_negatives=world")
    assert weights_of(folder)["retriever/000"] == weights_of(plain)["retriever/000"]
    assert sorted(weights_of(folder)) == ["retriever/000", "retriever/001"]
    assert systems_of(folder) == ["dev BM25", "dev G0", "dev G", "test BM25", "test G0", "test G"]
    stages = [stage for stage in ledger_of(folder) if stage.endswith("1")]
    assert stages == ["retriever/1", "encode/001", "index/001", "candidates/001", "staleness/1", "evaluate/1"]
    assert [path.name for path in (folder / "export").iterdir()] == ["retriever"]
    ended = zygote.launcher("search", str(folder), "where is the first?", "--top-k", "3")
    assert ended.code == 0, ended.err[-3000:]
    assert "retriever" in ended.out
    assert "ranker" not in ended.out
    words = ("evaluate", str(folder), "--data", str(small_data), "--max-queries", "5")
    ended = zygote.launcher(*words, "--retriever", "0,1")
    assert ended.code == 0, ended.err[-3000:]
    assert [row["system"] for row in summary_of(folder) if row["num_queries"] == 5] == ["G0", "G"]
    refused(zygote.launcher(*words, "--candidates", "bm25"), "no ranker is named that could re-order --candidates bm25")
    assert zygote.launcher("matrix", str(folder), "--retriever", "all", "--no-figure").code == 0
    refused(zygote.launcher("matrix", str(folder), "--ranker", "last"), "has no ranker. Expected: a run with a trained")


def test_a_ranker_begins_at_the_level_of_its_prior(runs: Runs) -> None:
    """G0's score inside D's, so large that a fresh head cannot be heard: D0 and D order as G0 scores."""
    folder = runs.make("prior", "ranker.prior=1e6", "ar2.teacher=always", "ar2.adversarial_weight=0")
    found, ranked = (
        {qid: [docid for docid, _ in own][:10] for qid, own in ranking_of(folder / "results" / name).items()}
        for name in ("dev-G0-000.trec", "dev-D0-000.trec")
    )
    assert ranked == found
    by_d, by_g0 = ranking_of(folder / "results" / "dev-D-001.trec"), ranking_of(folder / "results" / "dev-G0-000.trec")
    for qid, own in by_d.items():
        scores = dict(by_g0[qid])
        known = [scores[docid] for docid, _ in own[:10] if docid in scores]
        assert known == sorted(known, reverse=True)
    accuracy = {key: value for key, value in measured(folder).items() if key[2].endswith("ranker_accuracy")}
    assert accuracy, "the game ran against it"
    assert "1e+06 * " in (folder / "export" / "ranker" / "README.md").read_text()


@pytest.fixture(scope="module")
def lexical(runs: Runs) -> Path:
    """A run whose ranker has BM25's score, so large that nothing else can be heard, and behind it G0's."""
    words = ("ranker.bm25_prior=1e9", "ranker.prior=1e3", "ar2.teacher=always", "ar2.adversarial_weight=0")
    return runs.make("lexical", *words)


def test_bm25_has_a_say_in_the_rankers_score(lexical: Path) -> None:
    """D0 orders what G0 found by BM25's scores, and where these are equal by G0's."""
    words, found, ranked = (
        ranking_of(lexical / "results" / name) for name in ("dev-BM25.trec", "dev-G0-000.trec", "dev-D0-000.trec")
    )
    num_moved = 0
    for qid, own in ranked.items():
        by_words, by_g0 = dict(words[qid]), dict(found[qid])
        own_docids, g0_docids = ([docid for docid, _ in one[:10]] for one in (own, found[qid]))
        assert set(own_docids) == set(g0_docids)
        scores = [by_words[docid] for docid in own_docids if docid in by_words]
        assert scores == sorted(scores, reverse=True)
        silent = [docid for docid in own_docids if docid not in by_words]
        assert own_docids[len(scores) :] == silent, "what shares no word is below what shares one"
        assert [by_g0[docid] for docid in silent] == sorted((by_g0[docid] for docid in silent), reverse=True)
        num_moved += own_docids != g0_docids
    assert num_moved > 0


def test_texts_score_as_the_documents_of_the_corpus_do(lexical: Path, small_data: Path) -> None:
    """The whole score, BM25's and G0's part in it, of texts that are given as they stand."""
    dataset, models = open_dataset(small_data), TextModels(lexical)
    states = states_of(open_run(lexical), taken_of(open_run(lexical)))
    name = "D0" if states["ranker"].iteration == 0 else "D"
    ranked = ranking_of(lexical / "results" / f"dev-{name}-{states['ranker'].state}.trec")
    corpus = {document.id: document for document in dataset.documents()}
    texts = {query.id: query.text for query in sample_queries(dataset, "dev", None, 0)}
    for qid, own in list(ranked.items())[:3]:
        (scores,) = models.rerank([texts[qid]], [[corpus[docid] for docid, _ in own[:10]]])
        # G0's vectors of the corpus are kept in half precision.
        np.testing.assert_allclose(scores, [score for _, score in own[:10]], rtol=1e-3)


def test_an_export_says_what_its_score_lacks(lexical: Path) -> None:
    told = " ".join((lexical / "export" / "ranker" / "README.md").read_text().split())
    assert "logit + 1000 * inner product" in told
    assert "+ 1e+09 * BM25's score / " in told
    with pytest.raises(ModelError, match=r"1000 \* inner product .* and 1e\+09 \* BM25's score"):
        TextModels(lexical / "export" / "ranker").load()


def test_a_prior_without_g0_is_refused(zygote: Zygote, tmp_path: Path) -> None:
    ended = zygote.recipe(f"run.path={tmp_path}", "ranker.prior=1", config=TINY.with_name("r2anker_tiny.yaml")).wait()
    refused(ended, "ranker.prior is 1, but r2anker has no G0")
