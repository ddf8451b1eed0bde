"""What every message is, and to whom it goes.

Owns nothing. Part of messages.py, where the invariants stand.
"""

from typing import Literal

import msgspec

from diptych.engine.core.types import Epoch


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages; the tag is the class name."""


class Address(msgspec.Struct, frozen=True, array_like=True):
    """One incarnation of one process. A message to an old incarnation reaches nobody."""

    kind: Literal["api", "worker", "scheduler", "supervisor"]
    number: int
    epoch: Epoch


class Send(msgspec.Struct, frozen=True):
    """A decision to send: what the pure parts return and the shells carry out, in order."""

    to: Address
    message: Message
