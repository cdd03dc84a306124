"""Settings for all tests: few threads and processes, and the package found whether or not it is installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

# Before torch and nnunetv2 are imported, which read them once.
os.environ["nnUNet_n_proc_DA"] = "0"
os.environ["nnUNet_compile"] = "f"
os.environ.setdefault("nnUNet_def_n_proc", "2")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep instead of keeping others from the cores
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("MATPLOTLIBRC", str(Path(__file__).parent / "matplotlibrc"))
os.environ["TQDM_DISABLE"] = "1"

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("nnunetv2_semi") is None:
    sys.path.insert(0, str(ROOT))

import nnunetv2_semi  # noqa: E402
from nnunetv2_semi.installation import CLASS_FOLDERS  # noqa: E402


class SourceTreeFinder:
    """Imports our folders under their nnunetv2 names from the source tree, where neither pip nor `link` put them."""

    folders = {
        "nnunetv2." + ".".join(folder.inside_nnunet.parts): ROOT / folder.in_source_tree for folder in CLASS_FOLDERS
    }

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder = cls.folders.get(name)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


# Last, so that an installed package is preferred.
sys.meta_path.append(SourceTreeFinder)


def pytest_report_header() -> str:
    return f"nnunetv2_semi under test: {Path(nnunetv2_semi.__file__).parent}"
