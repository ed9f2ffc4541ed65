"""Charts of numbers: learning curves, and samples as grids of images."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits.arguments import checked_count
from circuits.errors import ArgumentError
from circuits.files import replace_file
from circuits.learning import FitResult

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

_FORMATS = (".png", ".svg", ".pdf")
_MAX_IMAGES = 1024
_MAX_LEGEND_INSIDE = 6
_MAX_LEGEND_ROWS = 18


def learning_curves(results: FitResult | Mapping[str, FitResult], path: str | os.PathLike[str]) -> None:
    """Draw likelihoods by epoch: lines in training, dashes in validation, a dot at the epoch the weights are from.

    Args:
        results: of :func:`ct.learning.fit <circuits.learning.fit>`, one, or several by the names to show.
        path: a .png, .svg or .pdf file.

    Raises:
        ArgumentError: no result, or another kind of file.
    """
    named = {"": results} if isinstance(results, FitResult) else results
    if not isinstance(named, Mapping) or not named or not all(isinstance(r, FitResult) for r in named.values()):
        raise ArgumentError(f"results: expected a ct.learning.FitResult or several by name, got {results!r:.60}")
    target = checked_path(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 4.0), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    later: list[float] = []
    num_epochs = max(len(result.train_log_likelihood) for result in named.values())
    for number, (name, result) in enumerate(named.items()):
        style: dict[str, Any] = {"color": f"C{number % 10}", "linewidth": 1.6}
        prefix = f"{name}, " if name else ""
        # a training likelihood is that of the weights before the epoch's update, a validation likelihood after it
        train = [math.nan if math.isinf(value) else value for value in result.train_log_likelihood]
        axes.plot(range(len(train)), train, label=f"{prefix}training", **style)
        curve, first = train, 0
        if result.validation_log_likelihood:
            curve = [math.nan if math.isinf(value) else value for value in result.validation_log_likelihood]
            first = 1
            axes.plot(range(1, len(curve) + 1), curve, "--", label=f"{prefix}validation", **style)
        if result.best_epoch < len(curve):
            axes.plot([result.best_epoch + first], [curve[result.best_epoch]], "o", color=style["color"], markersize=5)
        later += [value for part in (train, curve) for value in part[len(part) // 10 :] if not math.isnan(value)]
    if later and min(later) < max(later):  # the first steps from random weights would leave no room for the rest
        margin = 0.05 * (max(later) - min(later))
        axes.set_ylim(min(later) - margin, max(later) + margin)
    axes.set_xlabel("epochs of learning")
    axes.set_ylabel("log-likelihood (nats per sample)")
    axes.set_xlim(-0.02 * num_epochs - 0.1, 1.02 * num_epochs + 0.1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    num_entries = len(axes.get_legend_handles_labels()[1])
    if num_entries <= _MAX_LEGEND_INSIDE:
        axes.legend(frameon=False, loc="best", fontsize=9)
    else:
        columns = math.ceil(num_entries / _MAX_LEGEND_ROWS)
        figure.set_size_inches(6.4 + 1.8 * columns, 4.0)
        figure.legend(frameon=False, loc="outside right upper", ncols=columns, fontsize=8)
    save(figure, target)


def samples(
    images: Tensor | np.ndarray,  # shape: (N, H, W) or (N, H, W, 3)
    path: str | os.PathLike[str],
    *,
    num_columns: int | None = None,
    value_range: tuple[float, float] | None = None,
    zoom: int = 2,
) -> None:
    """Draw images in a grid, row by row: samples, completions, or whatever else has pixels.

    Args:
        images: grey values (N, H, W), or red, green and blue (N, H, W, 3); at most 1024. Samples of a circuit, (N, D),
            are images after ``.reshape(-1, height, width)``.
        path: a .png, .svg or .pdf file.
        num_columns: images per row; None: as many as make the grid about square.
        value_range: the values that are black and white; None: the least and the greatest finite value. NaN is drawn
            red.
        zoom: how many pixels of the picture are one of the images.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value.
    """
    import numpy as np

    if isinstance(images, Tensor):
        images = images.detach().cpu()
        images = images.double() if images.is_floating_point() else images  # numpy knows no bfloat16
    values = np.asarray(images)
    is_color = values.ndim == 4 and values.shape[3] == 3
    if (
        not (values.ndim == 3 or is_color)
        or not values.size
        or len(values) > _MAX_IMAGES
        or values.dtype.kind in "OUSc"
    ):
        raise ArgumentError(
            f"images: expected numbers (N, H, W) or (N, H, W, 3) with N from 1 to {_MAX_IMAGES}, got {values.dtype} "
            f"{values.shape}"
        )
    for name, count in (("num_columns", num_columns), ("zoom", zoom)):
        if count is not None:
            checked_count(name, count)
    target = checked_path(path)
    pixels = values.astype(np.float64)
    is_finite = np.isfinite(pixels)
    if value_range is None:
        value_range = (pixels[is_finite].min(), pixels[is_finite].max()) if is_finite.any() else (0.0, 1.0)
    is_pair = isinstance(value_range, (tuple, list)) and len(value_range) == 2
    if not is_pair or not -math.inf < value_range[0] <= value_range[1] < math.inf:
        raise ArgumentError(f"value_range: expected (least, greatest), got {value_range!r}")
    low, high = value_range
    pixels = ((pixels - low) / (high - low if high > low else 1.0)).clip(0, 1)
    if not is_color:
        pixels = np.repeat(pixels[..., None], 3, axis=3)
    pixels = np.where(np.isnan(pixels), np.array([0.8, 0.1, 0.1]), pixels)
    grid = _grid(torch.from_numpy(pixels), num_columns or math.ceil(math.sqrt(len(pixels))), zoom).numpy()

    from matplotlib.figure import Figure

    figure = Figure(figsize=(grid.shape[1] / 100, grid.shape[0] / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(grid, interpolation="nearest", aspect="auto")
    save(figure, target)


def _grid(pixels: Tensor, num_columns: int, zoom: int) -> Tensor:
    """Return one picture (height, width, 3) of images (N, H, W, 3), with white lines between them."""
    pixels = pixels.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    count, height, width, _ = pixels.shape
    num_columns = min(num_columns, count)
    num_rows, gap = -(-count // num_columns), 2
    grid = pixels.new_ones(num_rows * (height + gap) + gap, num_columns * (width + gap) + gap, 3)
    for number, image in enumerate(pixels):
        row, column = divmod(number, num_columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def checked_path(path: str | os.PathLike[str]) -> Path:
    """Return the path of a picture; raise ArgumentError unless it ends like one."""
    target = Path(path)
    if target.suffix.lower() not in _FORMATS:
        raise ArgumentError(f"path: expected a file that ends in {', '.join(_FORMATS)}, got {target.name!r}")
    return target


def save(figure: Figure, path: Path) -> None:
    """Write a figure without the date and the program's version, so that the same picture is the same file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    suffix = path.suffix.lower()
    metadata = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[suffix]
    with replace_file(path) as temporary:
        figure.savefig(temporary, format=suffix[1:], metadata=metadata)
