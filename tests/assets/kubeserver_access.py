"""Who may do what: tokens, users and roles of the tests' Kubernetes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kubeserver_store import RESOURCES, Object, Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """As in a Role's `rules`. https://kubernetes.io/docs/reference/access-authn-authz/rbac/#referring-to-resources:
    "to represent this in an RBAC role, use a slash (/) to delimit the resource and subresource"."""

    resources: Sequence[str]
    verbs: Sequence[str]
    groups: Sequence[str] = ("",)

    def allows(self, verb: str, group: str, resource: str) -> bool:
        pairs = ((verb, self.verbs), (group, self.groups), (resource, self.resources))
        return all("*" in allowed or one in allowed for one, allowed in pairs)


@dataclass(slots=True, kw_only=True)
class User:
    name: str
    rules: Sequence[Rule] | None  # None: cluster-admin
    namespace: str = ""  # that of the rules
    groups: Sequence[str] = field(default=("system:authenticated",))

    def may(self, verb: str, group: str, resource: str, namespace: str) -> bool:
        if self.rules is None:
            return True
        # https://kubernetes.io/docs/reference/access-authn-authz/rbac/#discovery-roles: every authenticated user may
        # ask what he may (system:basic-user).
        if (group, resource, verb) == ("authorization.k8s.io", "selfsubjectaccessreviews", "create"):
            return True
        return namespace == self.namespace and any(rule.allows(verb, group, resource) for rule in self.rules)


_ALL = ("create", "delete", "deletecollection", "patch", "update", "get", "list", "watch")
_VIEW = ("get", "list", "watch")
# https://kubernetes.io/docs/reference/access-authn-authz/rbac/#user-facing-roles: edit "allows read/write access to
# most objects in a namespace. This role does not allow viewing or modifying roles or role bindings." No
# status of pods, no nodes, no quotas' change.
EDIT = (
    Rule(
        resources=("pods", "services", "secrets", "configmaps", "serviceaccounts", "persistentvolumeclaims"), verbs=_ALL
    ),
    Rule(resources=("pods/log", "pods/status", "events", "resourcequotas", "resourcequotas/status"), verbs=_VIEW),
    Rule(resources=("namespaces",), verbs=_VIEW),
    Rule(resources=("pods/eviction",), verbs=("create",)),
    Rule(groups=("batch",), resources=("jobs",), verbs=_ALL),
    Rule(groups=("batch",), resources=("jobs/status",), verbs=_VIEW),
)


def authenticate(header: str | None, users: dict[str, User]) -> User:
    """Raises Refused 401. https://kubernetes.io/docs/reference/access-authn-authz/authentication/#anonymous-requests:
    without a token a request is one of system:anonymous, with a wrong one it is refused."""
    if header is None:
        return User(name="system:anonymous", rules=(), groups=("system:unauthenticated",))
    kind, _, token = header.partition(" ")
    if kind.lower() != "bearer" or token not in users:
        raise Refused(401, "Unauthorized", "Unauthorized")
    return users[token]


def authorize(user: User, verb: str, plural: str, subresource: str, namespace: str, name: str) -> None:
    """Raises Refused 403."""
    resource = RESOURCES[plural]
    full = f"{plural}/{subresource}" if subresource else plural
    if user.may(verb, resource.group, full, namespace):
        return
    where = f' in the namespace "{namespace}"' if namespace else " at the cluster scope"
    shown = f'{resource.qualified} "{name}" is forbidden' if name else f"{resource.qualified} is forbidden"
    why = f'User "{user.name}" cannot {verb} resource "{full}" in API group "{resource.group}"{where}'
    details: Object = {
        "kind": plural,
        **({"name": name} if name else {}),
        **({"group": resource.group} if resource.group else {}),
    }
    raise Refused(403, "Forbidden", f"{shown}: {why}", details=details)


def review(user: User, obj: Object) -> Object:
    """A SelfSubjectAccessReview, answered."""
    asked = obj["spec"].get("resourceAttributes", {})
    full = "/".join(filter(None, (asked.get("resource", ""), asked.get("subresource", ""))))
    allowed = user.may(asked.get("verb", ""), asked.get("group", ""), full, asked.get("namespace", ""))
    return {**obj, "status": {"allowed": allowed}}
