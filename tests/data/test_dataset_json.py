from __future__ import annotations

import json
import re

import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_semi.data.dataset_json import check_dataset_json, dataset_json_mistakes, read_dataset_json
from nnunetv2_semi.errors import UserError

GOOD = {
    "channel_names": {"0": "T1", "1": "CT"},
    "labels": {"background": 0, "organ": 1, "tumour": 2},
    "numTraining": 5,
    "file_ending": ".nii.gz",
}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}


@pytest.mark.parametrize("changes", [
    {},
    {"labels": {"background": 0, "organ": 1, "ignore": 2}},
    {"labels": REGIONS, "regions_class_order": [1, 2, 3]},
    {"labels": {**REGIONS, "ignore": 4}, "regions_class_order": [1, 2, 3]},
    {"labels": {"background": 0, "organ": [1]}},
    {"channel_names": {"0": "T1", "1": "T1"}},
    {"file_ending": ".png"},
    {"overwrite_image_reader_writer": "NibabelIO", "file_ending": ".nii"},
    {"overwrite_image_reader_writer": "None"},
    {"dataset": {"a": {"images": ["a.nii.gz"], "label": "b.nii.gz"}}},
])
def test_what_nnunet_takes_is_taken(changes):
    content = {**GOOD, **changes}
    assert dataset_json_mistakes(content) == []
    LabelManager(content["labels"], content.get("regions_class_order"))


ONE_MISTAKE = [
    ({"channel_names": None}, '"channel_names" is missing.*"channel_names": {"0": "T1", "1": "T2"}'),
    ({"channel_names": ["T1", "CT"]}, 'is a list: it should be {"0": "T1", "1": "CT"}'),
    ({"channel_names": "T1"}, '"channel_names" is "T1": it should name each channel'),
    ({"channel_names": {"CT": "1", "T1": 0}}, 'names and numbers swapped: it should be {"0": "T1", "1": "CT"}'),
    ({"channel_names": {"a": "T1"}}, 'keys should be the numbers of the channels, from "0"'),
    ({"channel_names": {"0": "T1", "2": "CT"}},
     'has the keys "0", "2": channels are numbered from "0" without a gap.*{"0": "T1", "1": "CT"}'),
    ({"channel_names": {"1": "CT", "0": "T1"}}, 'listed in this order, such as {"0": "T1", "1": "CT"}'),
    ({"channel_names": {"0": "T1", "1": 5}}, 'has no name for channel "1": each name should be a text'),
    ({"channel_names": None, "modality": {"0": "T1"}}, '"modality" is the old name of "channel_names": rename it'),
    ({"modality": {"0": "T1"}}, 'which is there too: remove "modality"'),
    ({"labels": None}, '"labels" is missing: .*"labels": {"background": 0, "organ": 1}'),
    ({"labels": ["background", "organ"]}, 'is a list: it should be {"background": 0, "organ": 1}'),
    ({"labels": 3}, '"labels" is 3: it should give each name its value'),
    ({"labels": {"1": "organ", "0": "Background"}},
     'as in nnU-Net\'s first version: it should be {"background": 0, "organ": 1}'),
    ({"labels": {"organ": 1}}, 'has no "background": add "background": 0'),
    ({"labels": {"Background": 0, "organ": 1}}, 'rename "Background", which is 0, to "background"'),
    ({"labels": {"background": 1, "organ": 2}}, '"background" is 1 in "labels": it should be 0'),
    ({"labels": {"background": 0, "organ": "1"}}, 'no whole number.* as value of "organ"'),
    ({"labels": {"background": 0, "organ": 1, "ignore": [2]}}, 'no whole number.* as value of "ignore"'),
    ({"labels": {"background": 0, "organ": 1, "tumour": 3}}, "values 0, 1, 3, but not 2: number them 0 to 2"),
    ({"labels": {"background": 0, "organ": -1}}, "has the value -1: values are 0 or greater"),
    ({"labels": {"background": 0, "organ": 1, "ignore": 255}}, '"ignore" is 255.* should be the highest value, 2,'),
    ({"labels": {"background": 0}}, "names nothing but background"),
    ({"labels": {"background": 0, "organ": 1, "again": 1}}, 'gives "organ", "again" the same value 1'),
    ({"labels": REGIONS},
     r'has regions, but "regions_class_order" is missing.*each of "whole", "core", "enhancing".*such as \[1, 2, 3\]'),
    ({"labels": REGIONS, "regions_class_order": [1, 2]}, r'"regions_class_order" is \[1, 2\]: it should be a list'),
    ({"labels": REGIONS, "regions_class_order": [1, 2, 7]}, r'"regions_class_order" is \[1, 2, 7\]'),
    ({"file_ending": None}, '"file_ending" is missing: it should be that of the images, such as ".nii.gz"'),
    ({"file_ending": 7}, '"file_ending" is 7'),
    ({"file_ending": "nii.gz"}, 'begin with a dot, ".nii.gz"'),
    ({"file_ending": ".dcm"}, '".dcm", which nnU-Net cannot read: it should be one of .*.nii.gz'),
    ({"overwrite_image_reader_writer": "NoIO"}, '"NoIO", which nnU-Net does not find: remove it, or .*SimpleITKIO'),
    ({"numTraining": None}, '"numTraining" is missing: it should be the number of labelled cases'),
    ({"numTraining": "5"}, '"numTraining" is "5": it should be the number'),
    ({"dataset": []}, '"dataset" should list the labelled cases'),
    ({"dataset": {"a": {"images": []}}}, '"dataset" has no images or no label of "a"'),
]


@pytest.mark.parametrize(("changes", "message"), ONE_MISTAKE, ids=lambda part: json.dumps(part)[:50])
def test_each_mistake_is_named_with_what_it_should_say(changes, message):
    content = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    mistakes = dataset_json_mistakes(content)
    assert len(mistakes) == 1 and re.search(message, mistakes[0]), mistakes


def test_all_mistakes_are_in_one_error_with_the_file(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({**GOOD, "channel_names": ["T1"], "file_ending": "nii.gz"}))
    with pytest.raises(UserError, match=r"dataset\.json is not as nnU-Net needs it: .*is a list.*begin with a dot"):
        read_dataset_json(str(path))
    check_dataset_json(GOOD, "dataset.json")


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_missing_file_or_another_kind_of_file_is_named(tmp_path, text):
    path = tmp_path / "dataset.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json is missing or is not a JSON object"):
        read_dataset_json(str(path))
