"""Settings and limits of the HTTP front door.

Owns the defaults. Invariant: every limit has a defined answer (named beside it), and an address
that others can reach is served only with an API key.
"""

import ipaddress
from collections.abc import Sequence
from typing import Final

import msgspec

from diptych.engine.core.errors import ConfigError

METER_SLOT_BYTES: Final = 32 * 1024
"""What each API server counts in (see meters.py)."""
_LOCAL_NAMES: Final = frozenset({"localhost", "ip6-localhost"})


class HttpSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`model_names`: what clients may call the model; the first is the one that answers show."""

    model_names: list[str]
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: list[str] = []
    api_number: int = 0  # of this API server; part of every request id
    num_apis: int = 1  # that share the port; limits are those of each
    chat_template: str | None = None  # a file that replaces the model's own
    sampling_defaults: dict[str, object] = {}  # of the model's generation_config.json
    body_bytes_max: int = 8 * 1024 * 1024  # 413
    body_s_max: float = 30.0  # 408
    header_bytes_max: int = 64 * 1024  # 400
    header_s_max: float = 30.0  # connection closed
    stall_s_max: float = 30.0  # a stream nobody reads is ended
    keep_alive_s: int = 75
    prompts_max: int = 256  # in one completion request; 400
    messages_max: int = 4096  # 400
    in_flight_max: int = 4096  # 429
    timeout_s: float | None = None  # of requests that set none
    timeout_s_max: float = 86_400.0  # 400
    overload_status: int = 429  # or 503, for gateways that know no other
    retry_after_s: float = 5.0  # while draining
    grace_s: float = 30.0  # for running streams, after the drain began

    def verify(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise ConfigError("at least one served model name is needed")
        if not all(self.api_keys):
            raise ConfigError("an API key cannot be empty")
        check_bind(self.host, self.api_keys)


def check_bind(host: str, api_keys: Sequence[str]) -> None:
    """Raises ConfigError for an address that others can reach when no API key guards it."""
    if not api_keys and not is_loopback(host):
        raise ConfigError(
            f"refusing to listen on {host!r} without an API key: others could use this server. "
            "Set --api-key, or listen on 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    """A name other than localhost may resolve to anything, so it counts as reachable."""
    if host.lower() in _LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
