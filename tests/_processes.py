"""Real processes over gloo, for what a process group computes."""

import multiprocessing as mp
import socket


def two_processes(worker, timeout):
    """{rank: results} of `worker(rank, port, queue)` in two processes; each is ended if it hangs.

    timeout: seconds to wait for the results of one process.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=worker, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        results = dict(queue.get(timeout=timeout) for _ in processes)
        for process in processes:
            process.join(timeout=20)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join(timeout=10)
    assert [process.exitcode for process in processes] == [0, 0]
    return results
