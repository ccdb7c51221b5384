"""Several questions to a language model at a time, with an end that loses no reply."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from pixelstory_jax.inference.language_client import AnswerError

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def ask_all(
    items: Sequence[Item], ask: Callable[[Item], Answer], concurrency: int, stop: Callable[[], None]
) -> Generator[tuple[int, Answer | AnswerError]]:
    """Calls `ask` on every item in `concurrency` threads; yields (number of the item, answer), first come first.

    An `AnswerError` is yielded in place of the answer. Any other error ends all: no further item is begun, those that
    are under way are waited for, because they may be paid for already, and the error is raised. So it is where the
    caller stops (Ctrl-C); a second Ctrl-C does not wait. `stop` is that of the client: it cuts waiting short.
    """
    waiting = iter(range(len(items)))
    lock, stopped = threading.Lock(), threading.Event()
    done: queue.SimpleQueue[tuple[int, Answer | BaseException]] = queue.SimpleQueue()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                number = next(waiting, None)
            if number is None:
                return
            try:
                done.put((number, ask(items[number])))
            except BaseException as error:  # shown where the answers are read
                done.put((number, error))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(concurrency, len(items)))]
    for thread in threads:
        thread.start()
    try:
        for _ in items:
            number, answer = done.get()
            if isinstance(answer, BaseException) and not isinstance(answer, AnswerError):
                raise answer
            yield number, answer
    finally:
        stopped.set()
        if any(thread.is_alive() for thread in threads):
            stop()
        for thread in threads:
            thread.join()
