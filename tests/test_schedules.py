import math

import pytest

from nnunetv2_semi.schedules import (
    decay_for_length,
    sigmoid_ramp_up,
    snapshot_after,
    warmed_up_decay,
    warmed_up_poly,
)


@pytest.mark.parametrize("progress, fraction, expected", [
    (0.0, 1.0, math.exp(-5)), (0.5, 1.0, math.exp(-1.25)), (1.0, 1.0, 1.0), (0.2, 0.4, math.exp(-1.25)),
    (0.4, 0.4, 1.0), (0.9, 0.4, 1.0), (0.0, 0.0, 1.0), (-1.0, 1.0, math.exp(-5)),
])
def test_ramp_up(progress, fraction, expected):
    assert sigmoid_ramp_up(progress, fraction) == pytest.approx(expected)


def test_ramp_up_refuses_a_negative_length():
    with pytest.raises(ValueError, match="negative"):
        sigmoid_ramp_up(0.5, -1.0)


@pytest.mark.parametrize("updates, decay, expected", [
    (0, 0.99, 0.0), (1, 0.99, 0.5), (9, 0.99, 0.9), (500, 0.99, 0.99),
])
def test_decay_warms_up(updates, decay, expected):
    assert warmed_up_decay(updates, decay) == pytest.approx(expected)


@pytest.mark.parametrize("steps, expected", [
    (1, 0.9), (500, 0.9), (2000, 0.975), (5000, 0.99), (50_000, 0.999), (250_000, 0.999)])
def test_a_teacher_averages_a_fiftieth_of_training_within_limits(steps, expected):
    assert decay_for_length(steps) == pytest.approx(expected)


@pytest.mark.parametrize("num_epochs, snapshots, expected", [
    (9, 2, {3: 1, 6: 2}), (10, 2, {3: 1, 7: 2}), (10, 0, {}), (2, 1, {1: 1}), (1, 2, {}),
])
def test_snapshots_divide_training_into_equal_parts(num_epochs, snapshots, expected):
    found = {epochs: snapshot_after(epochs, num_epochs, snapshots) for epochs in range(1, num_epochs + 1)}
    assert {epochs: number for epochs, number in found.items() if number is not None} == expected


def test_ramp_up_with_power_1_is_the_unsquared_form():
    assert sigmoid_ramp_up(0.25, 0.5, power=1) == pytest.approx(math.exp(-2.5))
    assert sigmoid_ramp_up(0.25, 0.5) == pytest.approx(math.exp(-1.25))
    assert sigmoid_ramp_up(0.6, 0.5, power=1) == 1


@pytest.mark.parametrize("step, expected", [(0, 0.25), (3, 1.0), (4, 1.0), (7, 0.5 ** 0.9), (10, 0.0), (12, 0.0)])
def test_learning_rate_warms_up_then_falls_to_nothing(step, expected):
    assert warmed_up_poly(step, warmup=4, steps=10) == pytest.approx(expected)
