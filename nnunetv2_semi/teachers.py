"""Networks that average the student over time."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import nn

from nnunetv2_semi.networks.frozen_weights import shared_when_frozen
from nnunetv2_semi.schedules import warmed_up_decay


class Teacher(nn.Module):
    """A copy of a student that gradients never reach and that is always in evaluation mode.

    ``network`` has the student's architecture and is what is called, deployed and saved. Parameters of the student that
    do not train when the teacher is made are shared with it instead of copied: a large frozen encoder exists once.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self._student = (student,)  # in a tuple, so that the student is not a part of the teacher
        self.network = deepcopy(student, shared_when_frozen(student)).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode whatever the method around the teacher is set to."""
        return super().train(False)

    def forward(self, image: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """``image`` (B, C, *spatial) -> the network's logits (a list with deep supervision), without a graph."""
        with torch.no_grad():
            return self.network(image)

    def reset(self) -> None:
        """Take over the student's weights, as at the start of training or after pretrained weights were loaded."""
        self.blend_in(1.0)

    @torch.no_grad()
    def blend_in(self, share: float) -> None:
        """teacher <- teacher + share (student - teacher), one fused call; integer buffers are copied."""
        pairs = [(own, other) for own, other in zip(_tensors(self.network), _tensors(self._student[0]), strict=True)
                 if own is not other]
        floats = [(own, other) for own, other in pairs if own.is_floating_point()]
        others = [(own, other) for own, other in pairs if not own.is_floating_point()]
        if floats:
            torch._foreach_lerp_([o for o, _ in floats], [t for _, t in floats], share)
        for own, other in others:
            own.copy_(other)


class EMATeacher(Teacher):
    """Exponential moving average of the student (Tarvainen and Valpola, NeurIPS 2017).

    decay: after warm-up; the decay of update t is min(1 - 1 / (t + 1), decay).
    """

    def __init__(self, student: nn.Module, decay: float = 0.99) -> None:
        super().__init__(student)
        self.decay = decay
        self.updates = 0

    def update(self) -> None:
        """Average the student in, after an optimiser step."""
        self.blend_in(1.0 - warmed_up_decay(self.updates, self.decay))
        self.updates += 1

    def reset(self) -> None:
        super().reset()
        self.updates = 0

    def get_extra_state(self) -> int:
        return self.updates

    def set_extra_state(self, state: int) -> None:
        self.updates = int(state)  # a list would be the other teacher's


class BestModelAverage(Teacher):
    """Average of the student over its best epochs (Zhang et al., MedIA 2023, released code).

    An epoch whose score is among the ``keep`` best so far is averaged in with weight (d - d_min) / d, where d is its
    score and d_min the lowest of those best. The first epoch is copied.
    """

    def __init__(self, student: nn.Module, keep: int = 6) -> None:
        super().__init__(student)
        self.keep = keep
        self.best: list[float] = []

    def update(self, score: float) -> bool:
        """Average the student in if ``score`` (a Dice, 0 to 1) enters the best; returns whether it did."""
        if score <= 0 or (len(self.best) == self.keep and score <= self.best[-1]):
            return False
        first = not self.best
        self.best = sorted([*self.best, score], reverse=True)[: self.keep]
        self.blend_in(1.0 if first else (score - self.best[-1]) / score)
        return True

    def get_extra_state(self) -> list[float]:
        return self.best

    def set_extra_state(self, state: list[float]) -> None:
        self.best = list(state)


def _tensors(network: nn.Module) -> Iterator[torch.Tensor]:
    yield from network.parameters()
    yield from network.buffers()
