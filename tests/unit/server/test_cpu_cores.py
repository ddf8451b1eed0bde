"""Which cores the workers may compute on."""

import os

import pytest

from diptych.engine.core.errors import ConfigError
from diptych.server.cpu_cores import choose_cores, host_cores, parse_list, quota_cores

SIBLINGS = {0: [0, 4], 4: [0, 4], 1: [1, 5], 5: [1, 5], 2: [2, 6], 6: [2, 6]}
ALL = [0, 1, 2, 4, 5, 6]


def test_lists() -> None:
    assert parse_list("0-3,8") == [0, 1, 2, 3, 8]
    assert parse_list("5, 1-2,2") == [1, 2, 5]


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "0x1", "1-2-3", "123456"])
def test_bad_lists(text: str) -> None:
    with pytest.raises(ConfigError, match="--cpu-cores"):
        parse_list(text)


def test_quotas() -> None:
    assert quota_cores("max 100000\n") is None
    assert quota_cores("200000 100000\n") == 2
    assert quota_cores("150000 100000\n") == 2
    assert quota_cores("10000 100000\n") == 1
    assert quota_cores("nonsense") is None


def test_by_default_one_processor_of_each_core_within_the_quota() -> None:
    assert choose_cores(None, ALL, SIBLINGS, None) == [0, 1, 2]
    assert choose_cores(None, [4, 5], SIBLINGS, None) == [4, 5]
    assert choose_cores(None, ALL, {}, None) == ALL
    assert choose_cores(None, ALL, SIBLINGS, 2) == [0, 1]


def test_a_count_takes_whole_cores_first() -> None:
    assert choose_cores("2", ALL, SIBLINGS, None) == [0, 1]
    assert choose_cores("4", ALL, SIBLINGS, 1) == [0, 1, 2, 4]


def test_a_list_is_taken_as_it_is() -> None:
    assert choose_cores("4-6", ALL, SIBLINGS, None) == [4, 5, 6]
    assert choose_cores("2-2", ALL, SIBLINGS, None) == [2]


@pytest.mark.parametrize("asked", ["0", "7", "3,4", "0-9", "two"])
def test_what_there_is_not(asked: str) -> None:
    with pytest.raises(ConfigError, match="--cpu-cores"):
        choose_cores(asked, ALL, SIBLINGS, None)


def test_this_machine() -> None:
    cores = host_cores(None)
    assert cores
    assert set(cores) <= os.sched_getaffinity(0)
