"""The program as people use it: what it writes, what it prints, and what it says of bad input."""
import json
import os
import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import experiment
import run_voc
from minicrf import DenseCRF, LocalCRF, training
from minicrf.data import loading, toy, voc
from minicrf.results import checkpoints, evaluation, figures, logs, reports

FAST = ["--batch-size", "2", "--iterations", "2", "--evaluate-every", "2"]


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
    for name in ("unary.npz", "log.csv", "unary_val.npz", "piecewise_val.npz"):
        shutil.copy(trained / name, tmp_path)
    options = ["--voc", str(toy_set), "--net", "tiny", "--out", str(tmp_path), *FAST, "--resume"]
    assert run_voc.main([*options, "--stage", "joint", "--iterations", "1"]) == 0
    assert run_voc.main(options) == 0
    assert (tmp_path / "unary.npz").read_bytes() == (trained / "unary.npz").read_bytes()
    assert checkpoints.read(tmp_path / "joint.npz")[1]["iteration"] == 2
    assert "joint: going on after iteration 1 of 2" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"unary", "piecewise", "joint"}


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


@pytest.mark.parametrize("split", ["train", "val"])
def test_resume_refuses_other_image_lists(trained, toy_set, tmp_path, capsys, split):
    root, out = tmp_path / "set", tmp_path / "out"
    shutil.copytree(toy_set, root)
    shutil.copytree(trained, out)
    path = root / voc.LISTS / f"{split}.txt"
    path.write_text("\n".join(path.read_text().split()[:-1]))
    options = ["--voc", str(root), "--net", "tiny", "--out", str(out), *FAST, "--stage", "unary"]
    assert run_voc.main([*options, "--resume"]) == 2
    assert_one_line(capsys, "unary.npz: found a run with image lists (their checksum)")


def test_a_checkpoint_under_another_stages_name_is_refused(trained, toy_set, tmp_path, capsys):
    shutil.copy(trained / "joint.npz", tmp_path / "piecewise.npz")
    assert run_voc.main(["--voc", str(toy_set), "--out", str(tmp_path), "--stage", "eval"]) == 2
    assert_one_line(capsys, "piecewise.npz: found a checkpoint of stage joint, whose results would")


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
    assert_one_line(capsys, "joint.npz: found a run with checkpoint to start from (its checksum)")
    assert (tmp_path / "joint.npz").read_bytes() == (trained / "joint.npz").read_bytes()


def test_the_whole_comparison_in_one_call(toy_set, tmp_path, capsys):
    """tests/evidence/experiment.py: all stages from one unary checkpoint, and one table of them."""
    arguments = [str(toy_set), "--net", "tiny", "--batch-size", "2", "--iterations", "1",
                 "--further", "1", "--out", str(tmp_path)]
    assert experiment.main(arguments) == 0
    starts = {checkpoints.read(tmp_path / "0" / f"{stage}.npz")[1]["settings"][
        "checkpoint to start from (its checksum)"] for stage in ("local", "piecewise", "joint")}
    assert len(starts) == 1
    table = (tmp_path / "0" / "table.txt").read_text()
    for name in ("unary", "unary + untrained CRF", "unary (control)", "local", "piecewise",
                 "unary + untrained CRF (control)", "searched (control)", "piecewise (control)"):
        assert f"joint against {name} " in table, name
    out = capsys.readouterr().out
    assert all(f"1 seeds: {a} against {b}: " in out for a, b in experiment.PAIRS)
    assert all(f"{name} " in out.split("seed 0: unary ")[1] for name in experiment.COLUMNS
               if name != "unary")

    (tmp_path / "0" / "joint_val.npz").unlink()      # called again, it does what is left
    capsys.readouterr()
    assert experiment.main(arguments) == 0
    left = capsys.readouterr().out.split("\n\n")[0]
    assert re.findall("--stage ([a-z]+)", left) == ["joint", "eval", "eval"]


def test_what_a_run_starts_from_is_not_overwritten(trained, toy_set, tmp_path, capsys):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    options = ["--voc", str(toy_set), "--net", "tiny", "--out", str(tmp_path), *FAST]
    for stage in ("unary", "joint"):
        assert run_voc.main([*options, "--stage", stage, "--weights",
                             str(tmp_path / f"{stage}.npz")]) == 2
        assert_one_line(capsys, f"{stage}.npz, which this run would overwrite")
    assert run_voc.main([*options, "--stage", "eval", "--weights", str(trained / "joint.npz")]) == 2
    assert_one_line(capsys, "joint.npz: found a checkpoint of stage joint, whose results would")
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_ctrl_c_in_an_evaluation_ends_in_one_line(trained, toy_set, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reports, "evaluate", stop)
    assert run_voc.main(["--voc", str(toy_set), "--out", str(tmp_path), "--stage", "eval",
                         "--weights", str(trained / "joint.npz")]) == 130
    assert_one_line(capsys, "stopped")


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
    (shrink_one_label, "train_0001.png: labels: found shape (5, 5)"),
    (raise_one_label, "train_0001.png: labels: found"), (cut_one_image, "train_0001.jpg")])
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
    assert capsys.readouterr().out.endswith(f"{toy_set}: no problem found\n")


@pytest.mark.parametrize("options, named", [
    (["--voc", "/no/such/folder"], "/no/such/folder"),
    (["--stage", "joint"], "unary.npz: found no such file"),
    (["--stage", "joint", "--weights", "{set}/classes.npz"], "classes.npz"),
    (["--stage", "unary", "--weights", "{out}/joint.npz", "--net", "largefov"],
     "joint.npz: conv1_1_w"),
    (["--stage", "unary", "--weights", "{set}/toy.txt"], "toy.txt: found neither"),
    (["--stage", "eval", "--weights", "{set}/toy.txt"], "toy.txt"),
    (["--image", "{set}/JPEGImages"], "--image: found one of it and --stage predict"),
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
    ("--batch-size", ["9" * 19, "9" * 400]), ("--weights", [None]), ("--out", [None]),
    ("--stage", ["train"]), ("--nonsense", ["1"])])
def test_bad_values_of_options_end_in_one_line_and_exit_code_2(capsys, option, wrong):
    for text in wrong:
        with pytest.raises(SystemExit) as stopped:
            run_voc.main([option, *("" if text is None else text).split(" ")])
        assert stopped.value.code == 2
        assert_one_line(capsys, option)


def test_options_that_make_sense_are_taken():
    args = run_voc.parse_arguments("--rate 0 --drop 1 --w 0 0 --seed 0 --iterations 3".split())
    assert args.rate == dict.fromkeys(training.STAGES, 0) and args.drop == 1
    assert args.iterations["joint"] == 3 and args.w == [0, 0] and args.net == "tiny"
    args = run_voc.parse_arguments(["--voc", "x"])
    assert args.net == "vgg16" and args.batch_size == 20 and args.iterations["unary"] == 6000


@pytest.mark.parametrize("options, named", [
    ([], "--image: found one of it and --stage predict"), (["--check"], "--check: found it with --stage predict"),
    (["--w", "1", "2"], "--w: found it with --stage predict"),
    (["--image", "x", "--iterations", "3"], "--iterations: found it with --stage predict")])
def test_predict_refuses_what_it_does_not_use(tmp_path, capsys, options, named):
    try:
        code = run_voc.main(["--stage", "predict", "--out", str(tmp_path / "out"), *options])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and not (tmp_path / "out").exists()
    assert_one_line(capsys, named)


def test_predict_labels_photographs_with_the_last_stage(trained, toy_set, tmp_path, capsys):
    photograph = str(toy_set / "JPEGImages" / "val_0000.jpg")
    for name in ("unary.npz", "joint.npz"):
        shutil.copy(trained / name, tmp_path)
    assert run_voc.main(["--stage", "predict", "--image", photograph, "--out", str(tmp_path)]) == 0
    model, _, _ = checkpoints.load_model(tmp_path / "joint.npz")
    expected = model.predict(np.array(Image.open(photograph)))[1]
    found = Image.open(tmp_path / "predictions" / "val_0000.jpg.labels.png")
    assert np.array_equal(found, expected) and "background" in capsys.readouterr().out


def test_gpu_where_there_is_none_is_said_in_one_line(toy_set, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_voc, "gpu_available", lambda: False)
    assert run_voc.main(["--voc", str(toy_set), "--device", "gpu", "--out", str(tmp_path)]) == 2
    assert_one_line(capsys, "--device: found gpu")


@pytest.mark.parametrize("fault", ["a broken picture", "a huge rate"])
def test_a_failed_rerun_loses_nothing_of_the_earlier_one(trained, toy_set, tmp_path, capsys, fault):
    """Nothing goes before there is something in its place: not a row of the log either."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    before = {path: path.read_bytes() for path in out.glob("*.*")}
    root = broken_set(toy_set, tmp_path, cut_one_image) if fault[0:3] == "a b" else toy_set
    for stage in ("unary", "joint"):
        assert run_voc.main(["--voc", str(root), "--net", "tiny", "--out", str(out), "--stage",
                             stage, "--batch-size", "4", "--iterations", "2",
                             *(["--rate", "1e30"] if root is toy_set else [])]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert {path: path.read_bytes() for path in out.glob("*.*")} == before


def test_a_log_of_another_kind_is_named_before_anything_is_done(trained, toy_set, tmp_path, capsys):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    with open(tmp_path / "log.csv", "a") as file:
        file.write("unary,one\n")
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    for stage in ("unary", "eval"):
        assert run_voc.main(["--voc", str(toy_set), "--net", "tiny", "--out", str(tmp_path), *FAST,
                             "--stage", stage]) == 2
        assert_one_line(capsys, "log.csv: line ")
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_the_joint_curve_starts_with_nothing_learned(trained):
    first = {}
    for row in logs.read_log(trained / "log.csv"):
        first.setdefault(row["stage"], row)
    assert first["joint"]["iteration"] == first["piecewise"]["iteration"] == "0"
    assert first["joint"]["miou"] and first["joint"]["loss"] == ""
    assert (first["joint"]["w_0"], first["joint"]["w_1"]) == ("1.0", "4.0")
    assert first["unary"]["iteration"] == "1"


def test_class_names_are_shown(trained, toy_set, tmp_path, capsys):
    assert run_voc.main(["--voc", str(toy_set), "--out", str(tmp_path), "--stage", "eval",
                         "--weights", str(trained / "unary.npz")]) == 0
    assert "6 classes (background, disc, box, triangle, ring, cross)" in capsys.readouterr().out


def test_curves_are_drawn_at_every_evaluation(toy_set, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "curves", lambda path, log: drawn.append(len(log)))
    assert run_voc.main(["--voc", str(toy_set), "--net", "tiny", "--out", str(tmp_path), "--stage",
                         "unary", "--batch-size", "2", "--iterations", "3", "--evaluate-every", "1",
                         "--evaluate-images", "1"]) == 0
    assert drawn == [1, 2, 3]
    assert {row["images"] for row in logs.read_log(tmp_path / "log.csv")} == {"1/2"}


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize("label, size, miou", [(255, (12, 15), None), (2, (12, 15), 100.0),
                                               (1, (1, 1), 100.0)],
                         ids=["all void", "one class", "one pixel"])
def test_pictures_with_little_in_them_run_to_the_end(tmp_path, capsys, label, size, miou):
    root, out, rng = tmp_path / "set", tmp_path / "out", np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", voc.LISTS):
        (root / folder).mkdir(parents=True)
    for name in ("p0", "p1", "p2"):
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(image).save(root / "JPEGImages" / f"{name}.png")
        voc.save_labels(root / "SegmentationClass" / f"{name}.png", np.full(size, label, np.uint8))
    (root / voc.LISTS / "train.txt").write_text("p0\np1\n")
    (root / voc.LISTS / "val.txt").write_text("p2\n")
    assert run_voc.main(["--voc", str(root), "--out", str(out), "--net", "tiny", *FAST]) == 0
    assert capsys.readouterr().err == ""
    results = json.loads((out / "results.json").read_text())
    assert results["joint"]["miou"] == miou and results["joint"]["miou_band"] is None
    losses = [float(row["loss"]) for row in logs.read_log(out / "log.csv") if row["loss"]]
    assert losses == [0] * 4 if miou is None else np.isfinite(losses).all()


def test_out_of_memory_names_the_batch_and_the_smaller_setting_to_try(toy_set, tmp_path,
                                                                      monkeypatch, capsys):
    monkeypatch.setattr(training.Model, "resized", lambda *_: np.empty(2 ** 60, np.uint8))
    assert run_voc.main(["--voc", str(toy_set), "--net", "tiny", "--out", str(tmp_path),
                         *FAST]) == 2
    assert_one_line(capsys, "too little memory for 2 images at a time; try --micro-batch 1")


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


@pytest.mark.parametrize("options", [["--stage", "local"],
                                     ["--stage", "piecewise", "--compatibility", "matrix"]])
def test_other_crfs_train_resume_and_predict(trained, toy_set, tmp_path, capsys, options):
    shutil.copy(trained / "unary.npz", tmp_path)
    common = ["--voc", str(toy_set), "--net", "tiny", "--out", str(tmp_path), *options]
    fast = [*common, "--batch-size", "2", "--evaluate-images", "1"]
    assert run_voc.main([*fast, "--iterations", "1"]) == 0
    assert run_voc.main([*fast, "--iterations", "2", "--resume"]) == 0
    stage = options[1]
    assert f"{stage}: going on after iteration 1 of 2" in capsys.readouterr().out
    crf = checkpoints.load_model(tmp_path / f"{stage}.npz")[0].crf
    w = crf.params["w"]
    if stage == "local":
        assert isinstance(crf, LocalCRF) and (w != 1).all()
    else:                                # off the diagonal, too; symmetric, positive semi-definite
        assert w.shape == (2, 6, 6) and (w[:, 0, 1] != 0).all()
        assert np.allclose(w, w.swapaxes(1, 2)) and np.linalg.eigvalsh(w).min() > -1e-9
        assert (tmp_path / "piecewise_compatibility.png").exists()
    photograph = next((pathlib.Path(toy_set) / "JPEGImages").iterdir())
    assert run_voc.main(["--stage", "predict", "--weights", str(tmp_path / f"{stage}.npz"),
                         "--image", str(photograph), "--out", str(tmp_path)]) == 0

def search_options(root, out, start):
    return ["--voc", str(root), "--out", str(out), "--weights", str(start / "unary.npz"),
            "--stage", "search"]


def test_search_is_a_column_and_is_not_done_twice(trained, tmp_path, toy_set, capsys, monkeypatch):
    options = search_options(toy_set, tmp_path, trained)
    assert run_voc.main(options) == 0
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["searched"]
    assert "searched against searched without CRF" in (tmp_path / "table.txt").read_text()
    assert reports.counts(tmp_path, "searched")["crf"].shape == (2, 6, 6)

    monkeypatch.setattr(evaluation, "cross_fitted", lambda *_: pytest.fail("searched again"))
    assert run_voc.main([*options, "--resume"]) == 0
    assert "done before" in capsys.readouterr().out
    with pytest.raises(pytest.fail.Exception):           # other settings: not the same figures
        run_voc.main([*options, "--resume", "--w", "2", "4"])


def test_no_image_is_measured_with_parameters_that_its_labels_helped_to_choose(tmp_path):
    """All labels of one image change: its own labels found stay, those of the other may not."""
    root = toy.draw(tmp_path / "set", n_train=1, n_val=4, width=(30, 40), height=(24, 32))
    data, chosen = loading.DataSet(root), {}

    class Model:
        device, crf = "cpu", None

        def scores(self, image):
            return np.random.default_rng(image.size).standard_normal((*image.shape[:2], 6))

        def predict(self, image):
            f = self.scores(image)
            q = self.crf.forward(f, image, train=False)
            chosen[image.tobytes()] = {key: p.tolist() for key, p in self.crf.params.items()}
            return f.argmax(axis=2), q.argmax(axis=2)

    def parameters(data=data):
        evaluation.cross_fitted(Model(), data, lambda: DenseCRF(6, w=(1, 4)))
        return [chosen[data.load(image_id)[0].tobytes()] for image_id in data.val]

    weak = loading.DataSet(root, None, "Scribbles")          # sees no validation label at all
    before, before_weak = parameters(), parameters(weak)
    for image_id in data.val[::2]:                       # labels as an untouched network finds them
        found = Model().scores(data.load(image_id)[0]).argmax(axis=2)
        voc.save_labels(root / "SegmentationClass" / f"{image_id}.png", found.astype(np.uint8))
    after = parameters()
    assert parameters(weak) == before_weak and len({*map(str, before_weak)}) == 1
    assert after[::2] == before[::2]
    assert after[1] == after[3] != before[1] == before[3]        # chosen on the even ones


def test_training_labels_of_another_folder(toy_set, tmp_path, capsys):
    """--labels: the training list's alone; --check reads them; other labels are another run."""
    root = shutil.copytree(toy_set, tmp_path / "set")
    options = ["--voc", str(root), "--out", str(tmp_path / "o"), "--labels", "Scribbles"]
    assert run_voc.main([*options, "--check"]) == 0
    for name in ("train_0000", "val_0000"):
        (root / "Scribbles" / f"{name}.png").unlink()
    capsys.readouterr()
    assert run_voc.main([*options, "--check"]) == 2
    out = capsys.readouterr().out
    assert "train_0000" in out and "val_0000" not in out
    data = loading.DataSet(root, None, "Scribbles")
    assert (data.load("train_0001")[1] == 255).mean() > 0.9
    assert (data.load("val_0001")[1] == 255).mean() < 0.5

    shutil.rmtree(root)
    shutil.copytree(toy_set, root)
    assert run_voc.main([*options, "--net", "tiny", *FAST, "--stage", "unary"]) == 0
    capsys.readouterr()
    assert run_voc.main([*options[:-1], "Clicks", "--net", "tiny", *FAST, "--stage", "unary",
                         "--resume"]) == 2
    assert_one_line(capsys, "found a run with labels Scribbles, expected Clicks")
