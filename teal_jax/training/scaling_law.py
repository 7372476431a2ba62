"""The scaling law of sparse models: loss over parameters and sparsity, and the sparsity that it makes best."""

import dataclasses
from typing import Any

import numpy as np

from teal_jax.errors import DataError

_PARAMETERS = 5
_GRID = np.linspace(0, 0.99, 1981)


@dataclasses.dataclass(frozen=True)
class ScalingLaw:
    """`L(N, S) = E + A(S) / N ** alpha` with `A(S) = B + C exp(beta / (1 - S))`.

    Attributes:
      e: loss that no model size removes, nats.
      b, c, beta: of A, all >= 0; N in units of `unit` parameters.
      alpha: exponent of N, > 0.
      unit: parameters.

    References:
      Q-Sparse, arXiv 2407.10969, its scaling laws.
    """

    e: float
    b: float
    c: float
    alpha: float
    beta: float
    unit: float

    def loss(self, parameters: Any, sparsity: Any) -> np.ndarray:
        """L of models of so many parameters, at sparsities in [0, 1); broadcast."""
        size = np.asarray(parameters, float) / self.unit
        return self.e + self.scale(sparsity) * size**-self.alpha

    def scale(self, sparsity: Any) -> np.ndarray:
        """A(S)."""
        return self.b + self.c * np.exp(self.beta / (1 - np.asarray(sparsity, float)))

    def optimal_sparsity(self) -> float:
        """The S in [0, 0.99] of least loss for a fixed number of active parameters `(1 - S) N`; 0.99: none below.

        `N = N_active / (1 - S)`, so that it minimises `A(S) (1 - S) ** alpha`, whatever N_active.
        """
        with np.errstate(divide="ignore"):
            log_b, log_c = np.log([self.b, self.c])
        log_scale = np.logaddexp(log_b, log_c + self.beta / (1 - _GRID))
        return float(_GRID[np.argmin(log_scale + self.alpha * np.log1p(-_GRID))])


def fit_scaling_law(parameters: Any, sparsity: Any, loss: Any) -> ScalingLaw:
    """The law of least squared error; E, B and C follow from alpha and beta by non-negative least squares.

    Args:
      parameters, sparsity, loss: of each model, `[n]`, n > 5, of at least two sizes and three sparsities.

    Raises:
      DataError: fewer.
    """
    from scipy.optimize import minimize, nnls

    size, share, loss = (np.asarray(values, float) for values in (parameters, sparsity, loss))
    if len(loss) <= _PARAMETERS or len(np.unique(size)) < 2 or len(np.unique(share)) < 3:
        raise DataError(
            f"a scaling law needs more than {_PARAMETERS} models of at least two sizes and three sparsities, got "
            f"{len(loss)} of {len(np.unique(size))} and {len(np.unique(share))}",
            hint="train more of the grid",
        )
    unit = float(np.exp(np.log(size).mean()))
    top = 1 / (1 - share.max())

    def solve(point: Any) -> tuple[np.ndarray, float]:
        """E, B and C (that in units of its largest column), and the error."""
        alpha, beta = np.exp(point)
        fall = (size / unit) ** -alpha
        columns = np.stack([np.ones_like(fall), fall, fall * np.exp(beta * (1 / (1 - share) - top))], axis=1)
        return nnls(columns, loss)

    starts = [np.log([a, b]) for a in (0.05, 0.15, 0.4, 1.0) for b in (0.05, 0.2, 0.6, 1.5, 4.0)]
    best = sorted(starts, key=lambda point: solve(point)[1])[:3]
    bounds = [tuple(np.log([0.01, 3.0])), tuple(np.log([0.01, 20.0]))]
    found = [minimize(lambda p: solve(p)[1], point, method="Nelder-Mead", bounds=bounds) for point in best]
    point = min(found, key=lambda result: result.fun).x
    (e, b, c), (alpha, beta) = solve(point)[0], np.exp(point)
    return ScalingLaw(float(e), float(b), float(c * np.exp(-beta * top)), float(alpha), float(beta), unit)


def bootstrap_laws(
    law: ScalingLaw, parameters: Any, sparsity: Any, loss: Any, *, samples: int = 200, seed: int = 0
) -> list[ScalingLaw]:
    """Laws fitted to the losses of `law` with its own residuals drawn again, wider by the parameters that it fitted."""
    generator = np.random.default_rng(seed)
    expected = law.loss(parameters, sparsity)
    residuals = (np.asarray(loss, float) - expected) * np.sqrt(len(expected) / (len(expected) - _PARAMETERS))
    drawn = generator.choice(residuals, (samples, len(residuals)))
    return [fit_scaling_law(parameters, sparsity, expected + row) for row in drawn]
