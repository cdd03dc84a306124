"""`-tr nnUNetTrainerSemiCML`: Semi-CML."""

from nnunetv2_semi.methods.semi_cml import SemiCML
from nnunetv2_semi.trainer import nnUNetTrainerSemi


class nnUNetTrainerSemiCML(nnUNetTrainerSemi):
    method_class = SemiCML
