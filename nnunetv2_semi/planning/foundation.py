"""What a plan leaves of the memory where a foundation model trains beside the network."""

from __future__ import annotations

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.networks.foundation_memory import sam_vit_b_memory

_GB = 2 ** 30
_SMALLEST_BATCH = 2  # as in nnU-Net


def batch_beside_foundation(batch_size: int, gb_of_a_patch: float, target_gb: float, image_size: int,
                            passes: int = 1) -> int:
    """The largest batch, of ``batch_size`` at most, with which network and foundation model fit the memory target.

    Args:
        batch_size: of the network alone.
        gb_of_a_patch: memory of the network's pass of one patch.
        target_gb: memory target of the plan.
        image_size: pixels a side of the foundation model's input.
        passes: of the foundation model that a step holds at once.

    Raises:
        UserError: two patches do not fit.
    """
    def needed(batch: int) -> float:
        return gb_of_a_patch * batch + sam_vit_b_memory(image_size, passes * batch, checkpointing=False).total / _GB

    fitting = [batch for batch in range(_SMALLEST_BATCH, batch_size + 1) if needed(batch) <= target_gb]
    if not fitting:
        raise UserError(f"A batch of {_SMALLEST_BATCH} patches and a foundation model with inputs of {image_size} "
                        f"pixels take {needed(_SMALLEST_BATCH):.1f} GB, the memory target is {target_gb:g}. Set a "
                        'larger one with -gpu_memory_target, or a smaller "plan_with_foundation".')
    return fitting[-1]
