"""Settings of a method: declared once each, overridden by the ``"semi"`` object of a plans file's configuration."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.schedules import decay_for_length


def setting(default: object, meaning: str, *, at_least: float | None = None, above: float | None = None,
            at_most: float | None = None, below: float | None = None, paper: object = ...) -> Any:
    """Declare a field of a settings class.

    Args:
        default: Its value where a plans file has none.
        meaning: One line for tables and documentation, Markdown.
        at_least, above, at_most, below: Its range; None is in the range where the annotation allows it.
        paper: The value of the paper or of its released code, where it is another one.
    """
    bounds: dict[str, Any] = {"ge": at_least, "gt": above, "le": at_most, "lt": below}
    extra: dict[str, Any] = {} if paper is ... else {"json_schema_extra": {"paper": paper}}
    return Field(default, description=meaning, **{k: v for k, v in bounds.items() if v is not None}, **extra)


def changed(parent: type[BaseModel], name: str, default: object, *, paper: object = ...) -> Any:
    """Declare field ``name`` of the class ``parent`` again, with another default (and paper's value)."""
    extra = {} if paper is ... else {"json_schema_extra": {"paper": paper}}
    return FieldInfo.merge_field_infos(parent.model_fields[name], default=default, **extra)


class Settings(BaseModel):
    """What every method has."""

    num_epochs: int = setting(1000, "as in nnU-Net", at_least=1)
    num_iterations_per_epoch: int = setting(250, "as in nnU-Net", at_least=1)
    num_val_iterations_per_epoch: int = setting(50, "as in nnU-Net", at_least=1)
    save_every: int = setting(50, "epochs between two `checkpoint_latest.pth`", at_least=1)
    initial_lr: float = setting(1e-2, "as in nnU-Net", above=0)
    momentum: float = setting(
        0.99,
        "as in nnU-Net; for trainings of some hundred steps 0.9, with a larger `initial_lr`, suits better",
        at_least=0, below=1,
    )
    deep_supervision: bool = setting(
        True,
        "as in nnU-Net; Mix, FixMatch, CPS, BCP, RCPS, Distillation and the pseudo-labels of Fusion and SynFoC have "
        "their unlabelled terms on all outputs, the others on the finest one",
    )
    seed: int = setting(0, "of initial weights, patches, augmentation, noise", at_least=0)
    unlabelled_batch_size: int | None = setting(
        None,
        "unlabelled patches a step, over all GPUs; `null`: as many as labelled ones",
        at_least=1,
    )
    unlabelled_foreground: float = setting(
        0.0,
        "share of unlabelled patches that are centred on predicted foreground, as nnU-Net centres about a third of "
        "the labelled ones (of two, one); after 10, 30 and 60 % of training the network predicts parts of unlabelled "
        "cases to find it, and such patches are drawn from the cases in which it did",
        at_least=0, at_most=1,
    )
    unlabelled_weight: float = setting(
        1.0,
        "multiplies every unlabelled term; `0`: none of them counts",
        at_least=0,
    )
    arrangement: Literal["auto", "sequential", "one_pass"] = setting(
        "auto",
        '`"sequential"`: the forward passes of a step one after another, gradients accumulated (little memory); '
        '`"one_pass"`: all at once (faster); `"auto"`: all at once if `planned_graphs` allows it (RCPS, MASS: as many '
        "as it allows)",
    )
    planned_graphs: int = setting(
        1,
        "forward passes that the plan has memory for at once; written by the planner: 1 unless planned with "
        "`plan_joined_passes` or by the CPU preset",
        at_least=1,
    )
    gradient_checkpointing: bool = setting(
        False,
        "recompute what is within a stage of a network for its gradient: less memory however passes are arranged, "
        "about a third more time",
    )
    final_validation: bool = setting(
        True,
        "after training, predict the fold's validation cases as nnU-Net does; with `false`, `nnUNetv2_train "
        "... --val` does it later",
    )
    snapshots: int = setting(
        0,
        "checkpoints kept on the way, at equal distances: `checkpoint_snapshot_1.pth` and so on, for "
        "`nnUNetv2_predict -chk`",
        at_least=0,
    )
    pictures: int = setting(
        3,
        "epochs of which `pictures.png` shows a validation patch, spread over training; `0`: none",
        at_least=0,
    )
    mirroring: bool = setting(
        True,
        "mirror patches in training, and average over mirrored images in prediction, as nnU-Net does; MASS: "
        "`false`",
    )
    rotation: float | None = setting(
        None,
        "largest angle of augmentation, degrees; `null`: nnU-Net's choice; MASS: `15`",
        at_least=0,
    )
    drop_modality: float = setting(
        0.0,
        "probability with which a training patch that has several modalities loses one of them",
        at_least=0, at_most=1,
    )
    skip_unreadable: bool = setting(False, "leave out unreadable unlabelled cases with a warning")
    max_skipped_steps: int = setting(50, "so many steps in a row that are not finite stop the training", at_least=1)
    modalities: dict[str, list[int]] | None = setting(
        None,
        "channels of each modality; `null`: those of `dataset.json`, where they should be set",
    )
    regions: bool | None = setting(None, "region-based labels; written by the trainer, whatever you set")

    @property
    def mixes_unlabelled(self) -> bool:
        """Whether boxes of other unlabelled patches are pasted into unlabelled ones."""
        return False

    @property
    def labelled_mixing_by(self) -> str | None:
        """The setting by which boxes of other labelled patches are pasted into labelled ones; None: there are none."""
        return None

    def of_lone_patches(self, labelled: int, unlabelled: int, dimensions: int) -> list[str]:
        """Warnings of what cannot act where a step of a process has so few patches of each kind."""
        warnings = []
        if self.mixes_unlabelled and unlabelled == 1 and self.unlabelled_weight > 0:
            warnings.append('a step has one unlabelled patch (on a GPU), so "cutmix" has no other one to take a box '
                            'from and changes nothing. Set "unlabelled_batch_size" to at least 2 for each GPU.')
        if self.labelled_mixing_by and labelled == 1:
            warnings.append(f'a step has one labelled patch (on a GPU), so "{self.labelled_mixing_by}" has no other '
                            "one to take a box from and counts for nothing. Plan a larger batch_size.")
        return warnings

    def teacher_decay(self, ema_decay: float | None) -> float:
        """``ema_decay``; of None the decay that suits the length of the training, see `decay_for_length`."""
        return decay_for_length(self.num_epochs * self.num_iterations_per_epoch) if ema_decay is None else ema_decay

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, **values: object) -> None:
        """Raises UserError for an unknown name, a value of the wrong type, or one out of its range."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(f'Plans file, "semi": {_what_is_wrong(type(self), error)}') from None


AnySettings = TypeVar("AnySettings", bound=Settings)


def settings_from_plan(cls: type[AnySettings], semi: object, section: str) -> AnySettings:
    """Make the settings of a method from the ``"semi"`` object of a configuration.

    Keys lie at the top, or in an object named after the method (``section``), which wins; objects of other methods are
    left alone, so that one plans file serves several trainers. Raises UserError for an unknown key (naming it and the
    allowed ones) or a value of the wrong type.
    """
    if not isinstance(semi, dict):
        raise UserError('Plans file: "semi" of a configuration must be an object such as {"num_epochs": 200}.')
    names = list(cls.model_fields)
    own = semi.get(section, {})
    if not isinstance(own, dict):
        raise UserError(f'Plans file, "semi": {section!r} must be an object with settings of {section}.')
    others = sections_of_others(cls, semi, section)
    if section not in semi:
        _refuse_misspelt(others, section)
    shared = {key: value for key, value in semi.items() if key not in (section, *others)}
    for key in [*shared, *own]:
        if key not in names:
            near = difflib.get_close_matches(key, [*names, section], 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UserError(f'Plans file, "semi": unknown setting {key!r} for {section}.{hint} '
                            f"Allowed: {', '.join(sorted(names))}.")
    return cls(**{**shared, **own})


def settings_for_plan(settings: Settings, section: str) -> dict:
    """The ``"semi"`` object that gives exactly ``settings``: common ones at the top, the method's in its section."""
    values = settings.model_dump()
    own = {key: value for key, value in values.items() if key not in Settings.model_fields}
    return {**{key: value for key, value in values.items() if key not in own}, **({section: own} if own else {})}


def merged_settings(semi: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """A ``"semi"`` object with ``changes`` on top, themselves such an object.

    Sections of a method are merged. A setting that ``changes`` have at the top is taken out of the sections of
    ``semi``, where it would win.
    """
    merged = {key: {name: before for name, before in value.items() if name not in changes}
              if isinstance(value, dict) and is_section(key, value) else value for key, value in semi.items()}
    for key, value in changes.items():
        before = merged.get(key)
        both = isinstance(before, dict) and isinstance(value, dict) and is_section(key, value)
        merged[key] = {**before, **value} if both else value  # type: ignore[dict-item]
    return merged


def is_section(key: str, value: object) -> bool:
    """Whether an entry of a ``"semi"`` object is the section of a method."""
    return isinstance(value, dict) and key[:1].isupper()


def sections_of_others(cls: type[Settings], semi: Mapping[str, object], section: str) -> list[str]:
    """The sections of a ``"semi"`` object that the method ``section``, with the settings ``cls``, leaves alone."""
    return [key for key, value in semi.items() if key not in (section, *cls.model_fields) and is_section(key, value)]


def paper_value(field: FieldInfo) -> object:
    """What the paper has where it differs from the default; ``...`` where it does not."""
    extra = field.json_schema_extra
    return extra.get("paper", ...) if isinstance(extra, dict) else ...


def value_range(field: FieldInfo) -> str:
    """The range of a field in words; empty where it has none."""
    bounds = {name: bound for constraint in field.metadata for name in ("ge", "gt", "le", "lt")
              if (bound := getattr(constraint, name, None)) is not None}
    if bounds == {"ge": 0, "le": 1}:
        return "between 0 and 1"
    words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "below"}
    return " and ".join(f"{words[name]} {bound}" for name, bound in bounds.items())


def type_name(cls: type[BaseModel], name: str) -> str:
    """The type of a field as it is annotated, without modules."""
    hint = typing.get_type_hints(cls)[name]
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _what_is_wrong(cls: type[BaseModel], error: ValidationError) -> str:
    """Of the first mistake: the setting, what it must be, and what it is."""
    first = error.errors()[0]
    key = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"unknown setting {key!r}."
    out_of_range = first["type"].startswith(("greater_than", "less_than"))
    expected = value_range(cls.model_fields[key]) if out_of_range else type_name(cls, key)
    value = first["input"]
    return f"{key} must be {expected}, got {value!r}."


def _refuse_misspelt(others: list[str], section: str) -> None:
    """Raise UserError where one of ``others`` nearly is the method's ``section``: its settings would change nothing."""
    for name in others:
        if difflib.get_close_matches(name.lower(), [section.lower()], 1, 0.9):
            raise UserError(f'Plans file, "semi": there is no method {name!r}. Did you mean {section!r}?')
