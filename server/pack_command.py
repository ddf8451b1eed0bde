"""`diptych pack MODEL OUT`: a folder that is served without packing.

Owns what goes into the folder: the packed weights and the small files that a server reads.
Invariant: OUT is a model like any other for `diptych serve`, with the same tokens.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Final, get_args

from diptych.engine.core.config import ModelOptions, Quantization
from diptych.engine.core.errors import ConfigError, ModelLoadError
from diptych.engine.hub import resolve_model
from diptych.server.builtin import BUILTIN_MODEL
from diptych.server.cpu_cores import host_cores
from diptych.server.progress_bar import ProgressBar

_SMALL_FILES: Final = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="model folder or hub name; 'builtin' is the model that comes along")
    add("out", type=Path, metavar="OUT", help="folder to make; it may exist if it is empty")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    add("--quantization", choices=get_args(Quantization), help="round the layers' weights")
    add("--kernel-level", help="pack for this one (default: the best of this machine)")
    add("--num-shards", type=int, default=1, metavar="N", help="cuts, of a tensor-parallel size")


def main(args: argparse.Namespace) -> int:
    folder = Path(str(BUILTIN_MODEL) if args.model == "builtin" else resolve_model(args.model))
    out: Path = args.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not an empty folder")
    import torch  # only here: mistakes above are told at once

    from diptych.engine.packed_file import PACKED_NAME
    from diptych.engine.packing import keep_packed
    from diptych.engine.runner import load_model

    torch.set_num_threads(1)
    bar = ProgressBar("packing the weights", sys.stderr, lambda text: print(text, file=sys.stderr))
    options = ModelOptions(
        path=str(folder),
        dtype=args.dtype,
        quantization=args.quantization,
        kernel_level=args.kernel_level,
    )
    model = load_model(
        options,
        args.num_shards,
        threads=len(host_cores(None)),
        on_progress=lambda done, total: bar.show(done, total, time.monotonic()),
    )
    bar.clear()
    num_bytes = keep_packed(model.prepared, out / PACKED_NAME)
    _copy_small_files(folder, out, model.config.dtype)
    print(f"{out}: {num_bytes / 1e6:.1f} MB for {model.kernels.level}; diptych serve {out}")
    return 0


def _copy_small_files(folder: Path, out: Path, dtype: str) -> None:
    try:
        config = json.loads((folder / "config.json").read_text())
        config["torch_dtype"] = dtype  # what the weights are held in now
        config.pop("dtype", None)
        (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        for name in _SMALL_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)
    except OSError as error:
        raise ModelLoadError(f"{out}: cannot be written ({error.strerror})") from error
