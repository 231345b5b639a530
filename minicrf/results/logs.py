"""The course of a run: log.csv, from which curves are drawn."""
import csv
import os
import re

from ..saving import replacing
from ..training import STAGES

COLUMNS = ("stage", "iteration", "loss", "rate", "miou", "miou_unary", "images")


class Log:
    """The rows of log.csv, one for each iteration; written whole, with each checkpoint.

    path: the file.  Rows of `stage` after iteration `start` are dropped, as they will be computed
    again; but the file stays as it is until `write`.
    """

    def __init__(self, path, stage, start):
        self.path, self.stage, rows = path, stage, read_log(path)
        self.rows = [row for row in rows if row["stage"] != stage]
        self.rows += [row for row in rows
                      if row["stage"] == stage and start and int(row["iteration"]) <= start]

    def add(self, iteration, crf=None, **values):
        """An iteration's row.  values: of COLUMNS; crf: one whose parameters are noted as well."""
        row = dict.fromkeys(COLUMNS, "") | {"stage": self.stage, "iteration": iteration} | values
        for key, p in (crf.params if crf else {}).items():
            p = p if p.ndim == 1 else p.diagonal(0, 1, 2).mean(axis=1)       # of matrices (M, L, L)
            row |= {f"{key}_{i}": float(value) for i, value in enumerate(p)}
        self.rows.append(row)

    def waiting(self, iteration):
        """Whether the last row is of that iteration of the stage and has no mean IoU yet."""
        last = self.rows[-1] if self.rows else dict.fromkeys(COLUMNS)
        return (last["stage"], str(last["iteration"]), last["miou"]) == (self.stage, str(iteration),
                                                                         "")

    def write(self):
        """Put the rows into the file.  Raises OSError, naming it."""
        columns = dict.fromkeys(key for row in self.rows for key in row)
        with replacing(self.path, newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)


def read_log(path):
    """The rows of a log.csv as dicts of strings; empty where there is none yet.

    Raises ValueError, with the line's number, where one is not as `Log` writes them.
    """
    rows = []
    if not os.path.exists(path):
        return rows
    with open(path, newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file, strict=True)
        try:
            if not {*COLUMNS} <= {*(lines.fieldnames or ())}:
                raise ValueError("not its columns")
            for row in lines:
                for key in row.keys() - {"stage", "images"}:
                    float(row[key] or ("x" if row[key] is None else 0))   # None: a short row
                if (row["stage"] not in STAGES or int(row["iteration"]) < 0
                        or abs(float(row["miou"] or 0)) > 100
                        or not re.fullmatch(r"(\d+/\d+)?", row["images"])):
                    raise ValueError(", ".join(list(row.values())[:5]))
                rows.append(row)
        except (ValueError, TypeError, csv.Error) as error:
            raise ValueError(f"{path}: line {lines.line_num}: found what is none of a log "
                             f"({error}), expected log.csv of an earlier run; move it away to "
                             "start a new one") from None
    return rows
