"""What the small processes may not load: a supervisor or scheduler with torch is a heavy one."""

import subprocess
import sys

import pytest

from diptych.server.spawn import python_environment


@pytest.mark.parametrize(
    "module", ["supervisor", "supervisor_main", "scheduler_process", "launch", "api_process"]
)
def test_no_torch(module: str) -> None:
    program = (
        f"import sys, diptych.server.{module}\n"
        "heavy = {'torch', 'numpy', 'transformers', 'fastapi'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], env=python_environment(), timeout=60)
    assert ended.returncode == 0
