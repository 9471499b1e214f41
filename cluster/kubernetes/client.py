"""The Kubernetes API, by the official client: who is asked and with which rights is its affair (kubeconfig, exec
plugins, a pod's service account). Objects are plain JSON here. A busy or silent server is met with patience; what it
refuses is an error with its words.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.cluster.errors import DtrainError, UnclearError, UsageError

Object = dict[str, Any]

_TIMEOUT_S = (5.0, 20.0)  # to connect, and to answer
_PATIENCE_S = 20.0  # with a server that says that it is busy, or says nothing
_LOOK_S = 5.0  # the same for a question that is asked again and again, or that somebody waits for
_PAUSE_S = (0.25, 0.5, 1.0, 2.0, 4.0)
_MAX_PAUSE_S = 10.0
_BUSY = frozenset({0, 429, 500, 502, 503, 504})  # 0: the client's own, for a connection that broke
_TRACKING = "batch.kubernetes.io/job-tracking"
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
INSTALL = "pip install 'dtrain[kubernetes]'"


class KubernetesUnreachable(UnclearError):
    """The API server does not answer: what was asked may have happened or not."""


class KubernetesRefused(DtrainError):
    """The API server says no. `status`: of HTTP."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a job's objects are: a context of the kubeconfig ("": the pod's own cluster), and a namespace there."""

    context: str
    namespace: str


def is_installed() -> bool:
    return importlib.util.find_spec("kubernetes") is not None


def in_pod() -> bool:
    """Whether this process runs in a pod that may ask the API."""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and (_ACCOUNT / "token").exists()


def find_place(context: str | None, namespace: str | None) -> Place:
    """Raises UsageError where no cluster is known."""
    config = _config()
    if context is None and not _has_kubeconfig() and in_pod():
        return Place(context="", namespace=namespace or (_ACCOUNT / "namespace").read_text().strip())
    try:
        contexts, current = config.list_kube_config_contexts(_kubeconfig())
    except (config.ConfigException, OSError, TypeError, KeyError) as error:
        raise UsageError(
            f"no Kubernetes cluster is known here: {error}. Set KUBECONFIG, or see `kubectl config`."
        ) from error
    chosen = current if context is None else next((one for one in contexts if one["name"] == context), None)
    if not chosen:
        names = ", ".join(str(one["name"]) for one in contexts)
        raise UsageError(f"cluster.kubernetes.context: there is no context {context}. There are: {names}.")
    return Place(context=chosen["name"], namespace=namespace or chosen["context"].get("namespace") or "default")


def _config() -> Any:
    if not is_installed():
        raise UsageError(f"backend kubernetes needs the package kubernetes. {INSTALL}")
    import kubernetes.config

    return kubernetes.config


def _kubeconfig() -> str:
    return os.environ.get("KUBECONFIG") or os.path.expanduser("~/.kube/config")


def _has_kubeconfig() -> bool:
    return any(os.path.exists(path) for path in _kubeconfig().split(os.pathsep))


@functools.lru_cache(maxsize=4)
def connect(place: Place) -> Client:
    """Nothing is sent yet. Raises UsageError."""
    config = _config()
    import kubernetes.client

    settings = kubernetes.client.Configuration()
    settings.retries = False  # they are ours
    try:
        if place.context:
            config.load_kube_config(_kubeconfig(), context=place.context, client_configuration=settings)
        else:
            config.load_incluster_config(client_configuration=settings)
    except (config.ConfigException, OSError) as error:
        raise UsageError(f"the cluster of context {place.context or 'this pod'} can't be used: {error}") from error
    return Client(kubernetes.client.ApiClient(settings), place.namespace, _PATIENCE_S)


class Client:
    """Of one namespace. All methods raise KubernetesRefused, KubernetesUnreachable."""

    def __init__(self, api: Any, namespace: str, patience_s: float) -> None:
        import kubernetes.client

        self._api, self._patience_s = api, patience_s
        self._batch = kubernetes.client.BatchV1Api(api)
        self._core = kubernetes.client.CoreV1Api(api)
        self._authorization = kubernetes.client.AuthorizationV1Api(api)
        self.namespace = namespace

    def for_looks(self) -> Client:
        """The same with less patience."""
        return Client(self._api, self.namespace, _LOOK_S)

    def create(self, body: Object, *, dry_run: bool = False) -> Object:
        """By its kind; unknown fields are refused."""
        create = {
            "Job": self._batch.create_namespaced_job,
            "Service": self._core.create_namespaced_service,
            "Pod": self._core.create_namespaced_pod,
        }[body["kind"]]
        only = {"dry_run": "All"} if dry_run else {}
        return self._ask(create, self.namespace, body, field_validation="Strict", **only)

    def job(self, name: str) -> Object | None:
        return self._find(self._batch.read_namespaced_job, name)

    def service(self, name: str) -> Object | None:
        return self._find(self._core.read_namespaced_service, name)

    def pods(self, selector: str) -> list[Object]:
        return self._list(self._core.list_namespaced_pod, label_selector=selector)

    def events(self, name: str) -> list[Object]:
        """About the object of that name, oldest first."""
        found = self._list(self._core.list_namespaced_event, field_selector=f"involvedObject.name={name}")
        return sorted(found, key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""))

    def quotas(self) -> list[Object]:
        return self._list(self._core.list_namespaced_resource_quota)

    def log(self, pod: str, lines: int) -> str:
        """The last lines that the pod's agent printed."""
        read = self._core.read_namespaced_pod_log
        raw = self._raw(read, pod, self.namespace, container="agent", tail_lines=lines)
        return bytes(raw).decode(errors="replace")

    def delete_job(self, name: str) -> None:
        """With its pods and its Service; they are given their grace. Done where there is none."""
        self._delete(self._batch.delete_namespaced_job, name, propagation_policy="Background")

    def delete_pod(self, pod: Object, grace_s: int) -> None:
        """This very pod and none of the same name; 0: without waiting for its machine to say that it is gone."""
        meta = pod["metadata"]
        body = {"preconditions": {"uid": meta["uid"]}, "gracePeriodSeconds": grace_s}
        self._delete(self._core.delete_namespaced_pod, meta["name"], body=body)

    def remove_pod(self, pod: Object) -> None:
        """One whose machine will never answer. A Job's pod has a finalizer, which the Job controller takes off when it
        has counted the pod as failed; one that is gone without that is only replaced (kubernetes.io, Jobs, Job tracking
        with finalizers)."""
        self.delete_pod(pod, grace_s=0)
        meta = pod["metadata"]
        others = [one for one in meta.get("finalizers") or [] if one != _TRACKING]
        patch = [
            {"op": "test", "path": "/metadata/uid", "value": meta["uid"]},
            {"op": "add", "path": "/metadata/finalizers", "value": others},
        ]
        try:
            self._ask(self._core.patch_namespaced_pod, meta["name"], self.namespace, patch)
        except KubernetesRefused as error:
            if error.status not in (404, 409, 422):  # gone, or another one by now
                raise

    def may(self, verb: str, group: str, resource: str, subresource: str = "") -> tuple[bool, str]:
        """Whether we may, and what the cluster says to it."""
        attributes = {
            "namespace": self.namespace, "verb": verb, "group": group, "resource": resource, "subresource": subresource,
        }  # fmt: skip
        body = {
            "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }  # fmt: skip
        status = self._ask(self._authorization.create_self_subject_access_review, body)["status"]
        return bool(status.get("allowed")), str(status.get("reason") or "")

    def _find(self, read: Callable[..., Any], name: str) -> Object | None:
        try:
            return self._ask(read, name, self.namespace)
        except KubernetesRefused as error:
            if error.status == 404:
                return None
            raise

    def _list(self, listing: Callable[..., Any], **options: Any) -> list[Object]:
        items: list[Object] = []
        token = ""
        while True:
            found = self._ask(listing, self.namespace, limit=500, **options, **({"_continue": token} if token else {}))
            items += found.get("items") or []
            token = (found.get("metadata") or {}).get("continue") or ""
            if not token:
                return items

    def _delete(self, delete: Callable[..., Any], name: str, **options: Any) -> None:
        try:
            self._ask(delete, name, self.namespace, **options)
        except KubernetesRefused as error:
            if error.status not in (404, 409):  # gone, or another one by now
                raise

    def _ask(self, call: Callable[..., Any], *args: Any, **options: Any) -> Object:
        answer: Object = json.loads(self._raw(call, *args, **options))
        return answer

    def _raw(self, call: Callable[..., Any], *args: Any, **options: Any) -> bytes:
        """Asks until there is an answer, or patience ends. To repeat a request that may have arrived is safe: names are
        ours and deletions name a uid."""
        import kubernetes.client
        import urllib3

        deadline = time.monotonic() + self._patience_s
        for pause_s in _pauses():
            try:
                found = call(*args, **options, _preload_content=False, _request_timeout=_TIMEOUT_S)
                return bytes(found.data)
            except kubernetes.client.ApiException as error:
                if error.status not in _BUSY:
                    raise _refused(error) from error
                pause_s, words = max(pause_s, _retry_after(error)), f"HTTP {error.status}: {_words(error)}"
            except AttributeError as error:  # client 36, of a broken TLS connection: it decodes an answer that is None
                if not isinstance(error.__context__, kubernetes.client.ApiException):
                    raise
                words = str(error.__context__.reason)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                words = str(error)
            if time.monotonic() + pause_s > deadline:
                raise KubernetesUnreachable(f"the Kubernetes API does not answer: {' '.join(words.split())}")
            time.sleep(pause_s)
        raise AssertionError("pauses do not end")


def _pauses() -> Iterator[float]:
    yield from _PAUSE_S
    while True:
        yield _PAUSE_S[-1]


def _retry_after(error: Any) -> float:
    with contextlib.suppress(TypeError, ValueError):
        return min(_MAX_PAUSE_S, float(str((error.headers or {}).get("Retry-After"))))
    return 0.0


def _refused(error: Any) -> KubernetesRefused:
    return KubernetesRefused(int(error.status or 0), _words(error))


def _words(error: Any) -> str:
    """The message of the Status object that Kubernetes answers with."""
    with contextlib.suppress(TypeError, ValueError, AttributeError):
        message = json.loads(error.body).get("message")
        if message:
            return str(message)
    return str(error.reason or "no reason was given")
