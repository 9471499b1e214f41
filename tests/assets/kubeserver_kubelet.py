"""The kubelets of the tests' Kubernetes: run the pods that are bound to their nodes and report what becomes of them.

Source: https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/ ("Lifecycle" below).
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kubeserver_config import Cluster
from kubeserver_events import Events
from kubeserver_podrun import FINAL, PodRun
from kubeserver_rest import Answer, Query, is_true
from kubeserver_store import Object, Refused, delete, key_of
from machines import Network


@dataclass(slots=True)
class Kubelets:
    """`root`: folder for what the pods need; `retry_s`: before what could not be done is tried again."""

    root: Path
    cluster: Cluster
    events: Events
    network: Network
    retry_s: float
    dead: set[str] = field(default_factory=set)  # nodes without power
    cut: set[str] = field(default_factory=set)  # nodes that work and that nobody hears
    runs: dict[str, PodRun] = field(default_factory=dict)  # by the pod's uid
    _places: Iterator[int] = field(default_factory=lambda: iter(()))
    _told: dict[str, str] = field(default_factory=dict)
    _lost: set[str] = field(default_factory=set)  # uids of pods that died with their node

    def sync(self) -> None:
        """Every pod once, under the store's lock."""
        store = self.cluster.store
        pods = [one for one in store.objects("pods") if one["spec"].get("nodeName")]
        for pod in pods:
            uid, metadata = pod["metadata"]["uid"], pod["metadata"]
            if self.is_silent(pod):
                continue
            run = self.runs.get(uid)
            if run is None and pod["status"].get("phase") not in FINAL:
                self._begin(pod)
            elif run is None and "deletionTimestamp" in metadata and metadata.get("deletionGracePeriodSeconds"):
                delete(store, key_of(pod), {"gracePeriodSeconds": 0})
            elif run is not None and "deletionTimestamp" in metadata:
                run.grace_s = float(metadata.get("deletionGracePeriodSeconds") or 0)
                run.stop.set()
        present = {one["metadata"]["uid"] for one in store.objects("pods")}
        for uid, run in list(self.runs.items()):
            if uid not in present and not self.is_silent(run.pod):
                # Lifecycle, "Forced Pod termination": it "waits for no confirmation from the kubelet"; the node gives
                # such a pod "a small grace period before being force killed".
                run.grace_s = min(run.grace_s, 2.0)
                run.stop.set()
        for folder in (self.root / "logs").iterdir() if (self.root / "logs").is_dir() else ():
            if folder.name not in present and folder.name not in self.runs:
                shutil.rmtree(folder, ignore_errors=True)

    def _begin(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        if uid in self._lost:
            # The node has come back without what ran on it.
            run = PodRun(pod, self, 0)
            self._lost.discard(uid)
            run.finish()
            return
        if "deletionTimestamp" in pod["metadata"]:
            run = PodRun(pod, self, 0)
            run.finish()
            return
        self.runs[uid] = run = PodRun(pod, self, self._place())
        run.thread.start()

    def _place(self) -> int:
        taken = {run.place for run in self.runs.values()}
        for _ in range(480):
            place = next(self._places, 0)
            if not place:
                self._places = iter(range(1, 240))
            elif place not in taken:
                return place
        raise RuntimeError("no address is left for another pod")

    def forget(self, run: PodRun) -> None:
        """Its last status has been written. A pod that is being deleted goes with it."""
        with self.cluster.store.changed:
            self.runs.pop(run.pod["metadata"]["uid"], None)
            shutil.rmtree(run.folder, ignore_errors=True)
            found = self.cluster.store.find(*key_of(run.pod))
            mine = found is not None and found["metadata"]["uid"] == run.pod["metadata"]["uid"]
            if mine and found is not None and "deletionTimestamp" in found["metadata"]:
                delete(self.cluster.store, key_of(run.pod), {"gracePeriodSeconds": 0})
            self.cluster.store.changed.notify_all()

    def kill_node(self, name: str) -> None:
        self.dead.add(name)
        for run in self._on(name):
            uid = run.pod["metadata"]["uid"]
            run.end_power()
            self._lost.add(uid)
            self.runs.pop(uid, None)
            shutil.rmtree(run.folder, ignore_errors=True)

    def boot_node(self, name: str) -> None:
        self.dead.discard(name)

    def cut_node(self, name: str) -> None:
        self.cut.add(name)
        for run in self._on(name):
            self.network.cut(run.place)

    def heal_node(self, name: str) -> None:
        if name in self.cut:
            for run in self._on(name):
                self.network.heal(run.place)
            self.cut.discard(name)

    def is_silent(self, pod: Object) -> bool:
        return pod["spec"].get("nodeName") in self.dead | self.cut

    def _on(self, name: str) -> list[PodRun]:
        return [run for run in self.runs.values() if run.pod["spec"]["nodeName"] == name]

    def host_address(self, node: str) -> str:
        found = self.cluster.store.find("nodes", "", node)
        return str(found["status"]["addresses"][0]["address"]) if found else ""

    def end(self) -> None:
        for run in list(self.runs.values()):
            run.end_power()
        self.runs.clear()

    # Names.

    def tell_names(self) -> None:
        """https://kubernetes.io/docs/concepts/services-networking/dns-pod-service/: a headless service's name "resolves
        to the set of IPs of all of the Pods selected by the Service", and a pod with hostname and subdomain has a name
        "hostname.subdomain" there "if there exists a headless Service in the same namespace [...] with the same name as
        the subdomain". Names of pods that are not ready only with publishNotReadyAddresses."""
        for run in list(self.runs.values()):
            namespace = run.pod["metadata"]["namespace"]
            own = run.sandbox.hostname
            subdomain = run.pod["spec"].get("subdomain")
            full = f"{own}.{subdomain}.{namespace}.svc.cluster.local {own}" if subdomain else own
            lines = ["127.0.0.1 localhost", f"{run.address} {full}", *self._records(namespace)]
            text = "".join(f"{line}\n" for line in lines)
            uid = run.pod["metadata"]["uid"]
            if self._told.get(uid) != text and run.sandbox.hosts.exists():
                with contextlib.suppress(OSError):
                    run.sandbox.tell_names(text)
                    self._told[uid] = text

    def _records(self, namespace: str) -> Iterator[str]:
        pods = [one for one in self.cluster.store.objects("pods", namespace) if one["status"].get("podIP")]
        for service in self.cluster.store.objects("services", namespace):
            name, spec = service["metadata"]["name"], service["spec"]
            if spec.get("clusterIP") != "None":
                yield f"{spec.get('clusterIP')} {_names(name, namespace)}"
                continue
            for pod in pods:
                labels = pod["metadata"].get("labels", {})
                fits = spec.get("selector") and all(labels.get(k) == v for k, v in spec["selector"].items())
                ready = any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", ()))
                if not fits or pod["status"]["phase"] in FINAL or not (ready or spec.get("publishNotReadyAddresses")):
                    continue
                hostname = pod["spec"].get("hostname")
                named = hostname and pod["spec"].get("subdomain") == name
                both = f"{_names(f'{hostname}.{name}', namespace)} " if named else ""
                yield f"{pod['status']['podIP']} {both}{_names(name, namespace)}"

    # Logs.

    def logs(self, pod: Object, query: Query) -> Answer:
        """https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/, "read log of the specified
        Pod". Raises Refused."""
        names = [one["name"] for group in ("initContainers", "containers") for one in pod["spec"].get(group, ())]
        container = query.get("container") or names[-1]
        title = f'container "{container}" in pod "{pod["metadata"]["name"]}"'
        if not query.get("container") and len(pod["spec"]["containers"]) > 1:
            words = f"a container name must be specified for pod {pod['metadata']['name']}, choose one of: {names}"
            raise Refused(400, "BadRequest", words)
        if container not in names:
            raise Refused(400, "BadRequest", f"container {container} is not valid for pod {pod['metadata']['name']}")
        unsupported = {"sinceSeconds", "sinceTime", "timestamps", "stream"} & set(query)
        if unsupported:
            raise Refused(501, "NotImplemented", f"not simulated: {', '.join(unsupported)}")
        if self.is_silent(pod):
            words = (
                f'Get "https://{pod["status"].get("hostIP")}:10250/containerLogs": dial tcp: connect: no route to host'
            )
            raise Refused(500, "InternalError", words)
        statuses = pod["status"].get("containerStatuses", []) + pod["status"].get("initContainerStatuses", [])
        status = next((one for one in statuses if one["name"] == container), None)
        restart = (status or {}).get("restartCount", 0)
        if is_true(query, "previous"):
            if not restart:
                raise Refused(400, "BadRequest", f"previous terminated {title} not found")
            restart -= 1
        path = self.root / "logs" / pod["metadata"]["uid"] / f"{container}.{restart}"
        if not path.exists():
            reason = (status or {"state": {}})["state"].get("waiting", {}).get("reason", "ContainerCreating")
            raise Refused(400, "BadRequest", f"{title} is waiting to start: {reason}")
        follow = is_true(query, "follow")
        return Answer(stream=self._lines(path, pod, query, follow), content_type="text/plain")

    def _lines(self, path: Path, pod: Object, query: Query, follow: bool) -> Iterator[bytes]:
        with open(path, "rb") as file:
            begun = file.read()
            if "tailLines" in query:
                count = int(query["tailLines"])
                begun = b"".join(begun.splitlines(keepends=True)[-count:]) if count else b""
            left = int(query["limitBytes"]) if "limitBytes" in query else None
            yield begun[:left]
            while follow and left is None:
                ended = pod["metadata"]["uid"] not in self.runs
                if part := file.read():
                    yield part
                elif ended:
                    return
                else:
                    time.sleep(0.05)
                    yield b""


def _names(name: str, namespace: str) -> str:
    """The forms that the search list of a pod's /etc/resolv.conf makes equal."""
    return " ".join(
        f"{name}{end}" for end in ("", f".{namespace}", f".{namespace}.svc", f".{namespace}.svc.cluster.local")
    )
