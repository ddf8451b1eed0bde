"""GET /server_info: what is served and what its workers do right now, for people and scripts.

Owns nothing; the numbers are the scheduler's newest sums and this API server's own counts.
"""

import msgspec

import diptych
from diptych.engine.core.messages import Stats
from diptych.server.client import EngineInfo, Health
from diptych.server.http.front import Front


class ServerInfo(msgspec.Struct, frozen=True):
    """`engine` is null until the scheduler's first report. Counters run since its start."""

    version: str
    models: list[str]
    model: EngineInfo
    health: Health
    api: int  # the number of this API server
    in_flight: int  # HTTP requests of this API server
    generated_tokens: int  # by all API servers, since the start
    engine: Stats | None


def server_info(front: Front) -> dict[str, object]:
    client = front.client
    info = ServerInfo(
        version=diptych.__version__,
        models=front.settings.model_names,
        model=client.info,
        health=client.health(),
        api=front.settings.api_number,
        in_flight=front.in_flight,
        generated_tokens=int(front.metrics.generated.value),
        engine=client.stats(),
    )
    named: dict[str, object] = msgspec.to_builtins(info)
    named["engine"] = _named(info.engine)  # structs of the wire are arrays; here they get names
    return named


def _named(value: object) -> object:
    if isinstance(value, msgspec.Struct):
        return {name: _named(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, list):
        return [_named(item) for item in value]
    return value
