import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from nnunetv2_semi.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from nnunetv2_semi.methods.optimization import Optimization, WarmedUpPolyLR
from nnunetv2_semi.training.step import TrainingStep


def step_with(small, **options):
    torch.manual_seed(1)
    method = MeanTeacher(small.network(2, 3), MeanTeacherSettings(unlabelled_weight=0.0), small.context())
    optimizer = torch.optim.SGD(method.student.parameters(), 1.0)
    optimization = Optimization(optimizer, LambdaLR(optimizer, lambda number: 1 / (1 + number)), **options)
    return method, TrainingStep(method, [optimization], None, torch.device("cpu"), seed=0, rank=0, max_skipped_steps=5)


@pytest.mark.parametrize("every, rates", [("step", [1, 1 / 2, 1 / 3]), ("epoch", [1, 1, 1])])
def test_a_schedule_is_stepped_after_every_step_if_it_is_asked_for(small, every, rates):
    _, step = step_with(small, scheduled_every=every)
    seen = []
    for number in range(3):
        seen.append(step.optimizations[0].optimizer.param_groups[0]["lr"])
        step.run(small.batch(seed=number), number, 0.5)
    assert seen == pytest.approx(rates)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_the_gradient_is_clipped_to_its_own_norm_or_not_at_all(small, clip):
    method, step = step_with(small, gradient_clip=clip)
    before = [p.clone() for p in method.student.parameters()]
    step.run(small.batch(), 0, 0.5)
    pairs = zip(before, method.student.parameters(), strict=True)
    moved = torch.cat([(a - b).detach().flatten() for a, b in pairs]).norm()
    assert moved > 0.02 if clip is None else float(moved) == pytest.approx(clip, rel=1e-3)


def test_state_goes_into_a_checkpoint_and_out_again(small):
    _, step = step_with(small, scheduled_every="step")
    step.run(small.batch(), 0, 0.5)
    _, other = step_with(small, scheduled_every="step")
    other.optimizations[0].load_state_dict(step.optimizations[0].state_dict())
    assert other.optimizations[0].optimizer.param_groups[0]["lr"] == pytest.approx(0.5)


def test_a_training_continued_with_more_steps_and_another_rate_follows_those():
    def optimization(rate, steps):
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
        return Optimization(optimizer, WarmedUpPolyLR(optimizer, rate, 0, steps), "step")
    first, longer = optimization(0.2, 4), optimization(0.1, 8)
    first.schedule.step(4)
    longer.load_state_dict(first.state_dict())
    longer.schedule.step(4)
    assert longer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5 ** 0.9)


def test_frozen_parameters_are_not_optimised():
    frozen, trained = nn.Parameter(torch.ones(1), requires_grad=False), nn.Parameter(torch.ones(1))
    assert Optimization.sgd([frozen, trained], 0.1, 0.0, 0.9, 10).parameters() == [trained]


def test_warmed_up_rate_follows_the_number_of_the_step():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = WarmedUpPolyLR(optimizer, 0.2, warmup_steps=2, steps=6)
    rates = [optimizer.param_groups[0]["lr"]]
    for number in range(1, 7):
        schedule.step(number)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.2, 0.2, 0.2 * 0.75 ** 0.9, 0.2 * 0.5 ** 0.9, 0.2 * 0.25 ** 0.9, 0.0])
    assert schedule.get_last_lr() == [0.0]
