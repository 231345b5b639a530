"""Weak labels: what is marked, and the command that makes them of a folder."""
import numpy as np
import pytest
import scipy.ndimage

from minicrf.data import scribbles, toy
from minicrf.inputs import VOID
from minicrf.programs import scribbles as program


def pictures():
    for seed in range(6):
        yield toy.picture(np.random.default_rng(seed), 90, 118)[1]


@pytest.mark.parametrize("clicks", [False, True])
def test_each_region_gets_one_mark_of_its_label_and_all_else_is_void(clicks):
    for labels in pictures():
        weak = scribbles.weaken(labels, clicks)
        assert (weak[weak != VOID] == labels[weak != VOID]).all()
        for label in np.setdiff1d(labels, VOID):
            regions, n = scipy.ndimage.label(labels == label)
            for region in range(1, n + 1):
                marked = (weak == label) & (regions == region)
                assert scipy.ndimage.label(marked, np.ones((3, 3)))[1] == 1


def test_few_pixels_are_marked_and_clicks_are_fewer():
    lines, dots = (np.mean([scribbles.weaken(y, clicks) != VOID for y in pictures()])
                   for clicks in (False, True))
    assert 0.005 < lines < 0.03 and dots < lines


def test_a_scribble_runs_along_a_bar_and_thin_regions_are_marked_too():
    bar = np.full((20, 60), VOID, np.uint8)
    bar[5:12, 4:50] = 3
    y, x = np.nonzero(scribbles.weaken(bar) == 3)
    assert 20 <= x.max() - x.min() <= 24 and y.min() > 5 and y.max() < 11
    dot = np.full((4, 4), VOID, np.uint8)
    dot[1, 2] = 0
    assert (scribbles.weaken(dot) == dot).all() and (scribbles.weaken(dot, True) == dot).all()


def test_the_command_makes_what_a_drawn_set_has(toy_set, tmp_path, capsys):
    full = str(toy_set / "SegmentationClass")
    for name, options in (("Scribbles", []), ("Clicks", ["--clicks"])):
        assert program.main([full, str(tmp_path / name), *options]) == 0
        made = sorted((tmp_path / name).iterdir())
        assert len(made) == 6
        for path in made:
            assert path.read_bytes() == (toy_set / name / path.name).read_bytes()
    assert program.main([str(toy_set / "Clicks"), str(toy_set / "Clicks")]) == 2
    assert "would replace" in capsys.readouterr().err
