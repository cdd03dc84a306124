"""Islands removed from the pseudo-labels of a batch: all labels at once, as we do, against one label after another."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from measuring import alternately, machine, table
from scipy import ndimage

from nnunetv2_semi.data.largest_component import largest_components


def label_by_label(labels: torch.Tensor) -> torch.Tensor:
    """The same of (B, 1, *spatial), with a search for components of the whole patch for each label."""
    kept = np.zeros_like(labels.numpy())
    for patch, result in zip(labels.numpy()[:, 0], kept[:, 0], strict=True):
        border = np.ones(patch.shape, dtype=bool)
        border[(slice(1, -1),) * patch.ndim] = False
        for label in range(1, int(patch.max()) + 1):
            components, _ = ndimage.label(patch == label, np.ones((3,) * patch.ndim))
            sizes = np.bincount(components.ravel())
            stays = np.zeros(len(sizes), dtype=bool)
            if len(sizes) > 1:
                stays[1 + sizes[1:].argmax()] = True
            stays[components[border]] = True
            stays[0] = False
            result[stays[components]] = label
    return torch.from_numpy(kept)


def pseudo_labels(classes: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Smooth random objects with holes, two fifths of the patch."""
    random = np.random.default_rng(0)
    labels = np.zeros((2, 1, *shape), dtype=np.int64)
    for patch in labels[:, 0]:
        place = ndimage.gaussian_filter(random.normal(size=shape), shape[-1] / 10)
        solid = ndimage.gaussian_filter(random.normal(size=shape), shape[-1] / 30) > -0.02
        patch[...] = np.digitize(place, np.quantile(place, np.linspace(0.6, 1, classes + 1)[:-1])) * solid
    return torch.from_numpy(labels)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs="+", default=[128, 128, 128], help="of a patch (default: 128 ...)")
    parser.add_argument("--classes", type=int, nargs="+", default=[1, 3, 13])
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, both forms in each (default: 3)")
    arguments = parser.parse_args(argv)
    rows = []
    for classes in arguments.classes:
        labels = pseudo_labels(classes, tuple(arguments.shape))
        forms = {"ours": largest_components, "label by label": label_by_label}
        equal = torch.equal(*(form(labels) for form in forms.values()))
        times = alternately({name: partial(form, labels) for name, form in forms.items()}, arguments.rounds)
        rows += [[classes, name, f"{time.wall / times['ours'].wall:.1f} x", f"{time.cpu / times['ours'].cpu:.1f} x",
                  "yes" if equal else "NO"] for name, time in times.items()]
    print(f"{machine()}, two patches of {' x '.join(map(str, arguments.shape))}, {arguments.rounds} rounds, seed 0\n")
    print(table(["classes", "form", "wall time", "CPU time", "equal"], rows))


if __name__ == "__main__":
    main()
