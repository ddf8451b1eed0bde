"""Who prefills, who decodes and how many there are, as Prometheus families.

Owns nothing. Invariant: a family is there from the first scrape, whether anything moves or not; a
series per worker lasts as long as the worker, and those of roles always add up to the workers.
"""

from collections.abc import Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from diptych.engine.core.messages import Stats, WorkerStats

_STAGES: Final = ("asked", "import", "weights", "fork", "ready", "join", "total")


def role_families(stats: Stats | None, labels: dict[str, str]) -> Iterator[Metric]:
    """`labels`: those of every series of this server."""
    workers = [] if stats is None else stats.workers
    roles = dict.fromkeys(("prefill", "mixed", "decode"), 0.0)
    for worker in workers:
        roles[_role(worker)] += 1.0
    dials = {str(worker.worker): float(worker.dial) for worker in workers}
    yield _gauges(
        "worker_dial", "Share of a worker's time for prefill, 0 to 100.", "worker", dials, labels
    )
    yield _gauges("num_workers", "Workers that serve, by role.", "role", roles, labels)
    leaving = float(sum(worker.leaving for worker in workers))
    yield _gauges(
        "num_workers_leaving", "Workers that are given nothing new.", None, {"": leaving}, labels
    )
    wanted = None if stats is None else stats.workers_wanted
    here = {"": float(len(workers) if wanted is None else wanted)}
    yield _gauges("num_workers_wanted", "Workers that the load asks for.", None, here, labels)
    pressure = (0.0, 0.0) if stats is None or stats.pressure is None else stats.pressure
    sides = dict(zip(("prefill", "decode"), pressure, strict=True))
    yield _gauges("slo_pressure", "Expected time over its target, by side.", "side", sides, labels)
    start = None if stats is None else stats.cold_start
    stages = {} if start is None else {s: float(getattr(start, f"{s}_s")) for s in _STAGES}
    yield _gauges(
        "cold_start_seconds", "Of the last worker asked for, by stage.", "stage", stages, labels
    )
    sums = {
        "dial_moves": 0 if stats is None else stats.dial_moves,
        "workers_asked": 0 if stats is None else stats.workers_asked,
        "workers_retired": 0 if stats is None else stats.workers_retired,
    }
    for name, value in sums.items():
        family = CounterMetricFamily(
            f"diptych:{name}", "Since the scheduler started.", labels=list(labels)
        )
        family.add_metric(list(labels.values()), value)
        yield family


def _role(worker: WorkerStats) -> str:
    if worker.dial >= 100:
        return "prefill"
    return "decode" if worker.dial <= 0 else "mixed"


def _gauges(
    name: str, text: str, label: str | None, values: dict[str, float], labels: dict[str, str]
) -> Metric:
    """One family; `label` None: one series, under the key ""."""
    names = list(labels) if label is None else [*labels, label]
    family = GaugeMetricFamily(f"diptych:{name}", text, labels=names)
    for key, value in values.items():
        own = list(labels.values())
        family.add_metric(own if label is None else [*own, key], value)
    return family
