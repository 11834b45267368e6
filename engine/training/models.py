"""The models of a recipe in training, by name: each in an engine of its own, with its checkpoints.

At most one of them occupies the device at a time. On a CPU there is nowhere else to be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from engine.errors import ConfigError
from engine.models.ranker import Ranker
from engine.run import Run
from engine.training.backend import TrainedModel
from engine.training.checkpoint import Checkpoints
from engine.training.resume import checkpoints_of, reopen_lost_stages


@dataclass(frozen=True)
class Models:
    """Engines and checkpoints.

    Attributes:
        engines: By the models' names.
        checkpoints: By the models' names.
    """

    engines: Mapping[str, TrainedModel]
    checkpoints: Mapping[str, Checkpoints]

    @classmethod
    def open(cls, run: Run, modules: Mapping[str, nn.Module]) -> Models:
        """Give each model its DeepSpeed engine and bring it to where its newest checkpoint is. A collective.

        Args:
            run: For the settings and the checkpoints.
            modules: By name, on the CPU, in float32.

        Raises:
            ArtifactError: There are checkpoints of a model, but none is whole; or the newest is of another model.
        """
        models = cls(
            {name: _engine(run, name, module) for name, module in modules.items()}, checkpoints_of(run, modules)
        )
        for name, engine in models.engines.items():
            position = models.checkpoints[name].restore(engine)
            reopen_lost_stages(run, name, position.number if position else 0)
        models.rest(*models.engines)
        return models

    @contextlib.contextmanager
    def training(self, name: str) -> Iterator[TrainedModel]:
        """Keep one model on the device while the body trains it; afterwards all are offloaded."""
        self.rest(*(other for other in self.engines if other != name))
        self.engines[name].reload()
        yield self.engines[name]
        self.rest(name)

    def rest(self, *names: str) -> None:
        """Offload models that are not trained now, so that encoding and the others have the device."""
        for name in names:
            if self.engines[name].device.type != "cpu":
                self.engines[name].offload()


def _engine(run: Run, name: str, module: nn.Module) -> TrainedModel:
    phases = run.timetable.phases_of(name)
    if not phases:
        raise ConfigError(f"no phase of the recipe trains the model {name}", remedy=f"leave the section {name} out")
    # Apart only where some phase asks for it: a group more flattens weights in another order under ZeRO.
    apart = any(phase.optim.head_lr_scale != 1 for phase in phases)
    head = module.head_names if apart and isinstance(module, Ranker) else ()
    return TrainedModel(name, module, run.config.models[name], phases[0].optim, head)
