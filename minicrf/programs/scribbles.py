"""Scribbles or clicks of full labels, such as VOC's: what --labels of run_voc.py takes.

    python -m minicrf.programs.scribbles VOC2012/SegmentationClass VOC2012/Scribbles
    python -m minicrf.programs.scribbles VOC2012/SegmentationClass VOC2012/Clicks --clicks
"""
import pathlib
import sys

from tqdm import tqdm

from ..data import scribbles, voc
from .program import Parser, path, run_program


def make(args):
    source, target = pathlib.Path(args.source), pathlib.Path(args.target)
    pictures = sorted(source.glob("*.png"))
    if not pictures:
        raise ValueError(f"{source}: no label pictures (.png) in it")
    target.mkdir(parents=True, exist_ok=True)
    if source.samefile(target):
        raise ValueError(f"{target}: would replace the full labels; name another folder")
    for each in tqdm(pictures, "scribbles", unit="image", disable=None):
        labels = voc.read_labels(each)
        voc.save_labels(target / each.name, scribbles.weaken(labels, args.clicks))
    return 0


def main(arguments=None):
    parser = Parser(prog="python -m minicrf.programs.scribbles",
                    description="Weak labels made of full ones, for run_voc.py --labels.")
    parser.add_argument("source", type=path, help="a folder of label PNGs")
    parser.add_argument("target", type=path, help="the folder to write those of the same names to")
    parser.add_argument("--clicks", action="store_true", help="one dot in each region, not a line")
    return run_program("scribbles", make, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
