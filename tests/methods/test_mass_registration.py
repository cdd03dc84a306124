"""What MASS learns, by its own losses alone, on phantoms whose displacement is known."""

from dataclasses import replace

import pytest
import torch

from nnunetv2_semi.data.phantom_anatomy import make_phantom_case
from nnunetv2_semi.data.whole_case import WholeCase
from nnunetv2_semi.methods.contract import Batch
from nnunetv2_semi.methods.mass import MASS, MASSSettings
from nnunetv2_semi.networks.atlas_network import AtlasNetwork
from nnunetv2_semi.networks.atlases import Atlases
from nnunetv2_semi.networks.warp import folded_share, resize_displacement, warp
from nnunetv2_semi.present_channels import fill_absent
from nnunetv2_semi.training.step import TrainingStep

SIZE = (24, 32, 24)
NAMES = {"CT": [0], "MR": [1]}
STEPS = 300
WIDTHS = (16, 32, 32, 32)  # of the network's stages
LARGEST = 4.0  # voxels


def smooth_field(generator):
    """A random smooth displacement (1, 3, *SIZE) of up to LARGEST voxels."""
    coarse = torch.randn(1, 3, 3, 3, 3, generator=generator)
    field = resize_displacement(coarse, SIZE)
    return field * (LARGEST / field.abs().max())


def phantom(number, modality):
    """Image (1, 2, *SIZE) of one modality, z-scored, and its labels (1, 1, *SIZE)."""
    case = make_phantom_case(number, SIZE, 2, 0)
    image = torch.stack([torch.from_numpy(single).float() for single in case.images])[None]
    image = (image - image.mean((2, 3, 4), keepdim=True)) / image.std((2, 3, 4), keepdim=True)
    present = torch.tensor([[index == modality for index in range(2)]])
    return fill_absent(image, present), torch.from_numpy(case.segmentation.astype("int16"))[None, None]


def moved(image, labels, field, modality):
    present = torch.tensor([[index == modality for index in range(2)]])
    return fill_absent(warp(image, field), present), warp(labels.float(), field, "nearest").to(torch.int16)


@pytest.mark.slow
def test_a_known_smooth_displacement_is_recovered_inside_structures(small):
    torch.manual_seed(0)
    settings = MASSSettings(modalities=NAMES, skip_finest=1, contrast_weight=0.0, ramp_fraction=0.0)
    heads = 1 + int(phantom(0, 0)[1].max())
    networks = {name: small.network(1, heads, widths=WIDTHS) for name in NAMES}
    student = AtlasNetwork(networks, NAMES, Atlases(heads, False), 3)
    atlases = [phantom(number, number % 2) for number in range(2)]
    cases = [WholeCase(f"atlas_{number}", image[0], labels[0], [number % 2])
             for number, (image, labels) in enumerate(atlases)]
    context = replace(small.context(2), patch_size=SIZE, num_heads=heads, training_cases=lambda: iter(cases))
    method = MASS(student, settings, context)
    method.on_start()
    optimizer = torch.optim.Adam(method.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    step = TrainingStep(method, [(optimizer, schedule)], None, torch.device("cpu"), seed=0, rank=0,
                        max_skipped_steps=5)
    generator = torch.Generator().manual_seed(1)
    for number in range(STEPS):
        batches = [[moved(*atlases[m], smooth_field(generator), m) for m in range(2)] for _ in range(2)]
        labelled, unlabelled = ([torch.cat(parts) for parts in zip(*pairs, strict=True)] for pairs in batches)
        step.run(Batch(labelled[0], labelled[1], unlabelled[0]), number, number / STEPS)

    generator = torch.Generator().manual_seed(99)
    errors, befores = [], []
    with torch.no_grad():
        for modality, (image, labels) in enumerate(atlases):
            for _ in range(8):
                field = smooth_field(generator)
                target, target_labels = moved(image, labels, field, modality)
                source = student.atlases.of_modality(modality)
                found = student.displacement(student.encoders(target),
                                             student.encoders(student.atlases.image(source)), SIZE)
                inside = target_labels[:, 0] > 0
                errors.append((found - field).norm(dim=1)[inside])
                befores.append(field.norm(dim=1)[inside])
                assert folded_share(found) < 0.005
    error, before = (float(torch.cat(parts).mean()) for parts in (errors, befores))
    print(f"error {error:.2f} voxels, was {before:.2f}")
    assert error < 1 < before
