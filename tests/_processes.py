"""Real processes over gloo, for what a process group computes."""

import multiprocessing as mp
import queue as queues
import tempfile
import time
from pathlib import Path

# Against a hang only: on a machine with other work a start alone has taken two minutes.
HANG = 600  # seconds


def two_processes(worker):
    """{rank: results} of `worker(rank, meeting, queue)` in two processes, none of which is left.

    meeting: the init_method of the process group, a file, because a free port may be taken before
    it is used. A process that fails ends the wait.
    """
    context = mp.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        processes = [context.Process(target=worker, args=(rank, meeting, queue))
                     for rank in range(2)]
        for process in processes:
            process.start()
        try:
            results = _results(queue, processes, time.monotonic() + HANG)
            for process in processes:
                process.join(timeout=HANG)
        finally:
            for process in processes:
                if process.is_alive():
                    process.terminate()
                process.join(timeout=10)
    assert [process.exitcode for process in processes] == [0, 0]
    return results


def _results(queue, processes, end):
    results = {}
    while len(results) < len(processes):
        try:
            rank, result = queue.get(timeout=1)
            results[rank] = result
        except queues.Empty:
            codes = [process.exitcode for process in processes]
            assert not any(codes), f"a process ended with {codes}; its error is on stderr"
            assert time.monotonic() < end, f"no results in time; exit codes so far: {codes}"
    return results
