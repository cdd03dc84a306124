"""Draw gains.png, the picture of the summary page, from the measures of the studies. Needs the extra [benchmark]."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import pandas as pd  # noqa: E402

from nnunetv2_semi.benchmark.report.summary import rows_of_metric, summarise  # noqa: E402
from nnunetv2_semi.benchmark.report.uncertainty import AHEAD, BEHIND  # noqa: E402

HERE = Path(__file__).parent
STUDIES = {"acdc4": "heart MR, 4 of 60 labelled",
           "acdc8": "heart MR, 8 of 60 labelled",
           "la2d": "left atrium, 4 and 8 of 64 labelled",
           "la3d": "left atrium in 3D, 4 of 64 labelled, one seed",
           "hippo3": "hippocampus in 3D, 3 of 80 labelled",
           "cardiac": "cine and LGE heart MR, 5 + 5 labelled, augmentation of MASS",
           "cardiac_mirrored": "cine and LGE heart MR, 5 + 5 labelled",
           "brats2d": "brain tumours, T1ce and T2, 3 of 9 labelled",
           "brats2d_four": "brain tumours, four modalities, 3 of 9 labelled",
           "busi32": "breast ultrasound, 32 of 456 labelled, all benign",
           "busi64": "breast ultrasound, 64 of 456 labelled, all benign",
           "busi64_6000": "the same, 6000 iterations",
           "busi64_spread": "breast ultrasound, 64 of 456 labelled, of both kinds"}
NAMES = {"CML": "Semi-CML", "MeanTeacher": "Mean Teacher", "Stock": "stock nnU-Net"}
COLOURS = {AHEAD: "tab:green", BEHIND: "tab:red"}  # else: not distinguishable from the control


def main() -> None:
    """Each method's difference to the first control and its 95 % interval, a panel for each study."""
    studies = {title: _differences(HERE / "studies" / f"{name}_measures.csv") for name, title in STUDIES.items()}
    heights = [len(rows) + 0.8 for rows in studies.values()]
    figure, panels = plt.subplots(len(studies), 1, sharex=True, figsize=(7, 0.32 * sum(heights) + 0.8),
                                  height_ratios=heights, layout="constrained")
    for axes, (title, rows) in zip(panels, studies.items(), strict=True):
        for place, row in enumerate(rows.itertuples()):
            colour = COLOURS.get(str(row.verdict), "tab:gray")
            axes.plot([row.difference_low, row.difference_high], [place] * 2, color=colour)
            axes.plot(row.difference, place, "o", color=colour)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), rows.method)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(title, loc="left", fontsize="medium")
    panels[-1].set_xlabel("Dice minus that of the supervised control, and its 95 % interval")
    figure.savefig(HERE / "gains.png", dpi=110)


def _differences(measures: Path) -> pd.DataFrame:
    """A study's rows, of each number of labelled cases the largest difference first."""
    rows = rows_of_metric(summarise(pd.read_csv(measures)))
    rows = rows[rows.role == "method"].sort_values(["labelled", "difference"], ascending=[True, False])
    rows = rows.assign(method=rows.method.replace(NAMES))
    if rows.labelled.nunique() > 1:
        named = zip(rows.method, rows.labelled, strict=True)
        rows = rows.assign(method=[f"{method}, {labelled}" for method, labelled in named])
    return rows


if __name__ == "__main__":
    main()
