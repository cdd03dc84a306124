"""Packaging: puts trainers/ and planners/ where nnU-Net searches, so that no environment variable is needed."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
NNUNET_FOLDERS = {
    "nnunetv2.training.nnUNetTrainer.semi": "trainers",
    "nnunetv2.experiment_planning.semi": "planners",
    "nnunetv2.preprocessing.semi": "planners/preprocessing",
}
BENCHMARK = ["jinja2", "monai>=1.4", "pandas", "pyyaml", "statsmodels"]
CLUSTER = ["submitit"]
ELASTIX = ["itk-elastix>=0.20"]
FOUNDATION = ["transformers>=5", "safetensors"]
ONNX = ["onnx>=1.16", "onnxruntime>=1.17"]
# Second libraries for metrics; stubs for mypy.
TEST = ["pytest>=8", "pytest-xdist>=3.7", "ruff>=0.6", "mypy>=1.10", "medpy", "surface-distance", "types-PyYAML"]


class EditableWheelWithoutNnunet(editable_wheel):
    """An editable install maps nnunetv2_semi alone.

    nnU-Net reads folders, not import hooks, so the mapped packages would not be found; and the hooks that setuptools
    writes for them declare a namespace package called nnunetv2, which hides an nnU-Net that is itself editable.
    `nnunetv2_semi link` makes the classes visible instead.
    """

    def run(self) -> None:
        self.distribution.packages = [name for name in self.distribution.packages if name not in NNUNET_FOLDERS]
        self.distribution.package_dir = {}
        super().run()


def read(name: str) -> str:
    path = ROOT / name
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def version() -> str:
    found = re.search(r'^__version__ = "([^"]+)"', read("nnunetv2_semi/__init__.py"), re.MULTILINE)
    if found is None:
        raise RuntimeError("nnunetv2_semi/__init__.py defines no __version__")
    return found.group(1)


setup(
    name="nnunetv2-semi",
    version=version(),
    description="Semi-supervised training inside nnU-Net v2: unlabelled images, found by nnU-Net's own commands.",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["nnunetv2_semi", "nnunetv2_semi.*"]), *NNUNET_FOLDERS],
    package_dir=NNUNET_FOLDERS,
    package_data={"nnunetv2_semi.benchmark.report": ["*.j2"]},
    install_requires=[
        "nnunetv2>=2.8,<2.9",
        "torch",
        "batchgenerators",
        "batchgeneratorsv2",
        "SimpleITK",
        "acvl-utils",
        "dynamic-network-architectures",
        "blosc2",
        "connected-components-3d",
        "filelock",
        "matplotlib",
        "nibabel",
        "numpy",
        "pandas",
        "pydantic>=2",
        "scipy",
        "threadpoolctl",
        "tqdm",
    ],
    extras_require={
        "benchmark": BENCHMARK,
        "cluster": CLUSTER,
        "elastix": ELASTIX,
        "foundation": FOUNDATION,
        "onnx": ONNX,
        "test": [*TEST, *BENCHMARK, *CLUSTER, *FOUNDATION, *ONNX],
    },
    entry_points={"console_scripts": ["nnunetv2_semi = nnunetv2_semi.cli:main"]},
    cmdclass={"editable_wheel": EditableWheelWithoutNnunet},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
