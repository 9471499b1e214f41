"""The section `cluster.kubernetes`: what the pods of a run are made of. Its fields and their notation only; what
becomes of them is cluster/kubernetes/'s. Here, because a JobPlan holds them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

_QUANTITY = re.compile(r"\d+(\.\d+)?([numkMGTPE]|[KMGTPE]i)?")  # kubernetes.io: Quantity
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")


def _check_volumes(volumes: dict[str, str]) -> None:
    for path, source in volumes.items():
        if not path.startswith("/") or path != os.path.normpath(path) or path == "/":
            raise ValueError(f"expects absolute paths, found {path!r}. For example: {{/data: pvc:data}}")
        volume_source(source)


def volume_source(text: str) -> dict[str, Any]:
    """Kubernetes' words for `pvc:CLAIM`, `nfs:SERVER:/PATH` and `host:/PATH`. Raises ValueError with what to do."""
    kind, _, rest = text.partition(":")
    server, _, path = rest.partition(":")
    if kind == "pvc" and _NAME.fullmatch(rest):
        return {"persistentVolumeClaim": {"claimName": rest}}
    if kind == "nfs" and server and path.startswith("/"):
        return {"nfs": {"server": server, "path": path}}
    if kind == "host" and rest.startswith("/"):
        return {"hostPath": {"path": rest}}
    raise ValueError(
        f'expects pvc:CLAIM, nfs:SERVER:/PATH or host:/PATH, found "{text}". Others go into cluster.kubernetes.pod.'
    )


def _check_quantity(text: str) -> None:
    if not _QUANTITY.fullmatch(text):
        raise ValueError(f'expects a quantity as Kubernetes writes it, found "{text}". For example: 64Gi')


# What a run's pods rest on: another value would break the run.
OURS_OF_POD = ("restartPolicy", "hostname", "subdomain", "setHostnameAsFQDN")
OURS_OF_AGENT = ("command", "args")
AGENT = "agent"  # the container


def _check_pod(pod: dict[str, Any]) -> None:
    for key in OURS_OF_POD:
        if key in pod:
            raise ValueError(f"{key} is dtrain's own. Leave it out.")
    containers = pod.get("containers") or []
    if not isinstance(containers, list) or not all(isinstance(one, dict) and "name" in one for one in containers):
        raise ValueError(f"containers is a list of mappings with a name each; dtrain's own is called {AGENT}.")
    for key in OURS_OF_AGENT:
        if any(one["name"] == AGENT and key in one for one in containers):
            raise ValueError(f"{key} of the container {AGENT} is dtrain's own. Leave it out; cluster.setup runs first.")


def _text(doc: str, validate: Any = None) -> Any:
    return field(default=None, metadata={"doc": doc} if validate is None else {"doc": doc, "validate": validate})


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesConfig:
    """What `backend: kubernetes` puts into pods; other back ends leave it alone, so that a site's file may set it."""

    image: str | None = _text("with a Python that has this dtrain; required with this back end")
    namespace: str | None = _text("left out: the one of your kubeconfig's context")
    context: str | None = _text("of your kubeconfig; left out: the current one")
    volumes: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "doc": "path in the pods -> pvc:CLAIM, nfs:SERVER:/PATH or host:/PATH; run_dir lies below one of them, and "
            "this machine sees it under the same path",
            "validate": _check_volumes,
        },
    )
    memory: str | None = _text("of a pod, like 64Gi: what it gets and the most that it may use", _check_quantity)
    gpu_resource: str = field(
        default="nvidia.com/gpu", metadata={"doc": "as the cluster calls what cluster.gpus_per_node asks for"}
    )
    user: int | Literal["auto"] = field(
        default="auto",
        metadata={"doc": "uid of the processes; auto: yours, as the run directory is; 0 has to be asked for", "min": 0},
    )
    groups: tuple[int, ...] = field(
        default=(), metadata={"doc": "gids of the processes, the main one first; left out: yours", "min": 0}
    )
    secret: str | None = _text("a Secret of the namespace that has a key for each of cluster.secrets")
    service_account: str | None = _text(
        "the pods'; with the rights of docs/kubernetes.md lost pods are replaced sooner"
    )
    image_pull_secrets: tuple[str, ...] = field(default=(), metadata={"doc": "Secrets with access to the registry"})
    node_selector: dict[str, str] = field(
        default_factory=dict, metadata={"doc": "labels that the cluster's nodes must have"}
    )
    labels: dict[str, str] = field(
        default_factory=dict, metadata={"doc": "more labels of the Job and its pods, like kueue.x-k8s.io/queue-name"}
    )
    grace_s: int | Literal["auto"] = field(
        default="auto",
        metadata={
            "doc": "seconds to save before a pod that has to go is killed; auto: 120, or what the run's slowest save "
            "asks for",
            "min": 1,
        },
    )
    keep_s: int = field(
        default=3600,
        metadata={"doc": "for how long the cluster keeps the Job after its end", "min": 0},
    )
    pod: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "doc": "any field of the pods' spec, in Kubernetes' words: {tolerations: [...], affinity: {...}}; mappings "
            "merge, lists of named things merge by name (dtrain's container is called agent), other lists are "
            "appended, null takes a field out",
            "validate": _check_pod,
        },
    )

    @staticmethod
    def from_json(data: dict[str, Any]) -> KubernetesConfig:
        known: dict[str, Any] = {name: data[name] for name in KubernetesConfig.__dataclass_fields__ if name in data}
        lists = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        return KubernetesConfig(**{**known, **lists})


def resolve_kubernetes(config: KubernetesConfig, slowest_save_s: float) -> KubernetesConfig:
    """Every `auto` decided: who the processes are, and how long they may take to save."""
    uid = os.getuid() if config.user == "auto" else config.user
    groups = config.groups or tuple(dict.fromkeys((os.getgid(), *sorted(os.getgroups()))))
    grace_s = max(120, 60 + int(3 * slowest_save_s)) if config.grace_s == "auto" else config.grace_s
    return replace(config, user=uid, groups=groups, grace_s=grace_s)


def is_on_volume(config: KubernetesConfig, path: str) -> bool:
    """Whether the pods see `path`: below a volume of ours, or one that `pod` mounts into the agent."""
    agents = [one for one in config.pod.get("containers") or [] if one.get("name") == AGENT]
    mounts = [str(mount.get("mountPath", "")) for one in agents for mount in one.get("volumeMounts") or []]
    return any(Path(path).is_relative_to(folder) for folder in (*config.volumes, *mounts) if folder.startswith("/"))
