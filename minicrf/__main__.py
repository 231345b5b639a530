"""python -m minicrf: the dense CRF on any segmentation of a photograph; see programs/refine.py."""
import sys

from .programs.refine import main

if __name__ == "__main__":
    sys.exit(main())
