"""A tiny untrained model with its own tokenizer, for tests and fault drills: no download, the same on every machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import BertConfig, BertForPreTraining, BertModel, BertTokenizer

from engine.errors import ModelError
from engine.models.failures import quiet_transformers

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MAX_POSITIONS = 512


def make_random_model(
    folder: Path,
    texts: Iterable[str],
    *,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 2,
    vocab_size: int = 2000,
    seed: int = 0,
) -> Path:
    """Write a randomly initialised BERT, its pre-training heads with it, and a WordPiece tokenizer of texts' words.

    Args:
        folder: A new or existing folder; the files are written in place.
        texts: What the vocabulary is taken from; read once.
        hidden_size: Width, a multiple of `num_heads`.
        num_layers: Layers.
        num_heads: Attention heads.
        vocab_size: Entries of the vocabulary at most.
        seed: Initialises the weights; the global random state is left as it was.

    Returns:
        The folder, a Hugging Face model.

    Raises:
        ModelError: The texts hold no word, or `hidden_size` is no multiple of `num_heads`.
    """
    if hidden_size % num_heads:
        raise ModelError(
            f"hidden_size {hidden_size} is no multiple of num_heads {num_heads}",
            expected="heads of one width, which make up all of it",
            remedy=f"take {hidden_size + -hidden_size % num_heads} for hidden_size, or another num_heads",
        )
    vocabulary = _vocabulary(texts, vocab_size)
    # Wider than BERT's 0.02, with which so narrow an untrained model would give all texts nearly the same embedding.
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=_MAX_POSITIONS,
        initializer_range=hidden_size**-0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = BertModel(config)
        model = BertForPreTraining(config)
    # The head for masked language modelling comes beside the backbone that the seed makes without one.
    model.bert.load_state_dict(backbone.state_dict())
    with quiet_transformers():
        model.save_pretrained(folder)
    BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=_MAX_POSITIONS).save_pretrained(folder)
    return folder


def _vocabulary(texts: Iterable[str], vocab_size: int) -> dict[str, int]:
    """Take special tokens, single characters, then the most frequent words.

    Built by counting and not by the tokenizers library's trainer, which numbers continuation pieces in the order of a
    hash table: another order in every process.
    """
    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    if not words:
        raise ModelError(
            "a tokenizer cannot be made: the texts hold no word",
            expected="at least one text with a word",
            remedy="look at the corpus",
        )
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    room = max(1, (vocab_size - len(_SPECIAL)) // 4)
    alphabet = _most_frequent(characters, room)
    entries = [*_SPECIAL, *alphabet, *(f"##{character}" for character in alphabet)]
    known = set(entries)
    longer = Counter({word: count for word, count in words.items() if word not in known})
    entries += _most_frequent(longer, max(0, vocab_size - len(entries)))
    return {entry: number for number, entry in enumerate(entries)}


def _most_frequent(counts: Counter[str], limit: int) -> list[str]:
    return [entry for entry, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]]
