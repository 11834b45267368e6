"""ICT, the inverse cloze task: a retriever learns to find the document that a sentence was taken from.

Source: Lee et al. 2019 (arXiv 1906.00300), section 4. AR2's retriever starts from it for two of its three data sets
(section 4.2 "First step", by Sachan et al. 2021). What is trained for how long stands in the timetable
(`engine.config.pretrain`).
"""

from __future__ import annotations

from engine.config.pretrain import IctRecipe
from engine.config.timetable import WeightsOf
from engine.data.corpus import Data
from engine.pretrain.cloze import ClozeRates
from engine.pretrain.found import measure_found
from engine.pretrain.phases import contrast_clozes, publish_start, split_of
from engine.run import Run
from engine.training.models import Models


def train(models: Models, data: Data, run: Run) -> None:
    """Pre-train the retriever for some epochs, and measure it before the first and after each."""
    settings = run.recipe(IctRecipe).ict
    rates = ClozeRates(settings.keep, settings.shortest_query)
    split = split_of(data, run)
    run.once("start", publish_start, models, data, split, model="retriever")
    run.once("held_out/0", measure_found, data, split, rates, weights=WeightsOf("retriever", None))
    for epoch in run.iterations():
        run.once(f"ict/{epoch}", contrast_clozes, models, data, split, rates)
        run.once(f"held_out/{epoch}", measure_found, data, split, rates, weights=WeightsOf("retriever", epoch))
