"""`-tr nnUNetTrainerSemiBCP`: bidirectional copy-paste."""

from nnunetv2_semi.methods.bcp import BCP
from nnunetv2_semi.trainer import nnUNetTrainerSemi


class nnUNetTrainerSemiBCP(nnUNetTrainerSemi):
    method_class = BCP
