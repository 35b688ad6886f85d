"""The rewrite engine: rules are data (pattern, guard, replacement), and a rule that does not fire can say why.

    conv_relu = Rule(
        "conv-relu",
        pattern=Op("aten.relu", self=Op("aten.conv2d", name="conv")),
        guard=lambda graph, m: None if graph.constant(m.arguments("conv")["weight"]) is not None else "the weight is not constant",
        replace=fuse_relu,
    )

A pattern names operators as the text form does and their arguments as the operator's schema does. Inner operators must have no other
users, unless ``shared=True``: replacing them would compute them twice.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from qcompile.errors import Refused
from qcompile.graph.graph import Graph, node_name
from qcompile.graph.text import bound_arguments, operator_name

SWEEPS = 64  # a set of rules that still changes the graph after so many sweeps undoes its own work


@dataclass(frozen=True)
class Any_:  # noqa: N801  typing.Any has the plain name
    """Matches any value, None included, and binds it to a name."""

    name: str = ""


@dataclass(frozen=True)
class Const:
    """Matches a constant node."""

    name: str = ""


class Op:
    """Matches a call of one of the operators whose named arguments match; other arguments may be anything.

    Args:
        operators: names as in the text form, alternatives joined by ``|``: ``"aten.relu|aten.relu6"``.
        name: the node is bound to this name.
        shared: the node may have users outside the match.
        commutative: the operands ``self`` and ``other`` may stand in either order.
        arguments: patterns by schema argument name.
    """

    def __init__(self, operators: str, /, *, name: str = "", shared: bool = False, commutative: bool = False, **arguments: Pattern) -> None:
        self.operators = frozenset(part.strip() for part in operators.split("|"))
        self.name, self.shared, self.commutative, self.arguments = name, shared, commutative, arguments


Pattern = Op | Const | Any_


@dataclass
class Match:
    """One place where a pattern fits: ``match["x"]`` is the value bound to a name, ``root`` the outermost node."""

    root: fx.Node
    values: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def arguments(self, name: str) -> dict[str, Any]:
        """Return all arguments of the node bound to a name, defaults filled in."""
        return bound_arguments(self.values[name])


@dataclass(frozen=True)
class Rule:
    """A rewrite: where ``pattern`` fits and ``guard`` gives no reason against it, ``replace`` returns the node that takes the root's place.

    The replacement is inserted before the root. A guard returns None or the reason, a text without the node's name.
    """

    name: str
    pattern: Op
    replace: Callable[[Graph, Match], fx.Node]
    guard: Callable[[Graph, Match], str | None] = lambda graph, match: None


@dataclass
class RewriteLog:
    """What the rules did: counts and time by rule, and by node why a rule that fitted its operator did not fire."""

    tried: Counter[str] = field(default_factory=Counter)
    matched: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    reasons: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def why_not(self, node: str) -> list[str]:
        """Return the reasons noted for a node, ``rule: reason`` each."""
        return list(dict.fromkeys(self.reasons.get(node, [])))

    def __iadd__(self, other: RewriteLog) -> RewriteLog:
        self.tried += other.tried
        self.matched += other.matched
        for rule, seconds in other.seconds.items():
            self.seconds[rule] += seconds
        for node, reasons in other.reasons.items():
            self.reasons[node] += reasons
        return self


def apply_rules(graph: Graph, rules: Iterable[Rule], log: RewriteLog | None = None) -> int:
    """Apply rules in order at every node until nothing changes; return how often a rule fired.

    Raises:
        Refused: the rules never come to rest.
    """
    log = RewriteLog() if log is None else log
    by_operator: defaultdict[str, list[Rule]] = defaultdict(list)
    for rule in rules:
        for name in rule.pattern.operators:
            by_operator[name].append(rule)
    total = 0
    for _ in range(SWEEPS):
        fired = sum(_apply_at(graph, node, by_operator, log) for node in graph.nodes if node.op == "call_function")
        graph.clean()
        total += fired
        if not fired:
            return total
    raise Refused(f"the rules {', '.join(sorted({r.name for rs in by_operator.values() for r in rs}))} never come to rest")


def _apply_at(graph: Graph, node: fx.Node, by_operator: Mapping[str, list[Rule]], log: RewriteLog) -> int:
    if not node.users:  # replaced or dead within this sweep
        return 0
    for rule in by_operator.get(operator_name(node.target), ()):
        start = time.perf_counter()
        log.tried[rule.name] += 1
        found = match_pattern(graph, rule.pattern, node)
        reason = found if isinstance(found, str) else rule.guard(graph, found)
        if reason is None:
            assert isinstance(found, Match)
            graph.replace(node, rule.replace(graph, found))
            log.matched[rule.name] += 1
        else:
            log.reasons[node_name(node)].append(f"{rule.name}: {reason}")
        log.seconds[rule.name] += time.perf_counter() - start
        if reason is None:
            return 1
    return 0


def match_pattern(graph: Graph, pattern: Op, root: fx.Node) -> Match | str:
    """Return the match of a pattern at a node, or the reason why there is none."""
    match = Match(root)
    reason = _match(graph, pattern, root, match)
    return reason if reason else match


def _match(graph: Graph, pattern: Pattern, value: Any, match: Match) -> str:
    """Bind the pattern's names in ``match``; return "" or the reason against it."""
    if isinstance(pattern, Const) and graph.constant(value) is None:
        return f"{_text(value)} is not a constant"
    if isinstance(pattern, Op):
        if not _is_call(value) or operator_name(value.target) not in pattern.operators:
            return f"{_text(value)} is not {' or '.join(sorted(pattern.operators))}"
        if value is not match.root and not pattern.shared and len(value.users) > 1:
            return f"{node_name(value)} has other users"
        if reason := _match_arguments(graph, pattern, value, match):
            return reason
    if pattern.name:
        if pattern.name in match.values and match.values[pattern.name] is not value:
            return f"two different values stand for '{pattern.name}'"
        match.values[pattern.name] = value
    return ""


def _match_arguments(graph: Graph, pattern: Op, node: fx.Node, match: Match) -> str:
    arguments = _named_arguments(node)
    orders = [arguments]
    if pattern.commutative:
        orders.append(arguments | {"self": arguments["other"], "other": arguments["self"]})
    reasons: list[str] = []
    for order in orders:
        bound = dict(match.values)
        found = (_match(graph, inner, order.get(name), match) for name, inner in pattern.arguments.items())
        reason = next(filter(None, found), "")
        if not reason:
            return ""
        reasons.append(reason)
        match.values = bound
    return reasons[0]


def _named_arguments(node: fx.Node) -> dict[str, Any]:
    if isinstance(node.target, torch._ops.OpOverload):
        return bound_arguments(node)
    return {"self": node.args[0], "other": node.args[1] if len(node.args) > 1 else None}


def _is_call(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "call_function"


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{node_name(value)}" + (f" ({operator_name(value.target)})" if _is_call(value) else "")
    return str(value)
