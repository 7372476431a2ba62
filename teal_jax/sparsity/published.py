"""Plans from the files that TEAL's authors published, under the reference's rules."""

from pathlib import Path

import numpy as np

from converters import teal_published
from teal_jax.config import PROJECTIONS, SITE_OF_PROJECTION, ModelConfig
from teal_jax.errors import PlanError
from teal_jax.sparsity.parity import SignedHistogram
from teal_jax.sparsity.plan import SparsityPlan, check_sparsity


def import_plan(
    config: ModelConfig,
    sparsity: float,
    *,
    histograms: str | Path,
    lookup: str | Path | None = None,
    model: str = "model",
) -> SparsityPlan:
    """A plan from published histograms, and from a published greedy path where one is given.

    Thresholds are the reference's, `icdf(0.5 + s / 2)` of the signed histogram; per layer the path's row nearest
    to the target is taken, as the reference takes it.

    Args:
      config: of the model the plan is for.
      sparsity: target model sparsity in [0, 1).
      histograms: a model's published folder, or its `histograms/`.
      lookup: a model's published folder, or its `lookup/`; None allocates uniformly.
      model: name of the model, for the plan.

    Raises:
      CheckpointError: files that are missing or broken, or histograms whose widths do not fit the model.
      PlanError: a path of another number of layers.
    """
    target = check_sparsity(sparsity)
    layers = teal_published.read_histograms(histograms)
    teal_published.check_widths(config, layers)
    shares = np.full((config.num_layers, len(PROJECTIONS)), target)
    if lookup is not None:
        tables = teal_published.read_lookup(lookup)
        if len(tables) != config.num_layers:
            raise PlanError(f"the published greedy path has {len(tables)} layers, the model {config.num_layers}")
        shares = np.stack([table[np.abs(table[:, 0] - target).argmin(), 3:] for table in tables])
    signed = [[SignedHistogram(site.counts, site.centers) for site in layer] for layer in layers]
    thresholds = [
        [signed[layer][site].threshold(shares[layer, i]) for i, site in enumerate(SITE_OF_PROJECTION)]
        for layer in range(config.num_layers)
    ]
    return SparsityPlan(
        sparsity=shares,
        thresholds=np.array(thresholds),
        target=target,
        method="uniform" if lookup is None else "greedy",
        fingerprint=config.fingerprint,
        projection_sizes=config.projection_sizes,
        model=model,
        notes={"source": "TEAL's published files (arXiv 2408.14690)", "threshold_rule": "signed"},
    )
