"""Peak memory of a training step, relative to that of nnU-Net's own trainer.

1. With the plans of nnU-Net's own planner: what a GPU must have beyond what stock nnU-Net needs.
2. With the plans of nnUNetPlannerSemi for joined passes ("plan_joined_passes" in dataset.json) and the same memory:
   whether Semi-CML with joined passes fits where stock nnU-Net with its own plans does, as planned and as measured.

Everything is counted: weights, gradients, momentum, teachers, the batch, and what the backward pass keeps. To run on a
CPU in a minute, networks have a quarter of nnU-Net's features and are planned for 1/32 of its 8 GB. What methods hold
besides one graph is mostly copies of the weights, so the weights' share of the stock trainer's peak is printed: of an
8 GB plan in mixed precision it is about 5 %. A second count, by the operating system, is made with --cross-check: the
growth of the largest resident size of a fresh process per trainer.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from measuring import Allocations, machine, table
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.semi.nnUNetPlannerSemi import nnUNetPlannerSemi
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from phantom_plans import CONFIGURATION, Phantom, phantom, random_batch, ready, start
from variants import STOCK, VARIANTS, Variant

FIRST_PATCH = 32  # voxels per side of the step that makes the optimiser's state, before the one that is measured
STOCK_PLANNER = "nnU-Net's"
PLANNERS = {STOCK_PLANNER: ExperimentPlanner, "nnUNetPlannerSemi": nnUNetPlannerSemi}


def run_steps(data: Phantom, plans: dict, variant: Variant, seed: int) -> None:
    """Build everything and do two steps; the first, which makes the optimiser's state, with a small patch."""
    patch = tuple(plans["configurations"][CONFIGURATION]["patch_size"])
    first = tuple(min(FIRST_PATCH, side) for side in patch)
    trainer = ready(data.trainer(variant.method, plans, variant.semi), first)
    trainer.train_step(random_batch(trainer, first, seed))
    start(trainer, patch)
    trainer.train_step(random_batch(trainer, patch, seed))


def counted_peak(data: Phantom, plans: dict, variant: Variant, seed: int) -> int:
    """Bytes, by torch's allocator."""
    gc.collect()
    with Allocations() as memory:
        run_steps(data, plans, variant, seed)
    return memory.peak


def resident_peak(name: str, planner: str, arguments: argparse.Namespace) -> int:
    """Bytes, by the operating system, in a process of its own. Freed memory goes back to the system at once there."""
    command = [sys.executable, __file__, "--one", name, "--planner", planner,
               "--features", str(arguments.features), "--gpu-memory", str(arguments.gpu_memory)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_resident_peak(data: Phantom, plans: dict, variant: Variant, seed: int) -> None:
    """What `resident_peak` reads: growth of the largest resident size over what the imports take."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * resource.getpagesize()
    run_steps(data, plans, variant, seed)
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before))


def weights_share(data: Phantom, plans: dict, peak: int) -> float:
    """Share of the stock trainer's peak that its weights, their gradients and their momentum have."""
    network = ready(data.trainer(None, plans)).network
    return 3 * sum(p.numel() * p.element_size() for p in network.parameters()) / peak


def planned_gb(data: Phantom, plans: dict) -> float:
    """nnU-Net's own estimate for one pass, times the passes that were planned for: GB as its planner counts them."""
    configuration = plans["configurations"][CONFIGURATION]
    architecture = configuration["architecture"]
    network = get_network_from_plans(
        architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"],
        len(data.dataset_json["channel_names"]), len(data.dataset_json["labels"]), allow_init=False)
    entries = network.compute_conv_feature_map_size(configuration["patch_size"]) * configuration["batch_size"] / 2
    return entries / 560_000_000 * 8 * configuration.get("semi", {}).get("planned_graphs", 1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=8, help="of the first stage; nnU-Net's is 32 (default: 8)")
    parser.add_argument("--gpu-memory", type=float, default=0.25, metavar="GB",
                        help="given to both planners; nnU-Net's is 8 (default: 0.25)")
    parser.add_argument("--image-side", type=int, default=160, help="voxels per axis to plan for (default: 160)")
    parser.add_argument("--seed", type=int, default=0, help="of phantom and batches (default: 0)")
    parser.add_argument("--cross-check", action="store_true", help="count by the operating system too")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), metavar="TRAINER", choices=list(VARIANTS),
                        help="trainers beside nnU-Net's own (default: all of " + ", ".join(VARIANTS) + ")")
    parser.add_argument("--one", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--planner", choices=list(PLANNERS), default=STOCK_PLANNER, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    with phantom(2, 1, (16, 16, 16), arguments.seed, plan_joined_passes=True) as data:
        shape = (arguments.image_side,) * 3
        names = [arguments.planner] if arguments.one else list(PLANNERS)
        plans = {name: data.plan(PLANNERS[name], arguments.gpu_memory, arguments.features, shape) for name in names}
        if arguments.one:
            print_resident_peak(data, plans[arguments.planner], VARIANTS[arguments.one], arguments.seed)
            return
        report(data, plans, arguments)


def report(data: Phantom, plans: dict[str, dict], arguments: argparse.Namespace) -> None:
    """Measure and print both tables."""
    stock_plans, semi_plans = (plans[name]["configurations"][CONFIGURATION] for name in PLANNERS)
    print(f"{machine()}, float32, {arguments.features} features in the first stage, planned for "
          f"{arguments.gpu_memory:g} GB, seed {arguments.seed}")

    def measured(name: str, planner: str) -> tuple[int, int | None]:
        resident = resident_peak(name, planner, arguments) if arguments.cross_check else None
        return counted_peak(data, plans[planner], VARIANTS[name], arguments.seed), resident

    def row(name: str, planner: str, stock: tuple[int, int | None], *cells: str) -> list[str]:
        counted, resident = stock if (name, planner) == (STOCK, STOCK_PLANNER) else measured(name, planner)
        line = [name, *cells, f"{counted / 2**20:.0f} MiB", f"{counted / stock[0]:.2f}"]
        return line + ([f"{resident / stock[1]:.2f}"] if resident is not None and stock[1] is not None else [])

    chosen = [name for name in arguments.only if name != STOCK]
    resident_column = ["resident ratio"] if arguments.cross_check else []
    stock = measured(STOCK, STOCK_PLANNER)
    print(f"\n1. nnU-Net's own plans: patch {stock_plans['patch_size']}, batch size {stock_plans['batch_size']}. "
          "Weights, gradients and momentum are "
          f"{weights_share(data, plans[STOCK_PLANNER], stock[0]):.1%} of the stock trainer's peak.\n")
    print(table(["trainer", "peak", "ratio", *resident_column],
                [row(name, STOCK_PLANNER, stock) for name in [STOCK, *chosen]]))
    print(f"\n2. Same memory to plan for; nnUNetPlannerSemi's patch {semi_plans['patch_size']}, batch size "
          f"{semi_plans['batch_size']}, for {semi_plans['semi']['planned_graphs']} joined passes\n")
    pairs = [(STOCK, STOCK_PLANNER), *((name, "nnUNetPlannerSemi") for name in chosen if "one_pass" in name)]
    print(table(["trainer", "planner", "planned", "peak", "ratio", *resident_column],
                [row(name, planner, stock, planner, f"{planned_gb(data, plans[planner]):.3f} GB")
                 for name, planner in pairs]))


if __name__ == "__main__":
    main()
