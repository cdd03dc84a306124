"""The voxel contrast, ours against the direct form: time, memory, and equality of value and gradient.

The direct form gathers N negatives for every single voxel, as the definition reads and as the paper's released code
does (Zhao et al., RCPS, IEEE JBHI 2023): a tensor of voxels x negatives x channels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from measuring import Allocations, alternately, machine, table

from nnunetv2_semi.losses.voxel_contrast import Voxels, unit_rows, voxel_contrast

_TEMPERATURE = 0.1


def direct_contrast(view_1: torch.Tensor, view_2: torch.Tensor, classes: torch.Tensor, negatives: Voxels,
                    number: int) -> torch.Tensor:
    """L_bc = L_c(view_1, view_2) + L_c(view_2, view_1) of (V, C) features, with negatives of its own for each voxel."""
    return sum((direct_direction(anchors, positives, classes, negatives, number)
                for anchors, positives in ((view_1, view_2), (view_2, view_1))), start=view_1.new_zeros(()))


def direct_direction(anchors: torch.Tensor, positives: torch.Tensor, classes: torch.Tensor, negatives: Voxels,
                     number: int) -> torch.Tensor:
    """Mean of -log( exp(u.v / tau) / (exp(u.v / tau) + sum_n exp(u.u-_n / tau)) ), u.v the cosine of u and v."""
    other_class = negatives.classes[None] != classes[:, None]  # (voxels, candidates)
    confidence = negatives.confidence[None].expand_as(other_class).masked_fill(~other_class, -1)
    chosen = negatives.features[confidence.topk(number, dim=1).indices]  # (voxels, negatives, channels)
    similar = (F.cosine_similarity(anchors, positives, dim=1) / _TEMPERATURE).exp()
    others = (F.cosine_similarity(anchors[:, None], chosen, dim=2) / _TEMPERATURE).exp()
    return -(similar / (similar + others.sum(1))).log().mean()


def gradient_of(form: Callable, maps: Sequence[torch.Tensor], classes: torch.Tensor, pool: tuple,
                number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Value, and gradient with regard to the feature maps together."""
    leaves = [single.clone().requires_grad_() for single in maps]
    rows = [unit_rows(leaf) for leaf in leaves]
    value = form(rows[0], rows[1], classes, Voxels(rows[2], *pool), number)
    value.backward()
    return value.detach(), torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(28, 28, 20), help="of the feature map, voxels")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--negatives", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=1, help="timed rounds, both forms in each (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.manual_seed(arguments.seed)
    voxels = torch.Size(arguments.shape).numel()
    maps = [torch.randn(1, arguments.channels, *arguments.shape) for _ in range(3)]
    classes, pool_classes = (torch.randint(0, arguments.classes, (voxels,)) for _ in range(2))
    pool = (pool_classes, torch.rand(voxels))
    forms = {"ours": voxel_contrast, "direct": direct_contrast}
    run = {name: lambda form=form: gradient_of(form, maps, classes, pool, arguments.negatives)
           for name, form in forms.items()}
    memory, results = {}, {}
    for name in forms:
        with Allocations() as memory[name]:
            results[name] = run[name]()
    times = alternately(run, arguments.rounds, warm_up=False)
    print(f"{machine()}, {torch.get_num_threads()} threads, feature map {' x '.join(map(str, arguments.shape))}, "
          f"{arguments.channels} channels, {arguments.classes} classes, {arguments.negatives} negatives, float32, "
          f"{arguments.rounds} rounds, seed {arguments.seed}; forward and backward pass\n")
    ours = times["ours"]
    print(table(["form", "wall time", "CPU time", "peak memory", "largest tensor", "loss"],
                [[name, f"{times[name].wall / ours.wall:.0f} x", f"{times[name].cpu / ours.cpu:.0f} x",
                  f"{memory[name].peak / 2**20:.0f} MiB", f"{memory[name].largest / 2**20:.0f} MiB",
                  f"{results[name][0].item():.6f}"] for name in forms]))
    (value, gradient), (direct, naive) = results["ours"], results["direct"]
    relative = (gradient - naive).abs().max() / naive.abs().max()
    print(f"\nEquality: values differ by {abs(value - direct).item():.1e}, gradients by {relative.item():.1e} of the "
          "largest entry.")


if __name__ == "__main__":
    main()
