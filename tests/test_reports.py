"""Table 1, results.json and panels, from the counts that runs leave: what is compared with what."""
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import run_voc
from minicrf import DenseCRF, metrics
from minicrf.data import loading, toy
from minicrf.results import checkpoints, evaluation, figures, reports


@pytest.fixture(scope="module")
def trained(toy_set, tmp_path_factory):
    """An output folder after unary, joint and an evaluation with the training list."""
    out = tmp_path_factory.mktemp("out")
    options = ["--voc", str(toy_set), "--out", str(out)]
    assert run_voc.main([*options, "--net", "tiny", "--batch-size", "2", "--iterations", "8",
                         "--evaluate-every", "8"]) == 0
    assert run_voc.main([*options, "--stage", "eval", "--train-list", "--w", "3", "10"]) == 0
    return out


def test_results_hold_each_stage_with_and_without_crf_on_both_lists(trained, toy_set):
    results = json.loads((trained / "results.json").read_text())
    assert list(results) == ["unary", "joint"]
    for stage, entry in results.items():
        key = "fixed_crf" if stage == "unary" else "before_crf"
        for part in (entry, entry[key], entry["train"], entry["train"][key]):
            assert {"miou", "iou", "miou_band"} <= set(part)
            present = [value for value in part["iou"].values() if value is not None]
            assert part["miou"] == pytest.approx(np.mean(present), abs=1e-3)
    # the CRF that has learned nothing is that of --w: here the same as an own forward pass
    data = loading.DataSet(toy_set)
    for stage, part in (("unary", results["unary"]["fixed_crf"]), ("joint", results["joint"])):
        model, _, _ = checkpoints.load_model(trained / f"{stage}.npz")
        model.crf = model.crf or DenseCRF(6, w=(3, 10))
        counts = evaluation.evaluate(model, [data.load(i) for i in data.val], 6)
        assert part["miou"] == pytest.approx(metrics.mean_iou(counts["crf"].sum(axis=0)), abs=1e-3)
        band = metrics.mean_iou(counts["crf_band"].sum(axis=0))
        assert part["miou_band"] == pytest.approx(band, abs=1e-3)


def test_the_table_shows_every_column_once_and_how_sure_differences_are(trained):
    table = (trained / "table.txt").read_text()
    assert table.count("Training list, 4 images") == 1 and "within 5 px" in table
    assert "joint against unary + untrained CRF" in table
    assert "joint against joint without CRF" in table
    assert "unary.npz" not in table and table.count("mean IoU  ") == 2


def folder(out, stage, methods, **changed):
    """Counts of a stage in a folder, all of the same truth."""
    out.mkdir(exist_ok=True)
    arrays = {"ids": ["a", "b"], "classes": ["x", "y", "z"]}
    for seed, method in enumerate(methods):
        each = np.full((2, 3, 3), 10)
        each[:, :, 0] += seed + 1
        each[:, :, 1] -= seed + 1                                        # the truth stays
        arrays |= {method: each, f"{method}_band": each}
    np.savez(out / f"{stage}_val.npz", **(arrays | changed))
    return str(out)


class Data:
    """Of a data set, what a table needs."""
    classes, val, train = ["x", "y", "z"], ["a", "b"], ["c"]


def test_folders_are_compared_and_those_of_the_same_name_told_apart(tmp_path):
    out = folder(tmp_path / "out", "joint", ["unary", "crf"])
    also = [folder(tmp_path / name, "joint", ["unary", "crf"]) for name in ("control",)]
    for name in "ab":
        (tmp_path / name).mkdir()
        also.append(folder(tmp_path / name / "runs", "joint", ["unary", "crf"]))
    text = reports.table(out, also, Data, "joint")
    assert "joint against joint (control)" in text
    assert all(f"joint against joint ({tmp_path / name / 'runs'})" in text for name in "ab")


def test_after_unary_training_the_crf_is_held_against_the_network(tmp_path):
    out = folder(tmp_path / "out", "unary", ["unary", "crf"])
    control = folder(tmp_path / "control", "unary", ["unary", "crf"])
    text = reports.table(out, [control], Data, "unary")
    for other in "unary ", "unary (control)", "unary + untrained CRF (control)":
        assert f"\nunary + untrained CRF against {other}" in text


@pytest.mark.parametrize("changed", [
    {"ids": ["a", "c"]}, {"classes": ["x", "y", "w"]}, {"unary": np.full((2, 3, 3), 11)},
    {"ids": ["a"], "unary": np.full((1, 3, 3), 10), "unary_band": np.full((1, 3, 3), 10)}])
def test_what_was_measured_on_other_pictures_is_left_out_and_said_so(tmp_path, changed):
    out = folder(tmp_path / "out", "joint", ["unary", "crf"])
    folder(tmp_path / "out", "unary", ["unary"], **changed)
    text = reports.table(out, [], Data, "joint")
    assert "not in this table: unary, measured on another data set" in text
    assert "against unary " not in text


def test_a_stage_measured_on_another_data_set_stays_in_results(trained, toy_set, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    other = toy.draw(tmp_path / "other", 4, 2, width=(30, 40), height=(24, 32), seed=9)
    assert run_voc.main(["--voc", str(other), "--out", str(tmp_path / "out"), "--stage", "unary",
                         "--net", "tiny", "--batch-size", "2", "--iterations", "1"]) == 0
    table = (tmp_path / "out" / "table.txt").read_text()
    assert "not in this table: joint, measured on another data set" in table
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())) == {"unary", "joint"}


def test_a_column_that_would_repeat_another_is_left_out(tmp_path):
    """As piecewise without CRF repeats unary; earlier versions left no untrained CRF beside it."""
    out = folder(tmp_path / "out", "unary", ["unary"])
    folder(tmp_path / "out", "piecewise", ["unary", "crf"])
    text = reports.table(out, [], Data, "piecewise")
    assert "piecewise against unary " in text and "without" not in text
    control = dict.fromkeys(("unary", "unary_band"), np.full((2, 3, 3), 10))
    folder(tmp_path / "control", "unary", [], **control)
    folder(tmp_path / "control", "searched", ["crf"], **control)
    assert "without" not in reports.table(out, [str(tmp_path / "control")], Data, "piecewise")
    reports.write(out, "piecewise", reports.counts(out, "piecewise"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "fixed_crf" not in results["unary"] and "before_crf" in results["piecewise"]


def test_panels_show_what_was_measured(trained, toy_set, tmp_path, capsys):
    """Of one checkpoint from elsewhere: image, truth, without CRF, with it."""
    assert run_voc.main(["--voc", str(toy_set), "--out", str(tmp_path), "--stage", "eval", "--also",
                         str(trained), "--weights", str(trained / "joint.npz")]) == 0
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["joint"]
    for out in (tmp_path, trained):
        assert Image.open(out / "panels" / "best.png").width == 10 + 4 * 270
    assert f"joint against joint ({trained.name})" in (tmp_path / "table.txt").read_text()
    assert "curves.png" not in capsys.readouterr().out       # nothing was trained here


def test_an_image_without_a_labelled_pixel_is_neither_best_nor_worst(trained, toy_set, tmp_path,
                                                                     monkeypatch):
    out, shown, data = tmp_path / "out", [], loading.DataSet(toy_set)
    shutil.copytree(trained, out)
    arrays = dict(reports.counts(out, "unary"))
    arrays["crf"][0] = arrays["unary"][0] = 0
    reports.write(out, "unary", arrays)
    monkeypatch.setattr(figures, "panel", lambda path, rows, *_: shown.extend(rows))
    reports.panels(out, "unary", checkpoints.present(out), data, "cpu")
    assert {row["name"] for row in shown} == {*data.val[1:]}
