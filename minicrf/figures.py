"""Pictures and tables of results, drawn with Pillow alone: the paper's Table 1 and Figures 4 to 6.

Every file is written beside its name and then renamed.
Legend: H x W pixels, L labels; labels (H, W) are 0..L-1 or VOID; IoU in percent; NaN, None: absent.
"""
import math
import os
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .losses import VOID
from .voc import palette

INK, FAINT, PAPER = (30, 30, 30), (215, 215, 215), (255, 255, 255)
BLUE, ORANGE = (0, 90, 180), (215, 95, 0)        # told apart by the colour-blind, too


def overlay(image, labels, colours=None, alpha=0.6):
    """Labels blended over their photograph: (H, W, 3) uint8.

    image (H, W, 3) uint8 RGB; labels (H, W); colours (L, 3) uint8, VOC's by default; alpha: share
    of the label's colour, half as much for background.  The photograph is in light greys, so that
    its colours cannot be taken for labels.  Void pixels are hatched.  Raises ValueError where the
    sizes differ.
    """
    if image.shape[:2] != labels.shape:
        raise ValueError(f"labels: found shape {labels.shape}, expected {image.shape[:2]}")
    table = palette(256) if colours is None else np.zeros((256, 3), np.uint8)
    if colours is not None:
        table[:len(colours)] = colours
    grey = 60 + 0.76 * image.mean(axis=2, keepdims=True, dtype=np.float32)           # (H, W, 1)
    share = np.where(labels == 0, alpha / 2, alpha).astype(np.float32)[:, :, None]   # (H, W, 1)
    blended = ((1 - share) * grey + share * table[labels]).round().astype(np.uint8)
    H, W = labels.shape
    stripes = (np.arange(H)[:, None] + np.arange(W)) // 2 % 3            # (H, W)
    hatch = np.where(stripes == 0, 90, 255).astype(np.uint8)[:, :, None]
    return np.where((labels == VOID)[:, :, None], hatch, blended)


def panel(path, rows, names, width=260, title=""):
    """Figures 5 and 6: a row for each image: the photograph, its truth and what methods made of it.

    rows: dicts with "image" (H, W, 3) uint8, "labels" (H, W), and optionally "name" and
    "predictions", a dict from method, e.g. "unary", to (labels (H, W), the image's mean IoU in
    percent).  A method that a row lacks leaves its place empty.  names: the L class names.  width:
    of a column, in pixels; small pictures are scaled up.  Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError(f"{path}: found no images to draw, expected at least one")
    methods = list(dict.fromkeys(m for row in rows for m in row.get("predictions", {})))
    columns = ["image", "truth", *methods]
    gap, line, head = 10, 22, 38 + (30 if title else 0)
    scales = [width / row["image"].shape[1] for row in rows]
    heights = [max(1, round(row["image"].shape[0] * scale)) for row, scale in zip(rows, scales)]
    canvas = Image.new("RGB", (gap + len(columns) * (width + gap),
                               head + sum(heights) + len(rows) * (2 * line + 2 * gap)), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((gap, 8), title, INK, _font(20))
    for i, column in enumerate(columns):
        draw.text((gap + i * (width + gap) + width / 2, head - 8), column, INK, _font(18), "ms")
    top = head
    for row, height in zip(rows, heights):
        pictures = {"image": (row["image"], row.get("name", "")), "truth": (row["labels"], "")}
        for method, (labels, score) in row.get("predictions", {}).items():
            pictures[method] = labels, f"mean IoU {_percent(score)}%" if _known(score) else ""
        for i, column in enumerate(columns):
            left = gap + i * (width + gap)
            if column in pictures:
                picture, caption = pictures[column]
                canvas.paste(_scaled(row["image"], picture, width, height), (left, top))
                draw.text((left + width / 2, top + height + 4), caption, INK, _font(16), "ma")
        _legend(draw, gap, top + height + line + 4, row, names)
        top += height + 2 * line + 2 * gap
    save(canvas, path)


def curves(path, log, size=(1000, 420)):
    """Figure 4: validation mean IoU over the iterations; on the left unary, on the right joint.

    log: rows of log.csv, dicts with "stage", "iteration", "miou" and "images", such as "20/110";
    rows with an empty miou are passed over.  The best unary value is a dashed line on the right.
    """
    points = {stage: [(int(row["iteration"]), float(row["miou"])) for row in log
                      if row["stage"] == stage and row.get("miou") not in ("", None)]
              for stage in ("unary", "joint")}
    points = {stage: [p for p in line if math.isfinite(p[1])] for stage, line in points.items()}
    values = [v for line in points.values() for _, v in line] or [0, 100]
    step = _step(max(max(values) - min(values), 1), 6)
    low = max(0, math.floor((min(values) - step / 4) / step) * step)
    high = min(100, math.ceil((max(values) + step / 4) / step) * step)
    canvas = Image.new("RGB", size, PAPER)
    best = max((v for _, v in points["unary"]), default=None)
    images = {stage: _images(log, stage) for stage in points}
    for number, (stage, colour) in enumerate((("unary", BLUE), ("joint", ORANGE))):
        left = number * size[0] // 2
        box = (left + 56, 64, left + size[0] // 2 - 24, size[1] - 88)
        level = () if stage == "unary" or best is None else (
            best, f"best unary, {best:.1f}"
            + (" on other images" if points["joint"] and len({*images.values()}) > 1 else ""))
        _plot(canvas, box, points[stage], colour, (stage, images[stage]), (low, high, step), level)
    save(canvas, path)


def table(results, names):
    """Table 1 as text: a line for each class, a column for each method, the means below.

    results: dict from method to {"miou": percent, "iou": {class name: percent or None}} and
    optionally "miou_band" within "band" pixels of class boundaries, as in results.json.  Classes
    absent from the truth are shown as "-".  A method's first word heads its column.
    """
    bands = sorted({result["band"] for result in results.values() if "band" in result})
    rows = [(name, [result["iou"].get(name) for result in results.values()]) for name in names]
    means = [("mean IoU", [result["miou"] for result in results.values()])]
    means += [(f"within {band} px", [result["miou_band"] if result.get("band") == band else None
                                     for result in results.values()]) for band in bands]
    heads = [[method.split()[0], *textwrap.wrap(" ".join(method.split()[1:]), 11)]
             for method in results]
    first = max(len(name) for name, _ in rows + means)
    widths = [max(7, *map(len, head)) for head in heads]

    def line(name, cells):
        return name.ljust(first) + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths))

    lines = [line("" if i else "IoU, %", [head[i] if i < len(head) else "" for head in heads])
             for i in range(max(map(len, heads)))]
    rule = "-" * len(lines[0])
    rows, means = ([line(name, map(_percent, values)) for name, values in part]
                   for part in (rows, means))
    return "\n".join([*lines, rule, *rows, rule, *means]) + "\n"


def save(canvas, path):
    """Write a picture, an Image or an (H, W, 3) uint8 array, as PNG; beside, then renamed."""
    canvas = canvas if isinstance(canvas, Image.Image) else Image.fromarray(canvas)
    canvas.save(f"{path}.tmp", format="PNG")
    os.replace(f"{path}.tmp", path)


def _images(log, stage):
    """What a stage's curve was measured on, as its log says."""
    found = dict.fromkeys(row.get("images") for row in log if row["stage"] == stage)
    counts = [text.split("/") for text in found if text]
    words = ["all" if k == n else f"the first {k} of" for k, n in counts]
    return f"{' or '.join(words)} {counts[-1][1]} validation images" if counts else ""


def _plot(canvas, box, points, colour, titles, y_axis, level):
    """One plot of Figure 4 within box (left, top, right, bottom), in pixels.

    titles: the stage, the images; y_axis: low, high, step; level: (percent, text) of a dashed line.
    """
    draw = ImageDraw.Draw(canvas)
    title, images = titles
    left, top, right, bottom = box
    low, high, step_y = y_axis
    last = max([x for x, _ in points], default=0) or 1
    step_x = max(1, _step(last, 6))

    def at(x, y):
        return (left + (right - left) * x / last,
                bottom - (bottom - top) * (y - low) / (high - low))

    for i in range(round((high - low) / step_y) + 1):
        y = low + i * step_y
        draw.line([at(0, y), at(last, y)], FAINT)
        draw.text((left - 8, at(0, y)[1]), f"{y:g}", INK, _font(15), "rm")
    for x in range(0, last + 1, round(step_x)):
        draw.line([(at(x, low)[0], bottom), (at(x, low)[0], bottom + 5)], INK)
        draw.text((at(x, low)[0], bottom + 8), f"{x}", INK, _font(15), "ma")
    draw.line([(left, top), (left, bottom), (right, bottom)], INK)
    draw.text(((left + right) / 2, top - 38), f"{title} training", INK, _font(18), "ms")
    draw.text(((left + right) / 2, bottom + 32), "iteration", INK, _font(16), "ma")
    draw.text((left - 38, top - 14), f"mean IoU, %{images and ', on '}{images}", INK, _font(15),
              "ls")
    line = [at(*p) for p in points]
    draw.line(line, colour, 3, joint="curve")
    for x, y in line:
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
    best = f"best {max(y for _, y in points):.1f}" if points else "not trained yet"
    entries = [(f"{title}, {best}", colour, False)]
    if level:
        y = at(0, level[0])[1]
        for x in range(left, right, 12):
            draw.line([(x, y), (min(x + 7, right), y)], BLUE, 2)
        entries.append((level[1], BLUE, True))
    _plot_legend(draw, left, bottom + 68, entries)


def _plot_legend(draw, x, y, entries):
    """Legend of a plot, a line from (x, y) on; entries: (text, colour, dashed)."""
    for text, colour, dashed in entries:
        for start, end in ((0, 9), (17, 26)) if dashed else ((0, 26),):
            draw.line([(x + start, y), (x + end, y)], colour, 3)
        draw.text((x + 34, y), text, INK, _font(15), "lm")
        x += 58 + draw.textlength(text, _font(15))


def _legend(draw, left, top, row, names):
    """One line: swatch and name of each class of a row, in truth or predictions, largest first."""
    shown = [row["labels"], *(labels for labels, _ in row.get("predictions", {}).values())]
    counts = np.bincount(np.concatenate([labels.ravel() for labels in shown]), minlength=256)
    present = sorted(np.flatnonzero(counts), key=lambda label: (label == VOID, -counts[label]))
    colours = palette(256)
    for number, label in enumerate(present):
        name = "void (not scored)" if label == VOID else names[label]
        step = 38 + draw.textlength(name, _font(15))
        if left + step > draw.im.size[0] - 80 and number < len(present) - 1:
            draw.text((left, top + 8), f"and {len(present) - number} more", INK, _font(15), "lm")
            return
        box = [left, top, left + 15, top + 15]
        draw.rectangle(box, PAPER if label == VOID else tuple(map(int, colours[label])), INK)
        for k in (0, 5, 10) if label == VOID else ():
            draw.line([(left + k, top + 15), (left + 15, top + k)], (90, 90, 90))
        draw.text((left + 21, top + 8), name, INK, _font(15), "lm")
        left += step


def _scaled(image, picture, width, height):
    """The photograph itself, or labels over it, at a size to look at."""
    scaled = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    if picture.ndim == 3:
        return scaled
    labels = Image.fromarray(picture.astype(np.uint8)).resize((width, height),
                                                               Image.Resampling.NEAREST)
    return Image.fromarray(overlay(np.array(scaled), np.array(labels)))


def _step(span, ticks):
    """A round distance between ticks, 1, 2 or 5 times a power of ten, for about that many."""
    raw = span / ticks
    power = 10 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)


def _known(value):
    return value is not None and not math.isnan(value)


def _percent(value):
    return f"{value:.1f}" if _known(value) else "-"


def _font(size):
    return ImageFont.load_default(size)
