"""A Kubernetes for tests: API server, Job controller, scheduler, garbage collector and the kubelets of four nodes, in
threads of this process; pods are real processes, each pod on a simulated computer (machines.py).

    with kube_server(root) as kubernetes:
        kubernetes.kubeconfig                    # for a client with the rights of the ClusterRole `edit` in `default`
        kubernetes.kill_node("node3")            # a power failure

It does for Jobs, Pods, Services and Secrets what the API's documentation says, in the passages that its parts
(kubeserver_*.py) quote; what it does not simulate it refuses: probes, hooks, server-side apply, disruption budgets.
Delays of the real one that only make tests slow are shortened: Delays.
"""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import shutil
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import kubeserver_credentials
import kubeserver_owners
from debian import Missing
from kubeserver_access import EDIT, Rule, User
from kubeserver_admission import plain, used_of
from kubeserver_conditions import evict
from kubeserver_config import Cluster
from kubeserver_events import Events
from kubeserver_faults import Faults
from kubeserver_http import HttpServer
from kubeserver_jobs import JobController
from kubeserver_kubelet import Kubelets
from kubeserver_nodes import UNSCHEDULABLE, NodeLifecycle, Scheduler, node
from kubeserver_rest import Api
from kubeserver_security import LEVEL
from kubeserver_store import Object, Refused, Store, delete, key_of, now
from machines import Machine, Network

PROGRAMS = ("ip", "unshare", "nsenter", "setsid", "setpriv", "bash", "mount", "openssl")
NAMESPACE = "default"
CAPACITY = {"cpu": "8", "memory": "32Gi", "ephemeral-storage": "100Gi", "pods": "110", "nvidia.com/gpu": "2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Delays:
    """In seconds; beside each what the real one takes."""

    backoff_s: float = 0.1  # 10: before the first replacement of a failed pod, doubled each time
    node_grace_s: float = 1.0  # 50: from a node's last word to its taint
    toleration_scale: float = 0.05  # 1: of tolerationSeconds
    retry_s: float = 0.2  # 10: before what a kubelet could not do is tried again
    podgc_s: float = 0.5  # 20: between two looks for pods that nobody ends


class KubeServer:
    """`root`: an empty folder with a short path. Methods that wait raise TimeoutError."""

    def __init__(self, root: Path, *, nodes: int = 4, delays: Delays | None = None) -> None:
        self.root = root
        self.nodes = [f"node{i}" for i in range(1, nodes + 1)]
        self.namespace = NAMESPACE
        self.delays = delays or Delays()
        self.store = Store()
        self.faults = Faults()
        self.user = User(name="dtrain", rules=EDIT, namespace=NAMESPACE)
        self.failures: list[str] = []  # what broke in the server itself
        self._users: dict[str, User] = {
            secrets.token_hex(16): self.user,
            secrets.token_hex(16): User(name="admin", rules=None),
        }
        self._accounts: dict[tuple[str, str], str] = {}  # service account -> token
        self._closing = threading.Event()
        self._servers: list[HttpServer] = []
        self._network: Network | None = None

    @property
    def host_address(self) -> str:
        """At which pods reach this host."""
        assert self._network is not None
        return self._network.host_address

    # The whole.

    def start(self) -> None:
        """Raises Missing where the parts are not to be had."""
        if os.geteuid() != 0:
            raise Missing("Kubernetes for tests needs root: each of its pods has namespaces of its own")
        if lacking := [name for name in PROGRAMS if shutil.which(name) is None]:
            raise Missing(
                f"Kubernetes for tests needs {', '.join(lacking)}: apt-get install iproute2 util-linux openssl"
            )
        self.root.chmod(0o755)
        self._network = network = Network()
        self._switch = Machine("switch", self.root, {}, {})
        try:
            self._switch.boot()
            network.open(self._switch)
            events = Events(self.store)
            kubeserver_credentials.certify(self.root, network.host_address)
            cluster = self._cluster(network)
            self.kubelets = Kubelets(self.root, cluster, events, network, self.delays.retry_s)
            self._jobs = JobController(self.store, events, self.delays.backoff_s)
            self._scheduler = Scheduler(self.store, events)
            grace, scale = self.delays.node_grace_s, self.delays.toleration_scale
            self._lifecycle = NodeLifecycle(self.store, events, grace, scale)
            self.api = Api(self.store, self.kubelets.logs, self._closing.is_set)
            self._furnish()
            self._listen(network, cluster)
        except BaseException:
            self.stop()
            raise
        self._control = threading.Thread(target=self._run, daemon=True, name="kube-control")
        self._control.start()

    def _cluster(self, network: Network) -> Cluster:
        with socket.socket() as probe:
            probe.bind((network.host_address, 0))
            self._inner_port = int(probe.getsockname()[1])
        ca = (self.root / "ca.crt").read_bytes()
        return Cluster(
            store=self.store, api_host=network.host_address, api_port=self._inner_port, ca=ca,
            token=self._account_token,
        )  # fmt: skip

    def _listen(self, network: Network, cluster: Cluster) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.root / "ca.crt", self.root / "ca.key")
        for address, port in (("127.0.0.1", 0), (network.host_address, cluster.api_port)):
            server = HttpServer(address, port, context, self.api, self._users, self.faults)
            server.begin()
            self._servers.append(server)
        for name, token in zip(("kubeconfig", "admin.kubeconfig"), self._users, strict=False):
            kubeserver_credentials.write_kubeconfig(self.root / name, self.root / "ca.crt", self.url, token)

    def stop(self) -> None:
        """Leaves no process, network, mount or file."""
        self._closing.set()
        with self.store.changed:
            self.store.changed.notify_all()
        if hasattr(self, "_control"):
            self._control.join(20)
        for server in self._servers:
            server.end()
        if hasattr(self, "kubelets"):
            self.kubelets.end()
        if self._network is not None:
            self._switch.power_off()
            self._network.close()
        for entry in self.root.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def clear(self) -> list[str]:
        """As at the beginning: no faults, every node up, no object of a user's. Returns what was there: `Job name`."""
        self.faults.clear()
        for name in self.nodes:
            self.heal_node(name)
            self.boot_node(name)
        left = [f"{one['kind']} {one['metadata']['name']}" for one in self._foreign()]
        for one in self._foreign():
            with contextlib.suppress(Refused):
                delete(self.store, key_of(one), {"propagationPolicy": "Background", "gracePeriodSeconds": 0})
        for run in list(self.kubelets.runs.values()):
            run.grace_s = 0.0
            run.stop.set()
        self.wait(lambda: not self._foreign() and not self.kubelets.runs, words=lambda: str(self._foreign()))
        with self.store.changed:
            for one in (*self.store.objects("events"), *self.store.objects("resourcequotas")):
                self.store.remove(key_of(one))
        self.user.rules = EDIT
        self.secure("privileged")
        if self.failures:
            raise AssertionError("the server itself broke:\n" + "\n".join(self.failures))
        return left

    def _foreign(self) -> list[Object]:
        kinds = ("jobs", "services", "pods", "secrets", "configmaps", "persistentvolumeclaims", "persistentvolumes")
        return [one for kind in kinds for one in self.store.objects(kind)]

    # Clients.

    @property
    def kubeconfig(self) -> Path:
        """Of a user with the rights self.user.rules, at first those of `edit`, in the namespace."""
        return self.root / "kubeconfig"

    @property
    def admin_kubeconfig(self) -> Path:
        return self.root / "admin.kubeconfig"

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._servers[0].port}"

    def client(self, *, admin: bool = True) -> Any:
        """A kubernetes.client.ApiClient, with which to look at the server past our own code. Close it."""
        import kubernetes.config

        path = self.admin_kubeconfig if admin else self.kubeconfig
        return kubernetes.config.new_client_from_config(config_file=str(path))

    def allow(self, rules: Sequence[Rule]) -> None:
        """What self.kubeconfig's user may do from now on, until clear()."""
        self.user.rules = tuple(rules)

    def add_service_account(self, name: str, rules: Sequence[Rule]) -> None:
        metadata = {"name": name, "namespace": NAMESPACE}
        self.store.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})
        self._users[self._account_token(NAMESPACE, name)].rules = tuple(rules)

    def add_claim(self, name: str, path: Path) -> None:
        """A bound PersistentVolumeClaim whose volume is this folder."""
        volume = f"pv-{name}"
        self.store.create({
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume},
            "spec": {"hostPath": {"path": str(path)}, "capacity": {"storage": "1Ti"}, "accessModes": ["ReadWriteMany"]},
            "status": {"phase": "Bound"},
        })  # fmt: skip
        self.store.create({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {"volumeName": volume, "accessModes": ["ReadWriteMany"]},
            "status": {"phase": "Bound", "capacity": {"storage": "1Ti"}},
        })  # fmt: skip

    def add_secret(self, name: str, values: dict[str, str]) -> None:
        encoded = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
        metadata = {"name": name, "namespace": NAMESPACE}
        self.store.create(
            {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "data": encoded}
        )

    def secure(self, level: str) -> None:
        """baseline or restricted, of Pod Security, until clear(); privileged is none."""
        label = {LEVEL: level}
        self.store.edit(("namespaces", "", NAMESPACE), lambda one: one["metadata"].update(labels=label))

    def add_quota(self, name: str, hard: dict[str, str]) -> None:
        metadata = {"name": name, "namespace": NAMESPACE}
        self.store.create(
            {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": {"hard": hard}, "status": {}}
        )

    # What is there.

    def job(self, name: str) -> Object:
        return self.store.get("jobs", NAMESPACE, name)

    def pods(self) -> list[Object]:
        return self.store.objects("pods", NAMESPACE)

    def pod_processes(self, name: str) -> dict[int, str]:
        """pid on this host -> command line of what runs in a pod's containers."""
        pod = self.store.get("pods", NAMESPACE, name)
        run = self.kubelets.runs.get(pod["metadata"]["uid"])
        containers = [*run.running.values()] if run else []
        return {pid: line for one in containers for pid, line in one.processes().items()}

    def wait(self, ready: Callable[[], object], timeout_s: float = 30.0, words: Callable[[], str] = lambda: "") -> None:
        deadline = time.monotonic() + timeout_s
        while not ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"Kubernetes: not so within {timeout_s} s. {words()}")
            time.sleep(0.02)

    # Nodes.

    def kill_node(self, name: str) -> None:
        """A power failure: its pods' processes are gone when this returns; the API notices later."""
        self.kubelets.kill_node(name)
        self._lifecycle.silence(name)

    def boot_node(self, name: str) -> None:
        """What ran there before is reported as failed."""
        self.kubelets.boot_node(name)
        self._lifecycle.hear(name)
        self.uncordon(name)

    def cut_node(self, name: str) -> None:
        """Its pods go on, reach nobody and are reached by nobody, the API included."""
        self.kubelets.cut_node(name)
        self._lifecycle.silence(name)

    def heal_node(self, name: str) -> None:
        """It hears now what was decided meanwhile."""
        self.kubelets.heal_node(name)
        self._lifecycle.hear(name)

    def cordon(self, name: str) -> None:
        def change(one: Object) -> None:
            one["spec"] |= {"unschedulable": True}
            taints = one["spec"].setdefault("taints", [])
            if not any(taint["key"] == UNSCHEDULABLE for taint in taints):
                taints.append({"key": UNSCHEDULABLE, "effect": "NoSchedule"})

        self.store.edit(("nodes", "", name), change)

    def uncordon(self, name: str) -> None:
        def change(one: Object) -> None:
            one["spec"].pop("unschedulable", None)
            left = [taint for taint in one["spec"].pop("taints", []) if taint["key"] != UNSCHEDULABLE]
            if left:
                one["spec"]["taints"] = left

        self.store.edit(("nodes", "", name), change)

    def drain(self, name: str) -> None:
        """As `kubectl drain`: no new pods, and every one there is evicted."""
        self.cordon(name)
        for pod in self.pods():
            if pod["spec"].get("nodeName") == name:
                self.evict(pod["metadata"]["name"])

    def evict(self, pod: str) -> None:
        with self.store.changed:
            found = self.store.get("pods", NAMESPACE, pod)
            evict(self.store, found, "EvictionByEvictionAPI", "Eviction API: evicting", {})

    def taint(self, name: str, key: str, effect: str, value: str = "") -> None:
        """Such as node.kubernetes.io/out-of-service; boot_node() takes that one off."""
        entry = {"key": key, "effect": effect, "value": value, "timeAdded": now()}
        self.store.edit(("nodes", "", name), lambda one: one["spec"].setdefault("taints", []).append(entry))

    # Its parts.

    def _run(self) -> None:
        collected = 0.0
        while not self._closing.is_set():
            try:
                with self.store.changed:
                    before = self.store.version
                    self._lifecycle.sync()
                    self._jobs.sync()
                    self._scheduler.sync()
                    kubeserver_owners.collect(self.store)
                    if time.monotonic() - collected > self.delays.podgc_s:
                        collected = time.monotonic()
                        kubeserver_owners.collect_pods(self.store)
                    self._use_quotas()
                    self.kubelets.sync()
                    self.kubelets.tell_names()
                    if self.store.version == before:
                        self.store.changed.wait(0.1)
            except Exception:  # told by clear(); the others go on
                self.failures.append(traceback.format_exc())
                time.sleep(0.5)

    def _use_quotas(self) -> None:
        for quota in self.store.objects("resourcequotas"):
            used = used_of(self.store, quota["metadata"]["namespace"])
            shown = {key: plain(used[key]) if key in used else "0" for key in quota["spec"].get("hard", {})}
            status = {"hard": quota["spec"].get("hard", {}), "used": shown}
            self.store.edit(key_of(quota), partial(dict.update, status=status))

    def _furnish(self) -> None:
        for name in ("default", "kube-system"):
            self.store.create({
                "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name},
                "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"},
            })  # fmt: skip
            metadata = {"name": "default", "namespace": name}
            self.store.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})
        for number, name in enumerate(self.nodes, start=1):
            labels = {"topology.kubernetes.io/zone": f"zone{number % 2}", "example.com/rack": str(number)}
            self.store.create(node(name, f"192.0.2.{number}", CAPACITY, labels))

    def _account_token(self, namespace: str, name: str) -> str:
        token = self._accounts.get((namespace, name))
        if token is None:
            token = self._accounts[namespace, name] = secrets.token_hex(16)
            user = User(name=f"system:serviceaccount:{namespace}:{name}", rules=(), namespace=namespace)
            self._users[token] = user
            for server in self._servers:
                server.users[token] = user
        return token


@contextlib.contextmanager
def kube_server(root: Path, *, nodes: int = 4, delays: Delays | None = None) -> Iterator[KubeServer]:
    """Raises Missing."""
    server = KubeServer(root, nodes=nodes, delays=delays)
    server.start()
    try:
        yield server
    finally:
        server.stop()
