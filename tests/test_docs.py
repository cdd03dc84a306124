"""What the documentation says is so: its example trains, its tables are complete, its links and messages exist."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from torch import nn

import nnunetv2_semi
from nnunetv2_semi.commands.settings import page_with_tables
from nnunetv2_semi.losses.weighted_dice_ce import WeightedDiceCE
from nnunetv2_semi.methods.arrangement import Arrangement
from nnunetv2_semi.methods.bcp import BCP
from nnunetv2_semi.methods.contract import Batch, Context
from nnunetv2_semi.methods.cps import CPS
from nnunetv2_semi.methods.distillation import Distillation
from nnunetv2_semi.methods.fixmatch import FixMatch
from nnunetv2_semi.methods.fusion import Fusion
from nnunetv2_semi.methods.mass import MASS
from nnunetv2_semi.methods.mean_teacher import MeanTeacher
from nnunetv2_semi.methods.mix import Mix
from nnunetv2_semi.methods.rcps import RCPS
from nnunetv2_semi.methods.semi_cml import SemiCML
from nnunetv2_semi.methods.settings import Settings, settings_from_plan
from nnunetv2_semi.methods.supervised import Supervised
from nnunetv2_semi.methods.synfoc import SynFoC
from nnunetv2_semi.methods.uamt import UAMT
from nnunetv2_semi.trainer import nnUNetTrainerSemi
from nnunetv2_semi.training.step import TrainingStep

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
HEADS = 3


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text(page), re.DOTALL)


def rows(page: str, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without its first two rows."""
    section = text(page).split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def imported(source: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example(tmp_path, monkeypatch) -> ModuleType:
    """The method file of docs/add_a_method.md."""
    return imported(code_blocks("docs/add_a_method.md", "python")[0], "entropy_minimisation", tmp_path, monkeypatch)


def trained_step(method_class, regions: bool, one_pass: bool, semi: dict) -> tuple[dict[str, float], torch.Tensor]:
    """Names and values of the terms of one step, and all weights after it, from seeded weights and patches."""
    torch.manual_seed(0)
    network = PlainConvUNet(1, 2, [4, 8], nn.Conv2d, 3, [1, 2], 1, HEADS, 1, norm_op=nn.InstanceNorm2d,
                            nonlin=nn.LeakyReLU, deep_supervision=False)
    dice = {"batch_dice": False, "do_bg": regions, "smooth": 1e-5}
    loss: nn.Module = DC_and_BCE_loss({}, dice) if regions else DC_and_CE_loss(dice, {})
    context = Context(supervised_loss=loss, weighted_loss=WeightedDiceCE(regions, (1.0,), batch_dice=False),
                      regions=regions, ignore_label=None, spacing=(1.0, 1.0), modalities={"m": [0]},
                      arrangement=Arrangement(one_pass), scale_weights=(1.0,), patch_size=(8, 8), image_size=(8.0, 8.0),
                      num_channels=1, num_heads=HEADS, training_cases=lambda: iter(()), mirror_axes=(0, 1),
                      rotation=0.5, turned_in_plane=False, masked_channels=(), connected_classes=frozenset)
    method = method_class(network, settings_from_plan(method_class.Settings, semi, method_class.name), context)
    step = TrainingStep(method, method.optimizers(0.01, 3e-5, 10), None, torch.device("cpu"), seed=0, rank=0,
                        max_skipped_steps=1)
    target = torch.randint(0, HEADS, (2, 1, 8, 8)) if not regions else (torch.rand(2, HEADS, 8, 8) > 0.5).float()
    batch = Batch(torch.randn(2, 1, 8, 8), target, torch.randn(3, 1, 8, 8))
    terms, values = step.run(batch, step=0, progress=1.0)
    assert values["skipped_steps"] == 0
    return ({term.name: float(term.value) for term in terms},
            torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))


def test_example_method_is_one_short_file():
    source = code_blocks("docs/add_a_method.md", "python")[0]
    assert "class EntropyMinimisation(Method)" in source
    assert len(source.splitlines()) < 60


@pytest.mark.parametrize("regions", [False, True])
def test_example_method_learns_from_unlabelled_patches_in_both_arrangements(example, regions):
    method = example.EntropyMinimisation
    (terms, sequential), (_, joined), (_, control) = (
        trained_step(method, regions, one_pass, semi)
        for one_pass, semi in ((False, {}), (True, {}), (False, {"unlabelled_weight": 0})))
    assert list(terms) == ["supervised", "entropy"]
    assert 0 < terms["entropy"] <= math.log(2 if regions else HEADS) + 1e-6
    assert torch.allclose(sequential, joined, atol=1e-6)
    assert not torch.allclose(sequential, control, atol=1e-6)


def test_example_entropy_is_the_entropy(example):
    probability = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    expected = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    logits = probability.log().view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert example.mean_entropy(logits, regions=False).item() == pytest.approx(expected)
    binary = -(0.7 * math.log(0.7) + 0.3 * math.log(0.3))
    logit = torch.full((2, 3, 4, 4), math.log(0.7 / 0.3), dtype=torch.float64)
    assert example.mean_entropy(logit, regions=True).item() == pytest.approx(binary)


def test_example_trainer_names_the_example_method(example, tmp_path, monkeypatch):
    name = "nnUNetTrainerSemiEntropy"
    module = imported(code_blocks("docs/add_a_method.md", "python")[1], name, tmp_path, monkeypatch)
    trainer = getattr(module, name)
    assert issubclass(trainer, nnUNetTrainerSemi)
    assert trainer.method_class is example.EntropyMinimisation


METHODS = [Mix, Supervised, SemiCML, MeanTeacher, RCPS, MASS, UAMT, FixMatch, CPS, BCP, SynFoC, Fusion, Distillation]


def test_settings_tables_are_what_the_command_writes():
    page = text("docs/settings.md")
    assert page_with_tables(page) == page, "renew it: nnunetv2_semi settings --write docs/settings.md"


@pytest.mark.parametrize("heading, settings", [("All trainers", Settings),
                                               *((f"`{method.name}`", method.Settings) for method in METHODS)])
def test_settings_tables_list_every_setting_with_its_default(heading, settings):
    common = {name: field.default for name, field in Settings.model_fields.items()}
    fields = {name: field.default for name, field in settings.model_fields.items()
              if settings is Settings or name not in common or common[name] != field.default}
    documented = {row[0].strip("`"): json.loads(row[1].strip("`")) for row in rows("docs/settings.md", heading)}
    assert documented == fields


@pytest.mark.parametrize("page", ["README.md", "docs/settings.md"])
def test_settings_shown_are_accepted(page):
    block = next(block for block in code_blocks(page, "json") if '"3d_fullres"' in block)
    shown = json.loads("{" + block + "}")
    semi = shown.get("configurations", shown)["3d_fullres"]["semi"]
    for method in METHODS:
        settings = settings_from_plan(method.Settings, semi, method.name)
        assert settings.num_epochs == semi["num_epochs"] != Settings().num_epochs


def test_trainers_are_all_in_the_readme():
    for file in (ROOT / "trainers").glob("nnUNetTrainer*.py"):
        assert f"| `{file.stem}` |" in text("README.md")


def literals(file: Path) -> list[str]:
    """Strings of a module but its docstrings; of f-strings the constant pieces."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return [node.value for node in nodes
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings]


def test_messages_in_the_troubleshooting_table_exist():
    folders = [Path(nnunetv2_semi.__file__).parent, ROOT / "planners", ROOT / "trainers"]
    strings = [string for folder in folders for file in folder.rglob("*.py") for string in literals(file)]
    foreign = {"Could not find requested nnunet trainer", "operator torchvision::nms does not exist",
               "CUDA out of memory", "labelsTr/... does not exist", "background worker is 6 feet under",
               "is out of bounds for axis 0"}
    messages = {row[0].strip("`") for row in rows("README.md", "Troubleshooting")}
    assert foreign < messages
    found = {message: sum(message in string for string in strings) for message in messages - foreign}
    assert [message for message, count in found.items() if not count] == [], "said by no module"
    assert [message for message, count in found.items() if count > 5] == [], "too short to tell what is meant"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
               if not target.startswith(("http:", "https:", "#"))]
    assert [target for target in targets if not (page.parent / target).exists()] == []
