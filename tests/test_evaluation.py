"""Counts of trained models on lists of images; labels for photographs of every kind."""
import numpy as np
import pytest
from PIL import Image

from minicrf import DenseCRF, training, vgg
from minicrf.data import loading, pictures, voc
from minicrf.inputs import VOID
from minicrf.results import checkpoints, evaluation


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained tiny network with a CRF, for VOC's 21 classes."""
    path = str(tmp_path_factory.mktemp("voc") / "joint.npz")
    model = training.Model(vgg.build("tiny", 21), (104, 117, 123), DenseCRF(21), scale=60)
    rng = np.random.default_rng(0)
    for p in model.net.params.values():
        p += 0.05 * rng.standard_normal(p.shape).astype(p.dtype)
    checkpoints.save(path, model, {"stage": "joint", "iteration": 1,
                                   "classes": list(voc.CLASS_NAMES)})
    return path


def test_evaluation_counts_every_labelled_pixel_once(checkpoint, toy_set):
    model, _, _ = checkpoints.load_model(checkpoint)
    data = loading.DataSet(toy_set)
    samples = [data.load(image_id) for image_id in data.train]
    counts = evaluation.evaluate(model, samples, 21, band=2)
    assert set(counts) == {"unary", "crf", "unary_band", "crf_band"}
    labelled = [int((labels != VOID).sum()) for _, labels in samples]
    assert counts["unary"].sum(axis=(1, 2)).tolist() == labelled
    assert counts["crf"].sum(axis=(1, 2)).tolist() == labelled
    assert (counts["crf_band"].sum(axis=(1, 2)) <= labelled).all()
    data.classes = list(voc.CLASS_NAMES)
    point = evaluation.curve_point(model, data, 1)
    assert point["images"] == "1/2" and 0 <= point["miou"] <= 100


def predict(checkpoint, path, folder):
    evaluation.label_photographs(checkpoint, str(path), str(folder), "cpu")


def odd_photographs(folder):
    """Ten odd files, and the size (width, height) that their labels must have; None: skipped."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((10, 10, 1))).astype(np.uint8)
    picture, grey = Image.fromarray(pixels), pixels[:, :, 0]             # 80 x 60
    Image.new("RGB", (1, 1), "red").save(folder / "one.png")
    picture.resize((400, 300)).save(folder / "large.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    Image.fromarray(grey).save(folder / "grey.jpg")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "sixteen.png")
    picture.convert("RGBA").save(folder / "same.png")
    picture.convert("CMYK").save(folder / "same.jpg")
    whole = (folder / "large.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[:len(whole) // 2])
    (folder / "text.jpg").write_text("not a picture")
    (folder / "folder.png").mkdir()
    return {"one.png": (1, 1), "large.jpg": (400, 300), "turned.jpg": (60, 80), "cut.jpg": None,
            "grey.jpg": (80, 60), "sixteen.png": (80, 60), "same.png": (80, 60),
            "same.jpg": (80, 60), "text.jpg": None}


def test_predict_on_odd_files_gives_the_right_size_or_one_line(checkpoint, tmp_path, capsys,
                                                               monkeypatch):
    monkeypatch.setattr(pictures.shrink, "__defaults__", (100 * 100,))   # large.jpg is shrunk
    sizes = odd_photographs(tmp_path / "photographs")
    predict(checkpoint, tmp_path / "photographs", tmp_path / "predictions")
    printed = capsys.readouterr()
    folder = tmp_path / "predictions"
    expected = {f"{name}.{kind}.png" for name, size in sizes.items() if size
                for kind in ("labels", "overlay")}
    assert {path.name for path in folder.iterdir()} == expected
    for name, size in sizes.items():
        lines = [line for line in printed.out.splitlines() if line.split(":")[0].endswith(name)]
        skipped = [line for line in printed.err.splitlines() if name in line]
        assert (len(lines), len(skipped)) == ((1, 0) if size else (0, 1)), name
        if size:
            labels = Image.open(folder / f"{name}.labels.png")
            assert labels.mode == "P" and labels.size == size, name
            assert Image.open(folder / f"{name}.overlay.png").size == size, name
            shares = dict(part.rsplit(" ", 1) for part in lines[0].split(": ", 1)[1].split(", "))
            assert set(shares) <= set(voc.CLASS_NAMES), name
            for label, share in shares.items():
                found = 100 * np.mean(np.array(labels) == voc.CLASS_NAMES.index(label))
                assert share == f"{found:.1f}%", name
    assert all(line.startswith("skipped: ") for line in printed.err.splitlines())


def test_a_turned_photograph_gets_turned_labels(checkpoint, tmp_path):
    rng = np.random.default_rng(1)
    upright = Image.fromarray(np.kron(rng.integers(0, 256, (6, 8, 3)),
                                      np.ones((10, 10, 1))).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6                                         # shown after a turn to the right
    upright.rotate(90, expand=True).save(tmp_path / "tagged.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    for name in ("tagged", "upright"):
        predict(checkpoint, tmp_path / f"{name}.png", tmp_path / "predictions")
    for kind in ("labels", "overlay"):
        tagged, plain = (np.array(Image.open(tmp_path / "predictions" / f"{name}.png.{kind}.png"))
                         for name in ("tagged", "upright"))
        assert np.array_equal(tagged, plain) and len(np.unique(plain)) > 1


@pytest.mark.slow
def test_predict_takes_a_photograph_of_twelve_million_pixels(checkpoint, tmp_path):
    Image.effect_noise((4000, 3000), 60).convert("RGB").save(tmp_path / "a.jpg")
    predict(checkpoint, tmp_path / "a.jpg", tmp_path / "predictions")
    assert Image.open(tmp_path / "predictions" / "a.jpg.labels.png").size == (4000, 3000)


@pytest.mark.parametrize("make, named", [
    (lambda path: path.mkdir(), "photo: found no photographs"),
    (lambda path: path.write_text("text"), "photo: found a file that cannot be read"),
    (lambda path: None, "photo: found no such file"),
    (lambda path: (path.mkdir(), (path / "a.jpg").write_text("text")), "no readable photograph")])
def test_predict_of_nothing_ends_in_one_line(checkpoint, tmp_path, capsys, make, named):
    make(tmp_path / "photo")
    with pytest.raises((ValueError, OSError), match=named) as error:
        predict(checkpoint, tmp_path / "photo", tmp_path / "predictions")
    assert "\n" not in str(error.value)
    assert all(line.startswith("skipped: ") for line in capsys.readouterr().err.splitlines())
