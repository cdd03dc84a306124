"""Fusion's loss terms against a second form, its threshold, and its weights."""

import math
from functools import partial

import pytest
import torch

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.losses.inter_modal import inter_modal_loss
from nnunetv2_semi.methods.fusion import Fusion, FusionSettings
from nnunetv2_semi.networks.fused_network import FusedNetwork
from nnunetv2_semi.schedules import rising_threshold


def make(small, dims=2, regions=False, deep_supervision=False, ignore_label=None, progress=1.0, channels=2,
         trained=True, **settings):
    torch.manual_seed(1)
    context = small.context(channels, regions, ignore_label, deep_supervision=deep_supervision)
    networks = {name: small.network(1, 3, dims, deep_supervision) for name in context.modalities}
    settings = FusionSettings(**{"threshold": 0.1, "threshold_warmup": None, "num_epochs": 100, **settings})
    student = FusedNetwork(networks, context.modalities, [2], 2, settings.dropout)
    method = Fusion(student, settings, context)
    if trained:  # so that students and teachers differ, and modalities do
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    method.progress = progress
    method.train()
    return method


def terms_of(method, batch, seed=3):
    torch.manual_seed(seed)
    return {term.name: term for group in method.loss(batch) for term in group}


KINDS = [{}, {"regions": True}, {"deep_supervision": True}, {"ignore_label": 2}, {"dims": 3}, {"channels": 3}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_all_terms_equal_a_second_form(small, naive_weighted_dice_ce, kind):
    threshold = 0.7 if kind.get("regions") else 0.5
    method = make(small, dropout=0.0, uncertainty_passes=2, threshold=threshold, **kind)
    regions, channels = kind.get("regions", False), kind.get("channels", 2)
    batch = small.batch(channels, dims=kind.get("dims", 2), regions=regions, ignore_label=kind.get("ignore_label"),
                        deep_supervision=kind.get("deep_supervision", False))
    inputs = []
    method.student.core.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    mixings = []
    import nnunetv2_semi.methods.fusion as module
    original, module.perturbed = module.perturbed, lambda *a: mixings.append(original(*a)) or mixings[-1]
    try:
        terms = terms_of(method, batch)
    finally:
        module.perturbed = original
    (image, mixing), decide = mixings[0], partial(torch.sigmoid if regions else torch.softmax, **{} if regions else
                                                  {"dim": 1})
    assert torch.equal(inputs[1], image)

    # the teacher: without dropout every pass is the same
    core = method.teacher_core
    with torch.no_grad():
        output, each = core(batch.unlabelled, each=True)
    mean = decide(output[0] if isinstance(output, list) else output)
    labels = (mean > 0.5).long() if regions else mean.argmax(1, keepdim=True)
    sure = torch.maximum(mean, 1 - mean) if regions else mean.amax(1, keepdim=True)
    entropy = -(mean * mean.log() + (1 - mean) * (1 - mean).log()) if regions else \
        -(mean * mean.log()).sum(1, keepdim=True)
    own = [decide(logits) for logits in each]
    decisions = [p > 0.5 if regions else p.argmax(1, keepdim=True) for p in own]
    differ = torch.zeros_like(decisions[0], dtype=torch.bool)
    for first in decisions:
        differ = differ | (first != decisions[0])
    assert 0 < differ.float().mean() < 1
    assert 0 < (sure > threshold).float().mean() < 1
    weight = torch.exp(-entropy) * (sure > threshold) * torch.where(differ, 0.3, 1.0)

    output, each = method.student.core(image, each=True)
    outputs = output if isinstance(output, list) else [output]
    student, own = decide(outputs[0]), [decide(logits) for logits in each]
    labelled, labelled_each = method.student.core(batch.labelled, each=True)
    target = batch.target[0] if isinstance(batch.target, list) else batch.target
    ignore = kind.get("ignore_label")
    known = torch.ones_like(target[:, :1], dtype=torch.bool) if ignore is None else target != ignore
    pairs = [(a, b) for a in range(channels) for b in range(a + 1, channels)]

    def overlap(p, q):
        first = 0 if regions else 1
        values = [(2 * (p[b, k] * q[b, k]).sum() + 1e-5) / (p[b, k].sum() + q[b, k].sum() + 1e-5)
                  for b in range(len(p)) for k in range(first, p.shape[1])]
        return 1 - sum(values) / len(values)

    expected = {
        "supervised": method.context.supervised_loss(labelled, batch.target),
        **{f"supervised_m{m}": naive_weighted_dice_ce([logits], target * known, known, regions)
           for m, logits in enumerate(labelled_each)},
        "inter": sum(overlap(own[a], own[b]) for a, b in pairs) / len(pairs),
        "intra": ((student - mixing.of(mean)) ** 2).mean(),
        "pseudo_label": naive_weighted_dice_ce(outputs, mixing.of(labels), mixing.of(weight), regions,
                                               method.context.scale_weights),
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert torch.allclose(terms[name].value, value, rtol=1e-3, atol=1e-5), name
    shares = {name: number + 1.0 for number, name in enumerate(expected)}
    assert small.same_gradients(sum(shares[name] * terms[name].value for name in shares),
                                sum(shares[name] * expected[name] for name in shares), method.student, 1e-4)
    assert [terms[name].weight for name in ("supervised_m0", "inter", "intra", "pseudo_label")] == [0.5, 0.1, 10.0, 1.0]


@pytest.mark.parametrize("regions", [False, True])
def test_inter_modal_loss_is_0_for_equal_hard_predictions_and_1_for_disjoint_ones(regions):
    hard = torch.zeros(1, 3, 4)
    hard[0, [0, 1, 2, 1], [0, 1, 2, 3]] = 1
    assert float(inter_modal_loss(hard, hard, regions)) == pytest.approx(0, abs=1e-5)
    moved = hard.roll(1, 1)
    assert float(inter_modal_loss(hard, moved, regions)) == pytest.approx(1, abs=1e-4)
    assert float(inter_modal_loss(hard, moved, regions)) == pytest.approx(float(inter_modal_loss(moved, hard, regions)))


@pytest.mark.parametrize("progress, expected", [(0.0, 0.7), (0.1, 0.85), (0.18, 0.97), (0.2, 0.97), (0.9, 0.97)])
def test_threshold_rises_by_nine_tenths_of_what_is_left(small, progress, expected):
    assert rising_threshold(progress, 0.7, 0.2) == pytest.approx(expected)
    method = make(small, progress=progress, threshold=0.7, threshold_warmup=0.2)
    assert method.current_threshold() == pytest.approx(expected)
    in_epochs = make(small, progress=progress, threshold=0.7, threshold_warmup=None, threshold_warmup_epochs=20)
    assert in_epochs.current_threshold() == pytest.approx(expected)
    assert make(small, progress=progress, threshold=0.7, threshold_warmup=None).current_threshold() == 0.7


def test_disagreement_of_the_modalities_multiplies_the_weight(small):
    method, batch = make(small, dropout=0.0), small.batch(dims=2)
    checked = method.pseudo_labels(batch.unlabelled)
    unchecked = make(small, dropout=0.0, disagreement_factor=1.0).pseudo_labels(batch.unlabelled)
    assert 0 < checked.disagree.float().mean() < 1
    assert torch.allclose(checked.weight, torch.where(checked.disagree, 0.3, 1.0) * unchecked.weight)


def test_passes_with_dropout_weigh_by_the_entropy_of_their_mean(small):
    """A constructed case: the head is replaced by one that says something else in every pass."""
    method, batch = make(small, uncertainty_passes=4, disagreement_factor=1.0), small.batch(dims=2)
    said = [torch.tensor([10.0, 0.0, 0.0]), torch.tensor([0.0, 10.0, 0.0])] * 2

    class Head(torch.nn.Module):
        calls = 0

        def forward(self, features):
            logits = torch.zeros(2, 3, 8, 8)
            logits[:, :, :, :4] = said[self.calls].view(1, 3, 1, 1)
            logits[:, 2, :, 4:] = 10.0
            Head.calls += 1
            return logits
    method.teacher.network.core.head = Head()
    found = method.pseudo_labels(batch.unlabelled)
    assert Head.calls == 4
    assert torch.allclose(found.uncertainty[..., :4], torch.tensor(math.log(2)), atol=2e-3)
    assert torch.allclose(found.uncertainty[..., 4:], torch.tensor(0.0), atol=2e-3)
    assert torch.allclose(found.weight[..., :4], torch.tensor(0.5), atol=2e-3)
    assert torch.allclose(found.weight[..., 4:], torch.tensor(1.0), atol=2e-3)


def test_dropout_drops_in_the_teachers_passes_and_nowhere_else_in_it(small):
    method, batch = make(small, dropout=0.5, uncertainty_passes=1), small.batch(dims=2)
    first, second = (method.pseudo_labels(batch.unlabelled).probability for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(method.teacher(batch.unlabelled), method.teacher(batch.unlabelled))
    certain = make(small, dropout=0.5, uncertainty_passes=0).pseudo_labels(batch.unlabelled)
    assert float(certain.uncertainty.abs().max()) == 0


def test_a_case_that_lacks_a_modality_teaches_what_it_has(small):
    method, batch = make(small, dropout=0.0), small.batch(dims=2)
    batch.unlabelled[1, 1] = -0.0
    batch.labelled[0, 0] = -0.0
    present = torch.tensor([[True, True], [True, False]])
    batch = type(batch)(batch.labelled, batch.target, batch.unlabelled, torch.tensor([[False, True], [True, True]]),
                        present)
    terms = terms_of(method, batch)
    assert all(torch.isfinite(term.value) for term in terms.values())
    assert not method.pseudo_labels(batch.unlabelled).disagree[1].any()
    logits = method.student.core(batch.labelled, each=True)[1][0]
    assert torch.allclose(terms["supervised_m0"].value,
                          method.context.supervised_loss(logits[1:], batch.target[1:])), "of patches that have it alone"
    assert {name: term.patches for name, term in terms.items() if term.patches} == {
        "supervised_m0": 1, "supervised_m1": 2, "inter": 1}


def test_no_patch_has_two_modalities(small):
    method, batch = make(small), small.batch(dims=2)
    batch.unlabelled[:, 1] = -0.0
    batch = type(batch)(batch.labelled, batch.target, batch.unlabelled, None, torch.tensor([[True, False]] * 2))
    terms = terms_of(method, batch)
    assert not terms["inter"].applies and terms["pseudo_label"].applies
    assert all(torch.isfinite(term.value) for term in terms.values())


@pytest.mark.parametrize("settings, without", [
    ({"inter_weight": 0.0}, {"inter"}), ({"intra_weight": 0.0}, {"intra"}), ({"pseudo_weight": 0.0}, {"pseudo_label"}),
    ({"modality_weight": 0.0}, {"supervised_m0", "supervised_m1"}),
])
def test_each_term_can_be_switched_off(small, settings, without):
    whole, fewer = (set(terms_of(make(small, **own), small.batch(dims=2))) for own in ({}, settings))
    assert whole - fewer == without


def test_what_is_logged_and_shown(small):
    method, batch = make(small), small.batch(dims=2)
    terms_of(method, batch)
    assert {"threshold", "unlabelled_voxels_used", "modalities_disagree", "uncertainty",
            "teacher_student_agreement"} <= set(method.metrics)
    predictions, maps = method.eval().picture(batch.unlabelled[:1])
    assert set(predictions) == {"prediction", "m0", "m1"}
    assert all(single.shape == (1, 8, 8) for single in maps.values())
    assert list(maps) == ["certainty", "agreement", "pseudo-label counts"]


def test_a_check_by_decoders_that_do_not_train_is_warned_of(small):
    idle = {"modality_weight": 0.0, "inter_weight": 0.0}
    assert "do not train" in Fusion.check(small.context(), FusionSettings(**idle))[0]
    assert Fusion.check(small.context(), FusionSettings(**idle, disagreement_factor=1.0)) == []


def test_what_a_step_calls_is_what_is_compiled(small):
    method, batch = make(small), small.batch(dims=2)
    called = []
    for network in method.called_networks():
        network.register_forward_hook(lambda module, *_: called.append(module))
    terms_of(method, batch)
    assert all(network in called for network in method.called_networks())


def test_one_modality_is_refused(small):
    with pytest.raises(UserError, match="two or more modalities"):
        Fusion.check(small.context(1), FusionSettings())
