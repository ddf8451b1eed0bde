"""An API server without HTTP, for tests of the supervisor: serves until it is told to drain."""

from diptych.engine.core.messages import Address, Drain
from diptych.server.boot import ApiBoot
from diptych.transfer.channels import Channels


def serve(boot: ApiBoot) -> None:
    channels = Channels(boot.path, Address("api", boot.api, boot.api_epoch))
    channels.announce()
    while not any(isinstance(message, Drain) for message in channels.receive(None)):
        pass
    channels.close()


def fail(_: ApiBoot) -> None:
    raise RuntimeError("this front door cannot open")
