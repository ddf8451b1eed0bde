"""`diptych join`: this host becomes a part of a server that runs elsewhere, without Ray.

Owns the flags. The process becomes the host's supervisor (host_agent.py); Ctrl-C or SIGTERM leaves
in order, and the server goes on without this host.
"""

import argparse
from pathlib import Path

from diptych.engine.core.errors import ConfigError
from diptych.server.boot import AgentBoot
from diptych.server.cluster_flags import read_key
from diptych.server.host_agent import run_agent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("head", metavar="HOST:PORT", help="where `diptych serve --cluster-address` listens")
    add("--cluster-key-file", type=Path, required=True, metavar="FILE", help="a copy of its key")
    add("--model", default="", help="where the model is on this host (default: as on the head)")
    add("--host-ip", default="", help="address of this host for the others (default: by route)")
    add("--prefill", type=int, default=0, metavar="N", help="prefill workers to bring")
    add("--decode", type=int, default=0, metavar="N", help="decode workers to bring")
    add("--mixed", type=int, default=0, metavar="N", help="workers that do both to bring")
    add("--api-port", type=int, metavar="PORT", help="run an API server here too, 0: any port")
    add("--api-host", default="127.0.0.1", help="address that it binds (default: %(default)s)")
    add("--log-level", choices=["debug", "info", "warning", "error"], default="info")


def main(args: argparse.Namespace) -> int:
    """Until the server ends, or a signal. The exit status is 0 then."""
    counts = (args.prefill, args.decode, args.mixed)
    if min(counts) < 0 or not (sum(counts) or args.api_port is not None):
        raise ConfigError("say what this host brings: --prefill, --decode, --mixed or --api-port")
    boot = AgentBoot(
        head=args.head,
        secret=read_key(args.cluster_key_file),
        ip=args.host_ip,
        model_path=args.model,
        prefill=args.prefill,
        decode=args.decode,
        mixed=args.mixed,
        api_host=args.api_host,
        api_port=args.api_port,
        log_level=args.log_level.upper(),
    )
    return run_agent(boot)
