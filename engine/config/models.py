"""The sections of models: one a model, under the name that the algorithm calls it by.

A section's class says what kind of model it is (`kind`), and so which class of `engine.models` loads it. A recipe may
have any number of models: every field of `engine.config.recipe.Config` that holds such a section is one.
"""

from __future__ import annotations

import itertools
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from engine.config.sections import Section, StoredPath

Head = Literal["pooler", "cls", "mean", "last", "yes_no"]
"""Forms of a ranker's head."""
QUESTION = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
"""The words of a pair to which a language model answers yes or no, as Qwen3-Reranker was trained with them."""


class LoraConfig(Section):
    """Adapters of low rank beside linear layers; all else of a backbone is frozen (docs/models.md).

    Source: Hu et al. 2021 (arXiv 2106.09685).
    """

    r: int = Field(16, ge=1)
    """Rank of an adapter (LoRA's experiments: 1 to 64)."""
    alpha: int = Field(32, ge=1)
    """Scale: what an adapter gives is multiplied by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of what an adapter reads; the backbone's own is the section's `dropout`."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Which linear layers get one, by the last parts of their names, such as [q_proj, v_proj]; or all of them."""


class ModelConfig(Section):
    """What all kinds of model share: which weights, which numeric type, which ZeRO stage."""

    kind: ClassVar[str] = ""
    """Which class of `engine.models` it is."""

    name: str
    """Hub id, local folder, `package:NAME` (an installed package that carries weights), or `random`; docs/models.md
    says which architectures can be used."""
    num_layers: int | None = Field(None, ge=1)
    """Keep only the first layers of the backbone; left out, all."""
    layers: tuple[int, ...] | None = Field(None, min_length=1)
    """Keep only these layers of the backbone, counted from 0 and ascending, such as [0, 3, 5]: what a trained encoder
    knows is lost without its last layer, and mostly kept with it (docs/models.md)."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Every dropout of the model: of embeddings, hidden states, attention and heads; left out, the model's own."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel. Some architectures have `eager` alone (MPNet, DeBERTa), which pads batches."""
    gradient_checkpointing: bool | Literal["auto"] = False
    """Recompute activations in the backward pass (non-reentrant: the reentrant form breaks siamese encoders). `auto`:
    where the plan's estimate says that the model's training would not fit into its device otherwise."""
    compile_layers: bool = False
    """Compile the layers with torch.compile; takes a C++ compiler, and some time at the first step. Not under ZeRO-3,
    which gathers weights module by module. On a GPU encoding and scoring compile theirs, too; measure whether it pays
    (docs/performance.md)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Numeric type of weights and activations in training and inference; fp16 scales its loss dynamically."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage; takes configs/deepspeed/zero{stage}.json."""
    deepspeed: StoredPath | None = None
    """A DeepSpeed JSON file to use in place of that one."""
    max_length: int = Field(128, ge=8)
    """Tokens of an input, special tokens included: a document for the retriever, query and document for the ranker."""
    score_scale: float = Field(1.0, gt=0)
    """The tau of Eq. 2 and 6 for this model's scores: it multiplies. Cosine similarity wants about 20."""

    @property
    def stored_length(self) -> int:
        """Tokens of a document that the shards must hold for it."""
        return self.max_length

    @property
    def kept_layers(self) -> int | tuple[int, ...] | None:
        """How many of the first layers are kept, or which; None for all."""
        return self.num_layers if self.layers is None else self.layers

    @model_validator(mode="after")
    def _chooses_layers(self) -> ModelConfig:
        if self.layers is None:
            return self
        if self.num_layers is not None:
            raise ValueError("num_layers and layers both say which layers are kept: leave one out")
        if self.layers[0] < 0 or any(later <= layer for layer, later in itertools.pairwise(self.layers)):
            raise ValueError(f"layers is {[*self.layers]}, expected numbers from 0 on, ascending, such as [0, 3, 5]")
        return self

    @model_validator(mode="after")
    def _adapts(self) -> ModelConfig:
        if getattr(self, "lora", None) is None:
            return self
        if self.layers is not None:
            raise ValueError(
                f"lora goes with layers {[*self.layers]}: adapters would be numbered as no other has these layers; "
                "export a model of these layers without lora first and name that, or keep the first ones by num_layers"
            )
        return self

    @model_validator(mode="after")
    def _compiles(self) -> ModelConfig:
        if self.compile_layers and self.zero_stage == 3:
            raise ValueError("compile_layers works under ZeRO stages 0 to 2: lower zero_stage, or leave it out")
        return self


class EncoderConfig(ModelConfig):
    """What models share that encode queries and documents apart, and so can search a corpus."""

    query_max_length: int = Field(32, ge=4)
    """Tokens of a query, special tokens included (AR2: 32)."""
    tied: bool = True
    """One tower for queries and documents; AR2's released code uses two, SPLADE's one."""
    query_prompt: str | None = None
    """What a query alone begins with, such as E5's "query: " or a decoder's "Instruct: ...\\nQuery:"; it counts in
    query_max_length. Left out, what the model's folder says; "" in the recipe's file for none."""
    document_prompt: str | None = None
    """What a document alone begins with, such as E5's "passage: "; it counts in max_length. Left out, what the model's
    folder says; an empty text for none."""

    @property
    def prompts(self) -> dict[str, str | None]:
        """What texts begin with, by side; None where the recipe leaves it to the model's folder."""
        return {"query": self.query_prompt, "document": self.document_prompt}


class RetrieverConfig(EncoderConfig):
    """The dual encoder G (AR2 Eq. 1 and 4)."""

    kind: ClassVar[str] = "retriever"

    pooling: Literal["cls", "mean", "last"] = "cls"
    """What of the last layer is the embedding: the first token's state (AR2: CLS), the mean of all, or the last
    token's, which is the only one of a decoder that has seen the whole text; texts then end with the tokenizer's
    end-of-text token. A sentence-transformers folder must say the same (`lasttoken`)."""
    lora: LoraConfig | None = None
    """Train adapters of low rank in place of all weights; left out, all weights."""
    similarity: Literal["dot", "cosine"] = "dot"
    """Inner product of the embeddings as they are (AR2), or of their unit vectors, as a Normalize wants."""


class LexicalConfig(EncoderConfig):
    """A retriever that weighs the words of its vocabulary: SPLADE-max, on a masked language model.

    A text is given a sparse vector of weights, of which an inverted index is made. The numbers of its training are in
    `engine.config.lexical`.

    Source: Formal et al. 2021, "SPLADE v2" (arXiv 2109.10086).
    """

    kind: ClassVar[str] = "lexical"

    max_length: int = Field(256, ge=8)
    """Tokens of a document, special tokens included (SPLADE's released configuration: 256, for queries too)."""


class RankerConfig(ModelConfig):
    """The cross-encoder D (AR2 Eq. 4)."""

    kind: ClassVar[str] = "ranker"

    head: Head = "pooler"
    """What gives the score: the standard head of the backbone's classifier in transformers (BERT: a pooler of a dense
    layer and a tanh, and a linear layer), or one linear layer on the raw state of the first token (`cls`: AR2 Eq. 4 and
    its released code), on the mean of the token states (`mean`) or on the last token's (`last`: for a decoder, which is
    given the end-of-text token there). A trained head is taken in its own form alone. `yes_no`: no layer at all, but
    what a language model answers behind `pair_template`: its logit of yes_word less that of no_word."""
    pair_template: str | None = None
    """The words of a pair for the head `yes_no`, with {query} and {document} once each, in this order, {instruction} or
    not, and all special tokens; left out, those of Qwen3-Reranker."""
    instruction: str = "Given a web search query, retrieve relevant passages that answer the query"
    """What stands for {instruction} in `pair_template` (Qwen3-Reranker's default)."""
    lora: LoraConfig | None = None
    """Train adapters of low rank, and the head above the backbone, in place of all weights; left out, all weights."""
    yes_word: str = "yes"
    """Says that a document is relevant; one token (Qwen3-Reranker)."""
    no_word: str = "no"
    """Says that it is not; one token (Qwen3-Reranker)."""
    max_length: int = Field(160, ge=8)
    """Tokens of query and document together, special tokens included."""
    prior: float = Field(0.0, ge=0)
    """What G0's score counts inside the ranker's (beta): logit + beta * tau * inner product of G0's vectors, tau being
    `retriever.score_scale`. So the ranker begins at G0's level and learns what is left to say. AR2 alone; 0 for none,
    as in the paper. Exports of the ranker are without it."""
    bm25_prior: float = Field(0.0, ge=0)
    """What BM25's score counts inside the ranker's: logit + bm25_prior * BM25 / (what the query's words are worth),
    a share below 1 for any query. So a ranker that has seen little knows which words a document has; 10 is good where
    BM25 is any good. 0 for none, as in the papers. Exports of the ranker are without it."""

    @property
    def answers(self) -> tuple[str, str]:
        """The words for yes and for no."""
        return self.yes_word, self.no_word

    @property
    def pair_words(self) -> str | None:
        """The words of a pair, the instruction among them; None where the tokenizer itself puts pairs together."""
        if self.head != "yes_no":
            return None
        return (self.pair_template or QUESTION).replace("{instruction}", self.instruction)

    @model_validator(mode="after")
    def _puts_pairs_into_words(self) -> RankerConfig:
        words = self.pair_words
        if words is None:
            own = ("instruction", "no_word", "pair_template", "yes_word")
            asked = [name for name in own if getattr(self, name) != type(self).model_fields[name].default]
            if asked:
                raise ValueError(f"{', '.join(asked)} go with head yes_no, but head is {self.head}")
            return self
        places = [words.count(place) for place in ("{query}", "{document}")]
        if places != [1, 1] or words.index("{query}") > words.index("{document}"):
            raise ValueError(
                f"pair_template has {{query}} {places[0]} times and {{document}} {places[1]} times, expected each "
                "once, the query first"
            )
        if self.yes_word == self.no_word:
            raise ValueError(f"yes_word and no_word are both {self.yes_word!r}")
        return self


class BottleneckConfig(ModelConfig):
    """A masked language model with a shallow decoder above its first state (SimLM section 3.1)."""

    kind: ClassVar[str] = "bottleneck"

    max_length: int = Field(144, ge=8)
    """Tokens of a document, special tokens included (Appendix C: 144)."""
    decoder_layers: int = Field(2, ge=1)
    """Layers of the decoder, which begin as copies of the encoder's last ones (SimLM: 2)."""


class CondenserConfig(BottleneckConfig):
    """A masked language model with a Condenser's head: layers above an inner layer's states and the last first one.

    Source: Gao and Callan 2021 (arXiv 2104.08253), section 3.
    """

    max_length: int = Field(128, ge=8)
    """Tokens of a span, special tokens included (ours)."""
    document_length: int | None = Field(None, ge=16)
    """Tokens of a document, from its first on, of which its spans are drawn (ours); left out, four spans'."""
    decoder_layers: int = Field(2, ge=1)
    """Layers of the head, which begin as copies of the encoder's last ones (Condenser: 2, which begin at random)."""
    skip_from: int = Field(6, ge=1)
    """Layer, counted from 1, whose states the head reads (Condenser: 6 of 12)."""

    @property
    def stored_length(self) -> int:
        """Tokens of a document of which spans are drawn, and that the shards must hold."""
        return 4 * self.max_length if self.document_length is None else self.document_length
