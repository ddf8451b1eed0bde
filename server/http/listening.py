"""The listening socket of the HTTP front door, bound before anything else starts.

Owns nothing: the caller closes the socket. Imports nothing heavy, so that a taken port or an open
address without a key is an error at once.
"""

import socket
from typing import Final

from diptych.engine.core.errors import ConfigError
from diptych.server.http.settings import HttpSettings, check_bind

BACKLOG: Final = 2048


def open_socket(settings: HttpSettings) -> socket.socket:
    """A bound socket, which several API servers may share. Raises ConfigError."""
    check_bind(settings.host, settings.api_keys)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((settings.host, settings.port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}. "
            "Choose another --port."
        ) from error
    sock.setblocking(False)
    sock.set_inheritable(True)
    return sock
