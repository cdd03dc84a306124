"""The trainer base on a 3D phantom with two modalities, in this process."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from PIL import Image

from nnunetv2_semi import trainer as trainer_module
from nnunetv2_semi.compat import no_more_threads_than_cores
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.training import checkpoints


def weights(trainer):
    return {k: v.clone() for k, v in trainer.method.state_dict().items() if isinstance(v, torch.Tensor)}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", ["nnUNetTrainerSemiMeanTeacher", "nnUNetTrainerSemiCML",
                                  "nnUNetTrainerSemiRCPS", "nnUNetTrainerSemiCPS", "nnUNetTrainerSemiBCP",
                                  "nnUNetTrainerSemiMix"])
def test_continued_training_ends_with_the_same_weights(tools, workspace, name):
    tools.set_semi(workspace, num_epochs=4, SemiCML={"prel_start": 0.5}, RCPS={"buffer_steps": 2},
                   BCP={"pretrain_fraction": 0.3}, Mix={"unlabelled_foreground": 0.5})
    whole = tools.trainer(workspace, name)
    whole.run_training()

    shutil.rmtree(workspace / "nnUNet_results")
    interrupted = tools.trainer(workspace, name)
    at_epoch_end, interrupted.on_epoch_end = interrupted.on_epoch_end, lambda: _stop_after(interrupted, at_epoch_end, 2)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run_training()
    torch.manual_seed(99)
    np.random.seed(99)
    continued = tools.trainer(workspace, name, continue_training=True)
    continued.load_checkpoint(os.path.join(continued.output_folder, "checkpoint_latest.pth"))
    assert continued.current_epoch == 2
    continued.run_training()

    assert same(weights(whole), weights(continued))
    log, log_continued = (t.logger.local_logger.my_fantastic_logging for t in (whole, continued))
    for key in log:
        if not key.endswith("timestamps"):
            assert np.allclose(log[key], log_continued[key], rtol=0, atol=0, equal_nan=True), key


def _stop_after(trainer, at_epoch_end, epochs):
    at_epoch_end()
    if trainer.current_epoch == epochs:
        raise KeyboardInterrupt


def test_one_seed_gives_one_result_and_another_seed_another(tools, workspace):
    tools.set_semi(workspace, num_epochs=1)
    results = []
    for seed in (0, 0, 1):
        tools.set_semi(workspace, seed=seed)
        trainer = tools.trainer(workspace, "nnUNetTrainerSemiMeanTeacher")
        trainer.run_training()
        results.append(weights(trainer))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_control_and_method_see_the_same_labelled_batches_and_start_alike(tools, workspace):
    batches, starts = [], []
    for name in ("nnUNetTrainerSemiSupervised", "nnUNetTrainerSemiMeanTeacher"):
        trainer = tools.trainer(workspace, name)
        trainer.on_train_start()
        starts.append([p.clone() for p in trainer.network.parameters()])
        batches.append(next(trainer.dataloader_train))
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))
    assert torch.equal(batches[0]["labelled"]["data"], batches[1]["labelled"]["data"])
    assert list(batches[0]["labelled"]["keys"]) == list(batches[1]["labelled"]["keys"])
    assert "unlabelled" not in batches[0] and batches[1]["unlabelled"]["data"].shape == (2, 2, 16, 20, 16)


def test_methods_are_told_which_channels_nnunet_normalises_within_a_mask(tools, workspace):
    path = tools.plans_path(workspace)
    plans = json.loads(path.read_text())
    for configuration in plans["configurations"].values():
        configuration["use_mask_for_norm"] = [False, True]
    path.write_text(json.dumps(plans))
    trainer = tools.trainer(workspace, "nnUNetTrainerSemiMix")
    trainer.initialize()
    assert trainer.method.context.masked_channels == (1,)


def test_unlabelled_weight_zero_is_the_control(tools, workspace):
    tools.set_semi(workspace, num_epochs=1, unlabelled_weight=0.0)
    students = []
    for name in ("nnUNetTrainerSemiSupervised", "nnUNetTrainerSemiMeanTeacher"):
        trainer = tools.trainer(workspace, name)
        trainer.run_training()
        students.append(trainer.method.student.state_dict())
    assert same(*students)


def test_checkpoint_holds_the_deployed_network_and_stock_nnunet_loads_it(tools, workspace):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    tools.set_semi(workspace, num_epochs=1, MeanTeacher={"deploy": "teacher"})
    trainer = tools.trainer(workspace, "nnUNetTrainerSemiMeanTeacher")
    trainer.run_training()
    checkpoint = tools.load(Path(trainer.output_folder) / "checkpoint_final.pth")
    stock = nnUNetTrainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 2,
                                                     trainer.label_manager.num_segmentation_heads, True)
    stock.load_state_dict(checkpoint["network_weights"])
    for own, deployed in zip(trainer.method.teacher.network.parameters(), stock.parameters(), strict=True):
        assert torch.equal(own, deployed)
    assert not same(checkpoint["network_weights"], trainer.method.student.state_dict())
    assert set(checkpoint) - {checkpoints.KEY} == {
        "network_weights", "optimizer_state", "grad_scaler_state", "logging", "_best_ema", "current_epoch", "init_args",
        "trainer_name", "inference_allowed_mirroring_axes"}


def test_pictures_show_the_same_patch_through_training(tools, workspace):
    tools.set_semi(workspace, num_epochs=4, pictures=3)
    trainer = tools.trainer(workspace, "nnUNetTrainerSemiRCPS")
    trainer.run_training()
    folder = Path(trainer.output_folder)
    rows = [np.load(folder / "pictures" / f"epoch_{epoch:04d}.npz") for epoch in (0, 2, 3)]
    assert len(list((folder / "pictures").iterdir())) == 3
    for row in rows:
        assert np.array_equal(row["image/image"], rows[0]["image/image"])
        assert set(row.files) == {"image/image", "image/e^-D", "segmentation/truth", "segmentation/pseudo-label",
                                  "segmentation/prediction of a view"}
        assert 0 <= row["image/e^-D"].min() and row["image/e^-D"].max() <= 1 + 1e-5
        assert (row["segmentation/truth"] > 0).any()
    assert not np.array_equal(rows[0]["image/e^-D"], rows[-1]["image/e^-D"])
    assert (folder / "pictures.png").stat().st_size > 10_000


def test_teacher_starts_from_pretrained_weights(tools, workspace):
    from nnunetv2.run.run_training import maybe_load_checkpoint

    tools.set_semi(workspace, num_epochs=1)
    first = tools.trainer(workspace, "nnUNetTrainerSemiMeanTeacher")
    first.run_training()
    pretrained = str(workspace / "pretrained.pth")
    shutil.copy(os.path.join(first.output_folder, "checkpoint_final.pth"), pretrained)
    tools.set_semi(workspace, seed=5)
    second = tools.trainer(workspace, "nnUNetTrainerSemiMeanTeacher")
    maybe_load_checkpoint(second, False, False, pretrained)
    second.on_train_start()
    loaded = tools.load(pretrained)["network_weights"]
    for key, value in second.method.teacher.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[key])
        assert "seg_layers" in key or torch.equal(value, loaded[key])


def test_plans_of_the_model_say_how_it_was_made(tools, workspace):
    tools.set_semi(workspace, num_epochs=1, SemiCML={"asc_weight": 2.0}, seed=3)
    trainer = tools.trainer(workspace, "nnUNetTrainerSemiCML")
    trainer.run_training()
    semi = json.loads((Path(trainer.output_folder_base) / "plans.json").read_text())[
        "configurations"]["3d_fullres"]["semi"]
    assert (semi["num_epochs"], semi["seed"], semi["SemiCML"]["asc_weight"]) == (1, 3, 2.0)
    assert list(semi["modalities"].values()) == [[0], [1]] and semi["regions"] is False
    assert semi["SemiCML"]["prel_start"] == 0.63


def test_log_names_every_term_with_its_weight(tools, workspace, progress_png):
    tools.set_semi(workspace, num_epochs=2, SemiCML={"prel_start": 0.5})
    trainer = tools.trainer(workspace, "nnUNetTrainerSemiCML")
    trainer.run_training()
    log = trainer.logger.local_logger.my_fantastic_logging
    names = list(trainer.settings.modalities)
    for key in ("loss_asc", "weight_asc", "loss_consistency", "teacher_student_agreement", "unlabelled_voxels_used",
                *(f"training_dice_{n}" for n in names), *(f"validation_dice_{n}" for n in names)):
        assert np.isfinite(log[f"semi/{key}"][0]), key
    second_stage = [key for key in log if key.startswith("semi/loss_prel_")]
    assert len({len(values) for values in log.values()}) == 1, "nnU-Net plots no further than the shortest list"
    assert np.isnan(log["semi/loss_asc"][1])
    assert second_stage and np.isnan(log[second_stage[0]][0]) and np.isfinite(log[second_stage[0]][1])
    text = Path(trainer.log_file).read_text()
    assert "asc " in text and "(weight 0.1000)" in text
    with Image.open(Path(trainer.output_folder) / "progress.png") as picture:
        assert picture.height > 2 * picture.width, "our panels are below nnU-Net's three"


def test_snapshots_are_kept_and_are_models_of_their_own(tools, workspace):
    tools.set_semi(workspace, snapshots=2)
    trainer = tools.trainer(workspace, "nnUNetTrainerSemiMeanTeacher")
    trainer.run_training()
    folder = Path(trainer.output_folder)
    kept = [tools.load(folder / f"checkpoint_{name}.pth") for name in ("snapshot_1", "snapshot_2", "final")]
    assert [checkpoint["current_epoch"] for checkpoint in kept[:2]] == [1, 2]
    assert kept[0]["network_weights"].keys() == kept[2]["network_weights"].keys()
    assert not same(kept[0]["network_weights"], kept[1]["network_weights"])


@pytest.mark.parametrize("name", ["nnUNetTrainerSemiSupervised", "nnUNetTrainerSemiStock"])
def test_final_validation_can_wait(tools, workspace, name):
    tools.set_semi(workspace, final_validation=False, num_epochs=1)
    trainer = tools.trainer(workspace, name)
    trainer.run_training()
    trainer.perform_actual_validation()
    assert not (Path(trainer.output_folder) / "validation" / "summary.json").exists()
    later = tools.trainer(workspace, name)  # as with --val
    later.load_checkpoint(os.path.join(trainer.output_folder, "checkpoint_final.pth"))
    later.perform_actual_validation()
    assert (Path(trainer.output_folder) / "validation" / "summary.json").exists()


def test_stock_trainer_has_nnunets_step_and_the_length_of_the_plan(tools, workspace):
    tools.set_semi(workspace, num_epochs=2, initial_lr=0.05, momentum=0.9)
    trainer = tools.trainer(workspace, "nnUNetTrainerSemiStock")
    trainer.run_training()
    assert trainer.current_epoch == 2 and trainer.optimizer.defaults["nesterov"]
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.9
    assert type(trainer).train_step is nnUNetTrainer.train_step
    assert type(trainer).get_dataloaders is nnUNetTrainer.get_dataloaders
    start = [tools.trainer(workspace, "nnUNetTrainerSemiStock") for _ in range(2)]
    for each in start:
        each.initialize()
    assert same(*(each.network.state_dict() for each in start))


def test_checkpoint_of_another_trainer_is_refused(tools, workspace):
    control = tools.trainer(workspace, "nnUNetTrainerSemiSupervised")
    control.initialize()
    path = os.path.join(control.output_folder, "checkpoint_final.pth")
    control.save_checkpoint(path)
    other = tools.trainer(workspace, "nnUNetTrainerSemiMeanTeacher", continue_training=True)
    with pytest.raises(UserError, match="written by the method Supervised, not by MeanTeacher"):
        other.load_checkpoint(path)


def test_no_unlabelled_case_is_an_error_before_training_but_not_for_the_control(tools, workspace):
    shutil.rmtree(next((workspace / "nnUNet_raw").glob("*/imagesUn")))
    tools.set_semi(workspace, num_epochs=1)
    with pytest.raises(UserError, match="imagesUn"):
        tools.trainer(workspace, "nnUNetTrainerSemiMeanTeacher").run_training()
    tools.trainer(workspace, "nnUNetTrainerSemiSupervised").run_training()


@pytest.mark.parametrize(("name", "fold"), [("Supervised", 0), ("Mix", "all"), ("Stock", 0)])
def test_a_configuration_that_was_not_preprocessed_is_told_with_the_command(tools, workspace, name, fold):
    trainer = tools.trainer(workspace, f"nnUNetTrainerSemi{name}", fold=fold)
    shutil.rmtree(trainer.preprocessed_dataset_folder)
    with pytest.raises(UserError, match="There is no preprocessed labelled case in .* Run: nnUNetv2_preprocess -d "):
        trainer.run_training()


def test_an_unknown_setting_stops_at_once(tools, workspace):
    tools.set_semi(workspace, num_epoch=1)
    with pytest.raises(UserError, match="Did you mean 'num_epochs'"):
        tools.trainer(workspace, "nnUNetTrainerSemiMeanTeacher")


def test_log_names_the_settings_of_other_methods(tools, workspace):
    tools.set_semi(workspace, CML={"prel": False}, MeanTeacher={"noise": 0.2})
    written = Path(tools.trainer(workspace, "nnUNetTrainerSemiMeanTeacher").log_file).read_text()
    assert 'Not used by MeanTeacher: the settings in CML of "semi".' in written


def test_stock_trainer_names_the_changed_settings_that_it_does_not_use(tools, workspace):
    tools.set_semi(workspace, mirroring=False, rotation=None, momentum=0.9, Mix={"cutmix": 0})
    written = Path(tools.trainer(workspace, "nnUNetTrainerSemiStock").log_file).read_text()
    assert 'Not used by Stock: mirroring, Mix of "semi".' in written


def test_one_modality_stops_before_anything_is_built(tools, workspace):
    tools.set_semi(workspace, modalities={"both": [0, 1]})
    with pytest.raises(UserError, match="two or more modalities"):
        tools.trainer(workspace, "nnUNetTrainerSemiCML").run_training()


@pytest.mark.parametrize("modalities, message", [
    ({"T1": [0], "T2": [0]}, "names channel 0 twice"), ({"T1": [0], "T2": [-1]}, "names channel -1"),
    ({"T1": [0], "T2": [1, 7]}, "names channel 7"), ({"T1/2": [0], "T1 2": [1]}, "would share the folder T1_2")])
def test_modalities_in_the_plans_file_are_checked_as_those_of_dataset_json(tools, workspace, modalities, message):
    tools.set_semi(workspace, modalities=modalities)
    with pytest.raises(UserError, match=f"the plans file.*{message}|{message}"):
        tools.trainer(workspace, "nnUNetTrainerSemiMeanTeacher")


def test_a_new_training_shows_no_pictures_of_an_earlier_one(tools, workspace):
    trainer = tools.trainer(workspace, "nnUNetTrainerSemiSupervised")
    file = Path(trainer.output_folder, "pictures", "epoch_0000.npz")
    file.parent.mkdir(parents=True)
    file.touch()
    trainer.on_train_start()
    assert not file.exists()
    file.parent.mkdir()
    file.touch()
    continued = tools.trainer(workspace, "nnUNetTrainerSemiSupervised")
    continued._restored = True
    continued.on_train_start()
    assert file.exists()


def test_a_network_without_deep_supervision_is_told_with_the_setting(tools, workspace, monkeypatch):
    trainer = tools.trainer(workspace, "nnUNetTrainerSemiSupervised")
    monkeypatch.setattr(trainer, "build_network_architecture", lambda *_: torch.nn.Conv3d(2, 3, 1))
    with pytest.raises(UserError, match='of Supervised has no deep supervision. Set "deep_supervision": false in'):
        trainer.initialize()


def test_second_stage_of_a_cascade_is_refused(tools, workspace):
    plans = json.loads(tools.plans_path(workspace).read_text())
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    plans["configurations"]["3d_lowres"] = plans["configurations"]["3d_fullres"]
    tools.plans_path(workspace).write_text(json.dumps(plans))
    with pytest.raises(NotImplementedError, match="second stage of a cascade"):
        tools.trainer(workspace, "nnUNetTrainerSemiMeanTeacher").initialize()


def test_a_fold_that_few_cases_cannot_make_is_refused(tools, workspace):
    with pytest.raises(UserError, match="3 labelled cases make 3 fold"):
        tools.trainer(workspace, "nnUNetTrainerSemiSupervised", fold=4).run_training()


def test_loaders_end_with_the_training_however_it_ends(tools, workspace, monkeypatch):
    import multiprocessing

    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    trainer = tools.trainer(workspace, "nnUNetTrainerSemiMeanTeacher")
    monkeypatch.setattr(trainer, "train_step", lambda batch: (_ for _ in ()).throw(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        trainer.run_training()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("cores", "asked", "threads"), [
    ({0, 1, 2}, None, 3), ({0, 1, 2}, "2", 2), ({0}, "2", 1), (set(range(64)), "16", 8),  # nnU-Net asked for 8
    ({0, 1}, "0", 2), ({0, 1}, "1,4", 2), ({0, 1}, "all", 2),
])
def test_threads_on_a_processor(monkeypatch, cores, asked, threads):
    """nnU-Net takes a thread for each core of the machine; no more than are allowed are left of them."""
    chosen = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: cores, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    no_more_threads_than_cores(torch.device("cpu"))
    no_more_threads_than_cores(torch.device("cuda"))
    assert chosen == [threads]


def test_a_step_without_a_supervised_loss_leaves_the_epochs_mean_to_the_others(tools, workspace, monkeypatch):
    trainer, given = tools.trainer(workspace, "nnUNetTrainerSemiSupervised"), []
    trainer.initialize()
    monkeypatch.setattr(nnUNetTrainer, "on_train_epoch_end", lambda self, outputs: given.extend(outputs))
    monkeypatch.setattr(trainer_module, "log_values", lambda *_: None)
    for losses in ([1.0, None, 4.0], [None, None]):
        trainer._epoch_values.add({"skipped_steps": 0.0})
        trainer.on_train_epoch_end([{"loss": loss} for loss in losses])
    assert [single["loss"] for single in given[:3]] == [1.0, 2.5, 4.0]
    assert all(np.isnan(single["loss"]) for single in given[3:])


def test_patches_are_loaded_as_large_as_the_rotation_needs(tools, workspace):
    def loaded(**semi):
        tools.set_semi(workspace, **semi)
        return list(tools.trainer(workspace, "nnUNetTrainerSemiSupervised")
                    .configure_rotation_dummyDA_mirroring_and_inital_patch_size()[2])
    patch = json.loads(tools.plans_path(workspace).read_text())["configurations"]["3d_fullres"]["patch_size"]
    own, small, large = loaded(), loaded(rotation=1), loaded(rotation=90)
    assert own == small
    assert all(size >= needed for size, needed in zip(large, get_patch_size(patch, *[np.pi / 2] * 3, (0.85, 1.25)),
                                                      strict=True))


def test_any_seed_is_one_for_stock_nnunet(tools, workspace, monkeypatch):
    tools.set_semi(workspace, seed=2**40 + 3)
    monkeypatch.setattr(nnUNetTrainer, "initialize", lambda self: None)
    tools.trainer(workspace, "nnUNetTrainerSemiStock").initialize()
    drawn = np.random.rand()
    np.random.seed(3)
    assert drawn == np.random.rand()
