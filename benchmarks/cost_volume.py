"""The cost volume, ours against a loop over shifts: time, memory, and equality of values and gradients.

The loop shifts the source once per shift, multiplies it with the target and averages over channels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from measuring import Allocations, alternately, machine, table

from nnunetv2_semi.networks.cost_volume import cost_volume

Form = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def looped_cost_volume(target: torch.Tensor, source: torch.Tensor, radius: int) -> torch.Tensor:
    """mean_c target(x) source(x + k), one shift k after the other."""
    sizes = target.shape[2:]
    padded = F.pad(source, (radius,) * 2 * len(sizes))
    costs = []
    for shift in product(range(2 * radius + 1), repeat=len(sizes)):
        shifted = padded
        for axis, (begin, size) in enumerate(zip(shift, sizes, strict=True), 2):
            shifted = shifted.narrow(axis, begin, size)
        costs.append((target * shifted).mean(1))
    return torch.stack(costs, 1)


def value_of(form: Form, features: torch.Tensor, radius: int) -> torch.Tensor:
    """Without a graph. features: (2, B, C, *spatial), of target and source."""
    with torch.no_grad():
        return form(features[0], features[1], radius)


def gradient_of(form: Form, features: torch.Tensor, radius: int, upstream: torch.Tensor) -> torch.Tensor:
    """Gradient with regard to both feature maps together."""
    leaf = features.clone().requires_grad_()
    form(leaf[0], leaf[1], radius).backward(upstream)
    assert leaf.grad is not None
    return leaf.grad


def on_device(function: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """``function``, returning when the device is done."""
    def finished() -> torch.Tensor:
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result
    return finished


def peak_memory(function: Callable[[], torch.Tensor], device: torch.device) -> tuple[int, torch.Tensor]:
    """Most bytes that ``function`` holds at once, its result among them; and this result."""
    if device.type != "cuda":
        with Allocations() as memory:
            result = function()
        return memory.peak, result
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    return torch.cuda.max_memory_allocated(device) - before, result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs="+", default=(48, 48, 48), help="of the feature maps, voxels")
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--radius", type=int, default=2, help="of the shifts, voxels (default: 2)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, both forms in each (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.manual_seed(arguments.seed)
    device, radius = arguments.device, arguments.radius
    features = torch.randn(2, 1, arguments.channels, *arguments.shape).to(device)
    shifts = (2 * radius + 1) ** len(arguments.shape)
    upstream = torch.randn(1, shifts, *arguments.shape).to(device)
    forms: dict[str, Form] = {"ours": cost_volume, "loop": looped_cost_volume}
    forward = {name: on_device(lambda form=form: value_of(form, features, radius), device)
               for name, form in forms.items()}
    both = {name: on_device(lambda form=form: gradient_of(form, features, radius, upstream), device)
            for name, form in forms.items()}
    memory, results = {}, {}
    for name in forms:
        (of_value, value), (of_gradient, gradient) = (peak_memory(run[name], device) for run in (forward, both))
        memory[name], results[name] = (of_value, of_gradient), (value, gradient)
    times = [alternately(run, arguments.rounds, warm_up=False) for run in (forward, both)]
    print(f"{machine()}, {torch.get_num_threads()} threads, {device.type}, feature maps "
          f"{' x '.join(map(str, arguments.shape))}, {arguments.channels} channels, {shifts} shifts, float32, "
          f"{arguments.rounds} rounds, seed {arguments.seed}\n")
    header = ["form", *(f"{passes}: {what}" for passes in ("forward", "forward and backward")
                        for what in ("wall time", "CPU time", "peak memory"))]
    cells = [[name, *(cell for of, peak in zip(times, memory[name], strict=True)
                      for cell in (f"{of[name].wall / of['ours'].wall:.1f} x", f"{of[name].cpu / of['ours'].cpu:.1f} x",
                                   f"{peak / 2**20:.0f} MiB"))] for name in forms]
    print(table(header, cells))
    differences = [((ours - loop).abs().max() / loop.abs().max()).item()
                   for ours, loop in zip(results["ours"], results["loop"], strict=True)]
    print(f"\nEquality: values differ by {differences[0]:.1e}, gradients by {differences[1]:.1e} of the largest entry.")


if __name__ == "__main__":
    main()
