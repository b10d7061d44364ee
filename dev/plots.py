"""Plots that stand alone, as small SVG files: the same data give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import charts, files
from nanochat.common.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ten that stay apart in print and for most of the colour-blind (Tableau 10, ordered by contrast).
COLORS = (
    "#4e79a7",
    "#e15759",
    "#59a14f",
    "#b07aa1",
    "#f28e2b",
    "#17a2a2",
    "#9c755f",
    "#d37295",
    "#79706e",
    "#c9a227",
)


def panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    """An empty figure with so many panels side by side.

    Raises:
        UserError: matplotlib is not installed.
    """
    if not charts.available():
        raise UserError("plots need matplotlib, which is not installed. Add it: pip install matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * count, 3.8), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for each in axes:
        each.grid(visible=True, alpha=0.25, linewidth=0.6)
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=8)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG."""
    import io

    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": path.stem, "font.family": "sans-serif"}
    ):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
    files.atomic_write(path, text)


Curve = Sequence[tuple[float, float]]  # (x, y), in the order of x


def curves(
    axes: Axes,
    of_variants: Mapping[str, Sequence[Curve]],
    x_label: str,
    y_label: str,
    top: float | None = None,
) -> None:
    """Every run as a thin line, in its variant's colour; beyond ten variants the strokes change.

    Args:
        axes: where to draw.
        of_variants: the curves of its runs, by the variant's name.
        x_label: what x is, and its unit.
        y_label: what y is, and its unit.
        top: y beyond which nothing is shown: the first steps would leave no room for the last.
    """
    for i, (name, runs) in enumerate(of_variants.items()):
        stroke = ("-", "--", ":")[i // len(COLORS) % 3]
        for number, run in enumerate(runs):
            x, y = zip(*run, strict=True)
            label = name if number == 0 else None
            axes.plot(x, y, stroke, color=COLORS[i % len(COLORS)], linewidth=1.0, alpha=0.8, label=label)
    if top is not None:
        axes.set_ylim(top=top)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(frameon=False, fontsize=7)
