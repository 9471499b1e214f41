"""The submitter's environment on its way to the nodes: a file in the run directory that says nothing without a key that
only Ray has. Neither Ray's job info, actors and logs nor the run directory show a value. The cipher is Fernet's.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dtrain.cluster.errors import DtrainError

if TYPE_CHECKING:
    from cryptography.fernet import Fernet


def new_key() -> str:
    """As hexadecimal digits: an option's value that no shell and no argparse takes for anything else."""
    return secrets.token_hex(32)


def seal(values: Mapping[str, str], key: str) -> bytes:
    return _fernet(key).encrypt(json.dumps(dict(values)).encode())


def unseal(sealed: bytes, key: str) -> dict[str, str]:
    """Raises DtrainError for what was not sealed with this key."""
    from cryptography.fernet import InvalidToken

    try:
        text = _fernet(key).decrypt(sealed)
    except InvalidToken:
        raise DtrainError("the environment of this job was not sealed with the key that Ray has for it") from None
    return {str(name): str(value) for name, value in json.loads(text).items()}


def _fernet(key: str) -> Fernet:
    from cryptography.fernet import Fernet

    return Fernet(base64.urlsafe_b64encode(bytes.fromhex(key)))
