import pytest
import torch

from nnunetv2_semi.data.boxes import Boxes
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods.fixmatch import FixMatch, FixMatchSettings


def make(small, regions=False, **settings):
    torch.manual_seed(1)
    method = FixMatch(small.network(2, 3, 2), FixMatchSettings(**settings), small.context(regions=regions))
    method.progress = 0.1
    return method


def pseudo_label_term(method, batch):
    torch.manual_seed(3)
    return [term for group in method.loss(batch) for term in group][-1]


@pytest.mark.parametrize("regions", [False, True])
def test_the_term_is_the_papers_in_value_and_gradient(small, regions):
    tau = 0.55 if regions else 0.4
    method, batch = make(small, regions, confidence=tau), small.batch(dims=2, regions=regions)
    term = pseudo_label_term(method, batch)
    torch.manual_seed(3)
    strong = method.student(method._strong(batch.unlabelled))
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


def test_where_nothing_is_confident_the_term_is_zero_and_its_gradient_too(small):
    method = make(small, confidence=1.0)
    term = pseudo_label_term(method, small.batch(dims=2))
    assert term.value.item() == 0 and method.metrics["unlabelled_voxels_used"] == 0
    gradients = torch.autograd.grad(term.value, list(method.student.parameters()), allow_unused=True)
    assert all((g == 0).all() for g in gradients if g is not None)


def test_the_weight_is_constant_unless_it_is_ramped_up(small):
    assert make(small).unlabelled_weight(1.0, make(small).settings.ramp_fraction) == 1.0
    assert pseudo_label_term(make(small, ramp_fraction=1.0), small.batch(dims=2)).weight < 0.1


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (2, 1, 4, 6, 8)])
def test_the_strong_view_is_an_intensity_view_with_a_box_of_its_mean(small, shape):
    image = torch.randn(*shape)
    torch.manual_seed(3)
    view = make(small, view_noise=0.0, view_gamma=0.0)._strong(image)
    torch.manual_seed(3)
    whole = make(small, view_noise=0.0, view_gamma=0.0, cutout=0.0)._strong(image)
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
    strong = make(small, view_noise=0.0, cutout=0.0)._strong(image)
    first, second = (torch.nn.functional.instance_norm(x) for x in (image, strong))
    assert (first - second).abs().mean() > 0.02


@pytest.mark.parametrize("name, value", [("confidence", 1.5), ("cutout", -0.1), ("view_noise", -1.0)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=name):
        FixMatchSettings(**{name: value})
