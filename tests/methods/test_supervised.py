import pytest
import torch

from nnunetv2_semi.data.boxes import Boxes
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods.bcp import BCPSettings
from nnunetv2_semi.methods.contract import Batch
from nnunetv2_semi.methods.cps import CPSSettings
from nnunetv2_semi.methods.fixmatch import FixMatchSettings
from nnunetv2_semi.methods.mean_teacher import MeanTeacherSettings
from nnunetv2_semi.methods.mix import MixSettings
from nnunetv2_semi.methods.rcps import RCPSSettings
from nnunetv2_semi.methods.semi_cml_settings import SemiCMLSettings
from nnunetv2_semi.methods.supervised import Supervised, SupervisedSettings
from nnunetv2_semi.present_channels import FILL
from nnunetv2_semi.training.step import TrainingStep

KINDS = [{"dims": 2}, {}, {"dims": 2, "regions": True}, {"dims": 2, "ignore_label": 3, "deep_supervision": True},
         {"regions": True, "ignore_label": 3, "deep_supervision": True, "channels": 4}]


def make(small, one_pass=False, channels=2, dims=3, regions=False, ignore_label=None, deep_supervision=False,
         **settings):
    torch.manual_seed(1)
    return Supervised(small.network(channels, 3, dims, deep_supervision), SupervisedSettings(**settings),
                      small.context(channels, regions, ignore_label, one_pass, deep_supervision))


def terms_of(method, batch):
    torch.manual_seed(3)
    return {term.name: term for group in method.loss(batch) for term in group}


@pytest.mark.parametrize("kinds", KINDS)
def test_by_default_it_is_nnunets_loss_alone(small, kinds):
    method, batch = make(small, **kinds), small.batch(**kinds)
    terms = terms_of(method, batch)
    assert list(terms) == ["supervised"] and Supervised.graphs(method.settings) == 1
    expected = method.context.supervised_loss(method.student(batch.labelled), batch.target)
    assert torch.equal(terms["supervised"].value, expected)


@pytest.mark.parametrize("kinds", KINDS)
def test_labelled_patches_and_their_targets_are_pasted_into_each_other(small, kinds):
    method, batch = make(small, labelled_mixing=0.5, labelled_box=0.75, **kinds), small.batch(count=3, **kinds)
    terms = terms_of(method, batch)
    torch.manual_seed(3)
    axes = batch.labelled.shape[2:]
    inside = Boxes.draw(3, axes, 0.75).inside(torch.device("cpu"))
    assert inside.flatten(1).sum(1).tolist() == [6 ** len(axes)] * 3
    half = (slice(None), slice(None), *[slice(1, None, 2)] * len(axes))  # nearest voxel: of two, the second one
    targets = [small.mixed(inside, batch.target)] if isinstance(batch.target, torch.Tensor) else \
        [small.mixed(box, target) for box, target in zip((inside, inside[half]), batch.target, strict=True)]
    loss = method.context.supervised_loss
    mixed = loss(method.student(small.mixed(inside, batch.labelled)), targets if len(targets) > 1 else targets[0])
    expected = {"supervised": loss(method.student(batch.labelled), batch.target), "labelled_mixing": mixed}
    assert terms.keys() == expected.keys() and Supervised.graphs(method.settings) == 2
    for name, weight in (("supervised", 1.0), ("labelled_mixing", 0.5)):
        assert torch.allclose(terms[name].value, expected[name], rtol=1e-5)
        assert terms[name].weight == weight and terms[name].supervised
        assert small.same_gradients(terms[name].value, expected[name], method.student)


def test_a_single_patch_counts_once_and_patches_with_other_channels_stay_as_they_are(small):
    method, batch = make(small, dims=2, labelled_mixing=1.0), small.batch(dims=2)
    batch.labelled[1, 0] = FILL
    for count in (1, 2):
        terms = terms_of(method, Batch(batch.labelled[:count], batch.target[:count], batch.unlabelled))
        assert terms["labelled_mixing"].applies == (count == 2)
    assert torch.equal(terms["supervised"].value, terms["labelled_mixing"].value)


@pytest.mark.parametrize("settings, labelled, unlabelled, named", [
    (SupervisedSettings(labelled_mixing=1.0), 1, 1, ["labelled_mixing"]),
    (SupervisedSettings(labelled_mixing=1.0), 2, 1, []), (SupervisedSettings(), 1, 1, []),
    (FixMatchSettings(), 1, 1, ["cutmix"]), (FixMatchSettings(), 1, 2, []), (FixMatchSettings(cutmix=0.0), 1, 1, []),
    (MixSettings(), 1, 1, ["cutmix", "labelled_mixing"]), (MixSettings(partner="labelled"), 2, 1, []),
    (MixSettings(partner="both"), 2, 1, ["cutmix"]), (MixSettings(unlabelled_weight=0.0), 2, 1, []),
    (MeanTeacherSettings(), 1, 1, ["cutmix"]), (MeanTeacherSettings(perturbation="noise"), 1, 1, []),
    (CPSSettings(), 1, 1, ["cutmix"]), (CPSSettings(perturb=False), 1, 1, []), (RCPSSettings(), 1, 1, ["cutmix"]),
    (BCPSettings(), 1, 1, ["pretrain_fraction"]), (BCPSettings(), 2, 1, []),
    (BCPSettings(pretrain_fraction=0.0), 1, 1, []), (BCPSettings(plain_labelled=False), 1, 1, []),
    (SemiCMLSettings(), 1, 1, ["asc"]), (SemiCMLSettings(), 1, 2, []), (SemiCMLSettings(asc=False), 1, 1, []),
])
def test_what_needs_another_patch_and_has_none_is_told(settings, labelled, unlabelled, named):
    warnings = settings.of_lone_patches(labelled, unlabelled, dimensions=2)
    names = ("cutmix", "labelled_mixing", "pretrain_fraction", "asc")
    assert sorted(name for warning in warnings for name in names if f'"{name}"' in warning) == named


def test_both_arrangements_do_the_same_steps(small):
    methods = [make(small, one_pass, labelled_mixing=1.0) for one_pass in (False, True)]
    for method in methods:
        step = TrainingStep(method, method.optimizers(1e-2, 0.0, 10), None, torch.device("cpu"), seed=0, rank=0,
                            max_skipped_steps=5)
        for number in range(2):
            step.run(small.batch(seed=number), number, 0.5)
    for a, b in zip(*(method.parameters() for method in methods), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name, value", [("labelled_mixing", -1.0), ("labelled_box", 1.5)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=name):
        SupervisedSettings(**{name: value})
