"""Blocking work beside an event loop: streams that a thread produces, functions that threads call, a loop in a thread.

All threads are daemons: a function of the user's that never returns does not keep an interrupted run alive.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
T = TypeVar("T")

_SETTLE = 60.0
"""Seconds that cancelled work has to clean up."""


class FeedClosed(Exception):
    """Nobody reads the feed any more."""


class Feed(Generic[Item]):
    """The producing thread's end of a stream."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: asyncio.Queue[tuple[Item | None, BaseException | None]] = asyncio.Queue()
        self._closed = threading.Event()
        self._on_close: list[Callable[[], object]] = []

    @property
    def closed(self) -> bool:
        """Whether the reader has gone."""
        return self._closed.is_set()

    def put(self, item: Item) -> None:
        """Hand an item to the reader; raises :class:`FeedClosed` if there is none any more."""
        if self.closed:
            raise FeedClosed
        self._send(item, None)

    def on_close(self, call: Callable[[], object]) -> None:
        """Have ``call`` made, by the reader's thread, when the reader goes."""
        self._on_close.append(call)

    def _send(self, item: Item | None, end: BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed, and the reader went with it
            self._loop.call_soon_threadsafe(self._items.put_nowait, (item, end))

    def _run(self, produce: Callable[[Feed[Item]], None]) -> None:
        end: BaseException = StopAsyncIteration()
        try:
            produce(self)
        except FeedClosed:
            pass
        except BaseException as error:
            end = error
        self._send(None, end)

    def _close(self) -> None:
        self._closed.set()
        for call in self._on_close:
            call()


async def stream_from_thread(
    produce: Callable[[Feed[Item]], None], *, name: str, join: bool = True
) -> AsyncGenerator[Item, None]:
    """What ``produce`` puts into its feed in a thread of its own; an exception there is raised here after the items.

    When the iterator is closed the feed is, too, so that ``put`` raises in the thread; with ``join`` closing returns
    when the thread has ended.
    """
    feed: Feed[Item] = Feed(asyncio.get_running_loop())
    thread = threading.Thread(target=feed._run, args=(produce,), name=name, daemon=True)
    thread.start()
    try:
        while True:
            item, end = await feed._items.get()
            if isinstance(end, StopAsyncIteration):
                return
            if end is not None:
                raise end
            yield item  # type: ignore[misc]
    finally:
        feed._close()
        if join:
            thread.join()


class CallingThreads:
    """Up to ``count`` threads that call blocking functions for event loops; started when they are first needed."""

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What ``function(*arguments)`` returns or raises, called in one of the threads.

        A call that has begun goes on when the waiting task is cancelled.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if answer.cancelled():
                return
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(error)

        def job() -> None:
            if answer.cancelled():
                return
            result, failed = None, None
            try:
                result = function(*arguments)
            except BaseException as error:
                failed = error
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(settle, result, failed)

        if len(self._threads) < self._count:
            thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._jobs.put(job)
        return await answer

    def close(self) -> None:
        """Let each thread end after what it is at; safe to repeat."""
        threads, self._threads = self._threads, []
        for _ in threads:
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


class LoopThread:
    """A running event loop; what belongs to it (connections, locks) may be used in its coroutines only."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start ``work`` in the loop; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def call(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work`` for a task of another event loop; cancelling it cancels ``work``."""
        return await asyncio.wrap_future(self.submit(work))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``. An exception that arrives meanwhile (Ctrl-C) cancels it and waits for its end."""
        ended = threading.Event()

        async def watched() -> T:
            try:
                return await work
            finally:
                ended.set()

        future = self.submit(watched())
        try:
            return future.result()
        except BaseException:
            if future.cancel():
                ended.wait(_SETTLE)
            raise

    def close(self) -> None:
        """Cancel what is left and end the thread; harmless when repeated."""
        if self._loop.is_closed():
            return
        self.run(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
