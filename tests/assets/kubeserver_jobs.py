"""The Job controller of the tests' Kubernetes: from Jobs to pods, and from pods' ends to the Job's status.

Source: https://kubernetes.io/docs/concepts/workloads/controllers/job/ ("Jobs" below) and the Job's API reference.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field

import kubeserver_admission
from kubeserver_events import Events
from kubeserver_jobfacts import (
    FAILURES,
    FINALIZER,
    IGNORED,
    INDEX,
    condition,
    index_of,
    indexes,
    intervals,
    is_active,
    is_failed,
    is_finished,
    is_ready,
    is_terminating,
    owner_of,
    policy_action,
)
from kubeserver_store import Object, Refused, Store, delete, key_of, now, seconds_since


@dataclass(slots=True)
class _Backoff:
    failures: int = 0  # since the last success
    last: float = 0.0


@dataclass(slots=True)
class JobController:
    """`backoff_s`: the first delay before a failed pod is replaced, 10 s in the real one: "an exponential back-off
    delay (10s, 20s, 40s ...) capped at six minutes"."""

    store: Store
    events: Events
    backoff_s: float = 10.0
    _backoffs: dict[tuple[str, int], _Backoff] = field(default_factory=dict)  # (the Job's uid, index or -1)
    _failed_creation: dict[str, str] = field(default_factory=dict)
    _per_index: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)  # index -> failures, ignored ones

    def sync(self) -> None:
        """Every Job once. Called after each change and from time to time, under the store's lock."""
        jobs = self.store.objects("jobs")
        for job in jobs:
            self._sync(job)
        known = {job["metadata"]["uid"] for job in jobs}
        for pod in self.store.objects("pods"):
            # "Job tracking with finalizers": the controller of a Job that is gone lets its pods go.
            if FINALIZER in pod["metadata"].get("finalizers", ()) and owner_of(pod) not in known:
                self._release(pod)

    def _pods(self, job: Object) -> list[Object]:
        return [
            one
            for one in self.store.objects("pods", job["metadata"]["namespace"])
            if owner_of(one) == job["metadata"]["uid"]
        ]

    def _sync(self, job: Object) -> None:
        key, status, pods = key_of(job), job["status"], self._pods(job)
        if is_finished(job):
            for pod in pods:
                self._release(pod)
            return
        if "startTime" not in status and not job["spec"]["suspend"]:
            status["startTime"] = now()
        self._count(job, pods)
        verdict = self._verdict(job, pods)
        if verdict:
            self._end(job, verdict, pods)
        elif "deletionTimestamp" not in job["metadata"]:
            self._manage(job, pods)
            self._note_suspension(job)
        pods = self._pods(job)
        self._count_present(job, pods)
        self._finish(job, pods)
        if not status.get("uncountedTerminatedPods"):
            status["uncountedTerminatedPods"] = {}
        self.store.edit(key, lambda one: one.update(status=copy.deepcopy(status)))

    # Counting.

    def _count(self, job: Object, pods: list[Object]) -> None:
        """Terminal pods into the status, each once: "The controller removes the finalizer only after the Pod has been
        accounted for in the Job status"."""
        status, spec = job["status"], job["spec"]
        completed = indexes(status.get("completedIndexes", ""))
        ending = bool(
            condition(job, "FailureTarget")
            or condition(job, "SuccessCriteriaMet")
            or "deletionTimestamp" in job["metadata"]
        )
        for pod in pods:
            if FINALIZER not in pod["metadata"].get("finalizers", ()):
                continue
            succeeded, failed = pod["status"].get("phase") == "Succeeded", is_failed(pod, job)
            if not (succeeded or failed or ending):
                continue
            if succeeded:
                self._backoffs.pop(self._delayed(job, pod), None)
                index = index_of(pod)
                if spec["completionMode"] == "Indexed" and index is not None and index < spec["completions"]:
                    completed.add(index)
                elif spec["completionMode"] != "Indexed":
                    status["succeeded"] = status.get("succeeded", 0) + 1
            elif failed or condition(job, "FailureTarget"):
                self._count_failure(job, pod)
            self._release(pod)
        if spec["completionMode"] == "Indexed":
            status["completedIndexes"] = intervals([one for one in completed if one < spec["completions"]])
            status["succeeded"] = len(indexes(status["completedIndexes"]))

    def _count_failure(self, job: Object, pod: Object) -> None:
        status = job["status"]
        action, message = policy_action(job, pod)
        if action == "FailJob" and not condition(job, "FailureTarget"):
            self._target(job, "FailureTarget", "PodFailurePolicy", message)
        record = self._backoffs.setdefault(self._delayed(job, pod), _Backoff())
        record.failures += 1
        record.last = time.monotonic()
        if action != "Ignore":  # "the counter towards the .spec.backoffLimit should not be incremented"
            status["failed"] = status.get("failed", 0) + 1
        if "backoffLimitPerIndex" in job["spec"]:
            self._count_index_failure(job, pod, action)

    def _count_index_failure(self, job: Object, pod: Object, action: str | None) -> None:
        """Jobs, "Backoff limit per index": "the Job controller [...] tracks the number of failures for each index", and
        "Once an index exceeds its limit, the job controller [...] adds the index to .status.failedIndexes"."""
        index = index_of(pod)
        if index is None:
            return
        counts = self._per_index.setdefault(job["metadata"]["uid"], {})
        failures, ignored = counts.get(index, (0, 0))
        counts[index] = (failures, ignored + 1) if action == "Ignore" else (failures + 1, ignored)
        if action == "FailIndex" or counts[index][0] > job["spec"]["backoffLimitPerIndex"]:
            status = job["status"]
            status["failedIndexes"] = intervals(sorted(indexes(status.get("failedIndexes", "")) | {index}))

    def _count_present(self, job: Object, pods: list[Object]) -> None:
        status = job["status"]
        active = [pod for pod in pods if is_active(pod)]
        status["active"], status["ready"] = len(active), sum(map(is_ready, active))
        status["terminating"] = sum(map(is_terminating, pods))
        if not status["active"]:
            del status["active"]

    def _release(self, pod: Object) -> None:
        def change(one: Object) -> None:
            finalizers = [name for name in one["metadata"].get("finalizers", ()) if name != FINALIZER]
            one["metadata"].pop("finalizers", None)
            if finalizers:
                one["metadata"]["finalizers"] = finalizers

        if FINALIZER in pod["metadata"].get("finalizers", ()):
            self.store.edit(key_of(pod), change)

    # The end.

    def _verdict(self, job: Object, pods: list[Object]) -> Object | None:
        """The condition under which the Job is to end."""
        spec, status = job["spec"], job["status"]
        present = condition(job, "SuccessCriteriaMet") or condition(job, "FailureTarget")
        if present:
            return present
        restarts = sum(
            container.get("restartCount", 0)
            for pod in pods
            for container in pod["status"].get("containerStatuses", ())
            if pod["status"].get("phase") in ("Pending", "Running")
        )
        limit = spec["backoffLimit"]
        exceeds = spec["template"]["spec"]["restartPolicy"] == "OnFailure" and restarts and restarts >= limit
        if status.get("failed", 0) > limit or exceeds:
            return self._target(
                job, "FailureTarget", "BackoffLimitExceeded", "Job has reached the specified backoff limit"
            )
        deadline = spec.get("activeDeadlineSeconds")
        counts = deadline is not None and "startTime" in status and not spec["suspend"]
        if counts and seconds_since(status["startTime"]) >= deadline:
            words = "Job was active longer than specified deadline"
            return self._target(job, "FailureTarget", "DeadlineExceeded", words)
        failed = indexes(status.get("failedIndexes", ""))
        if "maxFailedIndexes" in spec and len(failed) > spec["maxFailedIndexes"]:
            words = "Job has exceeded the specified maximal number of failed indexes"
            return self._target(job, "FailureTarget", "MaxFailedIndexesExceeded", words)
        done = status.get("succeeded", 0)
        if failed and len(failed) + done >= spec["completions"]:
            return self._target(job, "FailureTarget", "FailedIndexes", "Job has failed indexes")
        active = sum(map(is_active, pods))
        wanted = spec.get("completions")
        if not active and (done >= wanted if wanted is not None else done > 0):
            return self._target(
                job, "SuccessCriteriaMet", "CompletionsReached", "Reached expected number of succeeded pods"
            )
        return None

    def _target(self, job: Object, kind: str, reason: str, message: str) -> Object:
        """Jobs, "Termination of Job pods": the conditions FailureTarget and SuccessCriteriaMet "trigger the
        termination" of the pods that are left."""
        moment = now()
        found = {
            "type": kind, "status": "True", "lastProbeTime": moment, "lastTransitionTime": moment, "reason": reason,
            "message": message,
        }  # fmt: skip
        job["status"].setdefault("conditions", []).append(found)
        return found

    def _end(self, job: Object, verdict: Object, pods: list[Object]) -> None:
        """ "any running Pods will be terminated"."""
        for pod in filter(is_active, pods):
            self._delete(job, pod)
        if verdict["type"] == "FailureTarget":
            # "When the job is considered finished, every non-terminated pod is considered failed."
            for pod in self._pods(job):
                if FINALIZER in pod["metadata"].get("finalizers", ()):
                    if pod["status"].get("phase") != "Succeeded":
                        self._count_failure(job, pod)
                    self._release(pod)

    def _finish(self, job: Object, pods: list[Object]) -> None:
        """Jobs: "Starting in Kubernetes v1.31 the Job controller delays the addition of the terminal conditions, Failed
        or Complete, until all of the Job Pods are terminated." """
        target = condition(job, "SuccessCriteriaMet") or condition(job, "FailureTarget")
        if not target or any(is_active(pod) or is_terminating(pod) for pod in pods):
            return
        final = "Complete" if target["type"] == "SuccessCriteriaMet" else "Failed"
        moment = now()
        job["status"]["conditions"].append(
            {**target, "type": final, "lastProbeTime": moment, "lastTransitionTime": moment}
        )
        if final == "Complete":
            job["status"]["completionTime"] = moment
            self.events.tell(job, "Normal", "Completed", "Job completed", "job-controller")
        else:
            self.events.tell(job, "Warning", target["reason"], target["message"], "job-controller")

    # Pods.

    def _manage(self, job: Object, pods: list[Object]) -> None:
        """As many pods as there should be. "We restrict ourselves to either just pod deletion or pod creation"."""
        spec, status = job["spec"], job["status"]
        active = [pod for pod in pods if is_active(pod)]
        if spec["suspend"]:
            # "When you suspend a Job, any running Pods that don't have a status of Completed will be terminated with a
            # SIGTERM signal"; and they count neither as completed nor as failed.
            for pod in active:
                self._release(pod)
                self._delete(job, pod)
            return
        wanted = spec["parallelism"]
        if "completions" in spec:
            failed = len(indexes(status.get("failedIndexes", "")))
            wanted = min(wanted, spec["completions"] - status.get("succeeded", 0) - failed)
        elif status.get("succeeded"):
            wanted = len(active)
        surplus = self._surplus(job, active, len(active) - max(wanted, 0))
        if surplus:
            for pod in surplus:
                self._release(pod)
                self._delete(job, pod)
            return
        missing = wanted - len(active)
        if spec["podReplacementPolicy"] == "Failed":
            missing -= sum(map(is_terminating, pods))
        if missing > 0 and not self._waits(job):
            self._create(job, pods, missing)

    def _surplus(self, job: Object, active: list[Object], at_least: int) -> list[Object]:
        found: list[Object] = []
        if job["spec"]["completionMode"] == "Indexed":
            seen: set[int] = set()
            for pod in active:
                index = index_of(pod)
                if index is None or index in seen or index >= job["spec"]["completions"]:
                    found.append(pod)
                else:
                    seen.add(index)
        # Those with the least done first: not ready, not scheduled, the youngest.
        rest = sorted((p for p in active if p not in found), key=lambda p: (is_ready(p), "nodeName" in p["spec"]))
        return found + rest[: max(0, at_least - len(found))]

    def _delayed(self, job: Object, pod: Object) -> tuple[str, int]:
        """Whose delay a failure makes longer: with backoffLimitPerIndex each index has its own."""
        index = index_of(pod) if "backoffLimitPerIndex" in job["spec"] else None
        return job["metadata"]["uid"], -1 if index is None else index

    def _waits(self, job: Object, index: int = -1) -> bool:
        record = self._backoffs.get((job["metadata"]["uid"], index))
        if record is None:
            return False
        delay = min(self.backoff_s * 2 ** (record.failures - 1), 36 * self.backoff_s)
        return bool(time.monotonic() < record.last + delay)

    def _create(self, job: Object, pods: list[Object], number: int) -> None:
        spec, uid = job["spec"], job["metadata"]["uid"]
        chosen: list[int | None] = [None] * number
        if spec["completionMode"] == "Indexed":
            blocked = {index_of(p) for p in pods if is_active(p)}
            if spec["podReplacementPolicy"] == "Failed":
                blocked |= {index_of(p) for p in pods if is_terminating(p)}
            done = indexes(job["status"].get("completedIndexes", "")) | indexes(job["status"].get("failedIndexes", ""))
            blocked |= done
            free = (i for i in range(spec["completions"]) if i not in blocked and not self._waits(job, i))
            chosen = [index for _, index in zip(range(number), free, strict=False)]
        for index in chosen:
            pod = self._pod(job, index)
            try:
                made = kubeserver_admission.create(self.store, pod)
            except Refused as refused:
                if self._failed_creation.get(uid) != str(refused):
                    self._failed_creation[uid] = str(refused)
                    self.events.tell(job, "Warning", "FailedCreate", f"Error creating: {refused}", "job-controller")
                return
            self._failed_creation.pop(uid, None)
            words = f"Created pod: {made['metadata']['name']}"
            self.events.tell(job, "Normal", "SuccessfulCreate", words, "job-controller")

    def _pod(self, job: Object, index: int | None) -> Object:
        """ "Completion mode": the index is given as annotation, as label, "as part of the Pod hostname, following the
        pattern $(job-name)-$(index)", and in JOB_COMPLETION_INDEX."""
        template = copy.deepcopy(job["spec"]["template"])
        name = job["metadata"]["name"]
        metadata = template.setdefault("metadata", {})
        metadata["namespace"] = job["metadata"]["namespace"]
        metadata["generateName"] = f"{name[:57]}-" if index is None else f"{name[: 57 - len(str(index))]}-{index}-"
        metadata["finalizers"] = [*metadata.get("finalizers", ()), FINALIZER]
        metadata["ownerReferences"] = [
            {
                "apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job["metadata"]["uid"],
                "controller": True, "blockOwnerDeletion": True,
            }
        ]  # fmt: skip
        if index is not None:
            metadata.setdefault("annotations", {})[INDEX] = str(index)
            metadata.setdefault("labels", {})[INDEX] = str(index)
            template["spec"]["hostname"] = f"{name}-{index}"
            if "backoffLimitPerIndex" in job["spec"]:
                failures, ignored = self._per_index.get(job["metadata"]["uid"], {}).get(index, (0, 0))
                metadata["annotations"][FAILURES] = str(failures)
                if ignored:
                    metadata["annotations"][IGNORED] = str(ignored)
            source = {"fieldRef": {"apiVersion": "v1", "fieldPath": f"metadata.labels['{INDEX}']"}}
            for group in ("containers", "initContainers"):
                for container in template["spec"].get(group, ()):
                    if not any(one["name"] == "JOB_COMPLETION_INDEX" for one in container.get("env", ())):
                        container.setdefault("env", []).append({"name": "JOB_COMPLETION_INDEX", "valueFrom": source})
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}

    def _delete(self, job: Object, pod: Object) -> None:
        if self.store.find(*key_of(pod)) is None:
            return
        delete(self.store, key_of(pod), {"propagationPolicy": "Background"})
        words = f"Deleted pod: {pod['metadata']['name']}"
        self.events.tell(job, "Normal", "SuccessfulDelete", words, "job-controller")

    def _note_suspension(self, job: Object) -> None:
        """ "The Job's status can be used to determine if a Job is suspended or has been suspended in the past";
        resumed, "its .status.startTime field will be reset to the current time"."""
        conditions = job["status"].setdefault("conditions", [])
        found = next((c for c in conditions if c["type"] == "Suspended"), None)
        wanted = "True" if job["spec"]["suspend"] else "False"
        if (found is None and wanted == "False") or (found is not None and found["status"] == wanted):
            return
        word = "suspended" if wanted == "True" else "resumed"
        if found is not None:
            conditions.remove(found)
        conditions.append({
            "type": "Suspended", "status": wanted, "lastProbeTime": now(), "lastTransitionTime": now(),
            "reason": f"Job{word.capitalize()}", "message": f"Job {word}",
        })  # fmt: skip
        self.events.tell(job, "Normal", word.capitalize(), f"Job {word}", "job-controller")
        if wanted == "False":
            job["status"]["startTime"] = now()
