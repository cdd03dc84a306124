"""What a step reports, on its way into the log, the loggers and the picture."""

from math import inf, isnan, nan
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from PIL import Image

from nnunetv2_semi.methods.contract import Term
from nnunetv2_semi.training import logs
from nnunetv2_semi.training.logs import EpochValues, SemiLocalLogger, log_values, to_floats, values_of_terms


def test_an_epochs_mean_is_over_the_steps_that_reported_a_finite_value():
    epoch = EpochValues()
    for values in ({"a": 1.0, "b": nan}, {"a": 3.0, "b": 5.0, "c": inf}, {"a": nan}):
        epoch.add(values)
    assert epoch.means() == {"a": 2.0, "b": 5.0}


def test_numbers_and_scalar_tensors_become_numbers_in_their_order():
    values = {"z": torch.tensor(1.5, dtype=torch.float64, requires_grad=True), "a": 2, "m": torch.tensor([0.25]),
              "half": torch.tensor(0.5, dtype=torch.bfloat16), "true": torch.tensor(True)}
    floats = to_floats(values)
    assert list(floats.items()) == [("z", 1.5), ("a", 2.0), ("m", 0.25), ("half", 0.5), ("true", 1.0)]
    assert all(type(value) is float for value in floats.values())
    assert to_floats({}) == {} and to_floats({"a": 1}) == {"a": 1.0}


def test_terms_that_apply_are_logged_with_the_weights_of_the_unlabelled_ones():
    terms = [Term("supervised", torch.tensor(1.0), supervised=True), Term("asc", torch.tensor(2.0), 0.1),
             Term("absent", torch.tensor(3.0), 0.2, patches=0)]
    assert values_of_terms(terms) == {"loss_supervised": 1.0, "loss_asc": 2.0, "weight_asc": 0.1}


def test_values_go_to_the_loggers_by_epoch_and_into_the_log_with_their_weights():
    logged, lines = [], []
    trainer = SimpleNamespace(logger=SimpleNamespace(log=lambda *values: logged.append(values)), current_epoch=3,
                              print_to_log_file=lines.append)
    log_values(trainer, {"loss_asc": 2.0, "weight_asc": 0.125, "loss_supervised": 1.0, "skipped_steps": 0.0})
    assert logged == [("semi/loss_asc", 2.0, 3), ("semi/weight_asc", 0.125, 3), ("semi/loss_supervised", 1.0, 3),
                      ("semi/skipped_steps", 0.0, 3)]
    assert lines == ["asc 2.0000 (weight 0.1250)", "supervised 1.0000", "skipped_steps 0.0000"]


def test_a_value_that_starts_late_or_pauses_has_one_entry_per_epoch():
    logger = SemiLocalLogger(lambda: 5)
    for epoch, value in ((2, 5.0), (4, 6.0)):
        logger.log("semi/loss_prel", value, epoch)
    values = logger.my_fantastic_logging["semi/loss_prel"]
    assert len(values) == 5 and (values[2], values[4]) == (5.0, 6.0) and all(isnan(values[k]) for k in (0, 1, 3))


@pytest.fixture
def stock_picture(monkeypatch):
    """A small picture instead of nnU-Net's."""
    def draw(self, folder):
        self.lengths = {key: len(values) for key, values in self.my_fantastic_logging.items()}
        Image.new("RGB", (300, 200), (10, 20, 30)).save(f"{folder}/progress.png")
    monkeypatch.setattr(LocalLogger, "plot_progress_png", draw)


def logger_with(**semi):
    logger = SemiLocalLogger(lambda: 3)
    logger.my_fantastic_logging["epoch_end_timestamps"] = [1.0, 2.0, 3.0]
    for key, values in semi.items():
        logger.my_fantastic_logging[f"semi/{key}"] = values
    return logger


def test_our_panels_are_below_nnunets_picture(stock_picture, tmp_path):
    curves = {"loss_asc": [1.0, 2.0, 3.0], "weight_asc": [0.1] * 3, "teacher_student_agreement": [0.5] * 3}
    heights = []
    for number in range(1, 4):
        logger_with(**dict(list(curves.items())[:number])).plot_progress_png(str(tmp_path))
        with Image.open(tmp_path / "progress.png") as picture:
            assert picture.width == 300
            stock = np.asarray(picture.convert("RGB"))[:200]
            heights.append(picture.height)
        assert (stock == (10, 20, 30)).all()
    first, *further = np.diff([200, *heights])
    assert first > 0 and further == [first, first], "a panel for each kind of value"
    assert [file.name for file in tmp_path.iterdir()] == ["progress.png"]


def test_the_picture_takes_a_small_share_of_the_time_and_is_there_at_the_end(monkeypatch, tmp_path):
    seconds, drawn = [0.0], []

    def draw(self, folder):
        drawn.append(len(self.my_fantastic_logging["epoch_end_timestamps"]))
        seconds[0] += 3

    monkeypatch.setattr(LocalLogger, "plot_progress_png", draw)
    monkeypatch.setattr(logs.time, "monotonic", lambda: seconds[0])
    for epoch_seconds, expected in ((10, [1, 7, 13, 15]), (60, list(range(1, 16)))):
        logger = SemiLocalLogger(lambda: 15)
        drawn.clear()
        for epoch in range(15):
            seconds[0] += epoch_seconds
            logger.log("epoch_end_timestamps", seconds[0], epoch)
            logger.plot_progress_png(str(tmp_path))
        assert drawn == expected


def test_a_curve_that_ended_does_not_end_the_picture(stock_picture, tmp_path):
    """nnU-Net draws as many epochs as its shortest list has."""
    logger = logger_with(loss_asc=[1.0], loss_prel=[nan, 1.0, 2.0])
    logger.plot_progress_png(str(tmp_path))
    assert logger.lengths["semi/loss_asc"] == 3
    assert logger.my_fantastic_logging["semi/loss_asc"][0] == 1.0
    assert all(isnan(value) for value in logger.my_fantastic_logging["semi/loss_asc"][1:])


@pytest.mark.parametrize("curves", [{}, {"loss_asc": [nan, nan, nan]}], ids=str)
def test_without_a_value_of_ours_the_picture_is_nnunets(stock_picture, tmp_path, curves):
    logger_with(**curves).plot_progress_png(str(tmp_path))
    with Image.open(tmp_path / "progress.png") as picture:
        assert picture.size == (300, 200)
