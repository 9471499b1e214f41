"""What a store says, in words: what was asked, what was found, what to do. Knows obstore's errors by their text, as
that is all they have."""

from __future__ import annotations

import re

from dtrain.cluster.errors import StorageError
from dtrain.cluster.storage import ObjectInfo
from dtrain.runtime.stores.place import Place

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_URL = re.compile(r"https?://[^/\s]+")

_CLOCK = "this machine's clock and the store's differ. Set the clock (NTP)"
_KEY = "the access key is not known there. Check AWS_ACCESS_KEY_ID, or AWS_PROFILE"
_REGION = "the {word} lies in another region. Set AWS_REGION to it"
_EXPIRED = "the session's credentials have expired. Log in again, or renew AWS_SESSION_TOKEN"
_MISSING = "there is no {word} {bucket}. Make it, or choose another in checkpoint.url"
_RIGHTS = "these credentials do not have the right. Ask for reading, writing, listing and deleting in {word} {bucket}"

_METADATA = "//169.254.169.254"  # every cloud's, where a machine asks who it is
_NO_ROLE = (
    "no credentials were found, and this machine has no role of its own. Set GOOGLE_APPLICATION_CREDENTIALS, or "
    "AZURE_STORAGE_ACCOUNT_KEY"
)

# By the code in the store's answer.
_CODES = {
    "NoSuchBucket": _MISSING,
    "ContainerNotFound": _MISSING,
    "InvalidBucketName": "{bucket} can't be the name of a {word}",
    "InvalidAccessKeyId": _KEY,
    "SignatureDoesNotMatch": "the secret key does not belong to the access key. Check AWS_SECRET_ACCESS_KEY",
    "RequestTimeTooSkewed": _CLOCK,
    "RequestExpired": _CLOCK,
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "InvalidToken": _EXPIRED,
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
    "QuotaExceeded": "the quota is used up. Free space there, or lower checkpoint.keep",
    "InsufficientCapacity": "the store is full. Free space there, or lower checkpoint.keep",
}
# By the status of an answer whose code is not among those.
_STATUSES = {
    "301": _REGION,
    "307": _REGION,
    "401": "the store does not know these credentials. Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "403": _RIGHTS,
    "404": "what answers there knows no {word} {bucket}. Is it an object store? Check AWS_ENDPOINT_URL",
    "429": "the store is too busy, also after several tries. Try again later",
    "503": "the store is too busy, also after several tries. Try again later",
    "507": "the store is full. Free space there, or lower checkpoint.keep",
}
# By what the client says where no answer came.
_CLIENT = (
    (re.compile(r"dns error|failed to lookup", re.I), "the name of its server is not known. Check AWS_ENDPOINT_URL"),
    (
        re.compile(r"invalid peer certificate|UnknownIssuer|certificate verify", re.I),
        "its certificate is not trusted. Name the CA's file in AWS_CA_BUNDLE",
    ),
    (re.compile(r"kind: Connect|error trying to connect|Connection refused", re.I), "its server can't be reached"),
    (re.compile(r"kind: Timeout|timed out|TimedOut|deadline", re.I), "its server does not answer in time"),
    (re.compile(r"LOCATION|redirect", re.I), _REGION),
)


def in_words(error: BaseException, what: str, place: Place) -> StorageError:
    """`what` was asked: "write a/b". The result is to be raised from `error`."""
    text = str(error)
    server = _URL.search(text)
    at = f" (at {server[0]})" if server else ""
    cause = (_NO_ROLE if _METADATA in at else _cause(text)).format(word=place.word, bucket=place.bucket)
    return StorageError(f"can't {what} in {place.url}{at}: {cause}")


def _cause(text: str) -> str:
    code, status = _CODE.search(text), _STATUS.search(text)
    if code and code[1] in _CODES:
        return _CODES[code[1]]
    if status and status[1] in _STATUSES:
        return _STATUSES[status[1]] + (f" ({code[1]})" if code and status[1] not in ("429", "503") else "")
    if status is None:
        for pattern, words in _CLIENT:
            if pattern.search(text):
                return words
    return text.split("\n\nDebug source", 1)[0].replace("{", "{{").replace("}", "}}")


def is_missing_bucket(error: BaseException) -> bool:
    """A missing bucket looks like a missing object."""
    code = _CODE.search(str(error))
    return code is not None and code[1] in ("NoSuchBucket", "ContainerNotFound")


def status_of(error: BaseException) -> int | None:
    """Of the store's answer; None where none came."""
    status = _STATUS.search(str(error))
    return int(status[1]) if status else None


def is_passing(error: BaseException) -> bool:
    """Whether another try may succeed: no answer came, or one that speaks of the moment."""
    status = status_of(error)
    return status is None or status in (408, 409, 429, 500, 502, 503, 504)


def cut_short(url: str, key: str, offset: int, size_bytes: int, found: ObjectInfo | None) -> StorageError:
    """For a read of `size_bytes` from `offset` on that got fewer. `found`: what the store has under the key."""
    size = "is gone" if found is None else f"ends at {found.size_bytes}. It was cut short after it was written."
    return StorageError(f"can't read {url}/{key}: asked for bytes {offset} to {offset + size_bytes}, but it {size}")
