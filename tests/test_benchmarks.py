"""The benchmark scripts run, at tiny sizes, and what they show does not depend on the machine's speed."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = ("alignment", "area_similarity", "cost_volume", "fused_branches", "gradient_share", "loader", "memory",
           "step", "synfoc", "voxel_contrast")

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the benchmarks are part of the source tree alone")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, fingerprints_of_few_voxels: None):
    """Imports a script as if it was run from its folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def rows(output: str, first: str) -> list[list[str]]:
    """The cells of table lines whose first cell starts with ``first``."""
    lines = [re.split(r"\s*\|\s*", line.strip("| ")) for line in output.splitlines() if line.startswith("|")]
    return [cells for cells in lines if cells[0].startswith(first)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_explains_its_options(script, capsys, name):
    with pytest.raises(SystemExit) as ended:
        script(name).main(["--help"])
    assert ended.value.code == 0
    assert "--seed" in capsys.readouterr().out


def test_the_largest_allocation_and_the_peak_are_counted(script):
    with script("measuring").Allocations() as memory:
        kept = torch.zeros(1000)
        del kept
        first, second = torch.zeros(3000), torch.zeros(2000)
    assert memory.largest == 3000 * 4
    assert memory.peak == 5000 * 4
    assert len(first) + len(second) == 5000


def test_tensors_saved_for_the_backward_pass_are_counted(script):
    inputs = torch.rand(5000, requires_grad=True)
    with script("measuring").Allocations() as memory:
        output = inputs.exp().exp().exp()
    assert memory.peak == 3 * 5000 * 4
    assert output.requires_grad


def test_functions_are_timed_in_turn(script):
    calls: list[str] = []
    times = script("measuring").alternately({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert set(times) == {"a", "b"} and times["a"].wall >= 0


def test_displaced_images_of_a_phantom_are_found(script, capsys):
    script("alignment").main(["--trials", "2", "--shape", "40", "48"])
    output = capsys.readouterr().out
    assert rows(output, "2 of 2") and "not recovered" not in output


def test_the_contrast_equals_the_broadcast_form_without_a_tensor_of_all_pairs(script, capsys):
    script("area_similarity").main(["--areas", "12", "--side", "16", "--channels", "2", "--rounds", "1"])
    output = capsys.readouterr().out
    differences = re.search(r"values differ by (\S+), gradients by (\S+) of", output)
    assert differences is not None and all(float(value) < 1e-9 for value in differences.groups())
    ours, broadcast = rows(output, "ours")[0], rows(output, "broadcast")[0]
    assert float(broadcast[4].split()[0]) > 5 * float(ours[4].split()[0])


def test_the_voxel_contrast_equals_the_direct_form_in_less_memory(script, capsys):
    script("voxel_contrast").main(["--shape", "6", "6", "4", "--channels", "8", "--negatives", "20", "--classes", "3"])
    output = capsys.readouterr().out
    differences = re.search(r"values differ by (\S+), gradients by (\S+) of", output)
    assert differences is not None and all(float(value) < 1e-4 for value in differences.groups())
    assert rows(output, "ours")[0][5] == rows(output, "direct")[0][5]


@pytest.mark.parametrize("shape", [("8", "9", "10"), ("20", "24")])
def test_the_cost_volume_equals_the_loop_over_shifts_in_less_memory(script, capsys, shape):
    script("cost_volume").main(["--shape", *shape, "--channels", "8", "--rounds", "1"])
    output = capsys.readouterr().out
    differences = re.search(r"values differ by (\S+), gradients by (\S+) of", output)
    assert differences is not None and all(float(value) < 1e-5 for value in differences.groups())
    ours, loop = rows(output, "ours")[0], rows(output, "loop")[0]
    assert ours[1] == ours[4] == "1.0 x" and loop[3].endswith("MiB")


def test_the_passes_of_a_step_are_counted(script, capsys):
    chosen = ["Mean Teacher, sequential", "Semi-CML stage 1, sequential", "Semi-CML stage 1, one_pass",
              "RCPS, sequential", "RCPS, one_pass", "MASS, sequential", "MASS, one_pass"]
    script("step").main(["--rounds", "1", "--shape", "16", "16", "16", "--only", *chosen])
    output = capsys.readouterr().out
    passes = {name: rows(output, name)[0][1:4] for name in ["nnU-Net's own", *chosen]}
    assert passes["nnU-Net's own"] == ["1", "1", "1.00"]
    assert passes["Mean Teacher, sequential"] == ["3", "2", "2.33"]
    # two branches, each labelled and unlabelled; sequentially the unlabelled passes are computed twice
    assert passes["Semi-CML stage 1, sequential"] == ["6", "4", "4.67"]
    assert passes["Semi-CML stage 1, one_pass"] == ["4", "4", "4.00"]
    # three versions of two streams; backward from the logits of all but the unlabelled original version
    assert passes["RCPS, sequential"] == ["12", "5", "7.33"]
    assert passes["RCPS, one_pass"] == ["6", "5", "5.33"]
    # labelled, unlabelled and two atlases; sequentially the last three are computed twice
    assert passes["MASS, sequential"] == ["7", "4", "5.00"]
    assert passes["MASS, one_pass"] == ["4", "4", "4.00"]


def test_the_passes_of_both_models_of_synfoc_are_counted(script, capsys):
    chosen = ["SynFoC, conventional model alone", "SynFoC, nnU-Net as foundation model alone",
              "SynFoC, nnU-Net as foundation model"]
    script("synfoc").main(["--rounds", "1", "--shape", "16", "16", "--only", *chosen])
    output = capsys.readouterr().out
    passes = {name: next(row[1:3] for row in rows(output, name) if row[0] == name) for name in chosen}
    # labelled, mixed, and the teacher's; both models together: the conventional student once more
    assert passes[chosen[0]] == passes[chosen[1]] == ["3", "2"]
    assert passes[chosen[2]] == ["7", "4"]


def test_methods_need_little_more_memory_than_nnunet_with_its_own_plans(script, capsys):
    chosen = ["Mean Teacher, sequential", "Mix, sequential", "Semi-CML stage 1, sequential",
              "Semi-CML PReL with self, sequential", "RCPS, sequential", "Semi-CML stage 1, one_pass"]
    script("memory").main(["--features", "4", "--gpu-memory", "0.02", "--image-side", "48", "--only", *chosen])
    first, second = capsys.readouterr().out.split("\n2. ")
    ratios = [float(row[2]) for name in chosen[:5] for row in rows(first, name)]
    assert len(ratios) == 5 and 1.0 < min(ratios) and max(ratios[:4]) < 1.6
    assert ratios[4] < 2.2  # six maps of four classes beside features of four channels
    joined = float(rows(second, chosen[5])[0][4])
    assert joined <= 1.0


def test_our_stream_is_measured_beside_nnunets_own(script, capsys):
    script("loader").main(["--workers", "1", "--batches", "2", "--rounds", "1", "--shape", "16", "16", "16"])
    output = capsys.readouterr().out
    assert [row[0] for row in rows(output, "nnU-Net,") + rows(output, "ours")] == [
        "nnU-Net, labelled", "ours, labelled", "ours, labelled + unlabelled"]
    assert all(float(row[1].split()[0]) > 0 for row in rows(output, "ours"))


@pytest.mark.parametrize("patch", [(32, 32), (16, 16, 16)])
def test_fused_branches_need_more_than_one_network_and_less_than_two(script, capsys, patch):
    script("fused_branches").main(["--patch", *map(str, patch), "--features", "4", "--stages", "3", "--rounds", "1"])
    printed = capsys.readouterr().out
    memory = [float(cells[3]) for first in ("one network", "2 encoders", "the same") for cells in rows(printed, first)]
    assert len(memory) == 4 and memory[0] == 1.0 and 1.0 < memory[1] < 2.0 and memory == sorted(memory)
