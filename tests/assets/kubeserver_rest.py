"""The API of the tests' Kubernetes as a function from a request to an answer, and its watches.

HTTP is kubeserver_http.py's, what may be written kubeserver_admission.py's and kubeserver_rules.py's.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import kubeserver_access
import kubeserver_admission
import kubeserver_rules
import kubeserver_schema
import yaml
from kubeserver_access import User
from kubeserver_conditions import evict
from kubeserver_patch import Predicate, field_selector, label_selector
from kubeserver_store import RESOURCES, Change, Key, Object, Refused, Resource, Store, conflict, delete
from kubeserver_writes import assembled, patched

Query = dict[str, str]
_PATH = re.compile(
    r"(?:/api/v1|/apis/(?P<group>[^/]+)/v1)(?:/namespaces/(?P<namespace>[^/]+)(?=/))?"
    r"/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+)(?:/(?P<sub>[a-z]+))?)?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    method: str
    path: str
    query: Query
    body: bytes
    content_type: str
    user: User


@dataclass(slots=True, kw_only=True)
class Answer:
    body: Object | None = None
    code: int = 200
    stream: Iterator[bytes] | None = None  # instead of a body
    content_type: str = "application/json"
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    resource: Resource
    namespace: str
    name: str
    sub: str

    @property
    def key(self) -> Key:
        return self.resource.plural, self.namespace, self.name


def route(path: str) -> Route:
    """Raises Refused 404."""
    found = _PATH.fullmatch(path)
    resource = RESOURCES.get(found["plural"]) if found else None
    unknown = Refused(404, "NotFound", "the server could not find the requested resource", details={})
    if found is None or resource is None or resource.group != (found["group"] or ""):
        raise unknown
    if found["sub"] and found["sub"] not in resource.subresources:
        raise unknown
    if found["namespace"] and not resource.namespaced:
        raise unknown
    return Route(
        resource=resource, namespace=found["namespace"] or "", name=found["name"] or "", sub=found["sub"] or ""
    )


def is_true(query: Query, name: str) -> bool:
    """Whether a flag of the query is set: by any word but these, as the clients in Python say `True`."""
    return name in query and query[name].lower() not in ("false", "0")


def verb_of(request: Request, where: Route) -> str:
    watching = is_true(request.query, "watch")
    verbs = {
        "GET": "get" if where.name else "watch" if watching else "list",
        "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete" if where.name else "deletecollection",
    }  # fmt: skip
    return verbs.get(request.method, request.method.lower())


Logs = Callable[[Object, Query], Answer]


@dataclass(slots=True)
class Api:
    """`logs` answers for a pod's log, `closing` says that the server ends."""

    store: Store
    logs: Logs
    closing: Callable[[], bool]
    bookmark_s: float = 1.0
    _continues: dict[str, tuple[int, list[Object]]] = field(default_factory=dict)

    def answer(self, request: Request, where: Route, verb: str) -> Answer:
        """Raises Refused."""
        kubeserver_access.authorize(
            request.user, verb, where.resource.plural, where.sub, where.namespace, where.name
        )  # fmt: skip
        allowed = {
            "": where.resource.verbs, "status": ("get", "update", "patch"), "log": ("get",), "eviction": ("create",),
        }[where.sub]  # fmt: skip
        if verb not in allowed:
            raise Refused(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
        match verb:
            case "list":
                return self._list(request, where)
            case "watch":
                return Answer(stream=self._watch(request, where))
            case "get":
                found = self.store.get(*where.key)
                return self.logs(found, request.query) if where.sub == "log" else Answer(body=found)
            case "create":
                return self._create(request, where)
            case "update" | "patch":
                return self._change(request, where, verb)
            case "delete":
                return self._delete(request, where)
        return self._delete_many(request, where)

    def expire(self) -> None:
        """Continue tokens and the history of changes are forgotten, as after five minutes."""
        self._continues.clear()
        self.store.forget_history()

    # Reading.

    def _selected(self, request: Request, where: Route) -> Predicate:
        labels = label_selector(request.query.get("labelSelector", ""))
        fields = field_selector(request.query.get("fieldSelector", ""), where.resource.plural)
        return lambda obj: labels(obj) and fields(obj)

    def _list(self, request: Request, where: Route) -> Answer:
        token, limit = request.query.get("continue", ""), int(request.query.get("limit") or 0)
        if token:
            # https://kubernetes.io/docs/reference/using-api/api-concepts/#retrieving-large-results-sets-in-chunks: "a
            # continue token will expire after a short amount of time [...] and return a 410 Gone if more results cannot
            # be returned."
            if token not in self._continues:
                words = "The provided continue parameter is too old to display a consistent list result."
                raise Refused(410, "Expired", words)
            version, found = self._continues.pop(token)
        else:
            with self.store.changed:
                version = self.store.version
                selected = self._selected(request, where)
                self._check_version(request.query.get("resourceVersion", ""), version, list_=True)
                found = [
                    one for one in self.store.objects(where.resource.plural, where.namespace or None) if selected(one)
                ]
        metadata: Object = {"resourceVersion": str(version)}
        if limit and len(found) > limit:
            metadata["continue"] = secrets.token_urlsafe(12)
            metadata["remainingItemCount"] = len(found) - limit
            self._continues[metadata["continue"]] = (version, found[limit:])
            found = found[:limit]
        items = [{k: v for k, v in one.items() if k not in ("kind", "apiVersion")} for one in found]
        kind, version_name = f"{where.resource.kind}List", where.resource.api_version
        return Answer(body={"kind": kind, "apiVersion": version_name, "metadata": metadata, "items": items})

    def _check_version(self, given: str, present: int, *, list_: bool = False) -> int:
        if not given:
            return present
        if not given.isdigit():
            raise Refused(400, "BadRequest", f"Invalid value: {given!r}: strconv.ParseUint: invalid syntax")
        if int(given) > present:
            words = f"Timeout: Too large resource version: {given}, current: {present}"
            raise Refused(504, "Timeout", words, retry_after_s=1)
        return int(given)

    def _watch(self, request: Request, where: Route) -> Iterator[bytes]:
        """https://kubernetes.io/docs/reference/using-api/api-concepts/#semantics-for-watch: without a version or with 0
        the stream begins with "synthetic Added events" of all that is there."""
        selected = self._selected(request, where)
        given = request.query.get("resourceVersion", "")
        present = self._check_version(given, self.store.version)
        return self._stream(request, where, selected, given, present)

    def _stream(self, request: Request, where: Route, selected: Predicate, given: str, seen: int) -> Iterator[bytes]:
        deadline = time.monotonic() + float(request.query.get("timeoutSeconds") or 1800)
        bookmarks = is_true(request.query, "allowWatchBookmarks")
        first: list[Object] = []
        with self.store.changed:
            if given in ("", "0"):
                seen = self.store.version
                first = [
                    one for one in self.store.objects(where.resource.plural, where.namespace or None) if selected(one)
                ]
            elif seen < self.store.oldest:
                # The answer has begun when the server looks: an event of a stream with code 200.
                words = f"too old resource version: {given} ({self.store.oldest})"
                yield _event("ERROR", Refused(410, "Expired", words).body)
                return
        for obj in first:
            yield _event("ADDED", obj)
        marked = time.monotonic()
        while time.monotonic() < deadline and not self.closing():
            with self.store.changed:
                if self.store.version == seen:
                    self.store.changed.wait(0.2)
                changes, seen = self.store.since(seen), self.store.version
            for change in changes:
                yield from _told(change, where, selected)
            if bookmarks and time.monotonic() - marked > self.bookmark_s:
                marked = time.monotonic()
                yield self._bookmark(where, seen)
            yield b""  # a chance to notice that nobody listens
        if bookmarks:
            yield self._bookmark(where, seen)

    def _bookmark(self, where: Route, seen: int) -> bytes:
        mark = {"kind": where.resource.kind, "apiVersion": where.resource.api_version}
        return _event("BOOKMARK", {**mark, "metadata": {"resourceVersion": str(seen)}})

    # Writing.

    def _body(self, request: Request, where: Route, kind: str) -> tuple[Object, list[str]]:
        """The object that was sent, as far as the server knows its fields, and warnings. Raises Refused 400, 415."""
        if request.content_type not in ("application/json", "application/yaml", ""):
            words = "the body of the request was in an unknown format - accepted media types include: "
            raise Refused(415, "UnsupportedMediaType", f"{words}application/json, application/yaml")
        try:
            obj = (
                yaml.safe_load(request.body) if "yaml" in request.content_type else json.loads(request.body or b"null")
            )
        except (ValueError, yaml.YAMLError) as error:
            raise Refused(400, "BadRequest", f"the object provided is unrecognized: {error}") from None
        if not isinstance(obj, dict):
            raise Refused(400, "BadRequest", "Object 'Kind' is missing")
        resource = where.resource
        version = "policy/v1" if kind == "Eviction" else resource.api_version
        sent = f"{obj.get('apiVersion', version)}, Kind={obj.get('kind', kind)}"
        if sent != f"{version}, Kind={kind}":
            words = f'{kind} in version "v1" cannot be handled as a {kind}: no kind matches {sent}'
            raise Refused(400, "BadRequest", words)
        obj |= {"apiVersion": version, "kind": kind}
        return self._decoded(obj, request)

    def _decoded(self, obj: Object, request: Request) -> tuple[Object, list[str]]:
        """https://kubernetes.io/docs/reference/using-api/api-concepts/#setting-the-field-validation-level: Strict
        "rejects the request with a 400 Bad Request error when it detects any unknown or duplicate fields", Warn, the
        default, answers with a warning header."""
        kubeserver_rules.check_secret_encoding(obj)
        kind = obj["kind"]
        found, unknown = kubeserver_schema.decode(obj, kind)
        level = request.query.get("fieldValidation") or "Warn"
        if level not in ("Ignore", "Warn", "Strict"):
            raise Refused(400, "BadRequest", f"fieldValidation parameter unsupported: {level}")
        words = [f'unknown field "{path}"' for path in unknown]
        if words and level == "Strict":
            said = f"strict decoding error: {', '.join(words)}"
            raise Refused(400, "BadRequest", f'{kind} in version "v1" cannot be handled as a {kind}: {said}')
        return found, words if level == "Warn" else []

    def _create(self, request: Request, where: Route) -> Answer:
        if where.sub == "eviction":
            return self._evict(request, where)
        if where.name:
            raise Refused(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
        obj, warnings = self._body(request, where, where.resource.kind)
        if where.resource.plural == "selfsubjectaccessreviews":
            return Answer(body=kubeserver_access.review(request.user, obj), code=201)
        metadata = obj.setdefault("metadata", {})
        if where.resource.namespaced:
            if not where.namespace:
                raise Refused(
                    405, "MethodNotAllowed", "the server does not allow this method on the requested resource"
                )
            if metadata.setdefault("namespace", where.namespace) != where.namespace:
                words = "the namespace of the provided object does not match the namespace sent on the request"
                raise Refused(400, "BadRequest", words)
        dry_run = _dry_run(request.query)
        return Answer(body=kubeserver_admission.create(self.store, obj, dry_run=dry_run), code=201, warnings=warnings)

    def _change(self, request: Request, where: Route, verb: str) -> Answer:
        with self.store.changed:
            old = self.store.get(*where.key)
            if verb == "patch":
                sent, warnings = self._decoded(
                    patched(old, request.body, request.content_type, where.resource), request
                )
            else:
                sent, warnings = self._body(request, where, where.resource.kind)
            metadata = sent.setdefault("metadata", {})
            for name, expected in (("name", where.name), ("namespace", where.namespace)):
                if expected and metadata.setdefault(name, expected) != expected:
                    words = (
                        f"the {name} of the object ({metadata[name]}) does not match the {name} on the URL ({expected})"
                    )
                    raise Refused(400, "BadRequest", words)
            if metadata.get("uid", old["metadata"]["uid"]) != old["metadata"]["uid"]:
                given, present = metadata["uid"], old["metadata"]["uid"]
                why = f"Precondition failed: UID in precondition: {given}, UID in object meta: {present}"
                raise conflict(where.resource, where.name, why)
            new = assembled(old, sent, where.resource, where.sub)
            if not where.sub:
                kubeserver_rules.check_update(new, old)
            return Answer(body=new if _dry_run(request.query) else self.store.replace(new), warnings=warnings)

    def _options(self, request: Request) -> Object:
        """https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/delete-options/, in the body or the
        query."""
        options: Object = {}
        if request.body:
            options, _ = kubeserver_schema.decode(json.loads(request.body), "DeleteOptions")
        else:
            for name in ("propagationPolicy", "gracePeriodSeconds", "orphanDependents"):
                if name in request.query:
                    text = request.query[name]
                    options[name] = (
                        int(text) if name == "gracePeriodSeconds" else text == "true" if name[0] == "o" else text
                    )
        policy = options.get("propagationPolicy")
        if policy not in (None, "Orphan", "Background", "Foreground"):
            words = f'DeleteOptions.meta.k8s.io "" is invalid: propagationPolicy: Unsupported value: "{policy}"'
            raise Refused(422, "Invalid", words)
        if policy and options.get("orphanDependents") is not None:
            words = "orphanDependents and propagationPolicy cannot be both set"
            raise Refused(422, "Invalid", f'DeleteOptions.meta.k8s.io "" is invalid: {words}')
        options["dryRun"] = options.get("dryRun") or ([request.query["dryRun"]] if request.query.get("dryRun") else [])
        return options

    def _delete(self, request: Request, where: Route) -> Answer:
        options = self._options(request)
        if options["dryRun"]:
            return Answer(body=self.store.get(*where.key))
        gone = delete(self.store, where.key, options)
        if where.resource.plural in ("pods", "services") or gone["metadata"].get("finalizers"):
            return Answer(body=gone)
        details = {"name": where.name, "kind": where.resource.plural, "uid": gone["metadata"]["uid"]}
        status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
        return Answer(body=status)

    def _delete_many(self, request: Request, where: Route) -> Answer:
        options = self._options(request)
        listed = self._list(request, where)
        for item in (listed.body or {})["items"] if not options["dryRun"] else ():
            delete(
                self.store, (where.resource.plural, item["metadata"]["namespace"], item["metadata"]["name"]), options
            )
        return listed

    def _evict(self, request: Request, where: Route) -> Answer:
        """https://kubernetes.io/docs/concepts/scheduling-eviction/api-eviction/: "API-initiated eviction [...] is like
        performing a policy-controlled DELETE operation on the Pod." No budget for disruptions is simulated."""
        eviction, warnings = self._body(request, where, "Eviction")
        with self.store.changed:
            pod = self.store.get(*where.key)
            if not _dry_run(request.query):
                evict(
                    self.store,
                    pod,
                    "EvictionByEvictionAPI",
                    "Eviction API: evicting",
                    eviction.get("deleteOptions", {}),
                )
        body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}
        return Answer(body=body, code=201, warnings=warnings)


def _dry_run(query: Query) -> bool:
    """ "All: every stage runs as normal, except for the final storage stage"."""
    value = query.get("dryRun", "")
    if value not in ("", "All"):
        raise Refused(400, "BadRequest", f'dryRun: Unsupported value: "{value}": supported values: "All"')
    return bool(value)


def _event(kind: str, obj: Object) -> bytes:
    return json.dumps({"type": kind, "object": obj}).encode() + b"\n"


def _told(change: Change, where: Route, selected: Predicate) -> Iterator[bytes]:
    """A change as this watch sees it: what begins to fit its selectors is new, what ceases to is gone."""
    plural, namespace, name = change.key
    if plural != where.resource.plural or where.namespace not in ("", namespace) or where.name not in ("", name):
        return
    fits = change.type != "DELETED" and selected(change.object)
    fitted = change.before is not None and selected(change.before)
    if fits or fitted:
        yield _event("DELETED" if not fits else "MODIFIED" if fitted else "ADDED", change.object)
