"""The root of a supervisor process that a Python program started."""

import socket
import sys
from contextlib import suppress

import msgspec

from diptych.engine.core.errors import DiptychError
from diptych.server.boot import SupervisorBoot
from diptych.server.status import LaunchFailed
from diptych.server.supervisor import Supervisor


def main() -> None:
    boot = msgspec.json.decode(sys.stdin.buffer.read(), type=SupervisorBoot)
    assert boot.control_fd is not None
    # The supervisor closes its own descriptor; this one is for the last word.
    control = socket.fromfd(boot.control_fd, socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        status = Supervisor(boot).run()
    except DiptychError as error:
        failed = LaunchFailed(type(error).__name__, error.message)
        with suppress(OSError):
            control.send(msgspec.json.encode(failed), socket.MSG_DONTWAIT)
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    main()
