"""coCondenser: an encoder's first state is made to hold a text, and to be near that of another span of its document.

Source: Gao and Callan 2021 (arXiv 2104.08253) and 2022 (arXiv 2108.05540). AR2's retriever starts from it for one of
its three data sets (section 4.2 "First step"), R2ANKER's dense retriever for its one. What is trained for how long
stands in the timetable (`engine.config.pretrain`).
"""

from __future__ import annotations

from engine.config.pretrain import CoCondenserRecipe
from engine.config.timetable import WeightsOf
from engine.data.corpus import Data
from engine.pretrain.condensed import measure_condensed
from engine.pretrain.phases import condense, publish_start, split_of
from engine.pretrain.spans import SpanRates
from engine.run import Run
from engine.training.models import Models


def train(models: Models, data: Data, run: Run) -> None:
    """Pre-train the encoder for some epochs, and measure it before the first and after each."""
    settings = run.recipe(CoCondenserRecipe).cocondenser
    rates = SpanRates(settings.mask, settings.shortest_span)
    split = split_of(data, run)
    run.once("start", publish_start, models, data, split, model="encoder")
    run.once("held_out/0", measure_condensed, data, split, rates, weights=WeightsOf("encoder", None))
    for epoch in run.iterations():
        run.once(f"cocondenser/{epoch}", condense, models, data, split, rates)
        run.once(f"held_out/{epoch}", measure_condensed, data, split, rates, weights=WeightsOf("encoder", epoch))
