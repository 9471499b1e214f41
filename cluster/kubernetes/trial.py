"""What the cluster would say to a run's objects, asked by a try without doing (dryRun, strict about fields): rights,
admission, limits. Changes nothing."""

from __future__ import annotations

from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.kubernetes.client import Client, KubernetesRefused
from dtrain.cluster.kubernetes.render import render_job, render_pod, render_service

# Of a pod alone. A quota that is full now is waited for, and who makes Jobs need not be allowed to make pods.
_NO_REFUSAL = ("exceeded quota", 'cannot create resource "pods"')


def refusal(plan: JobPlan, client: Client) -> str:
    """Its words; "" where it would take all. A Job is let through with what is refused to its pods (Pod Security,
    limits, a service account that does not exist): so a pod is tried, too. Raises KubernetesUnreachable."""
    try:
        for body in (render_job(plan), render_service(plan)):
            client.create(body, dry_run=True)
    except KubernetesRefused as error:
        return str(error)
    try:
        client.create(render_pod(plan), dry_run=True)
    except KubernetesRefused as error:
        return "" if any(words in str(error) for words in _NO_REFUSAL) else f"its pods: {error}"
    return ""
