"""A sentence-transformers folder as a retriever's start: what it computes is what the library computes."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor
from transformers import BertTokenizer

from engine.config.models import RankerConfig, RetrieverConfig
from engine.errors import ModelError
from engine.models.agreement import require_agreement
from engine.models.encode import encode_queries
from engine.models.export import export_retriever
from engine.models.kinds import load_untrained
from engine.models.loading import load_tokenizer, tokenizer_fingerprint
from engine.models.prompts import prompts_of
from engine.models.retriever import Retriever
from engine.models.source import local_source
from engine.models.template import InputTemplate

library = pytest.importorskip("sentence_transformers")
TANH, IDENTITY = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"
TEXTS = [
    "What is a container?",
    "Lists, TUPLES and dictionaries are containers.",
    "Negatives are drawn from the hundred documents that the retriever likes best. " * 3,
    "x",
]
LENGTHS = {"max_length": 24, "query_max_length": 24}
FULL: dict[str, Any] = {
    "pooling": "mean",
    "normalize": True,
    "dense": ((16, TANH), (8, IDENTITY)),
    "prompts": {"query": "ask the ranker: ", "document": "a document "},
}


def section_of(name: str | Path, **settings: Any) -> RetrieverConfig:
    return RetrieverConfig(name=str(name), **{"pooling": "mean", **LENGTHS, **settings})


def start(section: RetrieverConfig) -> Retriever:
    """Load a retriever as a run does."""
    require_agreement(section, section.name, "retriever")
    model = load_untrained(section, section.name, seed=0)
    assert isinstance(model, Retriever)
    return model


def ours(model: Retriever, section: RetrieverConfig, name: str | Path) -> tuple[Tensor, Tensor]:
    """Embed the texts as queries and as documents: in padded batches and, which must be the same, as a pass does."""
    tokenizer = load_tokenizer(str(name))
    template = InputTemplate.from_tokenizer(tokenizer, prompts_of(section, name))
    ids = tokenizer(TEXTS, add_special_tokens=False, truncation=False)["input_ids"]
    found = []
    for side, encode, encoder in (
        (template.for_queries(), model.encode_queries, model.query_encoder()),
        (template.for_documents(), model.encode_documents, model.document_encoder()),
    ):
        with torch.inference_mode():
            padded = encode(side.pad([side.single(row, 24) for row in ids]))
        options: dict[str, Any] = {"max_length": 24, "tokens_per_batch": 64, "device": torch.device("cpu")}
        torch.testing.assert_close(torch.from_numpy(encode_queries(encoder, side, ids, **options)), padded)
        found.append(padded)
    return found[0], found[1]


def theirs(folder: Path) -> tuple[Tensor, Tensor]:
    model = library.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    options: dict[str, Any] = {"convert_to_tensor": True, "show_progress_bar": False}
    return model.encode_query(TEXTS, **options), model.encode_document(TEXTS, **options)


def assert_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.clone(), atol=tolerance, rtol=tolerance)
    assert float((found[0][0] - found[0][1]).abs().max()) > 1e-3, "all texts have one embedding"


def train(model: Retriever, section: RetrieverConfig) -> None:
    """Take two steps of all weights."""
    tokenizer = load_tokenizer(section.name)
    template = InputTemplate.from_tokenizer(tokenizer, prompts_of(section, section.name))
    ids = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    for _ in range(2):
        sides = [
            model.collator(template)([side.single(row, 24) for row in ids])
            for side in (template.for_queries(), template.for_documents())
        ]
        queries, documents = model(*sides)
        torch.nn.functional.cross_entropy(queries @ documents.T, torch.arange(len(TEXTS))).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


LAYOUTS = [
    {"pooling": pooling, "normalize": normalize, "dense": dense, "prompts": prompts, "version": 2 if old else 6}
    for number, (pooling, normalize, dense, prompts) in enumerate(
        itertools.product(("cls", "mean"), (False, True), ((), ((16, TANH),), FULL["dense"]), ({}, FULL["prompts"]))
    )
    for old in (number % 2 == number // 4 % 2,)
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout.values())))
def test_a_retriever_starts_from_what_the_library_computes(
    tmp_path: Path, made_folder: Callable[..., Path], layout: dict[str, Any]
) -> None:
    """A folder's Dense layer and prompts were dropped without a word, and an embedding had another length."""
    folder = made_folder(tmp_path / "start", **layout)
    section = section_of(folder, pooling=layout["pooling"], similarity="cosine" if layout["normalize"] else "dot")
    model = start(section)
    assert model.dimension == (layout["dense"][-1][0] if layout["dense"] else 32)
    assert_equal(ours(model, section, folder), theirs(folder))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", [{"pooling": "cls"}, FULL], ids=["plain", "full"])
def test_what_was_trained_is_what_others_load_and_what_goes_on(
    tmp_path: Path, made_folder: Callable[..., Path], layout: dict[str, Any], tied: bool
) -> None:
    folder = made_folder(tmp_path / "start", **layout)
    similarity = "cosine" if layout.get("normalize") else "dot"
    section = section_of(folder, pooling=layout["pooling"], similarity=similarity, tied=tied)
    model = start(section)
    before = ours(model, section, folder)
    train(model, section)
    after = ours(model, section, folder)
    assert float((after[0] - before[0]).abs().max()) > 1e-3
    for name, parameter in model.projections.named_parameters():
        assert parameter.grad is None or not torch.equal(parameter, start(section).projections.get_parameter(name))
    saved, exported = tmp_path / "saved", tmp_path / "exported"
    model.save(saved, load_tokenizer(str(folder)), metadata=LENGTHS)
    export_retriever(saved, exported)
    assert_equal(theirs(exported), after, 1e-4)
    for name in (saved, exported):
        again = section_of(name, pooling=layout["pooling"], similarity=similarity, tied=tied)
        assert_equal(ours(start(again), again, name), after)
    # What the library makes of the export knows nothing of us, and goes on too.
    resaved = tmp_path / "resaved"
    library.SentenceTransformer(str(exported), device="cpu").save_pretrained(str(resaved))
    again = section_of(resaved, pooling=layout["pooling"], similarity=similarity, tied=tied)
    assert_equal(ours(start(again), again, resaved), after)


def test_real_weights_start_as_the_library_has_them(minilm: str) -> None:
    section = section_of(minilm, similarity="cosine")
    folder = local_source(minilm)
    assert isinstance(folder, Path)
    model = library.SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = 24
    expected = model.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
    assert_equal(ours(start(section), section, minilm), (expected, expected))


def test_the_transformer_may_lie_in_a_folder_of_its_own(tmp_path: Path, made_folder: Callable[..., Path]) -> None:
    """Folders of older versions, whose transformer lies in 0_Transformer, had no config.json and were refused."""
    folder = made_folder(tmp_path / "start", transformer="0_Transformer", version=2)
    section = section_of(folder)
    assert_equal(ours(start(section), section, folder), theirs(folder))


def test_texts_are_made_lower_case_where_the_folder_says_so(
    tmp_path: Path, made_folder: Callable[..., Path], random_model: Path
) -> None:
    """do_lower_case was not read, so that a word with a capital was unknown to the model."""
    folder = made_folder(tmp_path / "start", lower_case=True)
    cased = BertTokenizer(vocab=load_tokenizer(str(random_model)).get_vocab(), do_lower_case=False)
    cased.save_pretrained(folder)
    section = section_of(folder)
    model = start(section)
    found = ours(model, section, folder)
    assert_equal(found, theirs(folder))
    edit(folder / "sentence_bert_config.json", do_lower_case=False)
    assert float((ours(model, section, folder)[0] - found[0]).abs().max()) > 1e-3
    edit(folder / "sentence_bert_config.json", do_lower_case=True)
    tokenizer = load_tokenizer(str(folder))
    model.save(tmp_path / "saved", tokenizer, metadata=LENGTHS)
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path / "saved"))) == tokenizer_fingerprint(tokenizer)
    export_retriever(tmp_path / "saved", tmp_path / "exported")
    assert_equal(theirs(tmp_path / "exported"), found)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- two towers ------------------------------------------------------------------------------------------------------


def routed(folder: Path, base: Path, *, dense: bool = True) -> Path:
    """Save a Router of two unlike towers as the library does."""
    from sentence_transformers.models import Dense, Normalize, Pooling, Router, Transformer

    torch.manual_seed(5)
    towers = []
    for _ in range(2):
        transformer = Transformer(str(base), max_seq_length=24)
        torch.nn.init.normal_(transformer.auto_model.encoder.layer[0].output.dense.weight, std=0.1)
        towers.append([transformer, Pooling(32, "cls"), *([Dense(32, 12)] if dense else [])])
    router = Router.for_query_document(query_modules=towers[0], document_modules=towers[1])
    library.SentenceTransformer(modules=[router, Normalize()], device="cpu").save_pretrained(str(folder))
    return folder


def test_a_router_is_read_as_two_towers(tmp_path: Path, random_model: Path) -> None:
    folder = routed(tmp_path / "start", random_model)
    section = section_of(folder, pooling="cls", similarity="cosine", tied=False)
    model = start(section)
    assert_equal(ours(model, section, folder), theirs(folder))
    train(model, section)
    after = ours(model, section, folder)
    model.save(tmp_path / "saved", load_tokenizer(str(folder)), metadata=LENGTHS)
    export_retriever(tmp_path / "saved", tmp_path / "exported")
    assert_equal(theirs(tmp_path / "exported"), after, 1e-4)


def test_one_tower_is_not_made_of_two(tmp_path: Path, random_model: Path) -> None:
    folder = routed(tmp_path / "start", random_model)
    with pytest.raises(ModelError, match=r"one tower for queries and another.*set retriever\.tied=false"):
        start(section_of(folder, pooling="cls", similarity="cosine"))


def test_layers_that_differ_by_side_above_one_transformer_are_kept(tmp_path: Path, random_model: Path) -> None:
    """Of an Asym (as Router was called) one route's layers, or none, would have been taken for both sides."""
    from sentence_transformers.models import Dense, Pooling, Router, Transformer

    torch.manual_seed(6)
    router = Router.for_query_document(query_modules=[Dense(32, 12)], document_modules=[Dense(32, 12)])
    modules = [Transformer(str(random_model), max_seq_length=24), Pooling(32, "mean"), router]
    folder = tmp_path / "start"
    library.SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder))
    section = section_of(folder, tied=False)
    assert_equal(ours(start(section), section, folder), theirs(folder))
    place = next(folder.glob("2_*"))
    (place / "router_config.json").rename(place / "config.json")  # where Asym had it
    assert_equal(ours(start(section), section, folder), theirs(folder))


def test_towers_with_unlike_tokenizers_are_refused(tmp_path: Path, random_model: Path) -> None:
    folder = routed(tmp_path / "start", random_model)
    vocabulary = load_tokenizer(str(random_model)).get_vocab()
    BertTokenizer(vocab=vocabulary, do_lower_case=False).save_pretrained(folder / "query_0_Transformer")
    with pytest.raises(ModelError, match="different tokenizers"):
        load_tokenizer(str(folder))


# --- the hub ---------------------------------------------------------------------------------------------------------


def cached(folder: Path, cache: Path, name: str) -> Path:
    """Lay a folder out as the hub's cache does."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    return Path(shutil.copytree(folder, place / "snapshots" / ("a" * 40)))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the hub's client to an empty cache, and take its network away."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.mark.parametrize("two_towers", [False, True])
def test_a_model_of_the_hub_starts_as_its_folder_does(
    tmp_path: Path, made_folder: Callable[..., Path], random_model: Path, cache: Path, two_towers: bool
) -> None:
    name = f"someone/model-{two_towers}"
    if two_towers:
        folder = routed(tmp_path / "start", random_model)
        section = section_of(name, pooling="cls", similarity="cosine", tied=False)
    else:
        folder = made_folder(tmp_path / "start", **FULL)
        section = section_of(name, similarity="cosine")
    cached(folder, cache, name)
    assert_equal(ours(start(section), section, name), theirs(folder))
    with pytest.raises(ModelError, match=f"{name} pools by"):
        start(section.model_copy(update={"pooling": "mean" if two_towers else "cls"}))


def test_a_plain_checkpoint_of_the_hub_is_read_as_it_is(random_model: Path, cache: Path) -> None:
    cached(random_model, cache, "someone/plain")
    assert local_source("someone/plain") == "someone/plain"
    assert start(section_of("someone/plain", pooling="cls")).dimension == 32


def test_a_cross_encoder_of_the_hub_is_compared_like_a_folder(tmp_path: Path, random_model: Path, cache: Path) -> None:
    """Up to version 5 a CrossEncoder has no modules.json, and its activation stands in its config.json."""
    folder = Path(shutil.copytree(random_model, tmp_path / "start"))
    edit(folder / "config.json", sbert_ce_default_activation_function="torch.nn.modules.activation.ReLU")
    cached(folder, cache, "someone/cross")
    section = RankerConfig(name="someone/cross", max_length=24)
    with pytest.raises(ModelError, match=r"scores by torch.nn.modules.activation.ReLU"):
        require_agreement(section, "someone/cross", "ranker")


def test_a_part_of_a_model_of_the_hub_is_no_plain_checkpoint(
    tmp_path: Path, made_folder: Callable[..., Path], cache: Path
) -> None:
    """Where transformers alone had filled the cache, a model's Dense layer would be dropped once more."""
    snapshot = cached(made_folder(tmp_path / "start", **FULL), cache, "someone/half")
    (snapshot / "modules.json").unlink()
    with pytest.raises(ModelError, match=r"modules\.json is not.*hf download someone/half"):
        start(section_of("someone/half", similarity="cosine"))
