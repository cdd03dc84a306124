"""How the forward passes of a training step are arranged: joined to one, or one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from nnunetv2_semi.methods.settings import Settings

Images = torch.Tensor | Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Arrangement:
    """One pass for all images of a step is faster; one after another needs the memory of one.

    one_pass: join the passes of a step, and differentiate all its terms at once. images_per_pass: where they are not
    joined and a term needs the outputs of several at once, so many images go through the network together.
    """

    one_pass: bool = False
    images_per_pass: int = 1

    @classmethod
    def of(cls, settings: Settings, passes: int) -> Arrangement:
        """What ``settings`` ask for, of a method that holds so many forward passes at once when they are joined."""
        if settings.arrangement == "auto":
            return cls(passes <= settings.planned_graphs, settings.planned_graphs)
        return cls(settings.arrangement == "one_pass")

    def passes(self, network: Callable[[torch.Tensor], Any], *images: Images, together: bool = False,
               alone: int = 0) -> Iterator[Any]:
        """What the network gives for each of ``images``: in one pass, or each pass when it is asked for.

        Args:
            network: called with tensors (B, C, *spatial).
            images: of one term or group of terms each; or a function that makes them, called when their pass begins.
            together: a term needs the outputs of all of them at once. Where one pass has no room, as many images go
                through at a time as the plan has room for, and each pass is checkpointed: no more than one is held in
                memory at any time.
            alone: of the first so many images this does not hold.
        """
        joins = joins_batches(next(image.device for image in images if isinstance(image, torch.Tensor)))
        if self.one_pass and not joins:  # the passes of all images are held side by side instead of joined
            yield from [network(_made(image)) for image in images]
            return
        if self.one_pass:
            yield from _joined(network, images)
            return
        alone = alone if together else len(images)
        for image in images[:alone]:
            yield network(_made(image))
        recomputed = partial(checkpoint, network, use_reentrant=False)
        at_once = self.images_per_pass if joins else 1
        for first in range(alone, len(images), at_once):
            yield from _joined(recomputed, images[first:first + at_once])


def joins_batches(device: torch.device) -> bool:
    """Whether one large batch is faster than several small ones: not on a processor."""
    return device.type != "cpu"


def _made(images: Images) -> torch.Tensor:
    return images if isinstance(images, torch.Tensor) else images()


def _joined(network: Callable[[torch.Tensor], Any], images: Sequence[Images]) -> Iterator[Any]:
    """One pass for all ``images``; what it gives (a tensor, or tensors nested in lists and tuples) in parts."""
    made = [_made(image) for image in images]
    if len(made) == 1:
        yield network(made[0])
    else:
        yield from _split(network(torch.cat(made)), [len(image) for image in made])


def _split(output: Any, sizes: list[int]) -> list[Any]:
    if isinstance(output, torch.Tensor):
        return list(output.split(sizes))
    return [type(output)(part) for part in zip(*(_split(single, sizes) for single in output), strict=True)]
