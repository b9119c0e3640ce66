"""Blocking work beside an event loop: streams that a thread produces, functions that threads call, a loop in a thread.

All threads are daemons: a function of the user's that never returns does not keep an interrupted run alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


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
    """An event loop that runs in a thread of its own, so that what was made in it lives on from call to call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutine: Coroutine[Any, Any, Item]) -> Item:
        """What the coroutine returns or raises; the calling thread, any but the loop's own, waits for it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._running())
        try:
            return future.result()
        finally:
            future.cancel()

    async def call(self, coroutine: Coroutine[Any, Any, Item]) -> Item:
        """The same for a task of another event loop; cancelling it cancels the coroutine."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._running()))

    def close(self) -> None:
        """Cancel what is running and end the loop; it starts anew when it is needed again."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.call_soon_threadsafe(loop.stop)

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run_loop, args=(self._loop,), name=self._name, daemon=True).start()
            return self._loop


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
