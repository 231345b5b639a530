"""`python -m minicrf`: colours kept, errors in one line, OUT written whole or not at all."""
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from minicrf import DenseCRF, training, vgg
from minicrf.data import voc
from minicrf.programs.refine import colour, main
from minicrf.results import checkpoints

H, W = 12, 20
LEFT, RIGHT, UNKNOWN = (200, 30, 40), (0, 64, 128), (255, 255, 255)
TRUTH = np.repeat([[0] * (W // 2) + [1] * (W // 2)], H, axis=0)          # (H, W)
CRF = ["--sigma-bilateral", "20", "13", "--w", "1", "10"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A photograph with a dark and a light half, scores with wrong pixels in it, an older OUT."""
    rng = np.random.default_rng(0)
    monkeypatch.chdir(tmp_path)
    photo = np.where(TRUTH[:, :, None] == 0, 40, 210) + rng.integers(0, 8, (H, W, 3))
    Image.fromarray(photo.astype(np.uint8)).save("photo.png")
    scores = np.eye(2)[TRUTH] + 0.9 * rng.standard_normal((H, W, 2))
    np.save("scores.npy", scores.astype(np.float32))
    (tmp_path / "out.png").write_bytes(b"kept")
    return tmp_path


def label_picture(mode, wrong=True, unknown=False):
    """TRUTH in LEFT's and RIGHT's colours, as a file of that mode, partly wrong or unknown."""
    rng = np.random.default_rng(1)
    number = TRUTH ^ (rng.random((H, W)) < 0.1) if wrong else TRUTH.copy()
    number[4:7, 8:13] = 2 if unknown else number[4:7, 8:13]
    if mode in ("RGB", "RGBA"):
        rgb = np.array([LEFT, RIGHT, UNKNOWN], np.uint8)[number]
        return Image.fromarray(rgb).convert(mode)
    if mode == "P":                                 # a palette in another order than the colours'
        picture = Image.fromarray(np.array([7, 3, 5], np.uint8)[number])
        picture.putpalette([9, 9, 9] * 3 + [*RIGHT, 9, 9, 9, *UNKNOWN, 9, 9, 9, *LEFT])
        return picture
    if mode == "1":
        return Image.fromarray(number == 1)
    return Image.fromarray(np.array([10, 90, 255], np.uint8)[number])    # L


def rgb(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("mode, unknown", [
    ("1", False), ("L", False), ("L", True), ("P", True), ("RGB", False), ("RGB", True),
    ("RGBA", True)])
def test_a_label_picture_keeps_its_mode_and_colours(folder, mode, unknown):
    label_picture(mode, unknown=unknown).save("labels.png")
    colours = ["--unknown", "white"] if unknown else []
    main(["photo.png", "labels.png", "out.png", *CRF, *colours])
    expected = label_picture(mode, wrong=False)
    out = Image.open("out.png")
    assert out.mode == mode and np.array_equal(np.asarray(out), np.asarray(expected))
    assert np.array_equal(rgb("out.png"), np.asarray(expected.convert("RGB")))


def save_palette_picture(name, values, palette):
    picture = Image.fromarray(values.astype(np.uint8))
    picture.putpalette(np.asarray(palette, np.uint8).ravel().tolist())
    picture.save(name)


def test_channels_are_in_the_order_of_a_pictures_values_and_named(folder, capsys):
    """VOC's colours of 1 and 2, red and green, are in the other order as RGB codes."""
    values = TRUTH + 1
    save_palette_picture("labels.png", values, voc.palette(3))
    main(["photo.png", "labels.png", "q.npy", *CRF])
    assert np.array_equal(np.load("q.npy").argmax(axis=2), values - 1)
    assert "channel 0 is label 1; channel 1 is label 2" in capsys.readouterr().out
    label_picture("RGB", wrong=False).save("labels.png")
    main(["photo.png", "labels.png", "q.npy", *CRF])
    assert np.array_equal(np.load("q.npy").argmax(axis=2), 1 - TRUTH)
    assert "channel 0 is label 0,64,128; channel 1 is label 200,30,40" in capsys.readouterr().out


def test_the_void_border_of_voc_is_no_class(folder):
    values = TRUTH.copy()
    values[:, 8:12] = values[0] = 255
    save_palette_picture("labels.png", values, voc.palette(256))
    main(["photo.png", "labels.png", "q.npy", *CRF])
    assert np.array_equal(np.load("q.npy").argmax(axis=2), TRUTH) and np.load("q.npy").shape[2] == 2
    save_palette_picture("mask.png", TRUTH * 255, voc.palette(256))     # of two values, one class
    main(["photo.png", "mask.png", "out.png", *CRF])
    assert np.array_equal(np.asarray(Image.open("out.png")), TRUTH * 255)


def test_confidence_decides_how_much_the_crf_may_change(folder):
    label_picture("RGB").save("labels.png")
    changed = []
    for confidence in ("0.6", "0.999999"):
        main(["photo.png", "labels.png", "out.png", "--w", "0.3", "1", "--confidence", confidence])
        changed.append((rgb("out.png") != rgb("labels.png")).any(axis=2).sum())
    assert changed[0] > 0 == changed[1]


def save_checkpoint(path, crf):
    model = training.Model(vgg.build("tiny", 6), (104, 117, 124), crf)
    checkpoints.save(path, model, dict(iteration=1, classes=list("abcdef"),
                                  stage="joint" if crf else "unary"))


def test_parameters_of_a_checkpoint_serve_any_number_of_labels(folder):
    learned = dict(w=(0.4, 0.7), sigma_position=(1.5, 2), sigma_bilateral=(9, 7, 20, 30, 40))
    save_checkpoint("joint.npz", DenseCRF(6, **learned))
    main(["photo.png", "scores.npy", "out.png", "--parameters", "joint.npz", "--iterations", "2"])
    scores = np.load("scores.npy")
    q = DenseCRF(2, iterations=2, **learned).forward(scores, rgb("photo.png"))
    assert np.array_equal(np.asarray(Image.open("out.png")), q.argmax(axis=2))
    default = DenseCRF(2, iterations=2).forward(scores, rgb("photo.png"))
    assert not np.array_equal(q.argmax(axis=2), default.argmax(axis=2))


def test_a_photograph_is_turned_as_its_tag_says(folder, capsys):
    picture, exif = Image.open("photo.png"), Image.Exif()
    exif[0x0112] = 6                                # turn by 90 degrees to look at it
    picture.rotate(90, expand=True).save("turned.png", exif=exif)
    main(["turned.png", "scores.npy", "out.png", *CRF])
    assert np.array_equal(np.asarray(Image.open("out.png")), TRUTH)
    exif[0x0112] = 1
    picture.rotate(90, expand=True).save("turned.png", exif=exif)
    capsys.readouterr()
    assert main(["turned.png", "scores.npy", "out.png"]) == 2
    assert re.search(r"scores.npy: found .*12, 20.*20, 12.*turned", capsys.readouterr().err)


def test_colours_by_name_by_numbers_and_in_hexadecimal():
    assert colour("black") == colour("0,0,0") == colour("000000") == colour("#000000") == (0, 0, 0)
    assert colour("224,224,192") == colour("e0e0c0") == (224, 224, 192)


def bad_files():
    """Files that are not what they should be."""
    scores = np.load("scores.npy")
    np.save("flat.npy", scores[:, :, 0])
    np.save("many.npy", np.zeros((H, W, 256), np.float32))
    np.save("low.npy", scores[1:])
    np.save("first.npy", np.moveaxis(scores, 2, 0))
    np.save("nan.npy", np.full_like(scores, np.nan))
    np.save("high.npy", scores + 10)
    pathlib.Path("text.png").write_text("no picture")
    os.mkdir("folder.png")
    label_picture("RGB").save("labels.png")
    label_picture("RGB").crop((0, 0, W, H - 1)).save("low.png")
    Image.fromarray(np.arange(H * W, dtype=np.uint16).reshape(H, W)).save("deep.png")
    noise = np.random.default_rng(2).integers(0, 256, (30, 30, 3)).astype(np.uint8)
    Image.fromarray(noise).save("noise.png")
    np.savez("array.npz", a=scores)
    save_checkpoint("joint.npz", DenseCRF(6))
    save_checkpoint("unary.npz", None)


BAD = {
    "photo.jpg scores.npy out.png": "photo.jpg: found no such file",
    "text.png scores.npy out.png": "text.png: found a file that cannot be read .*, expected a phot",
    "photo.png nothing.npy out.png": "nothing.npy: not a readable .npy file .*No such file",
    "photo.png flat.npy out.png": "flat.npy: found one channel; with --probabilities",
    "photo.png many.npy out.png": "many.npy: found shape .*, L at most 255",
    "photo.png low.npy out.png": r"low.npy: found height and width \(11, 20\), expected \(12, 20\)",
    "photo.png first.npy out.png": r"first.npy: found shape \(2, 12, 20\) .* puts labels last",
    "photo.png nan.npy out.png": "nan.npy: found values from nan",
    "photo.png high.npy out.png --probabilities": "high.npy: found values from .*, expected prob",
    "photo.png low.png out.png": r"low.png: found height and width \(11, 20\), expected \(12, 20\)",
    "photo.png deep.png out.png": r"deep.png: found a picture of mode I(;16)?, expected",
    "photo.png noise.png out.png": "noise.png: found [0-9]+ colours besides unknown, expected 2 to",
    "photo.png labels.png out.png --probabilities": "labels.png: found a picture of mode RGB, exp",
    "photo.png labels.png out.png --confidence 1.5": "confidence",
    "photo.png scores.npy out.png --parameters array.npz": "array.npz: ",
    "photo.png scores.npy out.png --parameters unary.npz": "unary.npz: found a network without",
    "photo.png scores.npy out.png --parameters joint.npz --w 1 1": "--parameters: found --w or",
    "photo.png scores.npy out.jpg": "out.jpg: the result needs",
    "photo.png scores.npy photo.png": "photo.png: the result needs",
    "photo.png scores.npy nowhere/out.png": "nowhere/out.png: could not be",
    "photo.png scores.npy folder.png": "folder.png: could not be",
    "photo.png scores.npy out.png --unknown black": "--unknown: is for label pictures",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_named_in_one_line_and_out_stays_as_it_was(folder, capsys, arguments):
    bad_files()
    before = {path: path.is_file() and path.read_bytes() for path in folder.iterdir()}
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert re.match(f"python -m minicrf: .*{BAD[arguments]}", error) and error.count("\n") == 1
    assert before == {path: path.is_file() and path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("options", [
    ["--unknown", "mauve-ish"], ["--iterations", "1.5"], ["--w", "1", "-1"],
    ["--sigma-position", "0"], ["--weigths", "1", "1"]])
def test_bad_options_are_named_in_one_line(folder, options, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["photo.png", "labels.png", "out.png", *options])
    shown = capsys.readouterr()
    assert stop.value.code == 2 and shown.out == ""
    assert options[0] in shown.err and shown.err.count("\n") == 1


def test_scores_come_out_as_the_crf_labels_them(folder, capsys):
    """OUT is a label picture or the marginals; an overlay may come with it."""
    q = DenseCRF(2, w=(1, 10), sigma_position=(2, 2), sigma_bilateral=(20, 20, 13, 13, 13),
                 iterations=3).forward(np.load("scores.npy"), rgb("photo.png"))
    options = [*CRF, "--sigma-position", "2", "--iterations", "3", "--overlay"]
    main(["photo.png", "scores.npy", "out.png", *options])
    out = Image.open("out.png")
    assert np.array_equal(np.asarray(out), q.argmax(axis=2))
    assert out.mode == "P" and out.getpalette()[:6] == voc.palette(2).ravel().tolist()
    assert "20x12 pixels, 2 labels" in capsys.readouterr().out
    main(["photo.png", "scores.npy", "q.npy", *options])
    assert np.array_equal(np.load("q.npy"), q) and q.dtype == np.float32
    assert Image.open("q.npy.overlay.png").size == (W, H)


def test_folders_are_refined_name_by_name(folder, capsys):
    for name in ("photos", "scores"):
        os.mkdir(name)
    for name in ("a", "b"):
        os.link("photo.png", f"photos/{name}.png")
    os.link("scores.npy", "scores/a.npy")
    assert main(["photos", "scores", "refined", *CRF]) == 2              # b has no scores
    printed = capsys.readouterr()
    assert "wrote refined/a.png" in printed.out and "scores/b.npy" in printed.err
    assert os.listdir("refined") == ["a.png"]
    main(["photo.png", "scores.npy", "out.png", *CRF])
    assert np.array_equal(rgb("refined/a.png"), rgb("out.png"))


def test_one_channel_of_probabilities_is_that_of_the_second_of_two_labels(folder):
    """As a sigmoid gives it: an array (H, W) or (H, W, 1), or a grey picture."""
    scores = np.load("scores.npy")
    grey = (255 / (1 + np.exp(scores[:, :, 0] - scores[:, :, 1]))).round().clip(1, 254)
    p = grey / 255
    np.save("log_p.npy", np.log(np.dstack([1 - p, p])))
    main(["photo.png", "log_p.npy", "expected.npy", *CRF])
    np.save("both.npy", np.dstack([1 - p, p]))
    np.save("flat.npy", p)
    np.save("one.npy", p[:, :, None])
    Image.fromarray(grey.astype(np.uint8)).save("grey.png")
    for name in ("both.npy", "flat.npy", "one.npy", "grey.png"):
        assert main(["photo.png", name, "q.npy", "--probabilities", *CRF]) == 0
        np.testing.assert_allclose(np.load("q.npy"), np.load("expected.npy"), atol=1e-5)
    main(["photo.png", "grey.png", "out.png", "--probabilities", *CRF])
    expected = 255 * np.load("expected.npy").argmax(axis=2)
    assert np.array_equal(np.asarray(Image.open("out.png")), expected)


def test_small_scores_are_interpolated_to_the_photographs_size(folder, capsys):
    np.save("small.npy", np.eye(2, dtype=np.float32)[TRUTH][1::2, 1::2])
    main(["photo.png", "small.npy", "q.npy", "--w", "0", "0"])
    q = np.load("q.npy")
    assert q.shape == (H, W, 2)
    difference = np.log(q[0, :, 1] / q[0, :, 0])                    # of the scores, across the edge
    np.testing.assert_allclose(difference[8:12], [-1, -.5, .5, 1], atol=1e-5)
    assert "10x6 scores are interpolated to the photograph's 20x12" in capsys.readouterr().err


def note_on(name, scores, capsys, *options):
    if name.endswith(".npy"):
        np.save(name, scores)
    else:
        Image.fromarray(scores).save(name)
    assert main(["photo.png", name, "out.png", *options]) == 0
    return capsys.readouterr().err


def test_what_looks_like_something_else_gets_a_note(folder, capsys):
    p = np.random.default_rng(0).dirichlet([1, 1, 1], (H, W)).astype(np.float32)
    assert "probabilities; if so, --probabilities is missing" in note_on("p.npy", p, capsys)
    assert note_on("scores.npy", np.log(p), capsys) == ""
    assert "energies" in note_on("energies.npy", -np.log(p), capsys)
    assert note_on("p.npy", p, capsys, "--probabilities") == ""
    grey = np.arange(H * W, dtype=np.uint8).reshape(H, W)
    assert "soft mask" in note_on("soft.png", grey, capsys)


def test_the_command_of_the_readme_finds_the_cat(tmp_path):
    root, out = pathlib.Path(__file__).parents[1], str(tmp_path / "cat.png")
    [command] = re.findall("python -m minicrf (.github.*)", (root / "README.md").read_text("utf-8"))
    words = command.replace(" cat.png", f" {out}").split(" ")
    subprocess.run([sys.executable, "-m", "minicrf", *words], cwd=root, check=True)
    labels, scribbles = (np.asarray(Image.open(path)) for path in (out, root / words[1]))
    agree = labels[scribbles != 0] == scribbles[scribbles != 0]
    background, cat = labels[50, 430], labels[115, 170]                 # a wall, an eye
    assert agree.mean() > 0.98 and (background, cat) == (1, 2)
    assert os.path.exists(out + ".overlay.png")


def test_parameters_of_a_saved_crf_and_matrices_for_their_labels_alone(folder, capsys):
    w = np.array([1., 3.])[:, None, None] * np.eye(2)
    DenseCRF(2, w=w, sigma_bilateral=(20, 13)).save("crf.npz")
    assert main(["photo.png", "scores.npy", "out.png", "--parameters", "crf.npz"]) == 0
    main(["photo.png", "scores.npy", "same.png", "--w", "1", "3", "--sigma-bilateral", "20", "13"])
    assert np.array_equal(rgb("out.png"), rgb("same.png"))
    np.save("three.npy", np.zeros((H, W, 3), np.float32))
    assert main(["photo.png", "three.npy", "out.png", "--parameters", "crf.npz"]) == 2
    assert "found shape (12, 20, 3), expected (..., ..., 2)" in capsys.readouterr().err
