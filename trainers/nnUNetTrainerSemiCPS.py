"""`-tr nnUNetTrainerSemiCPS`: cross pseudo supervision of two networks."""

from nnunetv2_semi.methods.cps import CPS
from nnunetv2_semi.trainer import nnUNetTrainerSemi


class nnUNetTrainerSemiCPS(nnUNetTrainerSemi):
    method_class = CPS
