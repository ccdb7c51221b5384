"""From a random-access source of examples to batches: order by seed, threads, a position that can be saved.

The order of a run is a function of the seed alone: examples are numbered globally, each epoch is a new permutation,
and batch number b holds positions [b * batch_size, (b + 1) * batch_size). A process loads its contiguous part of each
batch, so the concatenation over processes is the batch of a single process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

Example = Mapping[str, np.ndarray]


class Source(Protocol):
    """Random access to examples: dicts of arrays, of the same static shapes for every index.

    A source whose order is random as it stands says so by an attribute `shuffled = True`; it is read from its start on.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class DataError(ValueError):
    """An example could not be made or does not fit the others (the text names its index), or a worker has died."""


class BatchIterator(Iterator[dict[str, np.ndarray]]):
    """Endless batches (this process's rows of them), made ahead in threads or processes.

    `get_state` and `set_state` save and restore the position as examples taken, whatever has been made ahead.
    """

    def __init__(self, batches: grain.MapDataset, batch_size: int, threads: int, prefetch: int, processes: int) -> None:
        self._batches = batches
        self._batch_size = batch_size
        self._threads, self._prefetch, self._processes = threads, prefetch, processes
        self._taken = 0  # batches handed out
        self._iterator: Any = None

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            self._iterator = iter(self._start())
        try:
            batch = next(self._iterator)
        except DataError:
            raise
        except Exception as error:  # of Grain itself, as where one of its processes is gone
            raise DataError(f"A worker that makes batches has died ({' '.join(str(error).split())})") from error
        self._taken += 1
        return batch

    def _start(self) -> grain.IterDataset:
        ahead = self._batches[self._taken :] if self._taken else self._batches
        if self._processes:
            if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags, which only a command line has parsed
                flags.FLAGS.mark_as_parsed()
            read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
            workers = grain.multiprocessing.MultiprocessingOptions(
                num_workers=self._processes, per_worker_buffer_size=self._prefetch
            )
            return ahead.to_iter_dataset(read).mp_prefetch(workers)
        return ahead.to_iter_dataset(
            grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._prefetch if self._threads else 0)
        )

    def get_state(self) -> dict[str, int]:
        return {"examples": self._taken * self._batch_size}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continues after `state["examples"]` examples; with another batch size, from the batch that holds the next."""
        self._taken = int(state["examples"]) // self._batch_size
        self.close()

    def close(self) -> None:
        """Stops making batches ahead."""
        if self._iterator is not None and hasattr(self._iterator, "close"):
            self._iterator.close()
        self._iterator = None


def make_iterator(
    source: Source,
    batch_size: int,
    seed: int = 0,
    *,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    prefetch: int = 4,
    processes: int = 0,
) -> BatchIterator:
    """Endless batches over `source`.

    Args:
      source: examples by index.
      batch_size: examples of one global batch; a multiple of process_count.
      seed: decides the order; the same order for any number of processes, threads and workers.
      shuffle: False keeps the order of the source, epoch after epoch.
      process_index, process_count: which contiguous part of each global batch this process loads.
      threads: threads that make batches (0: made when asked for). prefetch: batches that wait ready.
      processes: worker processes instead of threads, for sources that hold the interpreter lock.

    Raises:
      ValueError: an empty source, or a batch size that does not divide.
    """
    if len(source) < 1:
        raise ValueError("The data source has no examples")
    if batch_size % process_count:
        raise ValueError(f"The batch size {batch_size} is not a multiple of the {process_count} processes")
    rows = batch_size // process_count
    order = grain.MapDataset.range(len(source)).seed(seed % 2**32)
    if shuffle and not getattr(source, "shuffled", False):
        order = order.shuffle()
    load = _LoadRows(source, slice(process_index * rows, (process_index + 1) * rows))
    batches = order.repeat().batch(batch_size, batch_fn=np.asarray).map(load)
    return BatchIterator(batches, batch_size, threads, prefetch, processes)


class _LoadRows:
    """Indices of a global batch -> stacked examples of this process. A class so that workers can pickle it."""

    def __init__(self, source: Source, rows: slice) -> None:
        self._source, self._rows = source, rows

    def __call__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        chosen = [int(index) for index in indices[self._rows]]
        return stack_examples([self._load(index) for index in chosen], chosen)

    def _load(self, index: int) -> Example:
        try:
            return self._source[index]
        except (Exception, SystemExit) as error:
            raise DataError(
                f"Example {index} of the data could not be made: {type(error).__name__}: {error}"
            ) from error


def stack_examples(examples: Sequence[Example], indices: Sequence[int]) -> dict[str, np.ndarray]:
    """Stacks equal dicts of arrays along a new first axis; names the example that differs from the first."""
    first = {name: np.asarray(value) for name, value in examples[0].items()}
    for example, index in zip(examples, indices, strict=True):
        if example.keys() != first.keys():
            raise DataError(f"Example {index} has the fields {sorted(example)}, example {indices[0]} {sorted(first)}")
        for name, value in first.items():
            other = np.asarray(example[name])
            if other.shape != value.shape or other.dtype != value.dtype:
                raise DataError(
                    f"Field {name!r} of example {index} is {other.dtype}{list(other.shape)}, "
                    f"of example {indices[0]} {value.dtype}{list(value.shape)}"
                )
    return {name: np.stack([np.asarray(example[name]) for example in examples]) for name in first}
