"""The trainers that the benchmarks of a training step compare."""

from __future__ import annotations

from dataclasses import dataclass, field

from nnunetv2_semi.methods.base import Method
from nnunetv2_semi.methods.bcp import BCP
from nnunetv2_semi.methods.cps import CPS
from nnunetv2_semi.methods.fixmatch import FixMatch
from nnunetv2_semi.methods.fusion import Fusion
from nnunetv2_semi.methods.mass import MASS
from nnunetv2_semi.methods.mean_teacher import MeanTeacher
from nnunetv2_semi.methods.mix import Mix
from nnunetv2_semi.methods.rcps import RCPS
from nnunetv2_semi.methods.semi_cml import SemiCML
from nnunetv2_semi.methods.supervised import Supervised
from nnunetv2_semi.methods.uamt import UAMT

STOCK = "nnU-Net's own trainer"


@dataclass(frozen=True)
class Variant:
    """method: None for nnU-Net's own trainer. semi: settings in the plans."""

    method: type[Method] | None
    semi: dict = field(default_factory=dict)


def _semi_cml(arrangement: str, **settings: object) -> Variant:
    return Variant(SemiCML, {"arrangement": arrangement, "SemiCML": settings})


VARIANTS = {STOCK: Variant(None), "Supervised": Variant(Supervised)}
for _arrangement in ("sequential", "one_pass"):
    for _title, _searched in (("Mix", True), ("Mix, islands kept", False)):
        VARIANTS[f"{_title}, {_arrangement}"] = Variant(Mix, {
            "arrangement": _arrangement, "Mix": {"start": 0.0, "largest_component": _searched}})
    VARIANTS[f"FixMatch, {_arrangement}"] = Variant(FixMatch, {"arrangement": _arrangement})
    VARIANTS[f"CPS, {_arrangement}"] = Variant(CPS, {"arrangement": _arrangement})
    VARIANTS[f"BCP, {_arrangement}"] = Variant(BCP, {
        "arrangement": _arrangement, "BCP": {"pretrain_fraction": 0.0, "largest_component": False}})
    VARIANTS[f"UAMT, {_arrangement}"] = Variant(UAMT, {"arrangement": _arrangement})
    VARIANTS[f"Fusion, {_arrangement}"] = Variant(Fusion, {"arrangement": _arrangement})
    VARIANTS[f"Mean Teacher, {_arrangement}"] = Variant(MeanTeacher, {"arrangement": _arrangement})
    VARIANTS[f"RCPS, {_arrangement}"] = Variant(RCPS, {"arrangement": _arrangement})
    VARIANTS[f"MASS, {_arrangement}"] = Variant(MASS, {"arrangement": _arrangement})
    VARIANTS[f"Semi-CML stage 1, {_arrangement}"] = _semi_cml(_arrangement, prel=False)
    VARIANTS[f"Semi-CML PReL, {_arrangement}"] = _semi_cml(_arrangement, prel_start=0.0, self_relearning=0.0)
    VARIANTS[f"Semi-CML PReL with self, {_arrangement}"] = _semi_cml(_arrangement, prel_start=0.0, self_relearning=1.0)
