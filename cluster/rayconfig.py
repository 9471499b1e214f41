"""The section `cluster.ray`: where the Ray cluster is, and what a node is to have there besides CPUs and GPUs. What is
started on it is cluster/ray/'s."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_SCHEMES = ("http", "https", "ray")
_OURS = {"CPU": "cluster.cpus_per_node", "GPU": "cluster.gpus_per_node"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    address: str = field(
        default="auto",
        metadata={
            "doc": "of the cluster: its Jobs API like http://head:8265, or head:6379; auto: RAY_ADDRESS, else the one "
            "that `ray start` has started on this machine"
        },
    )
    resources: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "doc": "what each node takes of Ray's resources beside CPU and GPU, like {TPU: 4} or memory in bytes"
        },
    )
    labels: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "doc": "Ray labels that a node must have, like {ray.io/market-type: on-demand}; a value may be in(a,b)"
        },
    )

    @staticmethod
    def from_json(data: dict[str, Any]) -> RayConfig:
        return RayConfig(**{name: data[name] for name in RayConfig.__dataclass_fields__ if name in data})

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is wrong with the values by themselves: key, message."""
        if problem := _wrong_address(self.address):
            yield "cluster.ray.address", problem
        for name, amount in self.resources.items():
            key = f"cluster.ray.resources.{name}"
            if name in _OURS:
                yield key, f"is {_OURS[name]}'s. Set that one, and leave it out here."
            elif not amount > 0:
                yield key, f"{amount:g} is not above 0. Give what a node takes, or leave it out."
            elif amount > 1 and not float(amount).is_integer():
                yield key, f"{amount:g}: Ray takes whole numbers, or less than 1. Set {round(amount)}."


def _wrong_address(address: str) -> str:
    advice = "Give the address of its Jobs API, like http://head:8265, or auto."
    scheme, mark, rest = address.rpartition("://")
    if mark and scheme not in _SCHEMES:
        return f"{address} begins with {scheme}://, which is no Ray cluster's. {advice}"
    if not rest.strip("/") or any(letter.isspace() for letter in address):
        return f"{address!r} is no address. {advice}"
    port = rest.strip("/").partition("/")[0].rpartition(":")[2]
    if not mark and address != "auto" and not port.isdigit():
        return f"{address} has no port. {advice}"
    return ""
