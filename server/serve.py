"""`diptych serve`: one command from a model to an OpenAI-compatible server.

Owns the flags of the front door and the listening socket, which is bound before anything starts, so
that a taken port is an error at once. Invariant: this process never imports torch; it becomes the
supervisor (or, with --inline, the whole engine).
"""

import argparse
import os
from pathlib import Path

import msgspec

from diptych.engine.core.errors import ConfigError
from diptych.engine.core.model_config import load_model_config
from diptych.engine.hub import resolve_model
from diptych.server.builtin import BUILTIN_MODEL, BUILTIN_NAME
from diptych.server.cluster_flags import add_cluster_arguments, cluster_boot
from diptych.server.engine_flags import add_engine_arguments, engine_options
from diptych.server.http.listening import open_socket
from diptych.server.http.settings import METER_SLOT_BYTES, HttpSettings
from diptych.server.launch import run_supervisor
from diptych.server.text.tokenizer import Tokenizer
from diptych.transfer.shared_memory import create_memory

API_WORKERS_MAX = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags named as in `vllm serve` where the meaning is the same."""
    add = parser.add_argument
    add("model", nargs="?", help="model folder or hub name (default: the built-in model)")
    front = parser.add_argument_group("front door").add_argument
    front("--host", default="127.0.0.1", help="address to bind (default: %(default)s)")
    front("--port", type=int, default=8000, help="port to bind, 0 for any (default: %(default)s)")
    front(
        "--api-key",
        default=os.environ.get("DIPTYCH_API_KEY"),
        help="key that clients must send; needed to bind another address than loopback",
    )
    front(
        "--api-workers",
        "--api-server-count",
        type=_api_workers,
        default=1,
        metavar="N",
        help="API server processes that share the port (default: %(default)s)",
    )
    front("--served-model-name", nargs="+", metavar="NAME", help="names clients may ask for")
    front("--chat-template", type=Path, metavar="FILE", help="instead of the model's own")
    front(
        "--generation-config",
        choices=["auto", "none"],
        default="auto",
        help="auto: sampling defaults of the model's generation_config.json",
    )
    front(
        "--overload-status",
        type=int,
        choices=[429, 503],
        default=429,
        help="HTTP status of a full queue, always with Retry-After (default: %(default)s)",
    )
    front("--shutdown-timeout", type=float, default=30.0, metavar="S", help="to drain on SIGTERM")
    front("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    front("--inline", action="store_true", help="everything in one process, for debugging")
    add_engine_arguments(parser)
    add_cluster_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Checks everything that can be checked, then serves until a signal. Returns the status."""
    keys = [args.api_key] if args.api_key else []
    cluster = cluster_boot(args)
    folder = resolve_model(args.model or str(BUILTIN_MODEL))
    if cluster is not None:
        folder = str(Path(folder).resolve())  # other hosts have other working directories
    options = engine_options(
        args,
        folder,
        several_hosts=cluster is not None,
        elastic_hosts=args.ray is not None and args.autoscale is not None,
    )
    config = load_model_config(folder, args.dtype, args.max_model_len)
    template = None if args.chat_template is None else str(args.chat_template)
    Tokenizer(folder, template)  # a bad file is an error now, not in each API server
    settings = HttpSettings(
        model_names=args.served_model_name or [_model_name(args.model)],
        host=args.host,
        port=args.port,
        api_keys=keys,
        chat_template=template,
        sampling_defaults=dict(
            config.sampling_defaults if args.generation_config == "auto" else {}
        ),
        num_apis=args.api_workers,
        overload_status=args.overload_status,
        grace_s=args.shutdown_timeout,
    )
    settings.verify()
    if args.inline and args.api_workers > 1:
        raise ConfigError("--inline is one process; leave --api-workers away")
    with open_socket(settings) as listener:
        settings = msgspec.structs.replace(settings, port=listener.getsockname()[1])
        if args.inline:
            from diptych.server.api_server import serve_inline  # loads torch

            return serve_inline(options, settings, listener)
        return run_supervisor(
            options,
            "diptych.server.api_server:serve",
            settings=msgspec.to_builtins(settings),
            listen_fd=listener.fileno(),
            num_apis=args.api_workers,
            meters_fd=create_memory("meters", args.api_workers * METER_SLOT_BYTES),
            grace_s=args.shutdown_timeout,
            log_level=args.log_level.upper(),
            cluster=cluster,
        )


def _api_workers(text: str) -> int:
    count = int(text)
    if not 1 <= count <= API_WORKERS_MAX:
        raise argparse.ArgumentTypeError(f"must be 1 to {API_WORKERS_MAX}")
    return count


def _model_name(model: str | None) -> str:
    """What clients call the model: the hub name, or the folder as it was given."""
    return BUILTIN_NAME if model is None else model.rstrip("/")
