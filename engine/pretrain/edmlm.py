"""ED-MLM: bottleneck pre-training of an encoder by a masked encoder and a masked decoder, on the corpus alone.

Source: Zhou et al. 2023 (R2ANKER), Appendix C "Retriever Pre-training", which follows Wang et al. 2022 (SimLM), section
3.1: of each document the encoder sees 70 %, the decoder half; each predicts what it does not see, and the decoder has
of the encoder its first state alone. Tokens are masked by [MASK]; SimLM's generator, which replaces tokens by likely
ones, is left out. What is trained for how long stands in the timetable (`engine.config.pretrain`).
"""

from __future__ import annotations

from engine.config.pretrain import EdMlmRecipe
from engine.config.timetable import WeightsOf
from engine.data.corpus import Data
from engine.pretrain.held_out import measure_held_out
from engine.pretrain.masking import MaskRates
from engine.pretrain.phases import publish_start, reconstruct, split_of
from engine.run import Run
from engine.training.models import Models


def train(models: Models, data: Data, run: Run) -> None:
    """Pre-train the encoder for some epochs, and measure it before the first and after each."""
    settings = run.recipe(EdMlmRecipe).edmlm
    rates = MaskRates(settings.encoder_mask, settings.decoder_mask)
    split = split_of(data, run)
    run.once("start", publish_start, models, data, split, model="encoder")
    run.once("held_out/0", measure_held_out, data, split, rates, weights=WeightsOf("encoder", None))
    for epoch in run.iterations():
        run.once(f"edmlm/{epoch}", reconstruct, models, data, split, rates)
        run.once(f"held_out/{epoch}", measure_held_out, data, split, rates, weights=WeightsOf("encoder", epoch))
