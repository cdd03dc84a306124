"""What is wrong with dataset.json, names or the split ends before training, with a message."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.training import batches, splits

TRAINERS = ["nnUNetTrainerSemiMeanTeacher", "nnUNetTrainerSemiStock"]


def cases_of(workspace):
    return sorted(path.name.removesuffix(".nii.gz") for path in workspace.glob("nnUNet_raw/*/labelsTr/*.nii.gz"))


@pytest.mark.parametrize("name", TRAINERS)
def test_a_split_that_cannot_be_used_is_refused(tools, workspace, name):
    first, second, third = cases_of(workspace)
    folds = [{"train": [first, "gone"], "val": [first]}, {"train": [first, second], "val": [third]},
             {"train": [first], "val": []}]
    file = tools.plans_path(workspace).parent / "splits_final.json"
    file.write_text(json.dumps(folds))
    with pytest.raises(UserError) as raised:
        tools.trainer(workspace, name, fold=0).do_split()
    assert str(raised.value).startswith(f"{file} cannot be used: fold 0 names cases that are not in ")
    assert f": gone; fold 0 has cases in both 'train' and 'val': {first}. Correct" in str(raised.value)
    # other folds may be there for their number alone
    assert tools.trainer(workspace, name, fold=1).do_split() == ([first, second], [third])
    with pytest.raises(UserError, match="fold 2 has no case under 'val'"):
        tools.trainer(workspace, name, fold=2).do_split()
    training, _ = tools.trainer(workspace, name, fold="all").do_split()
    assert sorted(training) == [first, second, third]


def test_the_split_is_checked_before_anything_is_preprocessed(tools, workspace, monkeypatch):
    (tools.plans_path(workspace).parent / "splits_final.json").write_text('[{"train": [], "val": []}]')
    monkeypatch.setattr(batches, "prepare", lambda *arguments: pytest.fail("preprocessed"))
    trainer = tools.trainer(workspace, TRAINERS[0])
    trainer.initialize()
    with pytest.raises(UserError, match="fold 0 has no case under 'train'; fold 0 has no case under 'val'"):
        trainer.get_dataloaders()


@pytest.mark.parametrize("name", TRAINERS)
def test_mistakes_in_dataset_json_are_named(tools, workspace, name):
    file = tools.plans_path(workspace).parent / "dataset.json"
    content = json.loads(file.read_text())
    names = list(content["channel_names"].values())
    file.write_text(json.dumps({**content, "channel_names": {"0": names[0], "2": names[1]}}))
    with pytest.raises(UserError) as raised:
        tools.trainer(workspace, name)
    assert str(raised.value).startswith(f'{file} is not as nnU-Net needs it: "channel_names" has the keys "0", "2"')


@pytest.mark.parametrize("name", TRAINERS)
def test_a_labelled_case_whose_name_nnunet_leaves_out_is_refused(tools, workspace, name):
    case = cases_of(workspace)[0]
    for path in list(workspace.glob(f"nnUNet_raw/*/*Tr/{case}*")):
        path.rename(path.with_name(path.name.replace(case, "patient_seg", 1)))
    with pytest.raises(UserError, match="in imagesTr end with _seg: patient_seg"):
        tools.trainer(workspace, name).run_training()


@pytest.mark.parametrize("name", ["nnUNetTrainerSemiMix", *TRAINERS])
def test_no_split_is_made_of_what_a_killed_preprocessing_left(tools, workspace, name):
    """It would leave the other labelled cases out of all trainings to come."""
    left_out = cases_of(workspace)[-1]
    for path in workspace.glob(f"nnUNet_preprocessed/*/*/{left_out}*"):
        if "gt_segmentations" not in path.parts:
            path.unlink()
    file = tools.plans_path(workspace).parent / "splits_final.json"
    file.unlink(missing_ok=True)
    with pytest.raises(UserError, match=rf"{left_out} \(labelled in the raw data set, but not preprocessed\)"):
        tools.trainer(workspace, name).run_training()
    assert not file.exists()


@pytest.mark.parametrize("number", [5, 12])
def test_five_folds_are_those_that_nnunet_itself_makes(tmp_path, monkeypatch, number):
    class Cases:
        def __init__(self, *_, **__):
            self.identifiers = Cases.get_identifiers()

        @staticmethod
        def get_identifiers(*_):
            return [f"case_{index:02d}" for index in reversed(range(number))]

    def trainer(folder):
        return SimpleNamespace(fold=1, dataset_class=Cases, preprocessed_dataset_folder=str(tmp_path),
                               preprocessed_dataset_folder_base=str(folder), print_to_log_file=print,
                               folder_with_segs_from_previous_stage=None)

    monkeypatch.setattr(splits, "infer_dataset_class", lambda folder: Cases)
    monkeypatch.setattr(batches, "check_labelled", lambda trainer: None)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    theirs.mkdir()
    splits.prepare_split(trainer(ours))
    of_nnunet = nnUNetTrainer.do_split(trainer(theirs))
    written, expected = (json.loads((folder / "splits_final.json").read_text()) for folder in (ours, theirs))
    assert written == expected and len(written) == 5
    assert tuple(map(list, of_nnunet)) == tuple(map(list, nnUNetTrainer.do_split(trainer(ours))))


def test_cases_that_a_fold_leaves_out_are_named_in_the_log(tools, workspace):
    first, second, third = cases_of(workspace)
    file = tools.plans_path(workspace).parent / "splits_final.json"
    file.write_text(json.dumps([{"train": [first], "val": [second]}, {"train": [first, third], "val": [second]}]))

    def logged(fold):
        trainer = tools.trainer(workspace, TRAINERS[0], fold=fold)
        trainer.initialize()
        for stream in trainer.get_dataloaders():
            stream.close()
        return "".join(file.read_text() for file in Path(trainer.output_folder).glob("training_log_*"))

    assert f"fold 0 of {file} neither trains nor validates 1 labelled case(s): {third}." in logged(0)
    assert "neither trains" not in logged(1) + logged("all")
