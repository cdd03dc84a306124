from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient

from nnunetv2_semi.data.grids import Grid, grid_difference, grid_of, orientation, same_spacing

READERS = (SimpleITKIO, NibabelIO)


def write(path, spacing=(1.0, 1.0, 2.0), origin=(3.0, -4.0, 5.0), axes="LPS", shape=(4, 5, 6)):
    image = sitk.GetImageFromArray(np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    if axes != "LPS":
        image = sitk.DICOMOrient(image, axes)
    sitk.WriteImage(image, str(path))
    return str(path)


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PIR"])
def test_all_readers_give_the_same_grid_and_orientation(tmp_path, axes):
    path = write(tmp_path / "a.nii.gz", axes=axes)
    grids = [grid_of(reader().read_images([path])[1]) for reader in READERS]
    assert [orientation(grid) for grid in grids] == [axes, axes]
    assert grid_difference(*grids) is None
    assert grid_of(SimpleITKIO().read_images([path])[1]).spacing == grids[0].spacing


def test_a_reader_that_reorients_is_taken_at_what_it_gives(tmp_path):
    paths = [write(tmp_path / f"{axes}.nii.gz", axes=axes) for axes in ("LPS", "PIR")]
    for reader in (NibabelIOWithReorient, SimpleITKIOWithReorient):
        first, second = (grid_of(reader().read_images([path])[1]) for path in paths)
        assert grid_difference(first, second) is None
    first, second = (grid_of(SimpleITKIO().read_images([path])[1]) for path in paths)
    assert grid_difference(first, second) is not None


def test_the_channels_of_one_file_are_no_axis(tmp_path):
    volume = sitk.ReadImage(write(tmp_path / "a.nii.gz"))
    several = sitk.JoinSeries([volume, volume])
    sitk.WriteImage(several, str(tmp_path / "b.nii.gz"))
    first, second = (grid_of(SimpleITKIO().read_images([str(tmp_path / name)])[1]) for name in ("a.nii.gz", "b.nii.gz"))
    assert len(second.direction) == 9 and grid_difference(first, second) is None


def test_spacings_agree_as_nnunet_says():
    assert same_spacing((1, 1, 2.0), (1, 1, 2.000004))
    assert not same_spacing((1, 1, 2.0), (1, 1, 2.0004))
    assert same_spacing((2.0,), (2.000004,)) == SimpleITKIO._check_all_same([(2.0,), (2.000004,)])


@pytest.mark.parametrize(("change", "difference"), [
    ({}, None),
    ({"spacing": (1.0, 1.0, 2.1)}, "spacing"),
    ({"origin": (0.0, 0.0, 0.0005)}, None),
    ({"origin": (0.0, 0.0, 0.5)}, "origin"),
    ({"direction": (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)}, "direction"),
    ({"spacing": (), "origin": (), "direction": ()}, None),
])
def test_what_differs_is_told(change, difference):
    grid = Grid((1.0, 1.0, 2.0), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    other = Grid(**{"spacing": grid.spacing, "origin": grid.origin, "direction": grid.direction, **change})
    assert grid_difference(grid, other) == difference


def test_images_without_header_have_no_grid():
    assert grid_of({"spacing": (1, 1, 1)}) == Grid()
    assert orientation(Grid()) == ""
