"""How some of a method's parameters are optimised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from nnunetv2_semi.schedules import warmed_up_poly

NNUNETS_GRADIENT_CLIP = 12.0
_SETTINGS = ("momentum", "nesterov", "weight_decay")  # of an optimiser, besides what its schedule sets


class WarmedUpPolyLR(LRScheduler):
    """`warmed_up_poly` of the step's number."""

    def __init__(self, optimizer: torch.optim.Optimizer, initial_lr: float, warmup_steps: int, steps: int) -> None:
        self.initial_lr, self.warmup_steps, self.steps = initial_lr, warmup_steps, steps
        super().__init__(optimizer)

    def step(self, epoch: int | None = None) -> None:
        """Set the learning rate of step number ``epoch``, from 0; None: 0."""
        rate = self.initial_lr * warmed_up_poly(epoch or 0, self.warmup_steps, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._last_lr = [rate] * len(self.optimizer.param_groups)


@dataclass(frozen=True)
class Optimization:
    """An optimiser, with what goes with it.

    schedule: of its learning rate, stepped before every "epoch" with its number, or after every training "step" with
    the number of the next one. gradient_clip: largest norm of the gradient of all its parameters; None: not clipped.

    Its state is the optimiser's alone: a schedule follows the number it is stepped with, and the settings of now, as
    nnU-Net's does. So a training that is continued with more epochs, or another learning rate, uses them.
    """

    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    scheduled_every: Literal["epoch", "step"] = "epoch"
    gradient_clip: float | None = NNUNETS_GRADIENT_CLIP

    @classmethod
    def sgd(cls, parameters: Iterable[nn.Parameter], initial_lr: float, weight_decay: float, momentum: float,
            num_epochs: int) -> Optimization:
        """nnU-Net's optimiser and schedule for those of ``parameters`` that train."""
        trainable = [p for p in parameters if p.requires_grad]
        optimizer = torch.optim.SGD(trainable, initial_lr, momentum=momentum, nesterov=momentum > 0,
                                    weight_decay=weight_decay)
        return cls(optimizer, PolyLRScheduler(optimizer, initial_lr, num_epochs))

    def parameters(self) -> list[nn.Parameter]:
        """What it optimises."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, dict]:
        """Of the optimiser."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """What `state_dict` gave, but for what settings say: these are the ones of now."""
        groups = self.optimizer.param_groups
        own = [{name: group[name] for name in _SETTINGS if name in group} for group in groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)
