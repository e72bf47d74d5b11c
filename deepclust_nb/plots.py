"""The book's figures: one palette, one style, and a way to show them wherever a chapter is read.

Drawing functions add to a matplotlib axes, their first argument; `figure` makes the axes, `show` and
`stepper` turn figures into HTML. Nothing here computes a result. Figures come from matplotlib's object
interface, so no global state is touched and nothing is displayed twice.
"""

import base64
import hashlib
import html
import io
from pathlib import Path
from string import Template

import numpy as np

# Ten colours that stay apart in normal vision and in the three kinds of colour blindness.
# Petroff 2021, "Accessible Color Sequences for Data Visualization" (arXiv 2107.02270), ten-colour sequence.
PALETTE = tuple("#3f90da #ffa90e #bd1f01 #94a4a2 #832db6 #a96b59 #e76300 #b9ac70 #717581 #92dadd".split())
WIDTH = 6.4  # inches: the width of the book's column
SMALLEST_FONT = 11  # points at that width, about 9 pixels on a phone
MAX_FRAMES = 12
MAX_STEPPER_BYTES = 400_000

_STYLE = {"font.size": 12, "axes.titlesize": 13, "legend.fontsize": SMALLEST_FONT}
_STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
_STYLE |= {"xtick.labelsize": SMALLEST_FONT, "ytick.labelsize": SMALLEST_FONT}


def figure(nrows=1, ncols=1, width=WIDTH, height=None, projection=None):
    """A figure in the book's style: opaque, fonts readable on a phone, no frame above and to the right.

    Parameters: nrows, ncols: number of axes; width, height: inches, height by default 0.62 of an axes' width
        a row and at least 2.2; projection: "3d" for three-dimensional axes.
    Returns: (fig, ax), with an array of axes, as matplotlib's `subplots`, when there are several.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    height = max(2.2, 0.62 * width / ncols) * nrows if height is None else height
    with rc_context(_STYLE):
        fig = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        return fig, fig.subplots(nrows, ncols, subplot_kw={"projection": projection})


def show(fig, alt):
    """Display a figure as an HTML image with its words: alternative text and visible caption in one.

    The only picture in the output is a PNG inside `<img>`: a bare `image/png` output has no place for
    alternative text, while HTML with a data URI is shown by Jupyter, the rendered book, Colab and GitHub. The
    plain-text form of the output is the alternative text itself. The same figure gives the same bytes.

    Parameters: fig: a matplotlib figure, closed afterwards if pyplot made it; alt: what there is to see, in
        words.
    Raises: ValueError when alt is empty.
    """
    from IPython.display import display

    alt = _checked_alt(alt)
    words = f"<figcaption>{html.escape(alt)}</figcaption>"
    page = f'<figure style="margin:0">{_img(fig, alt)}{words}</figure>'
    display({"text/html": page, "text/plain": alt}, raw=True)


def stepper(frames, alt, captions=None, width=5.0, height=4.2, projection=None, start=-1):
    """A figure to step through by buttons, slider or keyboard; it opens on its last frame unless told.

    It needs no network, brings its own white box, and any number of them fit on a page. Its id comes from its
    content, so the same frames give the same bytes. Where scripts do not run, the frame of the start is
    shown. `alt` is its visible caption too, under that of the frame.

    Parameters: frames: 1 to 12 matplotlib figures, or functions that draw on the axes they are given; the
        axes of such functions get common limits, so that what moves is the data. alt: what is seen, in words.
        captions: a sentence for each frame. width, height, projection: as in `figure`, for functions alone.
        start: the frame on which it opens, -1 for the last.
    Returns: IPython.display.HTML of at most 400,000 bytes.
    Raises: ValueError for an empty alt, no frames or more than 12, a wrong number of captions, and when the
        result is too large.
    """
    from IPython.display import HTML

    alt, frames = _checked_alt(alt), list(frames)
    captions = [""] * len(frames) if captions is None else list(captions)
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise ValueError(f"stepper takes 1 to {MAX_FRAMES} frames, got {len(frames)}")
    if len(captions) != len(frames):
        raise ValueError(f"stepper needs a caption for each of {len(frames)} frames, got {len(captions)}")
    images, start = [], range(len(frames))[start]
    for i, fig in enumerate(_drawn(frames, width, height, projection)):
        label = f"{i + 1} of {len(frames)}" + (f": {captions[i]}" if captions[i] else "")
        # No theme may bring a frame back: only the script changes which one is shown.
        style = f"display:{'block' if i == start else 'none'}"
        images.append(_img(fig, f"{alt} ({label})", 100, 128, f'data-label="{html.escape(label)}"', style))
    parts = {"alt": html.escape(alt), "images": "\n".join(images), "last": len(frames) - 1, "start": start}
    parts["key"] = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
    page = Template((Path(__file__).parent / "stepper.html").read_text()).substitute(parts)
    if (size := len(page.encode())) > MAX_STEPPER_BYTES:
        raise ValueError(
            f"stepper would take {size:,} bytes and {MAX_STEPPER_BYTES:,} are allowed: "
            "use fewer frames, a smaller figure or fewer points"
        )
    return HTML(page)


def embedding(ax, z, y=None, centroids=None, names=None, axes=("component 1", "component 2", "component 3")):
    """Scatter of an embedding, each class in its colour and named at its median: colour is not the only cue.

    Parameters: ax: flat, or 3-D for three columns; z: (n, 2) or (n, 3) floats; y: (n,) integers from 0 to 19,
        or None for grey points; centroids: (k, 2) or (k, 3), drawn as crosses; names: texts indexed by y, ""
        for none, y itself by default; axes: texts for the axes.
    Raises: ValueError for wrong shapes, and for labels outside 0 to 19.
    """
    from matplotlib.patheffects import withStroke

    z, solid = _array(z), ax.name == "3d"
    if z.ndim != 2 or z.shape[1] != 2 + solid or len(z) == 0:
        raise ValueError(f"z must be (n, 2), or (n, 3) on 3-D axes, got {z.shape} on {ax.name} axes")
    labels = np.full(len(z), 8) if y is None else _array(y)
    if labels.shape != (len(z),):
        raise ValueError(f"y must hold a label for each of the {len(z)} points, got shape {labels.shape}")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 19:
        raise ValueError(
            f"y must be integers from 0 to 19, got {labels.dtype} {labels.min()} to {labels.max()}"
        )
    look = {"s": float(np.clip(12_000 / len(z), 2, 16)), "linewidths": 0}
    look |= {"depthshade": False} if solid else {}
    for marker, part in (("o", labels < 10), ("^", labels >= 10)):
        ax.scatter(*z[part].T, c=[PALETTE[i % 10] for i in labels[part]], marker=marker, **look)
    if centroids is not None:
        ax.scatter(*_array(centroids).T, s=80, c="black", marker="X", edgecolors="white", zorder=4)
    words = {"ha": "center", "va": "center", "weight": "bold", "size": 13, "zorder": 5}
    for label in [] if y is None else np.unique(labels):
        name = str(label if names is None else names[label])
        outline = [withStroke(linewidth=3, foreground="white")]
        ax.text(*np.median(z[labels == label], axis=0), name, path_effects=outline, **words)
    for way, text in zip("xyz"[: 2 + solid], axes, strict=False):
        ax.set(**{f"{way}label": text, f"{way}ticks": []})
    if not solid:
        ax.set_aspect("equal")


def pca2d(z, basis=None):
    """Project codes to the plane of the first two principal axes of `basis`, so that frames share one.

    scikit-learn fixes the sign that PCA leaves open: each axis points towards its largest loading.

    Parameters: z: (n, d) floats; basis: (m, d) floats to which the axes are fitted, z itself by default.
    Returns: (n, 2) floats.
    Raises: ValueError when z or basis is not two-dimensional, their widths differ, or d < 2.
    """
    from sklearn.decomposition import PCA

    z, basis = _array(z), _array(z if basis is None else basis)
    if z.ndim != 2 or basis.ndim != 2 or z.shape[1] != basis.shape[1] or z.shape[1] < 2:
        raise ValueError(
            f"z and basis must be (n, d) with one d of at least 2, got {z.shape} and {basis.shape}"
        )
    return PCA(2, svd_solver="full").fit(basis.astype(float)).transform(z.astype(float))


def confusion(ax, table, names=None, clusters=None, percent=True):
    """Heat map of a contingency table: colour is the share of the class, text a percentage or a count.

    Parameters: table: (n_classes, n_clusters) counts, as `metrics.confusion` returns; names: a name for
        each class; clusters: a name for each column; percent: write per cent of the row, else the count.
        Cells that round to nothing stay empty, and with more than 12 columns no cell carries text.
    Raises: ValueError when table is not two-dimensional or is empty.
    """
    table = _array(table)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"table must be (n_classes, n_clusters) counts, got shape {table.shape}")
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(share):
        text = f"{100 * value:.0f}" if percent else str(table[row, column])
        if text != "0" and table.shape[1] <= 12:
            ax.text(column, row, text, ha="center", va="center", color="white" if value > 0.5 else "black")
    ax.set_yticks(range(len(table)), range(len(table)) if names is None else names)
    ax.set_xticks(range(table.shape[1]), range(table.shape[1]) if clusters is None else clusters)
    ax.set(xlabel="cluster, in the order of its class" if clusters is None else "cluster", ylabel="class")


def images(ax, x, ncols=10, rows=(), columns=()):
    """Grid of images, left to right and then down, in one picture; a figure of its own fits its height to it.

    Parameters: x: (n, 1 or 3, height, width), uint8 or floats, which are cut off outside [0, 1]; ncols:
        images a row; rows, columns: texts beside the rows and above the columns.
    Raises: ValueError for another shape.
    """
    x = _array(x)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or len(x) == 0:
        raise ValueError(f"x must be images of shape (n, 1 or 3, height, width), got {x.shape}")
    x = x / 255 if x.dtype == np.uint8 else np.clip(x, 0, 1)
    n, channels, height, width = x.shape
    nrows, high, wide = -(-n // ncols), height + 2, width + 2  # a white gap of two pixels
    sheet = np.ones((nrows * ncols, high, wide, channels))
    sheet[:n, :height, :width] = x.transpose(0, 2, 3, 1)
    sheet = sheet.reshape(nrows, ncols, high, wide, channels).swapaxes(1, 2)
    sheet = sheet.reshape(nrows * high, ncols * wide, channels)[:-2, :-2]
    ax.imshow(sheet.repeat(3 // channels, axis=2), interpolation="nearest")
    ax.set_yticks(np.arange(len(rows)) * high + (height - 1) / 2, rows)
    ax.set_xticks(np.arange(len(columns)) * wide + (width - 1) / 2, columns)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    if len(ax.figure.axes) == 1:
        fitted = ax.figure.get_figwidth() * len(sheet) / sheet.shape[1]
        ax.figure.set_figheight(fitted + (0.3 if len(columns) else 0))


def curves(ax, series, xlabel="step", ylabel=None):
    """Lines that differ in colour and in dash, with a legend when there are several.

    Parameters: series: dict from a name to (n,) values, or to a tuple (x, values); ylabel: the name of a
        single series by default.
    Raises: ValueError when series is empty.
    """
    if not series:
        raise ValueError("curves needs at least one series, got none")
    for i, (name, values) in enumerate(series.items()):
        x, values = values if isinstance(values, tuple) else (np.arange(len(values)), values)
        colour = PALETTE[(0, 2, 4, 8, 6, 5, 1, 7, 3, 9)[i % 10]]  # dark ones first: lines are thin
        ax.plot(_array(x), _array(values), ("-", "--", "-.", ":")[i % 4], color=colour, lw=1.8, label=name)
    ax.set(xlabel=xlabel, ylabel=next(iter(series)) if ylabel is None and len(series) == 1 else ylabel)
    if len(series) > 1:
        ax.legend(frameon=False)


def dots(ax, groups, xlabel="ACC"):
    """Every seed of every method as a dot, beside what a paper reported and what others published by seed.

    Parameters: groups: dict from a method's name to its values by seed, or to a dict with any of the keys
        "seeds", "paper" (one number or several) and "public". A failed seed is NaN: it is drawn as a cross at
        the left edge. A key may also hold None.
    Raises: ValueError when groups is empty or a key is unknown.
    """
    looks = {
        "seeds": (-0.2, "our seeds", {"c": PALETTE[0], "marker": "o"}),
        "paper": (0, "paper", {"c": PALETTE[2], "marker": "D"}),
        "public": (0.2, "public seeds", {"c": "none", "edgecolors": "#333333", "marker": "o"}),
    }
    if not groups:
        raise ValueError("dots needs at least one method, got none")
    failed = {"c": "black", "marker": "x", "label": "failed"}
    for row, (method, group) in enumerate(groups.items()):
        group = group if isinstance(group, dict) else {"seeds": group}
        if unknown := sorted(set(group) - set(looks)):
            raise ValueError(f"dots knows the keys {', '.join(looks)}, got {unknown[0]!r} for {method}")
        ax.axhspan(row - 0.45, row + 0.45, color="#f3f3f3", zorder=0, lw=0)
        for key, values in group.items():
            lane, label, look = looks[key]
            values = np.atleast_1d(np.asarray([] if values is None else values, dtype=float))
            height = row + lane + np.linspace(-0.1, 0.1, len(values) + 2)[1:-1]  # ties stay visible
            ok = np.isfinite(values)
            if ok.any():
                ax.scatter(values[ok], height[ok], s=40, label=label, **look)
            if not ok.all():
                edge = np.full((~ok).sum(), 0.02)
                ax.scatter(edge, height[~ok], s=40, transform=ax.get_yaxis_transform(), **failed)
    ax.set_yticks(range(len(groups)), groups)
    ax.set(xlabel=xlabel, ylim=(len(groups) - 0.5, -0.5))
    ax.locator_params(axis="x", nbins=5)  # more labels would touch one another on a phone
    handles, labels = ax.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    ax.legend(once.values(), once, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=2, frameon=False)


def bars(ax, sizes, names=None, ylabel="points"):
    """Cluster sizes as bars, with a dashed line at the equal share.

    Parameters: sizes: (k,) counts; names: a name for each cluster, its number by default.
    Raises: ValueError when sizes is empty or not a vector.
    """
    sizes = _array(sizes)
    if sizes.ndim != 1 or sizes.size == 0:
        raise ValueError(f"sizes must be a non-empty vector of counts, got shape {sizes.shape}")
    ax.bar(range(len(sizes)), sizes, color=PALETTE[0])
    ax.axhline(sizes.mean(), color="black", ls="--", lw=1.2, label="equal share")
    if names is not None or len(sizes) <= 12:
        ax.set_xticks(range(len(sizes)), range(len(sizes)) if names is None else names)
    ax.set(xlabel="cluster", ylabel=ylabel)
    ax.legend(frameon=False)


def pipeline(boxes, arrows, width=WIDTH):
    """Drawing of an idea: boxes with text, joined by arrows.

    Parameters: boxes: dict from a key to (x, y, text) or (x, y, text, colour), the box's centre, in any unit;
        the drawing is as wide as `width` inches. arrows: list of (from, to), (from, to, label) or (from, to,
        label, bend), with keys of boxes; a bend of 0.3 curves an arrow to its right.
    Returns: the figure.
    Raises: ValueError when an arrow names no box.
    """
    from matplotlib.colors import to_rgb

    if unknown := [key for arrow in arrows for key in arrow[:2] if key not in boxes]:
        raise ValueError(f"an arrow names the box {unknown[0]!r}, the boxes are {', '.join(map(str, boxes))}")
    xy = {key: np.array(box[:2], dtype=float) for key, box in boxes.items()}
    low, high = (way(list(xy.values()), axis=0) for way in (np.min, np.max))
    margin = max(0.12 * (high[0] - low[0]), 0.5)
    low, high = low - (margin, 0.6 * margin), high + (margin, 0.6 * margin)
    fig, ax = figure(width=width, height=width * (high[1] - low[1]) / (high[0] - low[0]))
    patches, middle = {}, {"ha": "center", "va": "center"}
    for key, (_, _, text, *colour) in boxes.items():
        edge = np.array(to_rgb(colour[0] if colour else PALETTE[0]))
        frame = {"boxstyle": "round,pad=0.4", "fc": 0.2 * edge + 0.8, "ec": edge, "lw": 1.5}
        patches[key] = ax.text(*xy[key], text, bbox=frame, zorder=3, **middle).get_bbox_patch()
    for start, end, *rest in arrows:
        label, bend = [*rest, *("", 0)[len(rest) :]]
        line = {"arrowstyle": "-|>", "lw": 1.5, "mutation_scale": 16, "connectionstyle": f"arc3,rad={bend}"}
        line |= {"patchA": patches[start], "patchB": patches[end], "shrinkA": 2, "shrinkB": 2}
        ax.annotate("", xy[end], xy[start], arrowprops=line | {"color": "#333333"}, zorder=1)
        if label:
            dx, dy = xy[end] - xy[start]
            place = (xy[start] + xy[end]) / 2 + bend / 2 * np.array([dy, -dx])
            ax.text(*place, label, bbox={"fc": "white", "ec": "none", "pad": 1}, zorder=2, **middle)
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    ax.axis("off")
    return fig


def _array(x):
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.float() if x.is_floating_point() and x.element_size() < 4 else x  # NumPy has no bfloat16
    return np.asarray(x)


def _checked_alt(alt):
    if not isinstance(alt, str) or not alt.strip():
        raise ValueError(f"alt must say in words what the figure shows, got {alt!r}")
    return " ".join(alt.split())


def _drawn(frames, width, height, projection):
    figures, axes = list(frames), []
    for i, frame in enumerate(frames):
        if not hasattr(frame, "savefig"):
            figures[i], ax = figure(1, 1, width, height, projection)
            frame(ax)
            axes.append(ax)
    for way in ("xyz" if projection == "3d" else "xy") if axes else "":
        limits = np.array([getattr(ax, f"get_{way}lim")() for ax in axes])
        low, high = limits.min(), limits.max()
        for ax in axes:
            ax.set(**{f"{way}lim": (low, high) if limits[0, 0] < limits[0, 1] else (high, low)})
    return figures


def _img(fig, alt, dpi=144, colours=256, attributes="", style=""):
    """An opaque PNG of `fig` in an `<img>` that shrinks with the page, with text that a phone can show."""
    from matplotlib import rc_context
    from matplotlib.text import Text
    from PIL import Image

    smallest = SMALLEST_FONT * max(1, fig.get_figwidth() / WIDTH)
    with rc_context(_STYLE | {"xtick.labelsize": smallest, "ytick.labelsize": smallest}):
        for text in fig.findobj(Text):
            text.set_fontsize(max(text.get_fontsize(), smallest))
        raw, png = io.BytesIO(), io.BytesIO()
        fig.savefig(raw, format="png", dpi=dpi, facecolor="white")
    # A palette makes the file about four times smaller; this method has the smallest worst error of Pillow's.
    method = Image.Quantize.MAXCOVERAGE
    Image.open(raw).convert("RGB").quantize(colours, method, dither=0).save(png, "PNG", optimize=True)
    if hasattr(fig, "number"):  # given by pyplot, which would show it again
        import matplotlib.pyplot as plt

        plt.close(fig)
    width, height = (round(96 * inches) for inches in fig.get_size_inches())
    data = base64.b64encode(png.getvalue()).decode()
    # The class `dark-light` tells the book's theme to leave the colours alone in dark mode.
    return (
        f'<img class="dark-light" alt="{html.escape(alt)}" width="{width}" height="{height}" {attributes} '
        f'style="max-width:100%;height:auto;background:#fff;{style}" src="data:image/png;base64,{data}">'
    )
