"""Connections between two processes that broke while both may live. Pure.

Owns who said so, and when. Invariant: a cut is judged once, `CUT_S` after it was first heard of: by
then one of the two is known to be dead, or what was lost on the way will never come.
"""

from diptych.engine.core.messages import Address
from diptych.server.fleet_members import CUT_S


class Cuts:
    def __init__(self) -> None:
        self._since_s: dict[tuple[Address, Address], float] = {}  # (who said so, to whom) -> when

    def add(self, sender: Address, peer: Address, now: float) -> None:
        self._since_s.setdefault((sender, peer), now)

    def due(self, now: float) -> list[tuple[Address, Address]]:
        """Those to be judged: (who said so, to whom)."""
        found = [pair for pair, since_s in self._since_s.items() if now - since_s > CUT_S]
        for pair in found:
            del self._since_s[pair]
        return found
