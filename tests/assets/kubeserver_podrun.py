"""One pod on its node, in a thread of its own: from what it waits for over its containers' starts and ends to its last
status. Which pods there are is kubeserver_kubelet.py's business.

Source: https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/ ("Lifecycle" below).
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import kubeserver_config
from kubeserver_conditions import set_condition
from kubeserver_config import Waits
from kubeserver_pod import Container, Sandbox
from kubeserver_store import Object, key_of, now, seconds_since

if TYPE_CHECKING:
    from kubeserver_kubelet import Kubelets

FINAL = ("Succeeded", "Failed")
POLL_S = 0.02


class Stopped(Exception):
    """The pod is being deleted."""


@dataclass(slots=True)
class PodRun:
    """One pod on its node, in a thread of its own, from its sandbox to its last status."""

    pod: Object
    kubelets: Kubelets
    place: int
    thread: threading.Thread = field(init=False)
    power: threading.Event = field(default_factory=threading.Event)  # set: the node is dead, nothing can be said
    stop: threading.Event = field(default_factory=threading.Event)
    grace_s: float = 30.0
    sandbox: Sandbox = field(init=False)
    running: dict[str, Container] = field(default_factory=dict)
    states: dict[str, Object] = field(default_factory=dict)  # container -> its status
    timed_out: bool = False

    def __post_init__(self) -> None:
        spec = self.pod["spec"]
        hostname = spec.get("hostname") or self.pod["metadata"]["name"][:63].rstrip("-.")
        self.sandbox = Sandbox(self.folder, hostname)
        for group in ("initContainers", "containers"):
            for container in spec.get(group, ()):
                self.states[container["name"]] = _status(container)
        self.thread = threading.Thread(target=self._run, daemon=True, name=f"kubelet {self.pod['metadata']['name']}")

    @property
    def folder(self) -> Path:
        return self.kubelets.root / "pods" / str(self.pod["metadata"]["uid"])

    @property
    def address(self) -> str:
        return self.kubelets.network.address(self.place)

    def log(self, container: str, restart: int) -> Path:
        return self.kubelets.root / "logs" / str(self.pod["metadata"]["uid"]) / f"{container}.{restart}"

    def end_power(self) -> None:
        """As if the node's plug was pulled."""
        self.power.set()
        self.sandbox.power_off()
        self.thread.join(20)

    def _run(self) -> None:
        try:
            with contextlib.suppress(Stopped):
                self._prepare()
                for container in self.pod["spec"].get("initContainers", ()):
                    self._run_init(container)
                for container in self.pod["spec"]["containers"]:
                    self._start(container)
                self._report("Running")
                self._watch()
            self._terminate()
        except OSError:
            if not self.power.is_set():  # a sandbox that dies with its node breaks whatever is under way
                raise
        finally:
            if not self.power.is_set():
                self.sandbox.power_off()
        if not self.power.is_set():
            self.finish()

    # The way up.

    def _prepare(self) -> None:
        self._report("Pending")
        memory = self._until_ready(lambda: kubeserver_config.prepare(self.pod, self.kubelets.cluster, self.folder))
        if self.power.is_set():
            raise Stopped
        self.sandbox.boot()
        if self.power.is_set():  # the plug was pulled before there was anything to switch off
            self.sandbox.power_off()
            raise Stopped
        self.kubelets.network.plug(self.sandbox.machine, self.place)
        for path, options in memory:
            self.sandbox.machine.run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path))
        self.pod["status"]["podIP"] = self.address
        self.pod["status"]["podIPs"] = [{"ip": self.address}]
        self._report("Pending")

    def _until_ready(self, attempt: object, container: str | None = None) -> list[tuple[Path, str]]:
        """`attempt()` again and again while it says what it waits for. Raises Stopped."""
        names = [container] if container else [one["name"] for one in self.pod["spec"]["containers"]]
        tries = 0
        while True:
            if self.stop.is_set() or self.power.is_set():
                raise Stopped
            try:
                found: list[tuple[Path, str]] = attempt()  # type: ignore[operator]
                return found
            except Waits as waits:
                reason = waits.reason
                if reason == "ErrImagePull" and tries:
                    # Lifecycle, https://kubernetes.io/docs/concepts/containers/images/#imagepullbackoff: "Kubernetes
                    # will keep trying to pull the image, with an increasing back-off delay".
                    reason = "ImagePullBackOff"
                for name in names:
                    shown = (
                        f'Back-off pulling image "{self._image(name)}"'
                        if reason == "ImagePullBackOff"
                        else waits.message
                    )
                    self.states[name]["state"] = {"waiting": {"reason": reason, "message": shown}}
                self._tell(waits, tries, names[0])
                self._report("Pending")
                tries += 1
                self.stop.wait(self.kubelets.retry_s)

    def _image(self, name: str) -> str:
        return str(self.states[name]["image"])

    def _tell(self, waits: Waits, tries: int, name: str) -> None:
        tell = self.kubelets.events.tell
        if waits.reason == "ErrImagePull":
            image = self._image(name)
            if tries:
                tell(self.pod, "Normal", "BackOff", f'Back-off pulling image "{image}"', "kubelet")
                tell(self.pod, "Warning", "Failed", "Error: ImagePullBackOff", "kubelet")
            else:
                tell(self.pod, "Warning", "Failed", f'Failed to pull image "{image}": {waits.message}', "kubelet")
                tell(self.pod, "Warning", "Failed", "Error: ErrImagePull", "kubelet")
        elif waits.message.startswith("MountVolume"):
            tell(self.pod, "Warning", "FailedMount", waits.message, "kubelet")
        else:
            tell(self.pod, "Warning", "Failed", f"Error: {waits.message}", "kubelet")

    def _start(self, container: Object, restart: int = 0) -> None:
        name = container["name"]

        def begin() -> list[tuple[Path, str]]:
            kubeserver_config.check_image(container)
            process = kubeserver_config.process(container, self.pod, self.kubelets.cluster, self.folder)
            started = Container(self.folder / f"start-{name}-{restart}", self.log(name, restart))
            started.start(self.sandbox.machine, process)
            self.running[name] = started
            return []

        self._until_ready(begin, name)
        status = self.states[name]
        status |= {"started": True, "ready": True, "restartCount": restart, "state": {"running": {"startedAt": now()}}}
        status["containerID"] = f"containerd://{self.pod['metadata']['uid']}-{name}-{restart}"
        self.kubelets.events.tell(self.pod, "Normal", "Started", f"Container {name} started", "kubelet")

    def _run_init(self, container: Object) -> None:
        """ "they each must complete successfully before the next one starts"."""
        self._start(container)
        one = self.running.pop(container["name"])
        self._report("Pending")
        while one.exit_code is None:
            self._look_up()
            time.sleep(POLL_S)
        self._note_end(container, one)
        if one.exit_code != 0:
            raise Stopped

    # While it runs.

    def _look_up(self) -> None:
        if self.stop.is_set() or self.power.is_set():
            raise Stopped
        limit = self.pod["spec"].get("activeDeadlineSeconds")
        if limit is not None and seconds_since(self.pod["status"]["startTime"]) >= limit:
            self.timed_out = True
            raise Stopped

    def _watch(self) -> None:
        """Until every container has ended for good."""
        containers = {one["name"]: one for one in self.pod["spec"]["containers"]}
        while self.running:
            self._look_up()
            for name, one in list(self.running.items()):
                if one.exit_code is None or self.power.is_set():
                    continue
                self._note_end(containers[name], one)
                del self.running[name]
                if not self._restart(containers[name], one):
                    self._report("Running")
            time.sleep(POLL_S)

    def _restart(self, container: Object, one: Container) -> bool:
        """Lifecycle, "Container restarts": Always, OnFailure, Never; "with an exponential backoff delay"."""
        policy = self.pod["spec"]["restartPolicy"]
        if policy == "Never" or (policy == "OnFailure" and one.exit_code == 0):
            return False
        name = container["name"]
        status = self.states[name]
        restart = status["restartCount"] + 1
        status["lastState"] = status["state"]
        status["state"] = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off restarting failed container"}}
        self._report("Running")
        if restart > 1 and self.stop.wait(self.kubelets.retry_s * 2 ** (restart - 2)):
            raise Stopped
        self._start(container, restart)
        self._report("Running")
        return True

    def _note_end(self, container: Object, one: Container) -> None:
        """Lifecycle, "Terminated": "a reason, an exit code, and the start and finish time"."""
        name, code = container["name"], one.exit_code
        status = self.states[name]
        begun = status["state"].get("running", {}).get("startedAt", now())
        reason = "Completed" if code == 0 else "StartError" if one.could_not_start else "Error"
        ended: Object = {"exitCode": code, "reason": reason, "startedAt": begun, "finishedAt": now()}
        if message := self._message(container, one):
            ended["message"] = message
        status |= {
            "ready": False,
            "started": False,
            "state": {"terminated": {**ended, "containerID": status.get("containerID", "")}},
        }

    def _message(self, container: Object, one: Container) -> str:
        """https://kubernetes.io/docs/tasks/debug/debug-application/determine-reason-pod-failure/: the last "4096 bytes"
        of the message's file; with FallbackToLogsOnError "the last chunk of container log output [...] limited to 2048
        bytes or 80 lines, whichever is smaller" where it is empty and the container failed."""
        text = (self.folder / f"message-{container['name']}").read_bytes()[-4096:].decode(errors="replace")
        if not text and one.exit_code and container["terminationMessagePolicy"] == "FallbackToLogsOnError":
            lines = one.log.read_bytes()[-2048:].decode(errors="replace").splitlines(keepends=True)
            text = "".join(lines[-80:])
        if one.could_not_start and not text:
            text = one.log.read_text(errors="replace").strip().rpartition("\n")[2]
        return text

    # The way down.

    def _terminate(self) -> None:
        """Lifecycle, "Termination of Pods": "the container runtime [is triggered] to send a TERM signal to process 1
        inside each container"; when the grace period is over SIGKILL "to any processes still running"."""
        if self.power.is_set():
            for one in self.running.values():
                one.kill()
            return
        for one in self.running.values():
            if self.grace_s > 0:
                one.signal(signal.SIGTERM)
        begun = time.monotonic()
        containers = {one["name"]: one for one in self.pod["spec"]["containers"]}
        while any(one.exit_code is None for one in self.running.values()) and time.monotonic() - begun < self.grace_s:
            if self.power.is_set():
                break
            time.sleep(POLL_S)
        for name, one in self.running.items():
            one.kill()
            if not self.power.is_set():
                self._note_end(containers[name], one)

    def finish(self) -> None:
        """Lifecycle, "Pod phase": Failed where "at least one container has terminated in failure"; "the kubelet
        transitions deleted Pods [...] to a terminal phase (Failed or Succeeded depending on the exit statuses of the
        pod containers) before their deletion from the API server"."""
        codes = []
        for status in self.states.values():
            if "terminated" not in status["state"]:
                words = "The container could not be located when the pod was terminated"
                state = {
                    "exitCode": 137,
                    "reason": "ContainerStatusUnknown",
                    "message": words,
                    "startedAt": None,
                    "finishedAt": None,
                }
                status |= {"state": {"terminated": state}, "ready": False, "started": False}
            codes.append(status["state"]["terminated"]["exitCode"])
        phase = "Failed" if any(codes) or self.timed_out else "Succeeded"
        if self.timed_out:
            self.pod["status"] |= {
                "reason": "DeadlineExceeded",
                "message": "Pod was active on the node longer than the specified deadline",
            }
        self._report(phase)
        self.kubelets.forget(self)

    def _report(self, phase: str) -> None:
        """What this kubelet knows into the pod's status; conditions that others have set stay."""
        while self.kubelets.is_silent(self.pod) and not self.power.is_set():
            time.sleep(POLL_S)  # cut off: it goes on and tries to tell
        if self.power.is_set():
            return
        status = self.pod["status"]
        status.setdefault("startTime", now())
        ready = phase == "Running" and all(self.states[c["name"]]["ready"] for c in self.pod["spec"]["containers"])
        initialized = phase == "Running" or all(
            "terminated" in self.states[c["name"]]["state"] for c in self.pod["spec"].get("initContainers", ())
        )
        ended = {"Succeeded": "PodCompleted", "Failed": "PodFailed"}.get(phase, "" if ready else "ContainersNotReady")
        groups = (("initContainerStatuses", "initContainers"), ("containerStatuses", "containers"))

        def change(one: Object) -> None:
            mine = {
                name: status[name] for name in ("startTime", "podIP", "podIPs", "reason", "message") if name in status
            }
            one["status"] |= {**mine, "phase": phase, "hostIP": self.kubelets.host_address(one["spec"]["nodeName"])}
            for group, names in groups:
                if self.pod["spec"].get(names):
                    one["status"][group] = [dict(self.states[c["name"]]) for c in self.pod["spec"][names]]
            set_condition(
                one, "PodReadyToStartContainers", "True" if "podIP" in status and phase not in FINAL else "False"
            )
            set_condition(one, "Initialized", "True" if initialized else "False")
            for kind in ("Ready", "ContainersReady"):
                set_condition(one, kind, "True" if ready else "False", ended)

        with self.kubelets.cluster.store.changed:
            found = self.kubelets.cluster.store.find(*key_of(self.pod))
            if found is not None and found["metadata"]["uid"] == self.pod["metadata"]["uid"]:
                self.kubelets.cluster.store.edit(key_of(self.pod), change)


def _status(container: Object) -> Object:
    return {
        "name": container["name"], "image": container["image"], "imageID": "", "ready": False, "started": False,
        "restartCount": 0, "state": {"waiting": {"reason": "ContainerCreating"}}, "lastState": {},
    }  # fmt: skip
