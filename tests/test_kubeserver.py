"""The tests' Kubernetes (assets/kubeserver.py) does what the API's documents say, seen through the official client.

What dtrain makes of it is other files' business.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import kubeserver_admission
import pytest
from debian import Missing
from kubeclient import NS, affinity, condition, delete, job, log, refused, running, wait_condition
from kubeserver import KubeServer
from kubeserver_access import Rule

pytestmark = pytest.mark.slow


def test_indexed_job_to_its_last_condition(kubernetes: KubeServer, batch: Any, core: Any, tmp_path: Path) -> None:
    service = {
        "metadata": {"name": "run"},
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": "run"}},
    }
    core.create_namespaced_service(NS, service)
    script = """echo "$JOB_COMPLETION_INDEX $HOSTNAME $$$$"
        if [ "$JOB_COMPLETION_INDEX" = 0 ]; then
            until getent hosts run-0.run && getent hosts run-1.run.default.svc; do sleep 0.05; done
            touch /data/seen
        else
            until [ -e /data/seen ]; do sleep 0.05; done
            while getent hosts run-0.run; do sleep 0.05; done  # the name goes with the pod
        fi"""
    made = job("run", script, template={"volumes": [{"name": "data", "hostPath": {"path": str(tmp_path)}}]})
    made["spec"]["template"]["spec"]["containers"][0]["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
    batch.create_namespaced_job(NS, made)
    wait_condition(kubernetes, "run", "Complete")
    status = kubernetes.job("run")["status"]
    assert (status["succeeded"], status["completedIndexes"], status.get("active")) == (2, "0,1", None)
    assert [c["type"] for c in status["conditions"]] == ["SuccessCriteriaMet", "Complete"]
    for index, pod in enumerate(sorted(kubernetes.pods(), key=lambda one: one["metadata"]["name"])):
        assert pod["metadata"]["name"].startswith(f"run-{index}-")
        assert pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] == str(index)
        assert "finalizers" not in pod["metadata"], "it has been counted"
        said = log(core, pod["metadata"]["name"])
        assert said.startswith(f"{index} run-{index} 1\n"), "the command is pid 1"
        assert index or "run-1.run" in said
    delete(batch, "run")
    core.delete_namespaced_service("run", NS)
    kubernetes.wait(lambda: not kubernetes.pods())


# Deletion.


def test_owners_take_what_is_theirs_along_or_leave_it(kubernetes: KubeServer, batch: Any, core: Any) -> None:
    made = batch.create_namespaced_job(NS, job("owner", "trap 'exit 85' TERM; sleep 60 & wait"))
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "owner", "uid": made.metadata.uid}
    service = {"metadata": {"name": "owned", "ownerReferences": [owner]}, "spec": {"clusterIP": "None"}}
    core.create_namespaced_service(NS, service)
    kubernetes.wait(lambda: len(running(kubernetes)) == 2)
    wrong = {"preconditions": {"uid": "another"}}
    assert refused(batch.delete_namespaced_job, "owner", NS, body=wrong)[0] == 409
    batch.delete_namespaced_job("owner", NS, propagation_policy="Foreground")
    assert batch.read_namespaced_job("owner", NS).metadata.finalizers == ["foregroundDeletion"]
    store = kubernetes.store
    kubernetes.wait(lambda: not (store.objects("pods") or store.objects("jobs") or store.objects("services")))
    batch.create_namespaced_job(NS, job("owner", "sleep 60", nodes=1))
    kubernetes.wait(lambda: running(kubernetes))
    batch.delete_namespaced_job("owner", NS)  # no policy: orphans
    kubernetes.wait(lambda: not kubernetes.store.objects("jobs"))
    assert "ownerReferences" not in running(kubernetes)[0]["metadata"]
    core.delete_collection_namespaced_pod(NS, grace_period_seconds=0)


def test_a_pod_is_asked_to_end_and_then_made_to(kubernetes: KubeServer, batch: Any, core: Any) -> None:
    """pid 1 without a handler does not hear SIGTERM: what has one says its own code, the other is killed."""
    script = '[ "$JOB_COMPLETION_INDEX" = 1 ] || trap "exit 7" TERM; echo up; while :; do sleep 0.05; done'
    batch.create_namespaced_job(NS, job("stop", script, template={"terminationGracePeriodSeconds": 1}, backoffLimit=9))
    kubernetes.wait(lambda: len(running(kubernetes)) == 2)
    names = [pod["metadata"]["name"] for pod in running(kubernetes)]
    kubernetes.wait(lambda: all("up" in log(core, name) for name in names))
    before = int(batch.list_namespaced_job(NS).metadata.resource_version)
    for name in names:
        core.delete_namespaced_pod(name, NS)
    kubernetes.wait(lambda: not {pod["metadata"]["name"] for pod in kubernetes.pods()} & set(names))
    ends = {
        change.object["metadata"]["name"]: change.object["status"]
        for change in kubernetes.store.since(before)
        if change.key[0] == "pods" and change.object["metadata"]["name"] in names
    }
    codes = {status["containerStatuses"][0]["state"]["terminated"]["exitCode"] for status in ends.values()}
    assert codes == {7, 137}, str(ends)
    assert {status["phase"] for status in ends.values()} == {"Failed"}
    delete(batch, "stop")


def test_a_suspended_job_ends_its_pods_and_counts_none(kubernetes: KubeServer, batch: Any) -> None:
    batch.create_namespaced_job(NS, job("rest", "trap 'exit 85' TERM; sleep 60 & wait"))
    kubernetes.wait(lambda: len(running(kubernetes)) == 2)
    batch.patch_namespaced_job("rest", NS, {"spec": {"suspend": True}})
    kubernetes.wait(lambda: not kubernetes.pods())
    assert condition(kubernetes.job("rest"), "Suspended")
    assert "failed" not in kubernetes.job("rest")["status"]
    batch.patch_namespaced_job("rest", NS, {"spec": {"suspend": False}})
    kubernetes.wait(lambda: len(running(kubernetes)) == 2)
    delete(batch, "rest")


# Failures.

POLICY = {
    "rules": [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
        {"action": "Ignore", "onExitCodes": {"containerName": "main", "operator": "In", "values": [85]}},
        {"action": "FailJob", "onExitCodes": {"containerName": "main", "operator": "In", "values": [3, 93]}},
    ]
}


def test_exit_codes_by_policy(kubernetes: KubeServer, batch: Any, tmp_path: Path) -> None:
    """85 is tried again without end, under a limit of no failure at all; 93 ends the Job and the other pod with it."""
    mount = {"volumes": [{"name": "d", "hostPath": {"path": str(tmp_path)}}]}
    script = 'echo >>/data/$JOB_COMPLETION_INDEX; [ "$JOB_COMPLETION_INDEX" = 0 ] || exec sleep 60; n=$(wc -l </data/0)'
    script += "\n[ $n -lt 3 ] && exit 85; exit 93"
    made = job("codes", script, template=mount, backoffLimit=0, podFailurePolicy=POLICY)
    made["spec"]["template"]["spec"]["containers"][0]["volumeMounts"] = [{"name": "d", "mountPath": "/data"}]
    batch.create_namespaced_job(NS, made)
    failed = wait_condition(kubernetes, "codes", "Failed")
    assert failed["reason"] == "PodFailurePolicy"
    assert failed["message"].endswith("failed with exit code 93 matching FailJob rule at index 2")
    status = kubernetes.job("codes")["status"]
    assert [c["type"] for c in status["conditions"]] == ["FailureTarget", "Failed"]
    assert (tmp_path / "0").read_text().count("\n") == 3
    assert (tmp_path / "1").read_text().count("\n") == 1
    delete(batch, "codes")


def test_limits_of_failures(kubernetes: KubeServer, batch: Any) -> None:
    batch.create_namespaced_job(NS, job("all", "exit 4", nodes=1, backoffLimit=1))
    limits: dict[str, Any] = {"backoffLimitPerIndex": 1, "maxFailedIndexes": 0, "podReplacementPolicy": "Failed"}
    batch.create_namespaced_job(NS, job("each", '[ "$JOB_COMPLETION_INDEX" = 0 ] || exit 4; exec sleep 60', **limits))
    batch.create_namespaced_job(NS, job("slow", "sleep 60", nodes=1, activeDeadlineSeconds=1))
    assert wait_condition(kubernetes, "all", "Failed")["reason"] == "BackoffLimitExceeded"
    assert kubernetes.job("all")["status"]["failed"] == 2
    assert wait_condition(kubernetes, "each", "Failed")["reason"] == "MaxFailedIndexesExceeded"
    assert kubernetes.job("each")["status"]["failedIndexes"] == "1"
    assert wait_condition(kubernetes, "slow", "Failed")["reason"] == "DeadlineExceeded"
    for name in ("all", "each", "slow"):
        delete(batch, name)


def test_an_evicted_pod_is_ignored_and_replaced(kubernetes: KubeServer, batch: Any, core: Any) -> None:
    script = "trap 'exit 4' TERM; sleep 60 & wait"
    batch.create_namespaced_job(NS, job("run", script, backoffLimit=0, podFailurePolicy=POLICY))
    kubernetes.wait(lambda: len(running(kubernetes)) == 2)
    gone = running(kubernetes)[0]["metadata"]
    body = {"metadata": {"name": gone["name"], "namespace": NS}}
    core.create_namespaced_pod_eviction(gone["name"], NS, {"apiVersion": "policy/v1", "kind": "Eviction", **body})
    kubernetes.wait(lambda: len(running(kubernetes)) == 2 and gone["name"] not in str(running(kubernetes)))
    label = "batch.kubernetes.io/job-completion-index"
    assert {pod["metadata"]["labels"][label] for pod in running(kubernetes)} == {"0", "1"}
    assert "failed" not in kubernetes.job("run")["status"]
    delete(batch, "run")


def test_a_dead_node_keeps_its_pod_until_somebody_frees_it(kubernetes: KubeServer, batch: Any, core: Any) -> None:
    """Deleting by force does not: the finalizer waits for an end that nobody tells. Without it all goes on."""
    fast = {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 2}
    short = {"tolerations": [{"key": f"node.kubernetes.io/{why}", **fast} for why in ("unreachable", "not-ready")]}
    batch.create_namespaced_job(NS, job("run", "exec sleep 60", template=short, podFailurePolicy=POLICY))
    kubernetes.wait(lambda: len(running(kubernetes)) == 2)
    lost = running(kubernetes)[0]
    name = lost["metadata"]["name"]
    inside = kubernetes.pod_processes(name)
    assert list(inside.values()) == ["sleep 60"]
    kubernetes.kill_node(lost["spec"]["nodeName"])
    assert [*inside] == [pid for pid in inside if not Path(f"/proc/{pid}").exists()], "they are gone"
    kubernetes.wait(lambda: "deletionTimestamp" in kubernetes.store.get("pods", NS, name)["metadata"])
    conditions = kubernetes.store.get("pods", NS, name)["status"]["conditions"]
    assert ("DisruptionTarget", "DeletionByTaintManager") in [(c["type"], c.get("reason")) for c in conditions]
    core.delete_namespaced_pod(name, NS, grace_period_seconds=0)
    assert kubernetes.store.get("pods", NS, name)["status"]["phase"] == "Running"
    assert kubernetes.job("run")["status"]["terminating"] == 1
    assert refused(core.read_namespaced_pod_log, name, NS)[0] == 500
    core.patch_namespaced_pod(name, NS, [{"op": "remove", "path": "/metadata/finalizers"}])
    kubernetes.wait(lambda: len(running(kubernetes)) == 2 and name not in str(running(kubernetes)))
    assert "failed" not in kubernetes.job("run")["status"]
    delete(batch, "run")


def test_a_node_that_is_cut_off_goes_on_until_it_hears(kubernetes: KubeServer, batch: Any, core: Any) -> None:
    """Two pods of one index, for a while, where somebody frees the index of a node that only seems dead."""
    batch.create_namespaced_job(NS, job("run", "exec sleep 60", nodes=1, podFailurePolicy=POLICY))
    kubernetes.wait(lambda: running(kubernetes))
    before = running(kubernetes)[0]
    name, node = before["metadata"]["name"], before["spec"]["nodeName"]
    inside = kubernetes.pod_processes(name)
    kubernetes.cut_node(node)
    kubernetes.wait(lambda: kubernetes.store.get("nodes", "", node)["spec"].get("taints"))  # nothing goes there now
    core.delete_namespaced_pod(name, NS, grace_period_seconds=0)
    core.patch_namespaced_pod(name, NS, [{"op": "remove", "path": "/metadata/finalizers"}])
    kubernetes.wait(lambda: [one for one in running(kubernetes) if one["metadata"]["name"] != name])
    assert inside
    assert all(Path(f"/proc/{pid}").exists() for pid in inside)
    kubernetes.heal_node(node)
    kubernetes.wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in inside))
    delete(batch, "run")


def test_a_node_that_comes_back_tells_what_it_lost(kubernetes: KubeServer, batch: Any) -> None:
    batch.create_namespaced_job(NS, job("run", "exec sleep 60", nodes=1, backoffLimit=0))
    kubernetes.wait(lambda: running(kubernetes))
    node = running(kubernetes)[0]["spec"]["nodeName"]
    kubernetes.kill_node(node)
    kubernetes.boot_node(node)
    assert wait_condition(kubernetes, "run", "Failed")["reason"] == "BackoffLimitExceeded"
    delete(batch, "run")


def test_why_a_pod_waits(kubernetes: KubeServer, batch: Any) -> None:
    def one(name: str, container: dict[str, Any], **template: Any) -> None:
        made = job(name, "true", nodes=1, template=template)
        made["spec"]["template"]["spec"]["containers"][0] |= container
        batch.create_namespaced_job(NS, made)

    one("gpus", {"resources": {"limits": {"nvidia.com/gpu": 3}}})
    one("image", {"image": "registry.example/missing:1"})
    secret = {"valueFrom": {"secretKeyRef": {"name": "later", "key": "k"}}}
    one("secret", {"env": [{"name": "K", **secret}]})
    one("root", {"securityContext": {"runAsNonRoot": True}})
    one("name", {"image": "not an image"})
    one("rack", {}, affinity=affinity("Gt", "4", key="example.com/rack"))
    one("zone", {}, affinity=affinity("Lt", "9", key="topology.kubernetes.io/zone"))
    one(
        "second",
        {},
        affinity=affinity("Lt", "3", key="example.com/rack"),
        nodeSelector={"kubernetes.io/hostname": "node2"},
    )
    one("claim", {}, volumes=[{"name": "a", "persistentVolumeClaim": {"claimName": "none"}}])

    def words() -> dict[str, str]:
        found = {}
        for pod in kubernetes.pods():
            scheduled = [c.get("message") for c in pod["status"].get("conditions", ()) if c["type"] == "PodScheduled"]
            state = pod["status"].get("containerStatuses", [{"state": {}}])[0]["state"].get("waiting", {})
            found[pod["metadata"]["labels"]["job-name"]] = f"{scheduled[:1]} {state.get('reason')}"
        return found

    def known() -> bool:
        ends = {
            "image": "BackOff",
            "name": "InvalidImageName",
            "secret": "Config",
            "root": "Config",
            "gpus": "available",
            "claim": "not found",
            "rack": "affinity",
            "zone": "affinity",
        }
        return all(end in words().get(name, "") for name, end in ends.items())

    kubernetes.wait(known, words=lambda: str(words()))
    assert words()["gpus"].startswith("['0/4 nodes are available: 4 Insufficient nvidia.com/gpu.']")
    assert words()["image"] == "[None] ImagePullBackOff"
    assert words()["secret"] == words()["root"] == "[None] CreateContainerConfigError"
    assert words()["claim"].startswith("['persistentvolumeclaim \"none\" not found']")
    kubernetes.add_secret("later", {"k": "v"})
    for name in ("secret", "second"):
        wait_condition(kubernetes, name, "Complete")
    for name in ("gpus", "image", "secret", "root", "claim", "name", "rack", "zone", "second"):
        delete(batch, name)


# Containers.


def test_what_a_container_gets(kubernetes: KubeServer, batch: Any, core: Any, tmp_path: Path) -> None:
    kubernetes.add_secret("keys", {"TOKEN": "s3cret"})
    (tmp_path / "claimed").mkdir()
    (tmp_path / "claimed").chmod(0o777)
    kubernetes.add_claim("shared", tmp_path / "claimed")
    script = """
        where=$(python3 -c 'import sys; print(sys.prefix)')
        echo "$TOKEN|$POD_IP|$INDEX|$(id -u):$(id -g)|$HOME|$where|$(stat -fc %T /dev/shm)"
        touch /claimed/it; ls "$HERE" 2>/dev/null | wc -l; touch /usr/no 2>/dev/null || echo read-only
        echo why >&2; exit 9"""
    made = job("get", script, nodes=1, backoffLimit=0, template={
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}},
                    {"name": "c", "persistentVolumeClaim": {"claimName": "shared"}}],
        "securityContext": {"runAsUser": 1234, "runAsGroup": 1234, "runAsNonRoot": True},
    })  # fmt: skip
    made["spec"]["template"]["spec"]["containers"][0] |= {
        "envFrom": [{"secretRef": {"name": "keys"}}], "terminationMessagePolicy": "FallbackToLogsOnError",
        "env": [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "INDEX", "value": "<$(JOB_COMPLETION_INDEX)>"}, {"name": "HERE", "value": str(tmp_path)}],
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "c", "mountPath": "/claimed"}],
    }  # fmt: skip
    made["spec"]["template"]["spec"]["containers"][0]["env"].reverse()
    batch.create_namespaced_job(NS, made)
    wait_condition(kubernetes, "get", "Failed")
    pod = kubernetes.pods()[0]
    said = log(core, pod["metadata"]["name"]).splitlines()
    assert said[0] == f"s3cret|{pod['status']['podIP']}|<$(JOB_COMPLETION_INDEX)>|1234:1234|/|{sys.prefix}|tmpfs"
    assert said[1:] == ["0", "read-only", "why"]
    assert (tmp_path / "claimed" / "it").stat().st_uid == 1234
    assert pod["status"]["containerStatuses"][0]["state"]["terminated"]["message"].endswith("read-only\nwhy\n")
    assert log(core, pod["metadata"]["name"]) != ""
    delete(batch, "get")


def test_a_pod_asks_the_api_itself(kubernetes: KubeServer, batch: Any, core: Any) -> None:
    kubernetes.add_service_account("looker", [Rule(resources=("pods",), verbs=("list",))])
    script = (
        "python3 -c 'import kubernetes as k; k.config.load_incluster_config();"
        ' print(len(k.client.CoreV1Api().list_namespaced_pod("default").items))\''
    )
    batch.create_namespaced_job(NS, job("ask", script, nodes=1, template={"serviceAccountName": "looker"}))
    wait_condition(kubernetes, "ask", "Complete")
    assert log(core, kubernetes.pods()[0]["metadata"]["name"]) == "1\n"
    delete(batch, "ask")


def test_logs_while_it_runs_and_of_the_start_before(kubernetes: KubeServer, batch: Any, core: Any) -> None:
    """And the image, this machine, is nobody's to write in, not even root's."""
    script = "echo one; sleep 0.3; touch /usr/no 2>/dev/null || echo two; exit 5"
    batch.create_namespaced_job(NS, job("talk", script, nodes=1, template={"restartPolicy": "OnFailure"}))

    def restarts() -> int:
        statuses = [pod["status"]["containerStatuses"][0] for pod in running(kubernetes)]
        return sum(status["restartCount"] for status in statuses)

    kubernetes.wait(restarts)
    name = kubernetes.pods()[0]["metadata"]["name"]
    before = core.read_namespaced_pod_log(name, NS, previous=True, tail_lines=1, _preload_content=False)
    assert before.data == b"two\n"
    assert refused(core.read_namespaced_pod_log, name, NS, container="other")[0] == 400
    delete(batch, "talk")


# Faults, and the end.


def test_faults_on_order(kubernetes: KubeServer, batch: Any, core: Any) -> None:
    import urllib3

    core.api_client.configuration.retries = False
    lost = (urllib3.exceptions.HTTPError, OSError)
    kubernetes.faults.lose_answer("create", "secrets")
    body = {"metadata": {"name": "there"}}
    core.api_client.rest_client.pool_manager.connection_pool_kw["retries"] = False
    with pytest.raises(lost):
        core.create_namespaced_secret(NS, body)
    assert refused(core.create_namespaced_secret, NS, body)[0] == 409, "it was done"
    kubernetes.faults.answer(429, "list", retry_after_s=1, calls=1)
    code, status = refused(core.list_namespaced_secret, NS)
    assert (code, status["details"]["retryAfterSeconds"]) == (429, 1)
    kubernetes.faults.cut("delete", "secrets")
    with pytest.raises(lost):
        core.delete_namespaced_secret("there", NS)
    assert core.read_namespaced_secret("there", NS).metadata.name == "there"
    kubernetes.faults.go_down()
    with pytest.raises(lost):
        core.list_namespaced_secret(NS)
    kubernetes.faults.come_up()
    assert len(core.list_namespaced_secret(NS).items) == 1


def test_it_goes_without_a_trace(tmp_path: Path) -> None:
    def here() -> tuple[set[str], set[str]]:
        return set(os.listdir("/sys/class/net")), set(Path("/proc/self/mountinfo").read_text().splitlines())

    before = here()
    with tempfile.TemporaryDirectory(prefix="ku-") as folder:
        server = KubeServer(Path(folder), nodes=1)
        try:
            server.start()
        except Missing as missing:
            pytest.skip(str(missing))
        made = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": NS}}
        container = {"name": "main", "image": "any:1", "command": ["sleep", "60"]}
        kubeserver_admission.create(server.store, {**made, "spec": {"containers": [container]}})
        server.wait(lambda: server.pods()[0]["status"]["phase"] == "Running")
        inside = list(server.pod_processes("p"))
        server.stop()
        assert os.listdir(folder) == []
    assert inside
    assert not [pid for pid in inside if Path(f"/proc/{pid}").exists()]
    assert here() == before
