"""Who listens where: told to everybody of every host before anybody hears that a process is up.

Owns the set of processes whose places are known. Invariant: whoever is told of a process was told
where it is; without other hosts nobody needs to be told anything.
"""

from diptych.engine.core.messages import Address, Peers
from diptych.server.fleet import Fleet
from diptych.server.fleet_members import HOME
from diptych.server.remote_hosts import RemoteHosts
from diptych.transfer.channels import Channels


class Introductions:
    def __init__(self, hosts: RemoteHosts | None, fleet: Fleet, channels: Channels) -> None:
        """`channels`: of this host."""
        self._hosts = hosts
        self._fleet = fleet
        self._channels = channels
        self._known: set[Address] = set()

    def introduce(self, address: Address, endpoint: str) -> None:
        """All learn where it is; and it learns of all others."""
        if self._hosts is None or not endpoint:
            return
        if self._fleet.host_of(address) == HOME:
            self._channels.send_to(address, self._hosts.directory())
        self._known.add(address)
        self._pass_on(self._hosts.publish([(address, endpoint)], []))

    def forget(self, gone: list[Address]) -> None:
        known = [address for address in gone if address in self._known]
        self._known.difference_update(known)
        if self._hosts is not None and known:
            self._pass_on(self._hosts.publish([], known))

    def _pass_on(self, news: Peers) -> None:
        """To the processes of this host that listen."""
        for address, _ in self._fleet.states():
            if address in self._known and self._fleet.host_of(address) == HOME:
                self._channels.send_to(address, news)
