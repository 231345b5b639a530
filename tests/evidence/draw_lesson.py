"""Draws the lesson's pictures, from a drawn image and made-up scores: no network is trained.

    python tests/evidence/draw_lesson.py [FOLDER]   writes pipeline.png, marginals.png, lattice.png,
        holes.png, weak.png, and gain.png from the tables in RESULTS.md (default: into .github)
Legend: H x W pixels, h x w cells, L labels; colours mix in proportion to marginals.
"""
import itertools
import pathlib
import re
import sys

import numpy as np
from PIL import Image, ImageDraw
from PIL.ImageFont import load_default as font
from scipy import ndimage

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minicrf import DenseCRF, PermutohedralLattice, plain   # noqa: E402
from minicrf.data import toy, voc   # noqa: E402
from minicrf.layers import BilinearUpsample   # noqa: E402
from minicrf.inputs import VOID   # noqa: E402
from minicrf.losses import softmax_loss   # noqa: E402

WIDTH, FINE = 960, 3            # pixels of a picture; how much larger it is drawn, then reduced
INK, GREY, FAINT = (30, 30, 30), (120, 120, 120), (222, 222, 222)
BLUE, ORANGE = (0, 90, 180), (215, 95, 0)        # told apart by the colour-blind, too
COLOURS = voc.palette(6).astype(float)
COLOURS[0] = 235                                 # background: light grey
PIXEL = 47, 88                  # row and column of the one whose gradient is shown alone
SCALE, SIDE, TOP = 52, 226, 40  # lattice.png: pixels in a kernel width; its panels


class Canvas:
    """A white picture; places and sizes are in pixels of the finished one."""

    def __init__(self, height):
        self.image = Image.new("RGB", (WIDTH * FINE, height * FINE), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x, y, words, size=16, colour=INK, centred=True):
        """Words centred on x, or starting there; ^ raises, _ lowers."""
        parts = [(part.lstrip("^_"), {"^": -0.4, "_": 0.25}.get(part[0], 0))
                 for part in re.findall(r"[\^_]\w+|[^\^_]+", words)]
        fonts = [font((0.72 if shift else 1) * size * FINE) for _, shift in parts]
        lengths = [each.getlength(part) for (part, _), each in zip(parts, fonts)]
        x = x * FINE - centred * sum(lengths) / 2
        for (part, shift), each, length in zip(parts, fonts, lengths):
            self.draw.text((x, (y + shift * size) * FINE), part, colour, each, "lm")
            x += length

    def paste(self, array, x, y, width):
        """An array (H, W, 3) of 0..255 with its corner at x, y; returns its height there."""
        height = round(width * len(array) / array.shape[1])
        picture = Image.fromarray(array.round().clip(0, 255).astype(np.uint8))
        picture = picture.resize((width * FINE, height * FINE), Image.Resampling.NEAREST)
        self.image.paste(picture, (round(x * FINE), round(y * FINE)))
        self.box(x, y, x + width, y + height)
        return height

    def box(self, x0, y0, x1, y1, fill=None, colour=GREY):
        self.draw.rectangle([round(v * FINE) for v in (x0, y0, x1, y1)], fill, colour, FINE)

    def line(self, *points, colour=INK, width=1.5):
        self.draw.line([(x * FINE, y * FINE) for x, y in points], colour, round(width * FINE))

    def disc(self, x, y, radius, fill, outline=None, width=1.5):
        corners = [v * FINE for v in (x - radius, y - radius, x + radius, y + radius)]
        self.draw.ellipse(corners, fill, outline, round(width * FINE))

    def arrow(self, start, end, colour, width=2.5, head=8):
        start, end = np.array(start, float), np.array(end, float)
        along = (end - start) / np.linalg.norm(end - start) * head
        across = np.array([-along[1], along[0]]) * 0.55
        self.line(start, end - 0.8 * along, colour=colour, width=width)
        tip = [end, end - along + across, end - along - across]
        self.draw.polygon([tuple(p * FINE) for p in tip], colour)

    def save(self, path):
        small = self.image.resize((WIDTH, self.image.height // FINE), Image.Resampling.LANCZOS)
        small.quantize(256, kmeans=1, dither=Image.Dither.NONE).save(path, optimize=True)


def example(lines=False, seed=2):
    """A drawn image and what a CRF makes of coarse, noisy scores for it; a dict of arrays.

    lines: compare it with one line in each region, not with all of the truth.
    """
    rng = np.random.default_rng(seed)
    image, y = toy.picture(rng, 96, 128)                                 # (H, W, 3), (H, W)
    truth = np.eye(6)[np.where(y == VOID, 0, y)]                         # (H, W, L)
    cells = truth.reshape(12, 8, 16, 8, 6).mean(axis=(1, 3))             # (h, w, L), 8 pixels each
    scores = 3 * cells + 0.9 * rng.standard_normal(cells.shape)
    R_y, R_x = (BilinearUpsample(8, 3.5, n).matrix(n, n // 8, scores) for n in (96, 128))
    f = np.einsum("yi,ijl,xj->yxl", R_y, scores, R_x)                    # (H, W, L)
    q = []
    for T in range(6):
        crf = DenseCRF(6, w=(1, 4), iterations=T)        # where training starts
        q.append(crf.forward(f, image))
    y = scribbles(y) if lines else y
    dz = softmax_loss(crf.logits.reshape(-1, 6), y.ravel())[1].reshape(f.shape)  # (N, L) -> f's
    one = np.zeros_like(dz)                              # the loss of a single pixel
    one[PIXEL] = dz[PIXEL]
    df, df_one = crf.backward_logits(dz), crf.backward_logits(one)
    dscores = np.einsum("yi,yxl,xj->ijl", R_y, df, R_x)                  # (h, w, L)
    truth = np.where((y == VOID)[..., None], 255, COLOURS[np.where(y == VOID, 0, y)])
    lengths = {name: np.linalg.norm(gradient, axis=-1) for name, gradient in  # (H, W), (h, w)
               (("dscores", dscores), ("df", df), ("dz", dz), ("df_one", df_one))}
    return dict(lengths, image=image, truth=truth, q=q, scores=plain.softmax(scores),
                f=plain.softmax(f))


def scribbles(y):
    """Labels (H, W) of which one line in each region is left: its longest row, less its ends."""
    lines = np.full_like(y, VOID)
    for label in np.unique(y[y != VOID]):
        regions, n = ndimage.label(y == label)
        for region in range(1, n + 1):
            rows, _ = ndimage.label(regions == region, [[0, 0, 0], [1, 1, 1], [0, 0, 0]])
            longest = np.bincount(rows[rows > 0]).argmax()
            row, columns = np.nonzero(rows == longest)
            inside = slice(len(row) // 6, len(row) - len(row) // 6)
            lines[row[inside], columns[inside]] = label
    return lines


def heat(values, largest):
    """White where values (H, W) are 0, orange at half of `largest`, dark from there on."""
    stops = [(255, 255, 255), (250, 205, 130), ORANGE, (90, 20, 0)]
    x = np.clip(values / largest, 0, 1) ** 0.6 * 3                       # (H, W)
    return np.stack([np.interp(x, range(4), channel) for channel in zip(*stops)], axis=-1)


def pipeline(path, e):
    """Fig. 3: forward on the top line, backward on the bottom one."""
    canvas, width, gap, height, top, bottom = Canvas(412), 126, 39, 94, 74, 284
    lefts = [6 + i * (width + gap) for i in range(6)]
    forward = {"image": e["image"], "network": None, "scores": e["scores"] @ COLOURS,
               "f, upsampled": e["f"] @ COLOURS, "q^5 of the CRF": e["q"][-1] @ COLOURS,
               "truth y": e["truth"]}
    backward = {"": None, "dw of each layer": None,
                **{words: heat(e[name], 0.6 * e[name].max()) for words, name in
                   (("dscores", "dscores"), ("df", "df"), ("dz^5 = q^5 - onehot(y)", "dz"))}}
    for panels, y, title in ((forward, top, top - 14), (backward, bottom, bottom + height + 15)):
        for left, (words, picture) in zip(lefts, panels.items()):
            canvas.text(left + width / 2, title, words)
            if picture is not None:
                canvas.paste(picture, left, y, width)
        network(canvas, lefts[1], y, width, height)
    for left in lefts[:4]:
        canvas.arrow((left + width + 4, top + 47), (left + width + gap - 4, top + 47), BLUE)
    for left in lefts[2:5]:
        canvas.arrow((left - 4, bottom + 47), (left - gap + 4, bottom + 47), ORANGE)
    x, y = lefts[5] + width / 2, bottom + 47             # the loss: forward turns into backward
    canvas.line((x, top + height + 6), (x, y), (x - 9, y), colour=ORANGE, width=2.5)
    canvas.arrow((x, y), (lefts[5] - gap + 4, y), ORANGE)
    canvas.text(lefts[5] - gap / 2, top + 47, "loss", colour=BLUE)
    for y, words, colour in ((20, "forward", BLUE), (bottom + height + 15, "backward", ORANGE)):
        canvas.text(6, y, words, 18, colour, centred=False)
    for column, words, colour, y in ((1, "step 1: forward pass", BLUE, top + height + 22),
                                     (4, "step 2: marginals by filtering", BLUE, top + height + 22),
                                     (4, "step 3: back-tracking, t = 5 .. 1", ORANGE, bottom - 22),
                                     (1.5, "step 4: backward pass", ORANGE, bottom - 22),
                                     (0, "step 5: update", ORANGE, bottom + 47)):
        canvas.text(lefts[0] + column * (width + gap) + width / 2, y, words, 16, colour)
    canvas.save(path)


def network(canvas, left, top, width, height):
    """The layers as plates: as high as their cells, as thick as their channels."""
    plates = [(306, 64), (154, 128), (78, 256), (40, 512), (40, 512), (40, 1024)]
    thick = [5 + channels / 40 for _, channels in plates]
    for i, (cells, _) in enumerate(plates):
        x = left + sum(thick[:i]) + i * (width - sum(thick)) / 5
        h = 14 + height * 0.85 * cells / 306
        canvas.box(x, top + (height - h) / 2, x + thick[i], top + (height + h) / 2, FAINT)


def marginals(path, e):
    """q^0 .. q^5; below, the gradient at z^5 and the one that reaches f, and those of one pixel."""
    canvas, width, gap = Canvas(302), 150, 12
    dz, df, one = e["dz"], e["df"], e["df_one"]
    panels = [*((q @ COLOURS, f"q^{t}") for t, q in enumerate(e["q"])),
              (e["image"], "image"), (e["truth"], "truth (white: void)"),
              (heat(dz, dz.max() * 0.6), "dz^5"), (heat(df, dz.max() * 0.6), "df"),
              (heat(0 * dz, 1), "dz^5, one pixel's loss"),
              (heat(one, np.quantile(one, 0.995)), "df, one pixel's loss")]
    for number, (picture, words) in enumerate(panels):
        x, y = number % 6 * (width + gap), 30 + number // 6 * 156
        height = canvas.paste(picture, x, y, width)
        canvas.text(x + width / 2, y - 14, words)
        if number >= 10:
            row, column = (v * height / len(dz) for v in PIXEL)
            canvas.disc(x + column, y + row, 6, None, BLUE, 2)
            canvas.disc(x + column, y + row, 2, ORANGE)
    canvas.save(path)


def weak(path):
    """Labels on a line in each region: the gradient at z^5 there, and the one that reaches f."""
    e = example(lines=True)
    canvas, width, gap, y = Canvas(174), 184, 10, 30
    dz, df = e["dz"], e["df"]
    largest = np.quantile(df, 0.99)
    lines = (e["truth"] < 255).any(axis=-1)                              # (H, W)
    thick = ndimage.binary_dilation(lines, iterations=1)[..., None]      # to be seen
    nearest = ndimage.distance_transform_edt(~lines, return_indices=True)[1]
    drawn = np.where(thick, 0.75 * e["truth"][tuple(nearest)], 255)
    for number, (picture, words) in enumerate((
            (e["image"], "image"), (drawn, "scribbles (white: void)"),
            (heat(dz, largest), "dz^5"), (heat(df, largest), "df"),
            (e["q"][-1] @ COLOURS, "q^5"))):
        x = number * (width + gap)
        canvas.paste(picture, x, y, width)
        canvas.text(x + width / 2, y - 14, words)
    canvas.save(path)


def lattice(path):
    """One value splatted, blurred along three axes, sliced at another pixel; then all pixels."""
    canvas = Canvas(306)
    lefts = [i * (WIDTH - SIDE) / 3 for i in range(4)]
    pixels = np.random.default_rng(3).uniform(-2, 2, (60, 2))
    giver, taker = np.array([-0.28, 0.12]), np.array([0.78, -0.80])

    def place(panel, feature):
        return (lefts[panel] + SIDE / 2 + feature[0] * SCALE, TOP + SIDE / 2 - feature[1] * SCALE)

    after = blurred(corners(giver))
    for panel, values in enumerate((corners(giver), after, after)):
        mesh(canvas, lambda feature: place(panel, feature), lefts[panel])
        for feature in pixels:
            canvas.disc(*place(panel, feature), 2, GREY)
        for point, value in values.items():
            colour = (150, 185, 220) if panel == 2 else BLUE
            canvas.disc(*place(panel, of_point(point)), 15 * np.sqrt(value), colour)
    for panel, feature, colour in ((0, giver, BLUE), (2, taker, ORANGE), (1, giver, BLUE)):
        for corner, b in corners(feature).items() if panel != 1 else ():
            x, y = place(panel, of_point(corner))
            canvas.line(place(panel, feature), (x, y), colour=colour, width=2.5)
            canvas.text(x + 26, y - 12, f"{b:.2f}" if panel == 0 else "", 15)
        canvas.disc(*place(panel, feature), 5.5, "white", colour, 2.5)
    x, y = lefts[1] + 34, TOP + SIDE - 34
    for axis, step in enumerate(1 - 3 * np.eye(3)):
        dx, dy = 20 * of_point(step)
        canvas.arrow((x - dx, y + dy), (x + dx, y - dy), ORANGE, 2, 7)
        canvas.text(x + 1.5 * dx, y - 1.5 * dy, f"{axis}", 14, ORANGE)
    for box in (*((left - 26, 0, left - 1, 306) for left in lefts[1:]),  # what the mesh overran
                (0, 0, WIDTH, TOP - 1), (0, TOP + SIDE + 1, WIDTH, 306)):
        canvas.box(*box, "white", "white")
    response(canvas, giver, lefts[3], place(3, giver))
    for left, above, below in zip(
            lefts, ("splat", "blur, along three axes", "slice", "the same, at every pixel"),
            ("a value goes to 3 corners", "add half of both neighbours",
             "another pixel reads 3 corners", "blue: lattice, orange: Gaussian")):
        canvas.box(left, TOP, left + SIDE, TOP + SIDE)
        canvas.text(left + SIDE / 2, 18, above, 18)
        canvas.text(left + SIDE / 2, TOP + SIDE + 20, below)
    canvas.save(path)


def corners(feature):
    """The lattice points around a feature (2,) and its weights for them: {point (3,): weight}."""
    weights = {}
    for point, weight in zip(*plain.simplex(feature)):   # a point may come twice
        weights[point] = weights.get(point, 0) + weight
    return weights


def blurred(values):
    """The three blurs of plain.lattice_filter, on a lattice where no point is missing."""
    for step in 1 - 3 * np.eye(3):
        points = {tuple(point + k * step) for point in values for k in (-1, 0, 1)}
        values = {p: values.get(p, 0) + sum(values.get(tuple(p + k * step), 0) for k in (-1, 1)) / 2
                  for p in points}
    return values


def of_point(point):
    """Where a lattice point (3,) lies among features (2,): the way back from plain.simplex."""
    return np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]]) @ point / np.sqrt(6)


def mesh(canvas, place, left):
    """The lattice's lines, somewhat beyond a square."""
    for a, b in itertools.product(range(-12, 13), repeat=2):
        for step in 1 - 3 * np.eye(3) if (a - b) % 3 == 0 else ():       # equal remainders
            ends = place(of_point([a, b, -a - b])), place(of_point([a, b, -a - b] + step))
            if all(left - 24 < x < left + SIDE + 24 for x, _ in ends):
                canvas.line(*ends, colour=FAINT)


def response(canvas, giver, left, centre):
    """What every pixel gets of the giver's value, its contours, and the Gaussian's: circles."""
    n = SIDE * FINE
    at = (np.arange(n) + 0.5 - n / 2) / SCALE / FINE                     # (n,): of each dot
    F = np.stack(np.meshgrid(at, -at), axis=2).reshape(-1, 2)            # (n*n, 2)
    values = np.zeros((len(F) + 1, 1))
    values[0] = 1
    got = PermutohedralLattice(np.vstack([giver, F])).filter(values)[1:].reshape(n, n)
    canvas.paste(255 - 0.7 * got[..., None] * (255 - np.array(BLUE)), left, TOP, SIDE)
    for level in (0.75, 0.5, 0.25):
        inside = got > level                                             # (n, n)
        edge = (inside != np.roll(inside, 4, axis=0)) | (inside != np.roll(inside, 4, axis=1))
        canvas.image.paste(BLUE, (round(left * FINE), TOP * FINE), Image.fromarray(edge))
        radius = np.sqrt(-2 * np.log(level)) * SCALE
        canvas.disc(*centre, radius, None, ORANGE)
        canvas.text(centre[0], centre[1] - radius + 10, f"{level}", 14, ORANGE)


def holes(path):
    """A pool of stride 2 and taps side by side; a pool of stride 1 and taps 2 apart."""
    canvas, colours = Canvas(294), (BLUE, ORANGE)
    for left, title, stride, names in (
            (30, "stride 2, then taps side by side", 2, ("x", "x_2i", "v")),
            (530, "stride 1, then taps 2 cells apart", 1, ("x", "x", "v'"))):
        canvas.text(left + 200, 20, title, 18)
        for y, name in zip((80, 160, 240), names):
            canvas.text(left - 14, y, name, 17)
        xs = [left + 14 + 34 * i for i in range(12)]
        for i, x in enumerate(xs):                       # what the pool gives at stride 1
            canvas.disc(x, 80, 8, BLUE if i % 2 == 0 else "white", colours[i % 2])
        for i in range(0, 12, stride):
            canvas.line((xs[i], 90), (xs[i], 150), colour=FAINT, width=2)
            canvas.disc(xs[i], 160, 8, BLUE if i % 2 == 0 else "white", colours[i % 2])
        for i in range(2, 10, stride):
            for tap in (i - 2, i, i + 2):                # the same three weights everywhere
                canvas.line((xs[i], 231), (xs[tap], 169), colour=colours[i % 2], width=1.6)
            canvas.disc(xs[i], 240, 8, colours[i % 2])
    canvas.text(WIDTH * 0.36, 276, "blue: the same numbers in both", 16, BLUE)
    canvas.text(WIDTH * 0.64, 276, "orange: the cells in between", 16, ORANGE)
    canvas.save(path)


def gain(path):
    """Joint above piecewise, with its interval: over training images, and over rates."""
    results = (ROOT / "tests" / "evidence" / "RESULTS.md").read_text()
    canvas = Canvas(300)
    for left, title in ((90, "training images"), (560, "rate of joint")):
        def y(points):
            return 250 - 38 * points

        table = results[results.index(f"| {title} |"):].split("\n\n")[0].splitlines()[2:]
        for points in range(6):
            canvas.line((left, y(points)), (left + 350, y(points)), colour=FAINT)
            canvas.text(left - 28, y(points), f"+{points}" if points else "0", 14)
        for i, row in enumerate(table):
            name, *_, difference = (cell.strip() for cell in row.strip("|").split("|"))
            middle, low, high = map(float, re.findall(r"[+-][\d.]+", difference))
            x = left + 60 + 115 * i
            canvas.line((x, y(low)), (x, y(high)), colour=BLUE, width=2.5)
            canvas.disc(x, y(middle), 6, BLUE)
            canvas.text(x, 268, name, 15)
        canvas.text(left + 175, 288, title, 15)
    canvas.text(62, 30, "mean IoU: joint above piecewise, in points", 17, centred=False)
    canvas.save(path)


def main(folder):
    e = example()
    for draw, *what in ((pipeline, e), (marginals, e), (lattice,), (holes,), (weak,), (gain,)):
        draw(folder / f"{draw.__name__}.png", *what)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if sys.argv[1:] else ROOT / ".github")
