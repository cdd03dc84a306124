"""How long a training step takes, relative to that of nnU-Net's own trainer with the same plans, patch and batch.

Beside it stand the passes through a network that a step consists of, counted while it runs: a batch forward is 1,
backward is 2. Time beyond that ratio is overhead.

On a GPU (--device cuda) the plans are nnU-Net's own, for 8 GB and cases of 160 x 160 x 160 voxels, training is in mixed
precision, and milliseconds and peak memory are printed too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from measuring import GpuMemory, alternately, machine, table
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.semi.nnUNetPlannerSemiCPU import nnUNetPlannerSemiCPU
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from phantom_plans import phantom, random_batch, ready
from torch import nn
from variants import STOCK, VARIANTS

from nnunetv2_semi.networks.modality_encoders import ModalityEncoders
from nnunetv2_semi.trainer import nnUNetTrainerSemi

GPU_CASES = (160, 160, 160)  # voxels, to plan for


class Passes:
    """Batches that went through networks, in units of ``batch_size`` patches."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.forward = self.backward = 0.0

    @contextmanager
    def counted(self, networks: Sequence[nn.Module]) -> Iterator[None]:
        """Count within the block. A recomputation for the backward pass counts as a forward pass."""
        handles = [network.register_forward_pre_hook(self._before) for network in networks]
        handles += [network.register_forward_hook(self._after) for network in networks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, network: nn.Module, images: tuple[torch.Tensor]) -> None:
        self.forward += len(images[0]) / self.batch_size

    def _after(self, network: nn.Module, images: tuple[torch.Tensor], output: object) -> None:
        reached: list[bool] = []  # by a gradient, whichever of the outputs it comes from

        def backward(gradient: torch.Tensor) -> None:
            if not reached:
                self.backward += len(gradient) / self.batch_size
            reached.append(True)
        for tensor in tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(backward)


def tensors(output: object) -> Iterator[torch.Tensor]:
    """The tensors that lists and tuples hold."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, list | tuple):
        for part in output:
            yield from tensors(part)


def encoder_decoders(module: nn.Module) -> list[nn.Module]:
    """The networks in ``module`` that have an encoder and a decoder as nnU-Net's have, or an encoder per modality."""
    return [network for network in module.modules() if isinstance(network, ModalityEncoders)
            or hasattr(network, "encoder") and hasattr(network, "decoder")]


def passes_of(trainer: nnUNetTrainer, batch: dict) -> Passes:
    """The passes of one step."""
    held = trainer.method if isinstance(trainer, nnUNetTrainerSemi) else trainer.network
    passes = Passes(trainer.batch_size)
    with passes.counted(encoder_decoders(held)):
        trainer.train_step(batch)
    return passes


def features_of(trainer: nnUNetTrainer) -> int:
    """Of the first stage of its network."""
    return trainer.configuration_manager.configuration["architecture"]["arch_kwargs"]["features_per_stage"][0]


def parsed(argv: Sequence[str] | None, description: str | None, shape: tuple[int, ...],
           trainers: Sequence[str]) -> argparse.Namespace:
    """The options of a benchmark of steps. shape: of the phantom, the default. trainers: those to choose from."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, all trainers in each (default: 3)")
    parser.add_argument("--shape", type=int, nargs=len(shape), default=shape, help="of the phantom, voxels")
    parser.add_argument("--features", type=int, metavar="N",
                        help="of the networks' first stage (default: the planner's: 8 on a CPU, 32 on a GPU)")
    parser.add_argument("--seed", type=int, default=0, help="of phantom and batches (default: 0)")
    parser.add_argument("--only", nargs="+", default=list(trainers), metavar="TRAINER", choices=list(trainers),
                        help="trainers beside nnU-Net's own (default: all of " + ", ".join(trainers) + ")")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parsed(argv, __doc__, (32, 40, 32), list(VARIANTS))
    chosen = [STOCK, *(name for name in arguments.only if name != STOCK)]
    on_gpu = arguments.device == "cuda"
    with phantom(2, 1, tuple(arguments.shape), arguments.seed) as data:
        planner, cases = (ExperimentPlanner, GPU_CASES) if on_gpu else (nnUNetPlannerSemiCPU, None)
        plans = data.plan(planner, base_features=arguments.features, image_shape=cases)
        trainers, batches, passes, peaks = {}, {}, {}, {}
        for name in chosen:
            with GpuMemory() if on_gpu else nullcontext() as memory:
                trainers[name] = ready(data.trainer(VARIANTS[name].method, plans, VARIANTS[name].semi,
                                                    arguments.device))
                patch = tuple(trainers[name].configuration_manager.patch_size)
                batches[name] = random_batch(trainers[name], patch, arguments.seed)
                passes[name] = passes_of(trainers[name], batches[name])
                if on_gpu:  # the peak is that of a step that finds the optimisers' state there
                    trainers[name].train_step(batches[name])
            peaks[name] = memory.peak if memory else 0
        times = alternately({name: lambda name=name: trainers[name].train_step(batches[name]) for name in chosen},
                            arguments.rounds)
    cost = {name: count.forward + 2 * count.backward for name, count in passes.items()}
    stock = times[STOCK]
    print(f"{machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, patch {list(patch)}, "
          f"{features_of(trainers[STOCK])} features, batch size {trainers[STOCK].batch_size}, "
          f"{arguments.rounds} rounds, seed {arguments.seed}\n")
    rows = []
    for name in chosen:
        ratio = cost[name] / cost[STOCK]
        # networks without an encoder and a decoder as nnU-Net's are not counted
        counted = [f"{passes[name].forward:g}", f"{passes[name].backward:g}", ratio] if ratio else [""] * 3
        time = times[name]
        rows.append([name, *counted, time.wall / stock.wall, *(
            [f"{1000 * time.wall:.0f}", peaks[name] / peaks[STOCK], peaks[name] / 2**30] if on_gpu else
            [time.cpu / stock.cpu, time.cpu / stock.cpu / ratio if ratio else ""])])
    print(table(["trainer", "forward", "backward", "passes", "wall time", *(
        ["milliseconds", "memory", "GiB"] if on_gpu else ["CPU time", "CPU time per pass"])], rows))


if __name__ == "__main__":
    main()
