"""Attention between modalities."""

import pytest
import torch

from nnunetv2_semi.networks.cross_modal_attention import CrossModalAttention, _positions


def attention(width=12, heads=4):
    torch.manual_seed(0)
    module = CrossModalAttention(width, heads)
    torch.nn.init.normal_(module.output.weight)
    torch.nn.init.normal_(module.output.bias)
    return module.double()


def features(modalities, shape=(3, 4), width=12, count=2):
    torch.manual_seed(1)
    return [torch.randn(count, width, *shape, dtype=torch.float64) for _ in range(modalities)]


def naive(module, given, present):
    """Voxel by voxel and head by head."""
    shape, width, heads = given[0].shape[2:], given[0].shape[1], module.heads
    places = _positions(shape, width).double()
    result = [single.clone() for single in given]
    for b in range(len(given[0])):
        tokens = [single[b].flatten(1).T for single in given]
        normed = [module.norm(t) for t in tokens]
        for m in range(len(given)):
            others = [o for o in range(len(given)) if o != m and present[b, o]]
            if not others:
                continue
            keys = torch.cat([module.key(normed[o] + places) for o in others])
            values = torch.cat([module.value(normed[o]) for o in others])
            size = width // heads
            for v in range(len(tokens[m])):
                query = module.query(normed[m] + places)[v]
                found = []
                for h in range(heads):
                    part = slice(h * size, (h + 1) * size)
                    weights = ((keys[:, part] @ query[part]) / size ** 0.5).softmax(0)
                    found.append(weights @ values[:, part])
                result[m][b].flatten(1)[:, v] += module.output(torch.cat(found))
    return result


@pytest.mark.parametrize("modalities, shape", [(2, (3, 4)), (3, (2, 3)), (2, (2, 2, 3))])
def test_equals_a_naive_form(modalities, shape):
    module, given = attention(), features(modalities, shape)
    present = torch.ones(2, modalities, dtype=torch.bool)
    present[1, 0] = modalities == 2
    for ours, expected in zip(module(given, present), naive(module, given, present), strict=True):
        assert torch.allclose(ours, expected, atol=1e-10)


def test_a_missing_modality_is_left_out():
    """The others get what they would get without it, and its features change nothing."""
    module, given = attention(), features(3)
    present = torch.tensor([[True, False, True]] * 2)
    without = module([given[0], given[2]], torch.ones(2, 2, dtype=torch.bool))
    for middle in (given[1], torch.full_like(given[1], 1e6)):
        with_missing = module([given[0], middle, given[2]], present)
        assert torch.allclose(with_missing[0], without[0], atol=1e-12)
        assert torch.allclose(with_missing[2], without[1], atol=1e-12)


def test_a_patch_with_one_modality_stays_as_it_is_and_gradients_are_finite():
    module, given = attention(), [single.requires_grad_() for single in features(2)]
    result = module(given, torch.tensor([[True, False], [True, True]]))
    assert torch.equal(result[0][0], given[0][0])
    assert not torch.equal(result[0][1], given[0][1])
    sum(single.sum() for single in result).backward()
    assert all(torch.isfinite(single.grad).all() for single in given)
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_it_starts_as_no_attention():
    given = features(2)
    result = CrossModalAttention(12).double()(given, torch.ones(2, 2, dtype=torch.bool))
    assert all(torch.equal(ours, own) for ours, own in zip(result, given, strict=True))


@pytest.mark.parametrize("shape, width", [((5, 7), 16), ((3, 4, 5), 14), ((4,), 6), ((3, 3, 3), 4)])
def test_every_place_has_a_code_of_its_own(shape, width):
    codes = _positions(shape, width)
    assert codes.shape == (torch.tensor(shape).prod(), width)
    if width >= 2 * len(shape):
        assert len(codes.unique(dim=0)) == len(codes)


@pytest.mark.parametrize("width, heads, expected", [(12, 4, 4), (6, 4, 2), (7, 4, 1)])
def test_heads_divide_the_width(width, heads, expected):
    assert CrossModalAttention(width, heads).heads == expected
