"""`-tr nnUNetTrainerSemiFusion`: one encoder per modality, fused by attention; dynamic pseudo-labels."""

from nnunetv2_semi.methods.fusion import Fusion
from nnunetv2_semi.trainer import nnUNetTrainerSemi


class nnUNetTrainerSemiFusion(nnUNetTrainerSemi):
    method_class = Fusion
