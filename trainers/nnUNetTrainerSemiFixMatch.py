"""`-tr nnUNetTrainerSemiFixMatch`: weak to strong, hard pseudo-labels."""

from nnunetv2_semi.methods.fixmatch import FixMatch
from nnunetv2_semi.trainer import nnUNetTrainerSemi


class nnUNetTrainerSemiFixMatch(nnUNetTrainerSemi):
    method_class = FixMatch
