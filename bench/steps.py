"""Whole steps of one worker without scheduler: decode time by batch, and what is not kernels.

Run: python -m bench.steps [--size bench-360m] [--quantization int8 ...] [--batches 1 32]. Variants
alternate step by step, so that ratios hold on a busy machine. `outside_share` is the part of a step
that passes outside the C++ functions: Python, numpy and torch.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import msgspec
import torch

from bench.drive import Driver
from bench.models import SIZES, write_model
from bench.record import spread, write
from diptych.engine.core.config import ModelOptions
from diptych.engine.core.params import SamplingParams
from diptych.engine.core.plan import StepPlan, StepRow
from diptych.engine.runner import LoadedModel, Runner, load_model, make_runner
from diptych.kernels.cpp import CppKernels
from diptych.kernels.cpp_decoder import CppDecoder
from diptych.server.builtin import BUILTIN_MODEL

_CALLS = ("run_layers", "decode")  # of whole layers and steps: methods
CONTEXT = 128  # tokens of each sequence before the first step


class Clock:
    """Adds up the time inside every C++ function of one backend, while it is entered."""

    def __init__(self, kernels: CppKernels) -> None:
        self.seconds = 0.0
        self._kernels = kernels
        self._before = dict(vars(kernels))
        self._calls = [getattr(CppDecoder, name) for name in _CALLS]

    def __enter__(self) -> "Clock":
        for name, function in self._before.items():
            if callable(function):
                setattr(self._kernels, name, self._timed(function))
        for name, call in zip(_CALLS, self._calls, strict=True):
            setattr(CppDecoder, name, self._timed(call))
        return self

    def __exit__(self, *_: object) -> None:
        vars(self._kernels).update(self._before)
        for name, call in zip(_CALLS, self._calls, strict=True):
            setattr(CppDecoder, name, call)

    def _timed(self, function: Callable[..., object]) -> Callable[..., object]:
        def timed(*arguments: object, **named: object) -> object:
            start = perf_counter()
            result = function(*arguments, **named)
            self.seconds += perf_counter() - start
            return result

        return timed


class Variant:
    """One model with a batch of decodes, stepped over the same position again and again."""

    def __init__(self, model: LoadedModel, batch: int, threads: int, params: SamplingParams):
        driver = Driver(model, batch * (CONTEXT // 16 + 2) + 1, threads=threads)
        self.runner: Runner = make_runner(model, driver.pool, threads)
        rows = []
        for index in range(batch):
            generator = torch.Generator().manual_seed(index)
            prompt = torch.randint(3, 256, (CONTEXT,), generator=generator).tolist()
            seq = driver.add(prompt, 8)
            seq.request = msgspec.structs.replace(seq.request, params=params)
            driver.runner.run(StepPlan([StepRow(seq, 0, CONTEXT, False)], CONTEXT, 0))
            rows.append(StepRow(seq, CONTEXT - 1, 1, True))
        self.plan = StepPlan(rows, batch, batch)

    def step(self) -> float:
        start = perf_counter()
        self.runner.run(self.plan)
        return perf_counter() - start


def prefill_rate(model: LoadedModel, length: int, threads: int) -> float:
    """Tokens per second of one prompt computed in one step, the best of three."""
    driver = Driver(model, length // 16 + 2, threads=threads)
    seq = driver.add([3 + index % 250 for index in range(length)], 1)
    plan = StepPlan([StepRow(seq, 0, length, True)], length, 0)
    times = []
    for _ in range(3):
        start = perf_counter()
        driver.runner.run(plan)
        times.append(perf_counter() - start)
    return length / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=[*SIZES, "builtin"], default="bench-360m")
    parser.add_argument("--quantization", nargs="*", default=["none", "int8", "int4"])
    parser.add_argument("--level")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--prefill", type=int, default=512, help="tokens of one prompt; 0: none")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    params = SamplingParams(
        temperature=args.temperature, top_p=args.top_p, seed=1, max_tokens=8, ignore_eos=True
    )
    models: dict[str, LoadedModel] = {}
    with tempfile.TemporaryDirectory() as folder:
        path, how = str(BUILTIN_MODEL), "auto"
        if args.size != "builtin":
            path, how = str(write_model(Path(folder), args.size)), "dummy"
        for name in args.quantization:
            scheme = None if name == "none" else name
            options = ModelOptions(
                path=path, load_format=how, kernel_level=args.level, quantization=scheme
            )
            models[name] = load_model(options)
    results: list[dict[str, object]] = []
    for batch in args.batches:
        results += _decode(models, batch, args.steps, args.threads, params)
    if args.prefill:
        for name, model in models.items():
            rate = prefill_rate(model, args.prefill, args.threads)
            results.append({"weights": name, "prefill_tokens_per_s": round(rate, 1)})
    level = next(iter(models.values())).kernels.level
    write(args.out, {"size": args.size, "level": level, "threads": args.threads, "rows": results})


def _decode(
    models: dict[str, LoadedModel], batch: int, steps: int, threads: int, params: SamplingParams
) -> list[dict[str, object]]:
    variants = {name: Variant(model, batch, threads, params) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(steps):
        for name, variant in variants.items():
            times[name].append(variant.step())
    rows: list[dict[str, object]] = []
    first = next(iter(times))
    for name, variant in variants.items():
        kernels = models[name].kernels
        assert isinstance(kernels, CppKernels), "build the C++ kernels first"
        outside, outside_us = [], []
        with Clock(kernels) as clock:
            for _ in range(steps):
                clock.seconds = 0.0
                whole = variant.step()
                outside.append((whole - clock.seconds) / whole)
                outside_us.append((whole - clock.seconds) * 1e6)
        ratios = [a / b for a, b in zip(times[first], times[name], strict=True)]
        rows.append(
            {
                "weights": name,
                "batch": batch,
                "step_ms": spread([1e3 * t for t in times[name]]),
                "tokens_per_s": round(batch / min(times[name]), 1),
                f"speed_against_{first}": spread(ratios),
                "outside_share": spread(outside),
                "outside_us": spread(outside_us),
            }
        )
    return rows


if __name__ == "__main__":
    main()
