"""A masked language model with a Condenser's head: layers that read an inner layer's states and the last first one.

The head predicts the masked tokens from the states of an inner layer, which hold each token's surroundings, and from
the last layer's first state in place of the inner one's. What the inner states lack it can only know through that one
state, which thus learns to hold the text. After pre-training the encoder alone is kept.

Source: Gao and Callan 2021, "Condenser: a Pre-training Architecture for Dense Retrieval" (arXiv 2104.08253), section 3.

Shapes: N inputs, M masked tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModelError
from engine.models.architecture import recorded_attention
from engine.models.bottleneck import (
    SKIP_FROM,
    BottleneckLM,
    MaskedInputs,
    first_of,
    ids_of,
    through_layers,
    with_first,
)
from engine.models.source import saved_metadata

Predictions = tuple[Tensor, Tensor]
"""Logits at the masked tokens, the encoder's own and the head's: twice [M, V]."""


class CondenserLM(BottleneckLM):
    """A masked language model and the head above its inner and its last states.

    It is built, saved and exported as a bottleneck model, whose decoder is the head here.
    """

    skip_from: int = 0
    """Layer, counted from 1, whose states the head reads; 0 before `load` has set it."""

    @classmethod
    def load(cls, name: str, *, skip_from: int = 6, section: str = "encoder", **settings: Any) -> CondenserLM:
        """Load a masked language model and give it a head, or load what `save` wrote.

        Args:
            name: Hub id, local folder or `package:NAME`.
            skip_from: Layer, counted from 1, whose states the head reads.
            section: The recipe's section, for remedies.
            settings: As in `BottleneckLM.load`; the decoder is the head.

        Raises:
            ModelError: As there; or the model does not have more layers than that; or it was saved with another head.
        """
        model = super().load(name, section=section, **settings)
        assert isinstance(model, CondenserLM)
        layers = len(model.masked_lm.base_model.encoder.layer)
        if not 1 <= skip_from < layers:
            raise ModelError(
                f"{section}.skip_from is {skip_from}, and {name} has {layers} layers",
                expected=f"an inner layer, 1 to {layers - 1}",
                remedy=f"set {section}.skip_from to one, such as {max(1, layers // 2)}",
            )
        if model.skip_from not in (0, skip_from):
            raise ModelError(
                f"{name} has a head that reads states of layer {model.skip_from}, {section}.skip_from is {skip_from}",
                expected="the head that it was trained with",
                remedy=f"set {section}.skip_from={model.skip_from}; or, to begin with a new head, name an export of it",
            )
        model.skip_from = skip_from
        return model

    @classmethod
    def open(cls, folder: Path) -> BottleneckLM:
        """Load what was saved of a bottleneck model, with a Condenser's head or without.

        Raises:
            ModelError: The folder holds another kind of model.
        """
        saved = saved_metadata(folder)
        if SKIP_FROM not in saved:
            return BottleneckLM.open(folder)
        return cls.load(
            str(folder),
            skip_from=saved[SKIP_FROM],
            num_decoder_layers=saved["decoder_layers"],
            attention=recorded_attention(folder),
        )

    def require_own(self, saved: Mapping[str, Any], source: Path, section: str) -> None:
        """Refuse a decoder that is no head, and keep what a head was trained with for `load` to compare.

        Args:
            saved: What was saved beside the weights.
            source: Where.
            section: The recipe's section, for remedies.

        Raises:
            ModelError: It reads embeddings.
        """
        if SKIP_FROM not in saved:
            raise ModelError(
                f"{source} has a decoder that reads embeddings",
                expected="a head, which reads states of an inner layer",
                remedy=f"to begin with a new head, name an export of it by {section}.name",
            )
        self.skip_from = saved[SKIP_FROM]

    def forward(  # type: ignore[override]  # nobody calls it without knowing the kind of model
        self, spans: MaskedInputs, predicts: bool = True
    ) -> tuple[Tensor, Predictions | None]:
        """Compute first states, and predict the masked tokens twice, in one call: under ZeRO-3 it is a collective.

        Args:
            spans: N texts with tokens masked.
            predicts: Whether predictions are asked for; first states are the same without.

        Returns:
            The last layer's first states [N, H] in float32 or a wider type, and the logits at the masked tokens by the
            encoder ("late") and by the head.

        Raises:
            ModelError: It is given packed inputs, and takes none (`packs`).

        Source: Condenser section 3.2; the head's first layers begin as copies of the encoder's last, and not at random.
        """
        batch, backbone = self.form.accepted(spans.batch), self.masked_lm.base_model
        layers = backbone.encoder.layer
        inner = through_layers(layers[: self.skip_from], backbone.embeddings(**ids_of(batch)), batch, backbone)
        late = through_layers(layers[self.skip_from :], inner, batch, backbone)
        first_NH = first_of(late, batch)
        vectors_NH = first_NH if first_NH.dtype == torch.float64 else first_NH.float()
        if not predicts:
            return vectors_NH, None
        condensed = through_layers(self.decoder, with_first(inner, first_NH, batch), batch, backbone)
        return vectors_NH, (self._predict(late, spans), self._predict(condensed, spans))

    def save(
        self,
        folder: Path,
        tokenizer: Any,
        state_dict: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the encoder and its masked-LM head as a Hugging Face folder, and the Condenser's head below it.

        Args:
            folder: Where to; made if needed.
            tokenizer: Saved with the weights.
            state_dict: As in `BottleneckLM.save`.
            metadata: As there.

        Raises:
            ModelError: `state_dict` lacks a weight.
        """
        super().save(folder, tokenizer, state_dict, {**(metadata or {}), SKIP_FROM: self.skip_from})
