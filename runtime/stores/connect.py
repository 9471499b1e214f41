"""From a place to obstore's client for it. obstore reads further options of each cloud from the environment itself
(AWS_SERVER_SIDE_ENCRYPTION, AWS_VIRTUAL_HOSTED_STYLE_REQUEST, GOOGLE_*, AZURE_* ...)."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.cluster.errors import UsageError
from dtrain.runtime.stores.aws import Account
from dtrain.runtime.stores.limits import Limits
from dtrain.runtime.stores.place import Place

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig


def connect(place: Place, account: Account | None, limits: Limits, *, sends: bool) -> ObjectStore:
    """Asks nothing yet. `account` for S3 only. `sends`: for requests with a large body, while which a store is silent.
    Raises UsageError where the cloud's own settings can't be used."""
    import obstore.exceptions
    from obstore.store import AzureStore, GCSStore, S3Store

    options, retries = _client_options(limits, sends=sends), _retries(limits)
    prefix = place.prefix or None
    try:
        if account is not None:
            return S3Store(
                place.bucket,
                prefix=prefix,
                config=_s3_config(account),
                client_options=_for_account(options, account),
                retry_config=retries,
                credential_provider=None if account.credentials is None else account.credential,
            )
        if place.scheme == "gs":
            return GCSStore(place.bucket, prefix=prefix, client_options=options, retry_config=retries)
        return AzureStore(place.bucket, prefix=prefix, client_options=options, retry_config=retries)
    except (obstore.exceptions.BaseError, ValueError, OSError) as error:
        first = str(error).split("\n\nDebug source", 1)[0]
        raise UsageError(f"{place.url}: the environment's settings for it can't be used: {first}") from error


def _s3_config(account: Account) -> Any:
    # Bodies are not hashed for the signature: that is most of the client's work, TLS guards them on the way, and each
    # block carries a checksum of ours.
    config: dict[str, Any] = {"region": account.region, "unsigned_payload": True}
    if account.endpoint is not None:
        config["endpoint"] = account.endpoint
    if account.credentials is None:
        config["skip_signature"] = True
    return config


def _for_account(options: ClientConfig, account: Account) -> ClientConfig:
    if account.endpoint is not None and account.endpoint.startswith("http://"):
        options["allow_http"] = True
    if account.ca_bundle:
        options["root_certificate"] = Path(account.ca_bundle).read_bytes()
    return options


def _client_options(limits: Limits, *, sends: bool) -> ClientConfig:
    options: ClientConfig = {
        "connect_timeout": timedelta(seconds=limits.connect_s),
        "timeout": timedelta(seconds=limits.request_s),
        "user_agent": "dtrain",
    }
    if not sends:
        options["read_timeout"] = timedelta(seconds=limits.silent_s)
    return options


def _retries(limits: Limits) -> RetryConfig:
    return {
        "max_retries": limits.max_retries,
        "retry_timeout": timedelta(seconds=limits.retry_s),
        "backoff": {
            "init_backoff": timedelta(seconds=limits.first_wait_s),
            "max_backoff": timedelta(seconds=limits.longest_wait_s),
            "base": 2,
        },
    }
