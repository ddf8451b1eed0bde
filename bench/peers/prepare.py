"""Makes the files that the engines read, from one set of random weights.

Run: python -m bench.peers.prepare bench-360m --models DIRECTORY [--llama-cpp TREE
--llama-quantize PROGRAM --llama-python PYTHON] [--openvino-python PYTHON] [--w8a8] [--widths bf16].
What exists is kept. The conversions themselves are the peers' own tools, run by their own
interpreters.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Final

from bench.models import SIZES, write_weights
from bench.peers.engines import GGUF, OPENVINO, WIDTHS

# llama.cpp's converter asks a table which pre-tokenizer a BPE vocabulary belongs to and refuses
# one that it does not know, as this one.
_CONVERT: Final = """
import sys
tree = sys.argv.pop(1)
sys.path[:0] = [tree, tree + "/gguf-py"]
from conversion import base
for found in list(vars(base).values()):
    if isinstance(found, type) and "get_vocab_base_pre" in vars(found):
        found.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""
_SCHEME: Final = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def write_w8a8(source: Path, folder: Path) -> None:
    """The decoder's linear layers as int8, one scale per output channel (compressed-tensors)."""
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        wide = tensor.float()
        scale = wide.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127
        tensors[name] = (wide / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale.to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = _SCHEME
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())


def write_ggufs(args: argparse.Namespace) -> None:
    wide = args.models / f"{args.size}-bf16.gguf"
    if not wide.exists():
        source = str(args.models / args.size)
        words = [str(args.llama_python), "-P", "-c", _CONVERT, str(args.llama_cpp), source]
        subprocess.run([*words, "--outtype", "bf16", "--outfile", str(wide)], check=True)
    for width in [GGUF[width] for width in args.widths if width != "bf16"]:
        narrow = args.models / f"{args.size}-{width}.gguf"
        if not narrow.exists():
            subprocess.run([str(args.llama_quantize), str(wide), str(narrow), width], check=True)


def write_openvino(args: argparse.Namespace) -> None:
    for width in [OPENVINO[width] for width in args.widths]:
        folder = args.models / f"{args.size}-openvino-{width}"
        if not folder.exists():
            program = args.openvino_python.parent / "optimum-cli"
            words = [str(program), "export", "openvino", "-m", str(args.models / args.size)]
            words += ["--task", "text-generation-with-past", "--weight-format", width]
            if width == "int4":
                words += ["--group-size", "64"]  # 960 is no multiple of the default, 128
            subprocess.run([*words, str(folder)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path, help="source tree, for its converter")
    parser.add_argument("--llama-python", type=Path, help="interpreter with torch, transformers")
    parser.add_argument("--llama-quantize", type=Path, help="the program")
    parser.add_argument("--openvino-python", type=Path, help="interpreter with optimum-intel")
    parser.add_argument("--w8a8", action="store_true", help="int8 checkpoint for vLLM")
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    args = parser.parse_args()
    source = args.models / args.size
    if not (source / "model.safetensors").exists():
        write_weights(source, args.size)
    if args.w8a8 and not (args.models / f"{args.size}-w8a8").exists():
        write_w8a8(source, args.models / f"{args.size}-w8a8")
    if args.llama_quantize is not None:
        write_ggufs(args)
    if args.openvino_python is not None:
        write_openvino(args)


if __name__ == "__main__":
    main()
