"""How each engine is started: its command, its environment, the files it reads.

Owns nothing. All engines read folders and files below one directory of models, named by
`prepare`: MODEL, MODEL-bf16.gguf, MODEL-openvino-int8, ... An engine whose program was not given
is left out, and the result says so.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from diptych.server.spawn import python_environment

WIDTHS: Final = ("bf16", "int8", "int4")
GGUF: Final = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
OPENVINO: Final = {"bf16": "fp16", "int8": "int8", "int4": "int4"}
_FRONT: Final = Path(__file__).with_name("openvino_front.py")


@dataclass(frozen=True)
class Engine:
    """One server in one configuration; {port} in `words` is replaced."""

    name: str
    words: tuple[str, ...]
    version: str
    health: str = "/health"
    environment: dict[str, str] = field(default_factory=dict)
    warm_runs: int = 1
    start_s_max: float = 60.0

    def command(self, port: int) -> list[str]:
        return [word.replace("{port}", str(port)) for word in self.words]

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("diptych")


@dataclass(frozen=True)
class Setting:
    """What a row asks of every engine: tokens in one step, sequences, context of one."""

    model: str
    width: str
    step_tokens: int
    num_seqs: int
    context: int
    threads: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--models", type=_absolute, required=True, help="directory made by bench.peers.prepare")
    add("--vllm-python", type=_absolute, help="interpreter that has vLLM's CPU build")
    add("--llama-server", type=_absolute, help="llama.cpp's server program")
    add("--openvino-python", type=_absolute, help="interpreter that has OpenVINO GenAI")
    add("--ours-flags", default="", help="further flags of `diptych serve`, for every variant")


def _absolute(text: str) -> Path:
    return Path(text).absolute()  # links stay: an interpreter finds its packages by them


def ours(args: argparse.Namespace, setting: Setting, scheme: str, mode: str) -> Engine:
    """`scheme`: bf16 or a --quantization; `mode`: "split" (1 prefill, 1 decode) or "mixed"."""
    context = ["--max-model-len", str(setting.context)]
    workers = {"split": ["--prefill", "1", "--decode", "1"], "mixed": ["--mixed", "1"]}[mode]
    words = [sys.executable, "-P", "-m", "diptych.server.cli", "serve"]
    words += [str(args.models / setting.model), "--port", "{port}", *workers, *context]
    words += ["--max-num-batched-tokens", str(setting.step_tokens)]
    words += ["--max-num-seqs", str(setting.num_seqs)]
    if scheme != "bf16":
        words += ["--quantization", scheme]
    words += args.ours_flags.split()
    return Engine(
        f"diptych {scheme} {mode}", tuple(words), "this commit", environment=python_environment()
    )


def vllm(args: argparse.Namespace, setting: Setting) -> Engine:
    folder = setting.model if setting.width == "bf16" else f"{setting.model}-w8a8"
    python = args.vllm_python
    words = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--port", "{port}"]
    words += ["--model", str(args.models / folder), "--dtype", "bfloat16"]
    words += ["--max-model-len", str(setting.context), "--max-num-seqs", str(setting.num_seqs)]
    words += ["--max-num-batched-tokens", str(setting.step_tokens)]
    words += ["--disable-uvicorn-access-log"]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{setting.threads - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    width = "bf16" if setting.width == "bf16" else "w8a8"
    return Engine(
        f"vllm {width}",
        tuple(words),
        _package(python, "vllm-cpu"),
        environment=environment,
        start_s_max=300.0,
    )


def llama_cpp(args: argparse.Namespace, setting: Setting) -> Engine:
    width = GGUF[setting.width]
    file = args.models / f"{setting.model}-{width}.gguf"
    threads = str(setting.threads)
    words = [str(args.llama_server), "-m", str(file), "--port", "{port}", "--no-webui"]
    words += ["-t", threads, "-tb", threads, "-np", str(setting.num_seqs)]
    words += ["-c", str(setting.num_seqs * setting.context)]
    words += ["-b", str(setting.step_tokens), "-ub", str(min(512, setting.step_tokens))]
    found = subprocess.run(
        [str(args.llama_server), "--version"], capture_output=True, text=True, check=True
    )
    version = (found.stdout + found.stderr).strip().splitlines()[0]
    return Engine(f"llama.cpp {width}", tuple(words), version)


def openvino(args: argparse.Namespace, setting: Setting) -> Engine:
    folder = args.models / f"{setting.model}-openvino-{OPENVINO[setting.width]}"
    python = args.openvino_python
    words = [str(python), str(_FRONT), str(folder), "--port", "{port}"]
    words += ["--max-num-batched-tokens", str(setting.step_tokens)]
    words += ["--max-num-seqs", str(setting.num_seqs), "--threads", str(setting.threads)]
    return Engine(f"openvino {setting.width}", tuple(words), _package(python, "openvino-genai"))


def peers(args: argparse.Namespace, setting: Setting) -> tuple[list[Engine], list[str]]:
    """The peers that can run this setting, and why each other one is left out."""
    found: list[Engine] = []
    left_out: list[str] = []
    places = (
        ("vllm", args.vllm_python, vllm, ("bf16", "int8")),
        ("llama.cpp", args.llama_server, llama_cpp, WIDTHS),
        ("openvino", args.openvino_python, openvino, WIDTHS),
    )
    for name, program, make, widths in places:
        if program is None:
            left_out.append(f"{name}: its program was not given")
        elif setting.width not in widths:
            left_out.append(f"{name}: has no {setting.width} here")
        else:
            found.append(make(args, setting))
    return found, left_out


def _package(python: Path, name: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return f"{name} {found.stdout.strip() or 'of unknown version'}"
