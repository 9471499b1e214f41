"""What a pod's specification means for its containers: command, environment, user, mounts. Nothing is started here."""

from __future__ import annotations

import base64
import json
import os
import pwd
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kubeserver_admission import pod_amounts
from kubeserver_pod import CAPABILITIES, Mount, Process, image_mounts
from kubeserver_podrules import quantity
from kubeserver_store import Object, Store

TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
IMAGE_PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_IMAGE = re.compile(r"[a-zA-Z0-9.-]+(:\d+)?(/[a-z0-9._-]+)*(:[\w.-]{1,128})?(@sha256:[0-9a-f]{64})?")
_REFERENCE = re.compile(r"\$(\$|\(([^)]*)\))")


class Waits(Exception):
    """The container can't start now. `reason` as in its state: CreateContainerConfigError, ErrImagePull, ..."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What a node knows of the whole."""

    store: Store
    api_host: str
    api_port: int
    ca: bytes
    token: Callable[[str, str], str]  # of a service account: namespace, name


def check_image(container: Object) -> None:
    """https://kubernetes.io/docs/concepts/containers/images/: every image is there but the one called `missing`."""
    image = container["image"]
    if not _IMAGE.fullmatch(image):
        said = f'Failed to apply default image tag "{image}": couldn\'t parse image name: invalid reference format'
        raise Waits("InvalidImageName", said)
    if image.rpartition("/")[2].partition(":")[0] == "missing":
        said = f'rpc error: code = NotFound desc = failed to pull and unpack image "{image}": not found'
        raise Waits("ErrImagePull", said)


def process(container: Object, pod: Object, cluster: Cluster, folder: Path) -> Process:
    """Raises Waits. `folder`: the pod's own, with its volumes."""
    environ = _environment(container, pod, cluster)
    argv = [_expanded(word, environ) for word in (*container.get("command", ()), *container.get("args", ()))]
    if not argv:
        raise Waits("CreateContainerError", "failed to generate container spec: no command specified")
    context = {**pod["spec"].get("securityContext", {}), **container.get("securityContext", {})}
    uid, gid = _user(context)
    with_home = {
        "PATH": IMAGE_PATH,
        "HOSTNAME": pod["spec"].get("hostname") or pod["metadata"]["name"],
        "HOME": _home(uid),
    }
    groups = [*context.get("supplementalGroups", ()), *([context["fsGroup"]] if "fsGroup" in context else [])]
    change = context.get("capabilities", {})
    dropped = {name.lower() for name in change.get("drop", ())}
    kept = [] if "all" in dropped else [name for name in CAPABILITIES if name not in dropped]
    return Process(
        argv=argv, environ={**with_home, **environ},
        mounts=[*image_mounts(), *_mounts(container, pod, cluster, folder)],
        cwd=container.get("workingDir") or "/", uid=uid, gid=gid, groups=groups,
        capabilities=[*kept, *(name.lower() for name in change.get("add", ()))],
        no_new_privileges=context.get("allowPrivilegeEscalation") is False,
        read_only_root=bool(context.get("readOnlyRootFilesystem")),
    )  # fmt: skip


def _user(context: Object) -> tuple[int, int]:
    """https://kubernetes.io/docs/tasks/configure-pod-container/security-context/: runAsUser and runAsGroup; "If this
    field is omitted, the primary group ID of the containers will be root(0)". runAsNonRoot: "the Kubelet will validate
    the image at runtime to ensure that it does not run as UID 0 (root) and fail to start the container if it does";
    that is whom every image here runs as."""
    uid = context.get("runAsUser")
    if context.get("runAsNonRoot") and not uid:
        said = "container has runAsNonRoot and image will run as root"
        if uid == 0:
            said = "container's runAsUser breaks non-root policy"
        raise Waits("CreateContainerConfigError", said)
    return int(uid or 0), int(context.get("runAsGroup", 0))


def _home(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_dir
    except KeyError:
        return "/"


def _expanded(text: str, environ: Mapping[str, str]) -> str:
    """ "Variable references $(VAR_NAME) are expanded using the container's environment. If a variable cannot be
    resolved, the reference in the input string will be unchanged. Double $$ are reduced to a single $"."""
    return _REFERENCE.sub(lambda m: "$" if m[1] == "$" else environ.get(m[2], m[0]), text)


def _environment(container: Object, pod: Object, cluster: Cluster) -> dict[str, str]:
    """https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/#environment-variables: envFrom
    first, and env "will take precedence"; variables of the services that have an address before both."""
    namespace = pod["metadata"]["namespace"]
    environ = {
        "KUBERNETES_SERVICE_HOST": cluster.api_host, "KUBERNETES_SERVICE_PORT": str(cluster.api_port),
        "KUBERNETES_SERVICE_PORT_HTTPS": str(cluster.api_port),
    }  # fmt: skip
    for source in container.get("envFrom", ()):
        plural, reference = next((p, source[n]) for n, p in _MAPS.items() if n in source)
        found = cluster.store.find(plural, namespace, reference["name"])
        if found is None:
            if reference.get("optional"):
                continue
            raise Waits("CreateContainerConfigError", f'{_KINDS[plural]} "{reference["name"]}" not found')
        for key, text in data(found).items():
            environ[source.get("prefix", "") + key] = text.decode()
    for variable in container.get("env", ()):
        if "valueFrom" in variable:
            value = _value(variable["valueFrom"], container, pod, cluster)
            if value is not None:
                environ[variable["name"]] = value
        else:
            environ[variable["name"]] = _expanded(variable.get("value", ""), environ)
    return environ


_MAPS = {"secretRef": "secrets", "configMapRef": "configmaps"}
_KINDS = {"secrets": "secret", "configmaps": "configmap"}


def _value(source: Object, container: Object, pod: Object, cluster: Cluster) -> str | None:
    namespace = pod["metadata"]["namespace"]
    if "fieldRef" in source:
        return _field(pod, source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        path, divisor = source["resourceFieldRef"]["resource"], source["resourceFieldRef"].get("divisor", "1")
        group, _, name = path.partition(".")
        amount = quantity(container.get("resources", {}).get(group, {}).get(name, "0")) or 0
        by = quantity(divisor) or 1
        return str(int(-(-amount // by)))
    plural, reference = next(
        (p, source[n]) for n, p in (("secretKeyRef", "secrets"), ("configMapKeyRef", "configmaps")) if n in source
    )
    found = cluster.store.find(plural, namespace, reference["name"])
    if found is None and not reference.get("optional"):
        raise Waits("CreateContainerConfigError", f'{_KINDS[plural]} "{reference["name"]}" not found')
    value = data(found).get(reference["key"]) if found else None
    if value is None and not reference.get("optional"):
        said = f"couldn't find key {reference['key']} in {_KINDS[plural].capitalize()} {namespace}/{reference['name']}"
        raise Waits("CreateContainerConfigError", said)
    return None if value is None else value.decode()


def data(obj: Object) -> dict[str, bytes]:
    """Of a Secret or a ConfigMap."""
    if obj["kind"] == "Secret":
        return {key: base64.b64decode(value) for key, value in obj.get("data", {}).items()}
    plain = {key: value.encode() for key, value in obj.get("data", {}).items()}
    return plain | {key: base64.b64decode(value) for key, value in obj.get("binaryData", {}).items()}


def _field(pod: Object, path: str) -> str:
    """ "supports metadata.name, metadata.namespace, `metadata.labels['<KEY>']`, `metadata.annotations['<KEY>']`,
    spec.nodeName, spec.serviceAccountName, status.hostIP, status.podIP, status.podIPs"."""
    found = re.fullmatch(r"metadata\.(labels|annotations)\['(.*)'\]", path)
    if found:
        return str(pod["metadata"].get(found[1], {}).get(found[2], ""))
    first, _, name = path.partition(".")
    value = pod[first].get(name, "")
    return ",".join(one["ip"] for one in value) if isinstance(value, list) else str(value)


def _mounts(container: Object, pod: Object, cluster: Cluster, folder: Path) -> list[Mount]:
    found: list[Mount] = []
    volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", ())}
    for mount in container.get("volumeMounts", ()):
        source = volume_path(volumes[mount["name"]], pod, cluster, folder)
        if sub_path := mount.get("subPath"):
            source = source / sub_path
            source.mkdir(parents=True, exist_ok=True)
        found.append(Mount(source=source, target=mount["mountPath"], read_only=bool(mount.get("readOnly"))))
    if has_token(pod, cluster):
        found.append(Mount(source=folder / "token", target=TOKEN_FOLDER, read_only=True))
    message = folder / f"message-{container['name']}"
    found.append(Mount(source=message, target=container["terminationMessagePath"]))
    return sorted(found, key=lambda one: one.target)  # the outer before the inner


def has_token(pod: Object, cluster: Cluster) -> bool:
    """https://kubernetes.io/docs/tasks/configure-pod-container/configure-service-account/#opt-out-of-api-credential-automounting:
    "If both the ServiceAccount and the Pod's .spec specify a value for automountServiceAccountToken, the Pod spec takes
    precedence." """
    account = cluster.store.find("serviceaccounts", pod["metadata"]["namespace"], pod["spec"]["serviceAccountName"])
    return bool(
        pod["spec"].get("automountServiceAccountToken", (account or {}).get("automountServiceAccountToken", True))
    )


def volume_path(volume: Object, pod: Object, cluster: Cluster, folder: Path) -> Path:
    """Where a volume lies on this machine. Raises Waits."""
    namespace = pod["metadata"]["namespace"]
    if "hostPath" in volume:
        return _host_path(volume)
    if "nfs" in volume:
        return Path(volume["nfs"]["path"])  # every server is this machine
    if "persistentVolumeClaim" in volume:
        claim = cluster.store.get("persistentvolumeclaims", namespace, volume["persistentVolumeClaim"]["claimName"])
        bound = cluster.store.get("persistentvolumes", "", claim["spec"]["volumeName"])
        return Path(bound["spec"]["hostPath"]["path"])
    if "emptyDir" in volume or "secret" in volume or "configMap" in volume:
        return folder / "volumes" / str(volume["name"])
    raise Waits("CreateContainerConfigError", f"volume {volume['name']}: this kind is not simulated: {sorted(volume)}")


def _host_path(volume: Object) -> Path:
    """https://kubernetes.io/docs/concepts/storage/volumes/#hostpath-volume-types: Directory "must exist";
    DirectoryOrCreate is created "with permission set to 0755"; with the empty type "no checks will be performed"."""
    path, kind = Path(volume["hostPath"]["path"]), volume["hostPath"].get("type", "")
    if kind == "DirectoryOrCreate" or (kind == "" and not path.exists()):
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
    if kind == "Directory" and not path.is_dir():
        said = f"hostPath type check failed: {path} is not a directory"
        said = f'MountVolume.SetUp failed for volume "{volume["name"]}" : {said}'
        raise Waits("ContainerCreating", said)
    return path


def _refuse_unsimulated(spec: Object) -> None:
    """What would be ignored here and matters there must not look as if it worked. Raises Waits."""
    inner = ("livenessProbe", "readinessProbe", "startupProbe", "lifecycle", "volumeDevices", "restartPolicy")
    containers = [*spec["containers"], *spec.get("initContainers", ())]
    found = {name for name in inner if any(name in container for container in containers)}
    found |= {n for n in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace", "hostAliases") if spec.get(n)}
    found |= {n for n in ("topologySpreadConstraints", "ephemeralContainers", "resourceClaims") if spec.get(n)}
    if spec.get("affinity", {}).get("podAffinity"):
        found.add("podAffinity")
    if '"matchFields"' in json.dumps(spec.get("affinity", {})):
        found.add("matchFields")
    if found:
        raise Waits("CreateContainerError", f"the tests' Kubernetes does not simulate {', '.join(sorted(found))}")


def prepare(pod: Object, cluster: Cluster, folder: Path) -> list[tuple[Path, str]]:
    """The pod's own volumes made and filled; those of memory, with the options to mount each. Raises Waits.

    https://kubernetes.io/docs/concepts/storage/volumes/#emptydir: "Kubernetes mounts a tmpfs (RAM-backed filesystem)
    for you"; its size is sizeLimit, or else the pod's memory limit.
    """
    _refuse_unsimulated(pod["spec"])
    memory: list[tuple[Path, str]] = []
    namespace, group = pod["metadata"]["namespace"], pod["spec"].get("securityContext", {}).get("fsGroup")
    for volume in pod["spec"].get("volumes", ()):
        path = volume_path(volume, pod, cluster, folder)
        if "emptyDir" in volume:
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o777)
            limit = quantity(volume["emptyDir"].get("sizeLimit", "")) or pod_amounts(pod["spec"], "limits").get(
                "memory"
            )
            if volume["emptyDir"].get("medium") == "Memory":
                memory.append((path, "mode=777" + (f",size={int(limit)}" if limit else "")))
        for kind, plural, key in (("secret", "secrets", "secretName"), ("configMap", "configmaps", "name")):
            if kind not in volume:
                continue
            found = cluster.store.find(plural, namespace, volume[kind][key])
            if found is None and not volume[kind].get("optional"):
                said = f'{_KINDS[plural]} "{volume[kind][key]}" not found'
                said = f'MountVolume.SetUp failed for volume "{volume["name"]}" : {said}'
                raise Waits("ContainerCreating", said)
            path.mkdir(parents=True, exist_ok=True)
            names = {one["key"]: one["path"] for one in volume[kind].get("items", ())}
            for name, value in data(found or {"kind": "Secret"}).items():
                if not names or name in names:
                    _put(path / names.get(name, name), value, volume[kind]["defaultMode"], group)
    for container in (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]):
        _put(folder / f"message-{container['name']}", b"", 0o666, None)
    if has_token(pod, cluster):
        (folder / "token").mkdir(exist_ok=True)
        token = cluster.token(namespace, pod["spec"]["serviceAccountName"])
        for name, value in (("token", token.encode()), ("ca.crt", cluster.ca), ("namespace", namespace.encode())):
            _put(folder / "token" / name, value, 0o644, group)
    return memory


def _put(path: Path, value: bytes, mode: int, group: int | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value)
    path.chmod(mode | (0o040 if group is not None else 0))
    if group is not None:
        os.chown(path, 0, group)
