"""The program as people use it: what it writes, what it prints, and what it says of bad input."""
import json
import re
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image

import experiment
import run_voc
from minicrf import DenseCRF, LocalCRF, training
from minicrf.data import loading, toy, voc
from minicrf.results import checkpoints, evaluation, figures, logs, reports

FAST = ["--batch-size", "2", "--iterations", "2", "--evaluate-every", "2"]


def options(root, out, *more):
    return ["--voc", str(root), "--net", "tiny", "--out", str(out), *FAST, *more]


@pytest.fixture(scope="module")
def trained(toy_set, tmp_path_factory):
    """An output folder after all three stages, two iterations each."""
    out = tmp_path_factory.mktemp("out")
    assert run_voc.main(options(toy_set, out)) == 0
    assert run_voc.main(options(toy_set, out, "--stage", "piecewise", "--train-list")) == 0
    return out


@pytest.fixture
def copy(trained, tmp_path):
    """The same folder, to change something in."""
    return shutil.copytree(trained, tmp_path / "copy")


def contents(folder):
    return {path: path.read_bytes() for path in folder.glob("*.*")}


def assert_one_line(capsys, named):
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("run_voc.py: ")]
    assert len(lines) == 1 and named in lines[0], error
    assert "Traceback" not in error and error.rstrip().endswith(lines[0])


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


def test_resume_leaves_a_finished_stage_and_goes_on_with_the_next(trained, toy_set, tmp_path,
                                                                  capsys):
    for name in ("unary.npz", "log.csv", "unary_val.npz", "piecewise_val.npz"):
        shutil.copy(trained / name, tmp_path)
    joint = options(toy_set, tmp_path, "--stage", "joint", "--iterations", "1")
    assert run_voc.main(joint) == 0
    assert run_voc.main(options(toy_set, tmp_path, "--resume")) == 0
    assert (tmp_path / "unary.npz").read_bytes() == (trained / "unary.npz").read_bytes()
    assert checkpoints.read(tmp_path / "joint.npz")[1]["iteration"] == 2
    out = capsys.readouterr().out
    assert "6 classes (background, disc, box, triangle, ring, cross); on the cpu\n" in out
    assert "joint: resumes after iteration 1 of 2" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"unary", "piecewise", "joint"}


@pytest.mark.parametrize("stage, changed, found", [
    ("unary", "--seed 1", "seed 0, expected 1"),
    ("unary", "--rate 3", "rate 1.0, expected 3.0"),
    ("joint", "--sigma-bilateral 70 13", "sigma_bilateral [80, 13], expected [70.0, 13.0]")])
def test_resume_refuses_other_settings(copy, toy_set, tmp_path, capsys, stage, changed, found):
    before = contents(copy)
    assert run_voc.main(options(toy_set, copy, "--stage", stage, "--resume", *changed.split())) == 2
    assert_one_line(capsys, f"{stage}.npz: found a run with {found}: --resume needs the same")
    assert contents(copy) == before


def test_resume_refuses_other_images_and_another_network_to_start_from(copy, toy_set, tmp_path,
                                                                       capsys):
    root = shutil.copytree(toy_set, tmp_path / "set")
    path = root / voc.LISTS / "val.txt"
    path.write_text(path.read_text().split()[0])
    assert run_voc.main(options(root, copy, "--stage", "unary", "--resume")) == 2
    assert_one_line(capsys, "unary.npz: found a run with image lists (their checksum)")
    assert run_voc.main(options(toy_set, copy, "--stage", "unary", "--seed", "1")) == 0
    capsys.readouterr()
    before = contents(copy)
    assert run_voc.main(options(toy_set, copy, "--stage", "joint", "--resume")) == 2
    assert_one_line(capsys, "joint.npz: found a run with checkpoint to start from (its checksum)")
    assert contents(copy) == before


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
    assert re.findall("--stage ([a-z]+)", left) == ["joint"]


def test_what_a_run_starts_from_is_not_overwritten(copy, trained, toy_set, capsys):
    before = contents(copy)
    for stage in ("unary", "joint"):
        start = str(copy / f"{stage}.npz")
        assert run_voc.main(options(toy_set, copy, "--stage", stage, "--weights", start)) == 2
        assert_one_line(capsys, f"{stage}.npz, which this run would overwrite")
    joint = str(trained / "joint.npz")
    assert run_voc.main(options(toy_set, copy, "--stage", "eval", "--weights", joint)) == 2
    assert_one_line(capsys, "joint.npz: found a checkpoint of stage joint, whose results would")
    assert contents(copy) == before


def test_weights_are_where_the_first_stage_starts(trained, toy_set, tmp_path):
    start = trained / "unary.npz"
    assert run_voc.main(options(toy_set, tmp_path, "--weights", str(start))) == 0
    for stage, path in (("unary", start), ("joint", tmp_path / "unary.npz")):
        settings = checkpoints.read(tmp_path / f"{stage}.npz")[1]["settings"]
        found = settings["checkpoint to start from (its checksum)"]
        assert found == zlib.crc32(path.read_bytes()), stage


def remove_labels(root):
    shutil.rmtree(root / "SegmentationClass")


def shrink_one_label(root):
    voc.save_labels(root / "SegmentationClass" / "train_0001.png", np.zeros((5, 5), np.uint8))


def cut_one_image(root):
    path = root / "JPEGImages" / "train_0001.jpg"
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("change, named", [
    (remove_labels, "SegmentationClass"), (shrink_one_label, "train_0001.png: "),
    (cut_one_image, "train_0001.jpg: ")])
def test_broken_data_ends_in_one_line_and_exit_code_2(toy_set, tmp_path, capsys, change, named):
    root = shutil.copytree(toy_set, tmp_path / "set")
    change(root)
    assert run_voc.main(options(root, tmp_path / "out", "--batch-size", "4")) == 2
    assert_one_line(capsys, named)
    assert run_voc.main(["--voc", str(root), "--check"]) == 2
    assert named in capsys.readouterr().out


def test_a_sound_data_set_is_checked_before_anything_is_written(toy_set, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_voc.main(["--voc", str(toy_set), "--check", "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"{toy_set}: no problem found\n")
    assert run_voc.main(["--check", "--out", str(out)]) == 2
    assert_one_line(capsys, "--check: found it without --voc")
    assert not out.exists()


@pytest.mark.parametrize("given, named", [
    (["--voc", "/no/such/folder"], "/no/such/folder"),
    (["--stage", "joint"], "unary.npz: found no such file"),
    (["--stage", "joint", "--weights", "{set}/classes.npz"], "classes.npz"),
    (["--stage", "unary", "--weights", "{out}/joint.npz", "--net", "largefov"],
     "joint.npz: conv1_1_w"),
    (["--stage", "unary", "--weights", "{set}/toy.txt"], "toy.txt: found neither"),
    (["--stage", "eval"], "found no checkpoint; run another --stage first"),
    (["--stage", "eval", "--weights", "{set}/toy.txt"], "toy.txt"),
    (["--image", "{set}/JPEGImages"], "--image, --stage predict: found only one"),
    (["--also", "{out}/nowhere"], "--also: found no results.json in"),
    (["--out", "{set}/toy.txt"], "File exists")])
def test_bad_options_end_in_one_line_and_exit_code_2(trained, toy_set, tmp_path, capsys, given,
                                                     named):
    given = [option.format(set=toy_set, out=trained) for option in given]
    assert run_voc.main(options(toy_set, tmp_path, *given)) == 2
    assert_one_line(capsys, named)
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize("option, wrong", [
    ("--iterations", ["0"]), ("--batch-size", ["1.5"]), ("--evaluate-images", ["0"]),
    ("--rate", ["-1", "1e999"]), ("--drop", ["1.1"]), ("--seed", ["-1"]), ("--w", ["-1 4", "1"]),
    ("--sigma-position", ["0"]), ("--sigma-bilateral", ["80 0"]), ("--weights", [""]),
    ("--stage", ["train"]), ("--nonsense", ["1"])])
def test_bad_values_of_options_end_in_one_line_and_exit_code_2(capsys, option, wrong):
    for text in wrong:
        with pytest.raises(SystemExit) as stopped:
            run_voc.main([option, *text.split(" ")])
        assert stopped.value.code == 2
        assert_one_line(capsys, option)


def test_options_that_make_sense_are_taken():
    args = run_voc.parse_arguments("--rate 0 --drop 1 --w 0 0 --seed 0 --iterations 3".split())
    assert args.rate == dict.fromkeys(training.STAGES, 0) and args.drop == 1
    assert args.iterations["joint"] == 3 and args.w == [0, 0] and args.net == "tiny"
    args = run_voc.parse_arguments(["--voc", "x"])
    assert args.net == "vgg16" and args.batch_size == 20 and args.iterations["unary"] == 6000


def test_predict_refuses_what_it_does_not_use(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_voc.main(["--stage", "predict", "--image", "x.jpg", "--w", "1", "2"])
    assert stopped.value.code == 2
    assert_one_line(capsys, "--w: found it with --stage predict")


def test_predict_labels_photographs_with_the_last_stage(trained, toy_set, tmp_path, capsys):
    photograph = str(toy_set / "JPEGImages" / "val_0000.jpg")
    for name in ("unary.npz", "joint.npz"):
        shutil.copy(trained / name, tmp_path)
    assert run_voc.main(["--stage", "predict", "--image", photograph, "--out", str(tmp_path)]) == 0
    model, _, _ = checkpoints.load_model(tmp_path / "joint.npz")
    expected = model.predict(np.array(Image.open(photograph)))[1]
    found = Image.open(tmp_path / "predictions" / "val_0000.jpg.labels.png")
    assert np.array_equal(found, expected) and "background" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["a broken picture", "a huge rate", "a log of another kind"])
def test_a_failed_rerun_loses_nothing_of_the_earlier_one(copy, toy_set, tmp_path, capsys, fault):
    """Nothing goes before there is something in its place: not a row of the log either."""
    root = shutil.copytree(toy_set, tmp_path / "set")
    if fault == "a broken picture":
        cut_one_image(root)
    if fault == "a log of another kind":
        (copy / "log.csv").write_text((copy / "log.csv").read_text() + "unary,one\n")
    before = contents(copy)
    rate = ["--rate", "1e9"] if fault == "a huge rate" else []
    for stage in ("unary", "joint"):
        assert run_voc.main(options(root, copy, "--stage", stage, "--batch-size", "4", *rate)) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert contents(copy) == before


def test_the_joint_curve_starts_with_nothing_learned(trained):
    first = {}
    for row in logs.read_log(trained / "log.csv"):
        first.setdefault(row["stage"], row)
    assert first["joint"]["iteration"] == first["piecewise"]["iteration"] == "0"
    assert first["joint"]["miou"] and first["joint"]["loss"] == ""
    assert (first["joint"]["w_0"], first["joint"]["w_1"]) == ("1.0", "4.0")
    assert first["unary"]["iteration"] == "1"


def test_curves_are_drawn_at_every_evaluation(toy_set, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "curves", lambda path, log: drawn.append(len(log)))
    assert run_voc.main(options(toy_set, tmp_path, "--stage", "unary", "--iterations", "3",
                                "--evaluate-every", "1", "--evaluate-images", "1")) == 0
    assert drawn == [1, 2, 3]
    assert {row["images"] for row in logs.read_log(tmp_path / "log.csv")} == {"1/2"}


@pytest.mark.parametrize("size", [(12, 15), (1, 1)])
def test_pictures_with_one_class_or_pixel_in_them_run_to_the_end(tmp_path, capsys, size):
    root, out, rng = tmp_path / "set", tmp_path / "out", np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", voc.LISTS):
        (root / folder).mkdir(parents=True)
    for name in ("p0", "p1", "p2"):
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(image).save(root / "JPEGImages" / f"{name}.png")
        voc.save_labels(root / "SegmentationClass" / f"{name}.png", np.full(size, 2, np.uint8))
    (root / voc.LISTS / "train.txt").write_text("p0\np1\n")
    (root / voc.LISTS / "val.txt").write_text("p2\n")
    assert run_voc.main(options(root, out)) == 0
    assert capsys.readouterr().err == ""
    results = json.loads((out / "results.json").read_text())
    assert results["joint"]["miou"] == 100 and results["joint"]["miou_band"] is None


def test_out_of_memory_names_smaller_settings_to_try(toy_set, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training.Model, "resized", lambda *_: np.empty(2 ** 60, np.uint8))
    assert run_voc.main(options(toy_set, tmp_path)) == 2
    assert_one_line(capsys, "found too little memory; try --device cpu")


@pytest.mark.parametrize("stage, more", [
    ("local", []), ("piecewise", ["--compatibility", "matrix"])])
def test_other_crfs_train_resume_and_predict(trained, toy_set, tmp_path, capsys, stage, more):
    shutil.copy(trained / "unary.npz", tmp_path)
    common = options(toy_set, tmp_path, "--stage", stage, *more)
    assert run_voc.main([*common, "--iterations", "1"]) == 0
    assert run_voc.main([*common, "--resume"]) == 0
    assert f"{stage}: resumes after iteration 1 of 2" in capsys.readouterr().out
    crf = checkpoints.load_model(tmp_path / f"{stage}.npz")[0].crf
    w = crf.params["w"]
    if stage == "local":
        assert isinstance(crf, LocalCRF) and (w != 1).all()
    else:                                # off the diagonal, too; symmetric, positive semi-definite
        assert w.shape == (2, 6, 6) and (w[:, 0, 1] != 0).all()
        assert np.allclose(w, w.swapaxes(1, 2)) and np.linalg.eigvalsh(w).min() > -1e-9
        assert (tmp_path / "piecewise_compatibility.png").exists()
    photograph = toy_set / "JPEGImages" / "val_0000.jpg"
    assert run_voc.main(["--stage", "predict", "--weights", str(tmp_path / f"{stage}.npz"),
                         "--image", str(photograph), "--out", str(tmp_path)]) == 0


def test_search_is_a_column_and_is_not_done_twice(trained, tmp_path, toy_set, capsys, monkeypatch):
    start = str(trained / "unary.npz")
    search = options(toy_set, tmp_path, "--stage", "search", "--weights", start)
    assert run_voc.main(search) == 0
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["searched"]
    assert "searched against searched without CRF" in (tmp_path / "table.txt").read_text()
    assert reports.counts(tmp_path, "searched")["crf"].shape == (2, 6, 6)

    monkeypatch.setattr(evaluation, "cross_fitted", lambda *_: pytest.fail("searched again"))
    assert run_voc.main([*search, "--resume"]) == 0
    assert "done before" in capsys.readouterr().out
    with pytest.raises(pytest.fail.Exception):           # other settings: not the same figures
        run_voc.main([*search, "--resume", "--w", "2", "4"])


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
    for name in ("train_0000", "val_0000"):
        (root / "Scribbles" / f"{name}.png").unlink()
    assert run_voc.main(["--voc", str(root), "--labels", "Scribbles", "--check"]) == 2
    out = capsys.readouterr().out
    assert "train_0000" in out and "val_0000" not in out
    data = loading.DataSet(root, None, "Scribbles")
    assert (data.load("train_0001")[1] == 255).mean() > 0.9
    assert (data.load("val_0001")[1] == 255).mean() < 0.5

    clicks = options(toy_set, tmp_path / "out", "--stage", "unary", "--labels", "Clicks")
    assert run_voc.main(clicks) == 0
    assert run_voc.main([*clicks, "--labels", "Scribbles", "--resume"]) == 2
    assert_one_line(capsys, "found a run with labels Clicks, expected Scribbles")
