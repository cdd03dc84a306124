"""Pseudo-labels without islands, for the methods that have the setting ``largest_component``."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nnunetv2_semi.data.largest_component import largest_components
from nnunetv2_semi.methods.contract import Context


class Islands:
    """Removes islands from hard labels (B, C, *spatial): where ``setting`` is True of each class, where it is None of
    ``Context.connected_classes``, where it is False of none."""

    def __init__(self, setting: bool | None, context: Context) -> None:
        self._classes = context.connected_classes() if setting is None else frozenset()
        self._of_all, self._regions = bool(setting), context.regions

    def removed_from(self, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
        """What is returned gives ``labels`` with 0 where islands were, when it is called.

        The work is the CPU's. What a GPU was given to do between the two calls it does meanwhile.
        """
        if not (self._of_all or self._classes):
            return lambda: labels
        on_gpu = labels.is_cuda
        copied = labels.to(torch.int16).to("cpu", non_blocking=on_gpu)
        done = torch.cuda.Event() if on_gpu else None
        if done is not None:
            done.record()

        def without_islands() -> torch.Tensor:
            if done is not None:
                done.synchronize()
            return largest_components(copied, None if self._of_all else self._classes).to(labels)

        return without_islands

    def note(self) -> str:
        """What is removed, for the log."""
        kind = "region" if self._regions else "label"
        numbers = sorted(channel + 1 if self._regions else label for channel, label in self._classes)
        which = f"every {kind}" if self._of_all else f"no {kind}" if not numbers else \
            f"{kind} {', '.join(map(str, numbers))} (connected in every labelled training case)"
        return f"Islands are removed from pseudo-labels of {which}."
