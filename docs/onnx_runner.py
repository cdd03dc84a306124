"""Predict whole cases with networks that `nnunetv2_semi export --onnx` wrote. Needs numpy, SimpleITK and onnxruntime.

    python onnx_runner.py -m MODEL -i IMAGES -o PREDICTIONS

It does what nnUNetv2_predict does on a CPU, step by step: read, crop to what is not zero, normalise, resample, slide a
window with Gaussian weights and mirrored copies, resample the logits back, decide, put the crop back. What it cannot do
as nnU-Net does, it refuses. See docs/onnx.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import onnxruntime
import SimpleITK as sitk

# reading and writing


def read_case(files: dict[int, Path]) -> tuple[np.ndarray, list[float], sitk.Image]:
    """Channels (C, z, y, x) float32 in the order of their numbers, spacing (z, y, x) in mm, and an image for geometry.

    A 2D image has one slice, that is 999 times as thick as its larger pixel side.
    """
    images = [sitk.ReadImage(str(files[number])) for number in sorted(files)]
    spacing = [abs(side) for side in images[0].GetSpacing()[::-1]]
    arrays = [sitk.GetArrayFromImage(image) for image in images]
    if arrays[0].ndim == 2:
        arrays, spacing = [array[None] for array in arrays], [max(spacing) * 999, *spacing]
    return np.stack(arrays).astype(np.float32), spacing, images[0]


def write_labels(labels: np.ndarray, like: sitk.Image, file: Path) -> None:
    """Labels (z, y, x) with the geometry of ``like``."""
    image = sitk.GetImageFromArray(labels[0] if like.GetDimension() == 2 else labels)
    image.CopyInformation(like)
    sitk.WriteImage(image, str(file), True)


def cases_in(folder: Path, ending: str, num_channels: int) -> dict[str, dict[int, Path]]:
    """Case name -> channel number -> file."""
    cases: dict[str, dict[int, Path]] = {}
    for file in sorted(folder.glob("*" + ending)):
        case, _, number = file.name[: -len(ending)].rpartition("_")
        if case and len(number) == 4 and number.isdigit() and int(number) < num_channels:
            cases.setdefault(case, {})[int(number)] = file
    return cases


# before the network


def nonzero_mask(image: np.ndarray) -> np.ndarray:
    """Where any channel of (C, z, y, x) is not zero, holes (cavities that no face leads out of) filled."""
    zero = ~(image != 0).any(0)
    components = sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.GetImageFromArray(zero.astype(np.uint8)), False))
    border = np.ones(zero.shape, dtype=bool)
    border[tuple(slice(1, -1) for _ in zero.shape)] = False
    outside = np.isin(components, np.setdiff1d(components[border], 0))
    return ~outside


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds all of ``mask``; the whole where it is empty."""
    if not mask.any():
        return tuple(slice(0, size) for size in mask.shape)
    along = [np.flatnonzero(mask.any(tuple(other for other in range(mask.ndim) if other != axis)))
             for axis in range(mask.ndim)]
    return tuple(slice(int(found[0]), int(found[-1]) + 1) for found in along)


def normalised(channel: np.ndarray, mask: np.ndarray, how: dict) -> np.ndarray:
    """One channel (z, y, x) float32, normalised as ``how`` says; ``mask``: `nonzero_mask` of the crop."""
    channel, scheme, intensities, smallest = channel.copy(), how["normalization"], how["intensities"], 1e-8
    if scheme == "ZScoreNormalization":
        if how["use_mask_for_norm"]:
            channel[mask] = (channel[mask] - channel[mask].mean()) / max(channel[mask].std(), smallest)
            return channel
        mean, deviation = channel.mean(), channel.std()
        channel -= mean
        channel /= max(deviation, smallest)
    elif scheme == "CTNormalization":
        np.clip(channel, intensities["percentile_00_5"], intensities["percentile_99_5"], out=channel)
        channel -= intensities["mean"]
        channel /= max(intensities["std"], smallest)
    elif scheme == "RescaleTo01Normalization":
        channel -= channel.min()
        channel /= max(channel.max(), smallest)
    elif scheme == "RGBTo01Normalization":
        channel /= 255.0
    elif scheme != "NoNormalization":
        raise NotImplementedError(f"normalisation {scheme}")
    return channel


# resampling: linear and separable, so a matrix per axis


def interpolation_matrix(old: int, new: int, order: int) -> np.ndarray:
    """(new, old): values at ``new`` voxels from those at ``old`` ones that fill the same length.

    order: 0 nearest, 1 linear, 3 cubic B-spline that passes through all values. Beyond the ends the last value goes on.
    """
    position = (np.arange(new) + 0.5) * (old / new) - 0.5
    rows = np.arange(new)
    matrix = np.zeros((new, old))
    if order == 0:
        matrix[rows, np.clip(np.floor(position + 0.5).astype(int), 0, old - 1)] = 1
    elif order == 1:
        position = np.clip(position, 0, old - 1)
        below = np.minimum(np.floor(position).astype(int), old - 1)
        np.add.at(matrix, (rows, below), 1 - (position - below))
        np.add.at(matrix, (rows, np.minimum(below + 1, old - 1)), position - below)
    elif order == 3:
        margin = 12  # how far scipy repeats the last value before it fits the spline
        size = old + 2 * margin
        # Coefficients c with (c[i - 1] + 4 c[i] + c[i + 1]) / 6 = f[i], where c[-1] = c[0] and c[size] = c[size - 1].
        system = (4 * np.eye(size) + np.eye(size, k=1) + np.eye(size, k=-1)) / 6
        system[0, 0] += 1 / 6
        system[-1, -1] += 1 / 6
        repeated = np.eye(old)[np.clip(np.arange(size) - margin, 0, old - 1)]
        coefficients = np.linalg.solve(system, repeated)
        position = np.clip(position, -margin, old - 1 + margin) + margin
        first = np.floor(position).astype(int)
        t = (position - first)[:, None]
        weights = np.hstack([(1 - t) ** 3, 4 - 6 * t**2 + 3 * t**3, 1 + 3 * t + 3 * t**2 - 3 * t**3, t**3]) / 6
        for offset, weight in zip((-1, 0, 1, 2), weights.T, strict=True):
            matrix += weight[:, None] * coefficients[np.clip(first + offset, 0, size - 1)]
    else:
        raise NotImplementedError(f"interpolation of order {order}")
    return matrix


def resized(image: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    """An image of any number of axes with ``shape`` voxels, float64, within the range of values that it had."""
    result = image.astype(np.float64)
    for axis, (old, new) in enumerate(zip(image.shape, shape, strict=True)):
        if order == 3 or old != new:
            result = np.moveaxis(np.tensordot(interpolation_matrix(old, new, order), result, (1, axis)), 0, axis)
    return np.clip(result, image.min(), image.max())


def resampled(image: np.ndarray, shape: tuple[int, ...], old_spacing: list[float], new_spacing: list[float],
              how: dict, threshold: float) -> np.ndarray:
    """(C, z, y, x) with ``shape`` voxels, in the dtype of ``image``; slice by slice where voxels are long and thin."""
    if how["function"] != "resample_data_or_seg_to_shape":
        raise NotImplementedError(f"resampling with {how['function']}")
    if image.shape[1:] == tuple(shape):
        return image
    axis = separate_axis(old_spacing, new_spacing, how.get("force_separate_z"), threshold)
    result = np.empty((len(image), *shape), dtype=image.dtype)
    for target, channel in zip(result, image, strict=True):
        if axis is None:
            target[...] = resized(channel, shape, how["order"])
            continue
        in_plane = shape[:axis] + shape[axis + 1:]
        slices = np.stack([resized(part, in_plane, how["order"]) for part in np.moveaxis(channel, axis, 0)], axis)
        if slices.shape[axis] != shape[axis]:
            matrix = interpolation_matrix(slices.shape[axis], shape[axis], how["order_z"])
            slices = np.moveaxis(np.tensordot(matrix, slices, (1, axis)), 0, axis)
        target[...] = slices
    return result


def separate_axis(old_spacing: list[float], new_spacing: list[float], force: bool | None,
                  threshold: float) -> int | None:
    """The axis along which slices are resampled by themselves; None: there is none."""
    if force is False:
        return None
    spacing = next((one for one in (old_spacing, new_spacing) if max(one) / min(one) > threshold), None)
    if force:
        spacing = old_spacing
    if spacing is None:
        return None
    longest = [axis for axis, side in enumerate(spacing) if max(spacing) / side == 1]
    return longest[0] if len(longest) == 1 else None


# the network


def gaussian(patch_size: tuple[int, ...], sigma: float, maximum: float) -> np.ndarray:
    """Weights float16 of a window's voxels, highest in the middle. sigma: as a share of each side."""
    weights = np.ones(())
    for size in patch_size:
        deviation = size * sigma
        reach = int(4 * deviation + 0.5)
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
        along = np.zeros(size)
        for voxel in range(size):
            if abs(voxel - size // 2) <= reach:
                along[voxel] = kernel[voxel - size // 2 + reach] / kernel.sum()
        weights = weights[..., None] * along
    weights = (weights / (weights.max() / maximum)).astype(np.float32).astype(np.float16)
    weights[weights == 0] = weights[weights > 0].min()
    return weights


def window_starts(size: int, window: int, step: float) -> list[int]:
    """First voxels along one axis of evenly spaced windows, at most ``step`` windows apart."""
    count = int(np.ceil((size - window) / (window * step))) + 1
    return [int(np.round((size - window) / (count - 1) * number)) if count > 1 else 0 for number in range(count)]


def logits_of(session: onnxruntime.InferenceSession, patch: np.ndarray, mirroring_axes: list[int]) -> np.ndarray:
    """Mean logits (K, *patch) of a patch (C, *patch) and its mirrored copies."""
    name = session.get_inputs()[0].name
    combinations = [axes for count in range(len(mirroring_axes) + 1)
                    for axes in itertools.combinations([axis + 1 for axis in mirroring_axes], count)]
    total: np.ndarray | None = None
    for axes in combinations:
        logits = np.flip(session.run(None, {name: np.ascontiguousarray(np.flip(patch, axes))[None]})[0][0], axes)
        total = logits.copy() if total is None else total + logits
    assert total is not None
    return total / np.float32(len(combinations))


def sliding_window(session: onnxruntime.InferenceSession, image: np.ndarray, model: dict,
                   mirroring_axes: list[int]) -> np.ndarray:
    """Logits (K, z, y, x), summed and averaged in float16 as nnU-Net does, of an image (C, z, y, x)."""
    window, settings = tuple(model["patch_size"]), model["sliding_window"]
    flat = image.ndim - 1 - len(window)  # leading axes that are gone through slice by slice
    size = [*image.shape[1:1 + flat], *np.maximum(image.shape[1 + flat:], window)]
    margins = [(int(new - old) // 2, int(new - old) - int(new - old) // 2)
               for old, new in zip(image.shape[1:], size, strict=True)]
    image = np.pad(image, [(0, 0), *margins])
    starts = [*(range(count) for count in size[:flat]),
              *(window_starts(*sides, settings["step_size"]) for sides in zip(size[flat:], window, strict=True))]
    weights = gaussian(window, settings["gaussian_sigma"], settings["gaussian_maximum"])
    total = np.zeros((len(model["outputs"]), *size), dtype=np.float16)
    weight = np.zeros(size, dtype=np.float16)
    for start in itertools.product(*starts):
        place = (*start[:flat], *(slice(begin, begin + side) for begin, side in zip(start[flat:], window, strict=True)))
        logits = logits_of(session, image[(slice(None), *place)], mirroring_axes)
        total[(slice(None), *place)] = total[(slice(None), *place)] + logits * weights.astype(np.float32)
        weight[place] += weights
    total /= weight
    if not np.isfinite(total).all():
        raise ValueError("logits are too large for float16")
    inside = tuple(slice(before, side - after) for side, (before, after) in zip(size, margins, strict=True))
    return total[(slice(None), *inside)]


# after the network


def decided(logits: np.ndarray, model: dict) -> np.ndarray:
    """Labels (z, y, x) from logits (K, z, y, x): the highest class, or regions painted over each other in order."""
    if model["regions_class_order"] is None:
        return logits.argmax(0)
    labels = np.zeros(logits.shape[1:], dtype=np.int64)
    for logit, label in zip(logits.astype(np.float32), model["regions_class_order"], strict=True):
        with np.errstate(over="ignore"):
            labels[1 / (1 + np.exp(-logit)) > 0.5] = label
    return labels


# all together


class Runner:
    """The networks of a folder, and what they need.

    folder: that ``export --onnx`` wrote. mirroring: average over mirrored copies, as nnU-Net does by default.
    """

    def __init__(self, folder: Path, mirroring: bool = True, providers: tuple[str, ...] = ("CPUExecutionProvider",),
                 threads: int = 0) -> None:
        self.model = json.loads((folder / "inference.json").read_text(encoding="utf-8"))
        if self.model["image_reader_writer"] != "SimpleITKIO":
            raise NotImplementedError(f"images read by {self.model['image_reader_writer']}")
        if self.model["preprocessor"] not in ("DefaultPreprocessor", "nnUNetPreprocessorSemi"):
            raise NotImplementedError(f"preprocessor {self.model['preprocessor']}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.sessions = [onnxruntime.InferenceSession(folder / file, options, providers=list(providers))
                         for file in self.model["networks"].values()]
        self.mirroring_axes = self.model["mirroring_axes"] if mirroring else []

    def predict(self, files: dict[int, Path]) -> tuple[np.ndarray, sitk.Image]:
        """Labels (z, y, x) of a case, channel number -> file, and an image with its geometry."""
        model, forward = self.model, self.model["transpose_forward"]
        total = len(model["channels"])
        if sorted(files) != list(range(total)) and model["absent_channel_value"] is None:
            raise ValueError(f"channels {sorted(files)} were given, the network needs 0 to {total - 1}")
        image, spacing, like = read_case(files)
        image = image.transpose([0, *(axis + 1 for axis in forward)])
        spacing = [spacing[axis] for axis in forward]
        whole = image.shape[1:]

        mask = nonzero_mask(image)
        box = bounding_box(mask)
        image, mask = image[(slice(None), *box)], mask[box]
        image = np.stack([normalised(channel, mask, model["channels"][number])
                          for number, channel in zip(sorted(files), image, strict=True)])
        new_spacing = [*spacing[:3 - len(model["spacing"])], *model["spacing"]]
        shape = tuple(int(round(old / new * size))
                      for old, new, size in zip(spacing, new_spacing, image.shape[1:], strict=True))
        resampling, threshold = model["resampling"], model["resampling"]["anisotropy_threshold"]
        cropped = image.shape[1:]
        image = resampled(image, shape, spacing, new_spacing, resampling["image"], threshold)
        if model["absent_channel_value"] is not None:
            given, image = image + 0.0, np.full((total, *shape), model["absent_channel_value"], dtype=np.float32)
            image[sorted(files)] = given

        logits = sliding_window(self.sessions[0], image, model, self.mirroring_axes)
        for session in self.sessions[1:]:
            logits += sliding_window(session, image, model, self.mirroring_axes)
        if len(self.sessions) > 1:
            logits /= len(self.sessions)

        logits = resampled(logits, cropped, new_spacing, spacing, resampling["logits"], threshold)
        labels = np.zeros(whole, dtype=np.uint8 if len(model["outputs"]) < 255 else np.uint16)
        labels[box] = decided(logits, model)
        return labels.transpose(model["transpose_backward"]), like


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", metavar="MODEL", type=Path, required=True, help="folder with inference.json")
    parser.add_argument("-i", metavar="IMAGES", type=Path, required=True, help="folder of images, named as for nnU-Net")
    parser.add_argument("-o", metavar="PREDICTIONS", type=Path, required=True, help="folder to write labels to")
    parser.add_argument("--disable_tta", action="store_true", help="no mirrored copies: faster, a little worse")
    parser.add_argument("--provider", nargs="+", default=["CPUExecutionProvider"], help="of ONNX Runtime, such as "
                        "CUDAExecutionProvider (default: CPUExecutionProvider)")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU (default: as many as it has)")
    args = parser.parse_args()
    runner = Runner(args.m, not args.disable_tta, tuple(args.provider), args.threads)
    ending = runner.model["file_ending"]
    args.o.mkdir(parents=True, exist_ok=True)
    for case, files in cases_in(args.i, ending, len(runner.model["channels"])).items():
        labels, like = runner.predict(files)
        write_labels(labels, like, args.o / (case + ending))
        print(case)


if __name__ == "__main__":
    main()
