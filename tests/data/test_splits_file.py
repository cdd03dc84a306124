from __future__ import annotations

import json

import pytest

from nnunetv2_semi.data.splits_file import check_splits, read_splits
from nnunetv2_semi.errors import UserError


@pytest.mark.parametrize(("text", "message"), [
    ("[{", "is not valid JSON"),
    ("[]", "holds no list of folds"),
    ('{"train": [], "val": []}', "holds no list of folds"),
    ('[{"train": ["a"], "val": ["b"]}, {"train": "a"}]',
     "another form than nnU-Net's: fold 1 has no list of case names under 'train'; fold 1 has no .* under 'val'"),
    ('[["a"]]', "fold 0 has no list"),
    ('[{"train": [1], "val": ["b"]}]', "fold 0 has no list of case names under 'train'"),
])
def test_another_form_is_refused_with_the_file_and_the_form(tmp_path, text, message):
    path = tmp_path / "splits_final.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        read_splits(str(path))
    assert str(path) in str(raised.value) and '[{"train": ["case_1"' in str(raised.value)
    assert "Correct the file; or remove it" in str(raised.value)


def test_all_that_makes_folds_useless_is_named_at_once(tmp_path):
    path = tmp_path / "splits_final.json"
    folds = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["a", "gone", "c"], "val": ["c", "lost"]},
             {"train": ["a"], "val": []}]
    path.write_text(json.dumps(folds))
    splits = read_splits(str(path))
    assert splits == folds
    check_splits({0: splits[0]}, ["a", "b", "c"], str(path), "imagesTr")
    with pytest.raises(UserError) as raised:
        check_splits(dict(enumerate(splits)), ["a", "b", "c"], str(path), "imagesTr")
    text = str(raised.value)
    assert text.startswith(f"{path} cannot be used: fold 1 names cases that are not in imagesTr: gone, lost; ")
    assert "fold 1 has cases in both 'train' and 'val': c; fold 2 has no case under 'val'" in text
