"""Checkpoints of a trainer that is nothing but what they hold."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods.optimization import Optimization
from nnunetv2_semi.training import checkpoints


class Networks(nn.Module):
    """A student, which trains, and a teacher, which is deployed."""

    name = "MeanTeacher"

    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(2, 1), nn.Linear(2, 1)

    def deployable(self):
        return self.teacher


def trainer_after(steps, seed=0, grad_scaler=None, **semi):
    """One that did so many steps, with a second optimiser for the bias."""
    torch.manual_seed(seed)
    method = Networks()
    optimizations = []
    for parameter in method.student.parameters():
        optimizer = torch.optim.SGD([parameter], 0.1, momentum=0.9)
        optimizations.append(Optimization(optimizer, LambdaLR(optimizer, lambda number: 1 / (1 + number))))
    logging, lines = {"train_losses": []}, []
    trainer = SimpleNamespace(
        method=method, optimizations=optimizations, optimizer=optimizations[0].optimizer, grad_scaler=grad_scaler,
        logger=SimpleNamespace(get_checkpoint=lambda: logging, load_checkpoint=logging.update), current_epoch=0,
        _best_ema=None, my_init_kwargs={"fold": 0}, inference_allowed_mirroring_axes=None, foreground={},
        semi={"num_epochs": 10, "MeanTeacher": {"noise": 0.1}, **semi}, lines=lines, print_to_log_file=lines.append)
    for _ in range(steps):
        go_on(trainer)
    return trainer


def go_on(trainer):
    for optimization in trainer.optimizations:
        optimization.optimizer.zero_grad()
    trainer.method.student(torch.ones(1, 2)).square().sum().backward()
    for optimization in trainer.optimizations:
        optimization.optimizer.step()
        optimization.schedule.step()
    trainer.logger.get_checkpoint()["train_losses"].append(1.0)
    trainer._best_ema, trainer.inference_allowed_mirroring_axes = 0.5, (0, 2)
    trainer.foreground = {"case": {1: [3, 4]}}


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.method.parameters()])


def test_restored_it_goes_on_as_if_it_had_not_stopped(tmp_path):
    path = str(tmp_path / "checkpoint.pth")
    trainer = trainer_after(3)
    trainer.current_epoch = 2
    checkpoints.save_whole(checkpoints.contents(trainer), path)
    other = trainer_after(0, seed=1)
    checkpoints.restore(other, torch.load(path, weights_only=False), path)
    assert torch.equal(weights(other), weights(trainer)) and other.current_epoch == 3
    assert (other._best_ema, other.inference_allowed_mirroring_axes) == (0.5, (0, 2))
    assert other.foreground == {"case": {1: [3, 4]}} and other.my_init_kwargs == {"fold": 0}
    assert other.logger.get_checkpoint() == {"train_losses": [1.0] * 3} and other.lines == []
    for each in (trainer, other):  # momentum and learning rates of both optimisers
        go_on(each)
    assert torch.equal(weights(other), weights(trainer))
    assert not torch.equal(weights(other), weights(trainer_after(3)))


def test_a_training_that_goes_on_has_the_settings_of_now():
    """The rate follows from its schedule; momentum and weight decay have none."""
    trainer = trainer_after(3)
    other = trainer_after(0)
    for optimization in other.optimizations:
        optimization.optimizer.param_groups[0].update(momentum=0.5, weight_decay=0.01)
    checkpoints.restore(other, checkpoints.contents(trainer), "checkpoint.pth")
    for before, now in zip(trainer.optimizations, other.optimizations, strict=True):
        [before], [now] = before.optimizer.param_groups, now.optimizer.param_groups
        assert (now["momentum"], now["weight_decay"], now["lr"]) == (0.5, 0.01, before["lr"])


def test_the_deployed_network_is_where_nnunet_looks_and_all_else_under_one_key():
    trainer = trainer_after(2)
    written = checkpoints.contents(trainer)
    assert written["network_weights"].keys() == trainer.method.teacher.state_dict().keys()
    assert torch.equal(written["network_weights"]["weight"], trainer.method.teacher.weight)
    ours = written.pop(checkpoints.KEY)
    assert set(written) == {"network_weights", "optimizer_state", "grad_scaler_state", "logging", "_best_ema",
                            "current_epoch", "init_args", "trainer_name", "inference_allowed_mirroring_axes"}
    assert ours["method"] == "MeanTeacher" and ours["semi"] == trainer.semi
    assert {key.split(".")[0] for key in ours["method_state"]} == {"student", "teacher"}
    assert len(ours["optimizer_states"]) == 1, "the first one is nnU-Net's"


def test_the_scale_of_mixed_precision_goes_with_it_and_may_be_missing():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))
    written = checkpoints.contents(trainer_after(1, grad_scaler=scaler))
    other = trainer_after(0, grad_scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    checkpoints.restore(other, written, "path")
    assert other.grad_scaler.get_scale() == 8.0
    checkpoints.restore(trainer_after(0), written, "path")  # with mixed precision to a machine without
    checkpoints.restore(other, checkpoints.contents(trainer_after(1)), "path")  # and back
    assert other.grad_scaler.get_scale() == 8.0


@pytest.mark.parametrize("key, writer", [("method", "the method CPS"), (None, "a trainer without unlabelled data")])
def test_a_checkpoint_of_another_trainer_is_refused_and_changes_nothing(key, writer):
    written = checkpoints.contents(trainer_after(2, seed=1))
    if key is None:
        del written[checkpoints.KEY]
    else:
        written[checkpoints.KEY][key] = "CPS"
    trainer = trainer_after(0)
    before = weights(trainer)
    with pytest.raises(UserError, match=f"a.pth was written by {writer}, not by MeanTeacher.*-pretrained_weights"):
        checkpoints.restore(trainer, written, "a.pth")
    assert torch.equal(weights(trainer), before) and trainer.current_epoch == 0


@pytest.mark.parametrize("change", ["networks", "optimizers"])
def test_settings_that_make_other_networks_are_refused_by_name_and_change_nothing(change):
    written = checkpoints.contents(trainer_after(2, seed=1))
    trainer = trainer_after(0, noise_bank=3)
    if change == "networks":
        trainer.method.student = nn.Linear(3, 1)
    else:
        trainer.optimizations.pop()
    with pytest.raises(UserError, match="a.pth does not fit the settings, .*noise_bank: None -> 3. Set them back"):
        checkpoints.restore(trainer, written, "a.pth")
    assert trainer.current_epoch == 0
    trainer.semi = trainer_after(0).semi
    with pytest.raises((RuntimeError, ValueError)):  # no setting is to blame
        checkpoints.restore(trainer, written, "a.pth")


def test_other_settings_than_before_are_told():
    trainer = trainer_after(0, num_epochs=20, MeanTeacher={"noise": 0.2}, seed_of_data=4)
    checkpoints.restore(trainer, checkpoints.contents(trainer_after(1, spare=1)), "path")
    assert [line.split("setting, ")[1] for line in trainer.lines] == [
        "num_epochs: 10 -> 20", "spare: 1 -> None", "noise: 0.1 -> 0.2", "seed_of_data: None -> 4"]
    assert all(line.startswith("WARNING") for line in trainer.lines)


@pytest.mark.parametrize("now, changes", [
    ({"seed": 0, "CPS": {"ramp": 0.5}}, []), ({"CPS": {"ramp": 0.5}, "seed": 0}, []),
    ({"seed": 1, "CPS": {"ramp": 0.5}}, ["seed: 0 -> 1"]), ({"seed": 0, "CPS": {"ramp": 0.4}}, ["ramp: 0.5 -> 0.4"])],
    ids=str)
def test_changed_settings(now, changes):
    assert checkpoints.changed_settings({"seed": 0, "CPS": {"ramp": 0.5}}, now) == changes


def test_a_kill_while_writing_keeps_the_older_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint_final.pth"
    checkpoints.save_whole(checkpoints.contents(trainer_after(1)), str(path))
    before = path.read_bytes()

    def killed(checkpoint, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(checkpoints.torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save_whole(checkpoints.contents(trainer_after(2)), str(path))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_snapshots_have_names_of_their_own():
    assert [checkpoints.snapshot_file(number) for number in (1, 12)] == ["checkpoint_snapshot_1.pth",
                                                                         "checkpoint_snapshot_12.pth"]
