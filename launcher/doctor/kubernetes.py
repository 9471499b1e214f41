"""A Kubernetes namespace: whether it answers, what we may do there, its quotas, and what it would say to a run's
objects. Changes nothing: the cluster is asked to try without doing."""

from __future__ import annotations

from collections.abc import Iterator

from dtrain.cluster.errors import DtrainError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.kubernetes.client import Client, KubernetesRefused, connect, find_place
from dtrain.cluster.kubernetes.rights import QUOTAS, RIGHTS, Right
from dtrain.cluster.kubernetes.trial import refusal
from dtrain.launcher.doctor.finding import Finding, ok, problem, warn

TOPIC = "kubernetes"
_ROLE = "Ask for the Role in docs/kubernetes.md."


def examine(plan: JobPlan | None) -> Iterator[Finding]:
    """`plan`: of a config with this back end, whose namespace is looked at and whose objects are tried."""
    asked = plan.kubernetes if plan and plan.backend == "kubernetes" else None
    try:
        place = find_place(asked.context if asked else None, asked.namespace if asked else None)
        client = connect(place)
        rights = [_right(client, right) for right in RIGHTS]
    except DtrainError as error:
        yield problem(TOPIC, "cluster", str(error), "Try `kubectl get pods`: it goes the same way.")
        return
    yield ok(TOPIC, "cluster", f"context {place.context or 'of this pod'}, namespace {place.namespace}")
    yield from rights
    try:
        yield from _quotas(client)
        if plan is not None and asked is not None:
            yield _dry_run(client, plan)
    except DtrainError as error:
        yield problem(TOPIC, "cluster", str(error), "Try again when it answers.")


def _right(client: Client, right: Right) -> Finding:
    resource, _, subresource = right.resource.partition("/")
    refused = [verb for verb in right.verbs if not client.may(verb, right.group, resource, subresource)[0]]
    name = f"right to {', '.join(right.verbs)} {right.resource}"
    if not refused:
        return ok(TOPIC, name, "yes")
    found = f"not to {', '.join(refused)}"
    return warn(TOPIC, name, found, f"Without it: {right.without}. {_ROLE}") if right.without else (
        problem(TOPIC, name, found, _ROLE)
    )  # fmt: skip


def _quotas(client: Client) -> Iterator[Finding]:
    try:
        quotas = client.quotas()
    except KubernetesRefused as error:
        yield ok(TOPIC, "quota", f"can't be seen: {error} ({QUOTAS.without})")
        return
    for quota in quotas:
        status = quota.get("status") or {}
        used = status.get("used") or {}
        amounts = [f"{key} {used.get(key, '0')} of {most}" for key, most in (status.get("hard") or {}).items()]
        yield ok(TOPIC, f"quota {quota['metadata']['name']}", ", ".join(amounts) or "no limit")
    if not quotas:
        yield ok(TOPIC, "quota", "none")


def _dry_run(client: Client, plan: JobPlan) -> Finding:
    if words := refusal(plan, client):
        return problem(TOPIC, "dry run", f"refused: {words}", "A launch would be refused with the same words.")
    return ok(TOPIC, "dry run", "the Job, its pods and the Service would be taken")
