"""`-tr nnUNetTrainerSemiSynFoC`: a foundation model and nnU-Net's network teach each other."""

from nnunetv2_semi.methods.synfoc import SynFoC
from nnunetv2_semi.trainer import nnUNetTrainerSemi


class nnUNetTrainerSemiSynFoC(nnUNetTrainerSemi):
    method_class = SynFoC
