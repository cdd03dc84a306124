"""SynFoC's loss and what is trained, with a small network in the place of the foundation model."""

import math

import pytest
import torch
from torch import nn

from nnunetv2_semi.errors import UserError
from nnunetv2_semi.methods import synfoc
from nnunetv2_semi.methods.synfoc import SynFoC, SynFoCSettings, self_mutual_confidence
from nnunetv2_semi.networks.foundation import FoundationModel
from nnunetv2_semi.networks.frozen_weights import leave_out_of_state_dict
from nnunetv2_semi.training.step import TrainingStep


class Halved(FoundationModel):
    """A frozen convolution and a trained one; logits at half of the patch's resolution."""

    def __init__(self, channels: int, heads: int, dims: int) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.encoder = conv(channels, 4, 3, 2, 1).requires_grad_(False)
        self.head = conv(4, heads, 1)
        self._note_frozen(self.encoder.parameters())

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(image).relu())


def make(small, monkeypatch, dims=2, regions=False, deep_supervision=False, ignore_label=None, progress=1.0,
         channels=2, **settings):
    def build(settings, num_channels, num_heads, spatial_dims):
        model = Halved(num_channels, num_heads, spatial_dims)
        leave_out_of_state_dict(model, model.frozen_names())
        return model
    monkeypatch.setattr(synfoc, "build_foundation", build)
    torch.manual_seed(1)
    context = small.context(channels, regions, ignore_label, deep_supervision=deep_supervision)
    object.__setattr__(context, "patch_size", (8,) * dims)
    method = SynFoC(small.network(channels, 3, dims, deep_supervision),
                    SynFoCSettings(weights="random", foundation="nnunet", **{"confidence": 0.4, **settings}), context)
    method.progress = progress
    with torch.no_grad():  # otherwise students and teachers are the same
        for parameter in [*method.student.parameters(), *(method.foundation.head.parameters()
                                                          if method.foundation is not None else [])]:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return method


def terms_of(method, batch, seed=3):
    torch.manual_seed(seed)
    return {term.name: term for group in method.loss(batch) for term in group}


def finest(output):
    return output if isinstance(output, torch.Tensor) else output[0]


KINDS = [{}, {"regions": True, "confidence": 0.55}, {"deep_supervision": True}, {"ignore_label": 2}, {"dims": 3}]


@pytest.mark.parametrize("kind", KINDS)
def test_all_terms_equal_a_second_form(small, monkeypatch, naive_weighted_dice_ce, kind):
    """Value of every term, from the equations: views, boxes and passes as the method draws them."""
    method = make(small, monkeypatch, **kind)
    regions, ignore = kind.get("regions", False), kind.get("ignore_label")
    batch = small.batch(dims=kind.get("dims", 2), regions=regions, ignore_label=ignore,
                        deep_supervision=kind.get("deep_supervision", False))
    seen = {}
    for name in ("_boxes", "_pseudo_labels"):
        original = getattr(method, name)
        monkeypatch.setattr(method, name, lambda *a, _o=original, _n=name: seen.setdefault(_n, _o(*a)))
    inputs = []
    method.foundation.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    terms = terms_of(method, batch)
    mixed, (inside, (labels, counted)) = inputs[1], seen.values()

    def probability(logits):
        up = finest(logits)
        if up.shape[2:] != batch.unlabelled.shape[2:]:
            up = method.foundation.at_patch_grid(up, batch.unlabelled.shape[2:])
        return up.sigmoid() if regions else up.softmax(1)

    # the pseudo-labels: alpha P_u + (1 - alpha) P_f
    with torch.no_grad():
        conventional = probability(method.teacher(batch.unlabelled))
        foundation = probability(method.foundation_teacher(batch.unlabelled))
        alpha = self_mutual_confidence(probability(method.student(batch.unlabelled)), conventional, foundation, regions)
        steady = self_mutual_confidence(conventional, conventional, foundation, regions)
    share = alpha.view(-1, *[1] * (conventional.ndim - 1))
    mean = share * conventional + (1 - share) * foundation
    assert torch.equal(labels, (mean > 0.5).long() if regions else mean.argmax(1, keepdim=True))
    sure = torch.maximum(mean, 1 - mean) if regions else mean.amax(1, keepdim=True)
    assert torch.equal(counted, sure >= method.settings.confidence) and 0 < counted.float().mean() < 1
    assert method.metrics["alpha"] == pytest.approx(float(alpha.mean())) and not torch.allclose(alpha, steady)

    # the patch: labelled within the box with its label, unlabelled outside
    target = batch.target[0] if isinstance(batch.target, list) else batch.target
    truth, known = (target[:, :-1], target[:, -1:] == 0) if regions and ignore is not None else \
        (target, torch.ones_like(target[:, :1]).bool() if ignore is None else target != ignore)
    assert torch.equal(mixed * inside, batch.labelled * inside)
    assert not torch.equal(mixed * ~inside, batch.unlabelled * ~inside)
    labels, counted = torch.where(inside, truth.long(), labels), torch.where(inside, known, counted)

    conventional_output, foundation_output = method.student(mixed), method.foundation(mixed)
    conventional, foundation = probability(conventional_output), probability(foundation_output)
    agree = (conventional > 0.5) == (foundation > 0.5) if regions else \
        conventional.argmax(1, keepdim=True) == foundation.argmax(1, keepdim=True)
    entropy = [-(p * p.log() + (1 - p) * (1 - p).log()) / 2 if regions else -p * p.log()
               for p in (conventional, foundation)]
    weights = method.context.scale_weights
    expected = {
        "supervised": method.context.supervised_loss(method.student(batch.labelled), batch.target),
        "supervised_foundation": naive_weighted_dice_ce([method.foundation(batch.labelled)], truth * known, known,
                                                        regions),
        "pseudo_label": naive_weighted_dice_ce(conventional_output if len(weights) > 1 else [conventional_output],
                                               labels * counted, counted, regions, weights),
        "pseudo_label_foundation": naive_weighted_dice_ce([foundation_output], labels * counted, counted, regions),
        "consensus": sum((e * agree).mean() for e in entropy) / 2,
        "divergence": ((conventional - foundation) ** 2 * ~agree).mean(),
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert torch.allclose(terms[name].value, value, rtol=1e-4, atol=1e-6), name
        assert terms[name].weight == 1.0 and terms[name].supervised == name.startswith("supervised")
    both = nn.ModuleList([method.student, method.foundation])
    shares = {name: number + 1.0 for number, name in enumerate(expected)}
    assert small.same_gradients(sum(shares[name] * terms[name].value for name in shares),
                                sum(shares[name] * expected[name] for name in shares), both)


def test_in_mixed_precision_terms_and_gradients_are_about_the_same(small, monkeypatch):
    method, batch = make(small, monkeypatch), small.batch(dims=2)
    gradients, values = [], []
    for enabled in (False, True):
        method.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            terms = terms_of(method, batch)
        sum(term.value for term in terms.values()).backward()
        values.append(torch.stack([term.value.detach().float() for term in terms.values()]))
        gradients.append(torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]))
    assert torch.allclose(*values, rtol=0.1, atol=0.01)
    assert gradients[0].dtype == gradients[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.95


def test_self_mutual_confidence_of_hand_made_masks():
    def decide(rows):
        return torch.nn.functional.one_hot(torch.tensor(rows), 2).movedim(-1, 1).float()
    student = decide([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    teacher = decide([[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    foundation = decide([[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]])
    # patch 0: 2 / 3 and 2 / 4; patch 1: nothing anywhere, nothing to doubt; patch 2: steady, but elsewhere
    alpha = self_mutual_confidence(student, teacher, foundation, regions=False)
    assert alpha.tolist() == pytest.approx([2 / 3 * 1 / 2, 1.0, 0.0])


def test_confidence_in_the_conventional_model_rises_with_its_agreement():
    torch.manual_seed(0)
    foundation = torch.randn(8, 3, 10, 10)
    noise = torch.randn(8, 3, 10, 10)
    values = [float(self_mutual_confidence((foundation + 0.1 * share * noise).softmax(1), (foundation + share * noise)
                                           .softmax(1), foundation.softmax(1), False).mean())
              for share in (2.0, 1.0, 0.5, 0.0)]
    assert values == sorted(values) and values[-1] == 1.0


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_fixed_alpha_is_the_ablation(small, monkeypatch, alpha):
    method, batch = make(small, monkeypatch, alpha=alpha), small.batch(dims=2)
    with torch.no_grad():
        conventional = method.teacher(batch.unlabelled).softmax(1)
        foundation = method.foundation.at_patch_grid(method.foundation_teacher(batch.unlabelled), (8, 8)).softmax(1)
    labels, _ = method._pseudo_labels(batch.unlabelled)
    assert torch.equal(labels, (alpha * conventional + (1 - alpha) * foundation).argmax(1, keepdim=True))


@pytest.mark.parametrize("settings, names", [
    ({}, ["supervised", "supervised_foundation", "pseudo_label", "pseudo_label_foundation", "consensus", "divergence"]),
    ({"consensus_weight": 0.0, "divergence_weight": 0.0},
     ["supervised", "supervised_foundation", "pseudo_label", "pseudo_label_foundation"]),
    ({"models": "conventional"}, ["supervised", "pseudo_label"]),
    ({"models": "foundation", "deploy": "foundation"}, ["supervised_foundation", "pseudo_label_foundation"]),
])
def test_ablations_switch_terms_off_and_train_what_they_say(small, monkeypatch, settings, names):
    method = make(small, monkeypatch, **settings)
    assert list(terms_of(method, small.batch(dims=2))) == names
    before = {name: value.clone() for name, value in method.state_dict().items() if isinstance(value, torch.Tensor)}
    step = TrainingStep(method, method.optimizers(0.01, 0.0, 10), None, torch.device("cpu"), seed=0, rank=0,
                        max_skipped_steps=1)
    step.run(small.batch(dims=2), 300, 0.5)
    moved = {name.split(".")[0] for name, value in method.state_dict().items()
             if name in before and not torch.equal(value, before[name])}
    both = {"student", "teacher", "foundation", "foundation_teacher"}
    assert moved == {"conventional": {"student", "teacher"}, "foundation": {"foundation", "foundation_teacher"}}.get(
        settings.get("models"), both)


def test_squared_difference_everywhere_is_the_ablation_of_cdcr(small, monkeypatch):
    method = make(small, monkeypatch, divergence_where="everywhere", consensus_weight=0.0)
    inputs = []
    method.foundation.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    term = terms_of(method, small.batch(dims=2))["divergence"]
    mixed = inputs[1]
    expected = ((method.student(mixed).softmax(1)
                 - method.foundation.at_patch_grid(method.foundation(mixed), (8, 8)).softmax(1)) ** 2).mean()
    assert torch.allclose(term.value, expected, rtol=1e-5)


@pytest.mark.parametrize("settings, progress, weight", [
    ({}, 0.1, math.exp(-5 * 0.25)), ({"ramp": "unsquared"}, 0.1, math.exp(-2.5)), ({"ramp_fraction": 1.0}, 0.5,
                                                                                  math.exp(-1.25)), ({}, 0.2, 1.0),
])
def test_all_unlabelled_terms_ramp_up_together(small, monkeypatch, settings, progress, weight):
    terms = terms_of(make(small, monkeypatch, progress=progress, **settings), small.batch(dims=2))
    assert [terms[n].weight for n in ("pseudo_label", "consensus", "divergence")] == pytest.approx([weight] * 3)
    assert terms["supervised_foundation"].weight == 1.0


def test_foundation_loss_at_the_grid_of_the_patch_is_the_option(small, monkeypatch, naive_weighted_dice_ce):
    method, batch = make(small, monkeypatch, foundation_loss="patch"), small.batch(dims=2)
    logits = method.foundation.at_patch_grid(method.foundation(batch.labelled), (8, 8))
    expected = naive_weighted_dice_ce([logits], batch.target, torch.ones_like(batch.target), False)
    assert torch.allclose(terms_of(method, batch)["supervised_foundation"].value, expected, rtol=1e-5)


def test_batches_of_other_sizes_and_one_patch(small, monkeypatch):
    method = make(small, monkeypatch)
    few, many = small.batch(dims=2, count=1), small.batch(dims=2, count=3)
    for labelled, unlabelled in ((few, many), (many, few), (few, few)):
        batch = type(few)(labelled.labelled, labelled.target, unlabelled.unlabelled)
        assert all(torch.isfinite(term.value) for term in terms_of(method, batch).values())


def test_no_labelled_box_where_channels_differ(small, monkeypatch):
    method, batch = make(small, monkeypatch), small.batch(dims=2)
    batch.unlabelled[:, 1] = -0.0
    assert not method._boxes(batch.labelled, batch.unlabelled).any()


def test_two_optimisers_with_their_own_schedules_and_clips(small, monkeypatch):
    method = make(small, monkeypatch, warmup_steps=10, foundation_lr=2e-4)
    first, second = method.optimizers(0.01, 3e-5, 4)
    assert isinstance(first.optimizer, torch.optim.SGD) and first.scheduled_every == "epoch"
    assert isinstance(second.optimizer, torch.optim.AdamW) and second.scheduled_every == "step"
    assert second.optimizer.param_groups[0]["weight_decay"] == 0.1
    assert second.optimizer.param_groups[0]["lr"] == pytest.approx(2e-5)
    assert first.gradient_clip == second.gradient_clip == 12
    assert second.schedule.steps == 4 * method.settings.num_iterations_per_epoch
    trained = {id(p) for p in second.parameters()}
    assert trained == {id(p) for p in method.foundation.head.parameters()}
    assert not trained & {id(p) for p in first.parameters()}


def test_frozen_weights_exist_once_and_in_no_checkpoint(small, monkeypatch):
    method = make(small, monkeypatch)
    assert method.foundation_teacher.network.encoder.weight is method.foundation.encoder.weight
    assert method.foundation_teacher.network.head.weight is not method.foundation.head.weight
    state = method.state_dict()
    assert not [name for name in state if "encoder.weight" in name and "foundation" in name]
    assert {"foundation.head.weight", "foundation_teacher.network.head.weight"} <= set(state)
    other = make(small, monkeypatch)
    with torch.no_grad():
        other.foundation.head.weight.zero_()
    other.load_state_dict(state)
    assert torch.equal(other.foundation.head.weight, method.foundation.head.weight)


def test_continuing_with_other_weights_of_the_foundation_model_is_refused(small, monkeypatch):
    state = make(small, monkeypatch, weights_sha256="aa").state_dict()
    make(small, monkeypatch, weights_sha256="aa").load_state_dict(state)
    with pytest.raises(UserError, match="SHA-256 aa"):
        make(small, monkeypatch, weights_sha256="bb").load_state_dict(state)


@pytest.mark.parametrize("deep_supervision", [False, True])
@pytest.mark.parametrize("deploy", ["conventional", "foundation", "ensemble"])
@pytest.mark.parametrize("weights", ["teacher", "student"])
def test_what_is_deployed(small, monkeypatch, deploy, weights, deep_supervision):
    method = make(small, monkeypatch, deploy=deploy, deploy_weights=weights, deep_supervision=deep_supervision)
    with torch.no_grad():
        for parameter in [*method.student.parameters(), *method.foundation.head.parameters()]:
            parameter.add_(0.1)
    image = small.batch(dims=2).unlabelled
    conventional, foundation = method.student, method.foundation
    if weights == "teacher":
        conventional, foundation = method.teacher.network, method.foundation_teacher.network
    with torch.no_grad():
        logits = conventional(image)
        scales = logits if deep_supervision else [logits]
        low = [foundation.at_patch_grid(foundation(image), scale.shape[2:]) for scale in scales]
        expected = {"conventional": scales, "foundation": [p.softmax(1) for p in low],
                    "ensemble": [(a.softmax(1) + b.softmax(1)) / 2 for a, b in zip(scales, low, strict=True)]}[deploy]
        deployed, parts = method.predictions(image)
    deployed = deployed if deep_supervision else [deployed]
    for ours, own in zip(deployed, expected, strict=True):
        assert torch.allclose(ours if deploy == "conventional" else ours.softmax(1), own, atol=1e-6)
    assert set(parts) == (set() if deploy == "conventional" else {"conventional", "foundation"})
    if deploy == "conventional":
        assert method.deployable() is conventional
        return
    (channels, state), = method.deployable().stock_networks().values()
    own = conventional.state_dict()
    assert channels == [0, 1] and state.keys() == own.keys() and all(torch.equal(state[k], own[k]) for k in own)


def test_an_untrained_conventional_network_is_neither_validated_nor_exported(small, monkeypatch):
    method = make(small, monkeypatch, models="foundation", deploy="foundation")
    deployed, parts = method.predictions(small.batch(dims=2).unlabelled)
    assert deployed.shape == (2, 3, 8, 8) and parts == {} and method.parts() == {}
    assert method.deployable().stock_networks() == {}


@pytest.mark.parametrize("settings, dims, message", [
    ({}, 2, "needs the weights"), ({"weights": "random"}, 3, "SAM takes 2D"),
    ({"weights": "random", "models": "foundation"}, 2, 'must have "deploy": "foundation"'),
    ({"models": "conventional", "deploy": "ensemble"}, 2, 'must have "deploy": "conventional"'),
    ({"weights": "random", "lora_rank": 0}, 2, "at least 1"),
    ({"weights": "random", "smallest_box": 0.5}, 2, "smallest_box of SynFoC, 0.5, is larger"),
])
def test_what_cannot_work_is_refused_before_anything_is_built(small, settings, dims, message):
    context = small.context()
    object.__setattr__(context, "patch_size", (8,) * dims)
    with pytest.raises(UserError, match=message):
        SynFoC.check(context, SynFoCSettings(**settings))


def test_a_folder_where_a_nnunet_checkpoint_must_be_is_refused_with_what_to_give(tmp_path):
    with pytest.raises(UserError, match=r"is a folder. Give a checkpoint of nnU-Net in it"):
        SynFoC.completed(SynFoCSettings(foundation="nnunet", weights=str(tmp_path)))


def test_a_changed_weights_file_is_refused_and_its_digest_goes_into_the_plans(tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    file.write_bytes(b"some weights")
    monkeypatch.chdir(tmp_path)
    done = SynFoC.completed(SynFoCSettings(weights="weights.pth"))
    assert len(done.weights_sha256) == 64 and done.weights == str(file.resolve()), "found from any folder"
    assert SynFoC.completed(done) == done
    file.write_bytes(b"other weights")
    with pytest.raises(UserError, match="not those that the plans file"):
        SynFoC.completed(done)
    with pytest.raises(UserError, match="no weights of a foundation model at"):
        SynFoC.completed(SynFoCSettings(weights=str(tmp_path / "nothing.pth")))


