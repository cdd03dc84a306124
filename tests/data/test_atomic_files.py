import json
import os
from pathlib import Path
from unittest import mock

import pytest

from nnunetv2_semi.data.atomic_files import (
    read_json_object,
    remove_unfinished,
    whole_file,
    whole_folder,
    write_json_whole,
)


def test_the_older_file_stands_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with whole_file(path) as unfinished:
        assert os.path.dirname(unfinished) == str(tmp_path), "a rename across file systems is none"
        with open(unfinished, "w") as file:
            file.write("ne")
            file.flush()
            assert path.read_text() == "old"
            file.write("w")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("older", [None, "old"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_fails_changes_nothing_and_leaves_nothing(tmp_path, older, error):
    path = tmp_path / "file"
    if older is not None:
        path.write_text(older)
    with pytest.raises(error), whole_file(path) as unfinished:
        with open(unfinished, "w") as file:
            file.write("half")
        raise error
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == ({} if older is None else {"file": older})


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_older_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "old"


def test_missing_folders_are_made_and_a_bare_name_is_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (os.path.join("a", "b", "file"), "bare"):
        with whole_file(path) as unfinished, open(unfinished, "w") as file:
            file.write(path)
        assert (tmp_path / path).read_text() == path


def test_what_a_killed_process_left_can_be_removed_and_nothing_else(tmp_path):
    block = whole_file(tmp_path / "checkpoint_latest.pth")
    left = Path(block.__enter__())
    kept = ["checkpoint_latest.pth", ".checkpoint_latest.pth.bak", f"checkpoint_best.pth.{left.suffix[1:]}",
            f".plans.json.{left.suffix[1:]}"]
    for name in (left.name, *kept):
        (tmp_path / name).write_text("half")
    remove_unfinished(str(tmp_path), "checkpoint_")
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_what_is_renamed_is_on_the_disk(tmp_path):
    with mock.patch.multiple(os, fsync=mock.DEFAULT, replace=mock.DEFAULT) as calls:
        order = mock.Mock()
        for name, call in calls.items():
            order.attach_mock(call, name)
        with whole_file(tmp_path / "file") as unfinished:
            Path(unfinished).write_text("whole")
    assert [name for name, *_ in order.mock_calls] == ["fsync", "replace"]


def test_two_at_a_time_do_not_write_into_each_other(tmp_path):
    path = tmp_path / "file"
    with whole_file(path) as first, whole_file(path) as second:
        assert first != second
        for unfinished, text in ((first, "first"), (second, "second")):
            with open(unfinished, "w") as file:
                file.write(text)
    assert path.read_text() == "first", "the last to finish"
    assert os.listdir(tmp_path) == ["file"]


def test_unfinished_files_are_hidden_and_have_another_ending(tmp_path):
    """What lists cases or checkpoints by their ending must not meet them, nor those that a kill left."""
    with whole_file(tmp_path / "case.json") as unfinished:
        name = os.path.basename(unfinished)
        assert name.startswith(".") and not name.endswith(".json")
        with open(unfinished, "w"):
            pass


def test_json_comes_back_as_it_was_written(tmp_path):
    content = {"name": "Grün", "numbers": [1, 2.5, None], "nested": {"yes": True}}
    write_json_whole(str(tmp_path / "new" / "file.json"), content)
    assert read_json_object(str(tmp_path / "new" / "file.json")) == content


def test_what_json_cannot_hold_leaves_the_older_file(tmp_path):
    path = tmp_path / "file.json"
    write_json_whole(str(path), {"old": 1})
    with pytest.raises(TypeError):
        write_json_whole(str(path), {"first": 1, "then": object()})
    assert json.loads(path.read_text()) == {"old": 1} and os.listdir(tmp_path) == ["file.json"]


@pytest.mark.parametrize("content", [None, b"", b'{"half": ', b"[1, 2]", b"3", b"\xff\xfe{}"], ids=str)
def test_what_is_no_json_object_is_none(tmp_path, content):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    assert read_json_object(str(path)) is None


def test_a_folder_appears_when_all_is_in_it(tmp_path):
    target = tmp_path / "new" / "folder"
    with whole_folder(target) as unfinished:
        (Path(unfinished) / "a.txt").write_text("a")
        assert not target.exists() and Path(unfinished).name.startswith(".")
    assert [file.name for file in target.iterdir()] == ["a.txt"] and len(list(target.parent.iterdir())) == 1


def test_a_folder_that_is_not_finished_is_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "folder") as unfinished:
        (Path(unfinished) / "a.txt").write_text("a")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_only_an_empty_folder_gives_way(tmp_path):
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with whole_folder(tmp_path / "empty") as unfinished:
        (Path(unfinished) / "a.txt").write_text("a")
    with pytest.raises(OSError), whole_folder(tmp_path / "full"):
        pass
    assert (tmp_path / "empty" / "a.txt").is_file() and (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2
