"""The program as people use it: what it writes, what it prints, and what it says of bad input."""
import argparse
import json
import os
import pathlib
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image

import experiment
import run_voc
from minicrf import DenseCRF, training, vgg
from minicrf.data import pictures, toy, voc
from minicrf.results import checkpoints, evaluation, figures, metrics, reports

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
    assert set(results) == {"unary", "piecewise", "joint"}           # none lost to another stage
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


def test_resume_leaves_a_finished_stage_and_goes_on_with_the_next(trained, toy_set, tmp_path,
                                                                  capsys):
    for name in ("unary.npz", "log.csv", "results.json"):
        shutil.copy(trained / name, tmp_path)
    options = ["--voc", str(toy_set), "--net", "tiny", "--out", str(tmp_path), *FAST, "--resume"]
    assert run_voc.main([*options, "--stage", "joint", "--iterations", "1"]) == 0
    assert run_voc.main(options) == 0
    assert (tmp_path / "unary.npz").read_bytes() == (trained / "unary.npz").read_bytes()
    assert checkpoints.read(tmp_path / "joint.npz")[1]["iteration"] == 2
    assert "joint: going on after iteration 1 of 2" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "results.json").read_text())) == set(training.STAGES)


@pytest.mark.parametrize("stage, changed, found", [
    ("unary", "--seed 1", "seed 0, expected 1"),
    ("unary", "--rate 3", "rate 2.0, expected 3.0"),
    ("unary", "--net largefov", "net tiny, expected largefov"),
    ("joint", "--w 1 5", "w [1, 4], expected [1.0, 5.0]"),
    ("joint", "--sigma-bilateral 70 13", "sigma_bilateral [80, 13], expected [70.0, 13.0]")])
def test_resume_refuses_other_settings(trained, toy_set, tmp_path, capsys, stage, changed, found):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    options = ["--voc", str(toy_set), "--net", "tiny", "--rate", "2", "--out", str(tmp_path), *FAST]
    if stage == "unary":
        assert run_voc.main([*options, "--stage", stage]) == 0
    capsys.readouterr()
    before = (tmp_path / f"{stage}.npz").read_bytes()
    if stage == "joint":
        options = ["--voc", str(toy_set), "--out", str(tmp_path), *FAST]
    assert run_voc.main([*options, "--stage", stage, "--resume", *changed.split()]) == 2
    assert_one_line(capsys, f"{stage}.npz: found a run with {found}: --resume goes on with")
    assert (tmp_path / f"{stage}.npz").read_bytes() == before


def test_resume_refuses_another_training_list(trained, toy_set, tmp_path, capsys):
    root, out = tmp_path / "set", tmp_path / "out"
    shutil.copytree(toy_set, root)
    shutil.copytree(trained, out)
    path = root / voc.LISTS / "train.txt"
    path.write_text("\n".join(path.read_text().split()[:-1]))
    options = ["--voc", str(root), "--net", "tiny", "--out", str(out), *FAST, "--stage", "unary"]
    assert run_voc.main([*options, "--resume"]) == 2
    assert_one_line(capsys, "unary.npz: found a run with training list (its checksum)")


@pytest.mark.parametrize("options", ["--stage unary --weights unary_best.npz",
                                     "--stage joint --weights joint_best.npz",
                                     "--stage joint --weights joint.npz", "--weights joint.npz"])
def test_a_run_does_not_overwrite_what_it_starts_from(trained, toy_set, tmp_path, capsys, options):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    *options, name = options.split()
    before = (tmp_path / name).read_bytes()
    assert run_voc.main(["--voc", str(toy_set), "--net", "tiny", "--out", str(tmp_path), *FAST,
                         *options, str(tmp_path / name)]) == 2
    assert_one_line(capsys, f"--weights: found {tmp_path / name}, which this run would overwrite")
    assert (tmp_path / name).read_bytes() == before


def test_an_earlier_runs_checkpoint_is_kept(trained, toy_set, tmp_path, capsys):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    assert run_voc.main(["--voc", str(toy_set), "--net", "tiny", "--out", str(tmp_path), *FAST,
                         "--stage", "unary", "--seed", "1"]) == 0
    kept = (tmp_path / "unary_previous.npz").read_bytes()
    assert kept == (trained / "unary.npz").read_bytes() != (tmp_path / "unary.npz").read_bytes()
    assert "unary.npz: found that of an earlier run; it will be kept" in capsys.readouterr().out


@pytest.mark.parametrize("name, content, words", [
    ("log.csv", "stage,iteration,loss\nunary,1,0.5\n", "log.csv: not a readable log"),
    ("log.csv", "stage,iteration,loss,miou,images\nunary,1,0.5,inf,\n", "log.csv: not a readable"),
    ("log.csv", "stage,iteration,loss,miou,images\nunary,1,0.5,abc,\n", "log.csv: not a readable"),
    ("results.json", "[" * 100000, "results.json: found no results"),
    ("results.json", '{"unary": {"miou": "x", "iou": {}}}', "results.json: found no results"),
    ("results.json", '{"unary": {"miou": 1, "iou": {}, "band": 5}}', "results.json: found no res"),
    ("results.json", '{"unary": {"miou": 1, "iou": {}, "train": {}}}', "results.json: found no r")])
def test_damaged_files_in_out_are_named_before_anything_is_done(trained, toy_set, tmp_path, capsys,
                                                                name, content, words):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(content)
    before = (tmp_path / "unary.npz").read_bytes()
    for stage in ("unary", "eval"):
        assert run_voc.main(["--voc", str(toy_set), "--net", "tiny", "--out", str(tmp_path), *FAST,
                             "--stage", stage]) == 2
        assert_one_line(capsys, words)
    assert (tmp_path / "unary.npz").read_bytes() == before


@pytest.mark.parametrize("changed", [{"settings": "none"}, {"fresh": None}, {"fresh": ["fc9"]},
                                     {"best": "x"}, {"iteration": -3}, {"classes": [1]}])
def test_resume_refuses_a_checkpoint_whose_info_makes_no_sense(trained, toy_set, tmp_path, capsys,
                                                               changed):
    arrays, info = checkpoints.read(trained / "unary.npz")
    arrays["info"] = np.array(json.dumps(info | changed))
    np.savez(tmp_path / "unary.npz", **arrays)
    assert run_voc.main(["--voc", str(toy_set), "--net", "tiny", "--out", str(tmp_path), *FAST,
                         "--stage", "unary", "--resume"]) == 2
    assert_one_line(capsys, f"{tmp_path / 'unary.npz'}: found ")


def test_a_checkpoint_under_another_stages_name_is_refused(trained, toy_set, tmp_path, capsys):
    shutil.copy(trained / "joint.npz", tmp_path / "piecewise.npz")
    assert run_voc.main(["--voc", str(toy_set), "--out", str(tmp_path), "--stage", "eval"]) == 2
    assert_one_line(capsys, "piecewise.npz: found a checkpoint of stage joint, expected piecewise")


def test_an_image_in_both_lists_is_refused(toy_set, tmp_path, capsys):
    root = tmp_path / "set"
    shutil.copytree(toy_set, root)
    with open(root / voc.LISTS / "train.txt", "a") as file:
        file.write("val_0000\n")
    assert run_voc.main(["--voc", str(root), "--net", "tiny", "--out", str(tmp_path), *FAST]) == 2
    assert_one_line(capsys, f"{root}: found val_0000 in both train.txt and val.txt")


def test_joint_does_not_go_on_from_another_unary_network(trained, toy_set, tmp_path, capsys):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    options = ["--voc", str(toy_set), "--net", "tiny", "--out", str(tmp_path), *FAST]
    assert run_voc.main([*options, "--stage", "unary", "--seed", "1"]) == 0
    capsys.readouterr()
    assert run_voc.main([*options, "--stage", "joint", "--resume"]) == 2
    assert_one_line(capsys, "joint.npz: found a run that started from another checkpoint")
    assert (tmp_path / "joint.npz").read_bytes() == (trained / "joint.npz").read_bytes()


def test_the_whole_comparison_in_one_call(toy_set, tmp_path, capsys):
    """tests/experiment.py: all stages from one unary checkpoint, and one table of them."""
    assert experiment.main([str(toy_set), "--net", "tiny", "--batch-size", "2", "--iterations", "1",
                            "--further", "1", "--out", str(tmp_path)]) == 0
    origin = checkpoints.read(tmp_path / "0" / "unary.npz")[0]["fc8_w"]
    for stage in ("piecewise", "joint"):
        assert checkpoints.read(tmp_path / "0" / f"{stage}.npz")[1]["start"] == zlib.crc32(origin)
    table = (tmp_path / "0" / "table.txt").read_text()
    for name in ("unary", "unary + CRF", "unary (control)", "piecewise"):
        assert f"joint against {name} " in table, name
    assert "joint 1: " in capsys.readouterr().out


def test_curves_are_drawn_at_every_evaluation(toy_set, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "curves", lambda path, log: drawn.append(log))
    assert run_voc.main(["--voc", str(toy_set), "--net", "tiny", "--out", str(tmp_path), "--stage",
                         "unary", "--batch-size", "2", "--iterations", "3", "--evaluate-every", "1",
                         "--evaluate-images", "1"]) == 0
    assert [len(log) for log in drawn] == [1, 2, 3, 3]                   # the last by the report
    assert {row["images"] for row in drawn[-1]} == {"1/2"}


def test_eval_measures_with_and_without_crf_on_both_lists(trained, toy_set, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    before = json.loads((out / "results.json").read_text())
    assert run_voc.main(["--voc", str(toy_set), "--out", str(out), "--stage", "eval",
                         "--train-list", "--w", "3", "10"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["unary", "joint", "piecewise"]
    for stage, entry in results.items():
        key = "fixed_crf" if stage == "unary" else "before_crf"
        assert entry["iou"] == before[stage]["iou"]          # the extra figures change none
        for part in (entry, entry[key], entry["train"], entry["train"][key]):
            assert {"miou", "iou", "miou_band", "band"} <= set(part)
    assert results["piecewise"]["before_crf"]["iou"] == results["unary"]["iou"]
    # the CRF that has learned nothing is that of --w: here the same as an own forward pass
    model, _, _ = checkpoints.load_model(str(out / "unary.npz"))
    model.crf = DenseCRF(6, w=(3, 10))
    samples = [voc.load(toy_set, image_id) for image_id in voc.image_list(toy_set, "val")]
    counts = evaluation.evaluate(model, samples, 6)
    assert results["unary"]["fixed_crf"]["miou"] == pytest.approx(
        metrics.mean_iou(counts["crf"].sum(axis=0)), abs=1e-3)
    table = (out / "table.txt").read_text()
    assert table.count("+ CRF") == 3 and table.count("Training list, 4 images") == 1
    assert "joint against unary + CRF" in table and "within 5 px" in table
    assert "joint without CRF" in table and "piecewise without CRF" not in table     # it is unary
    assert checkpoints.read(out / "unary.npz")[0].keys() == checkpoints.read(
        trained / "unary.npz")[0].keys()                     # nothing is saved under another stage


def test_eval_of_one_checkpoint_leaves_table_panels_and_label_pictures(trained, toy_set, tmp_path):
    assert run_voc.main(["--voc", str(toy_set), "--out", str(tmp_path), "--stage", "eval", "--also",
                         str(trained), "--weights", str(trained / "joint.npz"),
                         "--save-predictions"]) == 0
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["joint"]
    found = sorted((tmp_path / "predictions" / "joint").iterdir())
    assert [p.stem for p in found] == voc.image_list(toy_set, "val")
    model, _, _ = checkpoints.load_model(str(trained / "joint.npz"))
    image, labels = voc.load(toy_set, found[0].stem)
    picture = Image.open(found[0])
    assert picture.mode == "P" and np.array_equal(picture, model.predict(image)[1])
    # columns: image, truth, without CRF, with it
    assert Image.open(tmp_path / "panels" / "best.png").width == 10 + 4 * 270
    assert f"joint against joint ({trained.name})" in (tmp_path / "table.txt").read_text()
    assert not (tmp_path / "curves.png").exists()            # nothing was trained here


def test_eval_of_a_unary_checkpoint_saves_its_own_labels(trained, toy_set, tmp_path):
    assert run_voc.main(["--voc", str(toy_set), "--out", str(tmp_path), "--stage", "eval", "--w",
                         "9", "30", "--weights", str(trained / "unary.npz"),
                         "--save-predictions"]) == 0
    model, _, _ = checkpoints.load_model(str(trained / "unary.npz"))
    for path in (tmp_path / "predictions" / "unary").iterdir():
        assert np.array_equal(Image.open(path), model.predict(voc.load(toy_set, path.stem)[0])[0])


def test_results_of_other_pictures_or_classes_are_left_out_of_the_table(trained, toy_set, tmp_path):
    other = tmp_path / "other"
    toy.draw(other, n_train=4, n_val=2, width=(30, 40), height=(24, 32), seed=9)
    shutil.copytree(trained, tmp_path / "out")
    options = ["--out", str(tmp_path / "out"), "--net", "tiny", *FAST]
    assert run_voc.main(["--voc", str(other), *options, "--stage", "unary"]) == 0
    table = (tmp_path / "out" / "table.txt").read_text()
    assert "joint" not in table.split("not in this table")[0]
    assert "not in this table: joint, measured on another data set" in table
    (other / "ImageSets" / "Segmentation" / "classes.txt").write_text("sky\na\nb\nc\nd\ne\nf\n")
    assert run_voc.main(["--voc", str(other), *options, "--stage", "unary"]) == 0
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())) == {
        "unary", "piecewise", "joint"}


@pytest.mark.parametrize("text", ["[]", "{", '{"joint": 3}', '{"joint": {"miou": 3}}',
                                  '{"a": null}'])
def test_results_of_another_kind_are_named(toy_set, trained, tmp_path, capsys, text):
    (tmp_path / "results.json").write_text(text)
    assert run_voc.main(["--voc", str(toy_set), "--out", str(tmp_path), "--stage", "eval",
                         "--weights", str(trained / "unary.npz")]) == 2
    assert_one_line(capsys, "results.json: found no results")
    assert (tmp_path / "results.json").read_text() == text


def test_folders_of_the_same_name_are_told_apart(trained, toy_set, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "runs").mkdir(parents=True)
        shutil.copy(trained / "results.json", tmp_path / name / "runs")
    data = argparse.Namespace(classes=voc.class_names(toy_set), val=voc.image_list(toy_set, "val"))
    truth = reports._read_confusions(trained, "unary")["confusion"].sum(axis=-1)
    also = [str(tmp_path / name / "runs") for name in "ab"]
    columns, _, notes = reports._columns(str(trained), [*also, f"{trained}/."], data, truth)
    names = [name for name in columns if name.startswith("joint (")]
    assert names == [f"joint ({path})" for path in also] and not notes
    data.classes = data.classes[::-1]                        # these folders hold no confusions
    assert len(reports._columns(str(trained), also, data, truth)[2]) == 3 * len(training.STAGES)


def test_what_a_run_starts_from_is_not_overwritten(trained, toy_set, tmp_path, capsys):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    options = ["--voc", str(toy_set), "--net", "tiny", "--out", str(tmp_path), *FAST]
    for stage in ("unary", "joint"):
        assert run_voc.main([*options, "--stage", stage, "--weights",
                             str(tmp_path / f"{stage}.npz")]) == 2
        assert_one_line(capsys, f"{stage}.npz, which this run would overwrite")
    assert run_voc.main([*options, "--stage", "eval", "--weights", str(trained / "joint.npz")]) == 2
    assert_one_line(capsys, "--out: found")
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_ctrl_c_in_an_evaluation_ends_in_one_line(trained, toy_set, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", stop)
    assert run_voc.main(["--voc", str(toy_set), "--out", str(tmp_path), "--stage", "eval",
                         "--weights", str(trained / "joint.npz")]) == 130
    assert_one_line(capsys, "stopped")


@pytest.mark.parametrize("stage, crf", [("../evil", True), ("joint", False), ("unary", True)])
def test_a_checkpoint_of_an_unknown_stage_is_refused(toy_set, tmp_path, capsys, stage, crf):
    classes = voc.class_names(toy_set)
    model = training.Model(vgg.build("tiny", len(classes)), (0, 0, 0), DenseCRF(6) if crf else None)
    path = str(tmp_path / "a.npz")
    checkpoints.save(path, model, {"stage": stage, "iteration": 1, "classes": classes})
    assert run_voc.main(["--voc", str(toy_set), "--out", str(tmp_path / "o"), "--stage", "eval",
                         "--weights", path]) == 2
    assert_one_line(capsys, f"a.npz: found stage {stage!r}")
    assert not list(tmp_path.glob("**/*_val.npz"))


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


@pytest.fixture(scope="module")
def voc_checkpoint(tmp_path_factory):
    """An untrained tiny network with a CRF, for VOC's 21 classes."""
    path = str(tmp_path_factory.mktemp("voc") / "joint.npz")
    model = training.Model(vgg.build("tiny", 21), (104, 117, 123), DenseCRF(21), scale=60)
    rng = np.random.default_rng(0)
    for p in model.net.params.values():
        p += 0.05 * rng.standard_normal(p.shape).astype(p.dtype)
    checkpoints.save(path, model, {"stage": "joint", "iteration": 1,
                                   "classes": list(voc.CLASS_NAMES)})
    return path


def test_predict_on_odd_files_gives_the_right_size_or_one_line(voc_checkpoint, tmp_path, capsys,
                                                               monkeypatch):
    monkeypatch.setattr(pictures.shrink, "__defaults__", (100 * 100,))   # large.jpg is shrunk
    sizes = odd_photographs(tmp_path / "photographs")
    assert run_voc.main(["--stage", "predict", "--image", str(tmp_path / "photographs"), "--out",
                         str(tmp_path), "--weights", voc_checkpoint]) == 0
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


def test_a_turned_photograph_gets_turned_labels(voc_checkpoint, tmp_path):
    rng = np.random.default_rng(1)
    upright = Image.fromarray(np.kron(rng.integers(0, 256, (6, 8, 3)),
                                      np.ones((10, 10, 1))).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6                                         # shown after a turn to the right
    upright.rotate(90, expand=True).save(tmp_path / "tagged.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    for name in ("tagged", "upright"):
        assert run_voc.main(["--stage", "predict", "--image", str(tmp_path / f"{name}.png"),
                             "--out", str(tmp_path), "--weights", voc_checkpoint]) == 0
    for kind in ("labels", "overlay"):
        tagged, plain = (np.array(Image.open(tmp_path / "predictions" / f"{name}.png.{kind}.png"))
                         for name in ("tagged", "upright"))
        assert np.array_equal(tagged, plain) and len(np.unique(plain)) > 1


@pytest.mark.slow
def test_predict_takes_a_photograph_of_twelve_million_pixels(voc_checkpoint, tmp_path):
    Image.effect_noise((4000, 3000), 60).convert("RGB").save(tmp_path / "a.jpg")
    assert run_voc.main(["--stage", "predict", "--image", str(tmp_path / "a.jpg"), "--out",
                         str(tmp_path), "--weights", voc_checkpoint]) == 0
    assert Image.open(tmp_path / "predictions" / "a.jpg.labels.png").size == (4000, 3000)


@pytest.mark.parametrize("make, named", [
    (lambda path: path.mkdir(), "photo: found no photographs"),
    (lambda path: path.write_text("text"), "photo: found a file that cannot be read"),
    (lambda path: None, "photo: found no such file"),
    (lambda path: (path.mkdir(), (path / "a.jpg").write_text("text")), "no readable photograph")])
def test_predict_of_nothing_ends_in_one_line(voc_checkpoint, tmp_path, capsys, make, named):
    make(tmp_path / "photo")
    assert run_voc.main(["--stage", "predict", "--image", str(tmp_path / "photo"), "--out",
                         str(tmp_path), "--weights", voc_checkpoint]) == 2
    error = capsys.readouterr().err.splitlines()
    assert named in error[-1] and error[-1].startswith("run_voc.py: ")
    assert len(error) == 1 + sum(line.startswith("skipped: ") for line in error)


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


@pytest.mark.parametrize("stage", [[], ["--stage", "eval"]])
def test_a_sound_data_set_is_checked_before_anything_is_trained(toy_set, tmp_path, capsys, stage):
    arguments = ["--voc", str(toy_set), "--check", "--out", str(tmp_path), *stage]
    assert run_voc.main(arguments) == 0
    assert capsys.readouterr().out == f"{toy_set}: no problem found\n"


@pytest.mark.parametrize("options, named", [
    (["--voc", "/no/such/folder"], "/no/such/folder"),
    (["--stage", "joint"], "unary.npz: found no such file"),
    (["--stage", "joint", "--weights", "{set}/classes.npz"], "classes.npz"),
    (["--stage", "unary", "--weights", "{out}/joint.npz", "--net", "largefov"],
     "joint.npz: conv1_1_w"),
    (["--stage", "unary", "--weights", "{set}/toy.txt"], "toy.txt: found neither"),
    (["--stage", "eval", "--weights", "{set}/toy.txt"], "toy.txt"),
    (["--stage", "predict"], "--image: found nothing"),
    (["--image", "{set}/JPEGImages"], "--image: found it without --stage predict"),
    (["--save-predictions"], "--save-predictions: found it without --stage eval"),
    (["--also", "{out}/nowhere"], "--also: found no results.json in"),
    (["--out", "{set}/toy.txt"], "--out: found"), (["--out", "/dev/null/runs"], "--out: found")])
def test_bad_options_end_in_one_line_and_exit_code_2(trained, toy_set, tmp_path, capsys, options,
                                                     named):
    options = [option.format(set=toy_set, out=trained) for option in options]
    assert run_voc.main(["--voc", str(toy_set), "--net", "tiny", "--out", str(tmp_path), *FAST,
                         *options]) == 2
    assert_one_line(capsys, named)
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize("option, wrong", [
    ("--iterations", ["0", "-1", "1.5", "x", "9" * 5000]), ("--batch-size", ["0", "\u00b2"]),
    ("--evaluate-images", ["0"]), ("--rate", ["-1", "nan", "inf", "x", "1e999"]),
    ("--drop", ["-0.1", "1.1", "nan"]), ("--seed", ["-1", "0.5"]), ("--w", ["-1 4", "1 nan", "1"]),
    ("--sigma-position", ["0", "-3", "nan", "1e-300"]), ("--sigma-bilateral", ["80 0"]),
    ("--stage", ["train"]), ("--nonsense", ["1"])])
def test_bad_values_of_options_end_in_one_line_and_exit_code_2(capsys, option, wrong):
    for text in wrong:
        with pytest.raises(SystemExit) as stopped:
            run_voc.main([option, *text.split()])
        assert stopped.value.code == 2
        assert_one_line(capsys, option)


def test_options_that_make_sense_are_taken():
    args = run_voc.parse_arguments("--rate 0 --drop 1 --w 0 0 --seed 0 --iterations 3".split())
    assert args.rate == {"unary": 0, "piecewise": 0, "joint": 0} and args.drop == 1
    assert args.iterations["joint"] == 3 and args.w == [0, 0] and args.net == "tiny"
    args = run_voc.parse_arguments(["--voc", "x"])
    assert args.net == "vgg16" and args.batch_size == 20 and args.iterations["unary"] == 6000


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
    for path in source.rglob("*.py"):
        text = path.read_text()
        assert "cupy" not in text or path.name == "arrays.py" or "import cupy" not in text, path
        assert "pickle.load" not in text and "eval(" not in text.replace("-eval(", ""), path
    assert os.path.exists(source / "__init__.py")
