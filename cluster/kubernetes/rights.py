"""The rights in a namespace that a run needs, as a table: docs/kubernetes.md prints it as a Role, `dtrain doctor` asks
for each. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Right:
    """`group` "": the core API. `without`: what a person goes without; "": nothing works."""

    group: str
    resource: str
    verbs: tuple[str, ...]
    without: str = ""


RIGHTS = (
    Right(group="batch", resource="jobs", verbs=("create", "get", "delete")),
    Right(group="", resource="services", verbs=("create", "get")),
    Right(group="", resource="pods", verbs=("list",)),
    Right(
        group="",
        resource="pods",
        verbs=("delete", "patch"),
        without="a pod of a dead machine is not replaced by itself",
    ),
    Right(group="", resource="pods", verbs=("create",), without="what is asked of pods is not tried before a launch"),
    Right(group="", resource="pods/log", verbs=("get",), without="fewer words about pods that died early"),
    Right(group="", resource="events", verbs=("list",), without="fewer words about why pods wait"),
)
QUOTAS = Right(group="", resource="resourcequotas", verbs=("list",), without="only `dtrain doctor` asks for them")
# What the pods' own service account needs, where there is one.
POD_RIGHTS = (Right(group="", resource="pods", verbs=("list", "delete", "patch")),)
