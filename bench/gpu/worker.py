"""A process that runs the steps of a part, so that one which hangs, or after which the GPU takes no more from
its process, stops none of the others."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection

import torch

from bench.gpu.steps import Step, tried


class Worker:
    """Runs steps in another process, which is started where there is none, and ended after a step that fails
    or takes too long."""

    def __init__(self, steps: Callable[[], list[Step]], device: str) -> None:
        """steps: found by name in the other process."""
        self.steps, self.device = steps, device
        self.process: multiprocessing.process.BaseProcess | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def attempt(self, step: Step, until: float) -> dict:
        """Runs a step, after the start of a process where there is none, until at most that reading of the
        monotonic clock."""
        begun = time.monotonic()
        if self.process is None:
            # A fork could not use the GPU once this process has asked for it.
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=_work, args=(theirs, self.steps, self.device))
            self.process.start()
            theirs.close()
        try:
            self.pipe.send(step.name)
            if self.pipe.poll(max(0.0, until - time.monotonic())):
                outcome = self.pipe.recv()
            else:
                outcome = {"failed": f"ended after {time.monotonic() - begun:.0f} s, which is too long"}
        except (EOFError, ConnectionError):
            self.process.join()
            outcome = {"failed": f"its process ended with code {self.process.exitcode}"}
        if "failed" in outcome:
            self.end()
        return outcome

    def end(self) -> None:
        """Ends the process and those that it started."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):  # it has ended, or it leads no group yet
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.process = None


def _work(pipe: Connection, steps: Callable[[], list[Step]], device: str) -> None:
    """Runs the steps that it is told by name, until nobody is there to tell."""
    os.setsid()
    # A shell has its background jobs ignore this signal, by which tests are asked to stop.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    by_name = {step.name: step for step in steps()}
    with suppress(EOFError, ConnectionError):
        while True:
            pipe.send(tried(by_name[pipe.recv()], torch.device(device)))
