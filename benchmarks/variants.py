"""The trainers that the benchmarks of a training step compare."""

from __future__ import annotations

from dataclasses import dataclass, field

from nnunetv2_semi.methods.base import Method
from nnunetv2_semi.methods.mass import MASS
from nnunetv2_semi.methods.mean_teacher import MeanTeacher
from nnunetv2_semi.methods.rcps import RCPS
from nnunetv2_semi.methods.semi_cml import SemiCML
from nnunetv2_semi.methods.supervised import Supervised

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
    VARIANTS[f"Mean Teacher, {_arrangement}"] = Variant(MeanTeacher, {"arrangement": _arrangement})
    VARIANTS[f"RCPS, {_arrangement}"] = Variant(RCPS, {"arrangement": _arrangement})
    VARIANTS[f"MASS, {_arrangement}"] = Variant(MASS, {"arrangement": _arrangement})
    VARIANTS[f"Semi-CML stage 1, {_arrangement}"] = _semi_cml(_arrangement, prel=False)
    VARIANTS[f"Semi-CML PReL, {_arrangement}"] = _semi_cml(_arrangement, prel_start=0.0, self_relearning=0.0)
    VARIANTS[f"Semi-CML PReL with self, {_arrangement}"] = _semi_cml(_arrangement, prel_start=0.0, self_relearning=1.0)
