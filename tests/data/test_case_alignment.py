"""Which cases of an alignment are done again."""

from types import SimpleNamespace

from nnunetv2_semi.data.alignment_source import SourceCase
from nnunetv2_semi.data.atomic_files import write_json_whole
from nnunetv2_semi.data.case_alignment import _record_file, _states, finished


def test_files_of_one_name_in_several_folders_are_told_apart(tmp_path):
    """A list in dataset.json may name such files."""
    options = SimpleNamespace(target=str(tmp_path / "aligned"))
    for folder in ("T1", "T2", "seg"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p1.nii.gz").write_text(folder)
    first, second, label = (str(tmp_path / folder / "p1.nii.gz") for folder in ("T1", "T2", "seg"))
    case = SourceCase("Tr", "p1", {0: first, 1: second}, label)

    def note():
        file = _record_file(case.split, case.name, options)
        tmp_path.joinpath("aligned", "alignment", "cases").mkdir(parents=True, exist_ok=True)
        write_json_whole(file, {"split": "Tr", "name": "p1", "modalities": [], "failure": "", "sources": _states(case)})

    note()
    assert finished(case, options) is not None
    assert finished(SourceCase("Tr", "p1", {0: second, 1: first}, label), options) is None, "channels swapped"
    (tmp_path / "T2" / "p1.nii.gz").write_text("another image")
    assert finished(case, options) is None
    note()
    assert finished(case, options) is not None
