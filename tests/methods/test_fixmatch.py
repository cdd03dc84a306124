import math

import pytest
import torch

from nnunetv2_semi.data.boxes import Boxes
from nnunetv2_semi.data.views import IntensityViews
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods.fixmatch import FixMatch, FixMatchSettings

PAPER = {"cutmix": 0.0, "cutout": 0.5, "pseudo_loss": "ce", "confidence": 0.95, "ramp_fraction": 0.0}


def make(small, regions=False, deep_supervision=False, **settings):
    torch.manual_seed(1)
    method = FixMatch(small.network(2, 3, 2, deep_supervision), FixMatchSettings(**settings),
                      small.context(regions=regions, deep_supervision=deep_supervision))
    method.progress = 0.1
    return method


def pseudo_label_term(method, batch):
    torch.manual_seed(3)
    return [term for group in method.loss(batch) for term in group][-1]


@pytest.mark.parametrize("regions", [False, True])
def test_the_term_is_the_papers_in_value_and_gradient(small, regions):
    tau = 0.55 if regions else 0.4
    method, batch = make(small, regions, **{**PAPER, "confidence": tau}), small.batch(dims=2, regions=regions)
    term = pseudo_label_term(method, batch)
    torch.manual_seed(3)
    strong = method.student(method._strong(batch.unlabelled)[0])
    weak = method.student(batch.unlabelled).detach()
    total, used, voxels = torch.zeros(()), 0, 0
    for b in range(2):
        for v in range(64):
            u, z = weak[b].flatten(1)[:, v], strong[b].flatten(1)[:, v]
            problems = [(torch.stack([1 - q, q]), torch.stack([1 - r, r])) for q, r in
                        zip(u.sigmoid(), z.sigmoid(), strict=True)] if regions else [(u.softmax(0), z.softmax(0))]
            for q, p in problems:
                voxels += 1
                if q.max() >= tau:
                    total, used = total - torch.log(p[q.argmax()]), used + 1
    assert 0.05 < used / voxels < 0.95
    assert torch.allclose(term.value, total / voxels, rtol=1e-4)
    assert method.metrics["unlabelled_voxels_used"].item() == pytest.approx(used / voxels)
    weights = list(method.student.parameters())
    ours, expected = (torch.autograd.grad(value, weights, allow_unused=True) for value in (term.value, total / voxels))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, expected, strict=True) if a is not None)
    assert term.weight == 1.0


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_by_default_it_is_nnunets_loss_of_mixed_patches_in_value_and_gradient(small, naive_weighted_dice_ce, regions,
                                                                               deep_supervision):
    kinds = {"regions": regions, "deep_supervision": deep_supervision}
    tau = 0.55 if regions else 0.4
    method, batch = make(small, confidence=tau, **kinds), small.batch(dims=2, **kinds)
    term = pseudo_label_term(method, batch)
    torch.manual_seed(3)
    strong, mixing = method._strong(batch.unlabelled)
    assert mixing.inside.flatten(1).sum(1).tolist() == [16, 16]
    with torch.no_grad():
        weak = method.student(batch.unlabelled)
    weak = weak[0] if deep_supervision else weak
    weak = small.mixed(mixing.inside, weak.sigmoid() if regions else weak.softmax(1))
    labels = (weak > 0.5).long() if regions else weak.argmax(1, keepdim=True)
    confident = (torch.maximum(weak, 1 - weak) if regions else weak.amax(1, keepdim=True)) >= tau
    assert 0.05 < confident.float().mean() < 0.95
    output = method.student(strong)
    expected = naive_weighted_dice_ce(output if deep_supervision else [output], labels, confident, regions,
                                      method.context.scale_weights)
    assert torch.allclose(term.value, expected, rtol=1e-4)
    assert small.same_gradients(term.value, expected, method.student)
    assert method.metrics["unlabelled_voxels_used"].item() == pytest.approx(confident.float().mean().item())


@pytest.mark.parametrize("shape", [(3, 2, 8, 6), (2, 1, 4, 6, 8)])
def test_the_default_view_is_a_box_of_the_next_patch_and_then_strong_intensities(small, shape):
    method, image = make(small), torch.randn(*shape)
    torch.manual_seed(3)
    strong, mixing = method._strong(image)
    torch.manual_seed(3)
    inside = Boxes.draw(len(image), shape[2:], 0.5).inside(image.device)
    mixed = small.mixed(inside, image)
    assert torch.equal(mixing.inside, inside)
    assert torch.equal(strong, IntensityViews.draw(1, mixed, scale=0.7, shift=0.7, noise=0.3, noise_probability=0.8,
                                                   gamma=2.0).apply(mixed)[0])


@pytest.mark.parametrize("settings, value", [(PAPER, 0), ({}, -1)])
def test_where_nothing_is_confident_the_gradient_is_zero(small, settings, value):
    method = make(small, **{**settings, "confidence": 1.0})
    term = pseudo_label_term(method, small.batch(dims=2))
    assert term.value.item() == value and method.metrics["unlabelled_voxels_used"] == 0
    gradients = torch.autograd.grad(term.value, list(method.student.parameters()), allow_unused=True)
    assert all((g == 0).all() for g in gradients if g is not None)


def test_the_weight_is_constant_unless_it_is_ramped_up(small):
    assert pseudo_label_term(make(small, **PAPER), small.batch(dims=2)).weight == 1.0
    assert pseudo_label_term(make(small, ramp_fraction=1.0), small.batch(dims=2)).weight < 0.1
    assert pseudo_label_term(make(small), small.batch(dims=2)).weight == pytest.approx(math.exp(-5 * 0.25))


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (2, 1, 4, 6, 8)])
def test_the_strong_view_is_an_intensity_view_with_a_box_of_its_mean(small, shape):
    image = torch.randn(*shape)
    torch.manual_seed(3)
    view, _ = make(small, view_noise=0.0, view_gamma=0.0, cutmix=0.0, cutout=0.5)._strong(image)
    torch.manual_seed(3)
    whole, _ = make(small, view_noise=0.0, view_gamma=0.0, cutmix=0.0)._strong(image)
    box = (view != whole).any(1)
    for patch, channel in ((p, c) for p in range(shape[0]) for c in range(shape[1])):
        x, strong, cut = image[patch, channel], whole[patch, channel], box[patch]
        scale, shift = torch.linalg.lstsq(torch.stack([x.flatten(), torch.ones(x.numel())], 1),
                                          strong.flatten()[:, None]).solution.flatten()
        assert torch.allclose(strong, scale * x + shift, atol=1e-4) and 0.3 <= scale <= 1.7
        assert torch.allclose(view[patch, channel][cut], strong.mean(), atol=1e-5)
    assert box[0].sum() == Boxes.draw(1, shape[2:], 0.5).inside(image.device).sum()


def test_instance_normalisation_does_not_undo_the_strong_view(small):
    image = torch.randn(1, 1, 16, 16)
    strong, _ = make(small, view_noise=0.0)._strong(image)
    first, second = (torch.nn.functional.instance_norm(x) for x in (image, strong))
    assert (first - second).abs().mean() > 0.02


@pytest.mark.parametrize("name, value", [("confidence", 1.5), ("cutout", -0.1), ("view_noise", -1.0), ("cutmix", 1.1),
                                         ("ramp_fraction", -0.1)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=name):
        FixMatchSettings(**{name: value})
