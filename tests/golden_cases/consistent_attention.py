"""One layer of consistent self-attention, and the rules behind its masks and gates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from pixelstory_jax.inference.sharing import attention_path, sample_tokens
from pixelstory_jax.interop.torch_layout import LAYOUTS
from pixelstory_jax.models.attention import attend
from pixelstory_jax.models.consistent_attention import Sample, SelfAttention, Sharing, see_each_other
from tests.golden_cases.fixture import Fixture

SCHEDULES = {"app_and_predict": "app", "low_vram": "low_vram", "oldversion": "low_vram"}


class Layer:
    """The layer of a fixture with its weights."""

    def __init__(self, fixture: Fixture) -> None:
        to_ours = LAYOUTS["linear"].to_ours
        weights = fixture.weights
        self.params = {
            ours: {"kernel": to_ours(weights[f"{theirs}.weight"])}
            for ours, theirs in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("out", "to_out.0"))
        }
        self.params["out"]["bias"] = weights["to_out.0.bias"]
        self.module = SelfAttention(fixture.meta["dim"], fixture.meta["heads"])
        self.tokens = fixture.meta["tokens_per_image"]

    def __call__(self, x, sees=None, sample=None, bank=None, store=False):
        """[B, N, C] to the same, and the kept tokens."""
        sharing = None if sees is None else Sharing(sees, {self.tokens: sample}, store=store)
        return self.module.apply({"params": self.params}, x, sharing, jnp.bool_(True), bank)

    def jointly(self, queries: np.ndarray, keys: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Attention of tokens [2, T, C] to tokens [2, S, C] under one mask [T, S] of any shape."""

        def run(module: SelfAttention) -> jax.Array:
            query, key, value = module.query(queries), module.key(keys), module.value(keys)
            out = attend(module.split(query), module.split(key), module.split(value), mask=mask[None, None])
            return module.out(rearrange(out, "b t h d -> b t (h d)"))

        return np.asarray(self.module.apply({"params": self.params}, method=run))


def masked(fixture: Fixture) -> dict[str, np.ndarray]:
    """consistent_attention_mask."""
    layer, meta, get = Layer(fixture), fixture.meta, fixture.inputs
    anchors, tokens = meta["id_length"], meta["tokens_per_image"]
    sample = sample_tokens(get["rand_low"].reshape(-1, tokens)[:anchors], meta["sa32"], "mask")
    every = Sample(np.ones((anchors, tokens), bool))
    write, bank = layer(get["x_write"], see_each_other(anchors), sample, store=True)
    whole = rearrange(get["x_write"], "(f a) n c -> f (a n) c", f=2)
    stored = np.concatenate([whole, get["x_read"]], axis=1)
    reads = np.ones((1, 1, anchors), bool)
    return {
        "write_masked": np.asarray(write),
        "write_masked_arbitrary": rearrange(
            layer.jointly(whole, whole, get["mask_arbitrary"]), "f (a n) c -> (f a) n c", a=anchors
        ),
        "read_masked": np.asarray(layer(get["x_read"], reads, sample, bank)[0]),
        "read_masked_arbitrary": layer.jointly(get["x_read"], stored, get["mask_read_arbitrary"]),
        "write_plain": np.asarray(layer(get["x_write"])[0]),
        "read_plain": np.asarray(layer(get["x_read"])[0]),
        "read_unmasked_bank": np.asarray(layer(get["x_read"], reads, every, bank)[0]),
    }


def index_sample(lists: list[np.ndarray]) -> Sample:
    """Lists of kept tokens, padded to the longest."""
    longest = max(1, max(map(len, lists)))
    index = np.array([np.pad(row, (0, longest - len(row))) for row in lists], np.int32)
    return Sample(np.array([np.arange(longest) < len(row) for row in lists]), index)


def gathered(fixture: Fixture) -> dict[str, np.ndarray]:
    """consistent_attention_index."""
    layer, meta, get = Layer(fixture), fixture.meta, fixture.inputs
    anchors = meta["id_length"]
    first, second = (index_sample(fixture.numbered(f"{name}/")[:anchors]) for name in ("index", "index_b"))
    drawn = sample_tokens(get["rand_low"], meta["sa32"], "bernoulli")
    for row in range(anchors):
        np.testing.assert_array_equal(drawn.index[row][drawn.valid[row]], get[f"index/{row}"])
    write, bank = layer(get["x_write"], see_each_other(anchors), first, store=True)
    write_b, bank_b = layer(get["x_write_b"], see_each_other(anchors), second, store=True)
    longest = max(bank.shape[2], bank_b.shape[2])

    def pad(x: np.ndarray) -> np.ndarray:
        return np.pad(np.asarray(x), [(0, longest - x.shape[i]) if i == x.ndim - 2 else (0, 0) for i in range(x.ndim)])

    both = np.concatenate([pad(bank), pad(bank_b)], axis=1)
    valid = np.concatenate([np.pad(s.valid, ((0, 0), (0, longest - s.valid.shape[1]))) for s in (first, second)])
    sees = np.ones((1, 1, anchors), bool)
    two = Sample(valid, np.zeros_like(valid, np.int32))
    results = {
        "write": np.asarray(write),
        "write_b": np.asarray(write_b),
        "write_plain_step0": np.asarray(layer(get["x_write"])[0]),
        "read": np.asarray(layer(get["x_read"], sees, first, bank)[0]),
        "read_two_characters": np.asarray(layer(get["x_read"], np.ones((1, 1, 2 * anchors), bool), two, both)[0]),
    }
    for row in range(anchors):
        results[f"bank/{row}"] = np.asarray(bank[:, row])[:, first.valid[row]]
    return results


def reference_mask(draws: np.ndarray, anchors: int, rate: float) -> np.ndarray:
    """The boolean mask [T * N, T * N] of the reference, built from our visibility rules."""
    images, tokens = draws.shape
    shown = sample_tokens(draws, rate, "mask").valid
    rows = np.zeros((images, images, tokens), bool)
    rows[:, :anchors] = shown[:anchors]
    rows[np.arange(images), np.arange(images)] = True
    return np.repeat(rows.reshape(images, -1), tokens, axis=0)


def rules(fixture: Fixture) -> dict[str, np.ndarray]:
    """mask_rules."""
    meta, get = fixture.meta, fixture.inputs
    images, anchors = meta["total_length"], meta["id_length"]
    results: dict[str, np.ndarray] = {}
    for grid, rate in (("low", meta["sa32"]), ("high", meta["sa64"])):
        results[f"mask_{grid}"] = reference_mask(get[f"mask_rand_{grid}"].reshape(images, -1), anchors, rate)
        sample = sample_tokens(get[f"index_rand_{grid}"], rate, "bernoulli")
        for number in range(len(sample.valid)):
            results[f"index_{grid}/{number}"] = sample.index[number][sample.valid[number]]
    for name in get:
        if name.startswith("sd15_rand_"):
            draws = get[name].reshape(images, -1)
            results[name.replace("rand", "mask")] = reference_mask(draws, anchors, 0.5)
    for name in fixture.expected:
        if name.startswith("branch/"):
            _, app, kind = name.split("/")
            results[name] = np.array(
                [
                    [attention_path(SCHEDULES[app], kind == "read", int(s), float(u)) for u in get["branch_draws"]]
                    for s in get["branch_steps"]
                ]
            )
    return results
