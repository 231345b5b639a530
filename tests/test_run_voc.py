"""The program as people use it: what it writes, what it prints, and what it says of bad input."""
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

import run_voc
from minicrf import checkpoints, toy, voc

FAST = ["--batch-size", "2", "--iterations", "2", "--evaluate-every", "2"]


@pytest.fixture(scope="module")
def toy_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "set"
    toy.draw(root, n_train=4, n_val=2, width=(30, 40), height=(24, 32))
    return root


@pytest.fixture(scope="module")
def trained(toy_set, tmp_path_factory):
    """An output folder after all three stages, two iterations each."""
    out = tmp_path_factory.mktemp("out")
    options = ["--voc", str(toy_set), "--net", "tiny", "--out", str(out), *FAST]
    assert run_voc.main(options) == 0
    assert run_voc.main([*options, "--stage", "piecewise", "--train-list"]) == 0
    return out


def test_a_run_leaves_checkpoints_results_log_table_and_pictures(trained, toy_set):
    for name in ("unary.npz", "joint.npz", "piecewise.npz", "log.csv", "table.txt", "curves.png",
                 "panels/best.png", "panels/worst.png"):
        assert (trained / name).stat().st_size > 0, name
    results = json.loads((trained / "results.json").read_text())
    assert set(results) == {"unary", "piecewise", "joint"}               # none lost to another stage
    for entry in results.values():
        assert set(entry["iou"]) == set(voc.class_names(toy_set))
        present = [value for value in entry["iou"].values() if value is not None]
        assert entry["miou"] == pytest.approx(np.mean(present), abs=1e-3)
    assert "train" in results["piecewise"]
    table = (trained / "table.txt").read_text()
    assert "unary" in table and "joint" in table and "mean IoU" in table
    stages = {line.split(",")[0] for line in (trained / "log.csv").read_text().splitlines()[1:]}
    assert stages == {"unary", "joint", "piecewise"}
    assert not list(trained.glob("**/*.tmp"))


def test_the_same_seed_gives_the_same_numbers(trained, toy_set, tmp_path):
    options = ["--voc", str(toy_set), "--net", "tiny", "--out", str(tmp_path), *FAST]
    assert run_voc.main(options) == 0
    first, _ = checkpoints.read(trained / "joint.npz")
    second, _ = checkpoints.read(tmp_path / "joint.npz")
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_resume_goes_on_where_a_shorter_run_stopped(trained, toy_set, tmp_path):
    shutil.copy(trained / "unary.npz", tmp_path)
    options = ["--voc", str(toy_set), "--net", "tiny", "--out", str(tmp_path), "--stage", "unary",
               "--resume", "--batch-size", "2", "--iterations", "3"]
    assert run_voc.main(options) == 0
    assert checkpoints.read(tmp_path / "unary.npz")[1]["iteration"] == 3


def test_eval_writes_the_table_and_label_pictures(trained, toy_set, tmp_path):
    assert run_voc.main(["--voc", str(toy_set), "--out", str(tmp_path), "--stage", "eval",
                         "--weights", str(trained / "joint.npz"), "--save-predictions"]) == 0
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["joint"]
    pictures = sorted((tmp_path / "predictions" / "joint").iterdir())
    assert [p.stem for p in pictures] == voc.image_list(toy_set, "val")
    assert Image.open(pictures[0]).mode == "P"


def test_predict_skips_a_broken_file_and_goes_on(trained, toy_set, tmp_path, capsys):
    folder = tmp_path / "photographs"
    folder.mkdir()
    shutil.copy(next((toy_set / "JPEGImages").iterdir()), folder / "good.jpg")
    (folder / "bad.jpg").write_text("not a picture")
    Image.new("L", (1, 1)).save(folder / "one.png")
    assert run_voc.main(["--stage", "predict", "--image", str(folder), "--out", str(tmp_path),
                         "--weights", str(trained / "joint.npz")]) == 0
    printed = capsys.readouterr()
    assert "bad.jpg" in printed.err and "good.jpg" in printed.out
    names = {path.name for path in (tmp_path / "predictions").iterdir()}
    assert names == {"good.jpg.labels.png", "good.jpg.overlay.png", "one.png.labels.png",
                     "one.png.overlay.png"}
    labels = Image.open(tmp_path / "predictions" / "good.jpg.labels.png")
    assert labels.size == Image.open(folder / "good.jpg").size


def broken_set(toy_set, tmp_path, change):
    root = tmp_path / "broken"
    shutil.copytree(toy_set, root)
    change(root)
    return root


def remove_labels(root):
    shutil.rmtree(root / "SegmentationClass")


def remove_one_label(root):
    (root / "SegmentationClass" / "train_0001.png").unlink()


def shrink_one_label(root):
    voc.save_labels(root / "SegmentationClass" / "train_0001.png", np.zeros((5, 5), np.uint8))


def raise_one_label(root):
    path = root / "SegmentationClass" / "train_0001.png"
    voc.save_labels(path, np.where(np.array(Image.open(path)) == 1, 77, 0).astype(np.uint8) + 30)


def cut_one_image(root):
    path = root / "JPEGImages" / "train_0001.jpg"
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("change, named", [
    (remove_labels, "SegmentationClass"), (remove_one_label, "train_0001.png"),
    (shrink_one_label, "train_0001.png: found 5x5 labels"),
    (raise_one_label, "train_0001.png: found label"), (cut_one_image, "train_0001.jpg")])
def test_broken_data_ends_in_one_line_and_exit_code_2(toy_set, tmp_path, capsys, change, named):
    root = broken_set(toy_set, tmp_path, change)
    assert run_voc.main(["--voc", str(root), "--net", "tiny", "--out", str(tmp_path / "o"), *FAST,
                         "--batch-size", "4"]) == 2
    assert_one_line(capsys, named)
    if change is not remove_labels:
        assert run_voc.main(["--voc", str(root), "--check"]) == 2
        assert "train_0001" in capsys.readouterr().out


@pytest.mark.parametrize("options, named", [
    (["--voc", "/no/such/folder"], "/no/such/folder"),
    (["--stage", "joint"], "unary.npz: found no such file"),
    (["--stage", "joint", "--weights", "{set}/classes.npz"], "classes.npz"),
    (["--stage", "unary", "--weights", "{out}/joint.npz", "--net", "vgg16"], "joint.npz: conv1_1_w"),
    (["--stage", "unary", "--weights", "{set}/toy.txt"], "toy.txt: found neither"),
    (["--stage", "eval", "--weights", "{set}/toy.txt"], "toy.txt"),
    (["--stage", "predict"], "--image")])
def test_bad_options_end_in_one_line_and_exit_code_2(trained, toy_set, tmp_path, capsys, options,
                                                     named):
    options = [option.format(set=toy_set, out=trained) for option in options]
    assert run_voc.main(["--voc", str(toy_set), "--net", "tiny", "--out", str(tmp_path), *FAST,
                         *options]) == 2
    assert_one_line(capsys, named)
    assert not list(tmp_path.glob("*.npz"))


def test_gpu_where_there_is_none_is_said_in_one_line(toy_set, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_voc, "gpu_available", lambda: False)
    assert run_voc.main(["--voc", str(toy_set), "--device", "gpu", "--out", str(tmp_path)]) == 2
    assert_one_line(capsys, "--device: found gpu")


def test_a_bad_run_overwrites_nothing(trained, toy_set, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    before = {path: path.read_bytes() for path in out.glob("*.*")}
    root = broken_set(toy_set, tmp_path, cut_one_image)
    for stage in ("unary", "joint"):
        assert run_voc.main(["--voc", str(root), "--net", "tiny", "--out", str(out), "--stage",
                             stage, "--batch-size", "4", "--iterations", "2"]) == 2
    for path, content in before.items():
        if path.name != "log.csv":
            assert path.read_bytes() == content, path


def test_other_classes_than_the_checkpoints_are_refused(trained, toy_set, tmp_path, capsys):
    def rename(root):
        (root / "ImageSets" / "Segmentation" / "classes.txt").write_text(
            "background\nsphere\nbox\ntriangle\nring\ncross\n")

    root = broken_set(toy_set, tmp_path, rename)
    assert run_voc.main(["--voc", str(root), "--out", str(tmp_path), "--stage", "joint",
                         "--weights", str(trained / "unary.npz"), *FAST]) == 2
    assert_one_line(capsys, "unary.npz: found a network for 6 classes")


def assert_one_line(capsys, named):
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("run_voc.py: ")]
    assert len(lines) == 1 and named in lines[0], error
    assert "Traceback" not in error and error.rstrip().endswith(lines[0])


def test_importing_needs_nothing_outside_the_project():
    source = pathlib.Path(run_voc.__file__).parent / "minicrf"
    for path in source.glob("*.py"):
        text = path.read_text()
        assert "cupy" not in text or path.name == "arrays.py" or "import cupy" not in text, path
        assert "pickle.load" not in text and "eval(" not in text.replace("-eval(", ""), path
    assert os.path.exists(source / "__init__.py")
