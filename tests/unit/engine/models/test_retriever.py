from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import ModelError
from engine.models.loading import load_tokenizer
from engine.models.ranker import Ranker
from engine.models.retriever import Retriever, pool
from engine.models.source import resolve_model
from engine.models.template import InputTemplate

REAL = (
    "What is the capital of France?",
    "Paris is the capital and most populous city of France, with an estimated population of 2,102,650 in 2023.",
    "A tuple is an immutable sequence; a list is not.",
    "naïve café",
)


class Reader:
    """A tokenizer with its template."""

    def __init__(self, name: str) -> None:
        self.tokenizer: Any = load_tokenizer(name)
        self.template = InputTemplate.from_tokenizer(self.tokenizer)

    def __call__(self, *texts: str, max_length: int = 64) -> dict[str, Tensor]:
        ids = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return self.template.pad([self.template.single(row, max_length) for row in ids])


@pytest.fixture(scope="module")
def read(random_model: Path) -> Reader:
    return Reader(str(random_model))


def load(name: Path | str, **options: Any) -> Retriever:
    return Retriever.load(str(name), **{"pooling": "cls", "similarity": "dot", "tied": True, **options})


def test_mean_cosine_equals_sentence_transformers_on_real_text(minilm: str) -> None:
    library = pytest.importorskip("sentence_transformers")
    retriever = load(minilm, pooling="mean", similarity="cosine")
    with torch.inference_mode():
        ours_ND = retriever.encode_documents(Reader(minilm)(*REAL))
    # That package lists 2_Normalize in modules.json.
    model = library.SentenceTransformer(str(resolve_model(minilm)), device="cpu")
    theirs_ND = model.encode(list(REAL), convert_to_tensor=True, show_progress_bar=False)
    assert ours_ND.shape == (4, 384)
    assert torch.allclose(ours_ND, theirs_ND, atol=1e-5)
    assert (ours_ND @ ours_ND[0]).argsort(descending=True)[:2].tolist() == [0, 1]


def test_the_score_is_the_inner_product_of_eq_4(random_model: Path, read: Reader) -> None:
    retriever = load(random_model)
    with torch.inference_mode():
        query_BD, documents_ND = retriever(queries=read("what is a container?"), documents=read("lists", "tuples"))
    scores_BN = query_BD @ documents_ND.T
    by_hand = [sum(float(q) * float(d) for q, d in zip(query_BD[0], row, strict=True)) for row in documents_ND]
    assert scores_BN.tolist()[0] == pytest.approx(by_hand, rel=1e-5)
    assert retriever.dimension == 32
    assert retriever.longest_input == 512


def test_either_side_may_be_left_out(random_model: Path, read: Reader) -> None:
    retriever = load(random_model)
    batch = read("lists", "tuples")
    queries_BD, nothing = retriever(queries=batch)
    assert nothing is None
    nothing, documents_ND = retriever(documents=batch)
    assert nothing is None
    assert torch.equal(queries_BD, documents_ND)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_padding_changes_no_embedding(random_model: Path, read: Reader, pooling: str, similarity: str) -> None:
    retriever = load(random_model, pooling=pooling, similarity=similarity)
    alone_ND = retriever.encode_documents(read("a document"))
    padded_ND = retriever.encode_documents(read("a document", "the retriever likes containers " * 10))
    assert padded_ND.shape == (2, 32)
    assert torch.allclose(alone_ND[0], padded_ND[0], atol=1e-5)
    assert not torch.allclose(padded_ND[0], padded_ND[1], atol=1e-2)
    assert alone_ND.norm(dim=-1).allclose(torch.ones(1)) == (similarity == "cosine")


def test_pooling_by_hand() -> None:
    """Masking by multiplication would carry a NaN of a padded position into the mean."""
    hidden_NLH = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [math.nan, math.inf]]])
    mask_NL = torch.tensor([[1, 1, 0]])
    assert pool(hidden_NLH, mask_NL, "mean").tolist() == [[2.0, 4.0]]
    assert pool(hidden_NLH, mask_NL, "cls").tolist() == [[1.0, 2.0]]
    halves = pool(torch.full((1, 3000, 1), 60.0, dtype=torch.float16), torch.ones(1, 3000, dtype=torch.long), "mean")
    assert halves.dtype == torch.float32
    assert halves.item() == pytest.approx(60.0)


def test_a_cast_model_still_gives_float32(random_model: Path, read: Reader) -> None:
    batch = read("a document", "lists")
    retriever = load(random_model, pooling="mean", similarity="cosine")
    whole_ND = retriever.encode_documents(batch)
    half_ND = retriever.to(torch.bfloat16).encode_documents(batch)
    assert half_ND.dtype == torch.float32
    assert torch.allclose(half_ND.norm(dim=-1), torch.ones(2), atol=1e-6)
    assert torch.allclose(half_ND, whole_ND, atol=0.1)


def test_untied_towers_start_equal_and_learn_apart(random_model: Path, read: Reader) -> None:
    tied, untied = load(random_model), load(random_model, tied=False)
    assert tied.tied
    assert not untied.tied
    count = sum(parameter.numel() for parameter in tied.parameters())
    assert sum(parameter.numel() for parameter in untied.parameters()) == 2 * count
    batch = read("a document")
    assert torch.equal(untied.encode_queries(batch), untied.encode_documents(batch))
    untied.encode_queries(batch).sum().backward()
    assert all(p.grad is None for p in untied.towers["document"].parameters())
    with torch.no_grad():
        for parameter in untied.towers["query"].parameters():
            parameter -= 0.1 * parameter.grad if parameter.grad is not None else 0
    assert not torch.allclose(untied.encode_queries(batch), untied.encode_documents(batch), atol=1e-3)
    assert torch.equal(untied.encode_documents(batch), tied.encode_documents(batch))


def test_every_parameter_gets_a_gradient(random_model: Path, read: Reader) -> None:
    """An unused pooler would not, and sharded optimizers handle that badly."""
    retriever = load(random_model)
    queries_BD, documents_ND = retriever(queries=read("lists"), documents=read("tuples", "a"))
    (queries_BD @ documents_ND.T).sum().backward()
    assert [name for name, parameter in retriever.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("tied", [True, False])
def test_checkpointed_activations_give_the_same_gradients(random_model: Path, read: Reader, tied: bool) -> None:
    """One encoder runs twice before the backward pass, which reentrant checkpointing cannot do."""
    gradients = []
    for checkpointing in (False, True):
        retriever = load(random_model, tied=tied, dropout=0.0, gradient_checkpointing=checkpointing).train()
        queries_BD, documents_ND = retriever(queries=read("lists"), documents=read("tuples", "a query"))
        (queries_BD @ documents_ND.T).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in retriever.named_parameters()})
        backbone = next(iter(retriever.towers.values()))
        assert backbone.is_activation_checkpointing == checkpointing
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name
    function = backbone.encoder.layer[0]._gradient_checkpointing_func
    assert function.keywords == {"use_reentrant": False}


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_retriever_comes_back(random_model: Path, read: Reader, tmp_path: Path, tied: bool) -> None:
    retriever = load(random_model, tied=tied, pooling="mean", similarity="cosine", num_layers=1)
    for number, tower in enumerate(retriever.towers.values()):
        torch.nn.init.normal_(tower.embeddings.LayerNorm.weight, generator=torch.Generator().manual_seed(number))
    gathered = {name: value.clone() for name, value in retriever.state_dict().items()}
    gathered |= {name: value.clone() for name, value in retriever.named_buffers()}
    emptied = copy.deepcopy(retriever)
    with torch.no_grad():
        for parameter in emptied.parameters():
            parameter.zero_()
    emptied.save(tmp_path, read.tokenizer, state_dict=gathered, metadata={"max_length": 64, "tied": "wrong"})
    again = Retriever.open(tmp_path)
    assert (again.tied, again.pooling, again.similarity) == (tied, "mean", "cosine")
    batch = read("what is a container?", "lists")
    for ours, theirs in zip(retriever(batch, batch), again(batch, batch), strict=True):
        assert torch.equal(ours, theirs)
    assert Reader(str(tmp_path))("lists").keys() == batch.keys()


def test_a_gathered_state_that_lacks_a_tower_is_refused(random_model: Path, read: Reader, tmp_path: Path) -> None:
    retriever = load(random_model, tied=False)
    half = {name: value for name, value in retriever.state_dict().items() if name.startswith("towers.query")}
    with pytest.raises(ModelError, match="are not given"):
        retriever.save(tmp_path, read.tokenizer, state_dict=half)


def test_one_tower_becomes_two_but_two_never_one(random_model: Path, read: Reader, tmp_path: Path) -> None:
    load(random_model).save(tmp_path / "one", read.tokenizer)
    assert not load(tmp_path / "one", tied=False).tied
    load(random_model, tied=False).save(tmp_path / "two", read.tokenizer)
    with pytest.raises(ModelError, match="two towers"):
        load(tmp_path / "two", tied=True)
    (tmp_path / "two" / "document" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="document has no weights"):
        load(tmp_path / "two", tied=False)


def test_a_ranker_is_not_opened_as_a_retriever(random_model: Path, read: Reader, tmp_path: Path) -> None:
    Ranker.load(str(random_model)).save(tmp_path, read.tokenizer)
    with pytest.raises(ModelError, match="holds a ranker"):
        Retriever.open(tmp_path)
