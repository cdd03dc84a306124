"""The script that measures the gradient of unlabelled terms, on a model that was trained."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gradient_share.py"


@pytest.mark.skipif(not SCRIPT.is_file(), reason="the benchmarks are part of the source tree alone")
def test_the_share_follows_the_weight_and_the_model_stays_as_it_is(tools, workspace):
    tools.set_semi(workspace, num_epochs=1, num_iterations_per_epoch=2)
    tools.trainer(workspace, "nnUNetTrainerSemiMeanTeacher").run_training()
    fold, = (workspace / "nnUNet_results").glob("*/*/fold_0")
    before = {path: path.stat().st_mtime_ns for path in fold.rglob("*")}

    def median(weight):
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(fold), "--batches", "3", "--set",
             f'{{"MeanTeacher": {{"consistency_weight": {weight}}}}}'],
            env=tools.environment(workspace), text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return float(re.search(r"^\| consistency \| ([\d.]+)", done.stdout, re.MULTILINE)[1])

    small, large = median(10.0), median(100.0)
    assert small > 0 and large == pytest.approx(10 * small, rel=0.02)
    assert before == {path: path.stat().st_mtime_ns for path in fold.rglob("*")}
