"""The one error for input that qcompile does not take."""

from __future__ import annotations


class Refused(ValueError):
    """Something was refused: bad input, an unknown operator, a scheme with no kernel.

    Attributes:
        reason: what is wrong, in one line.
        node: the graph node or the file it is about, if any.
        operator: the operator of that node, if any.
        way_out: what the reader can do.
        source: the line of the model's source code, if known.
    """

    def __init__(self, reason: str, *, node: str = "", operator: str = "", way_out: str = "", source: str = "") -> None:
        self.reason, self.node, self.operator, self.way_out, self.source = reason, node, operator, way_out, source
        place = " ".join(part for part in (node, f"({operator})" if operator else "", f"at {source}" if source else "") if part)
        text = f"{place}: {reason}" if place else reason
        super().__init__(" ".join(f"{text}; {way_out}".split()) if way_out else " ".join(text.split()))
