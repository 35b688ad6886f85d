from __future__ import annotations

import pytest

from qcompile.arena.picture import draw, peak_text, timeline
from qcompile.arena.plan import plan_work
from qcompile.arena.work import Overlap, Step, Work


def work() -> Work:
    steps = (Step("stem", (), (0,)), Step("depth", (0,), (1,), 16, (Overlap(0, 1, 4),)), Step("head", (1,), (2,)))
    return Work(("image", "deep", "scores"), (100, 100, 10), steps, kept=frozenset({2}))


def test_timeline_and_text() -> None:
    plan = plan_work(work(), exact=True)
    assert timeline(plan)[0] == {"step": "stem", "bytes": 100, "values": [{"name": "image", "start": 4, "stop": 104}]}
    assert [row["bytes"] for row in timeline(plan)] == [100, 120, 110]
    assert peak_text(plan).splitlines() == [
        "arena 120 bytes, the smallest for this order",
        "peak  120 bytes at depth",
        "             0 ..      100  deep, 100 bytes",
        "             4 ..      104  image, 100 bytes",
        "           104 ..      120  scratch of depth, 16 bytes",
        "steps that need most",
        "           120  depth",
        "           110  head",
        "           100  stem",
    ]
    assert peak_text(plan_work(Work((), (), ()))) == "arena 0 bytes"


def test_picture(tmp_path) -> None:
    figures = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    for case in (work(), Work((), (), ())):
        figure, plan = figures.Figure(), plan_work(case)
        draw(plan, figure)
        (axes,) = figure.axes
        rectangles = [patch for patch in axes.patches if patch.get_facecolor()[3] == pytest.approx(0.6)]
        corners = sorted((patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()) for patch in rectangles)
        assert corners == sorted((s.first, s.start, s.last - s.first + 1, s.stop - s.start) for s in plan.spans)
        figure.savefig(tmp_path / "arena.svg")
        assert (tmp_path / "arena.svg").stat().st_size > 1000
