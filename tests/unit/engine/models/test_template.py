from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import BertTokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from engine.errors import ModelError
from engine.models.loading import load_tokenizer
from engine.models.template import InputTemplate
from engine.models.wording import Wording

LONG = "containers hold documents that the retriever likes best, " * 12
PAIRS = [("what is a container?", LONG), ("the query", "the document"), ("the ranker reads", "lists"), ("a", LONG[:70])]


def bare(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def roberta() -> RobertaTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters])}
    return RobertaTokenizer(vocab=vocab, merges=[])


@pytest.fixture(params=["random", "minilm", "roberta"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "roberta":
        return roberta()
    if request.param == "minilm":
        return load_tokenizer(request.getfixturevalue("minilm"))
    return load_tokenizer(str(request.getfixturevalue("random_model")))


@pytest.mark.parametrize("max_length", [16, 33, 512])
def test_pairs_equal_the_tokenizer_s_own(tokenizer: Any, max_length: int) -> None:
    pairs = [pair for pair in PAIRS if len(bare(tokenizer, pair[0])) + 5 <= max_length]
    assert pairs
    template = InputTemplate.from_tokenizer(tokenizer)
    queries, documents = [a for a, _ in pairs], [b for _, b in pairs]
    expected = tokenizer(
        queries, documents, truncation="only_second", max_length=max_length, padding=True, return_tensors="pt"
    )
    built = template.pad(
        [template.pair(bare(tokenizer, a), bare(tokenizer, b), max_length) for a, b in pairs], pad_to_multiple_of=1
    )
    assert built.keys() == set(expected.keys())
    for name, tensor in built.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("form", ["list", "array"])
@pytest.mark.parametrize("max_length", [8, 512])
def test_singles_equal_the_tokenizer_s_own(tokenizer: Any, max_length: int, form: str) -> None:
    template = InputTemplate.from_tokenizer(tokenizer)
    texts = ["", "a query", LONG]
    expected = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    ids = [bare(tokenizer, text) for text in texts]
    given = [np.array(one, dtype=np.uint32) for one in ids] if form == "array" else ids
    built = template.pad([template.single(one, max_length) for one in given], pad_to_multiple_of=1)
    assert built.keys() == set(expected.keys())
    for name, tensor in built.items():
        assert torch.equal(tensor, expected[name]), name


def test_roberta_has_two_tokens_between_the_texts_and_no_segments() -> None:
    tokenizer = roberta()
    template = InputTemplate.from_tokenizer(tokenizer)
    assert not template.has_type_ids
    assert template.num_special_pair == 4
    assert template.pair([9], [10], 16).ids == [0, 9, 2, 2, 10, 2]
    assert set(template.pad([template.single([9], 8)])) == {"input_ids", "attention_mask"}


@pytest.fixture
def template(random_model: Any) -> InputTemplate:
    return InputTemplate.from_tokenizer(load_tokenizer(str(random_model)))


def test_a_document_keeps_a_token_beside_a_query_that_fills_the_input(template: InputTemplate) -> None:
    item = template.pair(list(range(100, 150)), [7, 8, 9], 16)
    assert len(item.ids) == 16
    assert item.ids[-2] == 7
    assert item.type_ids == [0] * 14 + [1] * 2


def test_a_query_alone_may_fill_the_room_of_an_empty_document(template: InputTemplate) -> None:
    item = template.pair(list(range(100, 150)), [], 16)
    assert item.ids[1:14] == list(range(100, 113))


def test_padding_is_rounded_up_and_masked(template: InputTemplate) -> None:
    batch = template.pad([template.single([5] * 7, 32), template.single([5], 32)])
    assert batch["input_ids"].shape == (2, 16)
    assert batch["attention_mask"].sum(1).tolist() == [9, 3]
    assert batch["input_ids"][1, 3:].eq(template.pad_id).all()
    assert all(tensor.dtype == torch.long for tensor in batch.values())


@pytest.mark.parametrize("texts", [1, 2])
def test_a_length_without_room_for_a_token_is_refused(template: InputTemplate, texts: int) -> None:
    build = (lambda n: template.single([5], n)) if texts == 1 else (lambda n: template.pair([5], [6], n))
    special = template.num_special_single if texts == 1 else template.num_special_pair
    assert len(build(special + texts).ids) == special + texts
    with pytest.raises(ModelError, match=f"at least {special + texts}"):
        build(special + texts - 1)


def test_a_tokenizer_without_padding_is_refused() -> None:
    tokenizer = BertTokenizer(vocab={"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4, "[PAD]": 5, "[MASK]": 6})
    tokenizer.pad_token = None
    with pytest.raises(ModelError, match="no padding token"):
        InputTemplate.from_tokenizer(tokenizer)


def test_a_tokenizer_that_joins_texts_without_a_token_has_no_form_of_a_pair() -> None:
    backend = Tokenizer(BPE(vocab={"a": 0, "b": 1, " ": 2, "<s>": 3, "<pad>": 4}, merges=[]))
    backend.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>")
    template = InputTemplate.from_tokenizer(tokenizer)
    assert template.single([0, 1], 8).ids == [3, 0, 1]
    with pytest.raises(ModelError, match=r"no token between the two texts.*pair_template"):
        template.pair([0], [1], 8)


# --- prompts ---------------------------------------------------------------------------------------------------------

PROMPTS = {"query": "ask the ranker: ", "document": "a document "}


@pytest.mark.parametrize("max_length", [24, 512])
def test_texts_behind_a_prompt_equal_the_tokenizer_s_own(tokenizer: Any, max_length: int) -> None:
    template = InputTemplate.from_tokenizer(tokenizer, PROMPTS)
    for side, form in (("query", template.for_queries()), ("document", template.for_documents())):
        for text in ("what is a container?", "Negatives are drawn from the hundred documents. " * 20, ""):
            whole = tokenizer(PROMPTS[side] + text, truncation=True, max_length=max_length)["input_ids"]
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert list(form.single(ids, max_length).ids) == whole
        assert form.num_special_single > template.num_special_single
    pair = template.pair([7], [8], max_length)
    assert list(pair.ids) == list(InputTemplate.from_tokenizer(tokenizer).pair([7], [8], max_length).ids)


def test_without_a_prompt_the_form_of_a_side_is_the_plain_one(tokenizer: Any) -> None:
    template = InputTemplate.from_tokenizer(tokenizer, {"query": PROMPTS["query"]})
    assert template.for_documents() == InputTemplate.from_tokenizer(tokenizer) == template.for_documents().for_queries()


def test_a_text_that_grows_together_with_its_prompt_is_tokenised_behind_it() -> None:
    """A byte-pair tokenizer makes one token of the prompt's last letter and the text's first."""
    backend = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate([*map(chr, range(32, 127)), "ow", "<p>"])},
                            merges=[("o", "w")]))  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<p>")
    template = InputTemplate.from_tokenizer(tokenizer, {"query": "do o"})
    assert template.queries == Wording(lead="o")
    (ids,) = template.queries.token_ids(tokenizer, ["what"])
    assert list(template.for_queries().single(ids, 32).ids) == bare(tokenizer, "do owhat")
    assert not template.documents
