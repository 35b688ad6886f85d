"""A plan as text, as data and as a picture: which value has which bytes, when."""

from __future__ import annotations

from typing import Any

from qcompile.arena.plan import Plan

SHOWN = 0.04  # the share of the arena, and of the steps, from which on a rectangle has room for its name


def timeline(plan: Plan) -> list[dict[str, Any]]:
    """Return for each step its name, the bytes that belong to something, and each value that lives with its first and last byte."""
    return [
        {
            "step": step.name,
            "bytes": plan.used[number],
            "values": [{"name": s.name, "start": s.start, "stop": s.stop} for s in plan.living(number)],
        }
        for number, step in enumerate(plan.work.steps)
    ]


def peak_text(plan: Plan) -> str:
    """Return what the arena takes and why, in lines of text: the step at the peak, what lives there, the steps that need most."""
    if not plan.work.steps:
        return "arena 0 bytes"
    proof = "the smallest for this order" if plan.proven else f"at least {plan.needed} are needed"
    lines = [f"arena {plan.bytes} bytes, {proof}", f"peak  {plan.used[plan.peak]} bytes at {plan.work.steps[plan.peak].name}"]
    lines += [f"      {s.start:>8} .. {s.stop:>8}  {s.name}, {s.stop - s.start} bytes" for s in plan.living(plan.peak)]
    most = sorted(range(len(plan.used)), key=lambda number: (-plan.used[number], number))[:5]
    lines += ["steps that need most"] + [f"      {plan.used[n]:>8}  {plan.work.steps[n].name}" for n in most]
    return "\n".join(lines)


def draw(plan: Plan, figure: Any) -> None:
    """Draw a plan into a matplotlib figure: steps to the right, bytes upwards, a rectangle for each value; the peak is marked."""
    from matplotlib.patches import Rectangle

    axes = figure.add_subplot()
    steps, top = max(len(plan.work.steps), 1), max(plan.bytes, 1)
    colors = [f"C{i}" for i in range(10)]
    for number, span in enumerate(plan.spans):
        width, height = span.last - span.first + 1, span.stop - span.start
        axes.add_patch(
            Rectangle((span.first, span.start), width, height, facecolor=colors[number % 10], edgecolor="black", linewidth=0.4, alpha=0.6)
        )
        if height > SHOWN * top and width > SHOWN * steps:
            axes.text(span.first + width / 2, span.start + height / 2, span.name, ha="center", va="center", fontsize=6, clip_on=True)
    axes.step(range(steps + 1), [*plan.used, *plan.used[-1:]] or [0, 0], where="post", color="black", linewidth=0.8, label="bytes in use")
    axes.axhline(plan.bytes, color="black", linestyle="--", linewidth=0.8, label=f"arena, {plan.bytes} bytes")
    if plan.work.steps:
        axes.axvspan(plan.peak, plan.peak + 1, color="red", alpha=0.2, label=f"peak at {plan.work.steps[plan.peak].name}")
    axes.set(xlim=(0, steps), ylim=(0, top * 1.05), xlabel="step", ylabel="byte of the arena")
    axes.legend(loc="upper right", fontsize=7)
