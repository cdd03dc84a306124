"""`-tr nnUNetTrainerSemiMeanTeacher`: Mean Teacher."""

from nnunetv2_semi.methods.mean_teacher import MeanTeacher
from nnunetv2_semi.trainer import nnUNetTrainerSemi


class nnUNetTrainerSemiMeanTeacher(nnUNetTrainerSemi):
    method_class = MeanTeacher
