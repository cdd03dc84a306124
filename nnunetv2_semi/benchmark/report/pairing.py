"""Which measures of a method are compared with which of its control."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import pandas as pd

from nnunetv2_semi.errors import UserError, shown

UNFAIR = "trained on other data sets or folds than the control, or not as often"


class Arm(NamedTuple):
    """Trainings that differ in nothing but data set, seed and fold."""

    group: str
    labelled: int | None
    method: str
    role: str


class Pair(NamedTuple):
    """Measures of a method and of its control that are compared.

    notes: what is not compared. matched: both are the same data sets, seeds and folds. fair: both have equal shares of
    the same data sets and folds.
    """

    own: pd.DataFrame
    control: pd.DataFrame
    notes: list[str]
    matched: bool
    fair: bool


def control_of(arm: Arm, arms: Collection[Arm]) -> Arm | None:
    """The control with as many labelled cases. Raises UserError if there are two."""
    found = [other for other in arms if other.role == "control" and other[:2] == arm[:2]]
    if len(found) > 1:
        names = " and ".join(other.method for other in found)
        raise UserError(f"{arm.group} has two controls for one number of labelled cases: {names}. Name one.")
    return found[0] if found else None


def upper_bound_of(arm: Arm, arms: Collection[Arm]) -> Arm | None:
    """The upper bound of the group; of several, the one with most labelled cases."""
    found = [other for other in arms if other.role == "upper bound" and other.group == arm.group]
    return max(found, key=lambda other: other.labelled or 0, default=None)


def pair_of(rows: pd.DataFrame, control: pd.DataFrame) -> Pair:
    """What of a method and of its control is compared.

    The models (data set, seed and fold) that both have. If there are none, the data sets and folds that both have, with
    whatever seeds: these are exchangeable, folds are not. If there are none either, everything.
    """
    own, other = _models(rows), _models(control)
    same_models = own.isin(other), other.isin(own)
    matched = bool(same_models[0].any())
    same_places = (own.droplevel("seed").isin(other.droplevel("seed")),
                   other.droplevel("seed").isin(own.droplevel("seed")))  # fmt: skip
    if matched:
        (own_kept, control_kept), notes = same_models, []
    elif same_places[0].any():
        (own_kept, control_kept), notes = same_places, ["compared with other seeds of the control"]
    else:
        return Pair(rows, control, [f"no verdict: {UNFAIR}"], False, False)
    models = own.unique().append(other.unique())
    for index, kept, whose in ((own, own_kept, ", which the control lacks"), (other, control_kept, " of the control")):
        if not kept.all():
            notes.append(f"compared without {_named(index[~kept], models)}{whose}")
    fair = _shares(own[own_kept]) == _shares(other[control_kept])
    notes += [] if fair else [f"no verdict: {UNFAIR}"]
    return Pair(rows[own_kept], control[control_kept], notes, matched, fair)


def _models(rows: pd.DataFrame) -> pd.MultiIndex:
    """Data set, seed and fold of each row."""
    return pd.MultiIndex.from_arrays(
        [rows["dataset"], *(rows[name].astype("string").fillna("unknown") for name in ("seed", "fold"))],
        names=["dataset", "seed", "fold"],
    )


def _named(left_out: pd.MultiIndex, models: pd.MultiIndex) -> str:
    """Models by that in which any of ``models`` differ: seed 2, seed 3."""
    words = [(place, level.replace("dataset", "data set")) for place, level in enumerate(models.names)
             if models.get_level_values(level).nunique() > 1]  # fmt: skip
    return shown((" ".join(f"{word} {model[place]}" for place, word in words) for model in left_out.unique()), 3)


def _shares(models: pd.MultiIndex) -> dict[tuple[str, str], float]:
    """Weight of each data set and fold in a mean over folds, then trainings."""
    table = models.unique().to_frame(index=False)
    table["share"] = 1 / table.groupby(["dataset", "seed"])["fold"].transform("size")
    shares = table.groupby(["dataset", "fold"])["share"].sum()
    return (shares / shares.sum()).round(9).to_dict()
