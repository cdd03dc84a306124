from dataclasses import replace

import pytest
import torch

from nnunetv2_semi.data.boxes import Boxes
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.losses.masked_dice_ce import masked_dice_ce
from nnunetv2_semi.methods.bcp import BCP, BCPSettings
from nnunetv2_semi.methods.contract import Batch
from nnunetv2_semi.training.step import TrainingStep

PAPER = {"plain_labelled": False, "seg_loss": "paper"}


def make(small, progress=0.5, regions=False, ignore_label=None, deep_supervision=False, one_pass=False,
         connected_classes=(), **settings):
    torch.manual_seed(1)
    context = small.context(regions=regions, ignore_label=ignore_label, deep_supervision=deep_supervision,
                            one_pass=one_pass, connected_classes=connected_classes)
    method = BCP(small.network(2, 3, 2, deep_supervision), BCPSettings(**settings), context)
    method.progress = progress
    return method


def terms_of(method, batch):
    torch.manual_seed(3)
    return {term.name: term for group in method.loss(batch) for term in group}


def drawn_mask(method, number, batch):
    torch.manual_seed(3)
    return ~Boxes.draw(number, batch.labelled.shape[2:], method.settings.box).inside(batch.labelled.device)


def unequal(batch, labelled, unlabelled):
    return Batch(batch.labelled[:labelled], batch.target[:labelled], batch.unlabelled[:unlabelled])


@pytest.mark.parametrize("plain_labelled", [True, False])
@pytest.mark.parametrize("labelled, unlabelled", [(2, 2), (1, 3), (3, 1), (1, 1)])
def test_images_are_pasted_both_ways_as_the_equations_say(small, labelled, unlabelled, plain_labelled):
    method = make(small, plain_labelled=plain_labelled)
    batch, seen = unequal(small.batch(dims=2, count=3), labelled, unlabelled), []
    method.student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    terms_of(method, batch)
    assert len(seen) == 2 + plain_labelled == BCP.graphs(method.settings)
    assert not plain_labelled or torch.equal(seen[0], batch.labelled)
    x_in, x_out = seen[-2:]
    number = max(labelled, unlabelled)
    m = drawn_mask(method, number, batch).float()
    assert len(x_in) == len(x_out) == number and (1 - m).flatten(1).sum(1).tolist() == [25.0] * number  # 5 of 8 voxels
    for k in range(number):
        x_l, x_p = batch.labelled[k % labelled], batch.unlabelled[k % unlabelled]
        x_q = batch.unlabelled[(k + 1) % unlabelled]
        assert torch.allclose(x_in[k], x_l * m[k] + x_p * (1 - m[k]))
        assert torch.allclose(x_out[k], x_q * m[k] + x_l * (1 - m[k]))


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("ignore_label", [None, 3])
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_by_default_it_is_nnunets_loss_of_plain_and_of_pasted_patches_in_value_and_gradient(
        small, naive_weighted_dice_ce, regions, ignore_label, deep_supervision):
    kinds = {"regions": regions, "ignore_label": ignore_label, "deep_supervision": deep_supervision}
    method, batch = make(small, largest_component=False, **kinds), small.batch(dims=2, **kinds)
    terms = terms_of(method, batch)
    m = drawn_mask(method, 2, batch)
    with torch.no_grad():
        z = method.teacher(batch.unlabelled)
    z = z[0] if deep_supervision else z
    pseudo = (z > 0).long() if regions else z.argmax(1, keepdim=True)
    target = batch.target[0] if deep_supervision else batch.target
    known = torch.ones_like(m)
    if ignore_label is not None:
        known = ~target[:, -1:] if regions else target != ignore_label
    truth = (target[:, :3] if regions else target).long()
    swapped = batch.unlabelled.flip(0)
    images = {"in": batch.labelled * m + batch.unlabelled * ~m, "out": swapped * m + batch.labelled * ~m}
    expected = {"supervised": method.context.supervised_loss(method.student(batch.labelled), batch.target)}
    for name, true, labels in (("in", m, pseudo), ("out", ~m, pseudo.flip(0))):
        output = method.student(images[name])
        for kind, label, counted in (("supervised", truth, true & known), ("copy_paste", labels, ~true)):
            expected[f"{kind}_{name}"] = naive_weighted_dice_ce(
                output if deep_supervision else [output], label, counted, regions, method.context.scale_weights)
    assert list(terms) == ["supervised", "supervised_in", "copy_paste_in", "supervised_out", "copy_paste_out"]
    for name, value in expected.items():
        assert torch.allclose(terms[name].value, value, rtol=1e-4), name
        assert terms[name].weight == (1.0 if terms[name].supervised else 0.5)
        assert terms[name].supervised == name.startswith("supervised")
    totals = [sum(t.value for t in terms.values()), sum(expected.values())]
    assert small.same_gradients(*totals, method.student)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("ignore_label", [None, 3])
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_terms_are_the_papers_in_value_and_gradient(small, regions, ignore_label, deep_supervision):
    method = make(small, regions=regions, ignore_label=ignore_label, deep_supervision=deep_supervision,
                  largest_component=False, **PAPER)
    batch = small.batch(dims=2, regions=regions, ignore_label=ignore_label, deep_supervision=deep_supervision)
    terms = terms_of(method, batch)
    m = drawn_mask(method, 2, batch)
    targets = batch.target if deep_supervision else [batch.target]
    with torch.no_grad():
        z = method.teacher(batch.unlabelled)
    z = z[0] if deep_supervision else z
    pseudo = (z > 0).long() if regions else z.argmax(1, keepdim=True)
    swapped = batch.unlabelled.flip(0)
    images = {"in": batch.labelled * m + batch.unlabelled * ~m, "out": swapped * m + batch.labelled * ~m}
    expected = {}
    for name, true, labels in (("in", m, pseudo), ("out", ~m, pseudo.flip(0))):
        outputs = method.student(images[name])
        supervised, pasted = 0, 0
        outputs = outputs if deep_supervision else [outputs]
        for scale, (output, target) in enumerate(zip(outputs, targets, strict=True)):
            weight = (0.7, 0.3)[scale] if deep_supervision else 1.0
            # nearest voxel: of two, the second one
            small_true, small_labels = (t[:, :, scale::scale + 1, scale::scale + 1] for t in (true, labels))
            known, truth = torch.ones_like(small_true), target
            if ignore_label is not None:
                known = ~target[:, -1:] if regions else target != ignore_label
                truth = target[:, :-1] if regions else target
            supervised += weight * masked_dice_ce(output, truth, small_true & known, regions)
            pasted += weight * masked_dice_ce(output, small_labels, ~small_true, regions)
        expected.update({f"supervised_{name}": supervised, f"copy_paste_{name}": pasted})
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(terms[name].value, value, rtol=1e-5), name
        assert terms[name].weight == (1.0 if terms[name].supervised else 0.5)
        assert terms[name].supervised == name.startswith("supervised")
    weights = list(method.student.parameters())
    ours, naive = (torch.autograd.grad(sum(values), weights, allow_unused=True)
                   for values in ((term.value for term in terms.values()), expected.values()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, naive, strict=True) if a is not None)


def test_of_one_image_with_its_true_label_nothing_is_pasted(small):
    method, batch = make(small, largest_component=False, **PAPER), small.batch(dims=2)
    with torch.no_grad():
        truth = method.teacher(batch.labelled).argmax(1, keepdim=True)
        output = method.student(batch.labelled[:1])
    terms = terms_of(method, Batch(batch.labelled[:1], truth[:1], batch.labelled[:1]))
    m = drawn_mask(method, 1, batch)
    for name, mask in (("supervised_in", m), ("copy_paste_in", ~m), ("supervised_out", ~m), ("copy_paste_out", m)):
        assert torch.allclose(terms[name].value, masked_dice_ce(output, truth[:1], mask, False), rtol=1e-5)


@pytest.mark.parametrize("plain_labelled", [True, False])
def test_in_pretraining_labelled_patches_are_pasted_into_each_other_with_their_labels(small, plain_labelled):
    method = make(small, 0.1, deep_supervision=True, plain_labelled=plain_labelled)
    batch = small.batch(dims=2, deep_supervision=True)
    seen = []
    method.student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    terms = terms_of(method, batch)
    m = drawn_mask(method, 2, batch)
    image = batch.labelled * m + batch.labelled.flip(0) * ~m
    small_m = m[:, :, 1::2, 1::2]
    target = [batch.target[0] * m + batch.target[0].flip(0) * ~m,
              batch.target[1] * small_m + batch.target[1].flip(0) * ~small_m]
    assert len(seen) == 1 + plain_labelled and torch.equal(seen[-1], image)
    assert list(terms) == ["supervised", "supervised_mixed"][1 - plain_labelled:]
    assert all(term.supervised and term.weight == 1 for term in terms.values())
    loss = method.context.supervised_loss
    assert torch.allclose(terms["supervised_mixed"].value, loss(method.student(image), target))
    if plain_labelled:
        assert torch.allclose(terms["supervised"].value, loss(method.student(batch.labelled), batch.target))
    assert method.metrics["unlabelled_voxels_used"] == 0


@pytest.mark.parametrize("plain_labelled", [True, False])
def test_a_single_labelled_patch_is_pretrained_as_it_is(small, plain_labelled):
    method, batch = make(small, 0.0, plain_labelled=plain_labelled), unequal(small.batch(dims=2), 1, 1)
    expected = method.context.supervised_loss(method.student(batch.labelled), batch.target)
    (value,) = [term.value for term in terms_of(method, batch).values() if term.applies]
    assert torch.allclose(value, expected)


@pytest.mark.parametrize("deploy", ["student", "teacher"])
def test_the_teacher_begins_as_the_pretrained_student(small, deploy):
    method = make(small, deploy=deploy)
    step = TrainingStep(method, method.optimizers(1e-2, 0.0, 10), None, torch.device("cpu"), seed=0, rank=0,
                        max_skipped_steps=5)
    step.run(small.batch(dims=2), 0, 0.0)
    pretrained = [p.clone() for p in method.student.parameters()]
    assert method.teacher.updates == 0 and method.deployable() is method.student
    taught = []
    method.teacher.register_forward_hook(lambda *_: taught.extend(p.clone() for p in
                                                                  method.teacher.network.parameters()))
    step.run(small.batch(dims=2), 1, 0.12)
    assert all(torch.equal(a, b) for a, b in zip(pretrained, taught, strict=True))
    assert method.teacher.updates == 1
    assert method.deployable() is (method.student if deploy == "student" else method.teacher.network)


@pytest.mark.parametrize("regions, connected", [(False, (0, 1)), (True, (1, 1))])
def test_the_largest_component_of_the_teachers_label_is_what_teaches(small, monkeypatch, regions, connected):
    islands = torch.zeros(2, 1 + regions, 8, 8, dtype=torch.long)
    islands[..., :2, :2], islands[..., 5, 5] = 1, 1
    monkeypatch.setattr("nnunetv2_semi.methods.bcp.hard_labels", lambda *_: (islands, None))
    batch = small.batch(dims=2, regions=regions)
    for setting, classes, voxels, which in (
            (True, (), 4, "every {}"), (False, [connected], 5, "no {}"), (None, (), 5, "no {}"),
            (None, [connected], 4, f"{{}} {connected[0] + 1} (connected in every labelled training case)")):
        method = make(small, regions=regions, connected_classes=classes, largest_component=setting)
        labels = method._pseudo_labels(batch.unlabelled)
        assert labels[:, connected[0]].sum((1, 2)).tolist() == [voxels] * 2
        assert not regions or labels[:, 0].sum((1, 2)).tolist() == [4 if setting else 5] * 2
        which = which.format("region" if regions else "label")
        assert method.notes() == [f"Islands are removed from pseudo-labels of {which}."]


@pytest.mark.parametrize("largest_component, reads", [(True, 0), (False, 0), (None, 1)])
def test_labels_are_read_for_their_components_only_where_the_setting_leaves_it_open(small, largest_component, reads):
    read: list[bool] = []
    context = replace(small.context(), connected_classes=lambda: read.append(True) or frozenset())
    BCP(small.network(2, 3, 2), BCPSettings(largest_component=largest_component), context)
    assert len(read) == reads


@pytest.mark.parametrize("settings, expected", [({}, 0.999), ({"num_epochs": 20}, 0.99), ({"ema_decay": 0.9}, 0.9)])
def test_the_teachers_memory_follows_the_length_of_training(small, settings, expected):
    assert make(small, **settings).teacher.decay == pytest.approx(expected)


@pytest.mark.parametrize("name, value", [("pretrain_fraction", 1.0), ("box", 1.2), ("pseudo_weight", -0.5),
                                         ("ema_decay", 1.1)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=name):
        BCPSettings(**{name: value})


def test_patches_of_cases_with_other_channels_stay_whole(small):
    method, batch = make(small), small.batch(dims=2)
    batch.unlabelled[0, 1] = -0.0  # the fill of an absent channel
    seen = []
    method.student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    terms = terms_of(method, batch)
    plain, x_in, x_out = seen
    assert torch.equal(x_in[0], batch.labelled[0]) and not torch.equal(x_in[1], batch.labelled[1])
    assert torch.equal(x_out[1], batch.unlabelled[0]) and not torch.equal(x_out[0], batch.unlabelled[1])
    assert all(torch.isfinite(term.value) for term in terms.values())
