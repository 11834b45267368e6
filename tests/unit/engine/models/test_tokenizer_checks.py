"""What pre-training asks of a tokenizer is asked where tokenizers are loaded, before a corpus is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.file import load_config
from engine.data import corpus
from engine.data.corpus import model_texts
from engine.errors import ModelError
from engine.models.loading import load_tokenizer
from engine.models.random import make_random_model
from engine.models.wording import Wording
from tests.unit.engine.conftest import TINY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("readable") / "model", ["a text of some words"] * 5)


def test_a_tokenizer_without_a_mask_is_refused_where_it_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symptom: the corpus was tokenised, and then nothing of it could be masked."""
    tokenizer = load_tokenizer(str(folder))
    monkeypatch.setattr(corpus, "load_tokenizer", lambda *_, **__: tokenizer)
    config = load_config(TINY.with_name("edmlm_tiny.yaml"), ["run.path=x"])
    assert model_texts(config, {"encoder": folder})
    tokenizer.mask_token = None
    with pytest.raises(ModelError, match="has no mask token"):
        model_texts(config, {"encoder": folder})


def test_a_prompt_that_grows_together_with_its_text_is_refused_where_parts_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symptom: the inverse cloze task refused it behind the tokenising of the corpus; other recipes take it."""
    ict, tiny = (load_config(TINY.with_name(f"{name}.yaml"), ["run.path=x"]) for name in ("ict_tiny", "tiny"))
    assert model_texts(ict, {"retriever": folder})
    made = corpus.InputTemplate.from_tokenizer

    def joined(*given: object) -> object:
        template = made(*given)  # type: ignore[arg-type]
        object.__setattr__(template, "queries", Wording(" "))
        return template

    monkeypatch.setattr(corpus.InputTemplate, "from_tokenizer", joined)
    assert model_texts(tiny, {"retriever": folder})
    with pytest.raises(ModelError, match=r"set retriever\.query_prompt and retriever\.document_prompt to an empty"):
        model_texts(ict, {"retriever": folder})
