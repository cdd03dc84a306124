"""`-tr nnUNetTrainerSemiUAMT`: uncertainty-aware Mean Teacher."""

from nnunetv2_semi.methods.uamt import UAMT
from nnunetv2_semi.trainer import nnUNetTrainerSemi


class nnUNetTrainerSemiUAMT(nnUNetTrainerSemi):
    method_class = UAMT
