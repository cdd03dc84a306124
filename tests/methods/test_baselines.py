"""What holds for all of Mean Teacher, UAMT, FixMatch, CPS, BCP and Mix."""

import pytest
import torch

from nnunetv2_semi.methods.bcp import BCP
from nnunetv2_semi.methods.contract import Batch
from nnunetv2_semi.methods.cps import CPS
from nnunetv2_semi.methods.fixmatch import FixMatch
from nnunetv2_semi.methods.mean_teacher import MeanTeacher
from nnunetv2_semi.methods.mix import Mix
from nnunetv2_semi.methods.uamt import UAMT
from nnunetv2_semi.training.step import TrainingStep

METHODS = [MeanTeacher, UAMT, FixMatch, CPS, BCP, Mix]
PROGRESS = (0.1, 0.5, 0.9)  # BCP: pretraining, then both ways


def make(small, cls, one_pass=False, **kinds):
    torch.manual_seed(1)
    channels, dims, deep = kinds.get("channels", 2), kinds.get("dims", 3), kinds.get("deep_supervision", False)
    context = small.context(channels, kinds.get("regions", False), kinds.get("ignore_label"), one_pass, deep)
    # a threshold at which an untrained network has some confident voxels
    settings = cls.Settings(confidence=0.4) if cls in (FixMatch, Mix) else cls.Settings()
    return cls(small.network(channels, 3, dims, deep), settings, context)


def step_of(method):
    return TrainingStep(method, method.optimizers(1e-2, 0.0, 10), None, torch.device("cpu"), seed=0, rank=0,
                        max_skipped_steps=5)


def unequal(batch, labelled, unlabelled):
    """The batch with so many labelled and unlabelled patches."""
    return Batch(batch.labelled[:labelled], batch.target[:labelled], batch.unlabelled[:unlabelled])


def same(first, second, **tolerance):
    return all(torch.allclose(a, b, **tolerance) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("kinds", [{}, {"dims": 2}, {"regions": True}, {"ignore_label": 3},
                                   {"regions": True, "ignore_label": 3, "deep_supervision": True}, {"channels": 1},
                                   {"channels": 4, "dims": 2, "deep_supervision": True}])
@pytest.mark.parametrize("cls", METHODS)
def test_every_kind_of_data_set_trains_all_parameters(small, cls, kinds):
    method = make(small, cls, **kinds)
    step, deep = step_of(method), kinds.get("deep_supervision", False)
    for number, progress in enumerate(PROGRESS):
        terms, values = step.run(small.batch(seed=number, **kinds), number, progress)
        assert values["skipped_steps"] == 0 and all(torch.isfinite(term.value) for term in terms)
        assert any(term.supervised for term in terms)
        for name, parameter in method.named_parameters():
            # without deep supervision the coarse outputs are not used
            if parameter.requires_grad and (deep or "seg_layers.0" not in name):
                assert parameter.grad is not None, name
    assert any(not term.supervised and float(term.value) > 0 for term in terms)


@pytest.mark.parametrize("kinds", [{}, {"dims": 2, "regions": True, "deep_supervision": True}])
@pytest.mark.parametrize("cls", METHODS)
def test_both_arrangements_do_the_same_steps(small, cls, kinds):
    methods = [make(small, cls, one_pass, **kinds) for one_pass in (False, True)]
    for method in methods:
        step = step_of(method)
        for number, progress in enumerate(PROGRESS):
            step.run(small.batch(**kinds), number, progress)
    assert same(*methods, atol=1e-5)


@pytest.mark.parametrize("labelled, unlabelled", [(1, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize("cls", METHODS)
def test_batch_sizes_may_differ_and_be_one(small, cls, labelled, unlabelled):
    for one_pass in (False, True):
        step = step_of(make(small, cls, one_pass))
        for number, progress in enumerate(PROGRESS):
            terms, _ = step.run(unequal(small.batch(count=3), labelled, unlabelled), number, progress)
            assert all(torch.isfinite(term.value) for term in terms)


@pytest.mark.parametrize("cls", METHODS)
def test_a_labelled_batch_of_ignored_voxels_trains(small, cls):
    step, batch = step_of(make(small, cls, ignore_label=3)), small.batch(ignore_label=3)
    batch.target.fill_(3)
    for number, progress in enumerate(PROGRESS):
        terms, values = step.run(batch, number, progress)
        assert values["skipped_steps"] == 0 and all(torch.isfinite(term.value) for term in terms)


@pytest.mark.parametrize("cls", METHODS)
def test_continued_it_ends_with_the_same_weights(small, cls):
    whole, interrupted = make(small, cls), make(small, cls)
    steps = [step_of(method) for method in (whole, interrupted)]
    for number, progress in enumerate(PROGRESS[:2]):
        for step in steps:
            step.run(small.batch(seed=number), number, progress)
    torch.manual_seed(99)
    continued = cls(small.network(2, 3), interrupted.settings, interrupted.context)
    continued.load_state_dict(interrupted.state_dict())
    continuing = step_of(continued)
    continuing.optimizations[0].load_state_dict(steps[1].optimizations[0].state_dict())
    for step in (steps[0], continuing):
        step.run(small.batch(seed=2), 2, PROGRESS[2])
    assert same(whole, continued, rtol=0, atol=0)


@pytest.mark.parametrize("cls", METHODS)
def test_a_non_finite_unlabelled_image_never_reaches_the_weights(small, cls):
    method, batch = make(small, cls), small.batch()
    batch.unlabelled[0] = float("nan")
    _, values = step_of(method).run(batch, 0, 0.5)
    assert values["skipped_steps"] == 1
    assert all(torch.isfinite(parameter).all() for parameter in method.parameters())


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("cls", METHODS)
def test_in_half_precision_losses_are_in_single_precision_and_all_parameters_learn(small, cls, one_pass):
    method = make(small, cls, one_pass, dims=2)
    for method.progress in PROGRESS:
        method.zero_grad()
        groups = method.loss(small.batch(dims=2))
        while True:
            with torch.autocast("cpu", torch.bfloat16):
                terms = next(groups, None)
            if terms is None:
                break
            assert all(term.value.dtype == torch.float32 for term in terms)
            sum(term.value for term in terms).backward(retain_graph=one_pass)
        learning = {name for name, p in method.named_parameters() if p.requires_grad and "seg_layers.0" not in name}
        assert learning <= {name for name, p in method.named_parameters() if p.grad is not None}
        method.after_step()
