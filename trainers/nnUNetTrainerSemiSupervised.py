"""`-tr nnUNetTrainerSemiSupervised`: the matched control: no unlabelled data, all else as in the semi-supervised trainers."""

from nnunetv2_semi.methods.supervised import Supervised
from nnunetv2_semi.trainer import nnUNetTrainerSemi


class nnUNetTrainerSemiSupervised(nnUNetTrainerSemi):
    method_class = Supervised
