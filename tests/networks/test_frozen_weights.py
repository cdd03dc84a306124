"""Frozen weights from a file: shared by a teacher, left out of checkpoints."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from nnunetv2_semi.networks.frozen_weights import leave_out_of_state_dict, shared_when_frozen
from nnunetv2_semi.teachers import EMATeacher


def encoder_with_adapter() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    network[0].requires_grad_(False)
    leave_out_of_state_dict(network, ["0.weight", "0.bias"])
    return network


def test_state_dict_has_no_frozen_weights_and_loads_without_and_with_them():
    network, other = encoder_with_adapter(), encoder_with_adapter()
    with torch.no_grad():
        network[2].weight.add_(1)
    state = network.state_dict()
    assert sorted(state) == sorted(["1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked",
                                    "2.weight", "2.bias"])
    own = other[0].weight.clone()
    other.load_state_dict(state)
    assert torch.equal(other[2].weight, network[2].weight) and torch.equal(other[0].weight, own)
    other.load_state_dict({**state, "0.weight": torch.full((4, 3), 7.0), "0.bias": torch.zeros(4)})
    assert torch.equal(other[0].weight, torch.full((4, 3), 7.0))
    assert "0.weight" not in state, "what is loaded is not changed"


def test_other_missing_weights_are_still_refused():
    network = encoder_with_adapter()
    state = network.state_dict()
    del state["2.bias"]
    with pytest.raises(RuntimeError, match="2.bias"):
        network.load_state_dict(state)


def test_holds_within_a_larger_module_and_in_copies():
    whole = nn.ModuleDict({"a": encoder_with_adapter()})
    whole["b"] = deepcopy(whole["a"])
    assert not [key for key in whole.state_dict() if ".0." in key]
    with torch.no_grad():
        whole["b"][0].weight.fill_(3)
    before = whole["a"][0].weight.clone()
    whole.load_state_dict(whole.state_dict())
    assert torch.equal(whole["a"][0].weight, before)
    assert torch.equal(whole["b"][0].weight, torch.full((4, 3), 3.0)), "a copy completes from itself"


def test_a_weight_under_two_names_is_left_out_under_both():
    network = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    network["b"].weight = network["a"].weight
    leave_out_of_state_dict(network, ["a.weight", "b.weight"])
    assert sorted(network.state_dict()) == ["a.bias", "b.bias"]
    network.load_state_dict(network.state_dict())


def test_unknown_name_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        leave_out_of_state_dict(nn.Linear(1, 1), ["nothing"])


def test_teacher_shares_frozen_parameters_and_averages_the_others():
    student = encoder_with_adapter()
    teacher = EMATeacher(student, decay=0.5)
    assert teacher.network[0].weight is student[0].weight
    assert teacher.network[2].weight is not student[2].weight
    teacher.reset()
    start, frozen = student[2].weight.detach().clone(), student[0].weight.detach().clone()
    teacher.update()  # the first update copies
    with torch.no_grad():
        student[2].weight.add_(1)
    teacher.update()
    assert torch.allclose(teacher.network[2].weight, start + 0.5)
    assert torch.equal(teacher.network[0].weight, frozen)
    assert student[2].weight.requires_grad and not teacher.network[2].weight.requires_grad


def test_sharing_survives_a_change_of_type():
    student = encoder_with_adapter()
    whole = nn.ModuleList([student, EMATeacher(student)])
    whole.to(torch.bfloat16)
    assert whole[1].network[0].weight is whole[0][0].weight


def test_everything_trains_nothing_is_shared():
    assert shared_when_frozen(nn.Linear(2, 2)) == {}
