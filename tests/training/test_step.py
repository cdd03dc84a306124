"""One step of a method whose terms are written down, against plain autograd."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from nnunetv2_semi.methods.arrangement import Arrangement
from nnunetv2_semi.methods.base import Method
from nnunetv2_semi.methods.contract import Batch, Term
from nnunetv2_semi.methods.optimization import Optimization
from nnunetv2_semi.training.step import TrainingStep

RATE = 0.5
BATCH = Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1))


class Written(Method):
    """A method with a vector "a" and a number "b" as its weights.

    groups: of (name, function of the weights and the squares of a, weight, further fields of the term).
    graphs_alive: after each group, whether its graph still was there. drawn: random numbers of each step.
    """

    name = "Written"

    def __init__(self, groups, one_pass=False):
        super().__init__(nn.ParameterDict({"a": nn.Parameter(torch.tensor([1.0, -2.0])),
                                           "b": nn.Parameter(torch.tensor(3.0))}), None,
                         SimpleNamespace(arrangement=Arrangement(one_pass)))
        self.groups, self.graphs_alive, self.drawn, self.after_steps = groups, [], [], 0

    def loss(self, batch):
        self.drawn.append(torch.rand(3))
        for group in self.groups:
            squares = self.student["a"].square()
            yield [Term(name, value(self.student, squares), weight, **further)
                   for name, value, weight, further in group]
            self.graphs_alive.append(differentiable(squares, self.student["a"]))
        self.metrics["extra"] = torch.tensor(7.0)

    def after_step(self):
        self.after_steps += 1


def differentiable(tensor, weights):
    try:
        torch.autograd.grad(tensor.sum(), weights, retain_graph=True)
    except RuntimeError:
        return False
    return True


SUPERVISED = ("supervised", lambda student, squares: squares.sum() + student["b"], 1.0, {"supervised": True})
CONSISTENCY = ("consistency", lambda student, squares: (squares * student["b"]).mean(), 0.3, {})
SECOND = ("second", lambda student, squares: squares.prod().sqrt(), 2.0, {})


def bad(value, name="bad", weight=0.5, **further):
    return name, lambda student, squares: squares.sum() * value, weight, further


def step_of(method, *, seed=0, rank=0, max_skipped_steps=5, grad_scaler=None, optimizations=None, clip=None):
    if optimizations is None:
        optimizer = torch.optim.SGD(method.student.parameters(), RATE)
        optimizations = [Optimization(optimizer, LambdaLR(optimizer, lambda number: 1.0), gradient_clip=clip)]
    return TrainingStep(method, optimizations, grad_scaler, torch.device("cpu"), seed=seed, rank=rank,
                        max_skipped_steps=max_skipped_steps)


def moved_by(method, **options):
    """How far the weights moved in one step, over the rate, and what the step returned."""
    before = [p.detach().clone() for p in method.student.values()]
    result = step_of(method, **options).run(BATCH, 0, 0.25)
    return [(a - b.detach()) / RATE for a, b in zip(before, method.student.values(), strict=True)], result


def gradient_of(*terms):
    """Of the sum of weight * value over ``terms``, by plain autograd."""
    method = Written([])
    squares = method.student["a"].square()
    total = sum(weight * value(method.student, squares) for _, value, weight, _ in terms)
    return torch.autograd.grad(total, list(method.student.values()), allow_unused=True, materialize_grads=True)


def assert_alike(first, second):
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("groups", [[[SUPERVISED]], [[SUPERVISED], [CONSISTENCY, SECOND]], [[SUPERVISED, SECOND], []],
                                    [[CONSISTENCY], [SECOND], [SUPERVISED]]], ids=len)
def test_weights_go_down_the_gradient_of_the_weighted_sum_of_all_terms(groups, one_pass):
    method = Written(groups, one_pass)
    moved, (terms, values) = moved_by(method)
    assert_alike(moved, gradient_of(*(term for group in groups for term in group)))
    assert [term.name for term in terms] == [name for group in groups for name, *_ in group]
    assert not any(term.value.requires_grad for term in terms)
    assert values == {"skipped_steps": 0.0, "unlabelled_voxels_used": 1.0, "extra": torch.tensor(7.0)}
    assert method.after_steps == 1 and method.progress == 0.25


@pytest.mark.parametrize("one_pass", [False, True])
def test_one_after_another_a_groups_graph_is_freed_before_the_next_is_asked_for(one_pass):
    method = Written([[SUPERVISED], [CONSISTENCY]], one_pass)
    moved_by(method)
    assert method.graphs_alive == [one_pass, one_pass]


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_unlabelled_term_that_is_not_finite_is_left_out_with_those_of_its_group(one_pass, value):
    moved, (terms, values) = moved_by(Written([[SUPERVISED, CONSISTENCY, bad(value)], [SECOND]], one_pass))
    assert_alike(moved, gradient_of(SUPERVISED, SECOND))
    assert values == {"skipped_steps": 1.0, "unlabelled_voxels_used": 0.0}, "metrics may hold what is not finite"
    assert len(terms) == 4, "terms that are left out are logged all the same"


@pytest.mark.parametrize("further", [{"weight": 0.0}, {"patches": 0}], ids=str)
def test_a_term_that_counts_for_nothing_may_be_anything(further):
    moved, (_, values) = moved_by(Written([[SUPERVISED, CONSISTENCY, bad(float("nan"), **further)]]))
    assert_alike(moved, gradient_of(SUPERVISED, CONSISTENCY))
    assert values["skipped_steps"] == 0


def test_a_supervised_term_that_does_not_apply_counts_for_nothing_and_keeps_gradients():
    moved, _ = moved_by(Written([[CONSISTENCY, ("supervised", SUPERVISED[1], 1.0,
                                                {"supervised": True, "patches": 0})]]))
    assert_alike(moved, gradient_of(CONSISTENCY))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(value):
    method = Written([[bad(value, "supervised", supervised=True)], [CONSISTENCY]])
    moved, (_, values) = moved_by(method)
    assert all((m == 0).all() for m in moved) and values["skipped_steps"] == 1
    method.groups = [[SUPERVISED]]
    moved, _ = moved_by(method)
    assert_alike(moved, gradient_of(SUPERVISED))  # nothing of the step before is left in the gradient


def test_so_many_incomplete_steps_in_a_row_stop_with_a_message():
    method = Written([[SUPERVISED, bad(float("nan"))]])
    step, whole = step_of(method, max_skipped_steps=3), [[SUPERVISED]]
    incomplete = method.groups
    for method.groups in (incomplete, incomplete, whole, incomplete, incomplete):
        step.run(BATCH, 0, 0.0)
    with pytest.raises(RuntimeError, match=r"not finite in 3 steps in a row \(last: supervised = .*, bad = nan\)"):
        step.run(BATCH, 0, 0.0)


def test_a_control_reports_no_use_of_unlabelled_voxels():
    method = Written([[SUPERVISED]])
    method.uses_unlabelled = False
    assert "unlabelled_voxels_used" not in moved_by(method)[1][1]


def test_random_numbers_depend_on_seed_process_and_step_alone():
    def drawn(seed, rank, number, burnt):
        torch.rand(burnt)
        method = Written([[SUPERVISED]])
        step_of(method, seed=seed, rank=rank).run(BATCH, number, 0.0)
        return tuple(method.drawn[0].tolist())
    assert drawn(3, 1, 5, 0) == drawn(3, 1, 5, 11)
    assert len({drawn(*which, 0) for which in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 0, 1), (1, 0, 2))}) == 6


def test_each_optimiser_steps_its_own_weights_and_one_without_gradients_none():
    method = Written([[("supervised", lambda student, squares: squares.sum(), 1.0, {"supervised": True})]])
    optimizations = []
    for name, rate in (("a", 0.1), ("b", 0.2)):
        optimizer = torch.optim.SGD([method.student[name]], rate, weight_decay=1.0)
        optimizations.append(Optimization(optimizer, LambdaLR(optimizer, lambda number: 1.0), gradient_clip=None))
    step_of(method, optimizations=optimizations).run(BATCH, 0, 0.0)
    weights, expected = torch.tensor([1.0, -2.0]), 2 * torch.tensor([1.0, -2.0])
    assert torch.allclose(method.student["a"], weights - 0.1 * (expected + weights))
    assert method.student["b"].item() == 3.0, "weight decay without a gradient would move it"


def test_a_gradient_scaler_changes_no_step_and_leaves_out_those_that_overflow():
    groups = [[SUPERVISED], [CONSISTENCY]]
    moved, _ = moved_by(Written(groups), grad_scaler=torch.amp.GradScaler("cpu", init_scale=1024.0), clip=1.0)
    plain, _ = moved_by(Written(groups), clip=1.0)
    assert_alike(moved, plain)
    assert float(torch.cat([m.flatten() for m in moved]).norm()) == pytest.approx(1.0, rel=1e-4), "unscaled, then cut"
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    moved, _ = moved_by(Written([[bad(float("inf"), "supervised", supervised=True)]]), grad_scaler=scaler)
    assert all((m == 0).all() for m in moved) and scaler.get_scale() == 512.0


@pytest.mark.parametrize("groups", [[], [[bad(float("nan"))]]])
def test_a_step_without_a_gradient_leaves_weights_and_gradient_scaler_alone(groups):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    moved, _ = moved_by(Written(groups), grad_scaler=scaler)
    assert all((m == 0).all() for m in moved) and scaler.get_scale() == 1024.0
