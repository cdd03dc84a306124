"""A run of which most steps were left out is not the training that was asked for."""

from __future__ import annotations

from math import isfinite

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semi.training.logs import PREFIX

_LARGEST_SHARE = 0.5


def refuse_mostly_skipped(trainer: nnUNetTrainer) -> None:
    """Stop as soon as more than half of all steps of the run are known to be left out; the log tells, and is continued.

    Raises:
        RuntimeError: with the numbers. What was trained equals the control, or less.
    """
    logged = trainer.logger.local_logger.my_fantastic_logging.get(f"{PREFIX}skipped_steps", [])
    skipped = sum(steps for steps in logged if isfinite(steps))
    total = trainer.num_epochs * trainer.num_iterations_per_epoch
    if skipped > _LARGEST_SHARE * total:
        raise RuntimeError(
            f"Training stopped: in {skipped:.0f} of its {total} steps the unlabelled loss, or the gradient, was not a "
            f"finite number and was left out, so that it is not the training that was asked for. Check the images with "
            f"'nnunetv2_semi doctor -d ID', or lower \"initial_lr\" or \"unlabelled_weight\" in the plans file's "
            f'"semi"; then train again without --c.'
        )
