from __future__ import annotations

import pytest

from nnunetv2_semi.data.dataset_settings import (
    DatasetSettings,
    folder_name,
    modalities_or_channels,
    num_channels,
    read_dataset_settings,
)
from nnunetv2_semi.errors import UserError

BASE = {"channel_names": {"0": "CT", "1": "T1", "2": "T2"}}


def test_without_the_object_all_is_default():
    assert read_dataset_settings(BASE) == DatasetSettings(None, {}, False, False)


def test_values_are_read():
    semi = {"modalities": {"CT": [0], "MR": [1, 2]}, "domains": {"a": "A_*", "b": ["B_*", "C_*"]}}
    semi |= {"plan_with_unlabelled": True, "plan_joined_passes": True, "plan_with_foundation": 256}
    settings = read_dataset_settings(dict(BASE, semi=semi))
    assert settings.modalities == {"CT": (0,), "MR": (1, 2)}
    assert settings.domains == {"a": ("A_*",), "b": ("B_*", "C_*")}
    assert settings.plan_with_unlabelled is True
    assert settings.plan_joined_passes is True
    assert settings.plan_with_foundation == 256


@pytest.mark.parametrize(
    ("semi", "message"),
    [
        ({"modality": {}}, '"modality".*"modalities", "domains", "plan_with_unlabelled", "plan_joined_passes"'),
        ([], "must be an object"),
        ({"modalities": {}}, '"modalities" must name'),
        ({"modalities": {"CT": 0}}, "'CT'"),
        ({"modalities": {"CT": [True]}}, "'CT'"),
        ({"modalities": {"CT": [3]}}, "channel 3.*0 to 2"),
        ({"modalities": {"CT": [0], "MR": [0, 1]}}, "channel 0 twice"),
        ({"modalities": {"b<1000": [0], "b>1000": [1]}}, "'b<1000' and 'b>1000'.*would share the folder b_1000"),
        ({"domains": {"a": 1}}, "'a'"),
        ({"domains": ["A_*"]}, '"domains" must give a pattern of case names for each domain.*has \\[\'A_'),
        ({"plan_with_unlabelled": "yes"}, "\"plan_with_unlabelled\".*'yes'"),
        ({"plan_joined_passes": 1}, '"plan_joined_passes" in dataset.json must be true or false, not 1'),
        ({"plan_with_foundation": 500}, "multiple of 16 such as 512, not 500"),
        ({"plan_with_foundation": True}, "multiple of 16 such as 512, not True"),
    ],
)
def test_mistakes_are_named(semi, message):
    with pytest.raises(UserError, match=message):
        read_dataset_settings(dict(BASE, semi=semi))


def test_without_channels_an_example_is_given():
    with pytest.raises(UserError, match='names no image channels. Add "channel_names", for example {"0": "T1"}'):
        num_channels({"labels": {"background": 0}})


def test_channels_that_would_share_a_folder_are_modalities_with_their_number():
    named = {**BASE, "channel_names": {"0": "T1+C", "1": "t1 c", "2": "T2"}}
    assert modalities_or_channels(named) == {"T1+C_0": [0], "t1 c_1": [1], "T2_2": [2]}


def test_a_folder_is_named_after_its_modality_without_odd_characters():
    assert folder_name("T1") == "T1"
    assert folder_name("b=0 / ADC") == "b_0_ADC"
