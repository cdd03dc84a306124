import math

import pytest
import torch

from nnunetv2_semi.losses.channel_contrast import channel_contrast


def naive_contrast(first, second, temperature, normalise):
    """Channel by channel of each case."""
    losses = []
    for of_first, of_second in zip(first, second, strict=True):
        if normalise == "released":
            temperature = 1
            of_first, of_second = of_first / of_first.norm(dim=0), of_second / of_second.norm(dim=0)
        for channel, token in enumerate(of_first):
            similar = []
            for other in of_second:
                length = token.norm() * other.norm() if normalise == "normalised" else 1
                similar.append(torch.exp((token * other).sum() / length / temperature))
            losses.append(-torch.log(similar[channel] / sum(similar)))
    return sum(losses) / len(losses)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("normalise", ["normalised", "released"])
@pytest.mark.parametrize("temperature", [0.1, 1.5])
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 5, 4), (2, 1, 6)], ids=str)
def test_equals_the_definition_in_value_and_gradient(normalise, temperature, shape):
    leaves = [drawn(*shape, seed=seed).requires_grad_() for seed in (0, 1)]
    ours = channel_contrast(*leaves, temperature, normalise)
    naive = naive_contrast(*leaves, temperature, normalise)
    assert torch.allclose(ours, naive, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(naive, leaves), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalise", ["normalised", "released"])
def test_a_batch_has_the_mean_of_its_cases(normalise):
    first, second = drawn(3, 6, 8, seed=0), drawn(3, 6, 8, seed=1)
    of_cases = [channel_contrast(a, b, normalise=normalise) for a, b in zip(first, second, strict=True)]
    assert torch.allclose(channel_contrast(first, second, normalise=normalise), torch.stack(of_cases).mean())


@pytest.mark.parametrize("normalise", ["normalised", "released"])
def test_the_order_of_channels_does_not_matter(normalise):
    first, second = drawn(2, 6, 8, seed=0), drawn(2, 6, 8, seed=1)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    expected = channel_contrast(first, second, normalise=normalise)
    assert torch.allclose(channel_contrast(first[:, order], second[:, order], normalise=normalise), expected)
    assert not torch.allclose(channel_contrast(first[:, order], second, normalise=normalise), expected)


@pytest.mark.parametrize("normalise", ["normalised", "released"])
def test_channels_that_match_have_a_lower_loss_than_channels_that_do_not(normalise):
    first, second = drawn(1, 8, 32, seed=0), drawn(1, 8, 32, seed=1)
    near = first + 0.3 * second
    match, none, swapped = (float(channel_contrast(first, other, normalise=normalise))
                            for other in (near, second, near.roll(1, 1)))
    assert match < none < swapped


def test_length_of_tokens_does_not_matter_and_bounds_hold():
    first, second = drawn(8, 32, seed=0), drawn(8, 32, seed=1)
    lengths = torch.arange(1, 9, dtype=torch.float64).unsqueeze(1)
    assert torch.allclose(channel_contrast(first * lengths, second / lengths), channel_contrast(first, second))
    assert channel_contrast(torch.eye(8), torch.eye(8)) < 1e-2
    assert float(channel_contrast(torch.ones(8, 5), torch.ones(8, 5))) == pytest.approx(math.log(8), abs=1e-5)
    released = channel_contrast(drawn(64, 128), drawn(64, 128, seed=1), normalise="released")
    assert abs(float(released) - math.log(64)) < 0.1


def test_half_precision_is_computed_in_single_precision():
    first, second = drawn(2, 6, 8, seed=0).half(), drawn(2, 6, 8, seed=1).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = channel_contrast(first, second)
    assert inside.dtype == torch.float32 and torch.equal(inside, channel_contrast(first.float(), second.float()))


@pytest.mark.parametrize("change, message", [
    ({"second": torch.zeros(4, 3)}, "same shape"), ({"first": torch.zeros(3), "second": torch.zeros(3)}, "same shape"),
    ({"temperature": 0.0}, "temperature"), ({"normalise": "all"}, "normalise")])
def test_wrong_input_is_refused(change, message):
    arguments = {"first": torch.zeros(4, 2), "second": torch.zeros(4, 2), **change}
    with pytest.raises(ValueError, match=message):
        channel_contrast(**arguments)
