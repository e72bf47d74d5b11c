"""Figures: what a reader can see, read on a phone, hear read out, and step through without a network."""

import base64
import html
import io
import itertools
import re
import shutil
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb, to_rgba
from matplotlib.text import Text
from PIL import Image

from deepclust_nb import plots

rng = np.random.default_rng(0)
Z, Y = rng.normal(size=(300, 5)), rng.integers(0, 10, 300)


def shown(fig, alt, monkeypatch):
    """The mime bundle that `show` displays."""
    bundles = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: bundles.append(data))
    plots.show(fig, alt)
    (bundle,) = bundles
    return bundle


def picture(page, i=0):
    return Image.open(
        io.BytesIO(base64.b64decode(re.findall(r'src="data:image/png;base64,([^"]+)"', page)[i]))
    )


def texts(ax):
    return [text.get_text() for text in ax.texts]


# --- the palette


def lab(rgb):
    """CIE L*a*b* of linear sRGB (n, 3) under D65."""
    white = np.array([0.9505, 1, 1.089])
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    t = rgb @ to_xyz.T / white
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


# Machado, Oliveira and Fernandes 2009, table 1: full protanopia, deuteranopia and tritanopia.
VISION = {
    "normal": [1, 0, 0, 0, 1, 0, 0, 0, 1],
    "protanopia": [
        0.152286,
        1.052583,
        -0.204868,
        0.114503,
        0.786281,
        0.099216,
        -0.003882,
        -0.048116,
        1.051998,
    ],
    "deuteranopia": [
        0.367322,
        0.860646,
        -0.227968,
        0.280085,
        0.672501,
        0.047413,
        -0.01182,
        0.04294,
        0.968881,
    ],
    "tritanopia": [1.255528, -0.076749, -0.178779, -0.078411, 0.930809, 0.147602, 0.004733, 0.691367, 0.3039],
}


@pytest.mark.parametrize("vision", VISION)
def test_ten_colours_stay_apart(vision):
    colours = np.array([to_rgb(colour) for colour in plots.PALETTE])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    seen = lab(np.clip(linear @ np.reshape(VISION[vision], (3, 3)).T, 0, 1))
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    assert len(distances) == 45
    assert min(distances) > 15  # matplotlib's own ten colours come as close as 5


# --- showing a figure


def test_import_loads_numpy_alone():
    code = "import sys, deepclust_nb.plots; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"matplotlib", "sklearn", "PIL", "IPython", "torch"} & set(done.stdout.split())


def test_a_figure_leaves_matplotlib_as_it_was(monkeypatch):
    before = dict(matplotlib.rcParams)
    fig, ax = plots.figure()
    plots.curves(ax, {"loss": [3, 2, 1]})
    shown(fig, "a loss that falls", monkeypatch)
    assert dict(matplotlib.rcParams) == before


def test_show_gives_one_opaque_image_with_its_alternative_text(monkeypatch):
    fig, ax = plots.figure()
    fig.set_facecolor("black")
    plots.embedding(ax, Z[:, :2], Y)
    bundle = shown(fig, 'digits in "two"\n   dimensions, 3 < 5', monkeypatch)
    assert set(bundle) == {"text/html", "text/plain"}
    assert bundle["text/plain"] == 'digits in "two" dimensions, 3 < 5'
    assert bundle["text/html"].count("<img ") == 1
    assert 'alt="digits in &quot;two&quot; dimensions, 3 &lt; 5"' in bundle["text/html"]
    caption = '<figcaption>digits in "two" dimensions, 3 < 5</figcaption></figure>'
    assert html.unescape(bundle["text/html"]).endswith(caption) and "3 < 5" not in bundle["text/html"]
    assert "max-width:100%;height:auto" in bundle["text/html"]
    image = picture(bundle["text/html"])
    assert "transparency" not in image.info and image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert image.text == {}  # no date, no version


@pytest.mark.parametrize("alt", ["", "  \n", None])
def test_a_figure_without_words_is_refused(alt):
    fig, ax = plots.figure()
    with pytest.raises(ValueError, match="alt must say in words what the figure shows, got"):
        plots.show(fig, alt)
    with pytest.raises(ValueError, match="alt must say in words"):
        plots.stepper([fig], alt)


def test_the_same_figure_gives_the_same_bytes(monkeypatch):
    pages = []
    for _ in range(2):
        fig, ax = plots.figure()
        plots.embedding(ax, Z[:, :2], Y, centroids=Z[:10, :2])
        pages.append(shown(fig, "codes", monkeypatch)["text/html"])
    assert pages[0] == pages[1]


def test_the_palette_of_the_file_costs_no_visible_colour(monkeypatch):
    fig, ax = plots.figure()
    plots.embedding(ax, Z[:, :2], Y)
    small = np.asarray(picture(shown(fig, "codes", monkeypatch)["text/html"]).convert("RGB"), dtype=int)
    full = io.BytesIO()
    fig.savefig(full, dpi=144, facecolor="white")
    error = np.abs(small - np.asarray(Image.open(full).convert("RGB"), dtype=int))
    assert error.max() <= 24 and error.mean() < 1


@pytest.mark.parametrize(("width", "smallest"), [(6.4, 11), (12.8, 22), (4, 11)])
def test_no_text_is_too_small_for_a_phone(width, smallest, monkeypatch):
    fig, ax = plots.figure(width=width)
    ax.plot([0, 1], [0, 1], label="line")
    ax.legend(fontsize=5)
    ax.set_title("title", fontsize=6)
    ax.text(0.5, 0.5, "tiny", fontsize=4)
    ax.tick_params(labelsize=3)
    late = fig.add_axes((0.7, 0.2, 0.2, 0.2))  # made outside `figure`
    late.plot([0, 1])
    shown(fig, "a line", monkeypatch)
    sizes = {text.get_text(): text.get_fontsize() for text in fig.findobj(Text) if text.get_text()}
    assert {"tiny", "title", "line"} <= set(sizes)
    assert min(sizes.values()) >= smallest


def test_a_pyplot_figure_is_closed_so_that_it_shows_once(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    fig = plt.figure()
    shown(fig, "empty axes", monkeypatch)
    assert not plt.fignum_exists(fig.number if hasattr(fig, "number") else 1) and plt.get_fignums() == []


# --- embeddings


def face(collection, i=0):
    return to_hex(collection.get_facecolors()[i])


def test_a_class_keeps_its_colour_when_another_is_missing():
    for present in ([0, 1, 2], [2]):
        _, ax = plots.figure()
        y = np.repeat(present, 4)
        plots.embedding(ax, rng.normal(size=(len(y), 2)), y)
        assert face(ax.collections[0], -1) == plots.PALETTE[2]


def test_each_class_is_named_at_its_median():
    _, ax = plots.figure()
    z = torch.tensor([[0.0, 0], [2, 4], [100, 1], [9, 9]], dtype=torch.bfloat16)
    plots.embedding(ax, z, torch.tensor([1, 1, 1, 3]), names=["a", "b", "c", "d"])
    assert {text.get_text(): text.get_position() for text in ax.texts} == {"b": (2, 1), "d": (9, 9)}


def test_twenty_classes_differ_in_marker_and_no_labels_give_grey():
    _, ax = plots.figure()
    plots.embedding(ax, Z[:2, :2], [3, 13])
    first, second = (scatter.get_paths()[0].vertices for scatter in ax.collections)
    assert face(ax.collections[0]) == face(ax.collections[1]) == plots.PALETTE[3] and len(first) != len(
        second
    )
    _, ax = plots.figure()
    plots.embedding(ax, Z[:, :2])
    assert face(ax.collections[0]) == plots.PALETTE[8] and not ax.texts


def test_an_embedding_in_space_and_one_unit_for_both_axes():
    _, ax = plots.figure(projection="3d")
    plots.embedding(ax, Z[:, :3], Y, centroids=Z[:2, :3])
    assert ax.get_zlabel() == "component 3" and len(texts(ax)) == 10
    _, flat = plots.figure()
    plots.embedding(flat, Z[:, :2], Y)
    assert flat.get_aspect() == 1


@pytest.mark.parametrize(
    ("z", "y", "message"),
    [
        (Z[:, :3], None, r"z must be \(n, 2\), or \(n, 3\) on 3-D axes, got \(300, 3\)"),
        (Z[:, :2], Y[:-1], r"each of the 300 points, got shape \(299,\)"),
        (Z[:, :2], Y + 11, "integers from 0 to 19, got int64 11 to 20"),
        (Z[:, :2], Y - 1, "got int64 -1 to 8"),
        (Z[:, :2], Y / 2, "got float64"),
    ],
)
def test_wrong_embeddings(z, y, message):
    _, ax = plots.figure()
    with pytest.raises(ValueError, match=message):
        plots.embedding(ax, z, y)


# --- projections


def test_frames_share_one_projection():
    last = Z * [5, 4, 1, 1, 1]
    move = rng.normal(size=5)
    moved = plots.pca2d(Z + move, basis=last) - plots.pca2d(Z, basis=last)
    assert np.allclose(moved, moved[0]) and np.linalg.norm(moved[0]) > 0.1


@pytest.mark.parametrize("seed", range(4))
def test_pca_against_a_singular_value_decomposition_with_fixed_signs(seed):
    z = np.random.default_rng(seed).normal(size=(200, 5))
    _, _, axes = np.linalg.svd(z - z.mean(axis=0))
    for column, axis in zip(plots.pca2d(torch.tensor(z)).T, axes, strict=False):
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        assert np.allclose(column, (z - z.mean(axis=0)) @ axis)


@pytest.mark.parametrize(("z", "basis"), [(Z[:, :1], None), (Z[0], None), (Z, Z[:, :4])])
def test_wrong_projections(z, basis):
    with pytest.raises(ValueError, match=r"z and basis must be \(n, d\) with one d of at least 2, got"):
        plots.pca2d(z, basis)


# --- tables, images, curves


def test_confusion_shows_shares_of_the_class_or_counts():
    table = np.array([[199, 1, 0], [30, 10, 60]])
    _, ax = plots.figure()
    plots.confusion(ax, table, names=["zero", "one"])
    assert texts(ax) == ["100", "30", "10", "60"]  # half a per cent rounds to nothing
    assert [to_hex(t.get_color()) for t in ax.texts] == ["#ffffff", "#000000", "#000000", "#ffffff"]
    assert np.allclose(ax.images[0].get_array(), [[0.995, 0.005, 0], [0.3, 0.1, 0.6]])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["zero", "one"]
    _, ax = plots.figure()
    plots.confusion(ax, torch.tensor(table), clusters=[7, 8, 9], percent=False)
    assert texts(ax) == ["199", "1", "30", "10", "60"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["7", "8", "9"]


def test_confusion_of_an_empty_class_and_of_many_clusters():
    _, ax = plots.figure()
    plots.confusion(ax, np.array([[0, 0], [1, 1]]))
    assert texts(ax) == ["50", "50"]
    _, ax = plots.figure()
    plots.confusion(ax, np.ones((10, 20), dtype=int))
    assert texts(ax) == []
    with pytest.raises(ValueError, match=r"table must be \(n_classes, n_clusters\) counts, got shape \(3,\)"):
        plots.confusion(ax, np.ones(3))


def test_images_stand_in_reading_order_with_a_white_gap():
    _, ax = plots.figure()
    x = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 4, 3) * 50
    plots.images(ax, x, ncols=3, rows=["top", "bottom"], columns=["l", "m", "r"])
    sheet = np.asarray(ax.images[0].get_array())
    assert sheet.shape == (4 + 2 + 4, 3 + 2 + 3 + 2 + 3, 3)
    assert np.allclose(sheet[0, [0, 5, 10]], np.array([[0], [50], [100]]) / 255)
    assert np.allclose(sheet[6, [0, 5]], np.array([[150], [200]]) / 255)
    assert (sheet[4:6] == 1).all() and (sheet[:, 3:5] == 1).all() and (sheet[6:, 10:] == 1).all()
    assert list(ax.get_yticks()) == [1.5, 7.5] and list(ax.get_xticks()) == [1, 6, 11]


def test_images_in_colour_are_cut_to_the_range_and_others_refused(caplog):
    fig, ax = plots.figure(height=5)
    x = np.zeros((2, 3, 8, 8))
    x[0, 0], x[1, 2] = 1.5, -1
    plots.images(ax, x, ncols=2)
    sheet = np.asarray(ax.images[0].get_array())
    assert (sheet[0, 0] == [1, 0, 0]).all() and (sheet[0, -1] == 0).all()
    assert fig.get_figheight() < 4 and not caplog.records  # matplotlib warns when it has to cut
    with pytest.raises(ValueError, match=r"shape \(n, 1 or 3, height, width\), got \(2, 2, 8, 8\)"):
        plots.images(ax, x[:, :2])


def test_curves_differ_in_more_than_colour():
    _, ax = plots.figure()
    plots.curves(
        ax, {"a": [1, 2], "b": ([10, 20], torch.tensor([3.0, 4])), "c": [1, 1], "d": [2, 2]}, ylabel="loss"
    )
    assert len({line.get_linestyle() for line in ax.lines}) == 4
    assert ax.lines[1].get_xydata().tolist() == [[10, 3], [20, 4]]
    assert [text.get_text() for text in ax.get_legend().texts] == ["a", "b", "c", "d"]
    _, ax = plots.figure()
    plots.curves(ax, {"reconstruction": [1, 2]})
    assert ax.get_ylabel() == "reconstruction" and ax.get_legend() is None
    with pytest.raises(ValueError, match="at least one series"):
        plots.curves(ax, {})


def test_every_seed_is_a_dot_and_failed_ones_are_shown():
    _, ax = plots.figure()
    groups = {
        "k-means": [0.53, 0.53, 0.53],
        "DEC": {"seeds": [0.8, float("nan"), 0.9], "paper": 0.843, "public": [0.7, 0.75]},
        "IDEC": {"seeds": [0.85], "paper": [0.881, 0.867], "public": None},
    }
    plots.dots(ax, groups)
    points = {}
    for scatter in ax.collections:
        points.setdefault(scatter.get_label(), []).extend(scatter.get_offsets().tolist())
    ours, failed = np.array(points["our seeds"]), np.array(points["failed"])
    assert sorted(ours[:, 0]) == [0.53, 0.53, 0.53, 0.8, 0.85, 0.9]
    assert len(np.unique(ours, axis=0)) == 6  # equal values do not hide one another
    assert np.round(ours[:, 1]).tolist() == [0, 0, 0, 1, 1, 2]  # in the row of its method
    assert len(failed) == 1 and round(failed[0, 1]) == 1
    assert sorted(x for x, _ in points["paper"]) == [0.843, 0.867, 0.881]
    assert sorted(x for x, _ in points["public seeds"]) == [0.7, 0.75]
    hollow = next(scatter for scatter in ax.collections if scatter.get_label() == "public seeds")
    assert len(hollow.get_facecolors()) == 0
    assert sorted(text.get_text() for text in ax.get_legend().texts) == [
        "failed",
        "our seeds",
        "paper",
        "public seeds",
    ]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(groups)
    assert ax.get_ylim() == (2.5, -0.5)  # the first method stands on top


def test_wrong_dots():
    _, ax = plots.figure()
    with pytest.raises(ValueError, match="knows the keys seeds, paper, public, got 'papers' for DEC"):
        plots.dots(ax, {"DEC": {"papers": 0.8}})
    with pytest.raises(ValueError, match="at least one method"):
        plots.dots(ax, {})


def test_cluster_sizes_stand_beside_the_equal_share():
    _, ax = plots.figure()
    plots.bars(ax, torch.tensor([10, 20, 60]))
    assert [bar.get_height() for bar in ax.patches] == [10, 20, 60]
    assert set(ax.lines[0].get_ydata()) == {30}
    with pytest.raises(ValueError, match=r"non-empty vector of counts, got shape \(2, 2\)"):
        plots.bars(ax, np.ones((2, 2)))


def test_pipeline_joins_its_boxes_and_its_labels_cover_the_arrows():
    boxes = {"x": (0, 0, "image"), "z": (2, 0, "code", plots.PALETTE[2]), "q": (2, 1, "labels")}
    fig = plots.pipeline(boxes, [("x", "z"), ("z", "q", "compare"), ("q", "x", "pull", 0.3)])
    ax = fig.axes[0]
    arrows = [text for text in ax.texts if getattr(text, "arrow_patch", None)]
    assert [(tuple(a.xyann), tuple(a.xy)) for a in arrows] == [
        ((0, 0), (2, 0)),
        ((2, 0), (2, 1)),
        ((2, 1), (0, 0)),
    ]
    words = {text.get_text(): text for text in ax.texts if text.get_text()}
    assert set(words) == {"image", "code", "labels", "compare", "pull"}
    assert to_rgba(words["code"].get_bbox_patch().get_edgecolor()) == to_rgba(plots.PALETTE[2])
    assert max(a.zorder for a in arrows) < words["compare"].zorder < words["code"].zorder
    fig.draw_without_rendering()
    # A bent arrow's label lies on the curve: its middle is half way to the control point.
    path = arrows[2].arrow_patch.get_path()
    curve = ax.transData.inverted().transform(path.vertices[:3])
    middle = 0.25 * curve[0] + 0.5 * curve[1] + 0.25 * curve[2]
    assert np.linalg.norm(middle - words["pull"].get_position()) < 0.05
    with pytest.raises(ValueError, match="names the box 'y', the boxes are x, z, q"):
        plots.pipeline(boxes, [("x", "y")])


# --- stepping through frames


def frame(k):
    def draw(ax):
        plots.embedding(ax, Z[:, :2] * (k + 1), Y)

    return draw


def test_a_stepper_is_reproducible_and_loads_nothing():
    pages = [
        plots.stepper([frame(0), frame(1)], "codes that grow", ["before", "after"]).data for _ in range(2)
    ]
    assert pages[0] == pages[1]
    other = plots.stepper([frame(0), frame(2)], "codes that grow", ["before", "after"]).data
    keys = [re.findall(r'<div data-stepper="(\w+)"', page) for page in (pages[0], other)]
    assert keys[0] != keys[1] and len(keys[0]) == 1
    bare = re.sub(r"base64,[^\"]+", "", pages[0])
    assert not re.search(r"https?:|//\w|<link|<script [^>]*src|url\(", bare)


@pytest.mark.parametrize(("start", "first"), [({}, 2), ({"start": 0}, 0), ({"start": 1}, 1)])
def test_a_stepper_opens_on_its_last_frame_or_where_it_is_told(start, first):
    page = plots.stepper([frame(k) for k in range(3)], "codes", **start).data
    styles = re.findall(r'<img [^>]*?style="([^"]+)"', page)
    assert ["display:block" in style for style in styles] == [k == first for k in range(3)]
    assert ["display:none" in style for style in styles] == [k != first for k in range(3)]
    assert f'max="2" step="1" value="{first}"' in page and f"var at = {first}," in page


def test_a_stepper_says_each_frame_and_shows_its_words():
    page = plots.stepper([frame(k) for k in range(3)], 'a "$key" of <IMAGES>', ["one", "", "a < b"]).data
    assert '<div class="words">a &quot;$key&quot; of &lt;IMAGES&gt;</div>' in page
    assert 'aria-label="a &quot;$key&quot; of &lt;IMAGES&gt;"' in page
    assert re.findall(r'data-label="([^"]+)"', page) == ["1 of 3: one", "2 of 3", "3 of 3: a &lt; b"]
    assert 'alt="a &quot;$key&quot; of &lt;IMAGES&gt; (3 of 3: a &lt; b)"' in page


def test_frames_drawn_by_functions_share_limits_whichever_way_they_run():
    seen = []

    def draw(low, high):
        def on(ax):
            ax.plot([0, 1], [low, high])
            ax.set(ylim=(high, low))  # upside down
            seen.append(ax)

        return on

    plots.stepper([draw(0, 1), draw(-5, 3)], "lines")
    assert [ax.get_ylim() for ax in seen] == [(3, -5), (3, -5)]


def test_a_stepper_takes_finished_figures_and_space():
    fig, ax = plots.figure(width=3, height=2)
    ax.plot([1, 2])
    page = plots.stepper([fig, frame(0)], "a line, then codes").data
    assert [picture(page, i).size for i in range(2)] == [(300, 200), (500, 420)]
    turning = [lambda ax, a=a: (plots.embedding(ax, Z[:, :3], Y), ax.view_init(20, a)) for a in (0, 90)]
    page = plots.stepper(turning, "a turning cloud", projection="3d").data
    assert picture(page, 0).tobytes() != picture(page, 1).tobytes()


def test_twelve_frames_of_a_thousand_points_fit():
    z, y = rng.normal(size=(1000, 2)), rng.integers(0, 10, 1000)
    page = plots.stepper([lambda ax: plots.embedding(ax, z, y)] * 12, "codes").data
    assert page.count("<img ") == 12 and len(page.encode()) <= 400_000


def test_what_a_stepper_refuses():
    for frames in ([], [frame(0)] * 13):
        with pytest.raises(ValueError, match=f"stepper takes 1 to 12 frames, got {len(frames)}"):
            plots.stepper(frames, "codes")
    with pytest.raises(ValueError, match="a caption for each of 2 frames, got 1"):
        plots.stepper([frame(0)] * 2, "codes", ["only one"])
    noise = rng.random((500, 500))
    with pytest.raises(ValueError, match=r"would take \d{3},\d{3} bytes and 400,000 are allowed"):
        plots.stepper([lambda ax: ax.imshow(noise, cmap="viridis")] * 4, "noise")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Clicks through the first of two equal steppers, and writes what is seen after each step.
DRIVER = """<script>
window.onerror = function (message) { document.title += " ERROR " + message; };
setTimeout(function () {
  var boxes = document.querySelectorAll("[data-stepper]"), seen = [];
  function look(box) {
    var images = Array.from(box.querySelectorAll("img")), label = box.querySelector(".label").textContent;
    var shown = images.map(function (image, i) { return image.offsetHeight ? i : -1; });
    return shown.filter(function (i) { return i >= 0; }).join("+") + "|" + label;
  }
  function press(word) {
    boxes[0].querySelector('[data-go="' + word + '"]').click();
    seen.push(look(boxes[0]));
  }
  seen.push(look(boxes[0]));
  ["next", "first", "next", "back", "first", "back", "last"].forEach(press);
  var slider = boxes[0].querySelector("input");
  slider.value = 1; slider.dispatchEvent(new Event("input")); seen.push(look(boxes[0]));
  seen.push(look(boxes[1]), look(boxes[2]));
  boxes.forEach(function (box) {
    var edge = function (what) { return box.querySelector(what).getBoundingClientRect(); };
    var below = edge(".label").top >= edge("button").bottom;
    seen.push(below && box.getBoundingClientRect().right <= 358 && box.scrollWidth <= 358);
  });
  press("play");
  setTimeout(function () {
    seen.push(look(boxes[0]), boxes[0].querySelector('[data-go="play"]').textContent);
    document.title = seen.join(" ; ") + document.title;
  }, 4000);
}, 500);
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_buttons_work_on_a_phone_without_a_network(tmp_path):
    one = plots.stepper([frame(k) for k in range(3)], "codes", ["a", "b", "c"]).data
    two = plots.stepper([frame(4), frame(5)], "more codes", start=0).data
    body = f'<body style="margin:0"><div style="width:358px">{one}{one}{two}</div>{DRIVER}'
    (tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8><title></title>{body}")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    )
    flags += " --disable-component-update --disable-sync --virtual-time-budget=8000 --dump-dom"
    rules = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    page = (tmp_path / "page.html").as_uri()
    done = subprocess.run(
        [CHROMIUM, *flags.split(), *rules, page], capture_output=True, text=True, timeout=60
    )
    seen = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1].split(" ; ")
    a, b, c = "0|1 of 3: a", "1|2 of 3: b", "2|3 of 3: c"
    assert seen[:9] == [c, c, a, b, a, a, a, c, b]  # start, seven buttons, slider
    assert seen[9:11] == [c, "0|1 of 2"]  # its twin and its neighbour stand still
    assert seen[11:14] == ["true"] * 3  # nothing is wider than a phone, the label has its own line
    assert seen[14:] == [b, c, "Play"]  # playing runs to the last frame and stops
