import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunetv2_semi.losses.weighted_dice_ce import WeightedDiceCE

SCALES = (0.6, 0.3, 0.1)
KINDS = pytest.mark.parametrize("regions, spatial, batch_dice", [
    (False, (8, 4), False), (False, (8, 4), True), (True, (8, 4), False), (True, (4, 8, 4), True),
    (False, (4, 8, 4), False)])


def drawn(regions=False, spatial=(8, 4), classes=3, dtype=torch.float64, scales=3):
    """Outputs of a network at three scales, labels, and the weight of each."""
    generator = torch.Generator().manual_seed(0)
    shapes = [tuple(size // 2 ** scale for size in spatial) for scale in range(scales)]
    outputs = [torch.randn(2, classes, *shape, generator=generator, dtype=dtype) for shape in shapes]
    labels = torch.randint(0, 2 if regions else classes, (2, classes if regions else 1, *spatial), generator=generator)
    return outputs, labels, torch.rand(2, 1, *spatial, generator=generator, dtype=dtype)


def downsampled(labels):
    """As nnU-Net's, to half and a quarter of the voxels: the middle one, of two the second."""
    dims = labels.ndim - 2
    return [labels] + [labels[(slice(None), slice(None), *[slice(step // 2, None, step)] * dims)] for step in (2, 4)]


def nnunets(regions, batch_dice, ignore_label=None, weights=SCALES):
    settings = {"batch_dice": batch_dice, "do_bg": regions, "smooth": 1e-5, "ddp": False}
    loss = DC_and_BCE_loss({}, settings, use_ignore_label=ignore_label is not None,
                           dice_class=MemoryEfficientSoftDiceLoss) if regions else \
        DC_and_CE_loss(settings, {}, ignore_label=ignore_label, dice_class=MemoryEfficientSoftDiceLoss)
    return DeepSupervisionWrapper(loss, weights)


def same(outputs, first, second):
    """Whether two losses of the outputs have the same value and gradient."""
    found = []
    for loss in (first, second):
        leaves = [output.clone().requires_grad_() for output in outputs]
        value = loss(leaves)
        found.append((value.detach().double(), torch.autograd.grad(value, leaves)))
    assert all(g.abs().max() > 1e-4 for g in found[0][1])
    return torch.allclose(found[0][0], found[1][0], atol=1e-6) and \
        all(torch.allclose(a, b, atol=1e-7) for a, b in zip(found[0][1], found[1][1], strict=True))


@KINDS
def test_with_weight_one_it_is_nnunets_loss(regions, spatial, batch_dice):
    outputs, labels, weight = drawn(regions, spatial)
    for ones in (torch.ones_like(weight), torch.ones_like(labels, dtype=torch.bool)):
        assert same(outputs, lambda z, ones=ones: WeightedDiceCE(regions, SCALES, batch_dice)(z, labels, ones),
                    lambda z: nnunets(regions, batch_dice)(z, downsampled(labels)))


@pytest.mark.parametrize("spatial, batch_dice", [((8, 4), False), ((8, 4), True), ((4, 8, 4), False)])
def test_where_the_weight_is_zero_it_is_nnunets_loss_of_the_ignore_label(spatial, batch_dice):
    outputs, labels, weight = drawn(False, spatial)
    counted = weight > 0.4
    ignored = torch.where(counted, labels, 3)
    for given in (labels, ignored):
        assert same(outputs, lambda z, given=given: WeightedDiceCE(False, SCALES, batch_dice)(z, given, counted),
                    lambda z: nnunets(False, batch_dice, 3)(z, downsampled(ignored)))


def test_of_regions_nnunet_adds_cross_entropies_up_where_here_is_their_mean():
    (output,), labels, weight = drawn(True, scales=1)
    counted = weight > 0.4
    target = torch.cat([labels.bool(), ~counted], 1)

    def theirs(z):
        loss = nnunets(True, False, 3, (1.0,)).loss
        dice = loss.dc(z[0], labels, loss_mask=counted)
        return dice + (loss(z[0], target) - dice) / 3
    assert same([output], lambda z: WeightedDiceCE(True, (1.0,), False)(z, labels, counted), theirs)


@KINDS
@pytest.mark.parametrize("per_region", [False, True])
def test_weights_between_zero_and_one_are_the_equations(naive_weighted_dice_ce, regions, spatial, batch_dice,
                                                        per_region):
    outputs, labels, weight = drawn(regions, spatial)
    if regions and per_region:
        weight = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
    weight = torch.where(weight > 0.7, 0.0, weight)
    assert same(outputs, lambda z: WeightedDiceCE(regions, SCALES, batch_dice)(z, labels, weight),
                lambda z: naive_weighted_dice_ce(z, labels, weight, regions, SCALES, batch_dice))


@pytest.mark.parametrize("regions", [False, True])
def test_all_weights_times_a_number_is_the_same_cross_entropy(regions):
    outputs, labels, weight = drawn(regions, scales=1)
    loss, values = WeightedDiceCE(regions, (1.0,), False), []
    for factor in (1.0, 0.5):
        values.append(loss(outputs, labels, factor * weight) - loss.dice(outputs[0], labels, factor * weight))
    assert torch.allclose(*values)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("boolean", [False, True])
def test_where_no_voxel_counts_it_is_finite_with_a_zero_gradient(regions, boolean):
    outputs, labels, weight = drawn(regions)
    leaves = [output.requires_grad_() for output in outputs]
    nothing = torch.zeros_like(weight, dtype=torch.bool if boolean else weight.dtype)
    value = WeightedDiceCE(regions, SCALES, False)(leaves, labels, nothing)
    assert torch.isfinite(value)
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("regions", [False, True])
def test_labels_may_be_anything_where_the_weight_is_zero(regions):
    outputs, labels, weight = drawn(regions)
    weight = torch.where(weight > 0.5, weight, 0.0)
    loss = WeightedDiceCE(regions, SCALES, False)
    for anything in (255, -1, 3):
        assert torch.equal(loss(outputs, torch.where(weight > 0, labels, anything), weight),
                           loss(outputs, labels, weight))


@pytest.mark.parametrize("regions", [False, True])
def test_voxels_that_do_not_count_do_not_matter(regions):
    (output,), labels, weight = drawn(regions, scales=1)
    weight = torch.where(weight > 0.5, weight, 0.0)
    leaf = output.requires_grad_()
    loss = WeightedDiceCE(regions, (1.0,), False)
    value = loss([leaf], labels, weight)
    gradient, = torch.autograd.grad(value, leaf)
    assert (gradient[(weight == 0).expand_as(gradient)] == 0).all()
    assert torch.allclose(loss([torch.where(weight > 0, output, 7 * output + 1)], labels, weight), value)


def test_an_output_of_weight_zero_is_left_out():
    outputs, labels, weight = drawn()
    outputs[2] = outputs[2] * float("nan")
    assert torch.isfinite(WeightedDiceCE(False, (0.7, 0.3, 0.0), False)(outputs, labels, weight))


def test_a_single_output_is_its_finest_scale():
    outputs, labels, weight = drawn()
    loss = WeightedDiceCE(False, (1.0,), False)
    assert torch.equal(loss(outputs[0], labels, weight), loss(outputs[:1], labels, weight))


def test_the_order_of_patches_does_not_matter():
    outputs, labels, weight = drawn()
    loss = WeightedDiceCE(False, SCALES, False)
    assert torch.allclose(loss(outputs, labels, weight),
                          loss([output.flip(0) for output in outputs], labels.flip(0), weight.flip(0)))


@pytest.mark.parametrize("regions", [False, True])
def test_of_half_precision_the_value_is_in_single_precision(regions):
    outputs, labels, weight = drawn(regions, dtype=torch.float32)
    loss = WeightedDiceCE(regions, SCALES, False)
    value = loss([output.half() for output in outputs], labels, weight)
    assert value.dtype == torch.float32 and torch.allclose(value, loss(outputs, labels, weight), atol=1e-2)


def test_a_right_and_certain_prediction_has_the_lowest_value():
    _, labels, weight = drawn()
    certain = 200.0 * torch.nn.functional.one_hot(labels[:, 0], 3).movedim(-1, 1).double()
    assert WeightedDiceCE(False, (1.0,), False)(certain, labels, weight).item() == pytest.approx(-1.0)
