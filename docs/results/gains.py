"""Draw the pictures of the summary page from the measures of the studies. Needs the extra [benchmark]."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import pandas as pd  # noqa: E402

from nnunetv2_semi.benchmark.report.summary import rows_of_metric, summarise  # noqa: E402
from nnunetv2_semi.benchmark.report.uncertainty import AHEAD, BEHIND  # noqa: E402

HERE = Path(__file__).parent
STUDIES = {"acdc4": "heart MR, 4 of 60 labelled",
           "acdc4_10000": "the same, 10000 iterations",
           "acdc8": "heart MR, 8 of 60 labelled",
           "la2d": "left atrium, 4 and 8 of 64 labelled",
           "la3d": "left atrium in 3D, 4 of 64 labelled, one seed",
           "hippo3": "hippocampus in 3D, 3 of 80 labelled",
           "cardiac": "cine and LGE heart MR, 5 + 5 labelled, augmentation of MASS",
           "cardiac_mirrored": "cine and LGE heart MR, 5 + 5 labelled",
           "cardiac_mirrored_4000": "the same, 4000 iterations",
           "brats2d": "brain tumours, T1ce and T2, 3 of 9 labelled",
           "brats2d_four": "brain tumours, four modalities, 3 of 9 labelled",
           "busi32": "breast ultrasound, 32 of 456 labelled, all benign",
           "busi64": "breast ultrasound, 64 of 456 labelled, all benign",
           "busi64_6000": "the same, 6000 iterations",
           "busi64_spread": "breast ultrasound, 64 of 456 labelled, of both kinds"}
NAMES = {"CML": "Semi-CML", "MeanTeacher": "Mean Teacher", "Stock": "stock nnU-Net"}
# Where trainings of several lengths were measured: title, how the names of its cases begin, files, and the iterations
# of the trainings in them that do not name them.
LENGTHS: list[tuple[str, str, dict[str, int | None]]] = [
    ("heart MR, 4 labelled", "", {"acdc4": 5000, "acdc4_10000": 10000, "acdc4_length": None}),
    ("left atrium, 4 labelled", "", {"la2d": 2000, "la2d_length": None}),
    ("hippocampus in 3D, 3 labelled", "", {"hippo3": 2000, "hippo3_length": None}),
    ("cine MR in 3D", "cine",
     {"cardiac_mirrored": 2000, "cardiac_mirrored_4000": 4000, "cardiac_mirrored_length": None}),
    ("cine MR in 3D, no mirroring", "cine", {"cardiac": 2000, "cardiac_length": None}),
    ("LGE MR in 3D", "lge",
     {"cardiac_mirrored": 2000, "cardiac_mirrored_4000": 4000, "cardiac_mirrored_length": None}),
    ("brain tumours, T1ce and T2", "", {"brats2d": 2000, "brats2d_5000": 5000}),
    ("breast ultrasound, 32 labelled", "", {"busi32": 2000, "busi32_4000": 4000, "busi32_length": None}),
    ("breast ultrasound, 64 labelled", "", {"busi64": 2000, "busi64_6000": 6000})]
METHOD_COLOURS = {"control": "tab:gray", "labelled mixing": "tab:orange", "Mix": "tab:green"}
COLOURS = {AHEAD: "tab:green", BEHIND: "tab:red"}  # else: not distinguishable from the control


def draw_gains() -> None:
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


def draw_lengths() -> None:
    """Dice of both controls and of Mix over iterations, a line for each seed; all panels are equally high."""
    figure, panels = plt.subplots(3, 3, figsize=(9, 7.5), layout="constrained")
    for axes, (title, cases, files) in zip(panels.flat, LENGTHS, strict=True):
        # of a training that is in two files, the later file's
        dice = pd.concat([_dice_by_length(name, cases, iterations) for name, iterations in files.items()])
        dice = dice[~dice.index.duplicated(keep="last")]
        lines = dice.unstack("iterations").reindex(METHOD_COLOURS, level="trained")
        for (method, seed), line in lines.iterrows():
            axes.plot(line.dropna(), "o-", markersize=4, linewidth=1, color=METHOD_COLOURS[method],
                      label=method if seed == 0 else None)
        axes.set_xscale("log")
        axes.set_xticks(lines.columns, [f"{iterations:,}" for iterations in lines.columns])
        axes.minorticks_off()
        middle = (dice.min() + dice.max()) / 2
        axes.set_ylim(middle - 0.18, middle + 0.18)
        axes.set_title(title, fontsize="medium")
    panels[0, 2].legend(loc="lower left")
    figure.supxlabel("iterations")
    figure.supylabel("Dice of test cases")
    figure.savefig(HERE / "lengths.png", dpi=110)


def _dice_by_length(name: str, cases: str, iterations: int | None) -> pd.Series:
    """Mean Dice of each training of both controls and of Mix in a study, with the fewest labels.

    cases: how the names of the cases begin. iterations: of its trainings; else their names tell them.
    """
    rows = pd.read_csv(HERE / "studies" / f"{name}_measures.csv")
    rows = rows[(rows.role != "upper bound") & (rows.labelled == rows.labelled.min()) & rows.case.str.startswith(cases)]
    if iterations is None:
        iterations = rows.method.str.extract(r"(\d+) iterations$")[0].astype(int)
    trained = rows.method.str.replace(r" ?\d+ iterations$", "", regex=True)
    rows = rows.assign(trained=trained.replace({"": "control", "Supervised": "control"}), iterations=iterations)
    rows = rows[rows.trained.isin(METHOD_COLOURS)]
    return rows.groupby(["trained", "iterations", "seed"]).dice.mean()


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
    draw_gains()
    draw_lengths()
