"""Local processes: order, progress, errors, deaths, and nothing that outlives the command."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from facesnap_ext.errors import FaceSnapError
from facesnap_lab import workers
from facesnap_lab.workers import Task, open_workers
from tests.support import work
from tests.support.processes import group_is_alive, wait_for_end


@pytest.mark.parametrize("count", [0, 2])
def test_results_have_the_order_of_the_tasks_and_progress_their_sizes(count):
    progress = []
    tasks = [Task(f"task {number}", number + 1, number) for number in range(9)]
    with open_workers(count) as run_tasks:
        assert run_tasks(work.square, tasks, progress.append) == [number**2 for number in range(9)]
        assert run_tasks(work.square, tasks[3:4], progress.append) == [9]
        with pytest.raises(FaceSnapError, match="Task 7 fails; nothing can be done"):
            run_tasks(work.fail, tasks[7:8], progress.append)
    assert sorted(progress) == sorted([*range(1, 10), 4])


def test_task_is_done_again_if_its_process_dies(tmp_path):
    tasks = [Task("killer", 1, (tmp_path, workers.ATTEMPTS - 1)), *(Task("other", 1, (tmp_path, 0)) for _ in range(3))]
    with open_workers(2) as run_tasks:
        assert run_tasks(work.die, tasks, lambda size: None)[0] == f"alive after {workers.ATTEMPTS - 1} deaths"


def test_task_whose_processes_always_die_is_named(tmp_path):
    with open_workers(2) as run_tasks, pytest.raises(FaceSnapError, match=r"^shard-7\.tar cannot .* died 3 times"):
        run_tasks(work.die, [Task("shard-7.tar", 1, (tmp_path, 99))], lambda size: None)
    assert len(list(tmp_path.iterdir())) == workers.ATTEMPTS


def test_first_error_ends_the_other_processes():
    began, before = time.monotonic(), set(multiprocessing.active_children())
    tasks = [Task(f"task {number}", 1, number) for number in range(4)]
    with pytest.raises(FaceSnapError, match="Task 0 fails"), open_workers(2) as run_tasks:
        run_tasks(work.fail_or_hang, tasks, lambda size: None)
    assert time.monotonic() - began < 60
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="requires /proc")
def test_interrupt_ends_all_processes(tmp_path):
    """Two of the three processes are working, and one has nothing left to do."""
    script = (
        "import sys; from pathlib import Path; from facesnap_lab.workers import *; from tests.support import work\n"
        "if __name__ == '__main__':\n"
        "    tasks = [Task('task', 1, (Path(sys.argv[1]), seconds)) for seconds in (0, 600, 600)]\n"
        "    with open_workers(3) as run_tasks:\n"
        "        run_tasks(work.sleep, tasks, print)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        while len(list(tmp_path.iterdir())) < 3:
            assert process.poll() is None
            time.sleep(0.02)
        for child in tmp_path.iterdir():
            os.kill(int(child.name), signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None, "the parent, and not the others, must handle Ctrl-C"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(30) != 0
        assert wait_for_end(process.pid)
    finally:
        if group_is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    errors = process.stderr.read()
    assert errors.count("Traceback") == 1, errors  # only the parent's KeyboardInterrupt
    assert errors.rstrip().endswith("KeyboardInterrupt")
