import os
import pickle
import time
from dataclasses import replace

import pytest
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

from nnunetv2_semi.data import case_preprocessing
from nnunetv2_semi.data.case_preprocessing import PreprocessingJob, preprocess_missing
from nnunetv2_semi.data.case_records import CaseRecords
from nnunetv2_semi.data.file_contents import FileContent
from nnunetv2_semi.data.filling_preprocessor import FillingPreprocessor
from nnunetv2_semi.errors import UserError

CASES = ["a", "b", "c"]


class StandIn(DefaultPreprocessor):
    """Writes files of the names that nnU-Net's preprocessor gives them; what ``failures`` names fails in between."""

    failures = {}
    done = []

    def run_case_save(self, target, files, label, plans_manager, configuration_manager, dataset_json):
        case = os.path.basename(target)
        self.done.append(case)
        for ending in (".b2nd", "_seg.b2nd"):
            with open(target + ending, "w") as file:
                file.write(f"{case} of {[os.path.basename(path) for path in files]}")
        if case in self.failures:
            raise self.failures[case]
        with open(target + ".pkl", "wb") as file:
            pickle.dump({"spacing": [1.0]}, file)


class FillingStandIn(StandIn, FillingPreprocessor):
    """A stand-in that counts as one that can fill channels."""


@pytest.fixture(autouse=True)
def _nothing_done_yet(monkeypatch):
    monkeypatch.setattr(StandIn, "failures", {})
    monkeypatch.setattr(StandIn, "done", [])
    monkeypatch.setattr(case_preprocessing, "stored_image_problem", lambda folder, case: None)


class Cases:
    """Raw files of three cases with two channels, and the folder for what is made of them."""

    def __init__(self, tmp_path):
        self.folder, self.reported = tmp_path / "preprocessed", []
        self.folder.mkdir()
        self.files = {case: [str(tmp_path / f"{case}_{channel:04d}.nii.gz") for channel in range(2)] for case in CASES}
        self.contents = {}
        for file in (file for files in self.files.values() for file in files):
            with open(file, "w") as raw:
                raw.write(file)
            self.contents[file] = FileContent(file, False, (1, 2, 2, 2), (1.0, 1.0, 1.0))
        self.job = PreprocessingJob(None, None, {}, StandIn, str(self.folder))
        self.records = CaseRecords(str(self.folder), "digest")

    def preprocess(self, lacking=None, **changes):
        StandIn.done.clear()
        preprocess_missing(replace(self.job, **changes), self.files, self.contents, lacking or {}, self.records, 1,
                           False, self.reported.append)
        return list(StandIn.done)

    def done(self):
        return [case for case in CASES if self.records.is_done(case, [self.contents[f] for f in self.files[case]])]

    def unfinished(self):
        folder = self.folder / "unfinished"
        return sorted(os.listdir(folder)) if folder.exists() else []


@pytest.fixture
def raw(tmp_path):
    return Cases(tmp_path)


def test_what_is_missing_is_done_and_recorded_and_nothing_twice(raw):
    assert raw.preprocess() == CASES and raw.done() == CASES and raw.unfinished() == []
    assert raw.reported == [f"Preprocessing 3 of 3 unlabelled cases into {raw.folder}"]
    assert (raw.folder / "b.b2nd").read_text() == "b of ['b_0000.nii.gz', 'b_0001.nii.gz']"
    assert raw.preprocess() == [] and len(raw.reported) == 1
    (raw.folder / "b_seg.b2nd").unlink()
    assert raw.preprocess() == ["b"]
    assert raw.reported[1:] == [f"Preprocessing 1 of 3 unlabelled cases into {raw.folder}"]


def test_cases_get_the_key_that_nnunets_loader_reads_and_keep_the_others(raw):
    raw.preprocess()
    assert pickle.loads((raw.folder / "a.pkl").read_bytes()) == {"spacing": [1.0], "class_locations": {}}


def test_a_case_that_fails_is_named_when_the_others_are_done(raw):
    StandIn.failures = {"b": OSError(28, "No space left on device"), "c": ValueError("bad\nvoxels")}
    with pytest.raises(RuntimeError, match=r"failed for 2 .*b \(.*No space left on device.*c \(.*bad voxels"):
        raw.preprocess()
    assert raw.done() == ["a"] and raw.unfinished() == []
    assert sorted(name for name in os.listdir(raw.folder) if "." in name) == ["a.b2nd", "a.pkl", "a_seg.b2nd"]
    StandIn.failures = {}
    assert raw.preprocess() == ["b", "c"] and raw.done() == CASES


def test_a_case_whose_new_files_failed_does_not_count_as_done_with_the_old_ones(raw):
    raw.preprocess()
    changed = raw.files["a"][0]
    before = raw.contents[changed]
    raw.contents[changed] = replace(before, digest="another")
    StandIn.failures = {"a": OSError("full")}
    with pytest.raises(RuntimeError):
        raw.preprocess()
    raw.contents[changed] = before
    assert raw.done() == ["b", "c"]


def test_too_little_memory_stops_at_once(raw):
    StandIn.failures = {"a": MemoryError()}
    with pytest.raises(MemoryError):
        raw.preprocess()
    assert StandIn.done == ["a"] and raw.unfinished() == []


def test_what_killed_runs_left_is_removed_but_not_what_may_be_in_use(raw):
    for name, hours in (("old", 25), ("young", 23)):
        left = raw.folder / "unfinished" / name
        left.mkdir(parents=True)
        (left / "a.b2nd").write_text("half")
        then = time.time() - hours * 3600
        os.utime(left, (then, then))
    raw.preprocess()
    assert raw.unfinished() == ["young"] and raw.done() == CASES


def test_channels_that_cases_lack_need_a_preprocessor_that_fills_them(raw):
    with pytest.raises(UserError, match=r"1 unlabelled case\(s\) lack channels \(b\), and StandIn cannot fill them\. "
                                        "Write .*nnUNetPreprocessorSemi"):
        raw.preprocess({"b": [1]})
    assert StandIn.done == [] and raw.records.cases() == []
    assert raw.preprocess({"b": [1]}, preprocessor_class=FillingStandIn) == CASES
    assert raw.done() == ["a", "c"]
    assert raw.records.is_done("b", [raw.contents[file] for file in raw.files["b"]], [1])
    # nothing left to fill: any preprocessor will do
    assert raw.preprocess({"b": [1]}) == []


def test_a_preprocessor_that_nnunet_does_not_find_is_named(raw):
    class Configuration:
        preprocessor_class, preprocessor_name = None, "NoSuchPreprocessor"

    with pytest.raises(UserError, match="NoSuchPreprocessor.*doctor"):
        raw.preprocess(preprocessor_class=None, configuration_manager=Configuration())
    assert raw.records.cases() == []
