"""What each part of SynFoC's training step costs, in 2D, relative to a step of nnU-Net's own trainer.

Each model alone, and both, with a nnU-Net of the same size as foundation model and with SAM's ViT-B, which needs the
extra `[foundation]` (its weights are random: a step costs the same with any). FixMatch and Mix stand beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from measuring import alternately, machine, table
from nnunetv2.experiment_planning.semi.nnUNetPlannerSemiCPU import nnUNetPlannerSemiCPU
from phantom_plans import phantom, random_batch, ready
from step import features_of, parsed, passes_of
from variants import STOCK, Variant

from nnunetv2_semi.methods.fixmatch import FixMatch
from nnunetv2_semi.methods.mix import Mix
from nnunetv2_semi.methods.synfoc import SynFoC

IMAGE_SIZE = 256
_ALONE = {"models": "foundation", "deploy": "foundation"}
_NNUNET = {"foundation": "nnunet"}
_SAM = {"foundation": "sam", "weights": "random", "image_size": IMAGE_SIZE}
VARIANTS = {
    STOCK: Variant(None), "FixMatch": Variant(FixMatch),
    "Mix, islands kept": Variant(Mix, {"Mix": {"start": 0.0, "largest_component": False}}),
    **{f"SynFoC, {name}": Variant(SynFoC, {"SynFoC": settings}) for name, settings in (
        ("conventional model alone", {"models": "conventional"}),
        ("nnU-Net as foundation model alone", {**_NNUNET, **_ALONE}),
        ("nnU-Net as foundation model", _NNUNET),
        ("nnU-Net as foundation model, all weights", {**_NNUNET, "lora_rank": 0}),
        (f"SAM at {IMAGE_SIZE} alone", {**_SAM, **_ALONE}),
        (f"SAM at {IMAGE_SIZE}", _SAM))}}


def with_weights(semi: dict, checkpoint: Path) -> dict:
    """``semi`` with ``checkpoint`` where a nnU-Net is the foundation model."""
    settings = semi.get("SynFoC", {})
    return {"SynFoC": {**settings, "weights": str(checkpoint)}} if settings.get("foundation") == "nnunet" else semi


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parsed(argv, __doc__, (128, 128), list(VARIANTS))
    with phantom(2, 1, (12, *arguments.shape), arguments.seed, configuration="2d") as data:
        plans = data.plan(nnUNetPlannerSemiCPU, base_features=arguments.features)
        trainers = {STOCK: ready(data.trainer(None, plans, device=arguments.device))}
        checkpoint = data.preprocessed / "checkpoint.pth"
        trainers[STOCK].save_checkpoint(str(checkpoint))
        trainers |= {name: ready(data.trainer(VARIANTS[name].method, plans,
                                              with_weights(VARIANTS[name].semi, checkpoint), arguments.device))
                     for name in arguments.only if name != STOCK}
        patch = tuple(trainers[STOCK].configuration_manager.patch_size)
        batches = {name: random_batch(trainer, patch, arguments.seed) for name, trainer in trainers.items()}
        passes = {name: passes_of(trainer, batches[name]) for name, trainer in trainers.items()}
        times = alternately({name: lambda name=name: trainers[name].train_step(batches[name]) for name in trainers},
                            arguments.rounds)
    stock = trainers[STOCK]
    print(f"{machine()}, {torch.get_num_threads()} threads, patch {list(patch)}, {features_of(stock)} features, "
          f"batch size {stock.batch_size}, {arguments.rounds} rounds, seed {arguments.seed}\n")
    print(table(["trainer", "U-Net, forward", "U-Net, backward", "wall time", "CPU time"],
                [[name, f"{passes[name].forward:g}", f"{passes[name].backward:g}",
                  times[name].wall / times[STOCK].wall, times[name].cpu / times[STOCK].cpu] for name in trainers]))


if __name__ == "__main__":
    main()
