"""What a training run tells of itself: log.csv, from which curves are drawn, and the terminal."""
import csv
import sys
import time

from tqdm import tqdm

from ..files import replacing


class Log:
    """log.csv: a row for each iteration, appended; a resumed run goes on behind its checkpoint."""

    COLUMNS = ("stage", "iteration", "loss", "rate", "miou", "miou_unary", "images")

    def __init__(self, path, model, stage, start):
        """Drops the rows of `stage` after iteration `start`: they will be computed again."""
        self.path, self.stage = path, stage
        self.params = model.crf.params if model.crf is not None else {}
        rows = [row for row in read_log(path)
                if row["stage"] != stage or int(row["iteration"]) <= start]
        columns = [*self.COLUMNS, *(rows[0] if rows else ()), *self._values()]
        self.columns = list(dict.fromkeys(columns))
        with replacing(path, newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)

    def append(self, iteration, loss, rate, **values):
        """Add an iteration's row.  rate: the factor on all learning rates; values: more columns."""
        row = dict(stage=self.stage, iteration=iteration, loss=repr(loss), rate=rate)
        try:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row | values | self._values())
        except OSError as error:
            raise OSError(f"{self.path}: could not be written ({error.strerror}); checkpoints "
                          "written before are kept") from None

    def _values(self):
        return {f"{key}_{i}": repr(float(value)) for key, p in self.params.items()
                for i, value in enumerate(p)}


def read_log(path):
    """The rows of a log.csv as dicts of strings; empty where there is none yet.

    Leaves out a row that a full disk cut short.  Raises ValueError for another kind of file.
    """
    try:
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if None not in [*row, *row.values()]]
        for row in rows:
            row["stage"], int(row["iteration"]), float(row["loss"]), row["images"]
            if abs(float(row["miou"] or 0)) > 100 or int(row["iteration"]) < 0:
                raise ValueError(f"found mean IoU {row['miou']} in iteration {row['iteration']}")
        return rows
    except FileNotFoundError:
        return []
    except (KeyError, ValueError, csv.Error) as error:
        raise ValueError(f"{path}: not a readable log ({error}), expected log.csv of an earlier "
                         "run; move it away to start a new one") from None


class Progress:
    """How far training is: a bar on a terminal, otherwise a plain line now and then."""

    def __init__(self, stage, start, iterations, batch_size):
        self.stage, self.start = stage, start
        self.iterations, self.batch_size = iterations, batch_size
        self.bar = tqdm(total=iterations, initial=start, desc=stage, unit="it", dynamic_ncols=True,
                        disable=not sys.stderr.isatty())
        self.began = self.shown = time.monotonic()

    def update(self, iteration, loss, note=""):
        """Show an iteration's loss; note: what an evaluation found, printed at once."""
        now = time.monotonic()
        each = (now - self.began) / (iteration - self.start)             # seconds an iteration
        speed = f"{self.batch_size / each:.2f}"
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed} images/s")
        self.bar.update()
        if note or self.bar.disable and now - self.shown > 30:
            self.shown = now
            left = tqdm.format_interval(each * (self.iterations - iteration))
            with tqdm.external_write_mode():                             # above the bar
                print(f"{self.stage} {iteration}/{self.iterations}: loss {loss:.3f}, {speed} "
                      f"images/s, {left} left{note and ', '}{note}", flush=True)
