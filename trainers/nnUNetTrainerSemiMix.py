"""`-tr nnUNetTrainerSemiMix`: the recommended trainer."""

from nnunetv2_semi.methods.mix import Mix
from nnunetv2_semi.trainer import nnUNetTrainerSemi


class nnUNetTrainerSemiMix(nnUNetTrainerSemi):
    method_class = Mix
