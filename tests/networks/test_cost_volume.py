from itertools import product

import pytest
import torch
import torch.nn.functional as F

from nnunetv2_semi.networks import cost_volume as module
from nnunetv2_semi.networks.cost_volume import cost_volume


def naive_cost_volume(target, source, radius):
    """The definition, shift by shift."""
    sizes = target.shape[2:]
    padded = F.pad(source, (radius,) * 2 * len(sizes))
    costs = []
    for shift in product(range(2 * radius + 1), repeat=len(sizes)):
        inside = tuple(slice(begin, begin + size) for begin, size in zip(shift, sizes, strict=True))
        costs.append((target * padded[(..., *inside)]).mean(1))
    return torch.stack(costs, 1)


def features(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(2)]


SHAPES = [(2, 3, 5, 6, 9), (1, 2, 4, 8, 8), (1, 2, 1, 3, 2), (3, 1, 7, 1, 5), (2, 3, 9, 17), (1, 4, 8, 16),
          (1, 2, 1, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("radius", [0, 1, 2, 4])
@pytest.mark.parametrize("bytes_at_once", [1, 20_000, 2**20], ids=lambda number: f"{number} bytes")
def test_equals_the_definition_in_values_and_gradients(monkeypatch, shape, radius, bytes_at_once):
    monkeypatch.setattr(module, "_bytes_at_once", lambda features: bytes_at_once)
    leaves = features(*shape)
    ours, naive = cost_volume(*leaves, radius), naive_cost_volume(*leaves, radius)
    assert ours.shape == naive.shape and ours.is_contiguous()
    assert torch.allclose(ours, naive, rtol=0, atol=1e-13)
    upstream = torch.randn(naive.shape, generator=torch.Generator().manual_seed(1), dtype=naive.dtype)
    for a, b in zip(torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(naive, leaves, upstream),
                    strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("radius", [0, 2])
@pytest.mark.parametrize("bytes_at_once", [1, 20_000, 2**28], ids=lambda number: f"{number} bytes")
def test_the_way_of_a_gpu_equals_that_of_a_cpu(monkeypatch, shape, radius, bytes_at_once):
    leaves = features(*shape)
    expected = cost_volume(*leaves, radius)
    monkeypatch.setattr(module, "_by_channels", module._by_tiles)
    monkeypatch.setattr(module, "_bytes_at_once", lambda features: bytes_at_once)
    found = cost_volume(*leaves, radius)
    assert found.is_contiguous() and torch.allclose(found, expected, rtol=0, atol=1e-13)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gpu_finds_what_a_cpu_does(shape):
    leaves = features(*shape)
    there = [leaf.detach().cuda().requires_grad_() for leaf in leaves]
    values = [cost_volume(*there), cost_volume(*leaves)]
    assert torch.allclose(values[0].cpu(), values[1], rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(value.square().sum(), of)
                 for value, of in zip(values, (there, leaves), strict=True)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a.cpu(), b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(1, 2, 3, 3, 5), (1, 2, 3, 9)], ids=str)
def test_gradients_equal_finite_differences(shape):
    assert torch.autograd.gradcheck(lambda target, source: cost_volume(target, source, 1), features(*shape))


@pytest.mark.parametrize("differentiated", [0, 1])
def test_one_of_both_can_be_differentiated_alone(differentiated):
    leaves = features(1, 3, 5, 6, 7)
    leaves[1 - differentiated].requires_grad_(False)
    ours, naive = (form(*leaves, 2).square().sum() for form in (cost_volume, naive_cost_volume))
    for a, b in zip(*(torch.autograd.grad(value, leaves[differentiated]) for value in (ours, naive)), strict=True):
        assert torch.allclose(a, b)


def test_a_shifted_source_is_found_at_its_shift():
    target, _ = features(1, 16, 6, 7, 8)
    source = torch.roll(target, (1, -2, 2), (2, 3, 4))
    found = cost_volume(target, source, 2)[0, :, 2:-2, 2:-2, 2:-2].mean((1, 2, 3)).argmax()
    assert int(found) == (1 + 2) * 25 + (-2 + 2) * 5 + (2 + 2)


def test_memory_layout_of_the_input_does_not_matter():
    leaves = [leaf.detach().to(memory_format=torch.channels_last_3d).transpose(2, 4)
              for leaf in features(2, 3, 5, 6, 9)]
    assert not any(leaf.is_contiguous() for leaf in leaves)
    assert torch.equal(cost_volume(*leaves), cost_volume(*(leaf.contiguous() for leaf in leaves)))
    target, source = features(1, 3, 5, 6, 9)
    cost_volume(target, source).sum().backward()  # the gradient of a sum is one number, expanded
    expected = torch.autograd.grad(naive_cost_volume(target, source, 2).sum(), [target, source])
    assert torch.allclose(target.grad, expected[0]) and torch.allclose(source.grad, expected[1])


def test_single_precision_is_as_exact_as_the_definition():
    exact = features(1, 32, 6, 9, 10)
    leaves = [leaf.detach().float().requires_grad_() for leaf in exact]
    ours, expected = cost_volume(*leaves), naive_cost_volume(*exact, 2)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours.double(), expected, rtol=0, atol=1e-6)
    for a, b in zip(torch.autograd.grad(ours.square().sum(), leaves),
                    torch.autograd.grad(expected.square().sum(), exact), strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5)


def test_computed_in_the_dtype_of_the_input_within_autocast():
    target, source = (leaf.detach().float() for leaf in features(1, 4, 5, 6, 7))
    expected = cost_volume(target, source)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        target.requires_grad_()
        inside = cost_volume(target, source)
        inside.sum().backward()
        mixed = cost_volume(target, source.bfloat16())
    assert inside.dtype == mixed.dtype == torch.float32
    assert torch.equal(inside, expected)
    assert torch.allclose(target.grad, torch.autograd.grad(naive_cost_volume(target, source, 2).sum(), target)[0],
                          atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_neither_overflows_nor_loses_sums(dtype):
    target, source = (torch.full((1, 64, 3, 4, 9), 100.0, dtype=dtype).requires_grad_() for _ in range(2))
    volume = cost_volume(target, source, 1)
    assert volume.dtype == dtype
    assert volume[0, 13].float().sub(10_000).abs().max() <= 50  # the sum over channels is beyond half precision
    volume.backward(torch.ones_like(volume))
    exact = torch.full((1, 64, 3, 4, 9), 100.0, requires_grad=True)
    naive_cost_volume(exact, torch.full_like(exact, 100.0), 1).sum().backward()
    for gradient in (target.grad, source.grad):
        assert gradient.dtype == dtype and torch.allclose(gradient.float(), exact.grad, rtol=0.01)


@pytest.mark.parametrize("change, message", [
    ({"source": torch.zeros(1, 2, 3, 4, 6)}, "same shape"), ({"radius": -1}, "negative"),
    ({"target": torch.zeros(1, 2, 3), "source": torch.zeros(1, 2, 3)}, "2 or 3 spatial axes")])
def test_wrong_input_is_refused(change, message):
    arguments = {"target": torch.zeros(1, 2, 3, 4, 5), "source": torch.zeros(1, 2, 3, 4, 5), "radius": 2, **change}
    with pytest.raises(ValueError, match=message):
        cost_volume(**arguments)
