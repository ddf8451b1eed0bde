"""The progress of a long start: a bar on a terminal, a line now and then elsewhere."""

import io

from diptych.server.progress_bar import LINE_S, ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    said: list[str] = []
    stream = Terminal()
    bar = ProgressBar("packing", stream, said.append)
    bar.show(1_000_000_000, 4_000_000_000, 0.0)
    assert " 25% 1.0 of 4.0 GB" in stream.getvalue()
    bar.clear()
    assert stream.getvalue().endswith("\r\033[K")
    assert said == []


def test_elsewhere_only_what_takes_time_says_something() -> None:
    said: list[str] = []
    stream = io.StringIO()
    bar = ProgressBar("packing", stream, said.append)
    for step in range(100):
        bar.show(step, 100, step * LINE_S / 100)
    bar.clear()
    assert said == []
    for step in range(101):
        bar.show(step, 100, step * LINE_S / 25)
    assert said == ["packing: 25%", "packing: 50%", "packing: 75%", "packing: 100%"]
    assert stream.getvalue() == ""
