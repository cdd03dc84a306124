"""`-tr nnUNetTrainerSemiSupervised`: the matched control, without unlabelled data."""

from nnunetv2_semi.methods.supervised import Supervised
from nnunetv2_semi.trainer import nnUNetTrainerSemi


class nnUNetTrainerSemiSupervised(nnUNetTrainerSemi):
    method_class = Supervised
