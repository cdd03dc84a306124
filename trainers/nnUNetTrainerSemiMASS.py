"""`-tr nnUNetTrainerSemiMASS`: unpaired modalities with atlases."""

from nnunetv2_semi.methods.mass import MASS
from nnunetv2_semi.trainer import nnUNetTrainerSemi


class nnUNetTrainerSemiMASS(nnUNetTrainerSemi):
    method_class = MASS
