from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from engine.errors import ModelError
from engine.models.loading import load_tokenizer, tokenizer_fingerprint
from engine.models.random import make_random_model
from shards.files import sha256_file

FILES = ("config.json", "model.safetensors", "tokenizer.json")


def hashes(folder: Path) -> list[str]:
    return [sha256_file(folder / name) for name in FILES]


def test_the_vocabulary_is_the_same_in_every_process(tmp_path: Path) -> None:
    """The tokenizers library's own trainer numbers pieces by a hash table; ranks would read other words."""
    folder = make_random_model(tmp_path / "m", ["bab a bab", "Ab ab abba"], vocab_size=11)
    vocabulary = load_tokenizer(str(folder)).get_vocab()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # 12 letters: b 7 times, a 6 times; a quarter of the 6 free entries is 1 letter. Words by count, then alphabet.
    assert sorted(vocabulary, key=vocabulary.__getitem__) == [*specials, "b", "##b", "ab", "bab", "a", "abba"]


def test_the_same_seed_makes_the_same_files(tmp_path: Path, random_model: Path, texts: tuple[str, ...]) -> None:
    assert hashes(make_random_model(tmp_path / "again", texts)) == hashes(random_model)


def test_the_seed_decides_the_weights_and_nothing_global(tmp_path: Path, texts: tuple[str, ...]) -> None:
    torch.manual_seed(5)
    undisturbed = torch.rand(1)
    torch.manual_seed(5)
    one = make_random_model(tmp_path / "one", texts, seed=1)
    assert torch.equal(torch.rand(1), undisturbed)
    two = make_random_model(tmp_path / "two", texts, seed=2)
    first, second = hashes(one), hashes(two)
    assert first[1] != second[1]
    assert first[0] == second[0]
    assert first[2] == second[2]


def test_shape_and_words(tmp_path: Path, texts: tuple[str, ...]) -> None:
    folder = make_random_model(tmp_path / "m", texts, hidden_size=24, num_layers=3, num_heads=3, vocab_size=60, seed=0)
    model, tokenizer = AutoModel.from_pretrained(folder), load_tokenizer(str(folder))
    assert model.config.hidden_size == 24
    assert model.config.num_hidden_layers == 3
    assert len(tokenizer) == model.config.vocab_size == 60
    assert tokenizer.tokenize("The The the") == ["the"] * 3
    assert tokenizer.tokenize("Tea") == ["t", "##e", "##a"]
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(
        load_tokenizer(str(make_random_model(tmp_path / "n", texts, vocab_size=61)))
    )


@pytest.mark.parametrize(
    ("options", "texts", "message"), [({"num_heads": 3}, ["a"], "multiple"), ({}, [" "], "no word")]
)
def test_what_cannot_be_made(tmp_path: Path, options: dict[str, int], texts: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_random_model(tmp_path / "m", texts, **options)
