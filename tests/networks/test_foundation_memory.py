"""The memory of a training step is counted without allocating it."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nnunetv2_semi.networks.foundation_memory import LiveMemory, sam_vit_b_memory, training_memory

FLOAT = 4


def test_counts_each_storage_while_it_is_alive():
    with LiveMemory() as memory:
        first = torch.zeros(100)
        view = first[:10]
        second = first + 1
        assert memory.live == 200 * FLOAT
        first.add_(1)
        del first
        assert memory.live == 200 * FLOAT, "the view keeps it"
        del view
        assert memory.live == 100 * FLOAT
        third = second * 2
        del second, third
    assert memory.live == 0 and memory.peak == 200 * FLOAT


class Checkpointed(nn.Sequential):
    def forward(self, image):
        for layer in self:
            image = checkpoint(layer, image, use_reentrant=False)
        return image


def layers(kind, frozen=False):
    torch.manual_seed(0)
    network = kind(*[nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GELU(), nn.GELU()) for _ in range(4)])
    if frozen:
        network[0].requires_grad_(False)
    return network


@pytest.mark.parametrize("kind", [nn.Sequential, Checkpointed])
@pytest.mark.parametrize("half", [False, True])
def test_equals_a_real_step(kind, half):
    network = layers(kind)
    counted = training_memory(network, (2, 4, 16, 16), half)
    with LiveMemory() as memory:
        image = torch.empty(2, 4, 16, 16).normal_()
        memory.live = memory.peak = 0  # of the batch, which is not counted
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = network(image)
        logits.float().square().mean().backward()
    assert counted.step == pytest.approx(memory.peak, rel=0.01)
    assert next(network.parameters()).grad is not None


def test_weights_count_once_and_state_only_of_what_trains():
    network = layers(nn.Sequential, frozen=True)
    memory, parameters = training_memory(network, (1, 4, 8, 8)), 4 * 4 * 9 + 4
    assert memory.weights == 4 * parameters * FLOAT
    assert memory.state == 3 * 3 * parameters * FLOAT
    assert memory.total == memory.weights + memory.state + memory.step
    assert all(parameter.grad is None for parameter in network.parameters()), "nothing was computed"


def test_checkpointing_takes_less_and_a_larger_batch_more():
    plain, saving = (training_memory(layers(kind), (4, 4, 32, 32)).step for kind in (nn.Sequential, Checkpointed))
    assert saving < 0.7 * plain
    assert 1.8 * plain < training_memory(layers(nn.Sequential), (8, 4, 32, 32)).step < 2.1 * plain


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sams_memory_grows_with_the_input_and_the_batch(checkpointing):
    steps = [sam_vit_b_memory(size, 1, checkpointing).step for size in (256, 384, 512, 768, 1024)]
    assert steps == sorted(steps)
    one, two, three = (sam_vit_b_memory(512, batch, checkpointing).step for batch in (1, 2, 3))
    assert three - two == pytest.approx(two - one)
    assert sam_vit_b_memory(512, 4, True).step < 0.3 * sam_vit_b_memory(512, 4, False).step


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", [256, 384, 512, 640, 768, 1024])
def test_figures_of_sams_memory_are_what_is_counted(size, checkpointing):
    pytest.importorskip("transformers")
    from nnunetv2_semi.networks.sam import SAMFoundation

    network = SAMFoundation.from_weights("random", 1, 2, image_size=size, checkpointing=checkpointing).train()
    for batch in (1, 4):
        counted, said = training_memory(network, (batch, 1, 256, 256)), sam_vit_b_memory(size, batch, checkpointing)
        assert (said.weights, said.state) == pytest.approx((counted.weights, counted.state), rel=0.005)
        assert said.step == pytest.approx(counted.step, rel=0.04)
