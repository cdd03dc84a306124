"""Distillation's loss, what its student sees, and what is refused; with small networks as teachers."""

from types import SimpleNamespace

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods import distillation
from nnunetv2_semi.methods.contract import Batch
from nnunetv2_semi.methods.distillation import Distillation, DistillationSettings
from nnunetv2_semi.networks.one_modality import OneModality
from nnunetv2_semi.networks.trained_ensemble import TrainedEnsemble
from nnunetv2_semi.training.step import TrainingStep


class Model:
    """Stands for a model folder."""

    folder = "folder"

    def __init__(self, networks, regions, digests=None, **facts):
        self.networks, self.regions, self._digests = networks, regions, digests
        self.num_channels, self.strides = facts.get("channels", 2), facts.get("strides", (4, 4, 4))
        self.configuration = SimpleNamespace(spacing=facts.get("spacing", (3.0, 1.0, 1.0)),
                                             patch_size=facts.get("patch_size", [8, 8, 8]), previous_stage_name=None)
        labels = SimpleNamespace(has_regions=regions, num_segmentation_heads=facts.get("heads", 3))
        self.plans, self.dataset_json = SimpleNamespace(get_label_manager=lambda _: labels), {}

    def ensemble(self):
        return TrainedEnsemble(self.networks, self.regions)

    def digests(self):
        return self._digests


def make(small, monkeypatch, dims=3, regions=False, deep_supervision=False, ignore_label=None, networks=2,
         modality=None, one_pass=False, **settings):
    torch.manual_seed(1)
    teachers = [small.network(2, 3, dims) for _ in range(networks)]
    monkeypatch.setattr(distillation, "_teacher", lambda _: Model(teachers, regions))
    context = small.context(2, regions, ignore_label, deep_supervision=deep_supervision, one_pass=one_pass)
    network = small.network(2 if modality is None else 1, 3, dims, deep_supervision, widths=(2, 4, 4))
    if modality is not None:
        network = OneModality(network, modality, context.modalities[modality])
    method = Distillation(network, DistillationSettings(teacher="folder", modality=modality, **settings), context)
    method.progress = 0.5
    return method, teachers


def terms_of(method, batch):
    return {term.name: term for group in method.loss(batch) for term in group}


KINDS = [{}, {"regions": True}, {"deep_supervision": True}, {"deep_supervision": True, "regions": True, "dims": 2},
         {"ignore_label": 2, "temperature": 1.0}, {"modality": "m1", "temperature": 4.0}, {"networks": 1, "dims": 2}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_all_terms_equal_a_second_form(small, monkeypatch, kind):
    """Value and gradient of every term, from the equations."""
    method, teachers = make(small, monkeypatch, **kind)
    regions, temperature = kind.get("regions", False), kind.get("temperature", 2.0)
    batch = small.batch(dims=kind.get("dims", 3), regions=regions, ignore_label=kind.get("ignore_label"),
                        deep_supervision=kind.get("deep_supervision", False))
    terms = terms_of(method, batch)
    channels = slice(None) if "modality" not in kind else slice(1, 2)
    network = method.student if "modality" not in kind else method.student.network

    def activated(logits, t):
        return (logits / t).sigmoid() if regions else (logits / t).softmax(1)

    expected = {"supervised": method.context.supervised_loss(network(batch.labelled[:, channels]), batch.target)}
    for name, image in (("labelled", batch.labelled), ("unlabelled", batch.unlabelled)):
        with torch.no_grad():
            mean = sum(activated(teacher(image), 1) for teacher in teachers) / len(teachers)
        output = network(image[:, channels])
        scales = output if isinstance(output, list) else [output]
        divergence, dice = 0.0, 0.0
        for weight, scale in zip(method.context.scale_weights, scales, strict=True):
            powers = mean ** (1 / temperature)
            other = (1 - mean) ** (1 / temperature)
            q = powers / ((powers + other) if regions else powers.sum(1, keepdim=True))
            truth = mean
            if scale.shape != q.shape:
                halves = [2] * (q.ndim - 2)
                shape = [part for size in scale.shape[2:] for part in (size, 2)]
                axes = [3 + 2 * axis for axis in range(len(halves))]
                q, truth = (p.reshape(*p.shape[:2], *shape).mean(axes) for p in (q, mean))
            p = activated(scale, temperature)
            if regions:
                voxels = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
            else:
                voxels = (q * (q / p).log()).sum(1)
            divergence = divergence + weight * temperature**2 * voxels.mean()
            p, truth = ((x if regions else x[:, 1:]).flatten(2) for x in (activated(scale, 1), truth))
            dice = dice + weight * (1 - (2 * (p * truth).sum(2) + 1e-5).div(
                (p**2).sum(2) + (truth**2).sum(2) + 1e-5).mean())
        expected |= {f"distillation_{name}": divergence, f"distillation_dice_{name}": dice}
    assert set(terms) == set(expected)
    for name, value in expected.items():
        assert terms[name].value.item() == pytest.approx(value.item(), rel=1e-4), name
        assert terms[name].weight == 1 and terms[name].applies and terms[name].supervised == (name == "supervised")
    shares = dict(zip(expected, (1.0, 3.0, 0.5, 2.0, 0.7), strict=True))
    assert small.same_gradients(sum(share * terms[name].value for name, share in shares.items()),
                                sum(share * expected[name] for name, share in shares.items()), method.student)
    assert 0 <= method.metrics["teacher_student_agreement"] <= 1


def test_weights_multiply_the_terms_and_zero_leaves_them_out(small, monkeypatch):
    batch = small.batch()
    method, _ = make(small, monkeypatch, distillation_weight=3.0, dice_weight=0.0, unlabelled_weight=0.5)
    assert {name: term.weight for name, term in terms_of(method, batch).items()} == {
        "supervised": 1.0, "distillation_labelled": 1.5, "distillation_unlabelled": 1.5}
    method, teachers = make(small, monkeypatch, unlabelled_weight=0.0)
    monkeypatch.setattr(teachers[0], "forward", lambda image: pytest.fail("the teacher is not needed"))
    assert list(terms_of(method, batch)) == ["supervised"]


def test_patches_without_the_students_modality_are_left_out(small, monkeypatch):
    method, _ = make(small, monkeypatch, modality="m1")
    batch = small.batch(count=3)
    has = torch.tensor([[True, True], [True, False], [False, True]])
    part = terms_of(method, Batch(batch.labelled, batch.target, batch.unlabelled, has, has))
    rows = [0, 2]
    alone = terms_of(method, Batch(batch.labelled[rows], batch.target[rows], batch.unlabelled[rows]))
    assert {name: term.value.item() for name, term in part.items()} == \
        pytest.approx({name: term.value.item() for name, term in alone.items()}, rel=1e-5)
    none = torch.tensor([[True, False]] * 3)
    assert not any(term.applies for term in terms_of(
        method, Batch(batch.labelled, batch.target, batch.unlabelled, none, none)).values())


@pytest.mark.parametrize("one_pass", [False, True])
def test_a_student_of_one_modality_is_blind_to_the_others_and_its_teacher_is_not(small, monkeypatch, one_pass):
    method, _ = make(small, monkeypatch, modality="m1", one_pass=one_pass)
    batch = small.batch()
    other = Batch(batch.labelled.clone(), batch.target, batch.unlabelled.clone())
    other.labelled[:, 0], other.unlabelled[:, 0] = 5.0, 5.0
    first, second = terms_of(method, batch), terms_of(method, other)
    assert torch.equal(first["supervised"].value, second["supervised"].value)
    assert not torch.allclose(first["distillation_unlabelled"].value, second["distillation_unlabelled"].value)
    deployed = method.deployable()
    assert torch.equal(deployed(batch.labelled), deployed(other.labelled))
    assert deployed.stock_networks()["m1"][0] == [1]


def test_training_lowers_the_loss_and_leaves_the_teacher_as_it_is(small, monkeypatch):
    method, teachers = make(small, monkeypatch, deep_supervision=True)
    before = [parameter.clone() for teacher in teachers for parameter in teacher.parameters()]
    step = TrainingStep(method, method.optimizers(0.05, 3e-5, 10), None, torch.device("cpu"), seed=0, rank=0,
                        max_skipped_steps=1)
    batch = small.batch(deep_supervision=True)
    method.train()
    values = []
    for number in range(8):
        terms, _ = step.run(batch, number, 0.5)
        values.append(sum(float(term.value) for term in terms if "distillation" in term.name))
    assert values[-1] < 0.9 * values[0]
    after = [parameter for teacher in teachers for parameter in teacher.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_teacher_is_in_no_checkpoint_and_another_one_is_refused(small, monkeypatch):
    method, _ = make(small, monkeypatch, teacher_sha256={"0": "a"})
    state = method.state_dict()
    assert all(name.startswith("student.") or name == "_extra_state" for name in state)
    method.load_state_dict(state)
    with pytest.raises(UserError, match="began with another teacher"):
        method.load_state_dict({**state, "_extra_state": {"0": "b"}})


def test_the_teachers_digests_are_completed_and_checked(monkeypatch):
    monkeypatch.setattr(distillation, "_teacher", lambda _: Model([], False, {"0": "a"}))
    settings = DistillationSettings(teacher="folder")
    completed = Distillation.completed(settings)
    assert completed.teacher_sha256 == {"0": "a"} and Distillation.completed(completed) == completed
    with pytest.raises(UserError, match="are not those that the plans file names"):
        Distillation.completed(settings.model_copy(update={"teacher_sha256": {"0": "b"}}))
    assert Distillation.completed(DistillationSettings()) == DistillationSettings()


@pytest.mark.parametrize("facts, message", [
    ({"spacing": (3.0, 1.0, 2.0)}, r"spacing in mm: \[3.0, 1.0, 2.0\] and \[3.0, 1.0, 1.0\].*copy of the teacher's"),
    ({"channels": 1}, "image channels: 1 and 2"),
    ({"heads": 4}, "classes or regions: 4 and 3"),
    ({"regions": True}, "region-based labels: True and False"),
    ({"patch_size": [8, 8], "spacing": (1.0, 1.0)}, "axes of a patch: 2 and 3"),
    ({"patch_size": [16, 8, 8], "strides": None}, "Give the student that patch_size"),
])
def test_a_teacher_that_does_not_fit_is_refused(small, monkeypatch, facts, message):
    monkeypatch.setattr(distillation, "_teacher",
                        lambda _: Model([], **{"regions": False, **facts}))
    with pytest.raises(UserError, match=message):
        Distillation.check(small.context(2), DistillationSettings(teacher="folder"))


def test_what_is_no_teacher_or_no_modality_is_refused_and_other_patches_are_told_of(small, monkeypatch):
    context = small.context(2)
    with pytest.raises(UserError, match="nnunetv2_semi distill"):
        Distillation.check(context, DistillationSettings())
    with pytest.raises(UserError, match="Modalities of the data set: m0, m1"):
        Distillation.check(context, DistillationSettings(teacher="folder", modality="T9"))
    monkeypatch.setattr(distillation, "_teacher", lambda _: Model([], False, spacing=(3.0, 1.0, 1.00001)))
    assert Distillation.check(context, DistillationSettings(teacher="folder")) == []
    monkeypatch.setattr(distillation, "_teacher", lambda _: Model([], False, patch_size=[16, 8, 8]))
    assert "may be less accurate" in Distillation.check(context, DistillationSettings(teacher="folder"))[0]


def test_the_students_network_needs_the_plans_alone(small, monkeypatch):
    """nnU-Net's predictor builds it where there is no teacher."""
    built = []
    monkeypatch.setattr(nnUNetTrainer, "build_network_architecture",
                        staticmethod(lambda *arguments: built.append(arguments[2:]) or torch.nn.Identity()))
    semi = {"modalities": {"CT": [0], "MR": [1, 2]}, "Distillation": {"teacher": "/nowhere", "modality": "MR"}}
    network = Distillation.build_student(None, SimpleNamespace(configuration={"semi": semi}), 3, 4, False)
    assert isinstance(network, OneModality) and network.channels == [1, 2] and built == [(2, 4, False)]
    semi["Distillation"]["modality"] = None
    assert isinstance(Distillation.build_student(None, SimpleNamespace(configuration={"semi": semi}), 3, 4, True),
                      torch.nn.Identity)
    assert built[1] == (3, 4, True)
