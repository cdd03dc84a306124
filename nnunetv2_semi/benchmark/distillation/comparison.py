"""Teacher and student on the same cases: Dice, and the seconds that a prediction takes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pandas
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tqdm import tqdm

from nnunetv2_semi.benchmark.datasets.source_cases import Case, Source
from nnunetv2_semi.data.atomic_files import read_json_object, whole_file, write_json_whole
from nnunetv2_semi.data.cached_reading import file_stamp
from nnunetv2_semi.networks.trained_ensemble import TrainedModel

RECORD = "predicted.json"
MEAN = "mean"


@dataclass(frozen=True)
class Predicted:
    """What a model predicted of some cases.

    folder: of the predictions. parameters: of all networks. seconds: of each case, from its files to the file of its
    prediction. network_seconds: of these, those of the networks, at all patches of the case.
    """

    model: TrainedModel
    folder: Path
    parameters: int
    seconds: Mapping[str, float]
    network_seconds: Mapping[str, float]


def predict(model: TrainedModel, cases: Mapping[str, Case], folder: Path, device: str, mirroring: bool,
            description: str) -> Predicted:
    """Predict cases with nnU-Net's predictor, in this process, one at a time; those that are there already stay.

    A case whose images changed since is predicted again.

    Args:
        model: All its folds predict; as in nnUNetv2_predict, the mean of their logits counts.
        cases: By name.
        folder: For predictions, and for a record of what they were made with.
        device: ``cuda``, ``cpu`` or ``mps``.
        mirroring: At test time, as the model allows it.
        description: Of the progress bar.
    """
    made_with = {"model": str(model.folder.resolve()), "checkpoints": model.digests(), "device": device,
                 "mirroring": mirroring}
    record = read_json_object(str(folder / RECORD)) or {}
    if record.get("made_with") != made_with:
        record = {"made_with": made_with, "parameters": 0, "cases": {}}
    images = {name: [file_stamp(file) for file in case.images.values()] for name, case in cases.items()}
    left = {name: case for name, case in cases.items() if record["cases"].get(name, {}).get("images") != images[name]}
    if left:
        folder.mkdir(parents=True, exist_ok=True)
        predictor = _TimedPredictor(model, device, mirroring)
        record["parameters"] = predictor.parameters
        for name, case in tqdm(left.items(), desc=f"  {description}", unit="case", leave=False, disable=None):
            total, network = predictor.seconds(list(case.images.values()), folder / name)
            record["cases"][name] = {"total": total, "network": network, "images": images[name]}
            write_json_whole(str(folder / RECORD), record)
    seconds = {name: record["cases"][name] for name in cases}
    return Predicted(model, folder, record["parameters"], {name: single["total"] for name, single in seconds.items()},
                     {name: single["network"] for name, single in seconds.items()})


class _TimedPredictor:
    """nnU-Net's predictor with a clock; one patch is predicted before, so that no case pays for the start."""

    def __init__(self, model: TrainedModel, device: str, mirroring: bool) -> None:
        on_device = device == "cuda"
        with _silent():
            self._predictor = nnUNetPredictor(use_mirroring=mirroring, perform_everything_on_device=on_device,
                                              device=torch.device(device), allow_tqdm=False)
            self._predictor.initialize_from_trained_model_folder(str(model.folder), model.folds, model.checkpoint_name)
        own = sum(parameter.numel() for parameter in self._predictor.network.parameters())
        self.parameters = own * len(model.folds)
        self._network_seconds = 0.0
        self._predict = self._predictor.predict_logits_from_preprocessed_data
        patch = model.configuration.patch_size
        with _silent():
            self._predict(torch.zeros((model.num_channels, *[1] * (3 - len(patch)), *patch)))
        self._predictor.predict_logits_from_preprocessed_data = self._timed  # type: ignore[method-assign]

    def seconds(self, images: Sequence[str], prediction: Path) -> tuple[float, float]:
        """Of a case's prediction, and of the networks in it. images: files. prediction: file without its ending."""
        self._network_seconds = 0.0
        started = time.perf_counter()
        with _silent():
            self._predictor.predict_from_files_sequential([list(images)], [str(prediction)])
        return time.perf_counter() - started, self._network_seconds

    def _timed(self, data: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        logits = self._predict(data)  # on the CPU: the device has finished
        self._network_seconds += time.perf_counter() - started
        return logits


def dice(predicted: Predicted, source: Source, cases: Mapping[str, Case]) -> dict[str, dict[str, float]]:
    """Case -> label or region -> Dice, as nnU-Net computes it; NaN where neither truth nor prediction has any."""
    model = predicted.model
    labels = model.plans.get_label_manager(model.dataset_json)
    structures = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    reader, ending = model.plans.image_reader_writer_class(), source.dataset_json["file_ending"]
    found = {}
    for name, case in cases.items():
        truth = next(iter(case.label.values()))
        metrics = compute_metrics(truth, str(predicted.folder / f"{name}{ending}"), reader, structures,
                                  labels.ignore_label)["metrics"]
        found[name] = {_name(structure, source.dataset_json): float(metrics[structure]["Dice"])
                       for structure in structures}
    return found


def table(rows: Mapping[str, tuple[Predicted, Mapping[str, Mapping[str, float]]]]) -> list[dict[str, object]]:
    """A row for each model: folds, parameters, Dice (mean over cases, then labels), seconds per case (mean)."""
    found = []
    for name, (predicted, of_cases) in rows.items():
        labels = list(next(iter(of_cases.values())))
        means = {label: _mean([case[label] for case in of_cases.values()]) for label in labels}
        found.append({
            "model": name, "networks": len(predicted.model.folds), "parameters": predicted.parameters,
            **{f"dice {label}": mean for label, mean in means.items()}, f"dice {MEAN}": _mean(list(means.values())),
            "seconds per case": _mean(list(predicted.seconds.values())),
            "network seconds per case": _mean(list(predicted.network_seconds.values()))})
    return found


def printed(rows: Sequence[Mapping[str, object]]) -> str:
    """A table as text."""
    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)


def write(rows: Sequence[Mapping[str, object]], of_cases: Mapping[str, object], about: Mapping[str, object],
          file: Path) -> None:
    """``file`` with .csv: the table; with .json: the table, what each case gave, and what it is ``about``."""
    with whole_file(file.with_suffix(".csv")) as unfinished:
        pandas.DataFrame(rows).to_csv(unfinished, index=False)
    write_json_whole(str(file.with_suffix(".json")), {**about, "models": _without_nan(rows),
                                                      "cases": _without_nan(of_cases)})


def _name(structure: int | tuple[int, ...], dataset_json: dict) -> str:
    """Of a label or region, as dataset.json has it."""
    values = structure if isinstance(structure, tuple) else (structure,)
    return next(name for name, value in dataset_json["labels"].items()
                if (tuple(value) if isinstance(value, (list, tuple)) else (value,)) == values)


def _mean(values: Sequence[float]) -> float:
    """Of those that are numbers; NaN of none."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def _without_nan(content: object) -> object:
    """NaN as None: JSON has none."""
    if isinstance(content, Mapping):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


@contextmanager
def _silent() -> Iterator[None]:
    """Without what nnU-Net prints for each case."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield
