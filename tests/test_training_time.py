"""How long the demo trains."""

import pytest

from nnunetv2_semi.training_time import (
    ITERATION_RANGE,
    OTHER_COMMANDS_PER_PLANNING,
    PASSES_PER_ITERATION,
    SECONDS_PER_ITERATION,
    iterations_for,
    seconds_per_pass,
)


def test_iterations_fill_the_time_that_is_left() -> None:
    iterations = iterations_for(400, planning_seconds=20, pass_seconds=0.1)
    spent = iterations * (PASSES_PER_ITERATION * 0.1 + SECONDS_PER_ITERATION) + OTHER_COMMANDS_PER_PLANNING * 20
    assert spent == pytest.approx(400, abs=1)


def test_iterations_stay_within_what_makes_sense() -> None:
    assert iterations_for(-100, planning_seconds=20, pass_seconds=0.1) == ITERATION_RANGE[0]
    assert iterations_for(1e6, planning_seconds=20, pass_seconds=1e-4) == ITERATION_RANGE[1]


def test_larger_patches_take_longer() -> None:
    def plans(side: int) -> dict[str, object]:
        kwargs = {
            "n_stages": 2,
            "features_per_stage": [4, 8],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * 2,
            "strides": [[1, 1, 1], [2, 2, 2]],
            "n_conv_per_stage": [1, 1],
            "n_conv_per_stage_decoder": [1],
        }
        architecture = {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": kwargs,
            "_kw_requires_import": ["conv_op"],
        }
        configuration = {"batch_size": 1, "patch_size": [side] * 3, "architecture": architecture}
        return {"configurations": {"3d_fullres": configuration}}

    assert seconds_per_pass(plans(32), "3d_fullres", "cpu") > 2 * seconds_per_pass(plans(8), "3d_fullres", "cpu")
