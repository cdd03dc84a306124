"""`-tr nnUNetTrainerSemiStock`: nnU-Net itself, with the length and seed of a study."""

from nnunetv2_semi.training.stock_trainer import nnUNetTrainerSemiStock

__all__ = ["nnUNetTrainerSemiStock"]
