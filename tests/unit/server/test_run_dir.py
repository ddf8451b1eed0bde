"""Run directories: private, locked while alive, removed by the next start when nobody lives."""

import os
import subprocess
import sys
from pathlib import Path

from diptych.server.run_dir import create_run_dir, remove_run_dir, remove_stale_run_dirs
from diptych.server.spawn import python_environment


def test_private_and_kept_while_its_lock_is_held(tmp_path: Path) -> None:
    path, lock_fd = create_run_dir(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o700
    remove_stale_run_dirs(tmp_path)
    assert path.exists()
    os.close(lock_fd)
    remove_stale_run_dirs(tmp_path)
    assert not path.exists()


def test_the_next_start_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path\n"
        "from diptych.server.run_dir import create_run_dir\n"
        "create_run_dir(Path(sys.argv[1])); os.kill(os.getpid(), 9)\n"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path)]
    subprocess.run(arguments, env=python_environment(), timeout=30)
    (left,) = tmp_path.iterdir()
    path, lock_fd = create_run_dir(tmp_path)
    assert set(tmp_path.iterdir()) == {path}
    assert left != path
    os.close(lock_fd)
    remove_run_dir(path)


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "diptych-notes").mkdir()
    remove_stale_run_dirs(tmp_path)
    assert (tmp_path / "diptych-notes").exists()
