"""Decoders as retrievers: causal attention in packed batches, the last token's state, prompts, and what is exported."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from engine.config.file import load_config
from engine.config.models import RetrieverConfig
from engine.data.batches import InputBuilder
from engine.data.corpus import model_texts
from engine.data.tokenization import ModelText, plan_corpus
from engine.errors import ArtifactError, ConfigError, ModelError
from engine.models.agreement import require_agreement
from engine.models.ending import with_end
from engine.models.export import export_retriever
from engine.models.kinds import load_untrained
from engine.models.loading import load_tokenizer, tokenizer_fingerprint
from engine.models.packed import packed_forward
from engine.models.prompts import ends_texts, prompts_of
from engine.models.retriever import Retriever, pool
from engine.models.template import Collator, Input, InputTemplate
from engine.models.texts import TextEncoder
from engine.models.trial import Proof, require_forward
from engine.models.weights import digest_of, weight_files, words_of
from engine.models.wording import Wording
from engine.pretrain.cloze import ClozeBuilder
from engine.retrievers.encoding import stamp_of_weights
from launcher.plan.models import shape_of
from shards.files import write_json
from shards.records import Query
from tests.distributed.tiny_architectures import make

TINY = Path(__file__).parents[4] / "configs" / "tiny.yaml"
QUERY_PROMPT = "Do: the query\nIt:"
PROMPTS = {"query": QUERY_PROMPT, "document": "the document: "}
LENGTHS = {"max_length": 37, "query_max_length": 34}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("decoders")
    return {name: make(name, base / name) for name in ("qwen3", "llama")}


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def folder(folders: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    return folders[request.param]


def load(folder: Path, **settings: Any) -> Retriever:
    return Retriever.load(str(folder), **{"pooling": "last", "similarity": "dot", "tied": True, **settings})


def rows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 200, (length,), generator=generator).tolist() for length in lengths]


def inputs_of(ids: list[list[int]]) -> list[Input]:
    return [Input(row, [0] * len(row)) for row in ids]


# --- packed batches --------------------------------------------------------------------------------------------------


def test_packed_texts_are_what_each_is_alone(folder: Path) -> None:
    """Symptom: a mask of all texts of a row, or none: a document saw its neighbours, or what lay behind a token."""
    model, ids = load(folder).double(), rows(5, 1, 20, 2, 5, 37)
    assert model.packs
    template = InputTemplate.from_tokenizer(load_tokenizer(str(folder), ends_texts=True))
    packed_ND = model.encode_documents(model.collator(template)(inputs_of(ids)))
    backbone = model.towers["shared"]
    alone_ND = torch.stack(
        [backbone(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0, -1] for row in ids]
    )
    torch.testing.assert_close(packed_ND, alone_ND, atol=1e-12, rtol=1e-12)
    padded_ND = model.encode_documents(template.pad(inputs_of(ids)))
    torch.testing.assert_close(padded_ND, alone_ND, atol=1e-12, rtol=1e-12)

    def gradient(embeddings_ND: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(embeddings_ND.square().sum(), backbone.layers[0].self_attn.k_proj.weight)
        return found

    torch.testing.assert_close(gradient(packed_ND), gradient(alone_ND), atol=1e-10, rtol=1e-10)


def test_a_token_of_a_packed_text_sees_only_what_lies_before_it_in_its_own(folder: Path) -> None:
    model, ids = load(folder).double(), rows(4, 6, 9)
    template = InputTemplate.from_tokenizer(load_tokenizer(str(folder), ends_texts=True))
    collate, backbone = model.collator(template), model.towers["shared"]

    def states(changed: list[list[int]]) -> Tensor:
        with torch.no_grad():
            return packed_forward(backbone, collate(inputs_of(changed)))[0][0]

    before_TH = states(ids)
    other = [list(row) for row in ids]
    other[1][3] = (other[1][3] + 7) % 200
    moved_T = (states(other) - before_TH).abs().amax(1)
    assert moved_T[:7].eq(0).all(), "the text before, and the tokens before"
    assert moved_T[7:10].gt(1e-3).all(), "the token itself, and those behind it"
    assert moved_T[10:].eq(0).all(), "the text behind"


def test_the_last_token_s_state_is_found_on_either_side_of_the_padding() -> None:
    states_NLH = torch.randn(3, 5, 4, dtype=torch.float64)
    right_NL = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    left_NL = right_NL.flip(1)
    assert torch.equal(pool(states_NLH, right_NL, "last"), states_NLH[[0, 1, 2], [2, 0, 4]])
    assert torch.equal(pool(states_NLH, left_NL, "last"), states_NLH[:, 4])
    states_NLH[0, 3:] = torch.nan
    assert pool(states_NLH, right_NL, "last").isfinite().all()


# --- the token at the end --------------------------------------------------------------------------------------------


def test_a_text_ends_with_the_end_of_text_token(folder: Path, tmp_path: Path) -> None:
    plain, ending = load_tokenizer(str(folder)), load_tokenizer(str(folder), ends_texts=True)
    end = plain.eos_token_id
    assert plain("a query")["input_ids"] == ending("a query")["input_ids"][:-1]
    assert ending("a query")["input_ids"][-1] == end
    first, second = ending("a query", "lists")["input_ids"], ending("lists")["input_ids"]
    assert [first.count(end), first[-1]] == [2 if folder.name == "qwen3" else 1, end], (
        "between the texts of a pair, too"
    )
    assert first[-len(second) :] == second
    shutil.copytree(folder, tmp_path / "copy")
    ending.save_pretrained(tmp_path / "copy")
    again = load_tokenizer(str(tmp_path / "copy"), ends_texts=True)
    assert again("a query")["input_ids"] == ending("a query")["input_ids"]
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(ending)


def test_a_pair_is_ended_like_a_text_where_a_tokenizer_ends_texts_alone(folders: dict[str, Path]) -> None:
    """Symptom: a decoder's tokenizer that ends a text, but puts nothing between two, had no form of a pair."""
    tokenizer = load_tokenizer(str(folders["qwen3"]))
    end = tokenizer.eos_token
    special = [(end, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {end}", f"$A $B {end}", special)
    ended = with_end(tokenizer, "the model", "ranker")
    assert ended("lists")["input_ids"] == tokenizer("lists")["input_ids"]
    pair = InputTemplate.from_tokenizer(ended).pair([7], [8], 9).ids
    assert pair == [7, tokenizer.eos_token_id, 8, tokenizer.eos_token_id]


def test_a_tokenizer_that_ends_texts_itself_is_left_alone(random_model: Path) -> None:
    own = load_tokenizer(str(random_model)), load_tokenizer(str(random_model), ends_texts=True)
    assert tokenizer_fingerprint(own[0]) == tokenizer_fingerprint(own[1])


@pytest.mark.parametrize("lacks", ["eos_token", "pad_token"])
def test_a_tokenizer_without_a_token_that_is_needed_is_refused(folder: Path, tmp_path: Path, lacks: str) -> None:
    tokenizer = load_tokenizer(str(folder))
    setattr(tokenizer, lacks, None)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    expected = {"eos_token": "no end-of-text token.*pooling", "pad_token": "no padding token.*pad_token_id"}
    with pytest.raises(ModelError, match=f"(?s){expected[lacks]}"):
        InputTemplate.from_tokenizer(load_tokenizer(str(tmp_path), ends_texts=True))


# --- prompts, and what others read -----------------------------------------------------------------------------------


def saved(folder: Path, target: Path, **settings: Any) -> Path:
    """Save a retriever as a run publishes it."""
    section = RetrieverConfig(name=str(folder), pooling="last", **LENGTHS, **settings)
    model = load(folder, prompts=prompts_of(section, folder))
    model.save(
        target,
        load_tokenizer(str(folder), ends_texts=ends_texts(section, folder)),
        metadata={"max_length": section.max_length, "query_max_length": section.query_max_length},
    )
    return target


def test_prompts_are_the_same_for_all_who_read(folder: Path, tmp_path: Path) -> None:
    """Symptom: a byte-pair tokenizer makes one token of a prompt's space and the text's first word."""
    weights = saved(folder, tmp_path / "weights", query_prompt=PROMPTS["query"], document_prompt=PROMPTS["document"])
    assert export_retriever(weights, tmp_path / "export") < 1e-5
    told = json.loads((tmp_path / "export" / "config_sentence_transformers.json").read_text())
    assert told["prompts"] == PROMPTS
    assert json.loads((tmp_path / "export" / "1_Pooling" / "config.json").read_text())["pooling_mode_lasttoken"]

    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(tmp_path / "export"), device="cpu", local_files_only=True)
    ours = TextEncoder.open(tmp_path / "export", torch.device("cpu"))
    texts = ["lists and tuples", "(what) is it?", "42"]
    for side, encode in (("query", theirs.encode_query), ("document", theirs.encode_document)):
        expected = torch.tensor(encode(texts))
        torch.testing.assert_close(torch.tensor(ours.encode(texts, side)), expected, atol=1e-5, rtol=1e-5)
    plain = load(folder).towers["shared"]
    tokenizer = load_tokenizer(str(folder))
    ids = [*tokenizer(QUERY_PROMPT + texts[0])["input_ids"], tokenizer.eos_token_id]
    state = plain(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    torch.testing.assert_close(torch.tensor(ours.encode(texts[:1], "query"))[0], state, atol=1e-5, rtol=1e-5)


def test_training_and_the_corpus_are_tokenised_behind_the_prompts(folders: dict[str, Path]) -> None:
    """Symptom: a model was trained on other tokens than it was searched with."""
    section = RetrieverConfig(
        name=str(folders["qwen3"]),
        pooling="last",
        query_prompt=PROMPTS["query"],
        document_prompt=PROMPTS["document"],
        **LENGTHS,
    )
    config: Any = load_config(TINY, ["run.path=x"])
    config = config.model_copy(update={"retriever": section})
    texts = model_texts(config, {"retriever": section.name})
    text, tokenizer = texts["retriever"], load_tokenizer(section.name)
    query, document = "what is it?", "a list"
    dataset: Any = SimpleNamespace(num_documents=1, fingerprint="f")
    (stored,) = plan_corpus(config, dataset, texts).tokenizations[0].tokenize([document])
    data: Any = SimpleNamespace(
        texts=texts,
        train=SimpleNamespace(tokens={text.stream: text.tokenize_queries([Query("1", query)])}),
        shards=SimpleNamespace(tokens=lambda *_: np.array(stored, dtype=np.uint32)),
    )
    collate = Collator(text.template, packs=False, first_position=0)
    build = InputBuilder(data, "retriever", collate, **LENGTHS)
    group: Any = SimpleNamespace(query=0, documents=np.array([0]))
    for side, batch, given in (
        ("query", build.queries([group]), query),
        ("document", build.documents([group]), document),
    ):
        ids = cast(Any, batch)["input_ids"][0, : int(cast(Any, batch)["attention_mask"].sum())].tolist()
        assert ids == [*tokenizer(PROMPTS[side] + given)["input_ids"], tokenizer.eos_token_id]


def test_parts_of_documents_are_not_read_behind_a_prompt_that_texts_grow_together_with() -> None:
    collate: Any = SimpleNamespace(template=SimpleNamespace(queries=Wording(" "), documents=Wording()))
    data: Any = SimpleNamespace(texts={"retriever": None})
    with pytest.raises(ModelError, match=r"parts are drawn.*set retriever\.query_prompt"):
        ClozeBuilder.of(data, "retriever", collate, cast(Any, None), lengths=(8, 8), seed=0)


def test_an_export_is_a_start_whose_prompts_a_recipe_may_change(folders: dict[str, Path], tmp_path: Path) -> None:
    source = saved(folders["qwen3"], tmp_path / "weights", query_prompt=QUERY_PROMPT)
    export_retriever(source, tmp_path / "export")
    (tmp_path / "export" / "sparring.json").unlink()
    found = str(tmp_path / "export")
    section = RetrieverConfig(name=found, pooling="last", **LENGTHS)
    assert prompts_of(section, found) == {"query": QUERY_PROMPT}
    assert not ends_texts(section, found)
    told = [note.text for note in require_agreement(section, found, "retriever") if "prompt" in note.text]
    assert told == [f"query texts get the prompt {QUERY_PROMPT!r} of {found}"]
    section = RetrieverConfig(name=found, pooling="last", query_prompt="", document_prompt="d: ", **LENGTHS)
    assert prompts_of(section, found) == {"document": "d: "}
    notes = [note for note in require_agreement(section, found, "retriever") if "prompt" in note.text]
    assert [note.warns for note in notes] == [True, True]
    with pytest.raises(ModelError, match=r"pools by last, retriever\.pooling is mean"):
        require_agreement(RetrieverConfig(name=found, pooling="mean", **LENGTHS), found, "retriever")


def test_another_prompt_is_another_identity(folders: dict[str, Path], tmp_path: Path) -> None:
    """Symptom: vectors of documents behind one prompt were taken for those behind another."""
    digests, texts = [], []
    tokenizer = load_tokenizer(str(folders["qwen3"]))
    for number, prompt in enumerate(["", "a: ", "b: "]):
        weights = saved(folders["qwen3"], tmp_path / str(number), document_prompt=prompt)
        digests.append(digest_of(weight_files(weights), words_of(weights)))
        template = InputTemplate.from_tokenizer(tokenizer, {"document": prompt} if prompt else None)
        texts.append(ModelText(tokenizer, template, "retriever", 8, {"document": prompt} if prompt else {}))
    assert len(set(digests)) == 3
    assert digests[0] == digest_of(weight_files(tmp_path / "0"))
    assert texts[0].fingerprint == tokenizer_fingerprint(tokenizer)
    assert texts[0].fingerprint != texts[1].fingerprint, "the space goes with the text"
    folder = tmp_path / "1"
    write_json(folder / "weights.json", {"sha256": digests[1], "files": weight_files(folder)})
    run: Any = SimpleNamespace(
        folder=SimpleNamespace(weights=lambda *_: folder), timetable=SimpleNamespace(artifact=lambda _: "001")
    )
    choice: Any = SimpleNamespace(trained=SimpleNamespace(model="retriever", state="001"))
    shards = SimpleNamespace(manifest=SimpleNamespace(sha256="c"))

    def data(text: ModelText) -> Any:
        return SimpleNamespace(texts={"retriever": text}, shards=shards)

    assert stamp_of_weights(run, data(texts[1]), choice).weights_sha256 == digests[1]
    with pytest.raises(ArtifactError, match=r"published with the prompts \{'document': 'a: '\}, texts now get .*'b: '"):
        stamp_of_weights(run, data(texts[2]), choice)


@pytest.mark.parametrize("side", ["query", "document"])
def test_a_prompt_that_leaves_no_room_is_refused(folder: Path, side: str) -> None:
    prompt = "the retriever embeds a query and " * 9
    section = RetrieverConfig(name=str(folder), pooling="last", **LENGTHS, **cast(Any, {f"{side}_prompt": prompt}))
    tokenizer = load_tokenizer(str(folder), ends_texts=True)
    template = InputTemplate.from_tokenizer(tokenizer, prompts_of(section, folder))
    proof = Proof("retriever", section, section.query_max_length, tokenizer, template, torch.device("cpu"))
    with pytest.raises(ConfigError, match=f"take .* tokens, retriever.*max_length is 3.*retriever.{side}_prompt"):
        require_forward(load(folder, prompts=prompts_of(section, folder)), proof)


# --- adapters --------------------------------------------------------------------------------------------------------


def test_adapters_for_layers_that_there_are_not_are_refused(folder: Path) -> None:
    section = RetrieverConfig(name=str(folder), pooling="last", lora={"target_modules": ("q_proj", "query")}, **LENGTHS)
    with pytest.raises(ModelError, match=r"target_modules has query, which match no linear layer .*some of down_proj"):
        load_untrained(section, section.name, seed=0)


def test_adapters_without_their_library_are_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    section = RetrieverConfig(name=str(folders["qwen3"]), pooling="last", lora={}, **LENGTHS)
    with pytest.raises(ConfigError, match=r"retriever\.lora asks for adapters.*\[lora\]"):
        load_untrained(section, section.name, seed=0)


def test_adapters_beside_chosen_layers_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"lora goes with layers \[0, 3\].*num_layers"):
        RetrieverConfig(name="x", layers=(0, 3), lora={})


def test_a_plan_counts_what_is_trained_and_what_is_frozen(folders: dict[str, Path]) -> None:
    section = RetrieverConfig(name=str(folders["qwen3"]), pooling="last", lora={"r": 3}, **LENGTHS)
    model = load_untrained(section, section.name, seed=0)
    counts = [
        sum(one.numel() for one in model.parameters() if one.requires_grad is trained) for trained in (True, False)
    ]
    config: Any = SimpleNamespace(models={"retriever": section})
    shape = shape_of(config, "retriever")
    assert [shape.parameters, shape.frozen] == counts
    assert shape.weights == sum(counts)
