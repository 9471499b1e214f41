"""The API of the tests' Kubernetes answers as the API's documents say: what it refuses and in which words, lists,
watches and patches.
"""

from __future__ import annotations

from typing import Any

import pytest
from kubeclient import NS, affinity, delete, job, refused
from kubeserver import KubeServer

pytestmark = pytest.mark.slow


def test_what_a_server_answers_to_wrong_requests(kubernetes: KubeServer, batch: Any, core: Any) -> None:
    good = job("one", "sleep 60", suspend=True)
    batch.create_namespaced_job(NS, good)
    assert refused(batch.create_namespaced_job, NS, good)[1]["reason"] == "AlreadyExists"
    assert refused(batch.read_namespaced_job, "two", NS)[1]["message"] == 'jobs.batch "two" not found'
    code, status = refused(batch.create_namespaced_job, NS, job("always", "true", template={"restartPolicy": "Always"}))
    assert code == 422
    assert status["details"]["causes"][0]["field"] == "spec.template.spec.restartPolicy"
    # Its pods' host names would be too long.
    assert refused(batch.create_namespaced_job, NS, job("n" * 62, "true"))[0] == 422
    assert refused(batch.create_namespaced_job, "nowhere", good)[0] == 403  # before anybody says that it is not there
    stale = batch.read_namespaced_job("one", NS)
    batch.patch_namespaced_job("one", NS, {"metadata": {"labels": {"a": "b"}}})
    code, status = refused(batch.replace_namespaced_job, "one", NS, stale)
    assert (code, status["reason"]) == (409, "Conflict")
    code, status = refused(batch.patch_namespaced_job, "one", NS, {"spec": {"completionMode": "NonIndexed"}})
    assert (code, "field is immutable" in status["message"]) == (422, True)
    delete(batch, "one")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"completions": None}, "spec.completions"),
        ({"podReplacementPolicy": "TerminatingOrFailed", "podFailurePolicy": {"rules": []}},
         "spec.podReplacementPolicy"),
        ({"podFailurePolicy": {"rules": [{"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [1]}}]}},
         "spec.podFailurePolicy.rules[0].action"),
        ({"podFailurePolicy": {"rules": [{"action": "Ignore", "onExitCodes": {"operator": "In", "values": [3, 0]}}]}},
         "spec.podFailurePolicy.rules[0].onExitCodes.values[1]"),
        ({"podFailurePolicy": {"rules": [{"action": "Ignore", "onExitCodes": {
            "containerName": "other", "operator": "In", "values": [3]}}]}},
         "spec.podFailurePolicy.rules[0].onExitCodes.containerName"),
        ({"maxFailedIndexes": 0}, "spec.backoffLimitPerIndex"),
        ({"backoffLimit": -1}, "spec.backoffLimit"),
    ],
)  # fmt: skip
def test_rules_of_jobs(kubernetes: KubeServer, batch: Any, change: dict[str, Any], field: str) -> None:
    wrong = job("wrong", "true")
    wrong["spec"] |= change
    code, status = refused(batch.create_namespaced_job, NS, wrong)
    assert (code, field in [cause["field"] for cause in status["details"]["causes"]]) == (422, True), status


_TERM = "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchExpressions[0]"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"volumes": [{"name": "a"}]}, "volumes[0]"),
        ({"volumes": [{"name": "A", "emptyDir": {}}]}, "volumes[0].name"),
        ({"tolerations": [{"key": "a", "operator": "Exists", "tolerationSeconds": 3}]}, "tolerations[0].effect"),
        ({"tolerations": [{"effect": "NoExecute"}]}, "tolerations[0].operator"),
        ({"nodeSelector": {"a": "not a label"}}, "nodeSelector"),
        ({"affinity": affinity("In")}, f"{_TERM}.values"),
        ({"affinity": affinity("Exists", "1")}, f"{_TERM}.values"),
        ({"affinity": affinity("Gt", "1", "2")}, f"{_TERM}.values"),
        ({"affinity": affinity("Near", "1")}, f"{_TERM}.operator"),
        ({"hostname": "a.b"}, "hostname"),
        ({"securityContext": {"runAsUser": -1}}, "securityContext.runAsUser"),
        ({"containers": [{"name": "a", "image": "b", "resources": {"requests": {"nvidia.com/gpu": 1}}}]},
         "containers[0].resources.limits"),
        ({"containers": [{"name": "a", "image": "b", "resources": {"requests": {"cpu": "2"}, "limits": {"cpu": 1}}}]},
         "containers[0].resources.requests"),
        ({"containers": [{"name": "a", "image": "b", "volumeMounts": [{"name": "c", "mountPath": "/d"}]}]},
         "containers[0].volumeMounts[0].name"),
        ({"containers": [{"name": "a", "image": "b", "env": [{"name": "A=B", "value": "c"}]}]},
         "containers[0].env[0].name"),
    ],
)  # fmt: skip
def test_rules_of_pods(kubernetes: KubeServer, batch: Any, change: dict[str, Any], field: str) -> None:
    code, status = refused(batch.create_namespaced_job, NS, job("wrong", "true", template=change))
    fields = [cause["field"] for cause in status.get("details", {}).get("causes", ())]
    assert (code, f"spec.template.spec.{field}" in fields) == (422, True), status


def test_unknown_fields_warn_or_are_refused_and_a_dry_run_makes_nothing(kubernetes: KubeServer, batch: Any) -> None:
    odd = job("odd", "true", colour="red")
    code, status = refused(batch.create_namespaced_job, NS, odd, field_validation="Strict")
    assert (code, 'unknown field "spec.colour"' in status["message"]) == (400, True)
    _, _, headers = batch.create_namespaced_job_with_http_info(NS, odd, dry_run="All")
    assert headers["Warning"] == '299 - "unknown field \\"spec.colour\\""'
    odd["spec"]["parallelism"] = "two"
    assert refused(batch.create_namespaced_job, NS, odd)[0] == 400
    assert batch.list_namespaced_job(NS).items == []


def test_rights_and_quotas(kubernetes: KubeServer, batch: Any, core: Any) -> None:
    import kubernetes.client as k8s

    assert refused(core.list_node)[1]["message"] == (
        'nodes is forbidden: User "dtrain" cannot list resource "nodes" in API group "" at the cluster scope'
    )
    review = k8s.AuthorizationV1Api(core.api_client)
    for verb, allowed in (("create", True), ("escalate", False)):
        asked = {"verb": verb, "group": "batch", "resource": "jobs", "namespace": NS}
        body = {"spec": {"resourceAttributes": asked}}
        assert review.create_self_subject_access_review(body).status.allowed == allowed
    kubernetes.add_quota("small", {"pods": "1", "count/jobs.batch": "1"})
    batch.create_namespaced_job(NS, job("two", "sleep 60"))
    kubernetes.wait(lambda: [e for e in kubernetes.store.objects("events") if e["reason"] == "FailedCreate"])
    said = next(e for e in kubernetes.store.objects("events") if e["reason"] == "FailedCreate")["message"]
    assert "exceeded quota: small, requested: pods=1, used: pods=1, limited: pods=1" in said
    code, status = refused(batch.create_namespaced_job, NS, job("three", "true"))
    assert (code, "exceeded quota: small" in status["message"]) == (403, True)
    delete(batch, "two")
    stranger = k8s.Configuration(host=kubernetes.url)
    stranger.ssl_ca_cert = str(kubernetes.root / "ca.crt")
    for key, code in (({}, 403), ({"authorization": "Bearer wrong"}, 401)):
        stranger.api_key = key
        with k8s.ApiClient(stranger) as client:
            assert refused(k8s.CoreV1Api(client).list_namespaced_pod, NS)[0] == code


def test_a_namespaces_security_refuses_pods_and_not_their_job(kubernetes: KubeServer, batch: Any) -> None:
    kubernetes.secure("restricted")
    volumes = {"volumes": [{"name": "a", "hostPath": {"path": "/data"}}]}
    batch.create_namespaced_job(NS, job("run", "true", template=volumes, backoffLimit=0))
    kubernetes.wait(lambda: [e for e in kubernetes.store.objects("events") if e["reason"] == "FailedCreate"])
    said = next(e for e in kubernetes.store.objects("events") if e["reason"] == "FailedCreate")["message"]
    assert 'violates PodSecurity "restricted:latest": hostPath volumes, allowPrivilegeEscalation != false' in said
    delete(batch, "run")


def test_lists_in_parts_selectors_and_watches(kubernetes: KubeServer, batch: Any, core: Any) -> None:
    from kubernetes.watch import Watch

    for name in ("a", "b", "c"):
        metadata = {"name": name, "labels": {"of": name}}
        core.create_namespaced_secret(NS, {"metadata": metadata, "stringData": {"k": name}})
    first = core.list_namespaced_secret(NS, limit=2)
    assert [one.metadata.name for one in first.items] == ["a", "b"]
    token = first.metadata._continue
    assert [one.metadata.name for one in core.list_namespaced_secret(NS, limit=2, _continue=token).items] == ["c"]
    chosen = core.list_namespaced_secret(NS, label_selector="of in (a,c),of!=a").items
    assert [one.metadata.name for one in chosen] == ["c"]
    assert core.list_namespaced_secret(NS, field_selector="metadata.name=b").items[0].data == {"k": "Yg=="}
    assert refused(core.list_namespaced_secret, NS, field_selector="data.k=b")[0] == 400
    old = core.list_namespaced_secret(NS).metadata.resource_version
    core.patch_namespaced_secret("a", NS, {"metadata": {"labels": {"of": "z"}}})
    core.delete_namespaced_secret("b", NS)
    stream = Watch().stream(
        core.list_namespaced_secret, NS, resource_version=old, label_selector="of!=a", timeout_seconds=1,
        allow_watch_bookmarks=True,
    )  # fmt: skip
    seen = [(event["type"], event["raw_object"]["metadata"].get("name")) for event in stream]
    assert seen[:2] == [("ADDED", "a"), ("DELETED", "b")]  # the first fits the selector now
    assert seen[-1] == ("BOOKMARK", None)
    token = core.list_namespaced_secret(NS, limit=1).metadata._continue
    kubernetes.api.expire()
    assert refused(core.list_namespaced_secret, NS, limit=1, _continue=token)[0] == 410
    with pytest.raises(Exception, match="too old resource version"):
        list(Watch().stream(core.list_namespaced_secret, NS, resource_version=old, timeout_seconds=1))


def test_three_kinds_of_patches(kubernetes: KubeServer, batch: Any) -> None:
    batch.create_namespaced_job(NS, job("one", "true", suspend=True))
    patched = batch.patch_namespaced_job("one", NS, {"spec": {"backoffLimit": 3}, "metadata": {"labels": {"a": "1"}}})
    assert (patched.spec.backoff_limit, patched.metadata.labels) == (3, {"a": "1"})
    test = [{"op": "test", "path": "/metadata/labels/a", "value": "2"}, {"op": "remove", "path": "/metadata/labels/a"}]
    assert refused(batch.patch_namespaced_job, "one", NS, test)[0] == 422
    test[0]["value"] = "1"
    assert not batch.patch_namespaced_job("one", NS, test).metadata.labels
    # Items of a list with a merge key are joined; tolerations have none and are replaced.
    env = {"spec": {"template": {"spec": {"tolerations": [{"operator": "Exists"}]}}}}
    assert len(batch.patch_namespaced_job("one", NS, env).spec.template.spec.tolerations) == 1
    delete(batch, "one")
