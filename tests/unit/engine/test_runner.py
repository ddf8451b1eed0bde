"""The runner: who is sampled, prompt logprobs, NaN rows, progress, fingerprints, forks."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.drive import Driver
from bench.oracle import VOCAB_SIZE, make_checkpoint
from diptych.engine.core.config import ModelOptions
from diptych.engine.core.errors import ConfigError, ModelLoadError
from diptych.engine.core.plan import StepPlan, StepRow
from diptych.engine.runner import load_model, make_runner
from tests.unit.engine.models import BACKEND, all_logits, tiny_model

PROMPT = [(7 * index) % VOCAB_SIZE for index in range(50)]


def test_only_rows_that_ask_are_sampled() -> None:
    driver = Driver(tiny_model("llama2"))
    first, second = driver.add(PROMPT[:20], 1), driver.add(PROMPT[:9], 1)
    plan = StepPlan([StepRow(first, 0, 12, False), StepRow(second, 0, 9, True)], 21, 0)
    result = driver.runner.run(plan)
    assert result.samples[0] is None
    assert result.samples[1] is not None
    assert set(driver.recorder.logits) == {second.ref.request}
    assert result.compute_s > 0


def test_make_runner_samples_like_the_recorder() -> None:
    model = tiny_model("qwen2")
    wanted, driver = Driver(model), Driver(model)
    driver.runner = make_runner(model, driver.pool, threads=2)
    for each in (wanted, driver):
        each.add(PROMPT, 5)
        each.add(PROMPT[:17], 5)
    assert driver.finish(chunk=16) == wanted.finish()
    assert driver.runner.fingerprint == model.fingerprint


def test_an_empty_plan_is_no_step() -> None:
    assert Driver(tiny_model("llama2")).runner.run(StepPlan([], 0, 0)).samples == []


@pytest.mark.parametrize("num_shards", [1, 2])
def test_every_layer_shows_that_time_goes_on(num_shards: int) -> None:
    model = tiny_model("llama2", num_shards=num_shards)
    driver, page = Driver(model), memoryview(bytearray(24)).cast("Q")
    driver.runner = make_runner(model, driver.pool, threads=1, pulse=page[1:2])
    driver.add(PROMPT, 3)
    for steps in range(1, 4):  # a prompt and two decodes
        driver.step()
        assert page.tolist() == [0, steps * model.config.num_layers, 0]


@pytest.mark.parametrize("chunk", [1, 13, 50])
def test_prompt_logprobs(chunk: int) -> None:
    model = tiny_model("llama2")
    driver = Driver(model)
    plain, seq = driver.add(PROMPT[:5], 2), driver.add(PROMPT, 3, prompt_logprobs=4)
    driver.finish(chunk=chunk)
    entries = seq.prompt_logprobs
    assert plain.prompt_logprobs == []
    assert len(entries) == len(PROMPT) - 1
    raw = all_logits(model, driver.pool, driver.add(PROMPT, 1), [])
    wanted = torch.log_softmax(raw.double(), dim=1)
    for position, entry in enumerate(entries, start=1):
        row = wanted[position - 1]
        assert entry.token == PROMPT[position]
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-5)
        assert entry.rank == 1 + int((row > row[entry.token]).sum())
        values = torch.topk(row, 4).values.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values, abs=1e-5)


def test_prompt_logprobs_do_not_depend_on_the_chunk_or_on_slices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    for chunk, logits_bytes in ((50, 1 << 20), (16, 1 << 20), (50, 3 * 4 * VOCAB_SIZE)):
        monkeypatch.setattr("diptych.engine.runner._LOGITS_BYTES_MAX", logits_bytes)
        driver = Driver(tiny_model("qwen3"))
        seqs = [driver.add(PROMPT[index:], 2, prompt_logprobs=2) for index in range(5)]
        tokens = driver.finish(chunk=chunk)
        results.append((tokens, [seq.prompt_logprobs for seq in seqs]))
    assert results[0] == results[1] == results[2]


def test_a_nan_row_does_not_touch_its_neighbours() -> None:
    clean = Driver(tiny_model("llama2"))
    clean.add(PROMPT, 4)
    wanted = clean.finish()[0]
    driver = Driver(tiny_model("llama2"))
    seq, sick = driver.add(PROMPT, 4), driver.add(PROMPT[:20], 4, prompt_logprobs=1)
    plan = driver.plan(16, 1 << 20)
    driver.pool.data[sick.block_table[0]] = math.nan
    sick.num_computed = 16  # it claims a prefix that is broken
    plan = StepPlan([plan.rows[0], StepRow(sick, 16, 4, True)], 20, 0)
    result = driver.runner.run(plan)
    sample = result.samples[1]
    assert sample is not None
    assert sample.error is not None
    assert [math.isnan(entry.logprob) for entry in result.prompt_logprobs[1]] == [True] * 3
    seq.num_computed = 16
    driver.seqs.remove(sick)
    assert driver.finish()[0] == wanted


def test_fingerprints(tmp_path: Path) -> None:
    def fingerprint(family: str, seed: int = 0, **options: str) -> str:
        folder = tmp_path / f"{family}-{seed}"
        if not folder.exists():
            make_checkpoint(folder, family, seed=seed)
        path = options.pop("path", str(folder))
        return load_model(ModelOptions(path=path, **options)).fingerprint  # type: ignore[arg-type]

    first = fingerprint("llama2", kernels="reference")
    assert fingerprint("llama2", kernels="reference") == first
    others = [
        fingerprint("llama2", 1, kernels="reference"),
        fingerprint("llama2", kernels="reference", dtype="bfloat16"),
        fingerprint("llama-linear", kernels="reference"),
        fingerprint("llama2", kernels="reference", load_format="dummy"),
        fingerprint("llama2", kernels="reference", quantization="int8"),
        fingerprint("llama2", kernels="reference", quantization="int4"),
        fingerprint("llama2", kernels="reference", quantization="int4-g32"),
    ]
    if BACKEND == "cpp":
        others.append(fingerprint("llama2", kernels="cpp"))
    assert len({first, *others}) == 1 + len(others)


def test_the_length_limit_is_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama2")
    prints = {
        load_model(ModelOptions(path=str(tmp_path), max_model_len=length)).fingerprint
        for length in (100, 200)
    }
    assert len(prints) == 1


def test_unusable_options(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama2")
    with pytest.raises(ConfigError, match="kernels must be"):
        load_model(ModelOptions(path=str(tmp_path), kernels="cuda"))
    with pytest.raises(ConfigError, match="quantization must be"):
        load_model(ModelOptions(path=str(tmp_path), quantization="int3"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_model_len"):
        load_model(ModelOptions(path=str(tmp_path), max_model_len=1 << 20))
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load_model(ModelOptions(path=str(tmp_path / "no")))


FORK = """
import os, sys
import torch
from bench.drive import Driver
from diptych.engine.core.config import ModelOptions
from diptych.engine.runner import load_model

torch.set_num_threads(1)  # the contract of load_model for a process that forks
threads = os.listdir("/proc/self/task")
model = load_model(ModelOptions(path=sys.argv[1]))
assert os.listdir("/proc/self/task") == threads, "a thread was started before the fork"

def answer(threads):
    driver = Driver(model, threads=threads)
    for start in range(4):
        driver.add(list(range(start, start + 60)), 5)
    return repr(driver.finish(chunk=17)).encode()

def in_child(threads):
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, answer(threads))
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        result = file.read()
    assert os.wait()[1] == 0
    return result

children = [in_child(2), in_child(1), in_child(3)]
assert children == [answer(2)] * 3, children
"""


def test_forked_workers_answer_as_their_parent(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama3", torch.bfloat16)
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
