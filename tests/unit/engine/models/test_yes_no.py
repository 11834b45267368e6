"""A ranker that asks a language model: the words of a pair, the two answers, and the score of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.config.file import load_config
from engine.config.models import RankerConfig
from engine.errors import ConfigError, ModelError
from engine.models.agreement import require_agreement
from engine.models.export import export_ranker
from engine.models.loading import load_tokenizer
from engine.models.ranker import Ranker
from engine.models.template import InputTemplate
from engine.models.texts import TextRanker
from shards.records import Document
from tests.distributed.tiny_architectures import ARCHITECTURES, make

TINY = Path(__file__).parents[4] / "configs" / "tiny.yaml"
WORDS = "<|im_start|>Judge.\n<Query>: {query}\n<Document>: {document}<|im_end|>\nSo:"
QUERIES, DOCUMENTS = ["a list?", "lists"], ["a list.", "(what) 's it", "the ranker reads both of them"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen3", tmp_path_factory.mktemp("yes_no") / "lm", max_position_embeddings=128)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(str(folder))


def test_a_pair_has_the_tokens_of_its_words(tokenizer: Any) -> None:
    template = InputTemplate.from_tokenizer(tokenizer, pair_words=WORDS)
    for query in QUERIES:
        for document in DOCUMENTS:
            (ids,) = template.queries.token_ids(tokenizer, [query])
            (other,) = template.documents.token_ids(tokenizer, [document])
            whole = tokenizer(WORDS.replace("{query}", query).replace("{document}", document))["input_ids"]
            assert list(template.pair(ids, other, 200).ids) == whole
            cut = template.pair(ids, other, len(whole) - 2).ids
            behind = tokenizer("<|im_end|>\nSo:")["input_ids"]
            assert list(cut[-len(behind) :]) == behind, "a document is cut, what follows it is not"


def test_scores_are_the_logits_of_the_answers(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Packed in training, padded, exported, and as the language model itself answers."""
    section = RankerConfig(name=str(folder), head="yes_no", pair_template=WORDS, max_length=96)
    ranker = Ranker.load(str(folder), head="yes_no", answers=section.answers)
    assert ranker.packs
    template = InputTemplate.from_tokenizer(tokenizer, pair_words=section.pair_words)
    texts = [(query, document) for query in QUERIES for document in DOCUMENTS]
    ids = [
        template.pair(
            *(
                wording.token_ids(tokenizer, [text])[0]
                for wording, text in zip((template.queries, template.documents), pair, strict=True)
            ),
            section.max_length,
        )
        for pair in texts
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    expected = []
    for query, document in texts:
        words = WORDS.replace("{query}", query).replace("{document}", document)
        with torch.no_grad():
            logits_V = model(**tokenizer(words, return_tensors="pt")).logits[0, -1]
        expected.append(float(logits_V[yes] - logits_V[no]))
    for batch in (ranker.collator(template)(ids), template.pad(ids)):
        assert ranker(batch).tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1
    ranker.train()
    ranker(ranker.collator(template)(ids)).sum().backward()
    assert ranker.backbone.get_input_embeddings().weight.grad.abs().sum() > 0

    described = {"max_length": section.max_length, "query_max_length": 16, "pair_template": section.pair_words}
    ranker.eval().save(tmp_path / "weights", tokenizer, metadata=described)
    assert export_ranker(tmp_path / "weights", tmp_path / "export") < 1e-5
    served = TextRanker.open(tmp_path / "export", torch.device("cpu"))
    given = [[Document(str(number), "", text) for number, text in enumerate(DOCUMENTS)]] * len(QUERIES)
    scores = [score for own in served.score(QUERIES, given) for score in own]
    assert scores == pytest.approx(expected, abs=1e-5)

    for told in (True, False):  # what an export says of itself, and what its modules say
        if not told:
            (tmp_path / "export" / "sparring.json").unlink()
        start = section.model_copy(update={"name": str(tmp_path / "export")})
        assert not require_agreement(start, start.name, "ranker")
        for changed in ({"pair_template": WORDS + "?"}, {"no_word": "<|im_end|>"}, {"head": "last"}):
            other = start.model_copy(update=changed)
            with pytest.raises(ModelError, match=r"set ranker\.(pair_template|yes_word|head)"):
                require_agreement(other, other.name, "ranker")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("<|im_start|>{query} {document}<|eot|>", r"has <\|eot\|>, which the tokenizer .* no token for"),
        ("{query} and {document}s", "other tokens of a text within pair_template"),
    ],
)
def test_words_that_do_not_suit_the_tokenizer_are_refused(tokenizer: Any, words: str, match: str) -> None:
    tokenizer = load_tokenizer(tokenizer.name_or_path)
    tokenizer.backend_tokenizer.add_tokens(["xs", ".s", "ts", "%s", ")s", "es", "fs"])
    with pytest.raises(ModelError, match=match):
        InputTemplate.from_tokenizer(tokenizer, pair_words=words)


def test_an_answer_of_several_tokens_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"ranker\.yes_word 'true' is 4 tokens of .*set ranker\.yes_word"):
        Ranker.load(str(folder), head="yes_no", answers=("true", "no"))


def test_a_model_without_a_head_answers_nothing(folder: Path, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    load_tokenizer(str(folder)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no LM head: its weights lack lm_head\.weight"):
        Ranker.load(str(tmp_path), head="yes_no")


def test_a_model_that_caps_its_logits_is_refused(tmp_path: Path) -> None:
    tokenizer = ARCHITECTURES["qwen3"].tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.CohereConfig(vocab_size=len(tokenizer), pad_token_id=0, logit_scale=0.1, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does more to its logits than its last layer gives"):
        Ranker.load(str(tmp_path), head="yes_no")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (["ranker.instruction=x"], "instruction go with head yes_no, but head is pooler"),
        (["ranker.head=yes_no", "ranker.pair_template='{document} {query}'"], "expected each once, the query first"),
        (["ranker.head=yes_no", "ranker.pair_template='{query}'"], "{document} 0 times"),
        (["ranker.head=yes_no", "ranker.no_word=yes"], "yes_word and no_word are both 'yes'"),
        (["ranker.head=yes_no", "warmup_ranker.optim.head_lr_scale=10"], "head is yes_no, which has no layer"),
    ],
)
def test_settings_that_contradict_the_head_are_refused(settings: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_config(TINY, ["run.path=x", *settings])
