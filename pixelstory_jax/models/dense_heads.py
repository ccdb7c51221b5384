"""Linear read-outs of patch features, used only to pretrain a small vision tower on annotated scenes.

Letters: B images, P patches, D width, K classes, c cells per patch side.
"""

from __future__ import annotations

import flax.linen as nn
import jax


class DenseHeads(nn.Module):
    """What each patch shows: a name, which of its cells an object covers, and the box of that object.

    Returns:
      names [B, P, K] logits (class 0 is background), cells [B, P, c * c] logits, boxes [B, P, 4] (x0, y0, x1, y1 in
      canvas units, relative to nothing).
    """

    classes: int
    cells: int = 4

    @nn.compact
    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        features = nn.LayerNorm(name="norm")(features)  # [B, P, D]
        names = nn.Dense(self.classes, name="names")(features)
        cells = nn.Dense(self.cells**2, name="cells")(features)
        boxes = nn.Dense(4, name="boxes")(features)
        return names, cells, boxes
