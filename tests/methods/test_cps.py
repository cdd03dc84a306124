import math
from copy import deepcopy

import pytest
import torch

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods import arrangement
from nnunetv2_semi.methods.cps import CPS, CPSSettings
from nnunetv2_semi.methods.mixing import CutMix
from nnunetv2_semi.methods.perturbation import intensity_view
from nnunetv2_semi.methods.supervised import Supervised
from nnunetv2_semi.training.step import TrainingStep

PAPER = CPSSettings(perturb=False, labelled_too=True, cps_loss="ce", cps_weight=1.5, ramp_fraction=0.0)


def make(small, cls=CPS, settings=None, one_pass=False, regions=False, deep_supervision=False):
    torch.manual_seed(1)
    method = cls(small.network(2, 3, 2, deep_supervision), settings or cls.Settings(),
                 small.context(regions=regions, one_pass=one_pass, deep_supervision=deep_supervision))
    method.progress = 1.0
    return method


def terms_of(method, batch):
    return {term.name: term for group in method.loss(batch) for term in group}


def test_networks_begin_differently_and_the_first_one_like_the_control(small):
    method, control = make(small), make(small, Supervised)
    pairs = list(zip(method.student.parameters(), method.second.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in pairs if a.ndim > 1)
    assert all(torch.equal(a, b) for a, b in
               zip(method.student.parameters(), control.student.parameters(), strict=True))


@pytest.mark.parametrize("regions", [False, True])
def test_terms_are_the_papers_in_value_and_gradient(small, regions):
    method, batch = make(small, settings=PAPER, regions=regions), small.batch(dims=2, regions=regions)
    terms = terms_of(method, batch)
    expected = {}
    for stream in ("labelled", "unlabelled"):
        z = [network(getattr(batch, stream)) for network in (method.student, method.second)]
        for name, own, other in (("first", *z), ("second", *reversed(z))):
            losses = []
            for b in range(2):
                for p, q in zip(own[b].flatten(1).T, other[b].detach().flatten(1).T, strict=True):
                    if regions:
                        p = p.sigmoid()
                        losses += [-torch.log(p[k] if q[k] > 0 else 1 - p[k]) for k in range(3)]
                    else:
                        losses.append(-torch.log(p.softmax(0)[q.argmax()]))
            expected[f"cps_{stream}_{name}"] = torch.stack(losses).mean()
            if stream == "labelled":
                expected[f"supervised_{name}"] = method.context.supervised_loss(own, batch.target)
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(terms[name].value, value, rtol=1e-4), name
        assert terms[name].weight == (1.0 if terms[name].supervised else 1.5)
    total, total_expected = (sum(v.values()) for v in ({n: t.value for n, t in terms.items()}, expected))
    weights = [p for p in method.parameters() if p.requires_grad]
    ours, naive = (torch.autograd.grad(t, weights, allow_unused=True) for t in (total, total_expected))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, naive, strict=True) if a is not None)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_by_default_it_is_nnunets_loss_of_mixed_unlabelled_patches_in_value_and_gradient(
        small, naive_weighted_dice_ce, regions, deep_supervision):
    kinds = {"regions": regions, "deep_supervision": deep_supervision}
    method, batch = make(small, **kinds), small.batch(dims=2, **kinds)
    torch.manual_seed(3)
    terms = terms_of(method, batch)
    torch.manual_seed(3)
    inside = CutMix.draw(batch.unlabelled, 0.5).inside
    view = intensity_view(small.mixed(inside, batch.unlabelled), method.settings, ())
    expected = {}
    networks = {"first": method.student, "second": method.second}
    for name, network in networks.items():
        expected[f"supervised_{name}"] = method.context.supervised_loss(network(batch.labelled), batch.target)
        with torch.no_grad():
            decided = networks["second" if name == "first" else "first"](batch.unlabelled)
        decided = decided[0] if deep_supervision else decided
        labels = small.mixed(inside, (decided > 0).long() if regions else decided.argmax(1, keepdim=True))
        output = network(view)
        expected[f"cps_unlabelled_{name}"] = naive_weighted_dice_ce(
            output if deep_supervision else [output], labels, torch.ones_like(labels), regions,
            method.context.scale_weights)
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(terms[name].value, value, rtol=1e-4), name
        assert terms[name].weight == 1.0
    for name, network in networks.items():
        assert small.same_gradients(terms[f"cps_unlabelled_{name}"].value, expected[f"cps_unlabelled_{name}"], network)


def test_the_weight_ramps_up_over_a_fifth_of_training(small):
    method = make(small)
    method.progress = 0.1
    terms = terms_of(method, small.batch(dims=2))
    assert terms["cps_unlabelled_first"].weight == pytest.approx(math.exp(-5 * 0.25))


def test_no_gradient_goes_through_pseudo_labels(small):
    method = make(small, one_pass=True)
    terms = terms_of(method, small.batch(dims=2))
    for own, other in (("first", method.second), ("second", method.student)):
        gradients = torch.autograd.grad(terms[f"cps_unlabelled_{own}"].value, list(other.parameters()),
                                        allow_unused=True, retain_graph=True)
        assert all(g is None for g in gradients)


def test_twins_teach_each_other_what_they_decide_themselves(small):
    method, batch = make(small, settings=PAPER), small.batch(dims=2)
    method.second = deepcopy(method.student)
    terms = terms_of(method, batch)
    own = -method.student(batch.unlabelled).softmax(1).amax(1).log().mean()
    assert torch.allclose(terms["cps_unlabelled_first"].value, own)
    assert torch.allclose(terms["cps_unlabelled_second"].value, own)
    assert method.metrics["teacher_student_agreement"] == 1


@pytest.mark.parametrize("labelled_too, one_pass, passes", [
    (False, False, [False, True, True]), (False, True, [False, True]),
    (True, False, [False, False, True, True]), (True, True, [False, False, True])])
def test_passes_with_and_without_a_graph(small, monkeypatch, labelled_too, one_pass, passes):
    monkeypatch.setattr(arrangement, "joins_batches", lambda device: True)
    method = make(small, settings=CPSSettings(labelled_too=labelled_too), one_pass=one_pass)
    seen = {"first": [], "second": []}
    for name, network in (("first", method.student), ("second", method.second)):
        network.register_forward_hook(lambda *_, n=name: seen[n].append(torch.is_grad_enabled()))
    terms_of(method, small.batch(dims=2))
    assert seen == {"first": passes, "second": passes}


def test_without_unlabelled_weight_the_first_network_is_the_control(small):
    method, control = make(small, settings=CPSSettings(unlabelled_weight=0.0)), make(small, Supervised)
    for m in (method, control):
        step = TrainingStep(m, m.optimizers(1e-3, 0.0, 10), None, torch.device("cpu"), seed=0, rank=0,
                            max_skipped_steps=5)
        for number in range(2):
            step.run(small.batch(dims=2, seed=number), number, 0.5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in
               zip(method.student.parameters(), control.student.parameters(), strict=True))


def test_the_first_network_is_deployed_and_the_second_one_validated_too(small):
    method = make(small)
    assert method.deployable() is method.student and method.parts() == {"second": method.second}


@pytest.mark.parametrize("name, value", [("cps_weight", -1.0), ("ramp_fraction", -0.1), ("cutmix", 1.5)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=name):
        CPSSettings(**{name: value})
