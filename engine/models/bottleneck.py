"""An encoder with a shallow decoder above its first state: the model of bottleneck pre-training.

The encoder is a masked language model. The decoder is a few layers of the same form, whose input is the embedding of
the text with more of it masked, and in place of its own first embedding the encoder's state of the first token. What
the decoder cannot read in its own input it can only know through that one state, so the state learns to hold the text.
Both share the embeddings and the head that predicts tokens. After pre-training the encoder alone is kept.

Source: Wang et al. 2022, "SimLM: Pre-training with Representation Bottleneck for Dense Passage Retrieval", section 3.1;
its code initialises the decoder from the last layers of the backbone, and so does this.

Shapes: N inputs, L tokens of a padded input, T tokens of a packed batch, M masked tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM
from transformers.masking_utils import create_bidirectional_mask

from engine.errors import ModelError
from engine.models.architecture import Attention, input_form, recorded_attention
from engine.models.attention import KEYWORD, Layout, register_packed_attention
from engine.models.batch import PackedBatch
from engine.models.failures import FORWARD_ERRORS, reason_of
from engine.models.loading import load_backbone, own_weights, save_backbone, under_prefix
from engine.models.packed import packed_forward, require_packing, tower_can_be_packed
from engine.models.source import BOTTLENECK, local_source, saved_metadata, write_metadata
from engine.models.start import transformers_of
from engine.models.template import Batch, Collator, InputTemplate

BERT_LIKE = "a BERT, RoBERTa, XLM-RoBERTa, CamemBERT or ERNIE with its masked-language-model head"
_HEADS = ("cls", "lm_head")
"""Where such models have what predicts tokens from states."""
_DECODER = Path("decoder") / "model.safetensors"
"""Beside a saved model's own files, in a folder that other libraries do not look into."""
SKIP_FROM = "skip_from"
"""Saved beside a model whose further layers read an inner layer's states (`engine.models.condenser`)."""
_TRIAL_LENGTHS = (7, 4)
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class MaskedInputs:
    """Inputs with tokens taken out, and which they were.

    Attributes:
        batch: Inputs in which the masked tokens are replaced.
        places_M: Where the masked tokens lie when the batch's tokens are laid in one row, int64 [M].
        labels_M: What they were, int64 [M].
    """

    batch: Batch
    places_M: Tensor
    labels_M: Tensor

    def to(self, device: torch.device) -> MaskedInputs:
        """Copy the tensors to a device."""
        there: Batch
        if isinstance(self.batch, PackedBatch):
            there = self.batch.to(device)
        else:
            there = {name: tensor.to(device) for name, tensor in self.batch.items()}
        return MaskedInputs(there, self.places_M.to(device), self.labels_M.to(device))


class BottleneckLM(nn.Module):
    """A masked language model and the decoder that reads its first states.

    Args:
        masked_lm: A Hugging Face masked language model of BERT's form.
        decoder: Layers of that form.
    """

    def __init__(self, masked_lm: Any, decoder: nn.ModuleList) -> None:
        super().__init__()
        self.masked_lm, self.decoder = masked_lm, decoder
        self.form = input_form(masked_lm)
        """Which inputs it takes."""
        self.packs = tower_can_be_packed(masked_lm.base_model)
        """Whether `forward` takes packed batches."""
        self.compiles = False
        """Whether its layers are compiled when it is frozen."""

    @classmethod
    def load(
        cls,
        name: str,
        *,
        num_decoder_layers: int = 2,
        num_layers: int | Sequence[int] | None = None,
        dropout: float | None = None,
        attention: Attention | None = "sdpa",
        gradient_checkpointing: bool = False,
        section: str = "encoder",
    ) -> BottleneckLM:
        """Load a masked language model and give it a decoder, or load what `save` wrote.

        Args:
            name: Hub id, local folder or `package:NAME`.
            num_decoder_layers: Layers of the decoder, which begins as a copy of the encoder's last ones.
            num_layers: How many of the encoder's first layers to keep, or which, from 0; None keeps all.
            dropout: Every dropout, in [0, 1); None keeps the model's own.
            attention: Attention kernel; None for the model's own choice.
            gradient_checkpointing: Recompute activations in the backward pass.
            section: The recipe's section, for remedies.

        Returns:
            The model in float32, in evaluation mode.

        Raises:
            ModelError: The model cannot be loaded, has no head for masked language modelling, is not of BERT's form,
                has fewer layers than the decoder, or was saved with another number of decoder layers.
        """
        source = local_source(name)
        masked_lm = load_backbone(
            AutoModelForMaskedLM,
            name,
            folder=transformers_of(source)[0].transformer,
            num_layers=num_layers,
            dropout=dropout,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
            needs_head=True,
            section=section,
        )
        model = cls.build(masked_lm.eval(), num_decoder_layers, name=name, section=section)
        if isinstance(source, Path) and (source / _DECODER).exists():
            model.require_own(saved_metadata(source), source, section)
            _load_decoder(model.decoder, source, section)
        return model.eval()

    @classmethod
    def build(cls, masked_lm: Any, num_decoder_layers: int, *, name: str, section: str) -> BottleneckLM:
        """Give a masked language model a decoder made of its last layers.

        Args:
            masked_lm: A Hugging Face masked language model, in evaluation mode; its weights may be on the meta device.
            num_decoder_layers: Layers of the decoder.
            name: As the recipe names it.
            section: The recipe's section, for remedies.

        Raises:
            ModelError: It is not of BERT's form, or has fewer layers.
        """
        layers = _require_bert_like(masked_lm, name, section)
        if num_decoder_layers > len(layers):
            raise ModelError(
                f"a decoder of {num_decoder_layers} layers is made from the last layers of {name}, which has "
                f"{len(layers)}",
                expected=f"1 to {len(layers)} layers",
                remedy=f"lower {section}.decoder_layers",
            )
        return cls(masked_lm, nn.ModuleList(copy.deepcopy(layer) for layer in layers[-num_decoder_layers:]))

    @classmethod
    def open(cls, folder: Path) -> BottleneckLM:
        """Load what `save` wrote, with the decoder and the attention it was saved with.

        Raises:
            ModelError: The folder holds another kind of model.
        """
        saved = saved_metadata(folder)
        if saved.get("model") != BOTTLENECK:
            raise ModelError(f"{folder} holds a {saved.get('model')}", expected=f"a {BOTTLENECK} with its decoder")
        layers = saved["decoder_layers"]
        return cls.load(str(folder), num_decoder_layers=layers, attention=recorded_attention(folder))

    def require_own(self, saved: Mapping[str, Any], source: Path, section: str) -> None:
        """Refuse layers that were saved above another form of model.

        Args:
            saved: What was saved beside the weights.
            source: Where.
            section: The recipe's section, for remedies.

        Raises:
            ModelError: They read something else than this model's decoder.
        """
        if SKIP_FROM in saved:
            raise ModelError(
                f"{source} has a Condenser's head, which reads states of layer {saved[SKIP_FROM]}",
                expected="a decoder, which reads embeddings",
                remedy=f"to begin with a new decoder, name an export of it by {section}.name",
            )

    @property
    def longest_input(self) -> int | None:
        """Tokens that the model's positions allow; None where its configuration does not say."""
        return self.form.longest

    def collator(self, template: InputTemplate) -> Collator:
        """Return what makes batches of documents in the form that this model computes fastest.

        Args:
            template: Of the model's tokenizer.
        """
        return Collator(template, self.packs, self.form.first_position)

    def forward(self, encoder: MaskedInputs, decoder: MaskedInputs) -> tuple[Tensor, Tensor]:
        """Predict the masked tokens of both inputs, in one call: under ZeRO-3 a forward is a collective.

        Args:
            encoder: What the encoder reads of N texts.
            decoder: What the decoder reads of the same texts, laid out in the same way.

        Returns:
            Logits over the vocabulary at the encoder's masked tokens and at the decoder's: twice [M, V], at no other
            token, since a vocabulary's logits at all of them would be most of the memory.

        Raises:
            ModelError: It is given packed inputs, and takes none (`packs`).

        Source: SimLM section 3.1, with masked tokens in place of replaced ones.
        """
        states = self._encode(encoder.batch)
        decoded = self.decode(first_of(states, encoder.batch), decoder.batch)
        return self._predict(states, encoder), self._predict(decoded, decoder)

    def first_states(self, batch: Batch) -> Tensor:
        """Return the encoder's states of the first tokens [N, H], which an embedding is made of later."""
        return first_of(self._encode(batch), batch)

    def decode(self, first_NH: Tensor, batch: Batch) -> Tensor:
        """Run the decoder: all that it knows of a text beside its own input is the encoder's first state.

        Args:
            first_NH: The encoder's states of the first tokens [N, H], in the order in which the inputs were given.
            batch: The decoder's inputs.

        Returns:
            States [N, L, H], or [1, T, H] of a packed batch.
        """
        batch, backbone = self.form.accepted(batch), self.masked_lm.base_model
        states = with_first(backbone.embeddings(**ids_of(batch)), first_NH, batch)
        return through_layers(self.decoder, states, batch, backbone)

    def save(
        self,
        folder: Path,
        tokenizer: Any,
        state_dict: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the encoder and its head as a Hugging Face folder, and the decoder below it; whoever calls publishes.

        Args:
            folder: Where to; made if needed.
            tokenizer: Saved with the weights.
            state_dict: Full weights by this module's names; None takes the module's own, which must then be whole.
            metadata: Whatever else goes into sparring.json.

        Raises:
            ModelError: `state_dict` lacks a weight.
        """
        weights = own_weights(self) if state_dict is None else state_dict
        save_backbone(self.masked_lm, folder, tokenizer, under_prefix(weights, "masked_lm."))
        own = under_prefix(weights, "decoder.")
        (folder / _DECODER).parent.mkdir(exist_ok=True)
        kept = {name: own[name].detach().to("cpu", copy=True).float().contiguous() for name in _names(self.decoder)}
        save_file(kept, folder / _DECODER, metadata={"format": "pt"})
        description = {"model": BOTTLENECK, "decoder_layers": len(self.decoder)}
        write_metadata(folder, {**(metadata or {}), **description})

    def _encode(self, batch: Batch) -> Tensor:
        batch, backbone = self.form.accepted(batch), self.masked_lm.base_model
        if isinstance(batch, PackedBatch):
            require_packing(self.packs, backbone)
            states: Tensor = packed_forward(backbone, batch)[0]
        else:
            states = backbone(**batch)[0]
        return states

    def _predict(self, states: Tensor, inputs: MaskedInputs) -> Tensor:
        if isinstance(inputs.batch, PackedBatch):
            states_MH = states[0].index_select(0, inputs.places_M)
        else:  # whose padding beyond the last position was cut off: rows are shorter than the places say
            length = inputs.batch["input_ids"].shape[1]
            states_MH = states[inputs.places_M // length, inputs.places_M % length]
        logits_MV: Tensor = _head_of(self.masked_lm)(states_MH)
        return logits_MV


def first_of(states: Tensor, batch: Batch) -> Tensor:
    """Return the states of the first tokens [N, H], of states [N, L, H] or, of a packed batch, [1, T, H]."""
    return states[0].index_select(0, batch.first_N) if isinstance(batch, PackedBatch) else states[:, 0]


def with_first(states: Tensor, first_NH: Tensor, batch: Batch) -> Tensor:
    """Put other states of the first tokens in the place of a batch's own; as in `first_of`."""
    if isinstance(batch, PackedBatch):
        return states.index_copy(1, batch.first_N.long(), first_NH[None].to(states.dtype))
    return torch.cat([first_NH[:, None].to(states.dtype), states[:, 1:]], dim=1)


def through_layers(layers: nn.ModuleList, states: Tensor, batch: Batch, backbone: Any) -> Tensor:
    """Run layers over embedded inputs, as the backbone runs its own."""
    more: dict[str, Any] = {}
    mask = None
    if isinstance(batch, PackedBatch):
        register_packed_attention()
        more[KEYWORD] = Layout(batch)
    else:
        mask = create_bidirectional_mask(
            config=backbone.config, inputs_embeds=states, attention_mask=batch["attention_mask"]
        )
    for layer in layers:
        output = layer(states, mask, **more)
        states = output[0] if isinstance(output, tuple) else output
    return states


def ids_of(batch: Batch) -> dict[str, Tensor]:
    """Return what embeddings are looked up by."""
    if isinstance(batch, PackedBatch):
        ids = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        return ids if batch.token_type_ids is None else {**ids, "token_type_ids": batch.token_type_ids}
    return {name: tensor for name, tensor in batch.items() if name != "attention_mask"}


def _head_of(masked_lm: Any) -> Any:
    found = (getattr(masked_lm, name, None) for name in _HEADS)
    return next((head for head in found if isinstance(head, nn.Module)), None)


def _require_bert_like(masked_lm: Any, name: str, section: str) -> nn.ModuleList:
    """Refuse a model whose layers cannot be run as a decoder here; return its layers."""
    kind, backbone = type(masked_lm).__name__, masked_lm.base_model
    layers = getattr(getattr(backbone, "encoder", None), "layer", None)
    reason = ""
    if not isinstance(layers, nn.ModuleList) or getattr(backbone, "embeddings", None) is None:
        reason = "has no list of layers encoder.layer above its embeddings"
    elif beside := [name for name, _ in backbone.encoder.named_parameters() if not name.startswith("layer.")]:
        reason = f"gives its layers more than states and a mask ({beside[0]})"
    elif _head_of(masked_lm) is None:
        reason = f"has its head in none of {' or '.join(_HEADS)}"
    elif not any(parameter.is_meta for parameter in masked_lm.parameters()):
        reason = _differs_by_itself(masked_lm, layers)
    if reason:
        raise ModelError(
            f"{name} is a {kind}, which {reason}: a decoder cannot be made of its layers",
            expected=BERT_LIKE,
            remedy=f"name such a model by {section}.name",
        )
    assert isinstance(layers, nn.ModuleList)
    return layers


@torch.no_grad()
def _differs_by_itself(masked_lm: Any, layers: nn.ModuleList) -> str:
    """Run a model's layers as a decoder's are run, and say how the result differs from its own; empty if not."""
    backbone, (longer, shorter) = masked_lm.base_model, _TRIAL_LENGTHS
    first = 1 + (backbone.config.pad_token_id or 0)
    ids_NL = first + torch.arange(2 * longer).view(2, longer) % (backbone.config.vocab_size - first)
    mask_NL = torch.ones_like(ids_NL)
    ids_NL[1, shorter:], mask_NL[1, shorter:] = backbone.config.pad_token_id or 0, 0
    batch: dict[str, Tensor] = {"input_ids": ids_NL, "attention_mask": mask_NL}
    try:
        own = backbone(**batch)[0]
        ours = through_layers(layers, backbone.embeddings(**ids_of(batch)), batch, backbone)
        predicted = _head_of(masked_lm)(own)
        logits = masked_lm(**batch).logits
    except FORWARD_ERRORS as error:
        return f"cannot run its layers one by one ({reason_of(error)})"
    for what, found, expected in (("states", ours, own), ("predictions", predicted, logits)):
        real = mask_NL.bool()
        if found.shape != expected.shape or not torch.allclose(found[real], expected[real], atol=_TOLERANCE, rtol=1e-3):
            return f"gives other {what} when its layers are run one by one"
    return ""


def _load_decoder(decoder: nn.ModuleList, source: Path, section: str) -> None:
    weights = load_file(source / _DECODER)
    if set(weights) != set(_names(decoder)):
        saved = saved_metadata(source).get("decoder_layers")
        raise ModelError(
            f"{source} has a decoder of {saved} layers, {section}.decoder_layers is {len(decoder)}",
            expected="the decoder that it was trained with",
            remedy=f"set {section}.decoder_layers={saved}; or, to begin with a new decoder, name an export of it",
        )
    decoder.load_state_dict(weights)


def _names(decoder: nn.ModuleList) -> list[str]:
    return [name for name, _ in decoder.named_parameters()]
