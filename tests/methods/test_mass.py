"""MASS: its terms, its atlases, what is learnt from what."""

import math
from dataclasses import replace

import pytest
import torch

from nnunetv2_semi.data.atlas_choice import aligned_atlases, chosen_atlases
from nnunetv2_semi.data.phantom_anatomy import make_phantom_case
from nnunetv2_semi.data.whole_case import WholeCase
from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods import arrangement
from nnunetv2_semi.methods.arrangement import Arrangement
from nnunetv2_semi.methods.contract import Batch
from nnunetv2_semi.methods.mass import MASS, MASSSettings
from nnunetv2_semi.networks.atlas_network import AtlasNetwork
from nnunetv2_semi.networks.atlases import Atlases
from nnunetv2_semi.present_channels import fill_absent, present_channels
from nnunetv2_semi.training.step import TrainingStep

NAMES = {"m0": [0], "m1": [1]}
ALTERNATING = torch.tensor([[True, False], [False, True]])
TERMS = ["supervised", "ncc", "mse", "smoothness", "semantic", "contrast", "pseudo"]


def cases_of(batch, regions=False, present=ALTERNATING):
    """Labelled training cases of each modality, from the patches of a batch."""
    target = batch.target if isinstance(batch.target, torch.Tensor) else batch.target[0]
    return [WholeCase(f"case_{number}", image, label, row.nonzero()[:, 0].tolist())
            for number, (image, label, row) in enumerate(zip(batch.labelled, target, present, strict=True))]


def phantom_case(number):
    """Image (2, *spatial) of one modality, and labels."""
    case = make_phantom_case(number, (24, 32, 24), 2, 0)
    images = torch.stack([torch.from_numpy(image).float() for image in case.images])
    return fill_absent(images, ALTERNATING[number % 2]), torch.from_numpy(case.segmentation.astype("int16"))[None]


def unpaired(small, seed=0, **options):
    batch = small.batch(seed=seed, **options)
    return replace(batch, labelled=fill_absent(batch.labelled, ALTERNATING), labelled_present=ALTERNATING,
                   unlabelled=fill_absent(batch.unlabelled, ALTERNATING), unlabelled_present=ALTERNATING)


def make(small, dims=3, regions=False, ignore_label=None, deep_supervision=False, one_pass=False, cases=None,
         **settings):
    torch.manual_seed(1)
    networks = {name: small.network(1, 3, dims, deep_supervision) for name in NAMES}
    chosen = MASSSettings(modalities=NAMES, regions=regions, **settings)
    student = AtlasNetwork(networks, NAMES, Atlases(3, regions), dims, chosen.predict, chosen.refine,
                           chosen.skip_finest)
    context = small.context(2, regions, ignore_label, one_pass, deep_supervision)
    context = replace(context, patch_size=(8,) * dims, training_cases=lambda: iter(cases or []))
    return MASS(student, chosen, context)


def started(small, batch, **options):
    method = make(small, cases=cases_of(batch), **options)
    method.on_start()
    return method


def terms_of(method, batch, seed=3):
    torch.manual_seed(seed)
    return {term.name: term for group in method.loss(batch) for term in group}


@pytest.mark.parametrize("options", [
    {}, {"dims": 2}, {"regions": True}, {"ignore_label": 3}, {"regions": True, "ignore_label": 4},
    {"deep_supervision": True}, {"one_pass": True}, {"deep_supervision": True, "one_pass": True, "regions": True}])
def test_a_step_has_all_terms_and_moves_all_parts(small, options):
    data = {key: value for key, value in options.items() if key != "one_pass"}
    batch = unpaired(small, **data)
    method = started(small, batch, **options)
    before = {name: p.clone() for name, p in method.named_parameters()}
    step = TrainingStep(method, method.optimizers(1e-2, 0.0, 10), None, torch.device("cpu"), seed=0, rank=0,
                        max_skipped_steps=1)
    terms, values = step.run(batch, 0, 0.5)
    assert [term.name for term in terms] == TERMS and values["skipped_steps"] == 0
    assert all(torch.isfinite(term.value) for term in terms)
    moved = {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}
    for part in ("student.encoders.encoders.0", "student.encoders.encoders.1", "student.encoders.decoder",
                 "student.correspondence", "tokens"):
        assert any(name.startswith(part) for name in moved), part


@pytest.mark.parametrize("contrast_weight", [1.0, 0.0])
def test_correspondence_has_an_optimiser_of_its_own_and_everything_has_one(small, contrast_weight):
    """At nnU-Net's learning rate displacements grow without bound."""
    batch = unpaired(small)
    method = started(small, batch, contrast_weight=contrast_weight, correspondence_lr=2e-4)
    first, second = method.optimizers(1e-2, 0.0, 10)
    sgd, adam, schedule = first.optimizer, second.optimizer, second.schedule
    groups = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in (sgd, adam)]
    assert groups[0].isdisjoint(groups[1])
    assert groups[0] | groups[1] == {id(p) for p in method.parameters() if p.requires_grad}
    assert {id(p) for p in method.student.correspondence.parameters()} <= groups[1]
    schedule.step(0)
    assert adam.param_groups[0]["lr"] == 2e-4


@pytest.mark.parametrize("setting, absent", [
    ({"registration": False}, set(TERMS) - {"supervised"}), ({"contrast_weight": 0.0}, {"contrast"})])
def test_ablations_leave_terms_out(small, setting, absent):
    batch = unpaired(small)
    assert set(TERMS) - set(terms_of(started(small, batch, **setting), batch)) == absent


@pytest.mark.parametrize("images_per_pass", [1, 2, 4])
@pytest.mark.parametrize("one_pass", [False, True])
def test_joined_batches_give_the_same_loss_and_gradient(small, monkeypatch, one_pass, images_per_pass):
    """As on a GPU, where patches of both modalities go through the encoders together."""
    batch, found = unpaired(small), []
    for joins in (False, True):
        monkeypatch.setattr(arrangement, "joins_batches", lambda device, joins=joins: joins)
        method = started(small, batch, one_pass=one_pass)
        method.context = replace(method.context, arrangement=Arrangement(one_pass, images_per_pass))
        terms = terms_of(method, batch)
        sum(term.weight * term.value for term in terms.values()).backward()
        found.append(({name: float(term.value.detach()) for name, term in terms.items()},
                      torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5 * float(found[0][1].abs().max()))


@pytest.mark.parametrize("name", ["ncc", "mse", "smoothness", "semantic", "pseudo"])
def test_each_weight_is_a_setting(small, name):
    batch = unpaired(small)
    method = started(small, batch, **{f"{name}_weight": 0.25}, ramp_fraction=0.0)
    assert terms_of(method, batch)[name].weight == 0.25


def test_pseudo_labels_have_their_full_weight_after_a_fifth_of_training(small):
    batch = unpaired(small)
    method = started(small, batch)
    for progress, share in ((0.1, math.exp(-5 * 0.25)), (0.2, 1.0)):
        method.progress = progress
        assert terms_of(method, batch)["pseudo"].weight == pytest.approx(0.1 * share)


def test_one_pass_and_one_after_another_give_the_same_loss(small):
    batch = unpaired(small)
    values = [{name: float(term.value.detach())
               for name, term in terms_of(started(small, batch, one_pass=joint), batch).items()}
              for joint in (False, True)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_semantic_consistency_reaches_the_correspondence_head(small):
    batch = unpaired(small)
    method = started(small, batch)
    terms_of(method, batch)["semantic"].value.backward()
    gradient = [p.grad for p in method.student.correspondence.parameters() if p.grad is not None]
    assert sum(float(g.abs().sum()) for g in gradient) > 0


@pytest.mark.parametrize("moves, same_too", [("other", False), ("both", True)])
def test_semantic_consistency_moves_the_other_modality_or_both(small, moves, same_too, monkeypatch):
    batch = unpaired(small)
    method = started(small, batch, semantic_moves=moves)
    found, displacement = [], method.student.displacement

    def kept(*args):
        found.append(displacement(*args))
        found[-1].retain_grad()
        return found[-1]
    monkeypatch.setattr(method.student, "displacement", kept)
    terms_of(method, batch)["semantic"].value.backward()
    same, other = (field.grad is not None and bool(field.grad.any()) for field in found)
    assert other and same is same_too


def test_where_the_label_of_an_atlas_is_unknown_nothing_is_taught(small):
    batch = unpaired(small)
    method = started(small, batch)
    method.student.atlases.labels[:] = 255
    terms = terms_of(method, batch)
    (terms["pseudo"].value + terms["semantic"].value).backward()
    assert all(p.grad is None or not p.grad.any() for p in method.parameters())


def test_pseudo_labels_teach_the_segmentation_alone(small):
    batch = unpaired(small)
    method = started(small, batch)
    terms_of(method, batch)["pseudo"].value.backward()
    assert all(p.grad is None or not p.grad.any() for p in method.student.correspondence.parameters())
    assert any(p.grad is not None and p.grad.any() for p in method.student.decoder.seg_layers.parameters())


def test_a_target_is_registered_to_an_atlas_of_its_modality_and_to_one_of_another(small):
    batch = unpaired(small)
    method = started(small, batch)
    own = method.student.atlases.modality.tolist()
    for _ in range(10):
        same, other = method._drawn_atlases([0, 1, 1])
        assert [own[number] for number in same] == [0, 1, 1]
        assert all(own[number] != modality for number, modality in zip(other, [0, 1, 1], strict=True))


def test_of_paired_patches_one_modality_is_taken_each_time(small):
    batch = small.batch()
    method = started(small, batch)
    torch.manual_seed(0)
    seen = {tuple(present_channels(method._with_one_modality(batch.unlabelled))[0].tolist()) for _ in range(20)}
    assert seen == {(True, False), (False, True)}


def test_the_order_of_the_patches_does_not_matter(small):
    batch = unpaired(small)
    method = started(small, batch)  # one atlas a modality: nothing is drawn
    turned = replace(batch, labelled=batch.labelled.flip(0), target=batch.target.flip(0),
                     unlabelled=batch.unlabelled.flip(0))
    first, second = terms_of(method, batch), terms_of(method, turned)
    assert {n: float(t.value) for n, t in first.items()} == \
        pytest.approx({n: float(t.value) for n, t in second.items()}, abs=1e-5)


# atlases


@pytest.mark.parametrize("align", [False, True])
def test_its_settings_choose_and_align_the_atlases(small, align):
    """Draws of other seeds differ; what an aligned one does not show has an unknown label."""
    cases = [WholeCase(f"c{number}", *phantom_case(number), [number % 2]) for number in range(6)]
    method = make(small, cases=cases, atlases_per_modality=2, seed=5, align_atlases=align)
    method.on_start()
    atlases = method.student.atlases
    expected = chosen_atlases(cases, list(NAMES), 2, 5)
    assert [atlas.case.name for atlas in expected] != [atlas.case.name for atlas in chosen_atlases(cases, list(NAMES),
                                                                                                   2, 0)]
    if align:
        expected = list(aligned_atlases(expected, NAMES, method.context.spacing))
    assert len(atlases) == len(expected) == 4 and atlases.modality.tolist() == [0, 0, 1, 1]
    for number, atlas in enumerate(expected):
        own = atlas.case.image[[atlas.modality]]
        assert torch.equal(atlases.images[number][[atlas.modality]], own.half())
        assert torch.equal(atlases.labels[number].int(), torch.where(atlas.seen, atlas.case.target.int(), 255))
    assert bool((atlases.labels == 255).any()) is align


def test_an_atlas_of_a_paired_case_shows_its_modality_alone(small):
    method = make(small, cases=cases_of(small.batch(), present=torch.ones(2, 2, dtype=torch.bool)),
                  atlases_per_modality=1)
    method.on_start()
    assert present_channels(method.student.atlases.image([0, 1])).tolist() == [[True, False], [False, True]]


def test_one_modality_is_refused(small):
    with pytest.raises(UserError, match="two or more"):
        MASS.check(small.context(1), MASSSettings())


@pytest.mark.parametrize(("patch", "image", "shown"), [
    ((8, 8, 8), (8.0, 7.5, 6.0), None), ((8, 8), (8.0, 8.0), None),
    ((8, 8, 8), (8.0, 9.0, 8.0), "patches of 8 x 8 x 8 voxels show a part of the median image (8 x 9 x 8)"),
    ((8, 8), (20.0, 8.0, 8.0), "patches of 1 x 8 x 8 voxels show a part of the median image (20 x 8 x 8)")])
def test_it_warns_where_patches_do_not_show_the_whole_image(small, patch, image, shown):
    warnings = MASS.check(replace(small.context(2), patch_size=patch, image_size=image), MASSSettings())
    assert [warning.partition(". ")[0] for warning in warnings] == ([shown] if shown else [])
    assert all("3d_atlas" in warning for warning in warnings)


def test_atlases_and_heads_are_restored_from_the_state(small):
    batch = unpaired(small)
    method, other = started(small, batch), make(small)
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.student.atlases.images, method.student.atlases.images)
    first, second = terms_of(method, batch), terms_of(other, batch)
    assert all(torch.equal(first[name].value, second[name].value) for name in TERMS)


# deployment


def test_every_way_to_predict_but_the_deployed_one_is_validated_by_itself(small):
    for predict in ("segmentation", "atlas", "both"):
        parts = make(small, predict=predict).parts()
        assert set(parts) == {"segmentation", "atlas", "both"} - {predict}


@pytest.mark.parametrize("modality", [0, 1])
def test_a_modalitys_stock_model_predicts_as_the_segmentation_head(small, modality):
    batch = unpaired(small)
    method = started(small, batch)
    models = method.student.stock_networks()
    channels, weights = models[f"m{modality}"]
    stock = small.network(1, 3)
    stock.load_state_dict(weights, strict=True)
    image = method.student.only(torch.randn(1, 2, 8, 8, 8), modality)
    assert torch.allclose(stock(image[:, channels]), method.student.predicted(image, "segmentation"), atol=1e-5)


def test_all_predictions_share_passes_and_are_those_of_the_parts(small):
    batch = unpaired(small)
    method = started(small, batch, predict="atlas")
    passes = []
    method.student.encoders.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    with torch.no_grad():
        deployed, parts = method.predictions(batch.labelled)
        shared = len(passes)
        assert torch.allclose(deployed, method.deployable()(batch.labelled), atol=1e-5)
        assert {name: float((parts[name] - part(batch.labelled)).abs().max())
                for name, part in method.parts().items()} == pytest.approx(dict.fromkeys(parts, 0.0), abs=1e-5)
    assert shared < len(passes) - shared


def test_a_picture_shows_three_predictions_and_a_grid(small):
    batch = unpaired(small)
    method = started(small, batch)
    with torch.no_grad():
        predictions, maps = method.picture(batch.labelled[:1])
    assert list(predictions) == ["segmentation", "atlas", "both"]
    assert maps["grid"].shape == (1, 8, 8, 8) and 0 <= maps["grid"].min() < maps["grid"].max() <= 1.001


def test_batch_size_one(small):
    batch = unpaired(small)
    method = started(small, batch)
    single = Batch(batch.labelled[1:], batch.target[1:], batch.unlabelled[:1])
    assert list(terms_of(method, single)) == TERMS
