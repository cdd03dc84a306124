"""The start of a student's fine-tuning: its last checkpoint, as one that nnUNetv2_train --c goes on from."""

from __future__ import annotations

from pathlib import Path

from nnunetv2_semi.benchmark.study.execution import FINAL
from nnunetv2_semi.data.atomic_files import read_json_object, write_json_whole
from nnunetv2_semi.processes.commands import CommandFailed

# In the fold folder: which student was fine-tuned.
MARKER = "selftrain_student.json"


def begin_fine_tuning(student: Path, model: Path, plans: dict, dataset_json: dict) -> None:
    """Put the student's last checkpoint into a fold folder; does nothing where one of the same student is there.

    The training goes on with all weights, averaged ones too, the optimisers, and the learning rate that the schedule of
    ``plans`` has at that epoch. ``-pretrained_weights`` would leave the segmentation layers out.

    Args:
        student: Fold folder of the student.
        model: Fold folder of the fine-tuned model.
        plans, dataset_json: Of the fine-tuned model.

    Raises:
        CommandFailed: The folder holds a model that was fine-tuned from another student.
    """
    # Imports torch.
    import torch

    from nnunetv2_semi.training import checkpoints

    checkpoint = torch.load(student / FINAL, map_location="cpu", weights_only=False, mmap=True)
    marker = {"student": str(student), "finished": float(checkpoint["logging"]["epoch_end_timestamps"][-1])}
    if any(model.glob("checkpoint_*.pth")):
        begun = read_json_object(str(model / MARKER)) or {}
        if begun.get("finished") != marker["finished"]:
            raise CommandFailed(f"{model} was fine-tuned from another student than the one in {student}. Remove it.")
        return
    write_json_whole(str(model / MARKER), marker)
    checkpoint["init_args"] = {**checkpoint["init_args"], "plans": plans, "dataset_json": dataset_json}
    checkpoints.save_whole(checkpoint, str(model / "checkpoint_latest.pth"))
