"""The area-similarity contrast equals the authors' released code, value and gradient.

The reference inputs lie outside the repository; set NNUNETV2_SEMI_REFERENCE to their folder.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunetv2_semi.losses.area_similarity import area_similarity_contrast

FOLDER = Path(os.environ.get("NNUNETV2_SEMI_REFERENCE", Path(__file__).parents[3] / "shared" / "reference"))


@pytest.mark.parametrize("name", ["asc_binary_2d", "asc_multiclass_2d"])
def test_value_and_gradient_equal_the_released_code(name):
    path = FOLDER / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"no reference values at {path}")
    reference = np.load(path)
    first, second = (torch.tensor(reference[key], requires_grad=True) for key in ("z_i", "z_j"))

    loss = area_similarity_contrast(first, second)
    loss.backward()

    assert abs(float(loss.detach()) - float(reference["loss"])) < 1e-9
    assert np.abs(first.grad.numpy() - reference["grad_z_i"]).max() < 1e-9
    assert np.abs(second.grad.numpy() - reference["grad_z_j"]).max() < 1e-9
