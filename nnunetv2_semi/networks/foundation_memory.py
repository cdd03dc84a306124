"""How much memory the training of a foundation model takes, for a planner."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_MIB = 2 ** 20
_PATCH, _WINDOW = 16, 14  # of ViT-B: pixels of a position, positions of a window


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that the training of a network takes.

    weights: parameters and buffers, frozen or not. state: of what trains, the two moments of AdamW and the teacher's
    copy. step: the most that a forward and a backward pass hold besides, gradients included.
    """

    weights: int
    state: int
    step: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.state + self.step


def training_memory(network: nn.Module, shape: Sequence[int], half: bool = True) -> TrainingMemory:
    """The memory of a training step of ``network`` on images of ``shape`` (B, C, *spatial), counted, not allocated.

    The passes run on tensors that have a shape and no memory. What is alive at a time is counted, each storage once:
    what autograd saves, what is computed again, temporary results, gradients, and copies of weights in 16 bits. On a
    processor a real step has the same count. A GPU's kernels may hold less of attention, and cuDNN and the allocator
    take some for themselves.

    Args:
        network: on the CPU, in the mode it trains in; gives one tensor.
        half: with autocast to 16 bits, as nnU-Net trains on GPUs.
    """
    step = _Step(network, half)
    own = {**dict(step.named_parameters()), **dict(step.named_buffers())}
    trained = sum(parameter.nbytes for parameter in network.parameters() if parameter.requires_grad)
    with FakeTensorMode() as fake:
        tensors: dict[str, torch.Tensor] = {name: fake.from_tensor(tensor) for name, tensor in own.items()}
        image, memory = torch.empty(tuple(shape)), LiveMemory()
        with memory:
            functional_call(step, tensors, (image,), tie_weights=True)
    return TrainingMemory(sum(tensor.nbytes for tensor in own.values()), 3 * trained, memory.peak)


def sam_vit_b_memory(image_size: int, batch_size: int, checkpointing: bool) -> TrainingMemory:
    """What `training_memory` gives for SAM's ViT-B with adapters of rank 4, in 16 bits, without a model to count with.

    Per image, in MiB, with N positions (16 pixels a side each), P positions once the grid is padded to whole windows:
    0.174 N + 0.169 P + 2.75e-4 N²; with checkpointing the larger of 0.0866 N + 0.0355 P (a layer with windows is
    computed again) and 0.0496 N + 1.373e-4 N² (a global one is). Fitted to what is counted for 256, 384, 512, 640, 768
    and 1024 pixels and 1, 2 and 4 images, to within 4 %. MiB of a step:

    ==========  =================  ==================
    pixels      1 / 4 images       with checkpointing
    ==========  =================  ==================
    256         366 / 948          67 / 217
    512         928 / 3218         213 / 798
    1024        6320 / 24779       2527 / 10052
    ==========  =================  ==================

    Weights take 346 to 358 MiB besides, the state 43.

    Args:
        image_size: pixels a side of the encoder's input.
        batch_size: images in one pass.
        checkpointing: whether the encoder's layers are computed again for the gradient.
    """
    side = image_size // _PATCH
    positions, padded = side ** 2, (math.ceil(side / _WINDOW) * _WINDOW) ** 2
    if checkpointing:
        fixed = 17.5
        image = max(0.0866 * positions + 0.0355 * padded, 0.0496 * positions + 1.373e-4 * positions ** 2)
    else:
        fixed = 168.0  # nearly all of it the frozen weights in 16 bits
        image = 0.174 * positions + 0.1692 * padded + 2.748e-4 * positions ** 2
    return TrainingMemory(round((345.4 + 0.003 * positions) * _MIB), round(43.4 * _MIB),
                          round((fixed + batch_size * image) * _MIB))


class _Step(nn.Module):
    """Both passes as one module, so that its weights are exchanged for both: parts may be computed again."""

    def __init__(self, network: nn.Module, half: bool) -> None:
        super().__init__()
        self.network, self._autocast = network, half

    def forward(self, image: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            logits = self.network(image)
        logits.float().square().mean().backward()


class LiveMemory(TorchDispatchMode):
    """Within the block, counts the bytes of the storages that operations made and that are still alive.

    live: now. peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        given = {id(tensor.untyped_storage()) for tensor in inputs}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in given:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size
