"""Pictures and tables: what is drawn is where it belongs, and says what it should."""
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from minicrf.data import voc
from minicrf.inputs import VOID
from minicrf.results import figures


def labels_of_quarters(h=12, w=16):
    labels = np.zeros((h, w), np.uint8)
    labels[h // 2:, :w // 2] = 1
    labels[:, w // 2:] = 15
    labels[0] = VOID
    return labels


def row(predictions=("unary", "joint"), h=12, w=16):
    labels = labels_of_quarters(h, w)
    guess = np.where(labels == VOID, 0, labels)
    image = np.full((h, w, 3), 100, np.uint8)
    return dict(image=image, labels=labels, name="2007_000001",
                predictions={method: (guess, "below") for method in predictions})


def pixels(path):
    return np.array(Image.open(path).convert("RGB")).astype(int)


def count(picture, colour):
    return int((picture == np.array(colour)).all(axis=-1).sum())


def test_overlay_blends_vocs_colours_and_hatches_void():
    labels = labels_of_quarters()
    image = np.full((*labels.shape, 3), 100, np.uint8)
    blended = np.array(figures.overlay(image, labels))                     # a grey of 60 + 76
    assert blended.dtype == np.uint8
    assert tuple(blended[-1, 0]) == (round(0.4 * 136 + 0.6 * 128), round(0.4 * 136), 54)
    assert tuple(blended[5, -1]) == (round(0.4 * 136 + 0.6 * 192), 131, 131)
    assert tuple(blended[3, 0]) == (round(0.7 * 136),) * 3         # background stays visible
    assert set(blended[0, :, 0].tolist()) == {90, 255}


@pytest.fixture
def texts(monkeypatch):
    """All texts that are drawn."""
    found, draw = [], ImageDraw.ImageDraw.text

    def text(self, at, text, *more):
        found.append(text)
        draw(self, at, text, *more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return found


def test_panel_has_a_column_for_each_method(tmp_path, texts):
    path = tmp_path / "panel.png"
    figures.panel(path, [row(), row()], voc.CLASS_NAMES, "Title")
    assert [p.name for p in tmp_path.iterdir()] == ["panel.png"]
    picture = pixels(path)
    assert picture.shape[1] == 10 + 4 * 270
    overlay = np.array(figures.overlay(row()["image"], labels_of_quarters()))
    for colour in (overlay[-1, 0], overlay[-1, -1]):
        areas = [count(picture[:263, 10 + i * 270:270 + i * 270], colour) for i in range(4)]
        assert areas[0] == 0 and areas[3] > 1000
        assert areas[2] == areas[3] and areas[1] >= 0.9 * areas[2]
    assert texts[:9] == ["Title", "image", "truth", "unary", "joint", "2007_000001", "", "below",
                         "below"]


def test_panel_names_the_classes_in_the_colours_of_its_pictures(tmp_path, texts):
    figures.panel(tmp_path / "few.png", [row()], voc.CLASS_NAMES, "Few classes")
    assert texts[-4:] == ["person", "background", "aeroplane", "void (not scored)"]
    legend = pixels(tmp_path / "few.png")[-40:]
    image = np.full((1, 3, 3), 100, np.uint8)
    colours = np.array(figures.overlay(image, np.array([[1, 15, 2]], np.uint8)))[0]
    assert [count(legend, colour) for colour in colours] == [256, 256, 0]


def test_a_legend_that_is_too_long_ends_in_dots(tmp_path, texts):
    many = row()
    many["labels"] = np.arange(12 * 16, dtype=np.uint8).reshape(12, 16) % 21
    figures.panel(tmp_path / "many.png", [many], voc.CLASS_NAMES, "Twenty-one classes")
    assert texts[-1] == "..." and 5 < len({*texts} & {*voc.CLASS_NAMES}) < 21


def log(stage, values, step=10):
    rows = [dict(stage=stage, iteration=str(step * i + step), miou=str(v), images="20/110")
            for i, v in enumerate(values)]
    return rows + [dict(stage=stage, iteration="5", miou="", images="")]


def test_curves_draw_each_stage_in_its_plot(tmp_path, texts):
    path = tmp_path / "curves.png"
    figures.curves(path, log("unary", [10, 30, 40]) + log("joint", [42, 47]))
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
    assert texts.count("mean IoU, %, on 20/110 validation images") == 2
    picture = pixels(path)
    left, right = picture[:, :500], picture[:, 500:]
    assert count(left, figures.BLUE) > 200 and count(left, figures.ORANGE) == 0
    assert count(right, figures.ORANGE) > 200 and count(right, figures.BLUE) > 100
    figures.curves(path, log("unary", [10, 30, 40]) + log("piecewise", [50]))
    assert count(pixels(path)[:330], figures.ORANGE) == 0          # no joint values: legend alone


def test_best_unary_value_is_a_line_at_its_height_in_the_joint_plot(tmp_path):
    figures.curves(tmp_path / "c.png", log("unary", [10, 30, 20]) + log("joint", [42, 47]))
    blue = (pixels(tmp_path / "c.png") == figures.BLUE).all(axis=-1)
    line = blue[:, 500:].sum(axis=1).argmax()                      # the row with most blue
    peak = blue[:, 71:476].any(axis=1).argmax()                    # the top of the unary curve
    assert abs(line - (peak + 3)) <= 2


@pytest.mark.parametrize("rows", [
    [], log("unary", [12.5]), log("joint", [50]), log("unary", ["nan", 20]), log("unary", [0, 0]),
    log("unary", [100, 100]), log("unary", [33.3] * 3, step=10000), log("joint", [71.23, 71.24]),
    [dict(stage="joint", iteration=0, miou=50.0, images="1/2")], log("piecewise", [3, 4])])
def test_curves_of_odd_logs_are_drawn(tmp_path, rows):
    figures.curves(tmp_path / "curves.png", rows)
    assert pixels(tmp_path / "curves.png").shape == (420, 1000, 3)


def test_table_is_aligned_and_shows_absent_classes():
    methods = ("unary", "unary + CRF", "unary (control)", "piecewise", "joint without CRF", "joint")
    results = {method: {"miou": 51.87, "iou": dict.fromkeys(voc.CLASS_NAMES, 50.123),
                        "miou_band": 40.06} for method in methods}
    for method in ("unary", "piecewise", "joint"):
        results[method]["iou"]["boat"] = None
    lines = figures.table(results, voc.CLASS_NAMES).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 80
    assert lines[0].split() == "IoU, % unary unary + CRF unary piecewise joint joint".split()
    assert lines[1].split() == ["(control)", "without", "CRF"]
    assert [line.split()[0] for line in lines[3:-3]] == list(voc.CLASS_NAMES)
    boat = next(line for line in lines if line.startswith("boat"))
    assert boat.split() == ["boat", "-", "50.1", "50.1", "-", "50.1", "-"]
    assert lines[-2].split() == ["mean", "IoU"] + ["51.9"] * 6
    assert lines[-1].split() == ["within", "5", "px"] + ["40.1"] * 6
    ends = [match.end() for match in re.finditer(r"(?<=  )\S+( \S+)*", lines[0])][-6:]
    assert all(line[end - 1] in "0123456789-" for line in lines[3:] for end in ends)
