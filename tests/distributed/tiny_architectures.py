"""Tiny random models of the architectures that retrieval is done with, each with a tokenizer of its own family.

Nothing is downloaded: vocabularies hold the words of `TEXTS`, and everything is as narrow as it works. Sizes are tight,
so that an id, a position or a segment too many is seen: the vocabulary has the tokenizer's size, and inputs may have
`LONGEST` tokens, no multiple of what batches are padded to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LONGEST = 37
TEXTS = (
    "the retriever embeds a query and a document",
    "the ranker reads both of them together",
    "lists tuples and dictionaries are containers",
    "negatives are drawn from what the retriever likes best",
)
WORDS = sorted({word for text in TEXTS for word in text.split()})
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:?!'()"


@dataclass(frozen=True)
class Architecture:
    """How a tiny model is made.

    Attributes:
        config: Name of its class in transformers.
        tokenizer: Makes the tokenizer.
        settings: Of the configuration, beside the sizes of all.
        attention: Kernel that the architecture has.
        model: Name of the model's class, where the automatic one is another.
        pooling: What the retriever takes of the last layer.
        ranker: Settings of the ranker.
    """

    config: str
    tokenizer: Callable[[], Any]
    settings: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    model: str | None = None
    pooling: str = "cls"
    ranker: dict[str, Any] = field(default_factory=dict)


def make(name: str, folder: Path, **changes: Any) -> Path:
    """Write the model and the tokenizer of an architecture, with other settings where any are given."""
    import torch
    import transformers

    one = ARCHITECTURES[name]
    tokenizer = one.tokenizer()
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": LONGEST,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.3,
    }
    config = getattr(transformers, one.config)(**{**sizes, **one.settings, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, one.model)(config) if one.model else transformers.AutoModel.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _word_pieces(class_name: str, special: Sequence[str]) -> Any:
    import transformers

    pieces = [*special, *CHARACTERS, *(f"##{one}" for one in CHARACTERS), *(one for one in WORDS if len(one) > 1)]
    return getattr(transformers, class_name)(vocab={piece: number for number, piece in enumerate(pieces)})


def _bert(class_name: str = "BertTokenizer") -> Callable[[], Any]:
    return lambda: _word_pieces(class_name, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))


def _mpnet() -> Any:
    return _word_pieces("MPNetTokenizer", ("<s>", "<pad>", "</s>", "[UNK]", "<mask>"))


def _byte_pairs(special: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    from tokenizers.pre_tokenizers import ByteLevel

    pieces, merges = [*special, *sorted(ByteLevel.alphabet())], []
    for word in WORDS:
        known = "Ġ"
        for character in word:
            if (known, character) not in merges:
                merges.append((known, character))
                pieces.append(known + character)
            known += character
    return {piece: number for number, piece in enumerate(pieces)}, merges


def _roberta() -> Any:
    import transformers

    vocab, merges = _byte_pairs(("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    return transformers.RobertaTokenizer(vocab=vocab, merges=merges)


def _modernbert() -> Any:
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    names = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    vocab, merges = _byte_pairs(tuple(names.values()))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in names.items()},
    )


def _qwen() -> Any:
    """Make a tokenizer that adds nothing to a text, and joins a space with the word behind it."""
    import transformers

    vocab, merges = _byte_pairs(("<|endoftext|>", "<|im_start|>", "<|im_end|>", "yes", "no"))
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges, unk_token=None)
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def _llama() -> Any:
    """Make a tokenizer as Llama 3 has it, with a token before a text alone, and a token to pad with."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    names = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "pad": "<|pad|>"}
    vocab, merges = _byte_pairs(tuple(names.values()))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|> $B",
        special_tokens=[("<|begin_of_text|>", vocab["<|begin_of_text|>"])],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in names.items()},
    )


def _unigrams(class_name: str, special: Sequence[str]) -> Callable[[], Any]:
    def tokenizer() -> Any:
        import transformers

        pieces = [(token, 0.0) for token in special]
        pieces += [("▁", -6.0), *((one, -8.0) for one in CHARACTERS), *((f"▁{word}", -3.0) for word in WORDS)]
        return getattr(transformers, class_name)(vocab=pieces)

    return tokenizer


_XLMR = ("<s>", "<pad>", "</s>", "<unk>")
_FROM_PAD: dict[str, Any] = {"max_position_embeddings": LONGEST + 2, "type_vocab_size": 1}
_DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
_DISENTANGLED = {
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture("BertConfig", _bert()),
    "roberta": Architecture("RobertaConfig", _roberta, _FROM_PAD),
    "xlm_roberta": Architecture("XLMRobertaConfig", _unigrams("XLMRobertaTokenizer", _XLMR), _FROM_PAD),
    "mpnet": Architecture("MPNetConfig", _mpnet, {"max_position_embeddings": LONGEST + 2}, "eager"),
    "distilbert": Architecture("DistilBertConfig", _bert(), _DISTILBERT),
    "electra": Architecture("ElectraConfig", _bert(), {"embedding_size": 8}),
    "albert": Architecture(
        "AlbertConfig",
        _unigrams("AlbertTokenizer", ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")),
        {"embedding_size": 8, "classifier_dropout_prob": 0.3},
    ),
    "deberta_v2": Architecture(
        "DebertaV2Config",
        _unigrams("DebertaV2Tokenizer", ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")),
        _DISENTANGLED,
        "eager",
    ),
    "modernbert": Architecture(
        "ModernBertConfig", _modernbert, {"local_attention": 8, "global_attn_every_n_layers": 2}
    ),
    "data2vec_text": Architecture("Data2VecTextConfig", _roberta, _FROM_PAD),
    "xmod": Architecture(
        "XmodConfig",
        _unigrams("XLMRobertaTokenizer", _XLMR),
        {**_FROM_PAD, "languages": ["en_XX", "de_DE"], "default_language": "en_XX"},
    ),
    "qwen3": Architecture(
        "Qwen3Config",
        _qwen,
        {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True},
        model="Qwen3ForCausalLM",
        pooling="last",
        ranker={"head": "yes_no", "pair_template": "<|im_start|>{query}\n{document}<|im_end|>\n"},
    ),
    "llama": Architecture("LlamaConfig", _llama, {"num_key_value_heads": 1}, pooling="last", ranker={"head": "last"}),
    "one_segment": Architecture("BertConfig", _bert(), {"type_vocab_size": 1}),
    "dpr": Architecture("DPRConfig", _bert("DPRQuestionEncoderTokenizer"), model="DPRQuestionEncoder"),
}
