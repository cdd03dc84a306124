import torch

from nnunetv2_semi.losses.voxel_contrast import Voxels
from nnunetv2_semi.networks.memory_bank import VoxelBank


def voxels(count, start=0.0):
    confidence = start + torch.arange(count) / count
    return Voxels(torch.randn(count, 3).requires_grad_(), torch.arange(count) % 2, confidence)


def test_holds_the_most_confident_of_each_class_of_the_last_steps_detached():
    bank = VoxelBank(steps=2, per_class=3)
    for start in (1.0, 2.0, 3.0):
        bank.add(voxels(20, start))
    held = bank.joined_with(Voxels(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), torch.zeros(0)))
    assert len(bank) == len(held) == 2 * 2 * 3
    assert not held.features.requires_grad
    assert held.confidence.min() >= 2.0 + 14 / 20


def test_what_is_not_finite_is_never_held():
    bank = VoxelBank(steps=2, per_class=10)
    broken = voxels(6)
    features = broken.features.detach().clone()
    features[2] = torch.nan
    bank.add(Voxels(features, broken.classes, torch.full((6,), 0.5).index_fill(0, torch.tensor([4]), torch.inf)))
    assert len(bank) == 4 and bank.joined_with(voxels(1)).features.isfinite().all()


def test_a_checkpoint_carries_it():
    bank, restored = VoxelBank(3, 5), VoxelBank(3, 5)
    bank.add(voxels(8))
    restored.load_state_dict(bank.state_dict())
    one = voxels(1)
    for a, b in zip(vars(bank.joined_with(one)).values(), vars(restored.joined_with(one)).values(), strict=True):
        assert torch.equal(a, b)


def test_without_steps_it_holds_nothing():
    bank = VoxelBank(0, 5)
    bank.add(voxels(8))
    assert len(bank) == 0 and len(bank.joined_with(voxels(4))) == 4
