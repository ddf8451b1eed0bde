"""docs/PROTOCOL.md is what the code says."""

from diptych.engine.core.messages import AnyMessage, Message
from tests.arch.protocol_doc import PAGE, message_table, render, state_table


def test_the_page_is_current() -> None:
    page = PAGE.read_text()
    assert page == render(page), "run: python -m tests.arch.protocol_doc --write"


def test_every_message_is_in_the_table_and_in_the_union() -> None:
    table = message_table()
    names = {kind.__name__ for kind in Message.__subclasses__()}
    assert names == {kind.__name__ for kind in AnyMessage.__args__}
    for name in names:
        assert f"| **{name}** |" in table


def test_every_state_has_a_line() -> None:
    assert len(state_table().splitlines()) == 2 + 11
