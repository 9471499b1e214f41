"""What a job has in Ray: a placement group, and in it a detached actor a node. Everything is found by its name, so that
it is made once, whoever comes first. When it is made and cleared is the keeper's and the driver's affair.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.ray.files import RayFiles, RayNode
from dtrain.cluster.ray.node import NodeActor
from dtrain.cluster.ray.resources import bundle

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

NAMESPACE = "dtrain"


def keeper_name(job_id: str) -> str:
    return f"{job_id}-keeper"


def node_name(job_id: str, node_rank: int) -> str:
    return f"{job_id}-node-{node_rank}"


def get_group(plan: JobPlan) -> PlacementGroup:
    """The job's own, made where there is none yet. Raises ValueError or TypeError for one that Ray will never make."""
    import ray

    with contextlib.suppress(ValueError):
        return cast("PlacementGroup", ray.util.get_placement_group(plan.job_id))
    each = [bundle(plan)] * plan.nodes
    labels = [plan.ray.labels] * plan.nodes if plan.ray.labels else None
    try:
        group = ray.util.placement_group(
            each, strategy="STRICT_SPREAD", name=plan.job_id, lifetime="detached", bundle_label_selector=labels
        )
    except ray.exceptions.RaySystemError:  # so it says that somebody else has just made one of this name
        group = ray.util.get_placement_group(plan.job_id)
    return cast("PlacementGroup", group)


def start_nodes(plan: JobPlan, files: RayFiles, group: PlacementGroup, key: str) -> list[Any]:
    """An actor for each node rank, where there is none yet. `group` has had its nodes. Raises RuntimeError where it
    lost one before the ranks were given."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    now = placed(group)
    if files.bundles() is None:
        if len(now) < plan.nodes:
            raise RuntimeError(f"{plan.nodes - len(now)} of the job's nodes were lost at once")
        bundles = assign_ranks(now, files.nodes_before())
        files.put_first_nodes(bundles, {rank: now[index] for rank, index in enumerate(bundles)})
    each, actors = bundle(plan), []
    for rank, index in enumerate(files.bundles() or ()):
        actor: Any = ray.remote(NodeActor).options(
            name=node_name(plan.job_id, rank),
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,  # for ever
            num_cpus=each.get("CPU", 0),
            num_gpus=each.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        )
        actors.append(actor.remote(plan.run_dir, plan.job_id, rank, key))
    return actors


def clear(plan: JobPlan, files: RayFiles, patience_s: float) -> None:
    """Leaves nothing in Ray of a job that is over, but its keeper. Agents are given `patience_s` to leave."""
    import ray

    actors = [actor for rank in range(plan.nodes) if (actor := find_actor(node_name(plan.job_id, rank)))]
    if leaving := [actor.has_left.remote(patience_s) for actor in actors]:
        ray.wait(leaving, num_returns=len(leaving), timeout=patience_s)
    for actor in actors:
        ray.kill(actor, no_restart=True)
    with contextlib.suppress(ValueError):
        ray.util.remove_placement_group(ray.util.get_placement_group(plan.job_id))
    files.remove_environs()


def end_keeper(job_id: str) -> None:
    """The last act: Ray starts it no more."""
    import ray

    if keeper := find_actor(keeper_name(job_id)):
        ray.kill(keeper, no_restart=True)


def find_actor(name: str) -> Any:
    """None where there is none."""
    import ray

    with contextlib.suppress(ValueError):
        return ray.get_actor(name, namespace=NAMESPACE)
    return None


def nodes_alive() -> list[dict[str, Any]]:
    """Those that Ray holds for alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def placed(group: PlacementGroup) -> dict[int, RayNode]:
    """Bundle -> the node that it is on, for those that are on one that lives."""
    import ray

    addresses = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in nodes_alive()}
    found = ray.util.placement_group_table(group)["bundles_to_node_id"]
    return {
        int(index): RayNode(id=identity, address=addresses[identity])
        for index, identity in found.items()
        if identity in addresses
    }


def assign_ranks(placed: Mapping[int, RayNode], before: Mapping[int, RayNode]) -> list[int]:
    """Node rank -> bundle: a node that the run's last job was on keeps its rank, the others follow by address."""
    left = sorted(placed, key=lambda index: (_order(placed[index].address), placed[index].id))
    ranks: dict[int, int] = {}
    for name in ("id", "address"):
        for rank, node in before.items():
            same = [index for index in left if getattr(placed[index], name) == getattr(node, name)]
            if rank < len(placed) and rank not in ranks and same:
                ranks[rank] = same[0]
                left.remove(same[0])
    return [ranks[rank] if rank in ranks else left.pop(0) for rank in range(len(placed))]


def _order(address: str) -> tuple[int, int, str]:
    """10.0.0.9 before 10.0.0.10; names, if there are any, last."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return 7, 0, address
    return parsed.version, int(parsed), ""
