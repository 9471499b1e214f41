"""What the cluster section says of the nodes themselves, looked at before anything starts: secrets, setup, interface,
ports. On the local back end this machine is every node, so that what it lacks is found here and not by an agent.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence

from dtrain.cluster.configfile import Node, nearest, walk
from dtrain.cluster.errors import Problem, UsageError
from dtrain.cluster.interfaces import list_interfaces, network_of, pick
from dtrain.cluster.jobplan import ClusterConfig
from dtrain.cluster.ray.jobs import INSTALL, is_installed
from dtrain.cluster.secretrefs import Secret, file_values, parse_secret, secret_values
from dtrain.cluster.sshconfig import slots_of

Found = Iterator[tuple[str, str]]  # key, message
_BASH_TIMEOUT_S = 10
_SECRET = "Name it: cluster.kubernetes.secret: keys (kubectl create secret generic keys --from-literal={name}=...)"
_MIN_LEAK_CHARS = 6  # shorter values are in ordinary text by accident


def check_nodes(cluster: ClusterConfig) -> Found:
    yield from _secrets(cluster, os.environ)
    yield from _setup(cluster.setup)
    yield from _ports(cluster.port_range)
    yield from _interface(cluster)
    if not cluster.python.strip():
        yield "cluster.python", "is empty. Give the path of the nodes' Python, or auto."


def _secrets(cluster: ClusterConfig, environ: Mapping[str, str]) -> Found:
    for index, entry in enumerate(cluster.secrets):
        key = f"cluster.secrets.{index}"
        secret = parse_secret(entry)
        if secret is None:
            # Not repeated: who took `secrets` for a place for values has written one there.
            yield (
                key,
                "expects the name of an environment variable, not its value. For example: WANDB_API_KEY, or with a "
                "file that holds the value: WANDB_API_KEY=file:~/.wandb-key",
            )
            continue
        name = secret.name
        if name in cluster.env:
            yield key, f"{name} is in cluster.env too, which everybody can read. Leave it out there, and export it."
        elif secret.path is not None:
            yield from ((key, message) for message in _file_problems(secret, entry))
        elif cluster.backend == "kubernetes":
            if cluster.kubernetes.secret is None:
                yield (
                    key,
                    f"{name} reaches pods only from a Secret of the cluster. {_SECRET.format(name=name)}",
                )
        elif not environ.get(name):
            near = nearest(name, environ, cutoff=0.8)
            hint = f" Did you mean {near}?" if near else ""
            yield key, f"{name} is not set here, so it can't reach the workers. Export it, or leave it out.{hint}"


def _file_problems(secret: Secret, entry: str) -> Iterator[str]:
    path = str(secret.path)
    if not path.startswith(("/", "~/")):
        yield f"{path} depends on the folder that one is in. Write a path that begins with / or ~/"
        return
    try:
        file_values([entry])
    except UsageError as error:
        yield f"{secret.name} is to be read from {error}"


def _setup(lines: Sequence[str]) -> Found:
    bash = shutil.which("bash")
    if lines and bash is None:
        yield "cluster.setup", "needs bash, and there is none in PATH. Install it, or leave setup out."
        return
    for index, line in enumerate(lines):
        if bash is not None and (complaint := _syntax(bash, line)):
            yield f"cluster.setup.{index}", f"bash can't read this line: {complaint}. Each one is a whole command."


def _syntax(bash: str, line: str) -> str:
    """Bash's complaint, "" where it has none. Nothing is run."""
    try:
        read = subprocess.run(
            [bash, "-n", "-c", line], capture_output=True, text=True, timeout=_BASH_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # ValueError: a NUL in the line
        return str(error)
    first = read.stderr.strip().splitlines()[0] if read.returncode and read.stderr.strip() else ""
    return re.sub(r"^.*?line \d+: ", "", first)


def _ports(ports: Sequence[int] | None) -> Found:
    if ports is None:
        return
    key = "cluster.port_range"
    if len(ports) != 2:
        yield key, f"expects the first and the last port, like [29400, 29499], found {len(ports)} numbers."
    elif not 1 <= min(ports) <= max(ports) <= 65535:
        yield key, f"{ports[0]} to {ports[1]}: ports are between 1 and 65535."
    elif ports[0] >= ports[1]:
        yield (
            key,
            (
                f"{ports[0]} to {ports[1]} is {'one port' if ports[0] == ports[1] else 'the wrong way round'}. "
                "A job listens on two at least, the lower one first: like [29400, 29499]."
            ),
        )


def _interface(cluster: ClusterConfig) -> Found:
    if cluster.interface == "auto":
        return
    if "/" in cluster.interface and network_of(cluster.interface) is None:
        yield "cluster.interface", f"{cluster.interface} is no range of addresses. For example: 10.0.0.0/8"
    elif cluster.backend == "local":
        try:
            pick(cluster.interface, list_interfaces())
        except UsageError as error:
            yield "cluster.interface", f"{error} Set one of them, or auto."


def check_hosts(cluster: ClusterConfig) -> Found:
    """The list of machines that ssh is to reach; whether it does is seen at the launch."""
    key = "cluster.ssh.hostfile" if cluster.ssh.hostfile else "cluster.ssh.hosts"
    try:
        hosts = cluster.ssh.read_hosts()
        if cluster.procs_per_node == "auto":
            slots_of(hosts[: cluster.nodes])
    except ValueError as error:
        yield key, str(error)
        return
    if len(hosts) < cluster.nodes:
        names = ", ".join(host.name for host in hosts[:5])
        found = f"{cluster.nodes} nodes, but {len(hosts)} listed ({names})" if hosts else "lists no machine"
        yield key, f"{found}. Name each machine as ssh knows it, like [node1, node2]."
    if shutil.which("ssh") is None:
        yield "cluster.backend", "ssh is not installed here. Install OpenSSH's client."


def check_ray(cluster: ClusterConfig) -> Found:
    """What can be known without the cluster; whether it answers is seen at the launch."""
    yield from cluster.ray.problems()
    if not is_installed():
        yield "cluster.backend", f"ray needs the package ray, which is not installed here. {INSTALL}"


def find_leaks(tree: Node, entries: Sequence[str], environ: Mapping[str, str]) -> list[Problem]:
    """The places of a resolved config that hold a named secret's value: the run directory would show it to all."""
    values = _known_values(entries, environ)
    return [
        Problem(
            where=node.where,
            key=".".join(path),
            message=f"holds the value of the secret {name}, and the run directory would keep it for all to read. "
            "Leave it out, and let the code read the variable.",
        )
        for path, node in walk(tree)
        for name, value in values.items()
        if len(value) >= _MIN_LEAK_CHARS and isinstance(node.value, str) and value in node.value
    ]


def _known_values(entries: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Of those that can be read; what is wrong with the others is said elsewhere."""
    values: dict[str, str] = {}
    for entry in entries:
        with contextlib.suppress(UsageError):
            values |= secret_values([entry], environ)
    return values
