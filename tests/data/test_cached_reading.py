import errno
import json
import os
from dataclasses import dataclass

import pytest

from nnunetv2_semi.data import cached_reading
from nnunetv2_semi.data.cached_reading import companion_files, file_stamp, read_cached


@dataclass
class Text:
    text: str


@pytest.fixture
def reading(tmp_path):
    """A function that reads files of the folder, and the names of those that it really read."""
    done = []

    def read(path):
        done.append(os.path.basename(path))
        with open(path) as file:
            return Text(file.read())

    def run(*names, reader="one", report=print):
        done.clear()
        return read_cached(
            [str(tmp_path / name) for name in names], read, lambda entry: Text(entry["text"]),
            made_by={"reader": reader}, raw_dataset_folder=str(tmp_path), cache_file=str(tmp_path / "cache.json"),
            num_processes=1, description="Reading", show_progress_bar=False, report=report)

    run.done = done
    return run


def test_a_file_is_read_once_and_again_by_another_reader(tmp_path, reading):
    (tmp_path / "a.tif").write_text("first")
    contents, _ = reading("a.tif")
    assert contents == {str(tmp_path / "a.tif"): Text("first")} and reading.done == ["a.tif"]
    assert reading("a.tif")[0] == contents and reading.done == []
    reading("a.tif", reader="another")
    assert reading.done == ["a.tif"]


@pytest.mark.parametrize("name, companion", [("a_0001.tif", "a.json"), ("a_0001.tif", "a_0001.json"),
                                             ("a.tiff", "a.json"), ("a.b_0000.nii.gz", "a.b.json")])
def test_a_file_is_read_again_when_its_companion_comes_changes_or_goes(tmp_path, reading, name, companion):
    (tmp_path / name).write_text("voxels")
    reading(name)
    for change in (lambda: (tmp_path / companion).write_text('{"spacing": [5, 1, 1]}'),
                   lambda: (tmp_path / companion).write_text('{"spacing": [2.5, 1, 1]}'),
                   lambda: (tmp_path / companion).unlink()):
        change()
        reading(name)
        assert reading.done == [name]
        reading(name)
        assert reading.done == []


def test_another_cases_companion_does_not_matter(tmp_path, reading):
    (tmp_path / "a_0000.tif").write_text("voxels")
    (tmp_path / "aa.json").write_text("{}")
    assert companion_files(str(tmp_path / "a_0000.tif")) == []


def test_a_link_that_leads_nowhere_is_a_file_that_cannot_be_read(tmp_path, reading):
    (tmp_path / "a.tif").symlink_to(tmp_path / "gone")
    contents, unreadable = reading("a.tif")
    assert contents == {} and "No such file" in unreadable[str(tmp_path / "a.tif")]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, reading, monkeypatch):
    (tmp_path / "a.tif").write_text("first")
    reading("a.tif")
    os.utime(tmp_path / "a.tif", ns=(1, 1))

    def refuse(path, content):
        raise OSError(errno.EROFS, "Read-only file system", path)

    monkeypatch.setattr(cached_reading, "write_json_whole", refuse)
    before, lines = json.loads((tmp_path / "cache.json").read_text()), []
    contents, unreadable = reading("a.tif", report=lines.append)
    assert contents == {str(tmp_path / "a.tif"): Text("first")} and unreadable == {}
    assert json.loads((tmp_path / "cache.json").read_text()) == before
    assert len(lines) == 1 and "cache.json cannot be written (OSError: [Errno 30] Read-only" in lines[0]


def test_the_stamp_of_a_file_without_companions_is_its_size_and_time(tmp_path):
    (tmp_path / "a.tif").write_text("12345")
    os.utime(tmp_path / "a.tif", ns=(7, 7))
    assert file_stamp(str(tmp_path / "a.tif")) == [5, 7]


def test_a_file_on_another_drive_is_cached_by_its_whole_path(tmp_path, reading, monkeypatch):
    (tmp_path / "a.tif").write_text("first")

    def other_drive(path, start):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")
    monkeypatch.setattr(cached_reading.os.path, "relpath", other_drive)
    contents, _ = reading("a.tif")
    assert reading("a.tif")[0] == contents and reading.done == []
    assert str(tmp_path / "a.tif") in (tmp_path / "cache.json").read_text()
