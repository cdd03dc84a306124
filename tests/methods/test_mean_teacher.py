import math

import pytest
import torch

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from nnunetv2_semi.methods.mixing import CutMix
from nnunetv2_semi.methods.perturbation import intensity_view
from nnunetv2_semi.methods.settings import Settings
from nnunetv2_semi.methods.supervised import Supervised
from nnunetv2_semi.training.step import TrainingStep

PAPER = {"perturbation": "noise", "consistency_weight": 0.1, "ramp_fraction": 1.0}


def make(small, cls=MeanTeacher, heads=3, one_pass=False, settings=None, **kinds):
    torch.manual_seed(1)
    network = small.network(kinds.get("channels", 2), heads, kinds.get("dims", 3), kinds.get("deep_supervision", False))
    return cls(network, settings or cls.Settings(), small.context(
        kinds.get("channels", 2), kinds.get("regions", False), kinds.get("ignore_label"), one_pass,
        kinds.get("deep_supervision", False)))


def step_of(method):
    return TrainingStep(method, method.optimizers(1e-2, 0.0, 10), None, torch.device("cpu"), seed=0, rank=0,
                        max_skipped_steps=5)


@pytest.mark.parametrize("kinds", [{}, {"dims": 2}, {"regions": True}, {"ignore_label": 3}, {"deep_supervision": True},
                                   {"channels": 1}, {"channels": 4}])
@pytest.mark.parametrize("cls", [MeanTeacher, Supervised])
def test_every_kind_of_data_set_trains(small, kinds, cls):
    method = make(small, cls, **kinds)
    before = [p.clone() for p in method.student.parameters()]
    terms, _ = step_of(method).run(small.batch(**kinds), 0, 0.5)
    assert all(torch.isfinite(t.value) for t in terms)
    assert any(not torch.equal(a, b) for a, b in zip(before, method.student.parameters(), strict=True))


def test_both_arrangements_do_the_same_step(small):
    methods = [make(small, one_pass=one_pass) for one_pass in (False, True)]
    for method in methods:
        step_of(method).run(small.batch(), 0, 0.5)
    for a, b in zip(*(m.student.parameters() for m in methods), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("kinds", [{"dims": 2}, {"dims": 2, "regions": True}, {}])
def test_by_default_the_students_patches_alone_are_mixed_and_bent(small, kinds):
    method, batch = make(small, **kinds), small.batch(**kinds)
    method.progress = 0.1
    with torch.no_grad():
        for p in method.teacher.network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    torch.manual_seed(3)
    term = [t for g in method.loss(batch) for t in g][-1]
    torch.manual_seed(3)
    inside = CutMix.draw(batch.unlabelled, 0.5).inside
    view = intensity_view(small.mixed(inside, batch.unlabelled), method.settings, ())
    activate = torch.sigmoid if kinds.get("regions") else lambda z: z.softmax(1)
    student, teacher = activate(method.student(view)), activate(method.teacher.network(batch.unlabelled))
    squares = [(student[k] - torch.where(inside[k], teacher[1 - k], teacher[k])) ** 2 for k in range(2)]
    expected = sum(square.sum() for square in squares) / student.numel()
    assert torch.allclose(term.value, expected, rtol=1e-4)
    assert small.same_gradients(term.value, expected, method.student)
    assert term.weight == pytest.approx(10 * math.exp(-5 * 0.25))


def test_consistency_is_the_mean_squared_difference_to_the_noisy_teacher(small):
    method = make(small, settings=MeanTeacherSettings(noise=0.0, **PAPER))
    method.progress = 1.0
    with torch.no_grad():
        for p in method.teacher.network.parameters():
            p.add_(0.01)
    batch = small.batch()
    term = [t for g in method.loss(batch) for t in g][-1]
    difference = method.student(batch.unlabelled).softmax(1) - method.teacher.network(batch.unlabelled).softmax(1)
    assert term.weight == pytest.approx(0.1)
    assert torch.allclose(term.value, (difference ** 2).mean())


def test_of_the_literatures_form_both_networks_see_noise_of_their_own(small):
    method, seen = make(small, settings=MeanTeacherSettings(**PAPER)), {}
    for name, network in (("student", method.student), ("teacher", method.teacher.network)):
        network.register_forward_pre_hook(lambda _, inputs, n=name: seen.__setitem__(n, inputs[0]))
    batch = small.batch()
    list(method.loss(batch))
    noise = [seen[name] - batch.unlabelled for name in ("student", "teacher")]
    assert all(0.05 < n.std() < 0.12 and n.abs().max() <= 0.2 + 1e-6 for n in noise)
    assert not torch.allclose(*noise, atol=1e-3)


@pytest.mark.parametrize("settings, expected", [({}, 0.999), ({"num_epochs": 20}, 0.99), ({"ema_decay": 0.9}, 0.9)])
def test_the_teachers_memory_follows_the_length_of_training(small, settings, expected):
    assert make(small, settings=MeanTeacherSettings(**settings)).teacher.decay == pytest.approx(expected)


def test_without_unlabelled_weight_it_is_the_control(small):
    control, method = make(small, Supervised), make(small, settings=MeanTeacherSettings(unlabelled_weight=0.0))
    for m in (control, method):
        step = step_of(m)
        for number in range(3):
            step.run(small.batch(seed=number), number, number / 3)
    for a, b in zip(control.student.parameters(), method.student.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_unlabelled_image_never_reaches_the_weights(small, bad):
    batch = small.batch()
    batch.unlabelled[0, 0, 0, 0, 0] = bad
    control, method = make(small, Supervised), make(small)
    step_of(control).run(batch, 0, 0.5)
    _, values = step_of(method).run(batch, 0, 0.5)
    assert values["skipped_steps"] == 1 and values["unlabelled_voxels_used"] == 0
    for a, b in zip(control.student.parameters(), method.student.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("deploy", ["teacher", "student"])
def test_the_setting_decides_what_is_deployed(small, deploy):
    method = make(small, settings=MeanTeacherSettings(deploy=deploy))
    assert method.deployable() is (method.teacher.network if deploy == "teacher" else method.student)


def test_order_of_patches_does_not_matter(small):
    batch = small.batch()
    method = make(small, settings=MeanTeacherSettings(noise=0.0, **PAPER))
    values = [float(t.value.detach()) for g in method.loss(batch) for t in g]
    flipped = type(batch)(batch.labelled.flip(0), batch.target.flip(0), batch.unlabelled.flip(0))
    assert values == pytest.approx([float(t.value.detach()) for g in method.loss(flipped) for t in g], abs=1e-6)


def test_settings_base_is_enough_for_the_control(small):
    assert isinstance(make(small, Supervised).settings, Settings)


@pytest.mark.parametrize("name, value", [("cutmix", 1.5), ("view_gamma", -1.0), ("view_noise_probability", 2.0),
                                         ("ema_decay", 1.5), ("consistency_weight", -1.0), ("ramp_fraction", -0.1)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=name):
        MeanTeacherSettings(**{name: value})
