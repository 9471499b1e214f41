"""What the Job controller reads off Jobs and their pods. Pure functions.

Source: https://kubernetes.io/docs/concepts/workloads/controllers/job/ ("Jobs" below) and the Job's API reference.
"""

from __future__ import annotations

from collections.abc import Sequence

from kubeserver_store import Object, seconds_since

FINALIZER = "batch.kubernetes.io/job-tracking"
INDEX = "batch.kubernetes.io/job-completion-index"
FAILURES = "batch.kubernetes.io/job-index-failure-count"
IGNORED = "batch.kubernetes.io/job-index-ignored-failure-count"
FINAL = ("Succeeded", "Failed")


def index_of(pod: Object) -> int | None:
    text = pod["metadata"].get("annotations", {}).get(INDEX)
    return int(text) if text is not None else None


def is_active(pod: Object) -> bool:
    return pod["status"].get("phase") not in FINAL and "deletionTimestamp" not in pod["metadata"]


def is_terminating(pod: Object) -> bool:
    return pod["status"].get("phase") not in FINAL and "deletionTimestamp" in pod["metadata"]


def is_ready(pod: Object) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", ()))


def is_failed(pod: Object, job: Object) -> bool:
    """Jobs, "Delayed creation of replacement pods": with podReplacementPolicy Failed a pod counts "only when the
    terminating Pod is fully terminal (has status.phase: Failed)", otherwise "as soon as [it] has a
    metadata.deletionTimestamp"."""
    if pod["status"].get("phase") == "Failed":
        return True
    if job["spec"]["podReplacementPolicy"] == "Failed":
        return False
    return "deletionTimestamp" in pod["metadata"] and pod["status"].get("phase") != "Succeeded"


def condition(job: Object, kind: str) -> Object | None:
    return next((c for c in job["status"].get("conditions", ()) if c["type"] == kind and c["status"] == "True"), None)


def is_finished(job: Object) -> bool:
    return bool(condition(job, "Complete") or condition(job, "Failed"))


def intervals(numbers: Sequence[int]) -> str:
    """1,3-5: "represented as decimal integers separated by commas [...] a range of 3 or more" by first and last."""
    parts: list[str] = []
    for number in sorted(numbers):
        last = parts[-1].split("-") if parts else []
        if last and int(last[-1]) == number - 1:
            parts[-1] = f"{last[0]}-{number}"
        else:
            parts.append(str(number))
    pairs = [part.split("-") for part in parts]
    return ",".join(",".join(p) if len(p) == 2 and int(p[1]) == int(p[0]) + 1 else "-".join(p) for p in pairs)


def indexes(text: str) -> set[int]:
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def policy_action(job: Object, pod: Object) -> tuple[str | None, str]:
    """(action, message) of the first rule that fits a failed pod: "evaluated in order. Once a rule matches a Pod
    failure, the remaining rules are ignored. When no rule matches the Pod failure, the default handling applies." """
    name = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
    for number, rule in enumerate(job["spec"].get("podFailurePolicy", {}).get("rules", ())):
        end = f" matching {rule['action']} rule at index {number}"
        if "onExitCodes" in rule:
            container = _exited_as(pod, rule["onExitCodes"])
            if container:
                code = container["state"]["terminated"]["exitCode"]
                return rule["action"], f"Container {container['name']} for pod {name} failed with exit code {code}{end}"
        for pattern in rule.get("onPodConditions", ()):
            for one in pod["status"].get("conditions", ()):
                if (one["type"], one["status"]) == (pattern["type"], pattern["status"]):
                    return rule["action"], f"Pod {name} has condition {one['type']}{end}"
    return None, ""


def _exited_as(pod: Object, pattern: Object) -> Object | None:
    """ "the requirement on the container exit codes"; a container that succeeded "is excluded" """
    for group in ("initContainerStatuses", "containerStatuses"):
        for container in pod["status"].get(group, ()):
            ended = container.get("state", {}).get("terminated")
            if not ended or ended["exitCode"] == 0 or pattern.get("containerName") not in (None, container["name"]):
                continue
            if (ended["exitCode"] in pattern["values"]) == (pattern["operator"] == "In"):
                found: Object = container
                return found
    return None


def owner_of(obj: Object) -> str | None:
    return next((one["uid"] for one in obj["metadata"].get("ownerReferences", ()) if one.get("controller")), None)


def expired(job: Object) -> bool:
    """Jobs, "TTL mechanism for finished Jobs"."""
    ttl = job["spec"].get("ttlSecondsAfterFinished")
    end = condition(job, "Complete") or condition(job, "Failed")
    return ttl is not None and end is not None and seconds_since(end["lastTransitionTime"]) >= ttl
