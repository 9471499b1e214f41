"""What `backend: kubernetes` asks of a config, found before anything starts. What only the cluster can tell (rights,
quota, admission) it is asked at the launch: cluster/kubernetes/backend.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from dtrain.cluster.jobplan import ClusterConfig
from dtrain.cluster.kubernetes.client import INSTALL, is_installed
from dtrain.cluster.kubernetesconfig import is_on_volume
from dtrain.cluster.storage import folder_of

Found = Iterator[tuple[str, str]]  # key, message


def check_pods(cluster: ClusterConfig, run_dir: str, checkpoint_url: str) -> Found:
    asked = cluster.kubernetes
    if not is_installed():
        yield "cluster.backend", f"kubernetes needs the package kubernetes. {INSTALL}"
    if not (asked.image or "").strip():
        yield "cluster.kubernetes.image", "is required with backend kubernetes: an image whose Python has this dtrain."
    if asked.user == "auto" and os.getuid() == 0:
        yield (
            "cluster.kubernetes.user",
            "auto is you, and you are root, which pods should not be. Launch as somebody else, or set the uid of "
            "the run directory's owner (0 for root all the same).",
        )
    for key, path in (("run_dir", folder_of(run_dir)), ("checkpoint.url", folder_of(checkpoint_url))):
        if path is not None and not is_on_volume(asked, path):
            mounted = ", ".join(asked.volumes) or "none"
            yield (
                key,
                f"{path} is on none of the pods' volumes (cluster.kubernetes.volumes: {mounted}). Mount its disk under "
                "the same path, like {/data: pvc:data}.",
            )
