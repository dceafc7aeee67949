"""Lists the kernels that layers could have in place of theirs, so that a search times both."""

from __future__ import annotations

from bertile.graph.graph import Graph
from bertile.lower.forms import Forms
from bertile.lower.sparse_choice import dense_task, layers, rounded, sparse_task
from bertile.schedules.task import Task


def alternatives(graph: Graph) -> dict[Task, Task]:
    """For each layer where there was a choice, the kernels that it did not get, each with the one
    that it has: of its zeros the other way, and in the precision that was asked for.
    """
    forms, others = Forms(graph), {}
    for var, name in layers(forms):
        own, plan = forms.task(var), graph.plan[name]
        if own.operation == "sparse":
            others[dense_task(own, plan)] = own
        elif plan.sparse is not None and plan.sparse.why:
            others[sparse_task(own, rounded(plan.sparse.lanes))] = own
        if plan.slower is not None:
            others[plan.slower] = own
    return others
