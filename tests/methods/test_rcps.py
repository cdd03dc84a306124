
import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import nn

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.losses.predictions import full_resolution
from nnunetv2_semi.losses.rectified_pseudo_supervision import (
    PseudoTarget,
    cosine_consistency,
    rectified_pseudo_supervision,
)
from nnunetv2_semi.methods import arrangement
from nnunetv2_semi.methods.mixing import CutMix
from nnunetv2_semi.methods.rcps import RCPS, RCPSSettings
from nnunetv2_semi.training.step import TrainingStep

PAPER = {"cutmix": 0.0, "pseudo_weight": 0.1, "ramp_fraction": 1.0}


def make(small, settings=None, network=None, images_per_pass=1, **kinds):
    torch.manual_seed(1)
    channels, deep = kinds.get("channels", 2), kinds.get("deep_supervision", False)
    student = network or small.network(channels, 3, kinds.get("dims", 3), deep)
    context = small.context(channels, kinds.get("regions", False), kinds.get("ignore_label"),
                            kinds.get("one_pass", False), deep, images_per_pass=images_per_pass)
    method = RCPS(student, settings or RCPSSettings(num_negatives=20), context)
    method.progress = 0.7
    return method


def run(method, batch, steps=1):
    step = TrainingStep(method, method.optimizers(1e-2, 0.0, 10), None, torch.device("cpu"), seed=0, rank=0,
                        max_skipped_steps=5)
    for number in range(steps):
        terms, values = step.run(batch, number, 0.7)
    return {term.name: term for term in terms}, values


@pytest.mark.parametrize("kinds", [{}, {"dims": 2}, {"regions": True}, {"ignore_label": 3}, {"deep_supervision": True},
                                   {"regions": True, "ignore_label": 3, "deep_supervision": True},
                                   {"channels": 1}, {"channels": 4}, {"count": 1}])
def test_every_kind_of_data_set_trains(small, kinds):
    count = kinds.pop("count", 2)
    method = make(small, **kinds)
    before = {name: p.clone() for name, p in method.named_parameters()}
    terms, values = run(method, small.batch(count=count, **kinds))
    assert all(torch.isfinite(term.value) for term in terms.values()) and values["skipped_steps"] == 0
    assert terms["contrast"].value > 0 and terms["pseudo_supervision"].value > 0
    changed = {name for name, p in method.named_parameters() if not torch.equal(before[name], p)}
    # without deep supervision the coarse outputs are not used
    expected = {name for name in before if name.endswith("weight") and "seg_layers.0" not in name}
    assert expected <= changed


@pytest.mark.parametrize("arrangement", [{"one_pass": True}, {"images_per_pass": 4}, {"images_per_pass": 1}])
@pytest.mark.parametrize("deep_supervision", [True, False])
def test_all_arrangements_do_the_same_step(small, arrangement, deep_supervision):
    ours, reference = (make(small, deep_supervision=deep_supervision, **kinds) for kinds in (arrangement, {}))
    for method in (ours, reference):
        run(method, small.batch(deep_supervision=deep_supervision), 2)
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("joins", [True, False])
def test_one_pass_calls_the_network_once_and_others_as_often_as_the_plan_asks(small, monkeypatch, joins):
    monkeypatch.setattr(arrangement, "joins_batches", lambda device: joins)
    for kinds, calls in [({"one_pass": True}, 1), ({"images_per_pass": 3}, 2), ({"images_per_pass": 4}, 2), ({}, 6)]:
        method, count = make(small, **kinds), []
        method.student.register_forward_hook(lambda *_, count=count: count.append(1))
        list(method.loss(small.batch()))
        assert len(count) == (calls if joins else 6)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("kinds", [{"one_pass": True}, {"images_per_pass": 2}, {}])
def test_joined_batches_and_passes_side_by_side_give_the_same(small, monkeypatch, kinds, together):
    gradients = []
    for joins in (True, False):
        monkeypatch.setattr(arrangement, "joins_batches", lambda device, joins=joins: joins)
        method, batch = make(small, **kinds), small.batch()
        outputs = list(method.passes(method.student, batch.labelled, batch.unlabelled, together=together))
        gradients.append(torch.autograd.grad(sum(full_resolution(output).square().sum() for output in outputs),
                                             list(method.student.parameters()), allow_unused=True,
                                             materialize_grads=True))
    assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in zip(*gradients, strict=True))


def test_pseudo_supervision_is_the_papers_sum_over_views_streams_and_outputs(small):
    method = make(small, RCPSSettings(contrast=False, **PAPER), deep_supervision=True)
    batch = small.batch(deep_supervision=True)
    torch.manual_seed(3)
    labelled, unlabelled = method._outputs(batch)
    expected = 0.0
    for versions in (labelled, unlabelled):
        for scale, weight in enumerate((0.7, 0.3)):
            target = PseudoTarget.from_logits(versions.original[scale], 0.5)
            first, second = (view[scale] for view in versions.views)
            expected += weight * (rectified_pseudo_supervision(first, target) + cosine_consistency(first, second)
                                  + rectified_pseudo_supervision(second, target))
    torch.manual_seed(3)
    terms = {term.name: term for group in method.loss(batch) for term in group}
    assert torch.allclose(terms["pseudo_supervision"].value, expected)
    assert terms["pseudo_supervision"].weight == pytest.approx(0.1 * torch.exp(torch.tensor(-5 * 0.3**2)).item())
    assert not torch.equal(full_resolution(labelled.views[0]), full_resolution(labelled.views[1]))


@pytest.mark.parametrize("regions", [False, True])
def test_by_default_views_of_mixed_patches_learn_from_mixed_predictions_in_value_and_gradient(small, regions):
    kinds = {"deep_supervision": True, "regions": regions}
    method, batch = make(small, RCPSSettings(contrast=False), dims=2, **kinds), small.batch(dims=2, **kinds)
    torch.manual_seed(3)
    terms = {term.name: term for group in method.loss(batch) for term in group}
    torch.manual_seed(3)
    inside = CutMix.draw(batch.unlabelled, 0.5).inside
    assert inside.flatten(1).sum(1).tolist() == [16, 16]
    boxes = [inside, inside[:, :, 1::2, 1::2]]  # nearest voxel: of two, the second one
    views = [method._views(2, batch.labelled), method._views(2, small.mixed(inside, batch.unlabelled))]
    with torch.no_grad():
        originals = [method.student(batch.labelled), method.student(batch.unlabelled)]
    originals[1] = [small.mixed(box, output) for box, output in zip(boxes, originals[1], strict=True)]

    def two_classes(z):
        return torch.stack([torch.zeros_like(z), z], 2).flatten(0, 1).movedim(1, -1).flatten(0, -2) if regions \
            else z.movedim(1, -1).flatten(0, -2)
    expected = 0.0
    for stream in range(2):
        outputs = [method.student(view) for view in views[stream]]
        for scale, weight in enumerate((0.7, 0.3)):
            t, seen = two_classes(originals[stream][scale]), [two_classes(output[scale]) for output in outputs]
            for v in seen:
                entropy = -((t / 0.5).softmax(1) * v.log_softmax(1)).sum(1)
                difference = (t.softmax(1) * (t.log_softmax(1) - v.log_softmax(1))).sum(1)
                expected = expected + weight * ((-difference).exp() * entropy + difference).mean()
            first, second = (v.softmax(1) if regions else v for v in seen)
            expected = expected + weight * (1 - torch.cosine_similarity(first, second, 1)).mean()
    assert torch.allclose(terms["pseudo_supervision"].value, expected, rtol=1e-4)
    assert small.same_gradients(terms["pseudo_supervision"].value, expected, method.student)
    assert terms["pseudo_supervision"].weight == pytest.approx(0.5)


def test_of_mixed_patches_candidates_for_the_contrast_are_mixed_too(small):
    method, batch = make(small), small.batch(size=16)
    torch.manual_seed(3)
    _, unlabelled = method._outputs(batch)
    torch.manual_seed(3)
    inside = CutMix.draw(batch.unlabelled, 0.5).inside
    logits, features = method.projected(batch.unlabelled)
    step = 16 // features.shape[2]
    box = inside[:, :, step // 2::step, step // 2::step, step // 2::step]
    assert step > 1 and torch.allclose(unlabelled.features[0], small.mixed(box, features), atol=1e-6)
    assert torch.allclose(unlabelled.probability, small.mixed(inside, logits.softmax(1)), atol=1e-6)


def test_negatives_come_from_the_other_stream(small, monkeypatch):
    seen = []

    def contrast(view_1, view_2, classes, negatives, *_):
        seen.append((len(classes), negatives.features))
        return view_1.sum() * 0
    monkeypatch.setattr("nnunetv2_semi.methods.rcps.voxel_contrast", contrast)
    method = make(small)
    labelled, unlabelled = method._outputs(small.batch())
    method._contrast(labelled, unlabelled)
    own = [method._voxels(versions).features for versions in (unlabelled, labelled)]
    assert all(torch.equal(features, expected) for (_, features), expected in zip(seen, own, strict=True))


def test_without_unlabelled_weight_it_is_the_control(small):
    from nnunetv2_semi.methods.supervised import Supervised
    method = make(small, RCPSSettings(unlabelled_weight=0.0))
    torch.manual_seed(1)
    control = Supervised(small.network(2, 3), Supervised.Settings(), small.context())
    for m in (method, control):
        run(m, small.batch(), 3)
    for a, b in zip(method.student.parameters(), control.student.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("change", [
    {"rectify": False}, {"consistency": False}, {"bidirectional": False}, {"negatives": "random"}, {"max_anchors": 2},
    {"contrast": False}, {"view_shift_by": "mean"}, {"cutmix": 0.0}])
def test_each_ablation_changes_the_step(small, change):
    settings = RCPSSettings(num_negatives=5)
    networks = []
    for chosen in (settings, settings.model_copy(update=change)):
        method = make(small, chosen)
        terms, _ = run(method, small.batch(size=16))
        networks.append(method.student)
        assert all(torch.isfinite(term.value) for term in terms.values())
        assert ("contrast" in terms) == chosen.contrast
    assert any(not torch.equal(a, b) for a, b in zip(*(n.parameters() for n in networks), strict=True))


def test_only_the_students_weights_are_deployed(small):
    method = make(small)
    assert method.deployable() is method.student
    assert method.student.state_dict().keys() == small.network(2, 3).state_dict().keys()
    assert sum(p.numel() for p in method.parameters()) > sum(p.numel() for p in method.student.parameters())


def test_the_buffer_is_filled_by_steps_and_carried_by_a_checkpoint(small):
    settings = RCPSSettings(num_negatives=4, buffer_steps=2)
    method, other = make(small, settings), make(small, settings)
    run(method, small.batch(size=16), 3)
    assert all(0 < len(bank) <= 2 * 3 * 4 for bank in method.banks)
    other.load_state_dict(method.state_dict())
    batch = small.batch(size=16, seed=5)

    def contrast(of):
        torch.manual_seed(7)
        return next(iter(of.loss(batch)))[-1].value
    with_buffer = contrast(method)
    assert torch.equal(with_buffer, contrast(other))
    for bank in method.banks:
        bank.set_extra_state([])
    assert not torch.equal(with_buffer, contrast(method))


def test_without_contrast_the_buffer_stays_empty(small):
    method = make(small, RCPSSettings(contrast=False, buffer_steps=2))
    run(method, small.batch(size=16), 2)
    assert [len(bank) for bank in method.banks] == [0] * len(method.banks)


def test_residual_encoder(small):
    unet = ResidualEncoderUNet(2, 3, [4, 8, 8], nn.Conv3d, 3, [1, 2, 2], [1, 1, 1], 3, [1, 1], True, nn.InstanceNorm3d,
                               {"affine": True}, nonlin=nn.LeakyReLU, deep_supervision=False)
    terms, _ = run(make(small, network=unet), small.batch())
    assert terms["contrast"].value > 0


@pytest.mark.parametrize("kinds", [{"one_pass": True}, {"images_per_pass": 2}])
def test_compiled_networks_do_the_same_step(small, kinds):
    plain, compiled = make(small, deep_supervision=True, **kinds), make(small, deep_supervision=True, **kinds)
    for network in compiled.called_networks():
        network.compile(backend="aot_eager")
    for method in (plain, compiled):
        run(method, small.batch(deep_supervision=True), 2)
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    for method in (plain, compiled):
        method.eval()
    image = torch.randn(1, 2, 8, 8, 8)
    assert torch.allclose(plain.student(image)[0], compiled.student(image)[0], atol=1e-4)


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match="num_negatives"):
        RCPSSettings(num_negatives=0)
    with pytest.raises(UserError, match="max_anchors"):
        RCPSSettings(max_anchors=0)
    with pytest.raises(UserError, match="cutmix"):
        RCPSSettings(cutmix=1.5)


@pytest.mark.parametrize("regions", [False, True])
def test_mixed_precision_stays_close_to_single_precision(small, regions):
    values = []
    for enabled in (False, True):
        method = make(small, regions=regions, deep_supervision=True)
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            terms = next(iter(method.loss(small.batch(regions=regions, deep_supervision=True))))
        sum(term.value for term in terms).backward()
        assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)
        values.append({term.name: term.value.item() for term in terms})
    for name, value in values[0].items():
        assert values[1][name] == pytest.approx(value, rel=0.1, abs=0.05), name
