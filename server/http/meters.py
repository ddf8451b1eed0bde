"""Counters and histograms that all API servers of a server add up in shared memory.

Each API server owns one slot of doubles and writes nothing else; whoever is scraped shows the sums
over all slots. The supervisor holds the memory, so a number never goes back: neither when an API
server is killed nor when it starts again. Invariant: all of them declare the same meters in the
same order, so a meter has the same place in every slot.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Final

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from diptych.server.http.settings import METER_SLOT_BYTES

NAMES_MAX: Final = 32  # of a `NamedCounter`; further names share the last entry
NAME_BYTES: Final = 48
_CELLS: Final = METER_SLOT_BYTES // 8
Labels = dict[str, str]


class Cells:
    """The doubles of all slots; `own` are those of this API server."""

    def __init__(self, memory: memoryview | None, number: int, num_slots: int) -> None:
        """`memory` None: this is the only API server."""
        if memory is None:
            memory, number, num_slots = memoryview(bytearray(METER_SLOT_BYTES)), 0, 1
        assert 0 <= number < num_slots
        self._num_slots = num_slots
        self._all = memory[: num_slots * METER_SLOT_BYTES].cast("d")
        self._bytes = memory
        self.own = self._all[number * _CELLS : (number + 1) * _CELLS]
        self._own_bytes = memory[number * METER_SLOT_BYTES : (number + 1) * METER_SLOT_BYTES]
        self._used = 0

    def reserve(self, count: int) -> int:
        """The first of `count` cells in a row."""
        first = self._used
        self._used += count
        assert self._used <= _CELLS, "METER_SLOT_BYTES is too small"
        return first

    def each(self, cell: int) -> list[float]:
        """What each slot holds there."""
        return [self._all[cell + slot * _CELLS] for slot in range(self._num_slots)]

    def total(self, cell: int) -> float:
        return sum(self.each(cell))

    def write_name(self, cell: int, name: bytes) -> None:
        self._own_bytes[cell * 8 : cell * 8 + len(name)] = name

    def read_names(self, cell: int) -> Iterator[bytes]:
        """What each slot holds there, the empty ones included."""
        for slot in range(self._num_slots):
            first = slot * METER_SLOT_BYTES + cell * 8
            yield bytes(self._bytes[first : first + NAME_BYTES]).rstrip(b"\0")


class Counter:
    def __init__(self, cells: Cells) -> None:
        self._own = cells.own
        self._cells = cells
        self.cell = cells.reserve(1)

    def inc(self, amount: float = 1.0) -> None:
        self._own[self.cell] += amount

    @property
    def value(self) -> float:
        """Of all API servers."""
        return self._cells.total(self.cell)


class Histogram:
    def __init__(self, cells: Cells, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self._own = cells.own
        self._cells = cells
        self._first = cells.reserve(len(self.bounds) + 2)  # a bucket each, +Inf, the sum
        self._sum = self._first + len(self.bounds) + 1

    def observe(self, value: float, count: float = 1.0) -> None:
        """`count` times the same value."""
        own = self._own
        own[self._first + bisect_left(self.bounds, value)] += count
        own[self._sum] += value * count

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, of all API servers."""
        names = [*(repr(bound) for bound in self.bounds), "+Inf"]
        count, rows = 0.0, list[tuple[str, float]]()
        for index, name in enumerate(names):
            count += self._cells.total(self._first + index)
            rows.append((name, count))
        return rows

    def sum(self) -> float:
        return self._cells.total(self._sum)


class NamedCounter:
    """One number per name, for names that clients choose: bounded in number and length."""

    _WIDTH: Final = NAME_BYTES // 8 + 1  # cells: the name, the number

    def __init__(self, cells: Cells) -> None:
        self._cells = cells
        self._first = cells.reserve((NAMES_MAX + 1) * self._WIDTH)
        self._places: dict[bytes, int] = {}  # of the names in this server's own slot
        for place in range(NAMES_MAX):  # of an earlier incarnation
            known = bytes(cells.own[self._at(place) : self._at(place) + self._WIDTH - 1])
            if name := known.rstrip(b"\0"):
                self._places[name] = place

    def inc(self, text: str) -> None:
        name = text.encode("utf-8", "replace")[:NAME_BYTES].decode("utf-8", "ignore").encode()
        place = self._places.get(name)
        if place is None:
            place = len(self._places)
            if place == NAMES_MAX:
                name = b"other"
            else:
                self._places[name] = place
            self._cells.write_name(self._at(place), name)
        self._cells.own[self._at(place) + self._WIDTH - 1] += 1

    def values(self) -> dict[str, float]:
        """Of all API servers."""
        found: dict[str, float] = {}
        for place in range(NAMES_MAX + 1):
            cell = self._at(place)
            names = list(self._cells.read_names(cell))
            numbers = self._cells.each(cell + self._WIDTH - 1)
            for name, number in zip(names, numbers, strict=True):
                if name:
                    key = name.decode()
                    found[key] = found.get(key, 0.0) + number
        return found

    def _at(self, place: int) -> int:
        return self._first + place * self._WIDTH


class MeterCollector(Collector):
    """Shows the meters of a registry that were declared here, in order."""

    def __init__(self, cells: Cells, labels: Labels) -> None:
        self._cells = cells
        self._labels = labels
        self._rows: list[tuple[str, str, Labels, Counter | Histogram]] = []
        self._named: list[tuple[str, str, str, NamedCounter]] = []

    def counter(self, name: str, text: str, **more: str) -> Counter:
        """Rows of one name with different labels are declared one after the other."""
        counter = Counter(self._cells)
        self._rows.append((name, text, self._labels | more, counter))
        return counter

    def plain_counter(self, name: str, text: str, **labels: str) -> Counter:
        """Without the labels of the model."""
        counter = Counter(self._cells)
        self._rows.append((name, text, labels, counter))
        return counter

    def histogram(self, name: str, text: str, bounds: Sequence[float]) -> Histogram:
        histogram = Histogram(self._cells, bounds)
        self._rows.append((name, text, self._labels, histogram))
        return histogram

    def alias(self, name: str, text: str, histogram: Histogram) -> None:
        """The same numbers under another name."""
        self._rows.append((name, text, self._labels, histogram))

    def named(self, name: str, text: str, label: str) -> NamedCounter:
        counter = NamedCounter(self._cells)
        self._named.append((name, text, label, counter))
        return counter

    def describe(self) -> list[Metric]:
        """Empty: the registry must not scrape at registration to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        family: CounterMetricFamily | None = None
        for name, text, labels, meter in self._rows:
            if isinstance(meter, Histogram):
                shown = HistogramMetricFamily(name, text, labels=list(labels))
                shown.add_metric(list(labels.values()), meter.buckets(), meter.sum())
                yield shown
                continue
            if family is None or family.name != name:
                if family is not None:
                    yield family
                family = CounterMetricFamily(name, text, labels=list(labels))
            family.add_metric(list(labels.values()), meter.value)
        if family is not None:
            yield family
        for name, text, label, counter in self._named:
            family = CounterMetricFamily(name, text, labels=[label])
            for value, number in counter.values().items():
                family.add_metric([value], number)
            yield family
