"""Several processes on one output folder, each taking parts that no other is at."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from imprompt.bases import Base
from imprompt.core.errors import ImpromptError
from imprompt.data.batch import Work
from imprompt.data.encoding import Report
from imprompt.data.parts import work_through
from imprompt.data.records import Reading
from imprompt.data.sources import open_source


@dataclass(frozen=True)
class Job:
    """What several processes do together; each gets all of it."""

    source: str
    reading: Reading | None
    output: Path
    base: Base
    work: Work
    part_numbers: Sequence[int]
    """Of the source, those that are to be done."""


def work_side_by_side(workers: int, job: Job, report: Report) -> None:
    """Do a job with so many processes of this machine.

    Raises:
        ImpromptError: what the first of them to fail says.
    """
    context = torch.multiprocessing.get_context("spawn")
    reports = context.Queue()
    num_threads = max(1, torch.get_num_threads() // workers)
    processes = [
        context.Process(
            target=_work, args=(job, reports, num_threads, os.getpid(), number), daemon=True
        )
        for number in range(min(workers, len(job.part_numbers)))
    ]
    for process in processes:
        process.start()
    try:
        running = len(processes)
        while running:
            try:
                message = reports.get(timeout=0.5)
            except Empty:
                if not all(process.is_alive() for process in processes) and _died(processes):
                    raise ImpromptError(
                        "A worker ended without a word; perhaps the memory was full. Give the same "
                        "command again with fewer --workers."
                    ) from None
                continue
            if isinstance(message, tuple):
                report(*message)
            elif message is None:
                running -= 1
            else:
                raise ImpromptError(message)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _died(processes: Sequence[Any]) -> bool:
    return any(process.exitcode not in (None, 0) for process in processes)


def _work(job: Job, reports: Any, num_threads: int, parent: int, number: int) -> None:
    torch.set_num_threads(num_threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        if (device := device_of_worker(number, job.base.device)) != job.base.device:
            torch.cuda.set_device(device)
            job.base.to(device)
        _do(job, reports)
    except ImpromptError as error:
        reports.put(str(error))
    except KeyboardInterrupt:
        pass  # the parent hears of it too
    except BaseException as error:
        reports.put(f"A worker failed: {type(error).__name__}: {error}")
        raise
    else:
        reports.put(None)


def device_of_worker(number: int, device: torch.device) -> torch.device:
    """Where a worker computes, counted from 0: on a GPU of its own, as far as there are several, by turns.

    A base that was put on a certain GPU ("cuda:1") but the first stays there, and so do all workers.
    """
    if device.type != "cuda" or device.index not in (None, 0):
        return device
    return torch.device("cuda", number % torch.cuda.device_count())


def _end_with(parent: int) -> None:
    """End this process soon after its parent is gone, however that went."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def work_on_ray(workers: int, job: Job, report: Report) -> None:
    """Do a job with so many tasks of a Ray cluster, whose machines share the disks.

    Raises:
        ImpromptError: ray is missing, or what the first task to fail says.
    """
    try:
        import ray  # type: ignore[import-not-found]
        from ray.exceptions import RayError  # type: ignore[import-not-found]
        from ray.util.queue import Empty as NothingYet  # type: ignore[import-not-found]
        from ray.util.queue import Queue  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImpromptError("The engine ray needs it: pip install 'imprompt[ray]'.") from error
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    reports = Queue()
    task = ray.remote(num_cpus=1, max_retries=0)(_work_as_task)
    shared = ray.put(replace(job, output=job.output.resolve()))
    waiting = [task.remote(shared, reports) for _ in range(min(workers, len(job.part_numbers)))]
    try:
        while waiting or not reports.empty():
            try:
                report(*reports.get(timeout=0.2))
            except NothingYet:
                ended, waiting = ray.wait(waiting, timeout=0) if waiting else ([], [])
                for failure in filter(None, ray.get(ended)):
                    raise ImpromptError(failure) from None
    except RayError as error:
        raise ImpromptError(f"A Ray task failed: {error}") from error
    finally:
        for running in waiting:
            ray.cancel(running, force=True)


def _work_as_task(job: Job, reports: Any) -> str | None:
    """A task's part of a job; what went wrong, if a user can do something about it."""
    try:
        _do(job, reports)
    except ImpromptError as error:
        return str(error)
    return None


def _do(job: Job, reports: Any) -> None:
    """One worker's share of a job, told pair by pair to the queue `reports`."""
    parts = open_source(job.source, job.reading)
    work_through(
        parts, job.output, job.base, job.work, job.part_numbers, lambda *done: reports.put(done)
    )
