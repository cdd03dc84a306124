"""Known rigid displacements of real image pairs: how many does `nnunetv2_semi align` find?

In each trial the moving image of a case is turned about its centre, shifted and resampled; then it is registered to the
fixed image. The error is the distance between where the transform that was found and the true one take a point, its
mean over the fixed image, in voxels. The data set must hold aligned channels. Without a folder: a phantom.

    python benchmarks/alignment.py nnUNet_raw/Dataset007_Mine --fixed 0 --moving 1
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from measuring import machine, table
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from nnunetv2_semi.data.atomic_files import read_json_object
from nnunetv2_semi.data.case_alignment import BACKENDS, backend_named
from nnunetv2_semi.data.phantom import make_phantom_dataset
from nnunetv2_semi.data.registration import grid_points, mapped, register, rigid_transform

RECOVERED = 1.0  # voxel


@dataclass(frozen=True)
class Trial:
    """Errors (voxels, mean over the fixed image) before and after registration; seconds; why it failed."""

    case: str
    degrees: float
    millimetres: float
    before: float
    after: float
    seconds: float
    failure: str = ""


def displaced(image: sitk.Image, degrees: float, millimetres: float, rng: np.random.Generator,
              ) -> tuple[sitk.Image, sitk.Transform]:
    """The image turned and shifted by up to these values, and the map of its old points to its new ones."""
    dims = image.GetDimension()
    angle = np.radians(degrees)
    if dims == 3:
        axis = rng.normal(size=3)
        rotation = Rotation.from_rotvec(axis / np.linalg.norm(axis) * angle).as_matrix()
    else:
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shift = rng.normal(size=dims)
    centre = np.array(image.TransformContinuousIndexToPhysicalPoint([(size - 1) / 2 for size in image.GetSize()]))
    truth = rigid_transform(rotation, centre, shift / np.linalg.norm(shift) * millimetres)
    lowest = float(sitk.GetArrayViewFromImage(image).min())
    return sitk.Resample(image, image, truth.GetInverse(), sitk.sitkLinear, lowest), truth


def error(transform: sitk.Transform, truth: sitk.Transform, fixed: sitk.Image) -> float:
    """Mean distance in voxels, over the fixed image, between where the two take a point."""
    points = grid_points(fixed)
    direction = np.array(fixed.GetDirection()).reshape(fixed.GetDimension(), -1)
    difference = (mapped(transform, points) - mapped(truth, points)) @ direction / fixed.GetSpacing()
    return float(np.linalg.norm(difference, axis=1).mean())


def trials(folder: Path, options: argparse.Namespace) -> Iterator[Trial]:
    """The same ones for one seed, whatever is registered with."""
    ending = (read_json_object(str(folder / "dataset.json")) or {})["file_ending"]
    fixed_files = sorted(file for split in ("imagesTr", "imagesUn", "imagesTs")
                         for file in (folder / split).glob(f"*_{options.fixed:04d}{ending}"))
    pairs = [(file, file.with_name(file.name.replace(f"_{options.fixed:04d}{ending}",
                                                     f"_{options.moving:04d}{ending}"))) for file in fixed_files]
    pairs = [pair for pair in pairs if pair[1].is_file()]
    if not pairs:
        raise SystemExit(f"{folder} has no case with the channels {options.fixed} and {options.moving}.")
    for number in range(options.trials):
        rng = np.random.default_rng((options.seed, number))
        fixed, moving = (sitk.ReadImage(str(file), sitk.sitkFloat32) for file in pairs[number % len(pairs)])
        degrees, millimetres = rng.uniform(-1, 1) * options.degrees, rng.uniform() * options.millimetres
        moved, truth = displaced(moving, degrees, millimetres, rng)
        before = error(rigid_transform(np.eye(fixed.GetDimension()), np.zeros(fixed.GetDimension()),
                                       np.zeros(fixed.GetDimension())), truth, fixed)
        started, failure, after = time.process_time(), "", np.inf
        try:
            after = error(register(moved, fixed, options.transform, backend_named(options.backend)).transform, truth,
                          fixed)
        except RuntimeError as reason:
            failure = str(reason)
        case = pairs[number % len(pairs)][0].name.removesuffix(f"_{options.fixed:04d}{ending}")
        yield Trial(case, degrees, millimetres, before, after, time.process_time() - started, failure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="raw data set (default: a phantom, made anew)")
    parser.add_argument("--fixed", type=int, default=0, help="channel (default: %(default)s)")
    parser.add_argument("--moving", type=int, default=1, help="channel (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--degrees", type=float, default=15.0, help="largest rotation (default: %(default)s)")
    parser.add_argument("--millimetres", type=float, default=20.0, help="largest shift (default: %(default)s)")
    parser.add_argument("--transform", choices=("rigid", "affine"), default="rigid")
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0])
    parser.add_argument("--shape", type=int, nargs="+", default=(40, 48, 40), help="of the phantom, voxels of 2 mm")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder or make_phantom_dataset(
            Path(made), labelled=min(options.trials, 10), unlabelled=0, test=0, shape=tuple(options.shape),
            seed=options.seed)
        done = list(tqdm(trials(folder, options), total=options.trials, disable=None))
        print(f"{machine()}, {folder.name}, channel {options.moving} to {options.fixed}, {options.backend}, "
              f"{options.transform}, up to {options.degrees:g} degrees and {options.millimetres:g} mm, seed "
              f"{options.seed}\n")
    for trial in done:
        if not trial.after < RECOVERED:
            print(f"not recovered: {trial.case}, {trial.degrees:.1f} degrees, {trial.millimetres:.1f} mm: "
                  f"{trial.failure or f'{trial.after:.2f} voxels'}")
    after = np.array([trial.after for trial in done])
    header = ["recovered", "error before: median, largest", "after: median, largest", "CPU seconds: median"]
    before = np.array([trial.before for trial in done])
    print(table(header, [[f"{(after < RECOVERED).sum()} of {len(done)}",
                          f"{np.median(before):.2f}, {before.max():.2f} voxels",
                          f"{np.median(after):.2f}, {after.max():.2f} voxels",
                          f"{np.median([trial.seconds for trial in done]):.1f}"]]))


if __name__ == "__main__":
    main()
