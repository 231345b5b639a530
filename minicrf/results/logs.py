"""log.csv, the record of a run, from which curves are drawn."""
import csv
import os

from ..saving import replacing

COLUMNS = ("stage", "iteration", "loss", "rate", "miou", "miou_unary", "images")


class Log:
    """The rows of log.csv, one for each iteration; written whole, with each checkpoint.

    path: the file.  Rows of `stage` after iteration `start` are dropped, as they will be computed
    again, but the file stays as it is until `write`.
    """

    def __init__(self, path, stage, start):
        self.path, self.stage, rows = path, stage, read_log(path)
        self.rows = [row for row in rows if row["stage"] != stage]
        self.rows += [row for row in rows
                      if row["stage"] == stage and start and int(row["iteration"]) <= start]

    def add(self, iteration, crf=None, **values):
        """Add an iteration's row: values of some COLUMNS, and the parameters of a CRF."""
        row = dict.fromkeys(COLUMNS, "") | {"stage": self.stage, "iteration": iteration} | values
        for key, p in (crf.params if crf else {}).items():
            p = p if p.ndim == 1 else p.diagonal(0, 1, 2).mean(axis=1)       # of matrices (M, L, L)
            row |= {f"{key}_{i}": float(value) for i, value in enumerate(p)}
        self.rows.append(row)

    def waiting(self, iteration):
        """Whether the last row is this iteration of the stage and has no mean IoU yet."""
        last = [str(row[key]) for row in self.rows[-1:] for key in ("stage", "iteration", "miou")]
        return last == [self.stage, str(iteration), ""]

    def write(self):
        """Write all rows into the file.  Raises OSError, naming it."""
        columns = dict.fromkeys(key for row in self.rows for key in row)
        with replacing(self.path) as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def read_log(path):
    """The rows of a log.csv as dicts of strings; empty where there is none yet.

    Raises ValueError, with the line's number, where one is not as `Log` writes them.
    """
    rows = []
    if not os.path.exists(path):
        return rows
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = csv.DictReader(file)
        try:
            for row in lines:
                int(row["iteration"])
                if None in row.values() or not {*COLUMNS} <= row.keys():
                    raise ValueError("columns are missing")
                rows.append(row)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: line {lines.line_num} is not one of a log ({error}); move "
                             "the file away to start a new one") from None
    return rows
