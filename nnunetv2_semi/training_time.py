"""How many iterations of training fit into a given time on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

import numpy as np

from nnunetv2_semi.data.phantom_anatomy import LABELS

# Estimated on two busy cores. Training, validation and prediction of both trainers take this many times as long as
# planning and preprocessing, were there no iterations: on any machine most of either is starting Python processes.
OTHER_COMMANDS_PER_PLANNING = 5.0
# Network passes in one iteration of each trainer, added up, and seconds for augmentation and optimiser beside them.
PASSES_PER_ITERATION = 5.3
SECONDS_PER_ITERATION = 0.08
# With fewer, neither trainer would have learned anything to look at, so that a slow machine takes longer instead.
ITERATION_RANGE = (100, 2000)
TIMED_PASSES = 5
# How many times faster two or more cores are than one, for patches as small as these.
SEVERAL_CORES = 1.6
CLASSES = len(LABELS) + 1


def seconds_per_pass(plans: Mapping[str, object], configuration_name: str, device: str) -> float:
    """Seconds that one forward and backward pass of the planned network takes here, at its patch and batch size."""
    # Imported late: torch takes seconds, and a wrong option of the demo should be told at once.
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    configuration = PlansManager(dict(plans)).get_configuration(configuration_name)
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        1,
        CLASSES,
        deep_supervision=False,
    ).to(device)
    patches = torch.rand((configuration.batch_size, 1, *configuration.patch_size), device=device)
    durations = []
    threads = torch.get_num_threads()
    # On one core, because threads that wait for each other tell nothing where other programs run too.
    torch.set_num_threads(1)
    try:
        for _ in range(TIMED_PASSES):
            started = time.perf_counter()
            # Reading the value waits for the device.
            loss = network(patches).square().mean()
            loss.backward()
            loss.item()
            durations.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    one_core = float(np.median(durations))
    return one_core / SEVERAL_CORES if device == "cpu" and (os.cpu_count() or 1) > 1 else one_core


def iterations_for(seconds: float, planning_seconds: float, pass_seconds: float) -> int:
    """Iterations per trainer, such that everything after planning takes about the given time.

    Args:
        seconds: What is left for both trainers with start-up, validation and prediction.
        planning_seconds: What ``nnUNetv2_plan_and_preprocess`` took.
        pass_seconds: See `seconds_per_pass`.
    """
    for_iterations = seconds - OTHER_COMMANDS_PER_PLANNING * planning_seconds
    iterations = for_iterations / (PASSES_PER_ITERATION * pass_seconds + SECONDS_PER_ITERATION)
    return int(np.clip(iterations, *ITERATION_RANGE))
