"""Meters add up over API servers, and survive them."""

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from diptych.server.http.meters import NAME_BYTES, NAMES_MAX, Cells, MeterCollector
from diptych.server.http.settings import METER_SLOT_BYTES

KEYS = ("le", "reason", "field", "model_name")


class One:
    """What one API server declares."""

    def __init__(self, memory: memoryview | None, number: int, num_slots: int) -> None:
        self.collector = MeterCollector(Cells(memory, number, num_slots), {"model_name": "m"})
        self.stops = self.collector.counter("t:ends", "Ends.", reason="stop")
        self.times = self.collector.histogram("t:time_seconds", "Times.", (0.1, 1.0))
        self.aborts = self.collector.counter("t:aborts", "Aborts.", reason="abort")
        self.collector.alias("t:old_time_seconds", "Times.", self.times)
        self.names = self.collector.named("t:fields", "Fields.", "field")

    def samples(self) -> dict[tuple[str, str], float]:
        registry = CollectorRegistry()
        registry.register(self.collector)
        text = generate_latest(registry).decode()
        return {
            (sample.name, next(sample.labels[key] for key in KEYS if key in sample.labels)): (
                sample.value
            )
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


def test_sums_over_servers_that_die_and_start_again() -> None:
    memory = memoryview(bytearray(3 * METER_SLOT_BYTES))
    servers = [One(memory, number, 3) for number in range(3)]
    for number, server in enumerate(servers):
        server.stops.inc(number + 1)
        server.times.observe(0.1)
        server.times.observe(5.0, 2)
        server.names.inc("same")
        server.names.inc(f"own{number}")
    servers[1] = One(memory, 1, 3)  # killed and started again
    servers[1].stops.inc()
    servers[1].names.inc("own1")
    servers[1].names.inc("new")
    shown = [server.samples() for server in servers]
    assert shown[0] == shown[1] == shown[2]
    assert shown[0]["t:ends_total", "stop"] == 7
    assert shown[0]["t:aborts_total", "abort"] == 0
    for name in ("t:time_seconds", "t:old_time_seconds"):
        assert shown[0][f"{name}_bucket", "0.1"] == 3
        assert shown[0][f"{name}_bucket", "1.0"] == 3
        assert shown[0][f"{name}_bucket", "+Inf"] == 9
        assert shown[0][f"{name}_count", "m"] == 9
        assert abs(shown[0][f"{name}_sum", "m"] - 30.3) < 1e-9
    fields = {label: n for (name, label), n in shown[0].items() if name == "t:fields_total"}
    assert fields == {"same": 3, "own0": 1, "own1": 2, "own2": 1, "new": 1}


def test_names_are_bounded() -> None:
    one = One(None, 5, 9)  # without memory of others it is alone
    for index in range(3 * NAMES_MAX):
        one.names.inc(f"{index}")
    one.names.inc("0")
    one.names.inc("ä" * NAME_BYTES)
    fields = one.names.values()
    assert len(fields) == NAMES_MAX + 1
    assert fields["0"] == 2
    assert fields["other"] == 2 * NAMES_MAX + 1
    two = One(None, 0, 1)
    two.names.inc("x" + "ä" * NAME_BYTES)  # cut within a character
    [name] = two.names.values()
    assert name == "x" + "ä" * ((NAME_BYTES - 1) // 2)
