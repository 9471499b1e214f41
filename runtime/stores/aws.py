"""Who asks an S3 store, and where it is: found as every AWS tool finds it, in the environment, the profile in ~/.aws,
or the machine's own service. Nothing of it is written anywhere by us. For the store that moves bytes, and for the few
questions that only botocore can put."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dtrain.cluster.errors import UsageError

if TYPE_CHECKING:
    from obstore.store import S3Credential

DEFAULT_REGION = "us-east-1"
RENEW_AFTER = timedelta(minutes=5)  # botocore hands out credentials that last longer, and renews them in time


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    session: Any  # botocore.session.Session
    credentials: Any  # botocore.credentials.Credentials; None: requests are not signed
    region: str
    endpoint: str | None  # None: Amazon's own
    ca_bundle: str | None

    def credential(self) -> S3Credential:
        """As they are now: botocore renews those that end. Called from obstore's threads."""
        frozen = self.credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + RENEW_AFTER,
        }

    def client(self, *, connect_s: float, read_s: float, max_retries: int) -> Any:
        """A botocore client of the same account."""
        import botocore.config

        config = botocore.config.Config(
            connect_timeout=connect_s,
            read_timeout=read_s,
            retries={"total_max_attempts": max_retries + 1, "mode": "standard"},
            s3={"addressing_style": "path"} if self.endpoint else None,
            signature_version=botocore.UNSIGNED if self.credentials is None else None,
        )
        return self.session.create_client(
            "s3", region_name=self.region, endpoint_url=self.endpoint, config=config, verify=self.ca_bundle
        )


def find_account() -> Account:
    """Raises UsageError where there are no credentials. May ask the machine's metadata service (2 s)."""
    import botocore.session
    from botocore.exceptions import BotoCoreError

    session = botocore.session.Session()
    try:
        credentials = None if _is_set("AWS_SKIP_SIGNATURE") else session.get_credentials()
        region = os.environ.get("AWS_REGION") or session.get_config_variable("region") or DEFAULT_REGION
        endpoint = _endpoint(session)
        ca_bundle = session.get_config_variable("ca_bundle")
    except BotoCoreError as error:  # a profile that does not exist, a file that can't be read
        raise UsageError(f"the settings for AWS can't be used: {error}") from error
    if credentials is None and not _is_set("AWS_SKIP_SIGNATURE"):
        raise UsageError(
            "no credentials for S3 were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE for one "
            "of ~/.aws/credentials; or run where the machine has a role. For a public store: AWS_SKIP_SIGNATURE=true"
        )
    return Account(session=session, credentials=credentials, region=region, endpoint=endpoint, ca_bundle=ca_bundle)


def _endpoint(session: Any) -> str | None:
    """In the order of AWS's reference for tools (feature "service-specific endpoints")."""
    profile = session.get_scoped_config()
    services = session.full_config.get("services", {}).get(profile.get("services"), {})
    found = (
        os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or services.get("s3", {}).get("endpoint_url")
        or profile.get("endpoint_url")
    )
    if not found or _is_set("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"):
        return None
    parts = urlsplit(found)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise UsageError(
            "the endpoint for S3 (AWS_ENDPOINT_URL or the profile's endpoint_url) must read http://host:port or "
            f"https://host, without a user; found {parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        )
    return str(found).rstrip("/")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
