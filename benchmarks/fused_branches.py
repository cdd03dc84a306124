"""Memory and time of one encoder per modality, fused, against one network that sees all modalities as channels.

A forward and a backward pass of nnU-Net's loss-free logits, deep supervision on, as Fusion's labelled pass runs them:
nnU-Net's network; two encoders, fused; the same with attention; the same with the light decoders of each modality.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from measuring import Allocations, alternately, machine, table
from torch import nn

from nnunetv2_semi.networks.fused_network import FusedNetwork, attention_scales

_OPERATIONS: dict[int, tuple] = {2: (nn.Conv2d, nn.InstanceNorm2d), 3: (nn.Conv3d, nn.InstanceNorm3d)}
STOCK = "one network, modalities as channels"


def network(channels: int, dims: int, features: int, stages: int) -> PlainConvUNet:
    """nnU-Net's network of ``stages`` stages, of which the first has ``features`` channels."""
    conv, norm = _OPERATIONS[dims]
    largest = 512 if dims == 2 else 320
    widths = [min(features * 2 ** stage, largest) for stage in range(stages)]
    return PlainConvUNet(channels, stages, widths, conv, 3, [1] + [2] * (stages - 1), 2, 4, 2, conv_bias=True,
                         norm_op=norm, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
                         nonlin_kwargs={"inplace": True}, deep_supervision=True)


def forms(modalities: int, patch: Sequence[int], features: int, stages: int,
          tokens: int) -> dict[str, Callable[[torch.Tensor], list]]:
    """Name -> what a training step calls; all outputs in one list."""
    dims = len(patch)
    channels = {f"m{index}": [index] for index in range(modalities)}

    def fused(scales: Sequence[int]) -> FusedNetwork:
        return FusedNetwork({name: network(1, dims, features, stages) for name in channels}, channels, scales, 4, 0.1)
    scales = attention_scales([[1] * dims] + [[2] * dims] * (stages - 1), patch, modalities, tokens)
    plain, attending = fused([]), fused(scales)

    def with_light_decoders(image: torch.Tensor) -> list:
        logits, each = attending.core(image, each=True)
        return [*logits, *each]
    return {STOCK: network(modalities, dims, features, stages), f"{modalities} encoders, fused": plain,
            f"the same, attention at {len(scales)} scale{'s' if len(scales) > 1 else ''}": attending,
            "the same, light decoders": with_light_decoders}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, nargs="+", default=(64, 64, 64), help="voxels per axis")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--modalities", type=int, default=2)
    parser.add_argument("--features", type=int, default=16, help="of the first stage (default: 16; nnU-Net's: 32)")
    parser.add_argument("--stages", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048, help='"attention_tokens" (default: 2048)')
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.manual_seed(arguments.seed)
    image = torch.randn(arguments.batch_size, arguments.modalities, *arguments.patch)

    def step(form: Callable[[torch.Tensor], list]) -> Callable[[], None]:
        return lambda: sum(logits.square().mean() for logits in form(image)).backward()  # type: ignore[union-attr]
    steps = {name: step(form) for name, form in forms(arguments.modalities, arguments.patch, arguments.features,
                                                      arguments.stages, arguments.tokens).items()}
    times = alternately(steps, arguments.rounds)
    peaks = {}
    for name, run in steps.items():
        with Allocations() as memory:
            run()
        peaks[name] = memory.peak
    print(f"{machine()}, patch {' x '.join(map(str, arguments.patch))}, batch {arguments.batch_size}, "
          f"{arguments.modalities} modalities, {arguments.features} features, {arguments.stages} stages, float32, "
          f"{arguments.rounds} rounds, seed {arguments.seed}\n")
    print(table(["forward and backward pass", "time", "CPU time", "peak memory"],
                [[name, times[name].wall / times[STOCK].wall, times[name].cpu / times[STOCK].cpu,
                  peaks[name] / peaks[STOCK]] for name in steps]))


if __name__ == "__main__":
    main()
