"""The picture of a self-training round: stability of all cases, and what lies behind its ends."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from PIL import Image

from nnunetv2_semi.benchmark.datasets.source_cases import Source, class_names
from nnunetv2_semi.benchmark.self_training.stability import ranked
from nnunetv2_semi.data.atomic_files import whole_file
from nnunetv2_semi.data.dataset_settings import named_channels
from nnunetv2_semi.pictures import BACKGROUND, COLOURS, FOREGROUND, PictureRow, save_overview

KEPT_COLOUR, OTHER_COLOUR = COLOURS[1], "#777777"
DOTS_PER_INCH = 110


def save_stability_picture(
    scores: Mapping[str, float | None], kept: Collection[str], rows: Sequence[PictureRow], dataset_json: dict,
    title: str, file: Path,
) -> None:
    """Draw the sorted scores, and below them the predictions of some cases as outlines over the image.

    Args:
        scores: Stability per case; those without are left out.
        kept: Cases that get a pseudo-label.
        rows: Of ``overlay_rows``.
        dataset_json: Names the labels.
        title: Line above the picture.
        file: A .png file; written whole.
    """
    names = list(class_names(dataset_json).items())[: len(COLOURS)]
    labels = {name: value for value, name in names}
    with tempfile.TemporaryDirectory() as folder:
        overview = Path(folder) / "overview.png"
        save_overview(rows, labels, "Most and least stable case", overview)
        with Image.open(overview) as image:
            lower = image.convert("RGB")
    upper = _scores_plot(scores, kept, title, lower.width)
    both = Image.new("RGB", (lower.width, upper.height + lower.height))
    both.paste(upper, (0, 0))
    both.paste(lower, (0, upper.height))
    with whole_file(file) as unfinished:
        both.save(unfinished, format="png")


def overlay_rows(
    source: Source, reader: type[BaseReaderWriter], final: Path, others: Mapping[str, Path],
    scores: Mapping[str, float | None],
) -> list[PictureRow]:
    """The most and the least stable case: first channel, final prediction and those it is compared with.

    Args:
        source: Data set with the unlabelled cases.
        reader: nnU-Net's of images and predictions.
        final, others: Folders with the predictions; with names.
        scores: Stability per case.
    """
    order = ranked(scores)
    channel = next(iter(named_channels(source.dataset_json).values()))
    rows = []
    for case in dict.fromkeys((order[0], order[-1])):
        image, properties = reader().read_images([next(iter(source.unlabelled[case].images.values()))])
        label = case + source.dataset_json["file_ending"]
        maps = {name: reader().read_seg(str(folder / label))[0][0]
                for name, folder in {"Final": final, **others}.items()}
        height, width = properties["spacing"][-2:]
        rows.append(PictureRow(f"{case}: {scores[case]:.2f}", {str(channel): image[0]}, maps, {}, height / width))
    return rows


def _scores_plot(scores: Mapping[str, float | None], kept: Collection[str], title: str, width: int) -> Image.Image:
    order = ranked(scores)
    figure = Figure(figsize=(width / DOTS_PER_INCH, 3.4), dpi=DOTS_PER_INCH, facecolor=BACKGROUND, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=BACKGROUND)
    for name, colour, marker in (("kept", KEPT_COLOUR, "o"), ("not kept", OTHER_COLOUR, "x")):
        places = [place for place, case in enumerate(order, 1) if (case in kept) == (name == "kept")]
        values = [scores[order[place - 1]] for place in places]
        axes.plot(places, values, marker, color=colour, markersize=6, label=f"{name} ({len(places)})")  # type: ignore
    axes.set_ylim(-0.03, 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("unlabelled cases, the most stable first", color=FOREGROUND)
    axes.set_ylabel("stability (mean IoU)", color=FOREGROUND)
    axes.tick_params(colors=FOREGROUND)
    axes.spines[:].set_color(OTHER_COLOUR)
    axes.set_title(title, color=FOREGROUND, fontsize=12)
    axes.legend(frameon=False, labelcolor=FOREGROUND)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
