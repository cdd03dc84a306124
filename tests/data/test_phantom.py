"""The phantom data set: what lies on disk, what varies, what is promised about its difficulty."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases, verify_labels
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from scipy import ndimage

from nnunetv2_semi.data import phantom
from nnunetv2_semi.data.phantom import IGNORE_LABEL, make_phantom_dataset
from nnunetv2_semi.data.phantom_anatomy import LABELS, MODALITIES, PhantomCase, make_phantom_case, tissue_shares
from nnunetv2_semi.errors import UserError


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("shape", [(40, 48, 40), (16, 16, 16), (12, 13, 14), (64, 64), (16, 16), (12, 12)])
def test_every_label_occurs_in_every_case_at_every_size(shape: tuple[int, ...]) -> None:
    for number in range(6):
        case = make_phantom_case(number, shape, 2, seed=3)
        assert case.images.shape == (2, *shape)
        assert case.segmentation.shape == shape
        assert set(np.unique(case.segmentation)) == {0, *LABELS.values()}


def test_files_are_those_of_a_raw_data_set_with_unlabelled_images(tmp_path: Path) -> None:
    folder = make_phantom_dataset(tmp_path, 7, "Tiny", labelled=2, unlabelled=1, test=1, shape=(12, 12, 12))
    assert folder == tmp_path / "Dataset007_Tiny"
    assert set(files_below(tmp_path / "Dataset007_Tiny")) == {
        "dataset.json",
        "imagesTr/case_0000_0000.nii.gz",
        "imagesTr/case_0000_0001.nii.gz",
        "imagesTr/case_0001_0000.nii.gz",
        "imagesTr/case_0001_0001.nii.gz",
        "labelsTr/case_0000.nii.gz",
        "labelsTr/case_0001.nii.gz",
        "imagesUn/case_0002_0000.nii.gz",
        "imagesUn/case_0002_0001.nii.gz",
        "imagesTs/case_0003_0000.nii.gz",
        "imagesTs/case_0003_0001.nii.gz",
        "labelsTs/case_0003.nii.gz",
    }
    description = json.loads((folder / "dataset.json").read_text())
    assert description["semi"] == {"modalities": {"T1": [0], "T2": [1]}}
    assert description["numTraining"] == 2
    assert [f.name for f in tmp_path.iterdir()] == ["Dataset007_Tiny"]


@pytest.mark.parametrize(
    ("shape", "channels", "file_ending"),
    [((12, 14, 16), 4, ".nii.gz"), ((12, 12, 12), 1, ".nrrd"), ((16, 20), 2, ".nii.gz"), ((16, 20), 1, ".png")],
)
def test_nnunet_finds_no_fault(tmp_path: Path, shape: tuple[int, ...], channels: int, file_ending: str) -> None:
    spacing = (3.0, 2.0, 1.5)[-len(shape) :]
    folder = make_phantom_dataset(
        tmp_path,
        labelled=1,
        unlabelled=0,
        test=0,
        shape=shape,
        channels=channels,
        spacing=spacing,
        file_ending=file_ending,
    )
    description = json.loads((folder / "dataset.json").read_text())
    assert list(description["channel_names"].values()) == list(MODALITIES[:channels])
    files = get_filenames_of_train_images_and_targets(str(folder), description)["case_0000"]
    reader = determine_reader_writer_from_dataset_json(description, files["images"][0], verbose=False)
    assert verify_labels(files["label"], reader, [0, *LABELS.values()])
    assert check_cases(files["images"], files["label"], channels, reader)
    images, properties = reader().read_images(files["images"])
    expected = make_phantom_case(0, shape, channels, seed=0).images
    assert images.shape[-len(shape) :] == shape
    if file_ending == ".png":
        assert np.corrcoef(images.ravel(), expected.ravel())[0, 1] > 0.99
    else:
        np.testing.assert_array_equal(images.reshape(expected.shape), expected)
        np.testing.assert_allclose(properties["spacing"][-len(shape) :], spacing)


def test_images_depend_on_seed_and_number_alone(tmp_path: Path) -> None:
    few = make_phantom_dataset(tmp_path / "a", labelled=1, unlabelled=2, test=0, shape=(12, 12), seed=5)
    more = make_phantom_dataset(tmp_path / "b", labelled=2, unlabelled=1, test=1, shape=(12, 12), seed=5)
    again = make_phantom_dataset(tmp_path / "c", labelled=1, unlabelled=2, test=0, shape=(12, 12), seed=5)
    other = make_phantom_dataset(tmp_path / "d", labelled=1, unlabelled=2, test=0, shape=(12, 12), seed=6)
    assert files_below(few) == files_below(again)
    second = "case_0001_0001.nii.gz"
    assert (few / "imagesUn" / second).read_bytes() == (more / "imagesTr" / second).read_bytes()
    assert (few / "imagesUn" / second).read_bytes() != (other / "imagesUn" / second).read_bytes()


def contrast(case: PhantomCase, channel: int, inside: np.ndarray, outside: np.ndarray) -> float:
    image = case.images[channel].astype(float)
    return abs(image[inside].mean() - image[outside].mean()) / image[outside].std()


def test_modalities_complement_each_other() -> None:
    lesion_contrast = np.zeros(2)
    liver_contrast = np.zeros(2)
    for number in range(8):
        case = make_phantom_case(number, (40, 48, 40), 2, seed=0)
        lesion, liver = case.segmentation == LABELS["lesion"], case.segmentation == LABELS["liver"]
        around = ndimage.binary_dilation(liver, iterations=3) & (case.segmentation == 0)
        lesion_contrast += [contrast(case, channel, lesion, liver) / 8 for channel in range(2)]
        liver_contrast += [contrast(case, channel, liver, around) / 8 for channel in range(2)]
    assert lesion_contrast[1] > 2 * lesion_contrast[0]
    assert liver_contrast[0] > 1.2 * liver_contrast[1]


def test_anatomy_varies_between_cases() -> None:
    maps = [make_phantom_case(number, (40, 48, 40), 1, seed=0).segmentation for number in range(6)]
    volumes = np.array([(m == LABELS["liver"]).sum() for m in maps])
    assert volumes.max() > 1.15 * volumes.min()
    centres = np.array([np.argwhere(m == LABELS["kidney"]).mean(0) for m in maps])
    assert (centres.std(0) > 0.5).all()


def test_edges_are_mixed_and_air_is_noisy() -> None:
    shares = tissue_shares(np.random.default_rng(0), (40, 48, 40))
    total = sum(shares.values())
    assert isinstance(total, np.ndarray)
    assert total.min() >= 0
    assert total.max() <= 1 + 1e-12
    assert ((shares["liver"] > 0.05) & (shares["liver"] < 0.95)).sum() > 200
    air = make_phantom_case(0, (40, 48, 40), 1, 0).images[0][:, :2, :2].astype(float)
    # The magnitude of complex noise: a Rayleigh distribution has this ratio of mean to deviation.
    assert air.mean() / air.std() == pytest.approx(1.91, rel=0.15)


def test_regions_overlap_and_are_declared_for_nnunet(tmp_path: Path) -> None:
    folder = make_phantom_dataset(tmp_path, labelled=1, unlabelled=0, test=0, shape=(12, 12), regions=True)
    description = json.loads((folder / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "liver": [1, 4], "kidney": 2, "spine": 3, "lesion": 4}
    assert description["regions_class_order"] == [1, 2, 3, 4]


@pytest.mark.parametrize("shape", [(16, 16, 16), (24, 24)])
def test_ignore_label_hides_half_of_each_training_structure(tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = make_phantom_dataset(tmp_path, labelled=1, unlabelled=0, test=1, shape=shape, ignore_label=True)
    description = json.loads((folder / "dataset.json").read_text())
    assert description["labels"]["ignore"] == IGNORE_LABEL == 5
    reader = determine_reader_writer_from_dataset_json(description, verbose=False)()
    shown = reader.read_seg(str(folder / "labelsTr" / "case_0000.nii.gz"))[0].reshape(shape)
    truth = make_phantom_case(0, shape, 2, seed=0).segmentation
    assert (shown[shown != IGNORE_LABEL] == truth[shown != IGNORE_LABEL]).all()
    for label in (0, *LABELS.values()):
        assert 0.4 <= (shown[truth == label] == IGNORE_LABEL).mean() <= 0.5
    assert IGNORE_LABEL not in reader.read_seg(str(folder / "labelsTs" / "case_0001.nii.gz"))[0]


def test_existing_data_set_is_never_touched(tmp_path: Path) -> None:
    folder = make_phantom_dataset(tmp_path, labelled=1, unlabelled=1, test=0, shape=(12, 12))
    before = files_below(tmp_path)
    with pytest.raises(UserError, match=re.escape(str(folder))):
        make_phantom_dataset(tmp_path, labelled=2, unlabelled=1, test=0, shape=(12, 12))
    assert files_below(tmp_path) == before


def test_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted_at_second(number: int, *args: object) -> PhantomCase:
        if number == 1:
            raise KeyboardInterrupt
        return make_phantom_case(number, (12, 12), 1, 0)

    monkeypatch.setattr(phantom, "make_phantom_case", interrupted_at_second)
    with pytest.raises(KeyboardInterrupt):
        make_phantom_dataset(tmp_path, labelled=2, unlabelled=0, test=0, shape=(12, 12), channels=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"labelled": 0}, "labelled"),
        ({"shape": (8, 16, 16)}, "shape"),
        ({"shape": (16,)}, "shape"),
        ({"channels": 5}, "channels"),
        ({"dataset_id": 1000}, "dataset_id"),
        ({"spacing": (1.0, 1.0)}, "spacing"),
        ({"file_ending": ".png"}, "png"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path: Path, wrong: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"labelled": 1, "unlabelled": 0, "test": 0, "shape": (12, 12, 12), **wrong}
    with pytest.raises(ValueError, match=message):
        make_phantom_dataset(tmp_path, **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_ct_is_in_hounsfield_units_with_the_anatomy_of_the_mr(tmp_path: Path) -> None:
    case = make_phantom_case(0, (24, 32, 24), 2, seed=0, ct=True)
    mr = make_phantom_case(0, (24, 32, 24), 2, seed=0)
    np.testing.assert_array_equal(case.segmentation, mr.segmentation)
    ct = case.images[0]
    assert ct[:, :2, :2].mean() == pytest.approx(-1000, abs=20)
    medians = {name: np.median(ct[case.segmentation == label]) for name, label in LABELS.items()}
    assert medians["lesion"] < medians["liver"] < medians["kidney"] < medians["spine"]
    folder = make_phantom_dataset(tmp_path, labelled=2, unlabelled=0, test=0, shape=(12, 12), unpaired=True, ct=True)
    assert json.loads((folder / "dataset.json").read_text())["channel_names"] == {"0": "CT", "1": "T2"}
    assert sorted(file.name for file in (folder / "imagesTr").iterdir()) == ["case_0000_0000.nii.gz",
                                                                            "case_0001_0001.nii.gz"]
