"""Whether the activations of a site look Gaussian or Laplace, from the calibration's histograms of |x|."""

import dataclasses
import math

import numpy as np

from teal_jax.config import SITES
from teal_jax.sparsity.histogram import bin_edges
from teal_jax.sparsity.statistics import Calibration

DENSITY_BINS = 60
_SHOWN = 0.999
"""Share of the values that a drawn histogram spans."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationFit:
    """One site of one layer under two densities with zero mean, each fitted by maximum likelihood.

    Attributes:
      layer, site: where.
      gaussian_scale: the standard deviation, `sqrt(E x^2)`. laplace_scale: `E |x|`.
      gaussian_loglik, laplace_loglik: mean log-density of a value, nats.
      gaussian_ks, laplace_ks: largest distance between the distribution functions of |x|.
      limit: the drawn histogram spans |x| in [0, limit].
      density: of |x| over that, `[DENSITY_BINS]`, equal bins.
    """

    layer: int
    site: str
    gaussian_scale: float
    laplace_scale: float
    gaussian_loglik: float
    laplace_loglik: float
    gaussian_ks: float
    laplace_ks: float
    limit: float
    density: list[float]

    @property
    def better(self) -> str:
        """The density of the higher likelihood."""
        return "gaussian" if self.gaussian_loglik > self.laplace_loglik else "laplace"


def fit_sites(calibration: Calibration) -> list[ActivationFit]:
    """A fit of every layer and site, in order; sites where nothing but 0 was counted are left out."""
    fits = []
    for layer, row in enumerate(calibration.counts):
        fits += [fit_site(layer, site, counts) for site, counts in zip(SITES, row, strict=True) if counts[1:].any()]
    return fits


def fit_site(layer: int, site: str, counts: np.ndarray) -> ActivationFit:
    """Both densities fitted to a histogram of |x|, int64 `[NUM_BINS]`.

    Gaussian: `log f = -log s - log(2 pi) / 2 - x^2 / (2 s^2)`, at the best s on average `-log s - (1 + log 2 pi) / 2`;
    Laplace: `log f = -log(2 b) - |x| / b`, at the best b `-log(2 b) - 1`. Values are taken at the middle of their bin,
    0.4 % wide.

    Raises:
      ValueError: every value is 0.
    """
    edges = bin_edges()
    edges = edges[np.isfinite(edges)].astype(np.float64)
    upper = edges[1:]
    counts = counts[: len(upper)].astype(np.float64)
    total, middle = counts.sum(), (edges[:-1] + upper) / 2
    middle[0] = 0.0  # of the values in the lowest bin
    scale = math.sqrt(counts @ middle**2 / total)
    breadth = float(counts @ middle / total)
    if scale == 0 or breadth == 0:
        raise ValueError(f"every activation of layer {layer} {site} is 0: there is nothing to fit")
    below = np.cumsum(counts) / total
    used = counts > 0
    normal = np.array([math.erf(x) for x in upper[used] / (scale * math.sqrt(2))])
    laplace = -np.expm1(-upper[used] / breadth)
    limit = float(upper[np.searchsorted(below, _SHOWN)])
    grid = np.linspace(0, limit, DENSITY_BINS + 1)
    # Shares by interpolation within a bin: its width is a tenth of a drawn bin's, which would show as noise.
    shares = np.diff(np.interp(grid, np.append(0, upper), np.append(0, below)))
    return ActivationFit(
        layer=layer,
        site=site,
        gaussian_scale=scale,
        laplace_scale=breadth,
        gaussian_loglik=-math.log(scale) - (1 + math.log(2 * math.pi)) / 2,
        laplace_loglik=-math.log(2 * breadth) - 1,
        gaussian_ks=float(np.abs(normal - below[used]).max()),
        laplace_ks=float(np.abs(laplace - below[used]).max()),
        limit=limit,
        density=[float(f"{value:.4g}") for value in shares / (limit / DENSITY_BINS)],
    )
