"""Memory of a model as one block that is planned before anything runs: where values lie, in which order they are made, what may overlap."""

from qcompile.arena.offsets import Block, Placement, place
from qcompile.arena.order import order_steps
from qcompile.arena.plan import Plan, plan_work
from qcompile.arena.work import Overlap, Step, Work

__all__ = ["Block", "Overlap", "Placement", "Plan", "Step", "Work", "order_steps", "place", "plan_work"]
