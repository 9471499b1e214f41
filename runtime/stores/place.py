"""Where an object store's URL points: taken apart and checked. Nothing is asked of the store."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from dtrain.cluster.errors import UsageError

BUCKET_WORDS = {"s3": "bucket", "gs": "bucket", "az": "container"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    scheme: str  # s3 | gs | az
    bucket: str
    prefix: str  # "" or "a/b", without slashes at its ends

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def word(self) -> str:
        return BUCKET_WORDS[self.scheme]


def parse_place(url: str) -> Place:
    """Raises UsageError, without repeating a password."""
    parts = urlsplit(url)
    refuse_secrets(url)
    shape = f"{parts.scheme}://{BUCKET_WORDS.get(parts.scheme, 'bucket').upper()}/folder"
    if not parts.netloc or ":" in parts.netloc or "@" in parts.netloc:
        raise UsageError(
            f"{url} names no {BUCKET_WORDS[parts.scheme]}. Write {shape}. A server of your own is named by the "
            "environment: AWS_ENDPOINT_URL=http://host:port"
        )
    if parts.query or parts.fragment:
        raise UsageError(f"{url}: nothing may follow the folder. Write {shape}; ? and # can't be part of it.")
    prefix = unquote(parts.path).strip("/")
    if "\0" in prefix or any(part in ("", ".", "..") for part in prefix.split("/") if prefix):
        raise UsageError(f"{url}: the parts of a folder can't be empty, '.' or '..'. Write {shape}.")
    return Place(scheme=parts.scheme, bucket=parts.netloc, prefix=prefix)


def refuse_secrets(url: str) -> None:
    """URLs are written into files, logs and error messages."""
    if "@" in (netloc := urlsplit(url).netloc) and ":" in netloc.rpartition("@")[0]:
        raise UsageError(
            f"{urlsplit(url).scheme}://...@{netloc.rpartition('@')[2]}: a URL with a password would end up in files. "
            "Leave it out: credentials come from the environment or the usual files of your home."
        )
