import pytest
import torch

from nnunetv2_semi.losses.displacement_smoothness import displacement_smoothness


def naive_smoothness(displacement):
    """Neighbour by neighbour."""
    of_axes = []
    for axis in range(2, displacement.ndim):
        lines = displacement.movedim(axis, 0)
        squares = [((after - before) ** 2).flatten() for before, after in zip(lines[:-1], lines[1:], strict=True)]
        of_axes.append(sum(part.sum() for part in squares) / sum(part.numel() for part in squares))
    return sum(of_axes) / len(of_axes)


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (1, 2, 7, 3)], ids=str)
def test_equals_the_definition_in_value_and_gradient(shape):
    displacement = drawn(*shape)
    ours, naive = displacement_smoothness(displacement), naive_smoothness(displacement)
    assert torch.allclose(ours, naive, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(3 * value, displacement)[0] for value in (ours, naive)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-12)


def test_only_differences_count():
    displacement = drawn(2, 3, 4, 5, 6)
    shifted = displacement + torch.tensor([1.0, -5.0, 30.0], dtype=torch.float64).view(1, 3, 1, 1, 1)
    assert torch.allclose(displacement_smoothness(shifted), displacement_smoothness(displacement))
    assert displacement_smoothness(torch.ones(1, 2, 4, 4)) == 0
    assert torch.allclose(displacement_smoothness(2 * displacement), 4 * displacement_smoothness(displacement))


def test_a_single_slice_is_as_smooth_as_the_plane():
    plane = drawn(2, 3, 5, 6)
    assert torch.allclose(displacement_smoothness(plane.unsqueeze(2)), displacement_smoothness(plane))
    point = torch.ones(1, 2, 1, 1, requires_grad=True)
    value = displacement_smoothness(point)
    value.backward()
    assert value == 0 and (point.grad == 0).all()


def test_half_precision_is_computed_in_single_precision():
    displacement = (200 * drawn(1, 2, 5, 6).detach()).half()  # squares of such differences overflow
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = displacement_smoothness(displacement)
    assert inside.dtype == torch.float32 and torch.equal(inside, displacement_smoothness(displacement.float()))
