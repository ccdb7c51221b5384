"""Stories whose pictures and captions were encoded once by frozen networks: `cache_stories` writes, training reads.

    FOLDER/index.json            sizes, and which networks and data the cache is of
    FOLDER/empty/context.npy     states of the empty caption [T, D] (and pooled.npy [P])
    FOLDER/shard-00000/mean.npy  of a number of stories each: mean, std, context (and pooled), one file per field

All arrays are float16. Shards appear whole, so a run that was stopped continues where it was.

N stories, B of them at a time, A panels of a story, S picture side, h x w latents, C latent channels, T text tokens,
D text width, P pooled width.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pixelstory_jax.data.pipeline import DataError, Example, Source, stack_examples
from pixelstory_jax.models.autoencoder import Autoencoder, scale_latents, signed_pixels
from pixelstory_jax.models.paths import flatten, unflatten
from pixelstory_jax.models.story_diffusion import Params, StoryDiffusion

FORMAT = 1
COMMAND = "python -m experiments.cache_stories"
TOKEN_FIELDS = {"text": "tokens", "text_2": "tokens_2"}
ENCODERS = ("autoencoder/encoder/", "autoencoder/moments/", "text/", "text_2/")  # the parameters that encode
DRAWN = ("mean", "std")  # fields of which a training example has a draw, "latents"
_LOADERS = 4  # threads that read examples ahead


class CacheError(DataError):
    """A cache that cannot be read, written or continued; one sentence."""


@dataclasses.dataclass(frozen=True)
class CacheIndex:
    """What index.json says.

    Attributes:
      networks: digest of the networks that encoded, see `networks_digest`. data: that of the data, see `cache_stories`.
      stories: N. shard: stories of a shard; the last one may have fewer.
      picture_size: S.
      fields: shape of one story by field: mean and std [A, h, w, C], context [A, T, D] (and pooled [A, P]).
    """

    networks: str
    data: str
    stories: int
    shard: int
    picture_size: int
    fields: dict[str, tuple[int, ...]]
    format: int = FORMAT

    def shards(self) -> dict[str, range]:
        """Numbers of the stories of each shard, by its name."""
        starts = range(0, self.stories, self.shard)
        return {
            f"shard-{number:05d}": range(start, min(start + self.shard, self.stories))
            for number, start in enumerate(starts)
        }

    def write(self, folder: Path) -> None:
        partial = folder / ".index.json.partial"
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / "index.json")

    @classmethod
    def read(cls, folder: Path) -> CacheIndex:
        """Reads FOLDER/index.json.

        Raises:
          CacheError: it is absent, damaged or of another format.
        """
        file = folder / "index.json"
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise CacheError(
                f"{file} cannot be read ({error.strerror or error}); a cache of stories has it, {COMMAND} writes one."
            ) from error
        except ValueError as error:
            raise CacheError(f"{file} is not JSON ({error}).") from error
        try:
            fields = {str(name): tuple(map(int, shape)) for name, shape in table.pop("fields").items()}
            index = cls(fields=fields, **table)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CacheError(f"{file} is not the index of a cache of stories ({error!r}).") from error
        numbers = (index.format, index.stories, index.shard, index.picture_size)
        if not all(isinstance(number, int) and number > 0 for number in numbers) or not {*DRAWN, "context"} <= {
            *fields
        }:
            raise CacheError(
                f"{file} is not the index of a cache of stories: its sizes are {table}, its fields {fields}."
            )
        if index.format != FORMAT:
            raise CacheError(f"{file} has format {index.format}, this version reads {FORMAT}; write the cache anew.")
        return index


class CachedStories:
    """Random access to the stories of a cache.

    An example has ``latents`` float16 [A, h, w, C], ``context`` float16 [A, T, D] and, for SDXL, ``pooled`` float16
    [A, P]. The latents are a draw from the distribution that the autoencoder gave, fixed by (seed, index): with
    `draws` of 1 an epoch sees the draws of the epoch before, with more each story is drawn so many times.

    Args:
      folder: that `cache_stories` wrote.
      seed: of the draws, non-negative.
      draws: examples that are made of each story; index i is draw i // N of story i % N.

    Attributes:
      index: sizes and origin.
      empty: states of the empty caption, float16: "context" [T, D] (and "pooled" [P]).

    Raises:
      CacheError: the cache is incomplete or damaged.
      ValueError: an argument out of range.
    """

    def __init__(self, folder: str | os.PathLike[str], seed: int = 0, draws: int = 1) -> None:
        if seed < 0 or draws < 1:
            raise ValueError(f"seed must be at least 0 and draws at least 1, got seed {seed}, draws {draws}")
        self.folder, self.seed, self.draws = Path(folder), seed, draws
        self.index = CacheIndex.read(self.folder)
        shards = self.index.shards()
        lacking = [name for name in ("empty", *shards) if not (self.folder / name).is_dir()]
        if lacking:
            raise CacheError(
                f"{self.folder} is incomplete: {len(lacking)} of its {len(shards) + 1} parts are missing, {lacking[0]} "
                f"first; the same {COMMAND} that began it goes on with it."
            )
        for name, stories in shards.items():
            for field, shape in self.index.fields.items():
                _open_array(self.folder / name / f"{field}.npy", (len(stories), *shape))
        self.empty = {
            field: np.array(_open_array(self.folder / "empty" / f"{field}.npy", shape[1:]))
            for field, shape in self.index.fields.items()
            if field not in DRAWN
        }

    def __len__(self) -> int:
        return self.index.stories * self.draws

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} does not exist, there are {len(self)}")
        example = {field: self._read(field, index % self.index.stories) for field in self.index.fields}
        mean, std = (example.pop(field).astype(np.float32) for field in DRAWN)
        noise = np.random.default_rng((self.seed, index)).standard_normal(mean.shape, np.float32)
        return {"latents": (mean + std * noise).astype(np.float16), **example}

    def _read(self, field: str, story: int) -> np.ndarray:
        """A field of one story. The file is opened anew: nothing open has to pass to worker processes."""
        shard, row = divmod(story, self.index.shard)
        rows = min(self.index.shard, self.index.stories - shard * self.index.shard)
        file = self.folder / f"shard-{shard:05d}" / f"{field}.npy"
        return np.array(_open_array(file, (rows, *self.index.fields[field]))[row])

    def check_networks(self, model: StoryDiffusion, params: Params) -> None:
        """Raises CacheError where autoencoder and text encoders are others than those that wrote the cache."""
        if networks_digest(model, params) != self.index.networks:
            raise CacheError(
                f"{self.folder} was written with another autoencoder or other text encoders than config.init_from has; "
                f"start from the weights that {COMMAND} was given, or write a cache with these."
            )


def cache_stories(
    model: StoryDiffusion,
    params: Params,
    source: Source,
    out: str | os.PathLike[str],
    empty: Mapping[str, np.ndarray],
    data: str,
    batch: int = 1,
    shard: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Encodes the stories of a source, or those that a stopped run has left, into a folder.

    Args:
      params: of autoencoder and text encoders; others are not looked at.
      source: of examples with "images" uint8 [A, S, S, 3] and token ids [A, T] by encoder.
      out: new or empty, or a cache of the same networks and data that is to be completed.
      empty: ids of the empty caption [T] by encoder name.
      data: what the source is, in any words; a cache of something else is not continued.
      batch: stories B at a time; rounded up to fill all local devices. The panels of a story follow one another.
      shard: stories of a shard, and so how much is lost where a run is stopped.
      progress: called with (stories done, all stories), once before the first.

    Raises:
      CacheError: the folder holds something else, or the encoded values do not fit float16.
      DataError: an example cannot be made or is not a story.
    """
    if min(batch, shard) < 1:
        raise ValueError(f"batch and shard must be at least 1, got batch {batch}, shard {shard}")
    encode = _Encoder(model, params, batch)
    index = CacheIndex(
        networks_digest(model, params), data, len(source), shard, *_story_sizes(model, params, source[0])
    )
    folder = Path(out)
    index = _begin(folder, index)
    _write_arrays(folder / "empty", encode.empty_caption(empty))

    missing = {name: numbers for name, numbers in index.shards().items() if not (folder / name).is_dir()}
    done = index.stories - sum(map(len, missing.values()))
    report = progress or (lambda done, total: None)
    report(done, index.stories)
    examples = _load_ahead(source, itertools.chain.from_iterable(missing.values()), 2 * encode.batch)
    for name, numbers in missing.items():
        parts = []
        for start in range(0, len(numbers), encode.batch):
            chosen = numbers[start : start + encode.batch]
            parts.append(encode(list(itertools.islice(examples, len(chosen))), chosen))
            done += len(chosen)
            report(done, index.stories)
        _write_arrays(folder / name, {field: np.concatenate([part[field] for part in parts]) for field in parts[0]})


def encode_stories(
    model: StoryDiffusion, params: Params, images: jax.Array, tokens: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """What is cached of pictures uint8 [B, A, S, S, 3] and ids [B, A, T] by encoder name: the fields [B, A, ...].

    Mean and standard deviation are those of scaled latents.
    """
    stories = len(images)

    def moments(panel: jax.Array) -> tuple[jax.Array, jax.Array]:
        variables = {"params": params["autoencoder"]}
        encoded = model.autoencoder.apply(variables, signed_pixels(panel), method=Autoencoder.encode)
        mean, logvar = cast(tuple[jax.Array, jax.Array], encoded)
        config = model.config.autoencoder
        return scale_latents(mean, config), scale_latents(jnp.exp(0.5 * logvar), config)

    # One panel of every story after another: a picture of 1024 x 1024 pixels takes gigabytes on its way.
    mean, std = jax.lax.map(moments, rearrange(images, "b a h w c -> a b h w c"))
    flat = {name: rearrange(ids, "b a t -> (b a) t") for name, ids in tokens.items()}
    context, pooled = model.encode_text(params, flat)
    fields = {"mean": rearrange(mean, "a b ... -> b a ..."), "std": rearrange(std, "a b ... -> b a ...")}
    texts = {"context": context} if pooled is None else {"context": context, "pooled": pooled}
    return fields | {name: rearrange(value, "(b a) ... -> b a ...", b=stories) for name, value in texts.items()}


def encoder_params(model: StoryDiffusion, weights: Mapping[str, Any]) -> Params:
    """The parameters that encode, float32, out of starting weights by slash path.

    Raises:
      CacheError: some are missing or of another shape; all are named.
    """
    shapes = flatten(jax.eval_shape(model.init, jax.random.key(0)))
    shapes = {path: shape.shape for path, shape in shapes.items() if path.startswith(ENCODERS)}
    wrong = [f"{path} is missing" for path in shapes if path not in weights]
    wrong += [
        f"{path} has shape {list(np.shape(weights[path]))}, not {list(shape)}"
        for path, shape in shapes.items()
        if path in weights and np.shape(weights[path]) != shape
    ]
    if wrong:
        raise CacheError(f"The weights do not hold the networks that encode: {'; '.join(wrong)}.")
    return unflatten({path: np.asarray(weights[path], np.float32) for path in shapes})


def networks_digest(model: StoryDiffusion, params: Params) -> str:
    """SHA-256 of the sizes and the parameters of autoencoder (without its decoder) and text encoders."""
    config = model.config
    parts: dict[str, Any] = {
        "autoencoder": config.autoencoder,
        **{name: encoder.config for name, encoder in model.encoders.items()},
    }
    sizes = {name: dataclasses.asdict(part) for name, part in parts.items()}
    for part in sizes.values():
        for field in ("dtype", "remat"):  # how they are computed, not what they are
            part.pop(field, None)
    digest = hashlib.sha256(json.dumps([sizes, config.text_layer], sort_keys=True).encode())
    for path, value in sorted(flatten(params).items()):
        if path.startswith(ENCODERS):
            array = np.ascontiguousarray(value, np.float32)
            digest.update(f"{path} {array.shape}".encode())
            digest.update(array.data)
    return digest.hexdigest()


class _Encoder:
    """`encode_stories` compiled for a fixed number of stories, spread over the local devices."""

    def __init__(self, model: StoryDiffusion, params: Params, batch: int) -> None:
        devices = jax.local_devices()
        mesh = Mesh(np.array(devices), ("data",))
        self.model, self.batch = model, -(-batch // len(devices)) * len(devices)
        self._rows = NamedSharding(mesh, PartitionSpec("data"))
        used = unflatten({path: value for path, value in flatten(params).items() if path.startswith(ENCODERS)})
        self._params = jax.device_put(used, NamedSharding(mesh, PartitionSpec()))
        self._encode = jax.jit(functools.partial(encode_stories, model))
        self._encode_text = jax.jit(model.encode_text)

    def __call__(self, examples: list[Example], numbers: range) -> dict[str, np.ndarray]:
        """Fields [n, A, ...] of up to B examples, float16."""
        padding = [examples[-1]] * (self.batch - len(examples))
        stories = stack_examples([*examples, *padding], [*numbers, *[numbers[-1]] * len(padding)])
        tokens = {name: stories[TOKEN_FIELDS[name]] for name in self.model.encoders}
        encoded = jax.device_get(self._encode(self._params, *jax.device_put((stories["images"], tokens), self._rows)))
        return _halved(
            {field: value[: len(examples)] for field, value in encoded.items()},
            f"stories {numbers[0]} to {numbers[-1]}",
        )

    def empty_caption(self, tokens: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Context [T, D] (and pooled [P]) of ids [T] by encoder name, float16."""
        rows = {name: jnp.asarray(tokens[name])[None] for name in self.model.encoders}
        context, pooled = jax.device_get(self._encode_text(self._params, rows))
        fields = {"context": context[0]} if pooled is None else {"context": context[0], "pooled": pooled[0]}
        return _halved(fields, "the empty caption")


def _halved(fields: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    with np.errstate(over="ignore"):  # what overflows is found below
        halved = {field: np.asarray(value).astype(np.float16) for field, value in fields.items()}
    wrong = [field for field, value in halved.items() if not np.isfinite(value).all()]
    if wrong:
        raise CacheError(
            f"{' and '.join(wrong)} of {name} is not finite in float16; compute in float32 "
            "(config.model.autoencoder.dtype, config.model.text.dtype)."
        )
    return halved


def _story_sizes(model: StoryDiffusion, params: Params, example: Example) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Picture size and shapes of the fields of a story."""
    needed = ["images", *(TOKEN_FIELDS[name] for name in model.encoders)]
    absent = [name for name in needed if name not in example]
    if absent:
        raise CacheError(
            f"The source has no {' and no '.join(absent)}, only {', '.join(example)}; name stories with pictures."
        )
    _, height, width, _ = np.shape(example["images"])
    if height != width:
        raise CacheError(f"The panels have {height} x {width} pixels; square ones are needed.")
    model.config.latent_size(height, width)
    tokens = {name: jnp.asarray(example[TOKEN_FIELDS[name]])[None] for name in model.encoders}
    images = jax.ShapeDtypeStruct((1, *np.shape(example["images"])), np.uint8)
    shapes = jax.eval_shape(functools.partial(encode_stories, model), params, images, tokens)
    return height, {field: shape.shape[1:] for field, shape in shapes.items()}


def _begin(folder: Path, index: CacheIndex) -> CacheIndex:
    """The index to work by: of a cache that is to be completed, or `index`, which is written.

    Raises:
      CacheError: the folder holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        folder.mkdir(parents=True, exist_ok=True)
        index.write(folder)
        return index
    if not (folder / "index.json").is_file():
        raise CacheError(f"{folder} exists and is no cache of stories; choose another folder.")
    begun = CacheIndex.read(folder)
    if begun.networks != index.networks:
        raise CacheError(f"{folder} is a cache of other networks or weights; choose another folder.")
    if dataclasses.replace(begun, shard=index.shard) != index:
        raise CacheError(f"{folder} is a cache of other stories, or of other sizes; choose another folder.")
    return begun


def _write_arrays(folder: Path, fields: Mapping[str, np.ndarray]) -> None:
    """Writes a folder of arrays whole or not at all; one that exists stays."""
    if folder.is_dir():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir()
        for field, value in fields.items():
            np.save(partial / f"{field}.npy", value)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open_array(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A memory-mapped float16 array of this shape."""
    try:
        array = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise CacheError(
            f"{file} is missing or damaged ({error}); delete {file.parent} and run {COMMAND} again."
        ) from error
    if array.shape != shape or array.dtype != np.float16:
        raise CacheError(
            f"{file} is {array.dtype} {list(array.shape)}, the index says float16 {list(shape)}; delete {file.parent} "
            f"and run {COMMAND} again."
        )
    return array


def _load_ahead(source: Source, numbers: Iterable[int], ahead: int) -> Iterator[Example]:
    """Examples in this order, of which some more are being read in threads."""
    with ThreadPoolExecutor(_LOADERS) as pool:
        waiting: deque[Future[Example]] = deque()
        for number in numbers:
            waiting.append(pool.submit(source.__getitem__, number))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
