"""Tiny networks and batches, no plans and no files."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn

from nnunetv2_semi.losses.weighted_dice_ce import WeightedDiceCE
from nnunetv2_semi.methods.arrangement import Arrangement
from nnunetv2_semi.methods.contract import Batch, Context


def small_network(channels: int, heads: int, dims: int = 3, deep_supervision: bool = False,
                  dropout: float = 0.0, widths: Sequence[int] = (4, 8, 8)) -> nn.Module:
    conv, norm, drop = {2: (nn.Conv2d, nn.InstanceNorm2d, nn.Dropout2d),
                        3: (nn.Conv3d, nn.InstanceNorm3d, nn.Dropout3d)}[dims]
    return PlainConvUNet(channels, len(widths), list(widths), conv, 3, [1] + [2] * (len(widths) - 1), 1, heads, 1,
                         conv_bias=True, norm_op=norm,
                         norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
                         nonlin_kwargs={"inplace": True}, deep_supervision=deep_supervision,
                         dropout_op=drop if dropout else None, dropout_op_kwargs={"p": dropout} if dropout else None)


def context(channels: int = 2, regions: bool = False, ignore_label: int | None = None, one_pass: bool = False,
            deep_supervision: bool = False, spacing=(3.0, 1.0, 1.0), images_per_pass: int = 1,
            mirror_axes: tuple[int, ...] = (0, 1), connected_classes=frozenset(),
            turned_in_plane: bool = False, masked_channels: tuple[int, ...] = ()) -> Context:
    if regions:
        loss: nn.Module = DC_and_BCE_loss({}, {"batch_dice": False, "do_bg": True, "smooth": 1e-5},
                                          use_ignore_label=ignore_label is not None,
                                          dice_class=MemoryEfficientSoftDiceLoss)
    else:
        loss = DC_and_CE_loss({"batch_dice": False, "do_bg": False, "smooth": 1e-5}, {}, ignore_label=ignore_label,
                              dice_class=MemoryEfficientSoftDiceLoss)
    if deep_supervision:
        loss = DeepSupervisionWrapper(loss, [0.7, 0.3])
    modalities = {f"m{i}": [i] for i in range(channels)}
    weights = (0.7, 0.3) if deep_supervision else (1.0,)
    return Context(supervised_loss=loss, weighted_loss=WeightedDiceCE(regions, weights, batch_dice=False),
                   regions=regions, ignore_label=ignore_label, spacing=spacing, modalities=modalities,
                   arrangement=Arrangement(one_pass, images_per_pass), scale_weights=weights, patch_size=(8, 8, 8),
                   image_size=(8.0, 8.0, 8.0), num_channels=channels, num_heads=3, training_cases=lambda: iter(()),
                   mirror_axes=mirror_axes, rotation=0.5, turned_in_plane=turned_in_plane,
                   masked_channels=masked_channels, connected_classes=lambda: frozenset(connected_classes))


def with_batch_dice(given: Context, ddp: bool) -> Context:
    """With Dice of all patches together, those of other processes too, as nnU-Net has it in 2D."""
    loss = DC_and_CE_loss({"batch_dice": True, "do_bg": False, "smooth": 1e-5, "ddp": ddp}, {},
                          dice_class=MemoryEfficientSoftDiceLoss)
    return replace(given, supervised_loss=loss,
                   weighted_loss=WeightedDiceCE(False, given.scale_weights, batch_dice=True, ddp=ddp))


def random_batch(channels: int = 2, heads: int = 3, dims: int = 3, size: int = 8, count: int = 2, regions: bool = False,
                 ignore_label: int | None = None, deep_supervision: bool = False, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (size,) * dims
    labelled, unlabelled = (torch.randn(count, channels, *shape, generator=generator) for _ in range(2))
    if regions:
        target = torch.rand(count, heads, *shape, generator=generator) > 0.5
        if ignore_label is not None:
            target = torch.cat([target, torch.rand(count, 1, *shape, generator=generator) > 0.8], 1)
    else:
        target = torch.randint(0, heads, (count, 1, *shape), generator=generator).to(torch.int16)
        if ignore_label is not None:
            target[torch.rand(target.shape, generator=generator) > 0.8] = ignore_label
    if deep_supervision:
        return Batch(labelled, [target, target[(slice(None), slice(None), *[slice(None, None, 2)] * dims)]], unlabelled)
    return Batch(labelled, target, unlabelled)


def mixed_by_hand(inside: torch.Tensor, patches: torch.Tensor, partners: torch.Tensor | None = None) -> torch.Tensor:
    """Patch k with what partner k shows in the box ``inside``[k]; default: with what patch k + 1 shows."""
    partners = torch.stack([patches[(k + 1) % len(patches)] for k in range(len(patches))]) \
        if partners is None else partners
    box = inside.to(torch.float64)
    return (partners * box + patches * (1 - box)).to(patches.dtype)


def same_gradients(first: torch.Tensor, second: torch.Tensor, network: nn.Module, tolerance: float = 1e-5) -> bool:
    """Whether two scalars have the same gradient, other than none, with respect to the network's weights."""
    weights = [p for p in network.parameters() if p.requires_grad]
    pairs = list(zip(*(torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
                       for value in (first, second)), strict=True))
    return any(g.abs().max() > 10 * tolerance for g, _ in pairs) and \
        all(torch.allclose(a, b, rtol=1e-3, atol=tolerance) for a, b in pairs)


@pytest.fixture
def small():
    """The builders and helpers above."""
    return SimpleNamespace(network=small_network, context=context, batch=random_batch, mixed=mixed_by_hand,
                           same_gradients=same_gradients)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
