"""``pictures.png`` of a training: one validation patch after a few epochs, one row each."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_semi.data.atomic_files import whole_file
from nnunetv2_semi.losses.predictions import Logits, full_resolution
from nnunetv2_semi.methods.base import Method
from nnunetv2_semi.pictures import PictureRow, save_overview
from nnunetv2_semi.present_channels import present_channels

if TYPE_CHECKING:
    from nnunetv2_semi.trainer import nnUNetTrainerSemi

FOLDER, PICTURE = "pictures", "pictures.png"
# Black in a map is the value that 1 % of the voxels are below, or this where that is closer to 1.
_PERCENTILE, _MOST_SHOWN = 1.0, 0.99


def is_shown(epoch: int, num_epochs: int, count: int) -> bool:
    """Whether ``epoch`` (from 0) is one of ``count`` epochs spread evenly over the training, its ends among them."""
    return epoch in {round(shown) for shown in np.linspace(num_epochs - 1, 0, count)}


def remove_earlier(output_folder: str) -> None:
    """Forget the rows of a training that a new one in the same folder overwrites."""
    shutil.rmtree(Path(output_folder) / FOLDER, ignore_errors=True)


def draw(method: Method, batch: dict, labels: LabelManager, device: torch.device, spacing: list[float], epoch: int,
         output_folder: str) -> None:
    """Add a row to ``pictures.png`` in ``output_folder``: what ``method`` makes of one patch of nnU-Net's ``batch``.

    The maps of every row are in ``pictures/``, so that a continued training goes on with the same file.
    """
    target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
    truths = [_label_map(single.numpy(), labels) for single in target]
    shown = int(np.argmax([(truth > 0).sum() for truth in truths]))
    image = batch["data"][shown:shown + 1]
    shown_channel = int(present_channels(image)[0].int().argmax())
    with torch.no_grad():
        predictions, maps = method.picture(image.to(device))
    arrays = {f"segmentation/{name}": _prediction(logits, labels)
              for name, logits in predictions.items()}
    arrays |= {f"image/{name}": single[0].float().cpu().numpy() for name, single in maps.items()}
    arrays |= {"image/image": image[0, shown_channel].numpy(), "segmentation/truth": truths[shown]}
    folder = Path(output_folder) / FOLDER
    with whole_file(folder / f"epoch_{epoch:04d}.npz") as unfinished, open(unfinished, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    aspect = spacing[-2] / spacing[-1]
    rows = [_row(file, aspect) for file in sorted(folder.glob("epoch_*.npz")) if int(file.stem[6:]) <= epoch]
    rows = [row for row in rows if row.segmentations.keys() == rows[-1].segmentations.keys()]
    save_overview(_with_common_ranges(rows, maps), _values(labels), "The same validation patch through training",
                  Path(output_folder) / PICTURE)


def _row(file: Path, aspect: float) -> PictureRow:
    with np.load(file) as arrays:
        groups: dict[str, dict[str, np.ndarray]] = {"image": {}, "segmentation": {}}
        for name in arrays.files:
            kind, _, title = name.partition("/")
            array = arrays[name]
            groups[kind][title] = array if array.ndim == 3 else array[None]
    # in the picture the truth comes first, and the image last of the grey panels: outlines are drawn over it
    segmentations = {"truth": groups["segmentation"].pop("truth"), **groups["segmentation"]}
    image = groups["image"].pop("image")
    return PictureRow(f"epoch {int(file.stem[6:]) + 1}", {**groups["image"], "image": image}, segmentations, {}, aspect)


def _with_common_ranges(rows: list[PictureRow], maps: Iterable[str]) -> list[PictureRow]:
    """The rows with maps, whose values are from 0 to 1, shown from the value that few voxels are below: mostly they are
    near 1. The range is in the column's title."""
    for name in maps:
        low = min(_MOST_SHOWN, *(float(np.percentile(row.images[name], _PERCENTILE)) for row in rows))
        title = f"{name}, {low:.2f} to 1"
        rows = [replace(row, images={title if key == name else key: image for key, image in row.images.items()},
                        ranges={**row.ranges, title: (low, 1.0)}) for row in rows]
    return rows


def _prediction(output: Logits, labels: LabelManager) -> np.ndarray:
    return labels.convert_logits_to_segmentation(full_resolution(output)[0].float().cpu()).numpy()


def _label_map(target: np.ndarray, labels: LabelManager) -> np.ndarray:
    """nnU-Net's target of a patch, (1, *spatial) labels or (R, *spatial) regions, as one label map."""
    if not labels.has_regions:
        return np.where(target[0] == labels.ignore_label, 0, target[0]) if labels.has_ignore_label else target[0]
    return labels.convert_probabilities_to_segmentation(target[:labels.num_segmentation_heads].astype(np.float32))


def _values(labels: LabelManager) -> dict[str, int]:
    """Name -> value in a label map; for regions the values that nnU-Net writes for them, by region."""
    names = [name for name, value in labels.label_dict.items() if name not in ("background", "ignore") and value != 0]
    values = labels.regions_class_order if labels.has_regions else [labels.label_dict[name] for name in names]
    return dict(zip(names, values, strict=True))


def draw_when_due(trainer: nnUNetTrainerSemi) -> None:
    """After an epoch that is shown, the picture of the first validation batch, the same one each time."""
    settings, epoch = trainer.settings, trainer.current_epoch
    if trainer.local_rank == 0 and is_shown(epoch, trainer.num_epochs, settings.pictures):
        torch.manual_seed(settings.seed)  # every step seeds anew
        draw(trainer.method, trainer.dataloader_val.batches[0]["labelled"], trainer.label_manager, trainer.device,
             trainer.configuration_manager.spacing, epoch, trainer.output_folder)
