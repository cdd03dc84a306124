"""What is wrong with the cases ends before anything is trained, with a message; so does a run that was none."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.training import batches

TRAINERS = ["nnUNetTrainerSemiMeanTeacher", "nnUNetTrainerSemiSupervised", "nnUNetTrainerSemiStock"]


@pytest.fixture(scope="module")
def moved(phantom_workspace, tmp_path_factory):
    """A copy of the prepared phantom of which a labelled case was made an unlabelled one."""
    copy = tmp_path_factory.mktemp("moved") / "w"
    shutil.copytree(phantom_workspace, copy, ignore=shutil.ignore_patterns("nnUNet_results"))
    label = min(copy.glob("nnUNet_raw/*/labelsTr/*.nii.gz"))
    for path in (label.parent.parent / "imagesTr").glob(label.name.replace(".nii.gz", "_*")):
        shutil.move(path, label.parent.parent / "imagesUn")
    label.unlink()
    return copy


def run(tools, workspace, monkeypatch, name, fold):
    for folder in tools.folders:
        (workspace / folder).mkdir(exist_ok=True)
        monkeypatch.setenv(folder, str(workspace / folder))
    tools.trainer(workspace, name, fold=fold).run_training()


@pytest.mark.parametrize("fold", [0, "all"])
@pytest.mark.parametrize("name", TRAINERS)
def test_a_labelled_case_that_became_unlabelled_is_not_validated_on(tools, moved, monkeypatch, name, fold):
    with pytest.raises(UserError, match=r"not a labelled case of the raw data set any more.*nnUNetv2_preprocess -d 1"):
        run(tools, moved, monkeypatch, name, fold)


def test_labels_are_checked_before_training(tools, phantom_workspace, tmp_path, monkeypatch):
    workspace = tmp_path / "w"
    shutil.copytree(phantom_workspace, workspace, ignore=shutil.ignore_patterns("nnUNet_results"))
    label = min(workspace.glob("nnUNet_raw/*/labelsTr/*"))
    voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(label))).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(voxels * np.float32(0.9999)), str(label))
    with pytest.raises(UserError, match=f"{os.path.basename(label)} .its values 0.9999.* are no whole numbers"):
        run(tools, workspace, monkeypatch, "nnUNetTrainerSemiMeanTeacher", 0)


def test_a_run_that_leaves_out_most_unlabelled_steps_ends_with_a_message(tools, phantom_workspace, tmp_path,
                                                                         monkeypatch):
    workspace, on_device, step = tmp_path / "w", batches.on_device, 0

    def two_of_three_are_spoilt(*arguments):
        nonlocal step
        batch, step = on_device(*arguments), step + 1
        return batch if step % 3 == 0 else replace(batch, unlabelled=torch.full_like(batch.unlabelled, torch.nan))

    shutil.copytree(phantom_workspace, workspace, ignore=shutil.ignore_patterns("nnUNet_results"))
    monkeypatch.setattr(batches, "on_device", two_of_three_are_spoilt)
    with pytest.raises(RuntimeError, match="in [56] of its 9 steps the unlabelled loss, or the gradient, was not a"):
        run(tools, workspace, monkeypatch, "nnUNetTrainerSemiMeanTeacher", 0)
    assert not list(workspace.glob("nnUNet_results/*/*/fold_0/checkpoint_final.pth"))
