"""What several processes must agree on. Without DDP every function here does the obvious thing alone.

Gradients are averaged once, after all passes of a step, instead of through DistributedDataParallel: a step has several
passes, several networks and skipped terms, and this way every process makes the same one collective whatever happened.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

_PATIENCE = timedelta(days=7)  # with which processes wait for the first one

Result = TypeVar("Result")
Item = TypeVar("Item", bound=Hashable)


def is_distributed() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """``values`` summed over all processes; every process must call it."""
    if is_distributed():
        values = values.clone()
        dist.all_reduce(values)
    return values


def all_agree(condition: bool, device: torch.device) -> bool:
    """Whether ``condition`` holds on every process."""
    if not is_distributed():
        return condition
    failures = torch.tensor(0.0 if condition else 1.0, device=device)
    dist.all_reduce(failures)
    return failures.item() == 0


def shares_of_patches(numbers: Sequence[int], device: torch.device) -> Sequence[float] | torch.Tensor:
    """What to multiply means over so many patches by, so that their mean over processes is that of all patches.

    Every process must call it, with as many numbers. One of no patch gets 0.
    """
    if not is_distributed():
        return [float(number > 0) for number in numbers]
    own = torch.tensor(numbers, dtype=torch.float32, device=device)
    return own * dist.get_world_size() / sum_over_processes(own).clamp_min(1)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Mean of the gradients over all processes, in one collective a data type; a missing gradient counts as zero."""
    if not is_distributed():
        return
    by_type: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_type.values():
        joined = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(joined)
        joined /= dist.get_world_size()
        parts = joined.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def rows_of_all_processes(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` (N, ...) of every process, in the order of the processes; N may differ.

    Gradients go back to the process that a row is from. Every process must call it, and, where gradients are asked for,
    differentiate what comes of it.
    """
    return _Gathered.apply(rows) if is_distributed() else rows


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
        counts = [int(size) for size in sizes]
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[:len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        first = sum(counts[:dist.get_rank()])
        ctx.own = slice(first, first + len(rows))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.own]


def broadcast_from_first(module: nn.Module) -> None:
    """Every process takes the first one's parameters and buffers."""
    if is_distributed():
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), 0)


def on_first_process(work: Callable[[], Result]) -> Result:
    """Run ``work``, which may take hours, on the first process alone; all processes get its result, or raise its error.
    """
    if not is_distributed():
        return work()
    # In nnU-Net's own group those who wait for ten minutes would be stopped.
    patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(patient, dist.ProcessGroup)  # every process is in it
    outcome: list[object] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:  # carried to the other processes, which would wait for ever otherwise
            outcome[1] = error
    dist.broadcast_object_list(outcome, 0, group=patient)
    dist.destroy_process_group(patient)
    if isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


def shared_out(items: Sequence[Item], work: Callable[[Item], Result]) -> dict[Item, Result]:
    """What ``work`` gives for each of ``items``, of which each process does a part; all processes get all of it."""
    if not is_distributed():
        return {item: work(item) for item in items}
    own = {item: work(item) for item in items[dist.get_rank()::dist.get_world_size()]}
    gathered: list[dict[Item, Result]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    return {item: result for single in gathered for item, result in single.items()}


def mean_over_processes(values: dict[str, float]) -> dict[str, float]:
    """Mean of each named value over the processes that have it."""
    if not is_distributed():
        return values
    gathered: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, values)
    names = dict.fromkeys(name for single in gathered for name in single)
    return {name: sum(s[name] for s in gathered if name in s) / sum(name in s for s in gathered) for name in names}
