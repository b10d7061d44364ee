"""Curves and bars as SVG text, drawn by matplotlib where it is installed.

One function makes every SVG of the project, so that the same data give the same bytes. The text serves in a
page, whose colour and font it takes, and as a file of its own.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#3b7dd8", "#d9772b", "#3f9b5f", "#a05fc0")  # readable on white and on near-black
INK = "#010203"  # stands for the text colour of a page, which takes its place in the SVG
LONE_INK = "#777c85"  # the text colour of an SVG that is in no page: 4:1 on white and on near-black
MAX_POINTS = 500  # of a curve: more than the pixels it is drawn on would show

STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 9),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow", "savefig.transparent"), True),
    "grid.alpha": 0.3,  # of its grey, which shows on white and on near-black
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in the name of a task is a dollar
}


@dataclass(frozen=True)
class Series:
    """One curve: a name, and points in the order of x."""

    name: str
    x: Sequence[float]
    y: Sequence[float]

    def thinned(self, most: int = MAX_POINTS) -> Series:
        """At most `most` points, evenly spread, the last one always among them.

        >>> Series("s", range(10), range(10)).thinned(4).x
        [0, 3, 6, 9]
        """
        stride = -(-len(self.x) // most) or 1
        x, y = ([*values[:-1:stride], *values[-1:]] for values in (self.x, self.y))
        return Series(self.name, x, y)


def available() -> bool:
    """Whether matplotlib can be imported (the `plots` extra)."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def svg(name: str, width: float, height: float, draw: Callable[..., Any], panels: int = 1) -> str:
    """A figure as one `<svg>` element, which is also a file of its own.

    Args:
        name: unique in the page; the identifiers within begin with it.
        width: in inches.
        height: in inches.
        draw: is given the axes of the panels, and draws into them.
        panels: how many there are, side by side.
    """
    import matplotlib.figure  # without pyplot: nothing is kept between two figures

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
        draw(*figure.subplots(1, panels, squeeze=False)[0])
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = re.sub(r"(?ms)\s*<metadata>.*?</metadata>|[ \t]+$", "", buffer.getvalue())
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") :])
    return text.replace(INK, "currentColor").replace("<svg", f'<svg color="{LONE_INK}"', 1)


def line_chart(
    name: str, curves: Sequence[Series], x_label: str, y_label: str, *, small: bool = False
) -> str:
    """Curves over a common x axis, as an `<svg>` element.

    Args:
        name: unique in the page.
        curves: what to draw; a name is shown where there are several.
        x_label: what x is, and its unit.
        y_label: what y is, and its unit.
        small: half the width.
    """
    size = (4.4, 2.4) if small else (9.0, 3.4)
    return svg(name, *size, lambda axes: draw_lines(axes, curves, x_label, y_label))


def draw_lines(axes: Axes, curves: Sequence[Series], x_label: str, y_label: str) -> None:
    """Draw curves and name the axes; the points of a short curve are marked."""
    for curve, color in zip((curve.thinned() for curve in curves), COLORS, strict=False):
        marker = "o" if len(curve.x) < 30 else None
        axes.plot(curve.x, curve.y, color=color, marker=marker, label=curve.name)
    if len(curves) > 1:
        axes.legend()
    axes.set(xlabel=x_label, ylabel=y_label)


def bar_chart(
    name: str,
    labels: Sequence[str],
    values: Sequence[float],
    errors: Sequence[float],
    label: str,
    marks: Mapping[str, Sequence[float]] | None = None,
) -> str:
    """Horizontal bars with error bars, the first on top, as an `<svg>` element.

    Args:
        name: unique in the page.
        labels: one a bar.
        values: lengths of the bars; may be negative.
        errors: standard error of each value.
        label: what the values are.
        marks: by name, values to compare with, each set in a colour of its own.
    """

    def draw(axes: Axes) -> None:
        rows = range(len(labels))
        axes.barh(rows, values, xerr=errors, color=COLORS[0], ecolor=INK, height=0.7, capsize=2)
        for (mark, points), color in zip((marks or {}).items(), COLORS[1:], strict=False):
            axes.plot(points, rows, linestyle="none", marker="D", markersize=4, color=color, label=mark)
        if marks:
            axes.legend()
        axes.set_yticks(rows, labels)
        axes.invert_yaxis()
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlabel(label)

    return svg(name, 9.0, 0.8 + 0.24 * len(labels), draw)
