"""Settings of a method: frozen dataclasses, overridden by the ``"semi"`` object of a plans file's configuration."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from typing import Literal, TypeVar, Union

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.schedules import decay_for_length


@dataclass(frozen=True)
class Settings:
    """What every method has.

    num_epochs, num_iterations_per_epoch, num_val_iterations_per_epoch, save_every (epochs), initial_lr, momentum,
    deep_supervision: as in nnU-Net, with its values. A momentum of 0.99 averages 100 steps: for trainings of some
    hundred steps 0.9, with a larger initial_lr, suits better.
    seed: of network initialisation, sampling, augmentation and noise.
    unlabelled_batch_size: patches per step; None takes the plan's batch size.
    unlabelled_foreground: share of unlabelled patches that are centred on what the network takes for foreground, as
        nnU-Net centres a third of the labelled ones; it looks after a tenth, three and six tenths of training.
    unlabelled_weight: multiplies every unlabelled term (0 leaves the supervised loss alone).
    arrangement: "sequential" runs a step's passes one after another and accumulates gradients, "one_pass" joins them
        (faster, more memory), "auto" joins as many as the plan has room for (planned_graphs).
    planned_graphs: forward passes that the plan has memory for at once; written by the planners, 1 for stock plans.
    gradient_checkpointing: recompute what is within a stage of a network for its gradient (less memory, slower).
    final_validation: after training, nnU-Net's prediction of the fold's validation cases; `--val` makes up for it.
    snapshots: checkpoints kept on the way, at equal distances: checkpoint_snapshot_1.pth and so on.
    pictures: epochs of which pictures.png shows a validation patch, spread evenly over training; 0: no picture.
    mirroring: as augmentation, and for the mean over mirrored images in prediction. rotation: degrees, the largest
        angle of augmentation; None: nnU-Net's choice.
    drop_modality: probability with which a training patch that has several modalities loses one of them.
    skip_unreadable: leave unreadable unlabelled cases out with a warning instead of stopping.
    max_skipped_steps: so many steps in a row with a non-finite loss stop training.
    modalities: modality name -> channels; None takes dataset.json's. regions: filled in by the trainer.
    """

    num_epochs: int = 1000
    num_iterations_per_epoch: int = 250
    num_val_iterations_per_epoch: int = 50
    save_every: int = 50
    initial_lr: float = 1e-2
    momentum: float = 0.99
    deep_supervision: bool = True
    seed: int = 0
    unlabelled_batch_size: int | None = None
    unlabelled_foreground: float = 0.0
    unlabelled_weight: float = 1.0
    arrangement: Literal["auto", "sequential", "one_pass"] = "auto"
    planned_graphs: int = 1
    gradient_checkpointing: bool = False
    final_validation: bool = True
    snapshots: int = 0
    pictures: int = 3
    mirroring: bool = True
    rotation: float | None = None
    drop_modality: float = 0.0
    skip_unreadable: bool = False
    max_skipped_steps: int = 50
    modalities: dict[str, list[int]] | None = field(default=None)
    regions: bool | None = None

    def __post_init__(self) -> None:
        self.at_least(1, "num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every",
                      "planned_graphs", "max_skipped_steps", "unlabelled_batch_size")
        self.at_least(0, "unlabelled_weight", "seed", "pictures", "snapshots", "rotation")
        self.fractions("drop_modality", "unlabelled_foreground")
        self.require("momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        self.positive("initial_lr")

    def require(self, name: str, holds: bool, expected: str) -> None:
        """Raise UserError saying that setting ``name`` must be ``expected``, unless ``holds``."""
        if not holds:
            raise UserError(f'Plans file, "semi": {name} must be {expected}, got {getattr(self, name)!r}.')

    def at_least(self, lowest: int, *names: str) -> None:
        """Raise UserError unless each of the settings ``names`` is ``lowest`` or more, or None."""
        for name in names:
            self.require(name, getattr(self, name) is None or getattr(self, name) >= lowest, f"at least {lowest}")

    def positive(self, *names: str) -> None:
        """Raise UserError unless each of the settings ``names`` is greater than 0."""
        for name in names:
            self.require(name, getattr(self, name) > 0, "greater than 0")

    def fractions(self, *names: str) -> None:
        """Raise UserError unless each of the settings ``names`` is between 0 and 1, or None."""
        for name in names:
            self.require(name, getattr(self, name) is None or 0 <= getattr(self, name) <= 1, "between 0 and 1")

    def teacher_decay(self, ema_decay: float | None) -> float:
        """``ema_decay``; of None the decay that suits the length of the training, see `decay_for_length`."""
        return decay_for_length(self.num_epochs * self.num_iterations_per_epoch) if ema_decay is None else ema_decay


AnySettings = TypeVar("AnySettings", bound=Settings)


def settings_from_plan(cls: type[AnySettings], semi: object, section: str) -> AnySettings:
    """Make the settings of a method from the ``"semi"`` object of a configuration.

    Keys lie at the top, or in an object named after the method (``section``), which wins; objects of other methods are
    left alone, so that one plans file serves several trainers. Raises UserError for an unknown key (naming it and the
    allowed ones) or a value of the wrong type.
    """
    if not isinstance(semi, dict):
        raise UserError('Plans file: "semi" of a configuration must be an object such as {"num_epochs": 200}.')
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    own = semi.get(section, {})
    if not isinstance(own, dict):
        raise UserError(f'Plans file, "semi": {section!r} must be an object with settings of {section}.')
    shared = {key: value for key, value in semi.items() if key != section and not _is_other_method(key, value, names)}
    for key in [*shared, *own]:
        if key not in names:
            near = difflib.get_close_matches(key, [*names, section], 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UserError(f'Plans file, "semi": unknown setting {key!r} for {section}.{hint} '
                            f"Allowed: {', '.join(sorted(names))}.")
    checked: dict = {key: _checked(value, hints[key], key) for key, value in {**shared, **own}.items()}
    return cls(**checked)


def settings_for_plan(settings: Settings, section: str) -> dict:
    """The ``"semi"`` object that gives exactly ``settings``: common ones at the top, the method's in its section."""
    common = {f.name for f in dataclasses.fields(Settings)}
    values = dataclasses.asdict(settings)
    own = {key: value for key, value in values.items() if key not in common}
    return {**{key: value for key, value in values.items() if key in common}, **({section: own} if own else {})}


def _is_other_method(key: str, value: object, names: list[str]) -> bool:
    return isinstance(value, dict) and key not in names and key[:1].isupper()


def _checked(value: object, hint: object, key: str) -> object:
    """``value`` as the annotated type (an int where a float is asked becomes one), or UserError."""
    for option in typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if origin is Literal and value in arguments:
            return value
        if option is float and type(value) in (int, float):
            return float(typing.cast(float, value))
        if origin in (dict, list, tuple) and isinstance(value, (list, tuple) if origin is tuple else origin):
            return tuple(value) if origin is tuple else value
        if origin is None and option is not float and type(value) is option:
            return value
    expected = getattr(hint, "__name__", None) if isinstance(hint, type) else None
    raise UserError(f'Plans file, "semi": {key} must be {expected or str(hint).replace("typing.", "")}, '
                    f"got {value!r}.")
