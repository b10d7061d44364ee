"""Curves and bars as SVG text that stands inside a page. matplotlib draws them, where it is installed."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#3b7dd8", "#d9772b", "#3f9b5f", "#a05fc0")  # readable on white and on near-black
INK = "#010203"  # stands for the page's own text colour, which takes its place in the SVG
MAX_POINTS = 500  # of a curve: more than the pixels it is drawn on would show


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
        kept = sorted({*range(0, len(self.x), stride), len(self.x) - 1} - {-1})
        return Series(self.name, [self.x[i] for i in kept], [self.y[i] for i in kept])


def available() -> bool:
    """Whether matplotlib can be imported (the `plots` extra)."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def line_chart(
    name: str, curves: Sequence[Series], x_label: str, y_label: str, *, small: bool = False
) -> str:
    """Curves over a common x axis, as an `<svg>` element.

    Args:
        name: unique in the page; the identifiers within begin with it.
        curves: what to draw; a name is shown where there are several.
        x_label: what x is, and its unit.
        y_label: what y is, and its unit.
        small: half the width.
    """
    figure, axes = _figure(4.4 if small else 9.0, 2.4 if small else 3.4)
    for curve, color in zip((curve.thinned() for curve in curves), COLORS, strict=False):
        marker = "o" if len(curve.x) < 30 else None
        axes.plot(curve.x, curve.y, color=color, linewidth=1.4, marker=marker, markersize=3, label=curve.name)
    if len(curves) > 1:
        axes.legend(frameon=False, labelcolor=INK)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return _svg(figure, name)


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
    figure, axes = _figure(9.0, 0.8 + 0.24 * len(labels))
    places = range(len(labels))
    axes.barh(places, values, xerr=errors, color=COLORS[0], ecolor=INK, height=0.7, capsize=2)
    for (mark, points), color in zip((marks or {}).items(), COLORS[1:], strict=False):
        axes.plot(points, places, linestyle="none", marker="D", markersize=4, color=color, label=mark)
    if marks:
        axes.legend(frameon=False, labelcolor=INK)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel(label)
    return _svg(figure, name)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure, in inches, without pyplot: nothing is kept between two charts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(visible=True, color=INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    return figure, axes


def _svg(figure: Figure, name: str) -> str:
    """The figure as one element, with the page's colour and font; its identifiers begin with `name`."""
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
