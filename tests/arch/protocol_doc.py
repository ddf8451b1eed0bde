"""docs/PROTOCOL.md from the code: `python -m tests.arch.protocol_doc --write`.

Owns the generated parts of that page, between `<!-- generated: NAME -->` and `<!-- end -->`; the
words around them are written by hand. Invariant: the page in the tree equals what this renders
(test_protocol_doc.py).
"""

import ast
import inspect
import re
import sys
from pathlib import Path

from diptych.engine.core import (
    client_messages,
    envelope,
    fleet_messages,
    messages,
    worker_messages,
)
from diptych.scheduler import lifecycle
from diptych.scheduler.lifecycle import HOLDING, TABLE, RowEvent, RowState

PAGE = Path(__file__).parents[2] / "docs" / "PROTOCOL.md"
_SECTION = re.compile(r"^# ---- (.+?) -+$")
_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _first_sentence(node: ast.ClassDef) -> str:
    text = " ".join((ast.get_docstring(node) or "").split())
    end = re.search(r"[.:;](\s|$)", text)
    return text if end is None else text[: end.start()]


def message_table() -> str:
    """One line per struct of messages.py's parts, in their order, grouped by who sends it to
    whom."""
    rows = ["| struct | fields | what it says |", "|---|---|---|"]
    for part in (envelope, client_messages, worker_messages, fleet_messages):
        rows += _rows_of(inspect.getsource(part))
    return "\n".join(rows)


def _rows_of(source: str) -> list[str]:
    lines = source.splitlines()
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    rows: list[str] = []
    section, at = "", 0
    for node in classes:
        if node.name in ("Message", "Send"):
            continue
        for line in lines[at : node.lineno - 1]:
            found = _SECTION.match(line)
            section = found[1] if found else section
        if section:
            rows.append(f"| ***{section}*** | | |")
            section = ""
        at = node.lineno
        fields = [
            item.target.id
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        ]
        is_message = issubclass(getattr(messages, node.name), messages.Message)
        name = f"**{node.name}**" if is_message else f"{node.name} (part)"
        says = _first_sentence(node).replace("|", "\\|")
        rows.append(f"| {name} | {', '.join(f'`{field}`' for field in fields)} | {says} |")
    return rows


def state_table() -> str:
    """States down, events across; a cell is the state after, `=` the same, empty an error."""
    rows = ["| | " + " | ".join(event.upper() for event in RowEvent) + " |"]
    rows.append("|---|" + "---|" * len(RowEvent))
    for state in RowState:
        cells = []
        for event in RowEvent:
            after = TABLE[state].get(event)
            cells.append("" if after is None else "=" if after is state else after.value)
        name = f"**{state}**" if state in HOLDING else str(state)
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def meanings() -> str:
    """The comments beside the states and events."""
    rows = []
    source = inspect.getsource(lifecycle)
    for name, comment in re.findall(r'^    [A-Z]+ = "(\w+)"  # (.+)$', source, re.MULTILINE):
        label = name.upper() if name in set(RowEvent) else name
        rows.append(f"- {label}: {comment}")
    return "\n".join(rows)


def render(page: str) -> str:
    parts = {"messages": message_table, "states": state_table, "meanings": meanings}
    return _PART.sub(lambda m: f"{m[1]}{parts[m[2]]()}\n{m[3]}", page)


def main() -> int:
    page = PAGE.read_text()
    current = render(page)
    if "--write" in sys.argv[1:]:
        PAGE.write_text(current)
        return 0
    if page != current:
        print(f"{PAGE} is stale: python -m tests.arch.protocol_doc --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
