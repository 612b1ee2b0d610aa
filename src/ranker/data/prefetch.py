"""Work done ahead of its consumer, in threads, given out in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Inline(Executor):
    """Runs a task at once, in the caller's thread: what an executor is without workers."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Runs the task; the future is done when this returns."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def executor(workers: int) -> Executor:
    """A pool of so many threads; with 0, tasks run in the caller's thread."""
    return ThreadPoolExecutor(workers, thread_name_prefix="ranker-data") if workers else Inline()


def in_order(tasks: Iterable[Callable[[], T]], *, workers: int, depth: int) -> Generator[T, None, None]:
    """Results of tasks in the order of the tasks, the next few of them worked out ahead.

    Tasks are handed out only as results are taken, so no thread ever waits for a slow consumer, and one that stops
    early leaves at most ``depth`` tasks behind, which are cancelled or finished before this generator closes.

    Args:
        tasks: what to do; iterated in the consumer's thread.
        workers: threads; 0 does each task when its result is asked for.
        depth: tasks under way or done but not taken.

    Raises:
        Exception: whatever a task raised, where its result would have come.
    """
    pool = executor(workers)
    pending: deque[Future[T]] = deque()
    source = iter(tasks)
    try:
        while True:
            while len(pending) < (depth if workers else 1):
                task = next(source, None)
                if task is None:
                    break
                pending.append(pool.submit(task))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
