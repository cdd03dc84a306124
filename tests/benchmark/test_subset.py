from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_semi import cli
from nnunetv2_semi.benchmark.datasets import case_choice, raw_datasets, source_cases, subset
from nnunetv2_semi.data.phantom import make_phantom_dataset
from nnunetv2_semi.doctor.checks import Check, Level
from nnunetv2_semi.doctor.dataset import check_dataset

SHAPE = (12, 12, 12)
ENDING = ".nii.gz"
# Classes of each case; 4 occurs in two cases, 5 in one.
PATTERN = [{1, 2, 3}] * 8 + [{1, 2}] * 2 + [{1, 4}, {2, 4}, {1, 5}] + [{1}] * 7
LABELS = {"background": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnUNet_raw, empty; labels are read in this process."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setattr(source_cases, "default_processes", lambda: 1)
    return tmp_path / "nnUNet_raw"


def write(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path))


def make_source(
    raw: Path, pattern: Iterable[set[int]] = PATTERN, channels: int = 1, test: int = 0, unlabelled: int = 0,
    **changes: object,
) -> Path:  # fmt: skip
    """Dataset007_Mine with the given classes in its cases."""
    folder = raw / "Dataset007_Mine"
    rng = np.random.default_rng(0)

    def write_case(split: str, case: str, values: Iterable[int]) -> None:
        for channel in range(channels):
            image = rng.normal(size=SHAPE).astype(np.float32)
            write(folder / f"images{split}" / f"{case}_{channel:04d}{ENDING}", image)
        label = np.zeros(SHAPE, np.uint8)
        for value in values:
            label[2 * value - 1 : 2 * value, 2:6, 2:6] = value
        if split != "Un":
            write(folder / f"labels{split}" / f"{case}{ENDING}", label)

    pattern = list(pattern)
    for index, values in enumerate(pattern):
        write_case("Tr", f"case_{index:02d}", values)
    for index in range(test):
        write_case("Ts", f"test_{index}", {1, 2})
    for index in range(unlabelled):
        write_case("Un", f"un_{index}", {})
    content = {
        "channel_names": {str(channel): f"MR{channel}" for channel in range(channels)},
        "labels": LABELS,
        "numTraining": len(pattern),
        "file_ending": ENDING,
    }
    (folder / "dataset.json").write_text(json.dumps(content | changes))
    return folder


def command(*arguments: object) -> int:
    return cli.main(["subset", "-d", "7", *map(str, arguments)])


def made(raw: Path) -> dict[str, Path]:
    """New data sets by the end of their name, such as 5pct."""
    return {path.name.split("_labeled")[1]: path for path in sorted(raw.glob("Dataset*_labeled*"))}


def record(folder: Path) -> dict:
    return json.loads((folder / "subset.json").read_text())


def cases(folder: Path, name: str) -> list[str]:
    crop = len(ENDING) + (5 if name.startswith("images") else 0)
    return sorted({path.name[:-crop] for path in (folder / name).glob("*")})


def contents(raw: Path) -> dict[str, dict]:
    return {name: record(folder) for name, folder in made(raw).items()}


def again(raw: Path, *arguments: object) -> dict[str, dict]:
    """Records of the data sets that the command makes in place of those there."""
    for folder in made(raw).values():
        shutil.rmtree(folder)
    assert command(*arguments) == 0
    return contents(raw)


def assert_refused(capsys: pytest.CaptureFixture[str], raw: Path, arguments: Iterable[object], *words: object) -> None:
    """The command ends with a message, and writes nothing."""
    before = sorted(raw.rglob("*"))
    assert command(*arguments) == 1
    error = capsys.readouterr().err
    assert [str(word) for word in words if str(word) not in error] == [], error
    assert sorted(raw.rglob("*")) == before


def problems(dataset: Path) -> list[Check]:
    return [check for check in check_dataset(dataset.name) if check.level is Level.PROBLEM]


def test_a_part_stays_labelled_and_the_others_lose_their_labels(raw: Path) -> None:
    source = make_source(raw, channels=2, unlabelled=2, semi={"modalities": {"MR": [0, 1]}}, numTest=3)
    assert command("--labeled", "20%", 5, "--test", 4) == 0
    assert [path.name for path in made(raw).values()] == ["Dataset008_Mine_labeled20pct", "Dataset009_Mine_labeled5"]
    for folder, count in zip(made(raw).values(), (3, 5), strict=True):
        entry = record(folder)
        labelled, unlabelled, test = (entry[group] for group in ("labelled", "unlabelled", "test"))
        assert len(labelled) == count and len(unlabelled) == 16 - count + 2 and len(test) == 4
        assert cases(folder, "imagesTr") == cases(folder, "labelsTr") == labelled
        assert cases(folder, "imagesTs") == cases(folder, "labelsTs") == test
        assert cases(folder, "imagesUn") == unlabelled
        assert sorted([*labelled, *unlabelled, *test]) == sorted([*cases(source, "imagesTr"), "un_0", "un_1"])
        content = json.loads((folder / "dataset.json").read_text())
        expected = json.loads((source / "dataset.json").read_text())
        assert content == {key: expected[key] for key in expected if key != "numTest"} | {"numTraining": count}
        assert entry["source"] == source.name


def test_the_record_says_where_every_link_leads(raw: Path) -> None:
    source = make_source(raw, channels=2)
    assert command("--labeled", 4, "--test", 4, "--seed", 3) == 0
    folder = made(raw)["4"]
    links = {str(path.relative_to(folder)): os.readlink(path) for path in folder.rglob("*") if path.is_symlink()}
    assert links == record(folder)["links"]
    for link, original in links.items():
        assert os.path.isabs(original) and Path(original).is_file() and Path(original).parent.parent == source
        assert Path(original).name == Path(link).name
    assert record(folder)["options"] == {"labeled": "4", "test": "4", "seed": 3}


@pytest.mark.parametrize("listed", [False, True])
def test_cases_keep_the_channels_they_have(raw: Path, listed: bool) -> None:
    source = make_source(raw, channels=2, unlabelled=2)
    for index in range(20):
        if index % 3:
            (source / "imagesTr" / f"case_{index:02d}_{index % 3 - 1:04d}{ENDING}").unlink()
    (source / "imagesUn" / f"un_1_0000{ENDING}").unlink()
    files = {path.name for folder in ("imagesTr", "imagesUn") for path in (source / folder).iterdir()}
    if listed:
        content = json.loads((source / "dataset.json").read_text())
        content["dataset"] = {
            case: {
                "images": [f"imagesTr/{path.name}" for path in sorted((source / "imagesTr").glob(f"{case}_*"))],
                "label": f"labelsTr/{case}{ENDING}",
            }
            for case in cases(source, "imagesTr")
        }
        (source / "dataset.json").write_text(json.dumps(content))
    assert command("--labeled", 5, "--test", 4) == 0
    folder = made(raw)["5"]
    links = record(folder)["links"]
    images = {name.split("/")[1]: original for name, original in links.items() if name.startswith("images")}
    assert set(images) == files
    assert all(Path(original).name == name for name, original in images.items())


@pytest.mark.parametrize("hard", [False, True])
def test_labels_of_unlabelled_cases_are_nowhere(raw: Path, monkeypatch: pytest.MonkeyPatch, hard: bool) -> None:
    source = make_source(raw, unlabelled=2)
    if hard:
        forbid_symlinks(monkeypatch)
    assert command("--labeled", "10%", "50%", "--test", "20%") == 0
    for folder in made(raw).values():
        hidden = {
            path.stat().st_ino
            for path in (source / "labelsTr").iterdir()
            if path.name.removesuffix(ENDING) in record(folder)["unlabelled"]
        }
        assert len(hidden) == len(record(folder)["unlabelled"]) - 2
        # stat follows links; links to folders would hide what is in them
        files = [path for path in folder.rglob("*") if not path.is_dir()]
        assert not any(path.is_symlink() and path.is_dir() for path in folder.rglob("*"))
        assert hidden.isdisjoint(path.stat().st_ino for path in files)
        texts = [path.read_text() for path in files if path.suffix == ".json"]
        assert not any(f"labelsTr/{case}{ENDING}" in text for case in record(folder)["unlabelled"] for text in texts)


def test_sets_are_nested_and_do_not_depend_on_each_other(raw: Path) -> None:
    make_source(raw)
    together = again(raw, "--labeled", "50%", "5%", "20%", 9, "--test", 4)
    labelled = sorted((set(entry["labelled"]) for entry in together.values()), key=len)
    assert [len(group) for group in labelled] == [1, 3, 8, 9]
    assert all(small < large for small, large in zip(labelled, labelled[1:], strict=False))
    assert len({tuple(entry["test"]) for entry in together.values()}) == 1
    for fraction, name in (("5%", "5pct"), ("20%", "20pct"), ("9", "9")):
        alone = again(raw, "--labeled", fraction, "--test", 4)
        assert alone[name]["links"] == together[name]["links"]


def test_the_choice_depends_on_the_seed_and_not_on_the_file_system(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_source(raw)
    first = again(raw, "--labeled", 5, "--test", 4)["5"]
    listdir, rng = os.listdir, random.Random(1)

    def disordered(folder: str = ".") -> list[str]:
        names = listdir(folder)
        rng.shuffle(names)
        return names

    monkeypatch.setattr(os, "listdir", disordered)
    assert again(raw, "--labeled", 5, "--test", 4)["5"] == first
    other = again(raw, "--labeled", 5, "--test", 4, "--seed", 1)["5"]
    assert other["labelled"] != first["labelled"] and other["test"] != first["test"]


def test_data_sets_of_one_group_have_the_same_test_cases(raw: Path) -> None:
    make_source(raw, test=2)
    test_cases: dict[str, set[tuple[str, ...]]] = {}
    for choice in ([], ["--test", 4], ["--test", "20%"], ["--test", 5]):
        for seed in (0, 1):
            for entry in again(raw, "--labeled", 3, 5, "--seed", seed, *choice).values():
                test_cases.setdefault(entry["group"], set()).add(tuple(entry["test"]))
    assert {len(found) for found in test_cases.values()} == {1}
    # the source's own, and two numbers for two seeds
    assert len(test_cases) == 5 and test_cases["Dataset007_Mine"] == {("test_0", "test_1")}


@pytest.mark.parametrize("seed", range(5))
def test_rare_classes_are_labelled_and_tested(raw: Path, seed: int) -> None:
    make_source(raw)
    entry = again(raw, "--labeled", 3, "--test", 3, "--seed", seed)["3"]
    assert entry["cases_per_class"]["labelled"]["five"] == 1
    assert entry["cases_per_class"]["labelled"]["four"] == entry["cases_per_class"]["test"]["four"] == 1
    assert entry["classes_without_case"] == {"labelled": [], "test": ["five"]}


def test_classes_that_cannot_be_covered_are_named(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_source(raw, labels=LABELS | {"nowhere": 6})
    assert command("--labeled", 1, "--test", 3) == 0
    assert record(made(raw)["1"])["classes_without_case"]["labelled"] == ["four", "five", "nowhere"]
    output = capsys.readouterr().out
    assert "four, five, nowhere" in output and "No test case has five, nowhere." in output
    assert "nnUNetv2_plan_and_preprocess -d 8 -pl nnUNetPlannerSemi" in output


def random_classes(seed: int) -> Mapping[str, frozenset[str]]:
    rng = random.Random(seed)
    frequency = {name: rng.random() ** 3 for name in "abcdefgh"}
    return {
        f"case_{index}": frozenset(name for name in frequency if rng.random() < frequency[name]) for index in range(30)
    }


@pytest.mark.parametrize("seed", range(20))
def test_no_class_is_lost_to_training_and_every_class_is_labelled_in_time(seed: int) -> None:
    classes = random_classes(seed)
    everywhere = frozenset().union(*classes.values())
    test = case_choice.choose_test_cases(classes, 10, seed)
    training = {case: found for case, found in classes.items() if case not in test}
    assert len(set(test)) == 10
    assert frozenset().union(*training.values()) == everywhere
    twice = {name for name in everywhere if sum(name in found for found in classes.values()) > 1}
    assert frozenset().union(*(classes[case] for case in test)) >= twice
    order = case_choice.labelling_order(training, seed)
    assert sorted(order) == sorted(training)
    assert frozenset().union(*(classes[case] for case in order[: len(everywhere)])) == everywhere


def test_cases_are_equally_likely_where_classes_do_not_decide() -> None:
    classes = {f"case_{index}": frozenset("ab") for index in range(10)}
    first = [case_choice.labelling_order(classes, seed)[0] for seed in range(1000)]
    assert all(60 < first.count(case) < 140 for case in classes)


def test_a_subset_of_a_subset_links_to_the_first_originals(raw: Path) -> None:
    source = make_source(raw)
    assert command("--labeled", 5, "--test", 4) == 0
    assert cli.main(["subset", "-d", "8", "--labeled", "2"]) == 0
    first, second = record(raw / "Dataset008_Mine_labeled5"), record(raw / "Dataset009_Mine_labeled5_labeled2")
    assert set(second["labelled"]) < set(first["labelled"]) and second["test"] == first["test"]
    assert sorted(second["labelled"] + second["unlabelled"]) == sorted(first["labelled"] + first["unlabelled"])
    assert {Path(original).parent.parent for original in second["links"].values()} == {source}


def test_the_upper_bound_has_no_unlabelled_cases(raw: Path) -> None:
    make_source(raw)
    assert command("--labeled", "100%", "50%", "--test", 4) == 0
    folder = made(raw)["100pct"]
    assert len(record(folder)["labelled"]) == 16 and record(folder)["unlabelled"] == []
    assert not (folder / "imagesUn").exists()
    assert record(folder)["test"] == record(made(raw)["50pct"])["test"]


def test_test_cases_of_the_source_are_linked_through(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_source(raw, test=3)
    (source / "labelsTs" / f"test_2{ENDING}").unlink()
    assert command("--labeled", 5) == 0
    folder = made(raw)["5"]
    assert cases(folder, "imagesTs") == cases(folder, "labelsTs") == record(folder)["test"] == ["test_0", "test_1"]
    assert len(record(folder)["labelled"]) + len(record(folder)["unlabelled"]) == 20
    assert again(raw, "--labeled", 5, "--test", 2)["5"]["test"] != ["test_0", "test_1"]
    capsys.readouterr()
    shutil.rmtree(source / "labelsTs")
    assert again(raw, "--labeled", 5)["5"]["test"] == []
    assert "There are no test cases" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [{}, {"regions": True}, {"ignore_label": True}, {"channels": 1}])
def test_doctor_passes_and_nnunet_reads_the_links(raw: Path, kind: dict) -> None:
    make_phantom_dataset(raw, 7, labelled=8, unlabelled=2, test=0, shape=(12, 12, 14), **kind)
    assert command("--labeled", 2, "100%", "--test", 2, "--ids", 511, 512) == 0
    for folder in made(raw).values():
        assert problems(folder) == []
        expected = {"label 1", "label 2"} if "regions" in kind else {"liver", "kidney"}
        assert expected <= set(record(folder)["cases_per_class"]["labelled"])
        assert "ignore" not in record(folder)["cases_per_class"]["labelled"]
    listed = get_filenames_of_train_images_and_targets(str(made(raw)["2"]))
    assert len(listed) == 2
    for case in listed.values():
        shape, spacing, intensities, *_ = DatasetFingerprintExtractor.analyze_case(
            case["images"], case["label"], SimpleITKIO
        )
        assert max(shape) <= 14 and list(spacing) == [2, 2, 2] and len(intensities) == len(case["images"])


def test_labels_are_read_in_parallel(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_source(raw, PATTERN[8:14])
    monkeypatch.setattr(source_cases, "default_processes", lambda: 2)
    assert command("--labeled", 3) == 0
    assert record(made(raw)["3"])["cases_per_class"]["labelled"]["five"] == 1


def test_files_listed_in_dataset_json_are_found(raw: Path, tmp_path: Path) -> None:
    source = make_source(raw, PATTERN[:6], channels=2)
    listed: dict[str, dict] = {}
    for index in range(6):
        for channel, modality in enumerate(("T1", "T2")):
            image = tmp_path / "elsewhere" / modality / f"p{index}{ENDING}"
            image.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(source / "imagesTr" / f"case_{index:02d}_{channel:04d}{ENDING}", image)
            listed.setdefault(f"p{index}", {"images": []})["images"].append(str(image))
        listed[f"p{index}"]["label"] = f"labelsTr/case_{index:02d}{ENDING}"
    path = source / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dataset": listed}))
    assert command("--labeled", 2) == 0
    folder = made(raw)["2"]
    assert "dataset" not in json.loads((folder / "dataset.json").read_text())
    case = record(folder)["labelled"][0]
    assert os.readlink(folder / "imagesTr" / f"{case}_0001{ENDING}") == listed[case]["images"][1]
    assert os.readlink(folder / "labelsTr" / f"{case}{ENDING}") == str(source / listed[case]["label"])
    assert problems(folder) == []


def test_voxel_sizes_of_tiff_files_are_linked_too(raw: Path) -> None:
    folder = raw / "Dataset007_Tiff"
    for index in range(4):
        for name in (f"imagesTr/case_{index}_0000.tif", f"labelsTr/case_{index}.tif"):
            voxels = np.random.default_rng(index).integers(0, 2, SHAPE).astype(np.uint8)
            write(folder / name, voxels)
            spacing = folder / name.split("/")[0] / f"case_{index}.json"
            spacing.write_text('{"spacing": [2, 1, 1]}')
    content = {"channel_names": {"0": "EM"}, "labels": {"background": 0, "one": 1}, "file_ending": ".tif"}
    (folder / "dataset.json").write_text(json.dumps(content | {"numTraining": 4}))
    assert command("--labeled", 1) == 0
    new = made(raw)["1"]
    for group, folders in {"labelled": ("imagesTr", "labelsTr"), "unlabelled": ("imagesUn",)}.items():
        for name in folders:
            found = {path.name for path in (new / name).iterdir() if path.suffix == ".json"}
            assert found == {f"{case}.json" for case in record(new)[group]}


def forbid_symlinks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(original: str, link: str) -> None:
        raise OSError("A required privilege is not held by the client")

    monkeypatch.setattr(os, "symlink", refuse)


def test_hard_links_are_made_where_symbolic_ones_are_not_permitted(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_source(raw)
    forbid_symlinks(monkeypatch)
    assert command("--labeled", 5) == 0
    for link, original in record(made(raw)["5"])["links"].items():
        path = made(raw)["5"] / link
        assert path.samefile(original) and not path.is_symlink()
    assert problems(made(raw)["5"]) == []


def test_where_nothing_can_be_linked_nothing_is_made(
    raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_source(raw)
    forbid_symlinks(monkeypatch)

    def fail(original: str, link: str) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", fail)
    assert_refused(capsys, raw, ["--labeled", 5], "privilege", "cross-device", "developer mode")


def test_a_folder_that_cannot_be_written_is_named(
    raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_source(raw, PATTERN[:4])

    def full(original: str, link: str) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(raw_datasets, "make_link", full)
    assert_refused(capsys, raw, ["--labeled", 2], f"The new data sets cannot be written to {raw}", "No space left")


def test_too_few_free_ids_are_told(
    raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_source(raw, PATTERN[:4])
    monkeypatch.setattr(subset, "free_ids", lambda after, count: [999])
    assert_refused(capsys, raw, ["--labeled", 1, 2], "There are not 2 free ids from 8 to 999: give --ids.")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("when", [3, 40])
def test_an_interrupted_run_leaves_nothing(
    raw: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException], when: int
) -> None:
    make_source(raw)
    before = sorted(raw.rglob("*"))
    made_links: list[str] = []
    original_link = raw_datasets.make_link

    def interrupted(original: str, link: str) -> None:
        made_links.append(link)
        if len(made_links) == when:
            raise stop("stopped")
        original_link(original, link)

    monkeypatch.setattr(raw_datasets, "make_link", interrupted)
    if stop is OSError:
        assert command("--labeled", 5, 8) == 1
    else:
        with pytest.raises(stop):
            command("--labeled", 5, 8)
    assert sorted(raw.rglob("*")) == before
    # nnU-Net looks for names that start with Dataset, while the command works
    assert all(Path(link).relative_to(raw).parts[0].startswith(".") for link in made_links)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--labeled", "21"], ["20 labelled cases"]),
        (["--labeled", "200%"], ["20 labelled cases"]),
        (["--labeled", "20"], ["all 20", "100%"]),
        (["--labeled", "99%"], ["all 20", "100%"]),
        (["--labeled", "5", "25%"], ["5 and 25%", "5 of 20"]),
        (["--labeled", "5%", "1%"], ["5% and 1%", "1 of 20"]),
        (["--labeled", "5%", "--test", "20"], ["--test 20", "none"]),
        (["--labeled", "17", "--test", "4"], ["16 labelled cases"]),
        (["--labeled", "5", "8", "--ids", "8"], ["2 different id"]),
        (["--labeled", "5", "8", "--ids", "8", "8"], ["2 different id"]),
        (["--labeled", "5", "--ids", "1000"], ["1 to 999"]),
        (["--labeled", "5", "--ids", "7"], ["taken by Dataset007_Mine", "another id"]),
    ],
)
def test_a_wrong_call_is_refused(
    raw: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    make_source(raw)
    assert_refused(capsys, raw, arguments, *words)


@pytest.mark.parametrize("number", ["0", "0%", "-1", "five", "5 %", "1.5"])
def test_what_is_no_number_of_cases_is_refused(number: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        command("--labeled", number)
    assert stopped.value.code == 2


def test_percentages_are_rounded_to_at_least_one() -> None:
    assert [subset.count_of(text, 50) for text in ("0.1%", "5%", "2.9%", "3.1%", "7")] == [1, 3, 1, 2, 7]


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
def test_ids_in_use_are_passed_over_and_not_overwritten(
    raw: Path, capsys: pytest.CaptureFixture[str], variable: str
) -> None:
    make_source(raw)
    (raw.parent / variable / "Dataset009_Other").mkdir()
    assert_refused(capsys, raw, ["--labeled", 5, "--ids", 9], "taken by Dataset009_Other")
    assert command("--labeled", 5, 8) == 0
    assert sorted(path.name[:10] for path in made(raw).values()) == ["Dataset008", "Dataset010"]


def remove_label(source: Path) -> None:
    (source / "labelsTr" / f"case_03{ENDING}").unlink()


def damage_labels(source: Path) -> None:
    for case in ("case_03", "case_04"):
        path = source / "labelsTr" / f"{case}{ENDING}"
        path.write_bytes(path.read_bytes()[:-40])


def add_unknown_value(source: Path) -> None:
    write(source / "labelsTr" / f"case_03{ENDING}", np.full(SHAPE, 77, np.uint8))


def add_dangling_link(source: Path) -> None:
    path = source / "imagesTr" / f"case_03_0000{ENDING}"
    path.unlink()
    path.symlink_to(source / "gone")


def add_unlabelled_twin(source: Path) -> None:
    shutil.copytree(source / "imagesTr", source / "imagesUn")


def break_json(source: Path) -> None:
    (source / "dataset.json").write_text("{")


def remove_labelled_cases(source: Path) -> None:
    for folder in ("imagesTr", "labelsTr"):
        shutil.rmtree(source / folder)


def damage_first_image(source: Path) -> None:
    (source / "imagesTr" / f"case_00_0000{ENDING}").write_bytes(b"no image")


def change_json(**changes: object) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        file = source / "dataset.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove_label, ["case_03", "no label file"]),
        (damage_labels, [f"case_03{ENDING}", f"case_04{ENDING}", "2 label file"]),
        (add_unknown_value, [f"case_03{ENDING}", "77"]),
        (add_dangling_link, [f"case_03_0000{ENDING}", "do not exist"]),
        (add_unlabelled_twin, ["case_03", "are both in"]),
        (break_json, ["dataset.json"]),
        (shutil.rmtree, ["7"]),
        (remove_labelled_cases, ["There are no labelled cases in", "imagesTr"]),
        (change_json(labels={"background": 0, "one": "first"}), ['"labels" in dataset.json must name', "first"]),
        (damage_first_image, ["nnU-Net has no reader for", f"case_00_0000{ENDING}"]),
    ],
)
def test_a_source_that_cannot_be_used_is_refused(
    raw: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], words: list[str]
) -> None:
    damage(make_source(raw))
    assert_refused(capsys, raw, ["--labeled", 5], *words)
