"""The launcher of elastic hosts is told what is wanted, and a new one is told again."""

import os
from typing import Any

import msgspec
import pytest

from diptych.server import companion
from diptych.server.companion import GIVEN_BACK_MAX, Companion
from diptych.server.ray_plan import RayBoot, RayOptions, RayOrder


class FakeProcess:
    pid = 1 << 30
    returncode: int | None = None


def make(roles: list[str]) -> Companion:
    boot = RayBoot(
        ray=RayOptions(), head="h", secret="s", model="m", counts={}, roles=roles, lifeline_fd=0
    )
    return Companion("Ray launcher", "module", boot, 0)


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The reading ends that launchers got."""
    found: list[int] = []

    def spawn(module: str, boot: RayBoot, fds: list[int]) -> Any:
        if boot.orders_fd is not None:
            assert boot.orders_fd in fds
            found.append(os.dup(boot.orders_fd))
        return FakeProcess()

    monkeypatch.setattr(companion, "spawn", spawn)
    return found


def orders(fd: int) -> list[RayOrder]:
    return [msgspec.json.decode(line, type=RayOrder) for line in os.read(fd, 1 << 16).splitlines()]


def test_orders_add_up_and_are_said_once(spawned: list[int]) -> None:
    made = make(["mixed"])
    made.order(2)
    made.tick(0.0)
    made.tick(1.0)
    assert orders(spawned[0]) == [RayOrder(2, [])]
    made.order(given_back="ray:a:0")
    made.order(1)
    made.tick(2.0)
    assert orders(spawned[0]) == [RayOrder(1, ["ray:a:0"])]


def test_a_new_launcher_hears_the_last_order(spawned: list[int]) -> None:
    made = make(["mixed"])
    made.order(2)
    made.tick(0.0)
    made.reaped(FakeProcess.pid, 0, 1.0)
    made.order(0, "ray:a:1")
    made.tick(1.5)
    assert len(spawned) == 1, "it waits before the next start"
    made.tick(100.0)
    assert orders(spawned[1]) == [RayOrder(0, ["ray:a:1"])]


def test_an_order_stays_short(spawned: list[int]) -> None:
    made = make(["mixed"])
    made.tick(0.0)
    for number in range(100):
        made.order(given_back=f"ray:{'n' * 56}:{number}")
    made.tick(1.0)
    (order,) = orders(spawned[0])
    assert len(order.given_back) == GIVEN_BACK_MAX
    assert order.given_back[-1].endswith(":99")
    assert len(msgspec.json.encode(order)) < 4096, "it is written whole or not at all"


def test_without_elastic_hosts_there_are_no_orders(spawned: list[int]) -> None:
    made = make([])
    made.tick(0.0)
    assert spawned == []
