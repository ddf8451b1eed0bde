"""A bundle for each worker that is asked for: which are new, and which are given back."""

from diptych.server.ray_plan import Part, RayOrder, Seats

ROLES = ["prefill", "decode", "decode", "prefill"]


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
