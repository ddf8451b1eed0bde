"""What a supervisor tells the program that started it, one JSON packet each."""

import msgspec

from diptych.server.boot import ApiBoot


class Status(msgspec.Struct, frozen=True, tag=True):
    """Base of the packets."""


class Progressed(Status, frozen=True):
    """Something came up; for people."""

    text: str
    run_dir: str


class Listening(Status, frozen=True):
    """Other hosts may join at `endpoint`, "HOST:PORT"."""

    endpoint: str
    run_dir: str


class Started(Status, frozen=True):
    """The scheduler and all workers are up; the receiver is API server 0."""

    boot: ApiBoot


class LaunchFailed(Status, frozen=True):
    """The engine cannot start; `kind` is the name of the DiptychError."""

    kind: str
    message: str


LaunchStatus = Progressed | Listening | Started | LaunchFailed
