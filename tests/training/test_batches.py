"""How many unlabelled patches a process draws."""

from types import SimpleNamespace

import pytest

from nnunetv2_semi.methods.settings import Settings
from nnunetv2_semi.training import batches


@pytest.mark.parametrize("size, shares", [(None, [5, 5]), (4, [2, 2]), (3, [2, 1]), (1, [1, 1])])
def test_unlabelled_patches_are_shared_out_over_gpus_and_none_is_lost(monkeypatch, size, shares):
    monkeypatch.setattr(batches.dist, "get_world_size", lambda: 2)
    trainer, settings = SimpleNamespace(is_ddp=True, batch_size=5), Settings(unlabelled_batch_size=size)
    for rank, share in enumerate(shares):
        monkeypatch.setattr(batches.dist, "get_rank", lambda rank=rank: rank)
        assert batches.unlabelled_batch_size(trainer, settings) == share
    trainer.configuration_manager = SimpleNamespace(batch_size=3)
    assert batches.smallest_batch_sizes(trainer, settings) == (1, max(1, (size or 3) // 2))
    trainer.is_ddp = False
    assert batches.unlabelled_batch_size(trainer, settings) == (size or 5)
