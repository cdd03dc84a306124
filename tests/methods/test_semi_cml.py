import math
from dataclasses import replace

import pytest
import torch

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.losses.soft_labels import soft_cross_entropy, soft_dice_loss
from nnunetv2_semi.methods.contract import Batch
from nnunetv2_semi.methods.rows import Rows
from nnunetv2_semi.methods.semi_cml import SemiCML, SemiCMLSettings
from nnunetv2_semi.networks.modality_branches import ModalityBranches
from nnunetv2_semi.present_channels import fill_absent
from nnunetv2_semi.teachers import BestModelAverage
from nnunetv2_semi.training.step import TrainingStep

RAMP = math.exp(-5 * 0.25)  # half-way


def make(small, channels=2, heads=3, dims=3, one_pass=False, dropout=0.0, regions=False, ignore_label=None,
         deep_supervision=False, **settings):
    torch.manual_seed(1)
    names = {f"m{i}": [i] for i in range(channels)}
    branches = {name: small.network(1, heads, dims, deep_supervision, dropout) for name in names}
    student = ModalityBranches(branches, names, regions)
    return SemiCML(student, SemiCMLSettings(modalities=names, **settings),
                   small.context(channels, regions, ignore_label, one_pass, deep_supervision))


def soft_labels_of(method, batch):
    """In stage 2."""
    method.progress = 0.7
    present = torch.ones(len(batch.unlabelled), 2, dtype=torch.bool) \
        if batch.unlabelled_present is None else batch.unlabelled_present
    return method.stage().soft_labels(batch.unlabelled, present)


def step_of(method):
    return TrainingStep(method, method.optimizers(1e-2, 0.0, 10), None, torch.device("cpu"), seed=0, rank=0,
                        max_skipped_steps=5)


def gradients(method, batch, progress):
    method.zero_grad()
    method.progress = progress
    torch.manual_seed(7)
    terms, joined = [], 0.0
    for group in method.loss(batch):
        terms += group
        weighted = sum(term.weight * term.value for term in group)
        if method.context.arrangement.one_pass:
            joined = joined + weighted
        else:
            weighted.backward()
    if method.context.arrangement.one_pass:
        joined.backward()
    return ({term.name: float(term.value.detach()) for term in terms},
            [None if p.grad is None else p.grad.clone() for p in method.student.parameters()])


@pytest.mark.parametrize("progress", [0.0, 0.7, 0.95])
def test_passes_one_after_another_give_the_gradient_of_the_joint_pass(small, progress):
    batch = small.batch()
    one_by_one, joint = make(small), make(small, one_pass=True)
    values, grads = gradients(one_by_one, batch, progress)
    joint_values, joint_grads = gradients(joint, batch, progress)
    assert values == pytest.approx(joint_values, abs=1e-5)
    for a, b in zip(grads, joint_grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("progress", [0.0, 0.7, 0.95])
@pytest.mark.parametrize("case", [
    {}, {"dims": 2}, {"heads": 2, "regions": True}, {"ignore_label": 3}, {"regions": True, "ignore_label": 4},
    {"deep_supervision": True}, {"channels": 4}, {"count": 1}, {"count": 1, "dims": 2}, {"heads": 7},
])
def test_every_kind_of_data_set_trains(small, case, progress):
    kinds = {k: v for k, v in case.items() if k != "count"}
    batch = small.batch(**{"heads": 3, **case})
    method = make(small, **kinds)
    before = [p.clone() for p in method.student.parameters()]
    terms, values = step_of(method).run(batch, 0, progress)
    assert all(torch.isfinite(term.value) for term in terms)
    assert values["skipped_steps"] == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, method.student.parameters(), strict=True))


def test_stage_one_teaches_both_modalities_and_stage_two_only_the_weaker(small):
    batch = small.batch()
    method = make(small, better_modality="m1")
    names = [t.name for g in method.loss(batch) for t in g]
    assert names == ["supervised_m0", "supervised_m1", "consistency", "asc"]
    method.progress = 0.63
    assert [t.name for g in method.loss(batch) for t in g] == ["supervised_m0", "supervised_m1", "prel_m0",
                                                               "prel_asc_m0"]
    method.progress = 1 - 0.2 * 0.37
    assert [t.name for g in method.loss(batch) for t in g][2:] == ["prel_m0", "prel_asc_m0", "prel_m1", "prel_asc_m1"]


def test_alpha_divides_between_contrast_and_relearning(small):
    method = make(small, better_modality="m1", unlabelled_weight=2.0, prel_weight=1.0)
    method.progress = 0.99
    weights = {t.name: t.weight for g in method.loss(small.batch()) for t in g}
    assert weights["prel_m0"] == pytest.approx(2 * 0.99) and weights["prel_asc_m0"] == pytest.approx(2 * 0.01)
    assert weights["prel_m1"] == pytest.approx(2 * 0.8) and weights["prel_asc_m1"] == pytest.approx(2 * 0.2)


def test_prel_weight_scales_all_of_stage_two(small):
    method = make(small, better_modality="m1", prel_weight=0.3)
    method.progress = 0.7
    weights = {t.name: t.weight for g in method.loss(small.batch()) for t in g}
    assert weights["prel_m0"] == pytest.approx(0.3 * 0.99) and weights["prel_asc_m0"] == pytest.approx(0.3 * 0.01)


def test_the_mean_soft_label_is_of_all_teachers_and_all_modalities_learn_from_it(small):
    method = make(small, soft_label="mean", prel_noise=0.0, prel_passes=1, better_modality="m1", asc=False)
    method.progress = 0.7
    batch = small.batch()
    terms = {t.name: t for g in method.loss(batch) for t in g if not t.supervised}
    assert list(terms) == ["prel_m0", "prel_m1"]
    each = [teacher.network(batch.unlabelled[:, [channel]]).softmax(1)
            for channel, teacher in enumerate(method.teachers)]
    label = torch.stack(each).mean(0).detach()
    logits = method.student.branches[0](batch.unlabelled[:, [0]])
    expected = soft_cross_entropy(logits, label, False) + soft_dice_loss(logits.softmax(1), label, False)
    assert torch.allclose(terms["prel_m0"].value, expected)


@pytest.mark.parametrize("settings, progress, expected", [
    ({"asc": False}, 0.0, ["supervised_m0", "supervised_m1", "consistency"]),
    ({"asc": False, "better_modality": "m0"}, 0.7, ["supervised_m0", "supervised_m1", "prel_m1"]),
    ({"prel": False}, 0.9, ["supervised_m0", "supervised_m1", "consistency", "asc"]),
    ({"drop_supervised_in_prel": True, "better_modality": "m0"}, 0.7, ["prel_m1", "prel_asc_m1"]),
])
def test_ablations_switch_terms_off(small, settings, progress, expected):
    method = make(small, **settings)
    method.progress = progress
    assert [t.name for g in method.loss(small.batch()) for t in g] == expected


@pytest.mark.parametrize("settings, expected", [({}, 0.1), ({"asc_weight": 3.5}, 3.5),
                                                ({"asc_weight": 3.5, "asc_ramp_fraction": 1.0}, 3.5 * RAMP)])
def test_stage_one_weights(small, settings, expected):
    method = make(small, **settings)
    method.progress = 0.5
    weights = {t.name: t.weight for g in method.loss(small.batch()) for t in g}
    assert weights["asc"] == pytest.approx(expected)
    assert weights["consistency"] == 1.0
    method.progress = 0.1
    weights = {t.name: t.weight for g in method.loss(small.batch()) for t in g}
    assert weights["consistency"] == pytest.approx(RAMP)  # half-way to a fifth of training


def test_as_in_the_paper_the_agreement_may_ramp_up_over_all_of_training(small):
    method = make(small, ramp_fraction=1.0)
    method.progress = 0.5
    weights = {t.name: t.weight for g in method.loss(small.batch()) for t in g}
    assert weights["consistency"] == pytest.approx(RAMP)


@pytest.mark.parametrize("settings, expected", [({}, 0.999), ({"num_epochs": 20}, 0.99), ({"ema_decay": 0.9}, 0.9)])
def test_the_teachers_memory_follows_the_length_of_training(small, settings, expected):
    assert [teacher.decay for teacher in make(small, **settings).teachers] == pytest.approx([expected] * 2)


def test_the_better_modality_on_labelled_training_patches_teaches(small):
    method = make(small)
    batch = small.batch()
    with torch.no_grad():  # m1 answers with the truth, m0 with the wrong class everywhere
        truth = torch.nn.functional.one_hot(batch.target[:, 0].long(), 3).movedim(-1, 1).float() * 9
    method.scores.count("m0", truth.roll(1, 1), batch.target, Rows(2))
    method.scores.count("m1", truth, batch.target, Rows(2))
    method.after_step()
    method.after_epoch()
    assert method.better_modality() == "m1"
    assert method.scores.dice().tolist() == pytest.approx([0.0, 1.0])


def test_soft_label_is_the_mean_of_the_noisy_passes_and_soft(small):
    method = make(small, prel_noise=0.1, prel_passes=4, better_modality="m0")
    batch = small.batch()
    torch.manual_seed(3)
    soft = soft_labels_of(method, batch)
    torch.manual_seed(3)
    singles = []
    for _ in range(4):
        noise = (0.1 * torch.randn_like(batch.unlabelled[:, :1])).clamp(0, 0.2)
        singles.append(method.teachers[0].network(batch.unlabelled[:, :1] + noise).softmax(1))
    assert torch.allclose(soft, torch.stack(singles).mean(0), atol=1e-6)
    assert ((soft > 0.01) & (soft < 0.99)).any()


def test_dropout_is_active_in_the_noisy_passes_and_only_there(small):
    method = make(small, dropout=0.5, prel_noise=0.0, prel_passes=1)
    batch = small.batch()
    first, second = soft_labels_of(method, batch), soft_labels_of(method, batch)
    assert not torch.allclose(first, second)
    image = batch.unlabelled[:, :1]
    assert torch.equal(method.teachers[0](image), method.teachers[0](image))


def test_best_model_average_takes_in_the_best_epochs_only(small):
    student = small.network(1, 2)
    average = BestModelAverage(student, keep=2)
    for score, share in ((0.5, 1.0), (0.6, (0.6 - 0.5) / 0.6), (0.4, 0.0)):
        student.load_state_dict(small.network(1, 2).state_dict())
        before = [p.clone() for p in average.network.parameters()]
        assert average.update(score) == (share > 0)
        for old, new, own in zip(before, student.parameters(), average.network.parameters(), strict=True):
            assert torch.allclose(own, old + share * (new - old), atol=1e-6)


def test_swapping_the_modalities_swaps_their_gradients(small):
    batch = small.batch()
    method, swapped = make(small, better_modality="m0"), make(small, better_modality="m1")
    swapped.student.branches = torch.nn.ModuleList(reversed(list(method.student.branches)))
    swapped._teachers = torch.nn.ModuleList(reversed(method.teachers))
    mirrored = replace(batch, labelled=batch.labelled.flip(1), unlabelled=batch.unlabelled.flip(1))
    for progress in (0.2, 0.7):
        values, grads = gradients(method, batch, progress)
        other, other_grads = gradients(swapped, mirrored, progress)
        assert sorted(values.values()) == pytest.approx(sorted(other.values()), abs=1e-5)
        half = len(grads) // 2
        for a, b in zip(grads, other_grads[half:] + other_grads[:half], strict=True):
            assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-5))


def test_state_is_restored_whole(small):
    batch = small.batch()
    method = make(small)
    step = step_of(method)
    for number in range(3):
        step.run(batch, number, 0.5)
    method.after_epoch()
    other = make(small)
    other.load_state_dict(method.state_dict())
    assert other.better_modality() == method.better_modality()
    assert other.teachers[0].updates == 3
    assert torch.equal(other.scores.counts, method.scores.counts)
    for a, b in zip(method.state_dict().values(), other.state_dict().values(), strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)


def test_deployed_weights_split_into_one_network_per_modality(small):
    method = make(small, deploy="teacher")
    models = method.deployable().stock_networks()
    image = torch.randn(1, 2, 8, 8, 8)
    for name, (channels, own) in models.items():
        network = small.network(1, 3)
        network.load_state_dict(own)
        assert torch.allclose(network(image[:, channels]), method.parts()[name](image))


def test_one_modality_is_refused_with_a_remedy(small):
    with pytest.raises(UserError, match="two or more modalities"):
        SemiCML.check(small.context(1), SemiCMLSettings())


def test_an_unknown_better_modality_is_refused(small):
    with pytest.raises(UserError, match="better_modality is 'm9'"):
        SemiCML.check(small.context(2), SemiCMLSettings(better_modality="m9"))


def test_at_most_one_branch_graph_exists_at_a_time_one_after_another(small):
    """Checkpointed branches run again in the backward pass: no saved activations before it."""
    method = make(small)
    calls = []
    for name in method.names:
        method.student.branch(name).register_forward_pre_hook(
            lambda *_, name=name: calls.append((name, torch.is_grad_enabled())))
    groups = method.loss(small.batch())
    for group in groups:
        calls.clear()
        if group[0].supervised:
            continue
        sum(t.weight * t.value for t in group).backward()
        assert [name for name, _ in calls] in (["m1", "m0"], ["m0", "m1"])


# cases that lack a modality: patch 0 is paired, 1 has m0 alone, 2 has m1 alone
PARTLY = torch.tensor([[True, True], [True, False], [False, True]])


def partly_paired(small, **options):
    batch = small.batch(count=3, **options)
    return replace(batch, labelled=fill_absent(batch.labelled, PARTLY), labelled_present=PARTLY,
                   unlabelled=fill_absent(batch.unlabelled, PARTLY), unlabelled_present=PARTLY)


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_a_term_sees_the_patches_that_have_its_modalities(small, one_pass, deep_supervision):
    method = make(small, one_pass=one_pass, deep_supervision=deep_supervision, prel_noise=0.0, prel_passes=1,
                  better_modality="m0", self_relearning=1.0)
    batch = partly_paired(small, deep_supervision=deep_supervision)

    def rows_of(batch, labelled, unlabelled):
        target = [t[labelled] for t in batch.target] if deep_supervision else batch.target[labelled]
        return Batch(batch.labelled[labelled], target, batch.unlabelled[unlabelled])

    def terms(batch, progress):
        torch.manual_seed(1)
        method.progress = progress
        return {t.name: t for g in method.loss(batch) for t in g}
    stages = (0.2, {"consistency": [0], "asc": [0]}), (0.7, {"prel_m0": [0, 1], "prel_m1": [0]})
    for progress, of_unlabelled in stages:
        found = terms(batch, progress)
        assert all(term.applies for term in found.values())
        for name, rows in {"supervised_m0": [0, 1], "supervised_m1": [0, 2]}.items():
            assert torch.allclose(found[name].value, terms(rows_of(batch, rows, [0]), progress)[name].value, atol=1e-6)
        for name, rows in of_unlabelled.items():
            assert torch.allclose(found[name].value, terms(rows_of(batch, [0], rows), progress)[name].value, atol=1e-6)


def test_nothing_is_learnt_from_the_fill_of_absent_modalities(small):
    method, batch = make(small, better_modality="m0"), partly_paired(small)
    absent = torch.where(PARTLY.view(3, 2, 1, 1, 1), 0.0, 5.0)
    other = replace(batch, labelled=batch.labelled + absent, unlabelled=batch.unlabelled + absent)
    for progress in (0.2, 0.7):
        (values, grads), (same, its) = gradients(method, batch, progress), gradients(method, other, progress)
        assert values == pytest.approx(same, abs=1e-6)
        for a, b in zip(grads, its, strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, atol=1e-6)


def test_in_unpaired_data_the_unlabelled_terms_count_for_nothing(small):
    unpaired = PARTLY[1:]
    batch = small.batch()
    batch = replace(batch, labelled=fill_absent(batch.labelled, unpaired), labelled_present=unpaired,
                    unlabelled=fill_absent(batch.unlabelled, unpaired), unlabelled_present=unpaired)
    method, control = make(small), make(small, unlabelled_weight=0.0)
    control.load_state_dict(method.state_dict())
    for progress in (0.2, 0.7):
        terms, _ = step_of(method).run(batch, 0, progress)
        step_of(control).run(batch, 0, progress)
        assert [t.name for t in terms if t.applies] == ["supervised_m0", "supervised_m1"]
        for own, others in zip(method.student.parameters(), control.student.parameters(), strict=True):
            assert torch.equal(own, others)


def test_a_modality_that_no_labelled_patch_has_gets_no_gradient_and_no_score(small):
    batch = small.batch()
    only_first = torch.tensor([[True, False]] * 2)
    batch = replace(batch, labelled=fill_absent(batch.labelled, only_first), labelled_present=only_first)
    method = make(small, unlabelled_weight=0.0)
    before = [p.clone() for p in method.student.branches[1].parameters()]
    terms, _ = step_of(method).run(batch, 0, 0.2)
    assert {t.name for t in terms if not t.applies} == {"supervised_m1"}
    assert all(torch.equal(a, b) for a, b in zip(before, method.student.branches[1].parameters(), strict=True))
    assert method.scores.counts[1].sum() == 0 < method.scores.counts[0].sum()


def test_the_mean_soft_label_is_of_the_modalities_that_a_patch_has(small):
    method = make(small, soft_label="mean", prel_noise=0.0, prel_passes=1)
    batch = partly_paired(small)
    each = [teacher.network(batch.unlabelled[:, [channel]]).softmax(1)
            for channel, teacher in enumerate(method.teachers)]
    labels = soft_labels_of(method, batch)
    for row, expected in enumerate([(each[0][0] + each[1][0]) / 2, each[0][1], each[1][2]]):
        assert torch.allclose(labels[row], expected, atol=1e-6)


def test_the_branches_of_the_modalities_present_vote(small):
    method = make(small)
    image = partly_paired(small).labelled
    voted = method.deployable()(image).softmax(1)
    alone = [method.student.branches[i](image[:, [i]]).softmax(1) for i in range(2)]
    for row, expected in enumerate([(alone[0][0] + alone[1][0]) / 2, alone[0][1], alone[1][2]]):
        assert torch.allclose(voted[row], expected, atol=1e-5)
