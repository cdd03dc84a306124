"""Patches on which an exported network is compared with PyTorch: of the data set's own cases where they are found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_semi.data.dataset_settings import num_channels
from nnunetv2_semi.data.raw_cases import case_and_channel, cases_in
from nnunetv2_semi.present_channels import FILL


def patches_to_check_on(plans_manager: PlansManager, configuration_manager: ConfigurationManager, dataset_json: dict,
                        count: int = 4) -> tuple[list[np.ndarray], str]:
    """Patches float32 (C, *patch) from the middle of as many cases, and a phrase that says what they are of.

    Preprocessed training cases, or else raw ones (of ``imagesTs``, then ``imagesTr``) that are preprocessed here; noise
    where nnU-Net's folders do not have the data set.
    """
    patch_size = tuple(configuration_manager.patch_size)
    for source, images in (("preprocessed", _preprocessed), ("raw", _raw)):
        found, names = [], []
        for name, image in images(plans_manager, configuration_manager, dataset_json):
            if len(image) == num_channels(dataset_json):
                found.append(middle(image, patch_size))
                names.append(name)
            if len(found) == count:
                break
        if found:
            return found, f"{source} cases {', '.join(names)}"
    noise = np.random.default_rng(0).standard_normal((count, num_channels(dataset_json), *patch_size))
    return list(noise.astype(np.float32)), "noise, as nnUNet_preprocessed and nnUNet_raw have no such data set"


def middle(image: np.ndarray, patch_size: Sequence[int]) -> np.ndarray:
    """The patch (C, *patch) in the middle of an image (C, *spatial), zeros around it where that is smaller.

    Of a 3D image, for a patch of two axes, it is of the middle slice.
    """
    image = np.asarray(image[:, image.shape[1] // 2] if image.ndim == len(patch_size) + 2 else image[:])
    patch = np.zeros((len(image), *patch_size), dtype=np.float32)
    source, target = [slice(None)], [slice(None)]
    for size, wanted in zip(image.shape[1:], patch_size, strict=True):
        width = min(size, wanted)
        source.append(slice((size - width) // 2, (size - width) // 2 + width))
        target.append(slice((wanted - width) // 2, (wanted - width) // 2 + width))
    patch[tuple(target)] = image[tuple(source)]
    return patch


def batches(patches: Sequence[np.ndarray], channels: Sequence[int], modalities: Sequence[Sequence[int]] = (),
            seen: Sequence[int] | None = None) -> list[np.ndarray]:
    """What to compare on: each patch with these channels by itself, all as one batch, and each without a modality.

    Patches that hold a single value (an absent modality, background) are left out: InstanceNorm would divide what
    rounding leaves of them by almost nothing, and no two programs agree. modalities: channels of each, of a network
    that goes without any one of them. seen: of ``channels`` those that the network looks at; None for all.
    """
    def holds_something(patch: np.ndarray) -> bool:
        return any(channel.min() < channel.max() for channel in (patch if seen is None else patch[list(seen)]))

    chosen = [patch[list(channels)] for patch in patches]
    chosen = [patch for patch in chosen if holds_something(patch)]
    if not chosen:
        return []
    compared = [patch[None] for patch in chosen]
    if len(chosen) > 1:
        compared.append(np.stack(chosen))
    for absent in modalities if len(modalities) > 1 else ():
        patch = chosen[0].copy()
        patch[list(absent)] = FILL
        if holds_something(patch):
            compared.append(patch[None])
    return compared


Cases = Iterator[tuple[str, np.ndarray]]


def _preprocessed(plans_manager: PlansManager, configuration_manager: ConfigurationManager, _: dict) -> Cases:
    if not nnUNet_preprocessed.is_set():
        return
    folder = os.path.join(nnUNet_preprocessed, plans_manager.dataset_name, configuration_manager.data_identifier)
    if not os.path.isdir(folder) or not any(name.endswith(".pkl") for name in os.listdir(folder)):
        return
    dataset = infer_dataset_class(folder)(folder)
    for name in sorted(dataset.identifiers):
        yield name, dataset.load_case(name)[0]


def _raw(plans_manager: PlansManager, configuration_manager: ConfigurationManager, dataset_json: dict) -> Cases:
    if not nnUNet_raw.is_set():
        return
    ending, channels = dataset_json["file_ending"], range(num_channels(dataset_json))
    for split in ("imagesTs", "imagesTr"):
        folder = os.path.join(nnUNet_raw, plans_manager.dataset_name, split)
        if not os.path.isdir(folder):
            continue
        run_case: Callable = configuration_manager.preprocessor_class(verbose=False).run_case
        for name in sorted(cases_in(folder, ending)):
            files = sorted(os.path.join(folder, file) for file in os.listdir(folder)
                           if case_and_channel(file, ending) in [(name, channel) for channel in channels])
            yield name, run_case(files, None, plans_manager, configuration_manager, dataset_json)[0]
