"""Several "hosts" on this machine without Ray: a head and agents, each on a loopback address."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from diptych.engine.core.config import EngineOptions
from diptych.server.boot import AgentBoot, ClusterBoot
from diptych.server.launch import Launched, start_engine
from diptych.server.spawn import spawn
from diptych.transfer.network import Network, new_secret

HEAD_IP = "127.0.0.1"


class LocalHosts:
    """A head without workers; host i at 127.0.0.(2 + i) with the given (prefill, decode) counts."""

    def __init__(self, counts: list[tuple[int, int]], log_level: str = "WARNING") -> None:
        self.secret = new_secret()
        self.endpoint = ""
        self.agents: list[subprocess.Popen[bytes]] = []
        self._counts = counts
        self._log_level = log_level

    def boot(self, number: int, **changes: object) -> AgentBoot:
        prefill, decode = self._counts[number]
        fields: dict[str, object] = {
            "head": self.endpoint,
            "secret": self.secret,
            "ip": f"127.0.0.{2 + number}",
            "prefill": prefill,
            "decode": decode,
            "log_level": self._log_level,
        }
        return AgentBoot(**(fields | changes))  # type: ignore[arg-type]

    def add(self, number: int) -> subprocess.Popen[bytes]:
        agent = spawn("diptych.server.host_agent", self.boot(number), [])
        self.agents.append(agent)
        return agent

    def listening(self, endpoint: str) -> None:
        self.endpoint = endpoint
        for number in range(len(self._counts)):
            self.add(number)

    @contextmanager
    def engine(self, options: EngineOptions) -> Iterator[Launched]:
        cluster = ClusterBoot(network=Network(HEAD_IP, self.secret), local_workers=False)
        try:
            with start_engine(
                options,
                cluster=cluster,
                on_listening=self.listening,
                log_level=self._log_level,
            ) as launched:
                yield launched
            for agent in self.agents:
                agent.wait(10)
        finally:
            for agent in self.agents:
                agent.kill()
                agent.wait()
