"""The area-similarity contrast, ours against the broadcast form: time, memory, and equality of value and gradient.

The broadcast form compares every area with every other by a tensor of areas x areas x channels x voxels, as the paper's
released code does (Zhang et al., Medical Image Analysis 83, 2023, 102656).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from measuring import Allocations, alternately, machine, table

from nnunetv2_semi.losses.area_similarity import area_similarity_contrast

_EPS = 1e-6


def broadcast_contrast(areas_first: torch.Tensor, areas_second: torch.Tensor) -> torch.Tensor:
    """L_ASC of two (B, C, *spatial) tensors, written as the equation reads."""
    areas = torch.cat([areas_first, areas_second]).flatten(1)
    count, pairs = len(areas_first), (len(areas), len(areas), areas.shape[1])
    own, other = areas[:, None].expand(pairs), areas[None].expand(pairs)
    squares = areas.square().sum(-1)  # once per area, in favour of this form
    similarity = ((2 * (own * other).sum(-1) + _EPS) / (squares[:, None] + squares[None] + _EPS)).exp()
    not_itself = ~torch.eye(len(areas), dtype=torch.bool)
    ratios = [similarity[i, (i + count) % (2 * count)] / similarity[i][not_itself[i]].sum() for i in range(2 * count)]
    return -torch.stack(ratios).log().mean()


def gradient_of(contrast: Callable, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Value, and gradient with regard to ``first`` and ``second`` together."""
    first, second = first.clone().requires_grad_(), second.clone().requires_grad_()
    value = contrast(first, second)
    value.backward()
    assert first.grad is not None and second.grad is not None
    return value.detach(), torch.cat([first.grad, second.grad])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--areas", type=int, default=64, help="areas of both modalities together (default: 64)")
    parser.add_argument("--channels", type=int, default=3, help="foreground classes (default: 3)")
    parser.add_argument("--side", type=int, default=128, help="of the square areas, pixels (default: 128)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, both forms in each (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.manual_seed(arguments.seed)
    shape = (arguments.areas // 2, arguments.channels, arguments.side, arguments.side)
    first, second = torch.rand(shape), torch.rand(shape)
    forms = {"ours": area_similarity_contrast, "broadcast": broadcast_contrast}
    times = alternately({name: lambda form=form: gradient_of(form, first, second) for name, form in forms.items()},
                        arguments.rounds)
    memory = {}
    for name, form in forms.items():
        with Allocations() as memory[name]:
            gradient_of(form, first, second)
    print(f"{machine()}, {arguments.areas} areas of {' x '.join(map(str, shape[1:]))}, float32, "
          f"{arguments.rounds} rounds, seed {arguments.seed}; forward and backward pass\n")
    ours = times["ours"]
    print(table(["form", "wall time", "CPU time", "peak memory", "largest tensor"],
                [[name, f"{times[name].wall / ours.wall:.1f} x", f"{times[name].cpu / ours.cpu:.1f} x",
                  f"{memory[name].peak / 2**20:.1f} MiB", f"{memory[name].largest / 2**20:.1f} MiB"]
                 for name in forms]))
    pairs_bytes = arguments.areas ** 2 * first[0].numel() * 4
    print(f"\nA tensor of areas x areas x voxels has {pairs_bytes / 2**20:.1f} MiB; the areas themselves have "
          f"{2 * first.numel() * 4 / 2**20:.1f} MiB.")
    equal, naive = (gradient_of(form, first.double(), second.double()) if arguments.areas <= 16 else
                   gradient_of(form, first[:8].double(), second[:8].double()) for form in forms.values())
    relative = ((equal[1] - naive[1]).abs().max() / naive[1].abs().max()).item()
    print(f"Equality (float64, at most 16 areas): values differ by {(equal[0] - naive[0]).abs().item():.1e}, "
          f"gradients by {relative:.1e} of the largest entry.")


if __name__ == "__main__":
    main()
