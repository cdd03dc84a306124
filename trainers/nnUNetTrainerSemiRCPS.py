"""`-tr nnUNetTrainerSemiRCPS`: rectified contrastive pseudo supervision."""

from nnunetv2_semi.methods.rcps import RCPS
from nnunetv2_semi.trainer import nnUNetTrainerSemi


class nnUNetTrainerSemiRCPS(nnUNetTrainerSemi):
    method_class = RCPS
