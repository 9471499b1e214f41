"""A JobPlan as Kubernetes objects: an Indexed Job, one pod a node, and the headless Service that gives the pods names.
Pure; values of secrets are in neither.
"""

from __future__ import annotations

from typing import Any

from dtrain.cluster import exits
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.kubernetes.entry import entry_argv
from dtrain.cluster.kubernetes.names import JOB_ID, RUN, RUN_DIR, object_name
from dtrain.cluster.kubernetes.overlay import overlay
from dtrain.cluster.kubernetesconfig import AGENT, volume_source
from dtrain.cluster.mirror import is_url
from dtrain.cluster.secretrefs import parse_secrets

_OF_STORES = ("AWS_", "GOOGLE_", "AZURE_")

Object = dict[str, Any]

POD_IP = "DTRAIN_POD_IP"
# Of one node, over the job's life, without a disruption: whether another try is worth while, the coordinator decides
# much earlier. By index and not over all: then the wait before a restart (10 s, 20 s, ...) does not grow with their
# number, and "when backoffLimitPerIndex is specified, backoffLimit defaults to 2147483647" (JobSpec, batch/v1).
_FAILURES_PER_NODE = 100
_DEAD_NODE_S = 10  # until a pod of a node that does not answer is given up; 300 by default


def render_job(plan: JobPlan) -> Object:
    meta = {"name": object_name(plan), "labels": _labels(plan), "annotations": {RUN: plan.name, RUN_DIR: plan.run_dir}}
    spec = {
        "completionMode": "Indexed",
        "completions": plan.nodes,
        "parallelism": plan.nodes,
        "backoffLimitPerIndex": _FAILURES_PER_NODE,
        "maxFailedIndexes": 0,  # without one node there is no run
        "podReplacementPolicy": "Failed",  # never two pods of one index
        "podFailurePolicy": {"rules": _failure_rules()},
        "ttlSecondsAfterFinished": plan.kubernetes.keep_s,
        "template": _template(plan),
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _in_namespace(plan, meta), "spec": spec}


def render_pod(plan: JobPlan) -> Object:
    """A pod as the Job makes them, to be tried."""
    template = _template(plan)
    meta = {**template["metadata"], "name": f"{object_name(plan)}-0"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": _in_namespace(plan, meta), "spec": template["spec"]}


def _template(plan: JobPlan) -> Object:
    return {
        "metadata": {"labels": _labels(plan), "annotations": {RUN: plan.name}},
        "spec": overlay(_pod(plan), plan.kubernetes.pod),
    }


def render_service(plan: JobPlan, job_uid: str | None = None) -> Object:
    """`job_uid`: that of the Job, which the Service then goes with."""
    meta: Object = {"name": object_name(plan), "labels": _labels(plan)}
    if job_uid is not None:
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": object_name(plan), "uid": job_uid}
        meta["ownerReferences"] = [owner]
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,  # names from the first moment on
        "selector": {JOB_ID: plan.job_id},
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": _in_namespace(plan, meta), "spec": spec}


def _in_namespace(plan: JobPlan, meta: Object) -> Object:
    return {**meta, "namespace": plan.kubernetes.namespace} if plan.kubernetes.namespace else meta


def _labels(plan: JobPlan) -> dict[str, str]:
    return {**plan.kubernetes.labels, "app.kubernetes.io/managed-by": "dtrain", JOB_ID: plan.job_id}


def _failure_rules() -> list[Object]:
    """The first that matches counts. What none matches is a failure of that node, tried again."""
    ends = [exits.FAILED, exits.USAGE, exits.CANCELLED, exits.NEVER_RETRY]
    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": {"containerName": AGENT, "operator": "In", "values": [exits.STOPPED]}},
        {"action": "FailJob", "onExitCodes": {"containerName": AGENT, "operator": "In", "values": ends}},
    ]


def _pod(plan: JobPlan) -> Object:
    asked = plan.kubernetes
    volumes, mounts = _volumes(plan)
    pod: Object = {
        "restartPolicy": "Never",
        "subdomain": object_name(plan),
        "terminationGracePeriodSeconds": asked.grace_s,
        "automountServiceAccountToken": asked.service_account is not None,
        "enableServiceLinks": False,
        "securityContext": _who(plan),
        "tolerations": [_gone("not-ready"), _gone("unreachable")],
        "containers": [_agent(plan, mounts)],
        "volumes": volumes,
    }
    if asked.service_account is not None:
        pod["serviceAccountName"] = asked.service_account
    if asked.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in asked.image_pull_secrets]
    if asked.node_selector:
        pod["nodeSelector"] = dict(asked.node_selector)
    return pod


def _gone(condition: str) -> Object:
    key = f"node.kubernetes.io/{condition}"
    return {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": _DEAD_NODE_S}


def _who(plan: JobPlan) -> Object:
    asked = plan.kubernetes
    main, *others = asked.groups
    who: Object = {"runAsUser": asked.user, "runAsGroup": main, "runAsNonRoot": asked.user != 0}
    if others:
        who["supplementalGroups"] = others
    return {**who, "seccompProfile": {"type": "RuntimeDefault"}}


def _agent(plan: JobPlan, mounts: list[Object]) -> Object:
    return {
        "name": AGENT,
        "image": plan.kubernetes.image,
        "command": entry_argv(plan),
        "env": _env(plan),
        "resources": _resources(plan),
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "terminationMessagePolicy": "FallbackToLogsOnError",  # its last words, in its status
        "volumeMounts": mounts,
    }


def _env(plan: JobPlan) -> list[Object]:
    """What the config sets reaches the workers through the run directory."""
    own: list[Object] = [{"name": POD_IP, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]
    if is_url(plan.run_dir):  # what it takes to read anything at all
        settings = {name: value for name, value in plan.env.items() if name.startswith(_OF_STORES)}
        own += [{"name": name, "value": value} for name, value in settings.items()]
    names = [secret.name for secret in parse_secrets(plan.secrets) if secret.path is None]
    return own + [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": plan.kubernetes.secret, "key": name}}} for name in names
    ]


def _resources(plan: JobPlan) -> Object:
    """CPUs are what the scheduler counts with and no upper limit, which would only slow a pod down; memory is both."""
    limits = {}
    if plan.kubernetes.memory:
        limits["memory"] = plan.kubernetes.memory
    if plan.gpus_per_node:
        limits[plan.kubernetes.gpu_resource] = str(plan.gpus_per_node)
    requests = {**limits, **({"cpu": str(plan.cpus_per_node)} if plan.cpus_per_node else {})}
    return {kind: amounts for kind, amounts in (("requests", requests), ("limits", limits)) if amounts}


def _volumes(plan: JobPlan) -> tuple[list[Object], list[Object]]:
    """(volumes, mounts): the user's, and shared memory, of which containers have 64 MiB by themselves."""
    volumes: list[Object] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts: list[Object] = [{"name": "shm", "mountPath": "/dev/shm"}]
    for number, (path, source) in enumerate(plan.kubernetes.volumes.items()):
        volumes.append({"name": f"volume-{number}", **volume_source(source)})
        mounts.append({"name": f"volume-{number}", "mountPath": path})
    return volumes, mounts
