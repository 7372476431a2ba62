"""`PerSite`: gates that differ from site to site only, so that what q, k and v do to their input is done once."""

import dataclasses
from typing import Any

import jax

from teal_jax.config import SITE_OF_PROJECTION

FIRST_OF_SITE = tuple(SITE_OF_PROJECTION.index(site) for site in SITE_OF_PROJECTION)
"""By projection the first one that reads the same site."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerSite:
    """A model's gates, of which those of a site are equal: whoever makes it has seen that.

    A layer's seven gates are then four, given several times: equal operations on equal arguments, which XLA does once.
    It could not know that of seven counts in one array.

    Attributes:
      gate: of a model.
    """

    gate: Any

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        layer = self.gate[index]
        made = {first: layer[first] for first in set(FIRST_OF_SITE)}
        return tuple(made[first] for first in FIRST_OF_SITE)

    def on(self, where: jax.Array) -> "PerSite":
        """The same gates, acting only on the tokens where `where` (bool `[batch, seq]`) is True."""
        return PerSite(self.gate.on(where))
