"""Checks of the installation: versions, what nnU-Net finds, and its three folders."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import os
import tempfile
import warnings
from collections.abc import Iterator

from nnunetv2_semi.doctor.checks import Check, ok, problem, warning
from nnunetv2_semi.errors import UserError, one_line, shown
from nnunetv2_semi.installation import REINSTALL, hiding_folder, nnunet_folder
from nnunetv2_semi.trainer_classes import trainer_names

PLANNING = ("nnUNetPlannerSemi", "nnUNetPlannerSemiCPU", "nnUNetFingerprintExtractorSemi")
PREPROCESSING = ("nnUNetPreprocessorSemi",)
FOLDER_VARIABLES = {
    "nnUNet_raw": "raw_data_sets",
    "nnUNet_preprocessed": "preprocessed_data",
    "nnUNet_results": "trained_models",
}
REPAIR_TORCHVISION = (
    "torch and torchvision must come from the same place: pip install --force-reinstall torch torchvision (if you "
    "chose a build of torch with --index-url, give that option again)"
)


def check_environment() -> Iterator[Check]:
    """Checks of nnU-Net, torch, torchvision, the visibility of our classes, and nnU-Net's folders, in that order."""
    yield from _check_nnunet()
    yield from _check_torch()
    yield from check_visibility()
    yield from check_folders()


def _check_nnunet() -> Iterator[Check]:
    try:
        folder = nnunet_folder()
        version = importlib.metadata.version("nnunetv2")
    except UserError as error:
        yield problem("nnunetv2 is not installed", str(error))
        return
    except importlib.metadata.PackageNotFoundError:
        yield warning(f"nnunetv2 in {folder} has no version that pip knows", "2.8 is needed")
        return
    if version.split(".")[:2] == ["2", "8"]:
        yield ok(f"nnunetv2 {version} in {folder}")
    else:
        yield problem(f"nnunetv2 {version} in {folder}, but 2.8 is needed", REINSTALL)


def _check_torch() -> Iterator[Check]:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken torch raises whatever its libraries raise
        yield problem(f"torch cannot be imported: {one_line(error)}", "pip install --force-reinstall torch")
        return
    if torch.cuda.is_available():
        yield ok(f"torch {torch.__version__}, GPU: {torch.cuda.get_device_name(0)}")
    elif torch.backends.mps.is_available():
        yield ok(f"torch {torch.__version__}, Apple GPU: train with -device mps")
    else:
        yield warning(
            f"torch {torch.__version__} sees no GPU: training is slow",
            "train with -device cpu, and plan with nnUNetPlannerSemiCPU",
        )
    yield check_torchvision(str(torch.__version__))


def check_torchvision(torch_version: str) -> Check:
    """Whether torchvision loads: nnU-Net's search for trainers imports it."""
    try:
        torchvision = importlib.import_module("torchvision")
    except Exception as error:  # RuntimeError where it was built for another torch, ImportError where it is absent
        reason = one_line(error)
        return problem(f"torchvision cannot be imported beside torch {torch_version}: {reason}", REPAIR_TORCHVISION)
    return ok(f"torchvision {torchvision.__version__}")


def check_visibility() -> Iterator[Check]:
    """Whether nnU-Net's own search finds our classes."""
    hiding = hiding_folder()
    if hiding is not None:
        yield problem(f"{hiding} hides the nnunetv2 that is installed elsewhere", "nnunetv2_semi link")
        return
    try:
        nnunet = str(nnunet_folder())
    except UserError:
        return
    try:
        trainers = trainer_names()
        if not trainers:
            raise UserError(f"Their folder is empty. {REINSTALL}")
    except UserError as error:
        yield problem("the trainers of this package are not there", str(error))
        return
    searches = {
        "trainers": (trainers, os.path.join("training", "nnUNetTrainer")),
        "planners": (PLANNING, "experiment_planning"),
        "preprocessor": (PREPROCESSING, "preprocessing"),
    }
    for what, (names, folder) in searches.items():
        try:
            missing = [name for name in names if not _is_found(name, nnunet, folder)]
        except Exception as error:  # the search imports every module on its way
            yield problem(f"nnU-Net's search for {what} fails: {one_line(error)}", "mend what the message names")
            continue
        if missing:
            yield problem(f"{what} not visible to nnU-Net: {shown(missing)}", "nnunetv2_semi link")
        else:
            yield ok(f"{what} visible to nnU-Net: {shown(names)}")


def check_folders() -> Iterator[Check]:
    """Whether nnU-Net's three folders are set, exist and can be written."""
    for variable, content in FOLDER_VARIABLES.items():
        path = os.environ.get(variable)
        if not path:
            yield problem(f"{variable} is not set", f"export {variable}=/path/to/{content}")
        elif not os.path.isdir(path):
            yield problem(f"{variable}={path} is not a folder", f"mkdir -p {path}, or correct {variable}")
        elif not _is_writable(path):
            finding = f"{variable}={path} cannot be written"
            remedy = "change its permissions or choose another folder"
            yield warning(finding, remedy) if variable == "nnUNet_raw" else problem(finding, remedy)
        else:
            yield ok(f"{variable}={path}")


def _is_found(name: str, nnunet: str, folder: str) -> bool:
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    module = "nnunetv2." + folder.replace(os.sep, ".")
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return recursive_find_python_class(os.path.join(nnunet, folder), name, current_module=module) is not None


def _is_writable(folder: str) -> bool:
    """Whether a file can be made there: permissions alone do not tell of read-only or full file systems."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
