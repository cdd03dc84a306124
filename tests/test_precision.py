"""Where mixed precision is switched off."""

from contextlib import nullcontext

import torch

from nnunetv2_semi.precision import without_autocast


def test_operations_have_the_precision_of_their_inputs():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with without_autocast(x.device):
            assert (x @ x).dtype == torch.float32


def test_older_torch_is_not_asked_about_mps():
    assert isinstance(without_autocast(torch.device("mps")), nullcontext)
