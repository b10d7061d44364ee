"""Plots that stand alone, as small SVG files: the same data give the same bytes.

    python -m dev.plots RUN FILE.svg    # the loss and the bits per byte of a run, over its tokens

The picture in README.md is made so.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.common import charts, files
from nanochat.common.errors import UserError, cli
from nanochat.report import RunFiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def save(path: Path, draw: Callable[[Axes, Axes], Any]) -> None:
    """Write a figure of two panels side by side as SVG.

    Args:
        path: of the file.
        draw: is given the axes of both, and draws into them.

    Raises:
        UserError: matplotlib is not installed.
    """
    if not charts.available():
        raise UserError("plots need matplotlib, which is not installed. Add it: pip install matplotlib")
    files.atomic_write(path, charts.svg(re.sub(r"\W", "-", path.stem), 10.0, 3.8, draw, panels=2))


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
    axes.legend(fontsize=7)


def picture(name: str, path: Path) -> None:
    """Draw the training loss of a run, and beside it the validation bits per byte, over its tokens."""
    run = RunFiles.read(name)
    loss = [run.curve("step", "loss", "loss of a step"), run.curve("step", "smoothed_loss", "smoothed")]
    bpb = run.curve("eval", "val_bpb", "validation")

    def draw(left: Axes, right: Axes) -> None:
        charts.draw_lines(left, loss, "million tokens", "training loss, nats per token")
        charts.draw_lines(right, [bpb], "million tokens", "validation, bits per byte")

    save(path, draw)


@cli
def main() -> None:
    """Draw the run that is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="name of the run")
    parser.add_argument("path", metavar="FILE.svg", type=Path, help="the file to write")
    args = parser.parse_args()
    picture(args.run, args.path)


if __name__ == "__main__":
    main()
