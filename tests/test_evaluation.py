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
    assert (counts["crf_band"].sum(axis=(1, 2)) < labelled).all()
    data.classes = list(voc.CLASS_NAMES)
    point = evaluation.curve_point(model, data, 1)
    assert point["images"] == "1/2" and 0 <= point["miou"] <= 100


def predict(checkpoint, path, folder):
    evaluation.label_photographs(checkpoint, str(path), str(folder), "cpu")


def test_photographs_of_a_folder_get_labels_of_their_size_and_broken_ones_one_line(
        checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pictures.shrink, "__defaults__", (100 * 100,))   # large.jpg is shrunk
    photographs, predictions = tmp_path / "photographs", tmp_path / "predictions"
    photographs.mkdir()
    rng, sizes = np.random.default_rng(0), {"one.png": (1, 1), "large.jpg": (400, 300)}
    for name, (W, H) in sizes.items():
        pixels = rng.integers(0, 256, (H, W, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photographs / name)
    (photographs / "text.jpg").write_text("not a picture")
    predict(checkpoint, photographs, predictions)
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"skipped: {photographs / 'text.jpg'}: ")
    assert {path.name for path in predictions.iterdir()} == {
        f"{name}.{kind}.png" for name in sizes for kind in ("labels", "overlay")}
    for name, size in sizes.items():
        labels = Image.open(predictions / f"{name}.labels.png")
        assert labels.mode == "P" and labels.size == size
        assert Image.open(predictions / f"{name}.overlay.png").size == size
        [line] = [line for line in printed.out.splitlines() if line.split(":")[0].endswith(name)]
        for part in line.split(": ", 1)[1].split(", "):
            label, share = part.rsplit(" ", 1)
            found = 100 * np.mean(np.array(labels) == voc.CLASS_NAMES.index(label))
            assert share == f"{found:.1f}%", name


def test_a_photograph_too_large_for_memory_is_passed_over(checkpoint, tmp_path, capsys,
                                                          monkeypatch):
    for name, side in ("a.png", 8), ("b.png", 9):
        Image.new("RGB", (side, side)).save(tmp_path / name)
    real = training.Model.predict

    def scarce(model, image):
        if len(image) == 8:
            raise MemoryError
        return real(model, image)

    monkeypatch.setattr(training.Model, "predict", scarce)
    predict(checkpoint, tmp_path, tmp_path / "out")
    assert capsys.readouterr().err == f"skipped: {tmp_path / 'a.png'}: too little memory\n"
    assert (tmp_path / "out" / "b.png.labels.png").exists()


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
