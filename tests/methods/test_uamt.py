import math

import pytest
import torch

from nnunetv2_semi.data.views import with_noise
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from nnunetv2_semi.methods.mixing import CutMix
from nnunetv2_semi.methods.perturbation import intensity_view
from nnunetv2_semi.methods.uamt import UAMT, UAMTSettings

PAPER = {"perturbation": "noise", "consistency_weight": 0.1, "ramp_fraction": 1.0}


def make(small, settings=None, cls=UAMT, progress=0.5, regions=False, dropout=0.0):
    torch.manual_seed(1)
    method = cls(small.network(2, 3, dropout=dropout), settings or UAMTSettings(), small.context(regions=regions))
    torch.manual_seed(2)
    with torch.no_grad():  # as if the student had moved on since; large weights make some voxels certain
        for parameter in method.teacher.network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    method.progress = progress
    return method


def consistency(method, batch):
    torch.manual_seed(3)
    return [term for group in method.loss(batch) for term in group][-1]


@pytest.mark.parametrize("regions", [False, True])
def test_the_term_is_the_papers_in_value_and_gradient(small, regions):
    method, batch = make(small, UAMTSettings(**PAPER), regions=regions), small.batch(regions=regions)
    term = consistency(method, batch)
    last_layer = list(method.student.decoder.seg_layers[-1].parameters())
    gradients = torch.autograd.grad(term.value, last_layer)

    torch.manual_seed(3)  # noise is drawn for the student, the teacher, and each of T = 8 passes
    activate = torch.sigmoid if regions else (lambda z: z.softmax(1))
    noise = [with_noise(batch.unlabelled, 0.1)]
    CutMix.draw(batch.unlabelled, 0.0)  # nothing is mixed
    noise += [with_noise(batch.unlabelled, 0.1) for _ in range(9)]
    student = activate(method.student(noise[0]))
    with torch.no_grad():
        teacher = activate(method.teacher.network(noise[1]))
        mean = torch.stack([activate(method.teacher.network(image)) for image in noise[2:]]).mean(0)
    ramp = math.exp(-5 * (1 - 0.5) ** 2)
    above, below = torch.zeros(()), 0
    classes = [[k] for k in range(3)] if regions else [[0, 1, 2]]
    threshold = (0.75 + 0.25 * ramp) * math.log(2 if regions else 3)
    used = 0
    for group in classes:
        p = mean[:, group]
        u = -(p * p.log()).sum(1) - ((1 - p) * (1 - p).log()).sum(1) if regions else -(p * p.log()).sum(1)
        certain = u < threshold
        used += certain.float().mean() / len(classes)
        above = above + (((teacher - student)[:, group] ** 2).sum(1) * certain).sum()
        below += certain.sum() * len(group)
    assert 0.05 < used < 0.95
    assert torch.allclose(term.value, above / below, rtol=1e-4)
    expected = torch.autograd.grad(above / below, last_layer)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-7) for a, b in zip(gradients, expected, strict=True))
    assert method.metrics["unlabelled_voxels_used"].item() == pytest.approx(float(used))
    assert term.weight == pytest.approx(0.1 * ramp)


@pytest.mark.parametrize("settings", [{}, PAPER])
def test_where_every_voxel_is_certain_enough_it_is_mean_teacher(small, settings):
    uamt = make(small, UAMTSettings(threshold=1.0, **settings))
    mean_teacher = make(small, MeanTeacherSettings(**settings), MeanTeacher)
    terms = [consistency(method, small.batch()) for method in (uamt, mean_teacher)]
    assert torch.allclose(terms[0].value, terms[1].value, rtol=1e-5) and terms[0].weight == terms[1].weight
    assert uamt.metrics["unlabelled_voxels_used"] == 1


@pytest.mark.parametrize("regions", [False, True])
def test_by_default_the_certain_voxels_move_with_the_mixed_patches(small, regions):
    method, batch = make(small, regions=regions, progress=0.1), small.batch(regions=regions)
    term = consistency(method, batch)
    torch.manual_seed(3)
    inside = CutMix.draw(batch.unlabelled, 0.5).inside
    view = intensity_view(small.mixed(inside, batch.unlabelled), method.settings, ())
    activate = torch.sigmoid if regions else (lambda z: z.softmax(1))
    with torch.no_grad():
        teacher = activate(method.teacher.network(batch.unlabelled))
        mean = torch.stack([activate(method.teacher.network(with_noise(batch.unlabelled, 0.1)))
                            for _ in range(8)]).mean(0)
    own = -mean * mean.log()
    entropy = own - (1 - mean) * (1 - mean).log() if regions else own.sum(1, keepdim=True).expand_as(mean)
    certain = entropy < (0.75 + 0.25 * math.exp(-5 * 0.9 ** 2)) * math.log(2 if regions else 3)
    assert 0.05 < certain.float().mean() < 0.95
    teacher, counted = small.mixed(inside, teacher), small.mixed(inside, certain)
    expected = (((activate(method.student(view)) - teacher) ** 2)[counted]).mean()
    assert torch.allclose(term.value, expected, rtol=1e-4)
    assert small.same_gradients(term.value, expected, method.student)
    assert term.weight == pytest.approx(10 * math.exp(-5 * 0.25))
    assert method.metrics["unlabelled_voxels_used"].item() == pytest.approx(certain.float().mean().item())


def test_the_threshold_ends_at_the_largest_entropy(small):
    used = []
    for progress in (0.0, 0.7, 1.0):
        method = make(small, progress=progress)
        consistency(method, small.batch())
        used.append(method.metrics["unlabelled_voxels_used"].item())
    assert used[0] < used[1] < used[2] == 1


def test_where_nothing_is_certain_the_term_is_zero(small):
    method = make(small, UAMTSettings(threshold=0.0), progress=0.0)
    with torch.no_grad():
        for parameter in method.teacher.network.parameters():
            parameter.zero_()  # equal probabilities everywhere
    term = consistency(method, small.batch())
    assert term.value.item() == 0 and method.metrics["unlabelled_voxels_used"] == 0
    gradients = torch.autograd.grad(term.value, list(method.student.parameters()), allow_unused=True)
    assert all((g == 0).all() for g in gradients if g is not None)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_passes_use_dropout_where_the_network_has_it(small, dropout):
    method, seen = make(small, UAMTSettings(noise=0.0, passes=3), dropout=dropout), []
    method.teacher.network.register_forward_hook(lambda _, __, output: seen.append(output))
    method.counted(small.batch().unlabelled)
    assert len(seen) == 3 and torch.equal(seen[0], seen[1]) == (dropout == 0)
    assert not any(module.training for module in method.teacher.modules())


def test_the_student_is_deployed_as_in_the_released_code(small):
    method = make(small)
    assert method.deployable() is method.student
    assert make(small, UAMTSettings(deploy="teacher")).deployable() is not method.student


@pytest.mark.parametrize("name, value", [("passes", 0), ("threshold", 1.5), ("threshold_ramp", -1.0)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=name):
        UAMTSettings(**{name: value})
