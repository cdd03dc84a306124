import pytest
import torch

from nnunetv2_semi.methods.modality_scores import ModalityScores
from nnunetv2_semi.methods.rows import Rows

NAMES = ["T1", "T2", "CT"]
DECAY = 0.99


def scores_of(regions=False, ignore_label=None):
    return ModalityScores(NAMES, regions, ignore_label)


def step(seed, regions=False, ignore_label=None):
    """Each modality's logits, and the target of a step."""
    generator = torch.Generator().manual_seed(seed)
    outputs = {name: torch.randn(2, 3, 4, 5, generator=generator) for name in NAMES}
    if regions:
        target = torch.rand(2, 3 + (ignore_label is not None), 4, 5, generator=generator) > 0.6
    else:
        target = torch.randint(0, 3 if ignore_label is None else 4, (2, 1, 4, 5), generator=generator)
    return outputs, target


def counted_voxel_by_voxel(output, target, regions, ignore_label):
    """True positives, false positives, false negatives of each foreground class."""
    counts = [[0.0] * (3 if regions else 2) for _ in range(3)]
    for b in range(len(output)):
        for voxel in range(output[0, 0].numel()):
            z, y = output[b].flatten(1)[:, voxel], target[b].flatten(1)[:, voxel]
            if ignore_label is not None and (bool(y[-1]) if regions else int(y[0]) == ignore_label):
                continue
            for column in range(len(counts[0])):
                predicted = bool(z[column] > 0) if regions else int(z.argmax()) == column + 1
                true = bool(y[column]) if regions else int(y[0]) == column + 1
                for row, event in enumerate((predicted and true, predicted and not true, true and not predicted)):
                    counts[row][column] += event
    return torch.tensor(counts, dtype=torch.float64)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("ignore_label", [None, 3])
def test_dice_is_that_of_decayed_sums_of_counts(regions, ignore_label):
    scores, naive = scores_of(regions, ignore_label), dict.fromkeys(NAMES, 0.0)
    for seed in range(3):
        outputs, target = step(seed, regions, ignore_label)
        for name, output in outputs.items():
            scores.count(name, output, target, Rows(2))
            naive[name] = DECAY * naive[name] + counted_voxel_by_voxel(output, target, regions, ignore_label)
        scores.after_step()
    expected = []
    for hits, false_alarms, misses in naive.values():
        expected.append(float((2 * hits / (2 * hits + false_alarms + misses)).mean()))
    assert scores.dice().tolist() == pytest.approx(expected, rel=1e-6)
    assert len(set(expected)) == 3
    scores.choose()
    assert scores.best == NAMES[expected.index(max(expected))]


def test_the_finest_scale_counts_with_deep_supervision():
    plain, deep = scores_of(), scores_of()
    outputs, target = step(0)
    for name, output in outputs.items():
        plain.count(name, output, target, Rows(2))
        deep.count(name, [output, output[..., ::2, ::2]], [target, target[..., ::2, ::2]], Rows(2))
    plain.after_step()
    deep.after_step()
    assert torch.equal(plain.counts, deep.counts)


def test_a_step_without_a_patch_of_a_modality_says_nothing_of_it():
    """Its term is computed all the same, of patches that lack it: processes must exchange the same sums."""
    scores = scores_of()
    outputs, target = step(0)
    for name, output in outputs.items():
        scores.count(name, output, target, Rows.where(torch.tensor([False, False])) if name == "T2" else Rows(2))
    scores.after_step()
    dice = scores.dice()
    assert dice[1] == 0 and dice[0] > 0 and dice[2] > 0
    assert (scores.counts[1] == 0).all()


def test_before_anything_is_counted_the_first_is_best():
    scores = scores_of()
    scores.choose()
    assert scores.dice().tolist() == [0.0] * 3 and scores.best == "T1"


def test_scores_change_at_the_end_of_an_epoch_alone():
    scores = scores_of()
    _, target = step(0)
    truth = torch.nn.functional.one_hot(target[:, 0], 3).movedim(-1, 1).float()
    for name in NAMES:
        scores.count(name, truth if name == "CT" else 1 - truth, target, Rows(2))
    scores.after_step()
    assert scores.best == "T1" and scores.dice().tolist() == pytest.approx([0.0, 0.0, 1.0])
    scores.choose()
    assert scores.best == "CT"


def test_state_goes_into_a_checkpoint_and_out_again():
    scores, other = (torch.nn.ModuleDict({"scores": scores_of()}) for _ in range(2))
    for seed in range(2):
        outputs, target = step(seed)
        for name, output in outputs.items():
            scores["scores"].count(name, output, target, Rows(2))
        scores["scores"].after_step()
    scores["scores"].best = "T2"
    other.load_state_dict(scores.state_dict())
    assert torch.equal(other["scores"].counts, scores["scores"].counts) and other["scores"].best == "T2"
    # and both go on alike
    outputs, target = step(9)
    for each in (scores["scores"], other["scores"]):
        for name, output in outputs.items():
            each.count(name, output, target, Rows(2))
        each.after_step()
    assert torch.equal(other["scores"].counts, scores["scores"].counts)


def test_counting_keeps_no_graph():
    scores = scores_of()
    outputs, target = step(0)
    for name, output in outputs.items():
        scores.count(name, output.requires_grad_(), target, Rows(2))
    scores.after_step()
    assert not scores.counts.requires_grad
