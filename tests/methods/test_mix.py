import math
from dataclasses import replace

import pytest
import torch

from nnunetv2_semi.data.affine_views import AffineViews
from nnunetv2_semi.data.boxes import Boxes
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods import arrangement
from nnunetv2_semi.methods.contract import Batch
from nnunetv2_semi.methods.mix import Mix, MixSettings
from nnunetv2_semi.methods.perturbation import intensity_view
from nnunetv2_semi.methods.supervised import Supervised, SupervisedSettings
from nnunetv2_semi.present_channels import FILL, present_channels
from nnunetv2_semi.training.step import TrainingStep

SAME_INTENSITIES = {"view_gamma": 0.0, "view_scale": 0.0, "view_shift": 0.0, "view_noise": 0.0}


def make(small, cls=Mix, progress=0.5, channels=2, dims=2, regions=False, ignore_label=None, deep_supervision=False,
         one_pass=False, mirror_axes=(0, 1), connected_classes=(), turned_in_plane=False, **settings):
    torch.manual_seed(1)
    context = small.context(channels, regions, ignore_label, one_pass, deep_supervision, (3.0, 1.0, 1.0)[-dims:],
                            mirror_axes=mirror_axes, connected_classes=connected_classes,
                            turned_in_plane=turned_in_plane)
    method = cls(small.network(channels, 3, dims, deep_supervision), cls.Settings(**settings), context)
    method.progress = progress
    if cls is Mix:
        torch.manual_seed(2)
        with torch.no_grad():  # as if the student had moved on since; large weights make some voxels confident
            for parameter in method.teacher.network.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return method


def terms_of(method, batch):
    torch.manual_seed(3)
    return {term.name: term for group in method.loss(batch) for term in group}


def seen_by(network, method, batch):
    """The patches of each pass, in order."""
    seen = []
    handle = network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    terms_of(method, batch)
    handle.remove()
    return seen


def run(method, batches, progress=0.5):
    step = TrainingStep(method, method.optimizers(1e-2, 0.0, 10), None, torch.device("cpu"), seed=0, rank=0,
                        max_skipped_steps=5)
    for number, batch in enumerate(batches):
        terms, values = step.run(batch, number, progress)
    return terms, values


def counted_by_hand(voxels, threshold, labels, confidence):
    """The weight of each voxel's label, decided voxel by voxel."""
    weights = torch.zeros_like(confidence)
    places = [tuple(index) for index in torch.cartesian_prod(*map(torch.arange, confidence.shape)).tolist()]
    by_label = {}  # of each channel: regions have one each
    for place in places:
        by_label.setdefault((place[1], labels[place].item()), []).append(confidence[place].item())
    for place in places:
        c, alike = confidence[place].item(), by_label[place[1], labels[place].item()]
        mean = sum(alike) / len(alike)
        weights[place] = {"all": 1.0, "weighted": c, "confident": float(c >= threshold),
                          "class": float(c >= min(mean, threshold))}[voxels]
    return weights


def expected_terms(small, naive_weighted_dice_ce, method, batch):
    """Values of the terms as the page says, with the random draws of ``terms_of``, and the weights of the voxels."""
    settings, context = method.settings, method.context
    axes, deep = tuple(batch.labelled.shape[2:]), isinstance(batch.target, list)
    targets = batch.target if deep else [batch.target]
    torch.manual_seed(3)
    expected = {"supervised": context.supervised_loss(method.student(batch.labelled), batch.target)}
    if settings.labelled_mixing:
        inside = Boxes.draw(len(batch.labelled), axes, settings.labelled_box).inside(torch.device("cpu"))
        half = (slice(None), slice(None), *[slice(1, None, 2)] * len(axes))  # nearest voxel: of two, the second one
        mixed = [small.mixed(box, target) for box, target in zip((inside, inside[half]), targets, strict=False)]
        expected["labelled_mixing"] = context.supervised_loss(method.student(small.mixed(inside, batch.labelled)),
                                                              mixed if deep else mixed[0])
    with torch.no_grad():
        z = method.teacher.network(batch.unlabelled)
    p = (z[0] if deep else z).sigmoid() if context.regions else (z[0] if deep else z).softmax(1)
    labels = (p > 0.5).long() if context.regions else p.argmax(1, keepdim=True)
    confidence = torch.maximum(p, 1 - p) if context.regions else p.amax(1, keepdim=True)
    weight = counted_by_hand(settings.voxels, settings.confidence, labels, confidence)
    used = weight.mean()
    image = batch.unlabelled
    partners = [[patches[(k + 1) % len(image)] for k in range(len(image))] for patches in (image, labels, weight)]
    if settings.partner != "unlabelled":
        known = torch.ones_like(targets[0][:, :1], dtype=torch.bool)
        if context.ignore_label is not None:
            known = ~targets[0][:, -1:] if context.regions else targets[0] != context.ignore_label
        for k in range(len(image)):
            if settings.partner == "labelled" or k >= len(image) / 2:
                j = k % len(batch.labelled)
                truth = targets[0][j, :3] if context.regions else targets[0][j]
                partners[0][k], partners[1][k] = batch.labelled[j], truth.long()
                partners[2][k] = known[j].float().expand_as(weight[k])
    inside = Boxes.draw(len(image), axes, settings.cutmix).inside(torch.device("cpu"))
    image, labels, weight = (small.mixed(inside, own, torch.stack(other)) for own, other in
                             zip((image, labels, weight), partners, strict=True))
    image = intensity_view(image, settings, context.masked_channels)
    if settings.spatial_view != "none":
        mirrored = torch.rand(len(image), len(context.mirror_axes)) < 0.5
        for k in range(len(image)):
            axes = [axis + 1 for axis, chosen in zip(context.mirror_axes, mirrored[k], strict=True) if chosen]
            for patches in (image, labels, weight):
                patches[k] = patches[k].flip(axes)
    if settings.spatial_view == "affine":
        views = AffineViews.draw(image, context.spacing, 0.5, context.turned_in_plane, (0.7, 1.4))
        weight = views.of(weight, "nearest") * views.inside()
        image, labels = views.of(image), views.of(labels, "nearest")
    output = method.student(image)
    labels = torch.where(weight > 0, labels, 0)
    if settings.pseudo_loss == "ce":
        z = output[0] if deep else output
        p = z.sigmoid() if context.regions else z.softmax(1)
        right = torch.where(labels == 1, p, 1 - p) if context.regions else p.gather(1, labels)
        expected["pseudo_label"] = -(weight * right.log()).mean()
    else:
        expected["pseudo_label"] = naive_weighted_dice_ce(output if deep else [output], labels, weight,
                                                          context.regions, context.scale_weights)
    return expected, used


@pytest.mark.parametrize("settings", [
    {}, {"voxels": "class"}, {"voxels": "weighted"}, {"voxels": "all"}, {"partner": "labelled"}, {"partner": "both"},
    {"spatial_view": "flips"}, {"spatial_view": "affine"},
    {"labelled_mixing": 0.0}, {"labelled_mixing": 0.5, "labelled_box": 0.75},
    {"pseudo_weight": 2.0, "cutmix": 0.0}, {"pseudo_loss": "ce"},
    {"pseudo_loss": "ce", "voxels": "weighted", "partner": "both"},
    {"partner": "both", "spatial_view": "flips", "voxels": "weighted"}])
@pytest.mark.parametrize("kinds", [{}, {"regions": True}, {"ignore_label": 3},
                                   {"regions": True, "ignore_label": 3, "deep_supervision": True}])
def test_terms_are_the_equations_in_value_and_gradient(small, naive_weighted_dice_ce, kinds, settings):
    settings = {"confidence": 0.65, **settings}
    method, batch = make(small, **kinds, **settings), small.batch(dims=2, count=3, **kinds)
    terms = terms_of(method, batch)
    expected, used = expected_terms(small, naive_weighted_dice_ce, method, batch)
    assert list(terms) == list(expected)
    assert method.settings.voxels == "all" or 0.05 < used < 0.95
    assert method.metrics["unlabelled_voxels_used"].item() == pytest.approx(used.item())
    weights = {"supervised": 1.0, "labelled_mixing": method.settings.labelled_mixing,
               "pseudo_label": method.settings.pseudo_weight}
    for name, value in expected.items():
        assert torch.allclose(terms[name].value, value, rtol=1e-4), name
        assert terms[name].weight == weights[name] and terms[name].supervised == (name != "pseudo_label")
        assert small.same_gradients(terms[name].value, value, method.student), name


@pytest.mark.parametrize("kinds", [{"dims": 3}, {"dims": 3, "channels": 4}, {"channels": 1}])
@pytest.mark.parametrize("settings", [{}, {"partner": "both", "spatial_view": "flips", "voxels": "class"},
                                      {"spatial_view": "affine", "turned_in_plane": True, "voxels": "weighted"}])
def test_terms_are_the_equations_in_3d_and_for_any_number_of_channels(small, naive_weighted_dice_ce, kinds, settings):
    kinds = {"dims": 2, **kinds}
    mirror_axes = (0, 2) if kinds["dims"] == 3 else (1,)
    method = make(small, confidence=0.65, mirror_axes=mirror_axes, **kinds, **settings)
    batch = small.batch(**kinds)
    terms = terms_of(method, batch)
    expected, _ = expected_terms(small, naive_weighted_dice_ce, method, batch)
    for name, value in expected.items():
        assert torch.allclose(terms[name].value, value, rtol=1e-4), name
        assert small.same_gradients(terms[name].value, value, method.student), name


@pytest.mark.parametrize("voxels", ["confident", "class", "weighted", "all"])
@pytest.mark.parametrize("labelled, unlabelled", [(1, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize("partner", ["unlabelled", "labelled", "both"])
def test_batch_sizes_may_differ_and_be_one(small, voxels, labelled, unlabelled, partner):
    method = make(small, voxels=voxels, partner=partner, confidence=0.4, spatial_view="flips")
    batch = small.batch(dims=2, count=3)
    batch = Batch(batch.labelled[:labelled], batch.target[:labelled], batch.unlabelled[:unlabelled])
    assert [len(patches) for patches in seen_by(method.student, method, batch)] == [labelled, labelled, unlabelled]
    terms, values = run(method, [batch])
    assert values["skipped_steps"] == 0 and all(torch.isfinite(term.value) for term in terms)


def test_of_one_labelled_and_one_unlabelled_patch_the_box_is_the_labelled_ones(small):
    method, batch = make(small, partner="labelled", **SAME_INTENSITIES), small.batch(dims=2, count=1)
    image = seen_by(method.student, method, batch)[-1]
    from_labelled = (image == batch.labelled).all(1)
    assert from_labelled.sum() == 16 and torch.equal(image.movedim(1, -1)[~from_labelled],
                                                     batch.unlabelled.movedim(1, -1)[~from_labelled])


@pytest.mark.parametrize("partner, whose", [("unlabelled", "UUUU"), ("labelled", "LLLL"), ("both", "UULL")])
def test_the_setting_decides_whose_box_is_pasted(small, partner, whose):
    method, batch = make(small, partner=partner, **SAME_INTENSITIES), small.batch(dims=2, count=4)
    image = seen_by(method.student, method, batch)[-1]
    for k, kind in enumerate(whose):
        other = batch.labelled[k] if kind == "L" else batch.unlabelled[(k + 1) % 4]
        assert (image[k] == other).all(0).sum() == 16 and (image[k] == batch.unlabelled[k]).all(0).sum() == 48


@pytest.mark.parametrize("partner", ["labelled", "both"])
def test_nothing_is_pasted_from_a_labelled_case_with_other_channels(small, partner):
    method, batch = make(small, partner=partner, **SAME_INTENSITIES), small.batch(dims=2)
    batch.labelled[1, 1] = FILL
    image = seen_by(method.student, method, batch)[-1]
    assert torch.equal(image[1], batch.unlabelled[1]) and not torch.equal(image[0], batch.unlabelled[0])
    assert present_channels(image).all()


def test_the_students_patch_has_other_intensities_than_the_teachers(small):
    method, batch = make(small, cutmix=0.0, view_noise=0.0), small.batch(dims=2)
    (teachers,), students = seen_by(method.teacher.network, method, batch), seen_by(method.student, method, batch)[-1]
    assert torch.equal(teachers, batch.unlabelled) and not torch.allclose(students, teachers, atol=0.1)
    for before, after in zip(teachers.flatten(0, 1).flatten(1), students.flatten(0, 1).flatten(1), strict=True):
        assert torch.equal(before.argsort(), after.argsort())  # a curve, scale and shift


@pytest.mark.parametrize("mirror_axes", [(), (0,), (1,), (0, 1)])
def test_flips_are_along_the_allowed_axes_alone_and_move_labels_along(small, mirror_axes, monkeypatch):
    method = make(small, mirror_axes=mirror_axes, spatial_view="flips", cutmix=0.0, voxels="all", **SAME_INTENSITIES)
    batch, given = small.batch(dims=2, count=8), []
    method.context = replace(method.context, weighted_loss=lambda output, labels, weight: given.append(labels) or
                             output.sum())
    image = seen_by(method.student, method, batch)[-1]
    labels = method.teacher(batch.unlabelled).argmax(1, keepdim=True)
    combinations = {(): 0, (0,): 0, (1,): 0, (0, 1): 0}
    for k in range(8):
        found = [axes for axes in combinations
                 if torch.equal(image[k], batch.unlabelled[k].flip([axis + 1 for axis in axes]))]
        assert len(found) == 1 and torch.equal(given[0][k], labels[k].flip([axis + 1 for axis in found[0]]))
        combinations[found[0]] += 1
    used = {axis for axes, count in combinations.items() if count for axis in axes}
    assert used == set(mirror_axes)


@pytest.mark.parametrize("progress, names, weight", [
    (0.0, ["supervised", "labelled_mixing"], None), (0.049, ["supervised", "labelled_mixing"], None),
    (0.05, ["supervised", "labelled_mixing", "pseudo_label"], math.exp(-5 * 0.75 ** 2)),
    (0.1, ["supervised", "labelled_mixing", "pseudo_label"], math.exp(-5 * 0.25)),
    (0.2, ["supervised", "labelled_mixing", "pseudo_label"], 1.0)])
def test_pseudo_labels_begin_after_the_start_and_ramp_up(small, progress, names, weight):
    method, batch = make(small, progress=progress), small.batch(dims=2)
    terms = terms_of(method, batch)
    assert list(terms) == names
    if weight is None:
        assert method.metrics["unlabelled_voxels_used"] == 0 and not seen_by(method.teacher.network, method, batch)
    else:
        assert terms["pseudo_label"].weight == pytest.approx(weight)


def test_they_may_begin_at_once_with_full_weight(small):
    terms = terms_of(make(small, progress=0.0, start=0.0, ramp_fraction=0.0), small.batch(dims=2))
    assert terms["pseudo_label"].weight == 1.0


def test_labels_read_in_the_ignore_label_teach_nothing(small):
    method = make(small, ignore_label=3, partner="labelled", voxels="all", cutmix=1.0)
    batch = small.batch(dims=2, ignore_label=3)
    batch.target.fill_(3)
    terms = terms_of(method, batch)
    gradients = torch.autograd.grad(terms["pseudo_label"].value, list(method.student.parameters()), allow_unused=True)
    assert all((g == 0).all() for g in gradients if g is not None)


def test_where_no_voxel_is_confident_pseudo_labels_teach_nothing(small):
    method = make(small, confidence=1.0)
    terms = terms_of(method, small.batch(dims=2))
    assert method.metrics["unlabelled_voxels_used"] == method.metrics["confident_foreground"] == 0
    gradients = torch.autograd.grad(terms["pseudo_label"].value, list(method.student.parameters()), allow_unused=True)
    assert all((g == 0).all() for g in gradients if g is not None)


@pytest.mark.parametrize("regions", [False, True])
def test_confident_foreground_is_the_share_of_predicted_foreground_that_counts(small, regions):
    threshold = 0.52 if regions else 0.65
    method, batch = make(small, regions=regions, confidence=threshold), small.batch(dims=2, regions=regions)
    terms_of(method, batch)
    p = method.teacher(batch.unlabelled)
    p = p.sigmoid() if regions else p.softmax(1)
    foreground = p[p > 0.5] if regions else p.amax(1)[p.argmax(1) > 0]
    assert 0 < method.metrics["confident_foreground"] < 1
    assert method.metrics["confident_foreground"].item() == pytest.approx(
        (foreground >= threshold).float().mean().item())


ISLANDS = torch.zeros(2, 1, 8, 8, dtype=torch.long)  # of each label a block of four voxels, and one voxel by itself
ISLANDS[..., :2, :2], ISLANDS[..., 5, 5], ISLANDS[..., :2, 6:], ISLANDS[..., 5, 2] = 1, 1, 2, 2


@pytest.mark.parametrize("setting, connected, voxels, which", [
    (False, [(0, 1), (0, 2)], [5, 5], "no label"), (True, [], [4, 4], "every label"),
    (None, [(0, 1), (0, 2)], [4, 4], "label 1, 2 (connected in every labelled training case)"),
    (None, [(0, 2)], [5, 4], "label 2 (connected in every labelled training case)"), (None, [], [5, 5], "no label")])
def test_islands_of_pseudo_labels_go_where_the_setting_says_so(small, monkeypatch, setting, connected, voxels, which):
    monkeypatch.setattr("nnunetv2_semi.methods.mix.hard_labels", lambda *_: (ISLANDS, torch.ones(2, 1, 8, 8)))
    method = make(small, largest_component=setting, connected_classes=connected, cutmix=0.0)
    _, labels, counted = method._pseudo_labelled(small.batch(dims=2))()
    assert [(labels == label).sum().item() / 2 for label in (1, 2)] == voxels and counted.all()
    assert method.notes() == [f"Islands are removed from pseudo-labels of {which}."]


def test_islands_are_looked_for_when_the_labelled_passes_are_under_way(small, monkeypatch):
    events = []
    monkeypatch.setattr("nnunetv2_semi.methods.islands.largest_components",
                        lambda labels, classes: events.append("islands") or labels)
    method = make(small, largest_component=True)
    method.student.register_forward_hook(lambda *_: events.append("student"))
    method.teacher.network.register_forward_hook(lambda *_: events.append("teacher"))
    run(method, [small.batch(dims=2)])
    assert events == ["teacher", "student", "student", "islands", "student"]


@pytest.mark.parametrize("one_pass, calls", [(False, [2, 2, 2]), (True, [6])])
def test_a_step_is_three_passes_with_a_gradient_and_one_without(small, monkeypatch, one_pass, calls):
    monkeypatch.setattr(arrangement, "joins_batches", lambda device: True)
    method, batch = make(small, one_pass=one_pass), small.batch(dims=2)
    assert [len(image) for image in seen_by(method.student, method, batch)] == calls
    assert [len(image) for image in seen_by(method.teacher.network, method, batch)] == [2]
    assert Mix.graphs(method.settings) == 3 and Mix.graphs(MixSettings(labelled_mixing=0.0)) == 2


@pytest.mark.parametrize("kinds", [{}, {"dims": 3, "deep_supervision": True}, {"regions": True}])
@pytest.mark.parametrize("settings", [{}, {"partner": "both", "spatial_view": "flips", "voxels": "weighted"}])
def test_both_arrangements_do_the_same_steps(small, kinds, settings):
    methods = [make(small, one_pass=one_pass, confidence=0.4, **kinds, **settings) for one_pass in (False, True)]
    for method in methods:
        run(method, [small.batch(seed=seed, **{"dims": 2, **kinds}) for seed in range(2)])
    for a, b in zip(*(method.parameters() for method in methods), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("labelled_mixing", [0.0, 1.0])
def test_without_unlabelled_weight_it_is_the_control(small, labelled_mixing):
    method = make(small, unlabelled_weight=0.0, labelled_mixing=labelled_mixing)
    control = make(small, Supervised, labelled_mixing=labelled_mixing)
    for m in (method, control):
        run(m, [small.batch(dims=2, seed=seed) for seed in range(3)])
    for a, b in zip(method.student.parameters(), control.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_second_control_has_the_settings_of_mix():
    assert SupervisedSettings(labelled_mixing=1.0).labelled_box == MixSettings().labelled_box
    assert MixSettings().labelled_mixing == 1.0


@pytest.mark.parametrize("deploy", ["teacher", "student"])
def test_the_setting_decides_what_is_deployed(small, deploy):
    method = make(small, deploy=deploy)
    assert method.deployable() is (method.teacher.network if deploy == "teacher" else method.student)


@pytest.mark.parametrize("settings, expected", [({}, 0.999), ({"num_epochs": 20}, 0.99), ({"ema_decay": 0.9}, 0.9)])
def test_the_teachers_memory_follows_the_length_of_training(small, settings, expected):
    assert make(small, **settings).teacher.decay == pytest.approx(expected)


def test_the_teacher_averages_the_student_from_the_first_step_on(small):
    method = make(small)
    run(method, [small.batch(dims=2)], progress=0.0)
    assert method.teacher.updates == 1
    assert all(torch.equal(a, b) for a, b in
               zip(method.teacher.network.parameters(), method.student.parameters(), strict=True))


@pytest.mark.parametrize("name, value", [
    ("confidence", 1.5), ("start", -0.1), ("ema_decay", 2.0), ("pseudo_weight", -1.0), ("ramp_fraction", -1.0),
    ("labelled_mixing", -1.0), ("labelled_box", 1.5), ("cutmix", 1.5), ("view_noise", -1.0)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=name):
        MixSettings(**{name: value})
