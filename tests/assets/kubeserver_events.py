"""Events of the tests' Kubernetes: what its parts tell about objects. Equal ones are one with a count."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from kubeserver_store import Object, Store, now


@dataclass(frozen=True, slots=True)
class Events:
    store: Store

    def tell(self, about: Object, kind: str, reason: str, message: str, source: str) -> None:
        """`kind`: Normal or Warning."""
        metadata = about["metadata"]
        namespace = metadata.get("namespace", "default")
        who = {
            "kind": about["kind"],
            "name": metadata["name"],
            "uid": metadata["uid"],
            "apiVersion": about["apiVersion"],
        }
        if "namespace" in metadata:
            who["namespace"] = namespace
        with self.store.changed:
            for old in self.store.objects("events", namespace):
                same = (old["involvedObject"]["uid"], old["reason"], old["message"])
                if same == (metadata["uid"], reason, message):
                    self.store.replace({**old, "count": old["count"] + 1, "lastTimestamp": now()})
                    return
            self.store.create({
                "apiVersion": "v1", "kind": "Event",
                "metadata": {"name": f"{metadata['name']}.{secrets.token_hex(8)}", "namespace": namespace},
                "involvedObject": who, "reason": reason, "message": message, "type": kind, "count": 1,
                "firstTimestamp": now(), "lastTimestamp": now(), "eventTime": None, "source": {"component": source},
                "reportingComponent": source, "reportingInstance": "",
            })  # fmt: skip
