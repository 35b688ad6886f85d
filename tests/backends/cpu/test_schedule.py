"""Schedules of functions that no kernel covers: which of them start other threads."""

from __future__ import annotations

import pytest
from qcompile.backends.cpu.schedule import schedule
from tvm import te, tirx


@pytest.mark.parametrize(
    ("shape", "parallel"),
    [
        ((16, 16, 32), False), ((64, 64, 16), True),  # a batch of images, small and large
        ((384,), True), (("tokens", 384), True),  # rows of unknown number
    ],
)  # fmt: skip
def test_small_images_stay_on_one_thread(shape: tuple[int | str, ...], parallel: bool) -> None:
    sizes = [tirx.Var("batch", "int64"), *(tirx.Var(n, "int64") if isinstance(n, str) else n for n in shape)]
    x = te.placeholder(sizes, name="x")
    doubled = te.compute(sizes, lambda *place: x(*place) * tirx.const(2, "float32"))
    assert ("T.parallel" in str(schedule(te.create_prim_func([x, doubled])))) == parallel
