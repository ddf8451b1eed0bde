"""Stop strings against a character-by-character oracle, over all ways to cut the text."""

from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.server.text.stops import StopMatcher


def oracle(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Reads one character at a time; the first moment at which the text ends with a stop."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def run(parts: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include=include)
    shown: list[str] = []
    for part in parts:
        text, stop = matcher.push(part)
        shown.append(text)
        if stop is not None:
            return "".join(shown), stop
    return "".join([*shown, matcher.flush()]), None


@settings(max_examples=500, deadline=None)
@given(
    parts=st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=3),
    include=st.booleans(),
)
def test_equals_the_oracle(parts: list[str], stops: list[str], include: bool) -> None:
    assert run(parts, stops, include) == oracle("".join(parts), stops, include)


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.text(alphabet="ab", max_size=3), max_size=10),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_holds_back_only_what_may_become_a_stop(parts: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops, include=False)
    seen = shown = ""
    for part in parts:
        seen += part
        text, stop = matcher.push(part)
        shown += text
        if stop is not None:
            return
        held = seen[len(shown) :]
        assert seen.startswith(shown)
        assert not held or any(stop.startswith(held) for stop in stops)


def test_no_stops_hold_nothing() -> None:
    assert StopMatcher([], include=False).push("abc") == ("abc", None)
