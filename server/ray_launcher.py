"""The only file that knows Ray: it lets Ray place and restart one agent per host, nothing else.

Owns the placement groups (one per pool, one bundle per worker) and one actor per node, which runs
the supervisor of that host (host_agent.py). With autoscaling there is a group and an actor for each
worker instead, made and given back as the head orders: nodes that are not there yet may come. A
process of its own beside the head: what becomes of it, or of Ray's control process, touches no
request. Invariant: no token, request or block ever goes through Ray; it carries the boot records,
and the news that a process ended.
"""

import logging
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any, Final

import msgspec
import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from diptych.server.boot import AgentBoot
from diptych.server.lifeline import die_by_thread, leave_signals_to_supervisor
from diptych.server.logs import configure_logs
from diptych.server.ray_plan import (
    Part,
    RayBoot,
    RayOrder,
    Seats,
    bundles,
    known_parts,
    lack_of_room,
    parts,
)
from diptych.server.spawn import spawn
from diptych.transfer.processes import name_process

TURN_S: Final = 1.0
ANSWER_S_MAX: Final = 5.0
"""An actor that does not answer for so long is asked again in the next turn."""
RESTART_S: Final = 1.0
RESTART_S_MAX: Final = 30.0
PATIENCE_S: Final = 10.0
"""After so long without a place for every worker, the log says what is missing."""

_log = logging.getLogger("diptych")


class HostActor:
    """Runs the supervisor of its host as a child; both end together."""

    def __init__(self, boot: str) -> None:
        theirs, self._lifeline = os.pipe2(os.O_CLOEXEC)
        record = msgspec.json.decode(boot, type=AgentBoot)
        record = msgspec.structs.replace(
            record, ip=ray.util.get_node_ip_address(), lifeline_fd=theirs
        )
        self._agent: subprocess.Popen[bytes] = spawn("diptych.server.host_agent", record, [theirs])
        os.close(theirs)

    def ended(self) -> int | None:
        """The agent's exit status; None while it lives."""
        return self._agent.poll()


class GpuHolder:
    """Sits in a bundle and holds its GPUs, since Ray says only to its own which ones these are."""

    def devices(self) -> tuple[str, str]:
        """(node, CUDA_VISIBLE_DEVICES)."""
        context = ray.get_runtime_context()
        return context.get_node_id(), ",".join(context.get_accelerator_ids()["GPU"])


class BundleGpus:
    """Which GPUs each bundle has. Ray starts a holder again where its bundle goes."""

    def __init__(self, gpus: float) -> None:
        self._gpus = gpus
        self._holders: dict[tuple[str, int], Any] = {}  # (group, bundle)
        self._asked: dict[tuple[str, int], Any] = {}
        self._known: dict[tuple[str, int], tuple[str, str]] = {}  # (node, devices)

    def of(self, group: PlacementGroup, bundle: int, node: str) -> str | None:
        """None while it is not known."""
        key = (group.id.hex(), bundle)
        if not self._gpus or not node:
            return "" if node else None
        if self._known.get(key, ("", ""))[0] == node:
            return self._known[key][1]
        if key not in self._holders:
            strategy = PlacementGroupSchedulingStrategy(group, bundle)
            make = ray.remote(num_cpus=0, num_gpus=self._gpus, max_restarts=-1)(GpuHolder)
            self._holders[key] = make.options(scheduling_strategy=strategy).remote()
        if key not in self._asked:
            self._asked[key] = self._holders[key].devices.remote()
        if not ray.wait([self._asked[key]], timeout=0)[0]:
            return None
        with suppress(ray.exceptions.RayError):  # it is being started again: asked anew
            self._known[key] = ray.get(self._asked[key])
        del self._asked[key]
        found = self._known.get(key, ("", ""))
        return found[1] if found[0] == node else None

    def forget(self, group: PlacementGroup) -> None:
        """It is given back, and its holders end with it."""
        for key in [key for key in self._holders if key[0] == group.id.hex()]:
            del self._holders[key]
            self._asked.pop(key, None)
            self._known.pop(key, None)


class Seat:
    """One node's actor, and when it may be started again."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.actor: Any = None
        self.started_s = 0.0
        self.failures = 0  # in a row
        self.start_at_s = 0.0

    def failed(self, now: float) -> None:
        lived_long = now - self.started_s > RESTART_S_MAX
        self.failures = 1 if lived_long else self.failures + 1
        self.start_at_s = now + min(RESTART_S_MAX, RESTART_S * 2.0 ** (self.failures - 1))


def nodes_of(group: PlacementGroup) -> list[str]:
    """Of each bundle, "" while it has none."""
    table = placement_group_table(group)
    found: dict[int, str] = table.get("bundles_to_node_id") or {}
    return [found.get(i) or "" for i in range(group.bundle_count)]


class ElasticGroups:
    """A placement group of one bundle for each worker that the head asks for."""

    def __init__(self, boot: RayBoot, gpus: BundleGpus) -> None:
        assert boot.orders_fd is not None
        self._boot = boot
        self._gpus = gpus
        self._fd = boot.orders_fd
        self._rest = b""  # of a line
        self._order: RayOrder | None = None
        self._seats = Seats(boot.roles)
        self._groups: dict[int, PlacementGroup] = {}
        self._places: dict[str, int] = {}  # as the head knows them
        os.set_blocking(self._fd, False)

    def wait(self, seconds: float) -> None:
        """Until an order comes, or so long."""
        select.select([self._fd], [], [], seconds)

    def turn(self, living: list[str]) -> tuple[dict[str, list[str]], list[Part]]:
        """(role and number -> node of the bundle, what runs where)."""
        with suppress(BlockingIOError):
            *lines, self._rest = (self._rest + os.read(self._fd, 1 << 16)).split(b"\n")
            for line in lines:
                self._order = msgspec.json.decode(line, type=RayOrder)
        nodes = {seat: nodes_of(group)[0] for seat, group in self._groups.items()}
        if self._order is not None:
            new, gone = self._seats.obey(self._order, nodes, self._places)
            for seat in gone:
                _log.info("the bundle of worker place %d is given back", seat)
                self._gpus.forget(self._groups[seat])
                remove_placement_group(self._groups.pop(seat))
            for seat in new:
                self._groups[seat] = placement_group(
                    bundles(self._boot.ray, 1),
                    strategy=self._boot.ray.strategy,
                    name=f"diptych-{self._seats.roles[seat]}-{os.getpid()}-{seat}",
                )
        devices: dict[int, str] = {}
        for seat, group in self._groups.items():
            known = self._gpus.of(group, 0, nodes.get(seat, ""))
            devices[seat] = known or ""
            if known is None:
                nodes.pop(seat, None)
        found = self._seats.parts(
            nodes, living, devices if self._boot.ray.gpus_per_worker else None
        )
        self._places = {part.place: part.seat for part in found if part.seat is not None}
        names = {seat: f"{role} {seat}" for seat, role in self._seats.roles.items()}
        return {name: [nodes.get(seat, "")] for seat, name in names.items()}, found


class RayLauncher:
    """`run` until its supervisor ends."""

    def __init__(self, boot: RayBoot) -> None:
        self._boot = boot
        self._seats: dict[str, Seat] = {}  # by place
        self._groups: dict[str, PlacementGroup] = {}
        self._gpus = BundleGpus(boot.ray.gpus_per_worker)
        self._elastic = ElasticGroups(boot, self._gpus) if boot.orders_fd is not None else None
        self._started_s = time.monotonic()
        self._complete = False
        self._complained = False

    def run(self) -> None:
        ray.init(
            address=self._boot.ray.address,
            namespace="diptych",
            log_to_driver=True,
            logging_level=logging.WARNING,
        )
        for pool, count in self._boot.counts.items():
            if count and self._elastic is None:
                self._groups[pool] = placement_group(
                    bundles(self._boot.ray, count),
                    strategy=self._boot.ray.strategy,
                    name=f"diptych-{pool}-{os.getpid()}",
                )
        while True:
            self._turn(time.monotonic())
            if self._elastic is None:
                time.sleep(TURN_S)
            else:
                self._elastic.wait(TURN_S)

    def _turn(self, now: float) -> None:
        """Brings the actors in line with where Ray has put the bundles by now."""
        living = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        if self._elastic is None:
            placed = {pool: nodes_of(group) for pool, group in self._groups.items()}
            wanted = {part.place: part for part in self._parts(placed, living)}
        else:
            placed, found = self._elastic.turn(living)
            wanted = {part.place: part for part in found}
        self._complain(placed, now)
        for place in self._seats.keys() - wanted.keys():
            self._end(self._seats.pop(place), "its node is gone, or has no part any more")
        for place, part in wanted.items():
            seat = self._seats.setdefault(place, Seat(part))
            if seat.part != part:
                self._end(seat, "its part changed")
                seat.part, seat.failures, seat.start_at_s = part, 0, now
            if seat.actor is not None:
                self._look_after(seat, now)
            if seat.actor is None and now >= seat.start_at_s:
                self._start(seat, now)

    def _parts(self, placed: dict[str, list[str]], living: list[str]) -> list[Part]:
        if not self._boot.ray.gpus_per_worker:
            return parts(placed, living)
        devices = {
            pool: [self._gpus.of(self._groups[pool], i, node) for i, node in enumerate(nodes)]
            for pool, nodes in placed.items()
        }
        running = [seat.part for seat in self._seats.values()]
        return known_parts(placed, living, devices, running)

    def _start(self, seat: Seat, now: float) -> None:
        part, boot = seat.part, self._boot
        record = AgentBoot(
            head=boot.head,
            secret=boot.secret,
            place=part.place,
            model_path=boot.model,
            prefill=part.prefill,
            decode=part.decode,
            mixed=part.mixed,
            devices=list(part.devices),
            api_host=boot.ray.api_host,
            api_port=boot.ray.api_port,
            orphan_of=ray.get_runtime_context().gcs_address,
            log_level=boot.log_level,
        )
        strategy = NodeAffinitySchedulingStrategy(part.node, soft=False)
        make = ray.remote(num_cpus=0, max_restarts=0)(HostActor)
        seat.actor = make.options(scheduling_strategy=strategy).remote(
            msgspec.json.encode(record).decode()
        )
        seat.started_s = now
        _log.info(
            "node %.8s: %d prefill, %d decode, %d mixed",
            part.node,
            part.prefill,
            part.decode,
            part.mixed,
        )

    def _look_after(self, seat: Seat, now: float) -> None:
        try:
            status = ray.get(seat.actor.ended.remote(), timeout=ANSWER_S_MAX)
        except ray.exceptions.GetTimeoutError:
            return
        except ray.exceptions.RayActorError as error:
            _log.warning("the actor on node %.8s ended: %s", seat.part.node, error.error_msg)
            seat.actor = None
            seat.failed(now)
            return
        if status is not None:
            self._end(seat, f"its agent ended ({status})")
            seat.failed(now)

    def _end(self, seat: Seat, reason: str) -> None:
        if seat.actor is not None:
            _log.info("ending the actor on node %.8s: %s", seat.part.node, reason)
            with suppress(ray.exceptions.RayError):
                ray.kill(seat.actor)
            seat.actor = None

    def _complain(self, placed: dict[str, list[str]], now: float) -> None:
        missing = {pool: nodes.count("") for pool, nodes in placed.items() if "" in nodes}
        if bool(missing) == self._complete:  # it changed
            self._complete, self._started_s, self._complained = not missing, now, False
        if missing and not self._complained and now - self._started_s > PATIENCE_S:
            self._complained = True
            total, free = ray.cluster_resources(), ray.available_resources()
            _log.warning("%s", lack_of_room(missing, self._boot.ray, total, free))


def main() -> None:
    """`python -m diptych.server.ray_launcher`, its `RayBoot` on standard input."""
    boot = msgspec.json.decode(sys.stdin.buffer.read(), type=RayBoot)
    configure_logs("ray", boot.log_level)
    name_process("ray")
    leave_signals_to_supervisor()
    die_by_thread(boot.lifeline_fd, lambda: None)
    try:
        RayLauncher(boot).run()
    except (ray.exceptions.RayError, ConnectionError, OSError, RuntimeError) as error:
        _log.error("Ray: %s", error)
        sys.exit(1)


if __name__ == "__main__":
    from diptych.server import ray_launcher  # Ray finds the actor's class under its real name

    ray_launcher.main()
