# SPDX-License-Identifier: Apache-2.0
"""Least-squares fits of a trend mu exp(sigma x), x = i / N, to average attention per place."""

from __future__ import annotations

import numpy as np

from ...errors import InvariantError, SpecError


def fit_log_linear(mean: np.ndarray) -> tuple[float, float]:
    """(mu, sigma): least squares of log(mean), mean (N,) average attention per place."""
    if mean.ndim != 1 or len(mean) < 2 or not (np.isfinite(mean).all() and (mean > 0).all()):
        raise SpecError(
            f"cannot fit a trend to average attention {mean!r}; expected two or more finite numbers above "
            "zero"
        )
    # log(mu exp(sigma x)) is a line: sigma its slope, log mu its level
    sigma, level = np.polyfit(np.arange(len(mean)) / len(mean), np.log(mean), 1)
    return float(np.exp(level)), float(sigma)


def fit_exponential(mean: np.ndarray, steps: int = 100) -> tuple[float, float]:
    """(mu, sigma): least squares of mean (N,) itself, by damped Gauss-Newton from the log-linear fit."""
    x = np.arange(len(mean)) / len(mean)
    start, sigma = fit_log_linear(mean)
    scale = mean.mean()  # so that both unknowns are of the order of one
    point = np.array([start / scale, sigma])

    def residual(at: np.ndarray) -> np.ndarray:
        return mean / scale - at[0] * np.exp(at[1] * x)

    for _ in range(steps):
        curve = np.exp(point[1] * x)
        # the columns are derivatives of the curve by mu and by sigma
        step = np.linalg.lstsq(np.stack([curve, point[0] * x * curve], 1), residual(point), rcond=None)[0]
        error = np.square(residual(point)).sum()
        # a whole step may overshoot: it is halved until the error falls
        while np.square(residual(point + step)).sum() > error and np.abs(step).max() > 1e-12:
            step = step / 2
        point = point + step
        if np.abs(step).max() <= 1e-12:
            return float(point[0] * scale), float(point[1])
    raise InvariantError(
        f"the fit of an exponential did not settle in {steps} steps; is there a trend in {mean!r}?"
    )
