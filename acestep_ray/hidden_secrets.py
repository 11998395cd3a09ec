"""Texts without the secrets in them: passwords and keys of URLs, tokens of known forms, values of the environment."""

from __future__ import annotations

import os
import re

from acestep_ray.errors import without_password

HIDDEN = "…"

# Of signed URLs, and of services that take a token in the address.
_PARAMETER = re.compile(
    r"""(?ix)((?:[?&;]|\b(?=x-))(?:x-(?:amz|goog)-(?:signature|credential|security-token)|signature|sig|policy
    |awsaccesskeyid|googleaccessid|key-pair-id|auth|[\w-]*(?:token|secret|password|passwd|api_?key|access_?key)[\w-]*)
    =)[^&\s"'<>]+"""
)
_HEADER = re.compile(
    r"""(?i)(authorization["']?\s*[:=]\s*["']?(?:(?:bearer|basic)\s+)?|\bbearer\s+)[\w.~+/=-]{8,}"""
)
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|A[KS]IA[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{20,})\b")
_VARIABLE = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|ACCESS_KEY|API_KEY")
_SHORTEST = 8


def without_secrets(text: str) -> str:
    """Without names, passwords, keys and signatures of URLs, and without tokens of known forms."""
    text = _PARAMETER.sub(rf"\1{HIDDEN}", without_password(text))
    return _TOKEN.sub(HIDDEN, _HEADER.sub(rf"\1{HIDDEN}", text))


def fit_to_print(text: str) -> str:
    """The same, and without the values of this process's variables that are named as secrets."""
    for name, value in os.environ.items():
        is_place = name.endswith(("_PATH", "_FILE")) or value.startswith("/")
        if _VARIABLE.search(name) and len(value) >= _SHORTEST and not is_place:
            text = text.replace(value, HIDDEN)
    return without_secrets(text)


def holds_secret(url: str) -> bool:
    """Whether the parameters of a URL hold a key, a token or a signature."""
    return _PARAMETER.search(url) is not None
