"""Multipart uploads in S3 that their writers left unfinished: found and aborted. Nobody sees them, but they cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dtrain.cluster.errors import StorageError
from dtrain.runtime.stores.aws import Account
from dtrain.runtime.stores.limits import Limits
from dtrain.runtime.stores.place import Place

MAX_RETRIES = 5
# The store has no such uploads, so we left none; or it has none in this bucket (as rclone 1.75 puts it).
_NONE = ("NotImplemented", "NoSuchUpload")


def make_client(account: Account, limits: Limits) -> Any:
    """Takes 0.2 s of CPU: worth keeping."""
    return account.client(connect_s=limits.connect_s, read_s=limits.silent_s, max_retries=MAX_RETRIES)


def abort_uploads(client: Any, place: Place, prefix: str, before: float) -> int:
    """Those below the directory `prefix` of `place` that began before `before`, by the store's clock. How many.
    `client`: botocore's."""
    from botocore.exceptions import BotoCoreError, ClientError

    whole_prefix = "/".join(part for part in (place.prefix, prefix.rstrip("/")) if part)
    count = 0
    try:
        for upload in list(_unfinished(client, place.bucket, f"{whole_prefix}/" if whole_prefix else "")):
            if upload["Initiated"].timestamp() < before and _abort(client, place.bucket, upload):
                count += 1
    except (BotoCoreError, ClientError) as error:
        if _code(error) in _NONE:
            return count
        raise StorageError(f"can't look for unfinished uploads in {place.url}: {error}") from error
    return count


def _unfinished(client: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
        yield from (upload for upload in page.get("Uploads", ()) if upload["Key"].startswith(prefix))


def _abort(client: Any, bucket: str, upload: dict[str, Any]) -> bool:
    from botocore.exceptions import ClientError

    try:
        client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
    except ClientError as error:
        if _code(error) in ("NoSuchUpload", "404"):  # ended, or aborted by somebody else, since we looked
            return False
        raise
    return True


def _code(error: Exception) -> str:
    """ "" where the store did not answer: then botocore's errors have a `response` that is None, or none."""
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
