"""A model and its tokenizer are proved before any work: one forward of the dearest and strangest inputs there can be.

The inputs are as long as the recipe allows, hold the highest token id of the tokenizer and its highest segment, and are
computed in the recipe's attention and numeric type, on the rank's device. What cannot be computed is refused here, with
what would help, before a corpus is tokenised. Where a forward fails, other settings are tried: the remedy names one
with which it did not fail.

Shapes: N inputs, L tokens, D embedding dimension.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.config.models import LexicalConfig, ModelConfig
from engine.errors import ConfigError, ModelError
from engine.models.agreement import Note
from engine.models.architecture import ENCODERS
from engine.models.attention import PACKED_ATTENTIONS
from engine.models.bottleneck import BottleneckLM, MaskedInputs
from engine.models.condenser import CondenserLM
from engine.models.dual import DOCUMENT, QUERY, DualEncoder
from engine.models.failures import FORWARD_ERRORS, quiet_transformers, reason_of
from engine.models.kinds import Model
from engine.models.template import Batch, Input, InputTemplate
from engine.models.weights import DTYPES
from shards.errors import listed

_OTHER_PRECISIONS = {"fp32": (), "bf16": ("fp32",), "fp16": ("bf16", "fp32")}
_OTHER_ATTENTIONS = {"sdpa": ("eager",), "eager": ("sdpa",), "flash_attention_2": ("sdpa", "eager")}
_HEADS = ("SequenceClassification", "MaskedLM", "CausalLM")
_LISTED = 4
_SHORT = 2
"""Tokens of the short input beside the longest: a batch has inputs of several lengths."""
_LONGER = 40
_PADDING_TOLERANCE, _ROUNDING, _LEAST_SCALE = 0.1, 1e-4, 1e-3
"""Convolutions and approximations of attention let a little of the padding in; what pools it is another matter."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What a model is proved with.

    Attributes:
        name: The model's section in the recipe.
        section: Its settings.
        query_max_length: Tokens of a query, special tokens included.
        tokenizer: A Hugging Face tokenizer.
        template: Of that tokenizer.
        device: Where it will compute.
    """

    name: str
    section: ModelConfig
    query_max_length: int
    tokenizer: Any
    template: InputTemplate
    device: torch.device


class _Tokens(NamedTuple):
    """Token ids that a trial's texts are made of."""

    highest: int
    other: int


def require_forward(model: Model, proof: Proof) -> list[Note]:
    """Compute a trial batch, and refuse a model or a tokenizer with which that cannot be done.

    Args:
        model: In float32 on the CPU, as it was loaded; it is left as it was.
        proof: Its settings and its tokenizer.

    Returns:
        What is to be told.

    Raises:
        ConfigError: An input is longer than the model's positions, or a prompt leaves no room for a text.
        ModelError: The tokenizer is larger than the model's embeddings, a table has too few rows for what is looked up
            in it, the forward fails in the recipe's settings, its result is not finite or has another form than the
            engine reads, or a document's embedding does not depend on the document.
    """
    _require_length(model, proof)
    _require_room_for_prompts(model, proof)
    tokens = _require_vocabulary(model, proof)
    try:
        _compute(model, proof, tokens, proof.section.precision)
        return _require_no_padding_read(model, proof, tokens)
    except ModelError:
        raise
    except FORWARD_ERRORS as error:
        section = proof.section
        raise ModelError(
            f"{_class_of(model)} of {section.name} cannot compute an input of {section.max_length} tokens in "
            f"{section.precision} by {section.attention} attention on {proof.device.type}: {type(error).__name__}: "
            f"{reason_of(error)}",
            expected=f"{ENCODERS}, and settings in which this machine can compute it",
            remedy=_what_helps(model, proof, tokens),
        ) from error
    finally:
        if proof.device.type == "cuda":
            torch.cuda.empty_cache()


def _require_room_for_prompts(model: Model, proof: Proof) -> None:
    """Refuse a prompt that leaves no room for a text behind it."""
    if not isinstance(model, DualEncoder):
        return
    lengths = {QUERY: (proof.query_max_length, "query_max_length"), DOCUMENT: (proof.section.max_length, "max_length")}
    forms = {
        QUERY: (proof.template.for_queries(), proof.template.queries),
        DOCUMENT: (proof.template.for_documents(), proof.template.documents),
    }
    for side, (template, wording) in forms.items():
        length, field = lengths[side]
        taken = template.num_special_single + len(wording.token_ids(proof.tokenizer, [""])[0])
        if model.prompts.get(side) and taken >= length:
            raise ConfigError(
                f"the prompt of {proof.name} for a {side}, {model.prompts[side]!r}, and special tokens take {taken} "
                f"tokens, {proof.name}.{field} is {length}",
                expected="room for the text behind it",
                remedy=f"raise {proof.name}.{field}, or shorten {proof.name}.{side}_prompt",
            )


def _require_length(model: Model, proof: Proof) -> None:
    max_length, longest = proof.section.max_length, model.longest_input
    if longest is not None and max_length > longest:
        raise ConfigError(
            f"{proof.name}.max_length is {max_length}, but the model takes {longest} tokens",
            expected=f"at most {longest}",
            remedy=f"set {proof.name}.max_length={longest}, or name a model for longer inputs",
        )


def require_embeddings(tokenizer: Any, rows: int, *, name: str, section: str, loader: str = "AutoModel") -> None:
    """Refuse a tokenizer that gives ids without an embedding.

    Args:
        tokenizer: A Hugging Face tokenizer.
        rows: Embeddings that the model has.
        name: The model, as the recipe names it.
        section: The recipe's section, for remedies.
        loader: Class of transformers that loads the model with all it has.

    Raises:
        ModelError: It gives some.
    """
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ModelError(
            f"the tokenizer of {name} gives ids up to {highest}, its model has {rows} embeddings, for 0 to {rows - 1}",
            expected="an embedding for each id",
            remedy=f'name a model with its own tokenizer, or enlarge it: model = {loader}.from_pretrained("{name}"); '
            f"model.resize_token_embeddings({highest + 1}); model.save_pretrained(FOLDER), the tokenizer saved there "
            f"too, and {section}.name=FOLDER",
        )


def _require_vocabulary(model: Model, proof: Proof) -> _Tokens:
    """Refuse a tokenizer that gives ids without an embedding; return its highest and its lowest ordinary id."""
    for backbone in _backbones(model):
        classes = type(backbone).__name__, *(backbone.config.architectures or ())
        head = next((one for one in _HEADS if any(one in each for each in classes)), "")
        require_embeddings(
            proof.tokenizer,
            len(backbone.get_input_embeddings().weight),
            name=proof.section.name,
            section=proof.name,
            loader=f"AutoModelFor{head}" if head else "AutoModel",
        )
    special = {*proof.tokenizer.all_special_ids, proof.template.pad_id}
    ids = sorted(proof.tokenizer.get_vocab().values())
    ordinary = [one for one in ids if one not in special] or ids
    return _Tokens(ordinary[-1], ordinary[0])


def _compute(model: Model, proof: Proof, tokens: _Tokens, precision: str) -> None:
    """Run the forward on copies of the weights in the recipe's type, and look at what comes out."""
    weights = {
        name: tensor.to(proof.device, DTYPES[precision] if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }

    def forward(**batches: Any) -> Any:
        there = {name: _to(batch, proof.device) for name, batch in batches.items()}
        return torch.func.functional_call(model, weights, kwargs=there)

    with torch.inference_mode(), _tables_checked(model, proof), _uncompiled(proof.section):
        if isinstance(model, DualEncoder):
            _compute_embeddings(model, proof, tokens, forward)
        elif isinstance(model, CondenserLM):
            first_NH, predictions = forward(spans=_masked(model, proof, tokens)["encoder"])
            for numbers, what in ((first_NH, "first state"), *((one, "prediction") for one in predictions)):
                _require_finite(numbers, what)
        elif isinstance(model, BottleneckLM):
            for logits_MV in forward(**_masked(model, proof, tokens)):
                _require_finite(logits_MV, "prediction")
        else:
            scores_N = forward(pairs=model.collator(proof.template)(_pairs(proof, tokens)))
            _require_finite(scores_N, "score")


def _require_no_padding_read(model: Model, proof: Proof, tokens: _Tokens) -> list[Note]:
    """Refuse a model whose results depend on padding, tell of a little; in float32, where rounding hides nothing."""
    if model.packs or proof.section.attention == "flash_attention_2":
        return []  # without padding; compared with padded batches at load
    template, length = proof.template, min(proof.section.max_length, _LONGER)
    short, longer = ([tokens.highest] * count for count in (1, length))

    def first(*texts: list[int]) -> Tensor:
        if isinstance(model, DualEncoder | BottleneckLM):
            batch = template.pad([template.single(text, length) for text in texts], 1)
            return (model.encode_documents if isinstance(model, DualEncoder) else model.first_states)(batch)[0]
        pairs = [template.pair([tokens.highest], text, length) for text in texts]
        scores_N: Tensor = model(template.pad(pairs, 1))
        return scores_N[:1]

    with torch.inference_mode(), _uncompiled(proof.section):
        alone, beside = first(short), first(short, longer)
    difference, scale = float((alone - beside).abs().max()), float(alone.abs().max())
    fact = (
        f"{_class_of(model)} of {proof.section.name} computes a text differently beside a longer one: its result "
        f"differs by {difference:.2g} of {scale:.2g}, since it reads the padding"
    )
    if not difference <= _PADDING_TOLERANCE * max(scale, _LEAST_SCALE):
        raise ModelError(
            fact,
            expected=f"{ENCODERS}, which leaves out what the attention mask tells it to",
            remedy=f"name such a model by {proof.name}.name",
        )
    told = f"{fact}: scores of {proof.name} depend a little on the batch, here and wherever its export is used"
    return [Note(told, warns=True)] if difference > _ROUNDING * max(scale, _LEAST_SCALE) else []


def _compute_embeddings(model: DualEncoder, proof: Proof, tokens: _Tokens, forward: Callable[..., Any]) -> None:
    template, collator = proof.template, model.collator(proof.template)
    longest = proof.section.max_length
    lengths = (proof.query_max_length, _SHORT)
    query, document = template.for_queries().single, template.for_documents().single
    queries = [query([tokens.highest] * length, proof.query_max_length) for length in lengths]
    documents = [document([tokens.highest] * length, longest) for length in (longest, _SHORT)]
    documents.append(document([tokens.other] * longest, longest))
    embeddings = dict(
        zip((QUERY, DOCUMENT), forward(queries=collator(queries), documents=collator(documents)), strict=True)
    )
    for side, embeddings_ND in embeddings.items():
        _require_finite(embeddings_ND, f"{side}'s embedding")
        if embeddings_ND.shape[-1] != model.dimension:
            raise ModelError(
                f"{_class_of(model)} of {proof.section.name} gives {embeddings_ND.shape[-1]} numbers",
                expected=f"{model.dimension}, as its configuration says",
                remedy=f"name another model by {proof.name}.name",
            )
    other = "" if isinstance(proof.section, LexicalConfig) else f"set {proof.name}.pooling to last or mean, or "
    if tokens.highest != tokens.other and torch.equal(embeddings[DOCUMENT][0], embeddings[DOCUMENT][2]):
        raise ModelError(
            f"{_class_of(model)} of {proof.section.name} gives two documents without a word in common one embedding",
            expected="a first state that has seen the text: a decoder's sees the first token alone",
            remedy=f"{other}name {ENCODERS} by {proof.name}.name",
        )


def _masked(model: BottleneckLM, proof: Proof, tokens: _Tokens) -> dict[str, MaskedInputs]:
    """Make inputs whose every ordinary token is to be predicted, behind the first."""
    lengths = (proof.section.max_length, _SHORT + proof.template.num_special_single)
    inputs = [proof.template.single([tokens.highest] * length, length) for length in lengths]
    batch, places_M = model.collator(proof.template)(inputs), torch.arange(1, _SHORT)
    one = MaskedInputs(batch, places_M, torch.full_like(places_M, tokens.highest))
    return {"encoder": one, "decoder": one}


def _pairs(proof: Proof, tokens: _Tokens) -> list[Input]:
    template, longest = proof.template, proof.section.max_length
    query = [tokens.highest] * (proof.query_max_length - template.num_special_single)
    return [
        template.pair(query, [tokens.highest] * longest, longest),
        template.pair([tokens.highest], [tokens.highest] * _SHORT, longest),
    ]


def _uncompiled(section: ModelConfig) -> AbstractContextManager[Any]:
    """Try layers that are to be compiled as they are: the compiler takes its time at the first real batch."""
    return torch.compiler.set_stance("force_eager") if section.compile_layers else contextlib.nullcontext()


def _require_finite(numbers: Tensor, what: str) -> None:
    if not bool(torch.isfinite(numbers).all()):
        raise FloatingPointError(f"the {what} is not finite")


@contextlib.contextmanager
def _tables_checked(model: nn.Module, proof: Proof) -> Iterator[None]:
    """Look at every id before it is looked up: on a GPU, one that is too high ends the process."""
    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}

    def check(table: Any, inputs: tuple[Any, ...]) -> None:
        ids, rows = inputs[0], int(table.num_embeddings)
        if torch.is_tensor(ids) and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise _beyond(names[table], int(ids.max()), rows, model, proof)

    hooks = [module.register_forward_pre_hook(check) for module in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _beyond(table: str, highest: int, rows: int, model: nn.Module, proof: Proof) -> ModelError:
    what = table.rpartition(".")[2]
    fact = (
        f"{_class_of(model)} of {proof.section.name} looks up {highest} in its {what}, which has rows 0 to {rows - 1}"
    )
    if "position" in what:
        room = proof.section.max_length - (highest - rows + 1)
        return ModelError(
            f"{fact}: an input of {proof.section.max_length} tokens is too long",
            expected=f"at most {room} tokens",
            remedy=f"set {proof.name}.max_length={room}, or name a model for longer inputs",
        )
    if "type" in what or "segment" in what:
        return ModelError(
            f"{fact}: its tokenizer tells more segments apart than it does",
            expected=f"segments 0 to {rows - 1}",
            remedy="name a model with its own tokenizer",
        )
    return ModelError(fact, expected="ids within the table", remedy="name a model with its own tokenizer")


def _what_helps(model: Model, proof: Proof, tokens: _Tokens) -> str:
    """Try other settings than the recipe's, and name the first with which the forward is computed."""
    section = proof.section
    for precision in _OTHER_PRECISIONS[section.precision]:
        if _is_computed(model, proof, tokens, precision):
            return f"set {proof.name}.precision={precision}"
    for attention in _OTHER_ATTENTIONS[section.attention]:
        with contextlib.suppress(*FORWARD_ERRORS), _attention(model, attention):
            for precision in (section.precision, *_OTHER_PRECISIONS[section.precision]):
                if _is_computed(model, proof, tokens, precision):
                    more = "" if precision == section.precision else f" and {proof.name}.precision={precision}"
                    return f"set {proof.name}.attention={attention}{more}"
    broken = next((name for name, tensor in model.named_parameters() if not bool(torch.isfinite(tensor).all())), None)
    if broken is not None:
        return f"name another model by {proof.name}.name: the weights of this one are not finite ({broken})"
    config = _backbones(model)[0].config
    languages = getattr(config, "languages", None)
    if languages and getattr(config, "default_language", None) is None:
        return (
            f"set default_language to one of {listed(languages, _LISTED)} in the config.json of a copy of the model's "
            f"folder, and name the copy by {proof.name}.name"
        )
    return f"name another model by {proof.name}.name"


def _is_computed(model: Model, proof: Proof, tokens: _Tokens, precision: str) -> bool:
    try:
        _compute(model, proof, tokens, precision)
    except (ModelError, *FORWARD_ERRORS):
        return False
    return True


@contextlib.contextmanager
def _attention(model: Model, attention: str) -> Iterator[None]:
    before = [backbone.config._attn_implementation for backbone in _backbones(model)]
    packs, model.packs = model.packs, model.packs and attention in PACKED_ATTENTIONS
    with quiet_transformers():
        for backbone in _backbones(model):
            backbone.set_attn_implementation(attention)
        try:
            yield
        finally:
            for backbone, own in zip(_backbones(model), before, strict=True):
                backbone.set_attn_implementation(own)
            model.packs = packs


def _backbones(model: Model) -> list[Any]:
    if isinstance(model, BottleneckLM):
        return [model.masked_lm]
    return list(model.towers.values()) if isinstance(model, DualEncoder) else [model.backbone]


def _class_of(model: Any) -> str:
    return type(_backbones(model)[0]).__name__


def _to(batch: Batch | MaskedInputs, device: torch.device) -> Batch | MaskedInputs:
    if isinstance(batch, Mapping):
        return {name: tensor.to(device) for name, tensor in batch.items()}
    return batch.to(device)
