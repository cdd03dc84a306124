"""`-tr nnUNetTrainerSemiDistill`: a plain nnU-Net learns the soft labels of trained models."""

from nnunetv2_semi.methods.distillation import Distillation
from nnunetv2_semi.trainer import nnUNetTrainerSemi


class nnUNetTrainerSemiDistill(nnUNetTrainerSemi):
    method_class = Distillation
