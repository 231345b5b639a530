"""log.csv: written whole, dropped rows only where they are computed again, all others refused."""
import numpy as np
import pytest

from minicrf import DenseCRF
from minicrf.results import logs


def written(path, iterations=3):
    log = logs.Log(path, "joint", 0)
    for iteration in range(1, iterations + 1):
        log.add(iteration, DenseCRF(2), loss=0.1 * iteration, rate=1.0)
    log.rows[-1].update(miou=50.0, miou_unary=40.0, images="2/2")
    log.write()
    return log


def test_rows_come_back(tmp_path):
    written(tmp_path / "log.csv")
    rows = logs.read_log(tmp_path / "log.csv")
    assert [row["iteration"] for row in rows] == ["1", "2", "3"]
    assert float(rows[2]["loss"]) == 0.1 * 3 and rows[2]["miou"] == "50.0" and rows[1]["miou"] == ""
    assert float(rows[0]["w_1"]) == 10 and float(rows[0]["log_sigma_position_0"]) == np.log(3)


def test_going_on_drops_the_later_rows_of_the_stage_and_writes_nothing_yet(tmp_path):
    path = tmp_path / "log.csv"
    written(path)
    before = path.read_bytes()
    assert len(logs.Log(path, "joint", 2).rows) == 2
    assert len(logs.Log(path, "joint", 0).rows) == 0
    log = logs.Log(path, "unary", 0)
    assert len(log.rows) == 3 and path.read_bytes() == before
    log.add(1, loss=1.0, rate=1.0)
    log.write()
    assert [row["stage"] for row in logs.read_log(path)] == ["joint"] * 3 + ["unary"]


def test_an_iteration_that_waits_for_its_evaluation_is_known(tmp_path):
    written(tmp_path / "log.csv")
    assert not logs.Log(tmp_path / "log.csv", "joint", 3).waiting(3)
    log = logs.Log(tmp_path / "log.csv", "joint", 2)
    assert log.waiting(2) and not log.waiting(1)
    assert not logs.Log(tmp_path / "none.csv", "joint", 2).waiting(2)
    log.write()
    assert logs.Log(tmp_path / "log.csv", "joint", 2).waiting(2)
    assert not logs.Log(tmp_path / "log.csv", "unary", 2).waiting(2)


@pytest.mark.parametrize("line, change", [
    (2, lambda text: "a,b\n1,2\n"), (2, lambda text: text.replace("joint,1", "joint,one")),
    (2, lambda text: text.replace("miou,", "iou,")), (4, lambda text: text[:-30]),
    (0, lambda text: "\xff\n")])
def test_a_line_that_is_none_of_a_log_is_named_and_nothing_lost(tmp_path, line, change):
    path = tmp_path / "log.csv"
    written(path)
    content = change(path.read_text())
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=f"log.csv: line {line} is not one of a log"):
        logs.Log(path, "joint", 2)
    assert path.read_text(encoding="latin-1") == content
