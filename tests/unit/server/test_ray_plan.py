"""A bundle for each worker that is asked for: which are new, and which are given back."""

from diptych.server.ray_plan import (
    Part,
    RayOptions,
    RayOrder,
    Seats,
    known_parts,
    lack_of_room,
    parts,
)

ROLES = ["prefill", "decode", "decode", "prefill"]


def test_a_node_starts_when_the_gpus_of_all_its_bundles_are_known() -> None:
    placed = {"prefill": ["a"], "decode": ["a", "b"]}
    both, other = Part("a", 1, 1, 0, devices=("0", "1")), Part("b", 0, 1, 0, devices=("0",))
    assert known_parts(placed, ["a", "b"], {"prefill": ["0"], "decode": [None, "0"]}, []) == [other]
    seen = {"prefill": ["0"], "decode": ["1", "0"]}
    assert known_parts(placed, ["a", "b"], seen, [other]) == [both, other]
    grown = {"prefill": ["a"], "decode": ["a", "a"]}
    unknown = {"prefill": ["0"], "decode": ["1", None]}
    assert known_parts(grown, ["a"], unknown, [both, other]) == [both], "what runs goes on"
    assert known_parts(grown, ["b"], unknown, [both]) == [], "its node is gone"


def test_seats_follow_the_order_and_their_roles() -> None:
    seats = Seats(ROLES)
    assert seats.obey(RayOrder(2, []), {}, {}) == ([0, 1], [])
    assert seats.roles == {0: "prefill", 1: "decode"}
    assert seats.obey(RayOrder(2, []), {0: "a", 1: "b"}, {}) == ([], [])
    assert seats.obey(RayOrder(4, []), {0: "a", 1: "b"}, {}) == ([2, 3], [])
    assert sorted(seats.roles.values()) == ["decode", "decode", "prefill", "prefill"]


def test_who_was_retired_gives_its_bundle_back_and_no_number_comes_again() -> None:
    seats = Seats(ROLES)
    seats.obey(RayOrder(2, []), {}, {})
    nodes = {0: "a", 1: "a"}
    parts = seats.parts(nodes, ["a"])
    assert parts == [Part("a", 1, 0, 0, 0), Part("a", 0, 1, 0, 1)]
    places = {part.place: part.seat for part in parts}
    assert list(places) == ["ray:a:0", "ray:a:1"]
    order = RayOrder(1, ["ray:a:0"])
    assert seats.obey(order, nodes, places) == ([], [0])  # type: ignore[arg-type]
    assert seats.obey(order, nodes, places) == ([], []), "said again, it changes nothing"  # type: ignore[arg-type]
    assert seats.obey(RayOrder(2, ["ray:a:0"]), nodes, {"ray:a:1": 1}) == ([2], [])
    assert seats.roles == {1: "decode", 2: "prefill"}, "the kind that is missing"


def test_down_to_none_and_back() -> None:
    seats = Seats(["mixed"])
    seats.obey(RayOrder(1, []), {}, {})
    places = {"ray:a:0": 0}
    assert seats.obey(RayOrder(0, ["ray:a:0"]), {0: "a"}, places) == ([], [0])
    assert seats.obey(RayOrder(1, ["ray:a:0"]), {}, {}) == ([1], [])


def test_of_too_many_only_those_without_a_node_go() -> None:
    seats = Seats(["mixed"])
    seats.obey(RayOrder(3, []), {}, {})
    assert seats.obey(RayOrder(1, []), {0: "a", 1: "", 2: ""}, {"ray:a:0": 0}) == ([], [2, 1])
    seats.obey(RayOrder(2, []), {0: "a"}, {})
    assert seats.obey(RayOrder(1, []), {0: "a", 3: "b"}, {}) == ([], []), "the head says who"


def test_a_seat_without_a_living_node_has_no_part() -> None:
    seats = Seats(["mixed"])
    seats.obey(RayOrder(2, []), {}, {})
    assert seats.parts({0: "a", 1: ""}, ["b"]) == []
    assert seats.parts({0: "a", 1: "b"}, ["b"]) == [Part("b", 0, 0, 1, 1)]


def test_each_worker_of_a_node_has_its_bundles_gpus() -> None:
    placed = {"prefill": ["a", "b"], "decode": ["b", "", "a"]}
    devices = {"prefill": ["0", "2,3"], "decode": ["0", "", "1"]}
    assert parts(placed, ["a", "b"], devices) == [
        Part("a", 1, 1, 0, devices=("0", "1")),
        Part("b", 1, 1, 0, devices=("2,3", "0")),
    ]
    moved = {**devices, "decode": ["0", "", "2"]}
    assert parts(placed, ["a", "b"], moved)[0] != parts(placed, ["a", "b"], devices)[0]
    seats = Seats(["mixed"])
    seats.obey(RayOrder(2, []), {}, {})
    found = seats.parts({0: "a", 1: "a"}, ["a"], {0: "0", 1: "1"})
    assert [part.devices for part in found] == [("0",), ("1",)]


def test_a_lack_of_room_says_what_is_needed_and_what_there_is() -> None:
    options = RayOptions(cpus_per_worker=0, gpus_per_worker=0.5)
    total = {"CPU": 8.0, "GPU": 1.0}
    text = lack_of_room({"prefill": 1, "decode": 2}, options, total, {"CPU": 8.0})
    assert "1 prefill, 2 decode" in text
    assert "each needs 0.5 GPU of one node" in text
    assert "0 of 1 GPU free" in text
    assert "can ever hold" not in text, "it may fit once others are gone"
    text = lack_of_room({"mixed": 1}, RayOptions(gpus_per_worker=1), {"CPU": 8.0}, {"CPU": 8.0})
    assert "1 CPU and 1 GPU" in text
    assert "can ever hold one, for want of GPU" in text
