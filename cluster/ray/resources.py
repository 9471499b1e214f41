"""What a node of a job takes of Ray's resources, and which of Ray's nodes have that. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from dtrain.cluster.jobplan import JobPlan


def bundle(plan: JobPlan) -> dict[str, float]:
    """Of one node. CPUs are Ray's count of them: one a worker where the config says nothing."""
    wanted = {"CPU": float(plan.cpus_per_node or plan.procs_per_node), "GPU": float(plan.gpus_per_node)}
    return {name: amount for name, amount in {**wanted, **plan.ray.resources}.items() if amount}


def describe(plan: JobPlan, *, number: bool = True) -> str:
    """Like `4 nodes with 8 CPU and 1 GPU`."""
    words = [f"{amount:g} {name}" for name, amount in bundle(plan).items()]
    words += [f"{name}={value}" for name, value in plan.ray.labels.items()]
    each = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return f"{plan.nodes} node{'' if plan.nodes == 1 else 's'} with {each}" if number else each


def fits(plan: JobPlan, resources: Mapping[str, float], labels: Mapping[str, str]) -> bool:
    """Whether a node of Ray's could be one of the job, were nothing else on it. Of labels only plain values are
    understood here."""
    enough = all(resources.get(name, 0.0) >= amount for name, amount in bundle(plan).items())
    plain = {name: value for name, value in plan.ray.labels.items() if not value.startswith(("in(", "!in(", "!"))}
    return enough and all(labels.get(name) == value for name, value in plain.items())
