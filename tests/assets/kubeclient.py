"""What tests ask of their Kubernetes (kubeserver.py) again and again, through the official client or past it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from kubeserver import KubeServer

NS = "default"


def job(
    name: str, script: str, *, nodes: int = 2, template: dict[str, Any] | None = None, **spec: Any
) -> dict[str, Any]:
    """An Indexed Job of `nodes` pods, each of which runs a bash script as its pid 1."""
    container = {"name": "main", "image": "any:1", "command": ["bash", "-c", script]}
    inner = {"restartPolicy": "Never", "subdomain": name, "terminationGracePeriodSeconds": 1, "containers": [container]}
    indexed = {"completionMode": "Indexed", "completions": nodes, "parallelism": nodes}
    return {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name},
        "spec": {**indexed, "template": {"spec": {**inner, **(template or {})}}, **spec},
    }  # fmt: skip


def affinity(operator: str, *values: str, key: str = "a") -> dict[str, Any]:
    """Of a pod, to nodes."""
    terms = [{"matchExpressions": [{"key": key, "operator": operator, "values": list(values)}]}]
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}


def condition(job: dict[str, Any], kind: str) -> dict[str, Any] | None:
    return next((c for c in job["status"].get("conditions", ()) if c["type"] == kind and c["status"] == "True"), None)


def wait_condition(kubernetes: KubeServer, name: str, kind: str) -> dict[str, Any]:
    kubernetes.wait(lambda: condition(kubernetes.job(name), kind), words=lambda: str(kubernetes.job(name)["status"]))
    found = condition(kubernetes.job(name), kind)
    assert found is not None
    return found


def running(kubernetes: KubeServer) -> list[dict[str, Any]]:
    return [pod for pod in kubernetes.pods() if pod["status"].get("phase") == "Running"]


def refused(call: Callable[..., object], *args: object, **kwargs: object) -> tuple[int, dict[str, Any]]:
    import kubernetes.client as k8s

    with pytest.raises(k8s.ApiException) as caught:
        call(*args, **kwargs)
    return caught.value.status, json.loads(caught.value.body)


def delete(batch: Any, name: str) -> None:
    batch.delete_namespaced_job(name, NS, propagation_policy="Background")


def log(core: Any, pod: str) -> str:
    """The client's own decoding makes "b'...'" of it."""
    return bytes(core.read_namespaced_pod_log(pod, NS, _preload_content=False).data).decode()
