"""Which of the teacher's layers a pruned student keeps, as a figure."""

from pathlib import Path

import pandas as pd

from microlm.report.figure_style import COLOURS, FAINT, caption, page, save


def draw_layers(table: pd.DataFrame, path: Path) -> None:
    """A bar for each layer as high as its influence; those that stay are coloured."""
    figure, axes = page("Layers of the teacher, and those that the start keeps", "influence (1 - cosine)", "layer")
    for kept, colour, name in ((1, COLOURS["student"], "kept"), (0, FAINT, "cut")):
        rows = table[table["kept"] == kept]
        if len(rows):
            axes.bar(rows["layer"], rows["influence"], color=colour, label=name)
    axes.legend(frameon=False, fontsize=9)
    caption(figure, "influence: how far a block turns what it is given, mean over tokens of the calibration windows")
    save(figure, path)
