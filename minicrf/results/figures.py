"""Pictures and tables of results, drawn with Pillow alone: the paper's Table 1 and Figures 4 to 6.

Legend: H x W pixels, L labels; labels (H, W) are 0..L-1 or VOID; IoU in percent; None: absent.
"""
import itertools
import math
import textwrap

import numpy as np
from PIL import Image, ImageDraw
from PIL.ImageFont import load_default as font

from ..data import pictures
from ..data.voc import palette
from ..inputs import VOID
from ..metrics import BAND

INK, FAINT, PAPER = (30, 30, 30), (215, 215, 215), (255, 255, 255)
BLUE, ORANGE = (0, 90, 180), (215, 95, 0)        # told apart by the colour-blind, too


def overlay(image, labels):
    """Labels in VOC's colours, blended over their photograph: an RGB Pillow image.

    image (H, W, 3) uint8 RGB; labels (H, W).  The photograph is in light greys, so that its colours
    cannot be taken for labels.  Void is hatched.
    """
    H, W = labels.shape
    grey = 60 + 0.76 * image.mean(axis=2, keepdims=True, dtype=np.float32)           # (H, W, 1)
    share = np.where(labels == 0, 0.3, 0.6).astype(np.float32)[:, :, None]           # (H, W, 1)
    blended = (1 - share) * grey + share * palette(256)[labels]                      # (H, W, 3)
    stripes = np.add.outer(np.arange(H), np.arange(W)) // 2 % 3                      # (H, W)
    blended[labels == VOID] = np.where(stripes == 0, 90, 255)[labels == VOID, None]
    return Image.fromarray(blended.round().astype(np.uint8))


def panel(path, rows, names, title):
    """Figures 5 and 6: a row for each image: the photograph, its truth and what methods made of it.

    rows: dicts with "image" (H, W, 3) uint8, "labels" (H, W), "name", and "predictions", a dict
    from method, e.g. "unary", to (labels (H, W), what to write below).  names: the L class names.
    """
    columns = ["image", "truth", *rows[0]["predictions"]]
    gap, line, top, width = 10, 22, 68, 260
    lefts = [gap + i * (width + gap) for i in range(len(columns))]
    heights = [round(width / row["labels"].shape[1] * len(row["labels"])) for row in rows]
    canvas = Image.new("RGB", (lefts[-1] + width + gap,
                               top + sum(heights) + len(rows) * 2 * (line + gap)), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 8), title, INK, font(20))
    for column, left in zip(columns, lefts):
        draw.text((left + width / 2, top - 8), column, INK, font(18), "ms")
    for row, height in zip(rows, heights):
        image = Image.fromarray(row["image"]).resize((width, height), Image.Resampling.BICUBIC)
        shown = [(row["labels"], ""), *row["predictions"].values()]
        drawn = [(image, row["name"])]
        for labels, caption in shown:
            labels = pictures.enlarge(labels, (height, width))
            drawn.append((overlay(np.array(image), labels), caption))
        for left, (picture, caption) in zip(lefts, drawn):
            canvas.paste(picture, (left, top))
            draw.text((left + width / 2, top + height + 4), caption, INK, font(16), "ma")
        _legend(canvas, gap, top + height + line + 4, [labels for labels, _ in shown], names)
        top += height + 2 * (line + gap)
    pictures.save_png(path, canvas)


def _legend(canvas, left, top, shown, names):
    """One line: swatch and name of each class in the label pictures `shown`, largest first."""
    draw, grey = ImageDraw.Draw(canvas), np.full((16, 16, 3), 100, np.uint8)
    counts = np.bincount(np.concatenate([labels.ravel() for labels in shown]))
    for label in sorted(np.flatnonzero(counts), key=lambda label: -counts[label]):
        name = "void (not scored)" if label == VOID else names[label]
        if left + 38 + draw.textlength(name, font(15)) > canvas.width:
            draw.text((left, top + 8), "...", INK, font(15), "lm")
            return
        canvas.paste(overlay(grey, np.full((16, 16), label)), (left, top))
        draw.text((left + 21, top + 8), name, INK, font(15), "lm")
        left += 38 + round(draw.textlength(name, font(15)))


def compatibility(path, matrices, names):
    """Matrices of compatibility (M, L, L), side by side: blue rewards, orange penalises."""
    M, L, _ = matrices.shape
    cell, side = 26, 26 * L
    left = 20 + round(max(font(15).getlength(name) for name in names))
    canvas = Image.new("RGB", (left + M * (side + 20), 60 + side), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, name in enumerate(names):
        draw.text((left - 8, 40 + (i + 0.5) * cell), name, INK, font(15), "rm")
    largest = abs(matrices).max() or 1
    for m, W in enumerate(matrices[..., None]):                                      # (L, L, 1)
        start = left + m * (side + 20)
        draw.text((start, 8), f"kernel {m + 1} of {M}, full colour {largest:.3g}", INK, font(15))
        share = abs(W) / largest
        tones = share * np.where(W > 0, BLUE, ORANGE) + (1 - share) * PAPER          # (L, L, 3)
        picture = Image.fromarray(tones.astype(np.uint8))
        canvas.paste(picture.resize((side, side), Image.Resampling.NEAREST), (start, 40))
    pictures.save_png(path, canvas)


def curves(path, log):
    """Figure 4: validation mean IoU over the iterations; on the left unary, on the right joint.

    log: rows of log.csv, dicts with "stage", "iteration", "miou" and "images", such as "20/110";
    rows without a miou are passed over.  The best unary value is a dashed line on the right.
    """
    measured = [row for row in log if str(row["miou"]) not in ("", "nan")]
    unary, joint = ([row for row in measured if row["stage"] == stage]
                    for stage in ("unary", "joint"))
    values = [float(row["miou"]) for row in unary + joint] or [0, 100]
    step = _step(max(max(values) - min(values), 1))
    ticks = step * np.arange(math.floor(min(values) / step), math.floor(max(values) / step) + 2)
    canvas = Image.new("RGB", (1000, 420), PAPER)
    draw = ImageDraw.Draw(canvas)
    _plot(draw, 56, "unary", unary, BLUE, ticks)
    _plot(draw, 556, "joint", joint, ORANGE, ticks, max(values[:len(unary)], default=None))
    pictures.save_png(path, canvas)


def _plot(draw, left, stage, rows, colour, ticks, best=None):
    """One plot of Figure 4: rows of the log, as a curve; best: where the dashed line is, if any."""
    top, right, bottom = 64, left + 420, 332
    points = [(int(row["iteration"]), float(row["miou"])) for row in rows]
    images = f", on {rows[-1]['images']} validation images" if rows else ""
    last = max([x for x, _ in points], default=1) or 1

    def at(x, y):
        return (left + (right - left) * x / last,
                bottom - (bottom - top) * (y - ticks[0]) / (ticks[-1] - ticks[0]))

    for y in ticks:
        draw.line([at(0, y), at(last, y)], FAINT)
        draw.text((left - 8, at(0, y)[1]), f"{y:g}", INK, font(15), "rm")
    for x in range(0, last + 1, max(1, round(_step(last)))):
        draw.line([(at(x, 0)[0], bottom), (at(x, 0)[0], bottom + 5)], INK)
        draw.text((at(x, 0)[0], bottom + 8), f"{x}", INK, font(15), "ma")
    draw.line([(left, top), (left, bottom), (right, bottom)], INK)
    draw.text(((left + right) / 2, top - 38), f"{stage} training", INK, font(18), "ms")
    draw.text(((left + right) / 2, bottom + 32), "iteration", INK, font(16), "ma")
    draw.text((left - 38, top - 14), f"mean IoU, %{images}", INK, font(15), "ls")
    draw.line([at(*p) for p in points], colour, 3, joint="curve")
    for x, y in (at(*p) for p in points):
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
    name = f"best {max(y for _, y in points):.1f}" if points else "not trained yet"
    draw.text((left, bottom + 68), f"{stage}, {name}", colour, font(15), "lm")
    if best is not None:
        for x in range(left, right, 12):
            draw.line([(x, at(0, best)[1]), (min(x + 7, right), at(0, best)[1])], BLUE, 2)
        draw.text((right, bottom + 68), f"- - best unary, {best:.1f}", BLUE, font(15), "rm")


def table(results, names):
    """Table 1 as text: a line for each class, a column for each method, the means below.

    results: dict from method to {"miou": percent, "iou": {class name: percent or None},
    "miou_band": percent}, as in results.json.  None is shown as "-".
    """
    rows = {name: [result["iou"][name] for result in results.values()] for name in names}
    means = {"mean IoU": [result["miou"] for result in results.values()],
             f"within {BAND} px": [result["miou_band"] for result in results.values()]}
    heads = [textwrap.wrap(method, 11) for method in results]
    first = max(map(len, [*rows, *means]))
    widths = [max(7, *map(len, head)) for head in heads]

    def line(name, *cells):
        return name.ljust(first) + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths)) + "\n"

    def lines(part):
        return "".join(line(name, *("-" if value is None else f"{value:.1f}" for value in values))
                       for name, values in part.items())

    head = [line(*cells) for cells in itertools.zip_longest(["IoU, %"], *heads, fillvalue="")]
    rule = "-" * (len(head[0]) - 1) + "\n"
    return "".join(head) + rule + lines(rows) + rule + lines(means)


def _step(span):
    """A round distance between ticks, 1, 2 or 5 times a power of ten, for about six of them."""
    power = 10 ** math.floor(math.log10(span / 6))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= span / 6 * 0.999)
