"""Fixed grids fitted to a network: where an adaptive solver would step, and better.

One adaptive run shows where along the log-SNR steps are needed. A few numbers then reshape that density so that UniPC
with exactly ``nfe`` evaluations ends as close as it can to tightly solved trajectories. Nothing is rejected, and every
solve takes the same evaluations: on mixtures about a third of RK45's at equal error (docs/performance.md). Choosing the
times for the network: Sabour, Fidler, Kreis 2024, arXiv 2404.14507; Xue et al. 2024, arXiv 2402.17376.
"""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import noise
from .checks import check_eps, check_shape
from .flow import ProbabilityFlow
from .integrate import solve
from .integrate.multistep import Flow, grid_tables
from .models import utils as mutils
from .sde_lib import SDE, AffineSDE

KNOTS = 6  # of the density's logarithm; ten do no better
MANY = 24  # steps whose density serves all numbers of steps nearly as well as their own
LOOSE = 3e-3  # tolerance of the run that gives the density: the coarse steps that few evaluations mean


@dataclass(frozen=True)
class Grid:
    """Times for UniPC, made by :func:`calibrate_grid` for one SDE; to be handed to ``get_ode_sampler(grid=...)``.

    Attributes:
        sde: name of the SDE's class.
        times: ``nfe + 1`` times from T to eps.
        log_snr: the SDE's log-SNR at these times, by which it is recognised.
        order: of UniPC.
        rms: root mean square error of the calibration samples, over all their elements.
        rms_held_out: the same of as many others.
    """

    sde: str
    times: tuple[float, ...]
    log_snr: tuple[float, ...]
    order: int
    rms: float
    rms_held_out: float

    @property
    def nfe(self) -> int:
        """Evaluations of the network that a solve takes."""
        return len(self.times) - 1

    def check(self, sde: SDE) -> None:
        """ValueError where the grid was made for another SDE."""
        found = [sde.log_snr(t) for t in self.times] if isinstance(sde, AffineSDE) else []
        if len(found) != len(self.log_snr) or max(abs(a - b) for a, b in zip(found, self.log_snr, strict=True)) > 1e-6:
            ends = f"log-SNR {found[0]:.4g} to {found[-1]:.4g}" if found else "not affine"
            raise ValueError(
                f"grid: expected the SDE it was calibrated for, {self.sde} with log-SNR {self.log_snr[0]:.4g} to "
                f"{self.log_snr[-1]:.4g}, got {type(sde).__name__}, {ends} at the same times. Calibrate another."
            )

    def tables(self, flow: Flow) -> Tensor:
        """The matrices of the steps, see :func:`scoresde_ext.integrate.multistep.grid_tables`."""
        self.check(flow.sde)
        return grid_tables(flow, self.times, self.order, "unipc")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON: to another name first, so that no half-written file is ever found under this one."""
        path = Path(path)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
            json.dump({"format": "scoresde_ext grid 1", **asdict(self)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)

    @staticmethod
    def load(path: str | os.PathLike[str], sde: SDE | None = None) -> Grid:
        """Reads what :meth:`save` wrote; ValueError for anything else, or where it was made for another SDE than the
        one given."""
        try:
            data = json.loads(Path(path).read_text())
            if data.pop("format") != "scoresde_ext grid 1":
                raise ValueError("another format")
            grid = Grid(**{**data, "times": tuple(data["times"]), "log_snr": tuple(data["log_snr"])})
            falls = all(a > b for a, b in zip(grid.times, grid.times[1:], strict=False))
            if (
                not falls
                or len(grid.times) < 2
                or len(grid.times) != len(grid.log_snr)
                or grid.order not in (1, 2, 3, 4)
            ):
                raise ValueError("times or order")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"path: expected a grid written by Grid.save, got {path} ({error}).") from error
        if sde is not None:
            grid.check(sde)
        return grid


def calibrate_grid(
    sde: SDE,
    model: Any,
    shape: Sequence[int],
    *,
    nfe: int,
    order: int = 4,
    eps: float = 1e-3,
    samples: int = 64,
    seed: int = 0,
    device: torch.device | str = "cuda",
    progress: bool = False,
) -> Grid:
    """A grid of ``nfe`` steps of UniPC for this network.

    Costs about ``45 nfe + 150`` evaluations of ``samples`` samples, once for a network and an SDE.

    Args:
        sde: an affine SDE.
        model: network ``model(x, labels)``, trained on continuous times.
        shape: ``(B, *)`` as for the samplers; only the shape of one sample counts.
        nfe: evaluations that a solve with the grid takes, from 5 on.
        order: of UniPC, 1 to 4.
        eps: last time.
        samples: calibration samples; as many others measure the error.
        seed: their prior samples are streams 0, 1, ... of this seed.
        device: where to calibrate.
        progress: a progress bar on a terminal.

    Raises:
        ValueError: an argument is wrong; before any evaluation.
        SolverError: a calibration sample could not be solved.
    """
    shape = check_shape(shape)
    check_eps(eps, sde.T)
    for name, value, least in (("nfe", nfe, 5), ("samples", samples, 2), ("order", order, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected a whole number from {least} on, got {value!r}.")
    if order > 4:
        raise ValueError(f"order: expected 1, 2, 3 or 4, got {order!r}.")
    flow = ProbabilityFlow(sde, mutils.get_score_fn(sde, model, train=False, continuous=True))
    flow.require_affine("calibrate_grid")
    start, end = float(sde.T), float(eps)

    def draw(first: int) -> Tensor:
        with noise.seeds(seed, range(first, first + samples)):
            return noise.prior(sde, (samples, *shape[1:]), device)

    def exact(z: Tensor) -> Tensor:
        return solve(flow, (start, end), z, "unipc", order=4, rtol=1e-6, atol=1e-6).y

    def ends(z: Tensor, times: Sequence[float]) -> Tensor:
        return solve(flow, (start, end), z, "unipc", order=order, grid=times).y

    z, others = draw(0), draw(samples)
    right = exact(z)
    needed = _needed_steps(flow, z, (start, end), order)
    bar = tqdm(desc="Calibrating the grid", disable=None if progress else True, unit="solve")

    def grid_times(knots: np.ndarray, steps: int = nfe) -> list[float]:
        return [start, *_times(flow, needed, knots, steps)[1:-1], end]

    def residual(knots: np.ndarray, steps: int = nfe) -> np.ndarray:
        bar.update()
        error = ends(z, grid_times(knots, steps)) - right
        return error.double().flatten().cpu().numpy() / math.sqrt(max(error.numel(), 1))

    with bar:
        knots = np.zeros(KNOTS)
        if nfe < MANY:  # few steps may send samples astray, which hides where they are needed: begin with more
            knots = _least_squares(functools.partial(residual, steps=MANY), knots)
        times = grid_times(_least_squares(residual, knots))

    def rms(z: Tensor, right: Tensor) -> float:
        return float((ends(z, times) - right).double().square().mean().sqrt())

    return Grid(
        sde=type(sde).__name__,
        times=tuple(times),
        log_snr=tuple(flow.sde.log_snr(t) for t in times),  # type: ignore[attr-defined]
        order=order,
        rms=rms(z, right),
        rms_held_out=rms(others, exact(others)),
    )


def _needed_steps(flow: ProbabilityFlow, z: Tensor, span: tuple[float, float], order: int) -> tuple[Any, Any]:
    """How the need for steps adds up from T on: log-SNR, and the share of all steps before it, both rising. A step that
    an adaptive solver made with error norm e could have been ``e^(-1/(order + 1))`` as long."""
    from scipy.interpolate import PchipInterpolator  # imported here: it takes longer than the rest of the package

    run = solve(flow, span, z, "unipc", order=order, rtol=LOOSE, atol=LOOSE)
    norms = run.error_norms[run.error_norms < 1].numpy()
    log_snr = np.array([flow.sde.log_snr(t) for t in run.times.tolist()])  # type: ignore[attr-defined]
    need = np.cumsum(np.concatenate([[0.0], np.maximum(norms, 1e-6) ** (1.0 / (order + 1))]))
    fine = np.linspace(log_snr[0], log_snr[-1], 4001)
    share = np.maximum.accumulate(PchipInterpolator(log_snr, need / need[-1])(fine))
    return fine, share + np.linspace(0.0, 1e-9, len(fine))


def _times(flow: ProbabilityFlow, needed: tuple[Any, Any], knots: np.ndarray, nfe: int) -> list[float]:
    """``nfe`` steps that share the need evenly, after its density was multiplied by ``exp(knots)``."""
    log_snr, share = needed
    q = np.linspace(0.0, 1.0, 1001)
    density = np.exp(np.interp(q, np.linspace(0.0, 1.0, len(knots)), knots))
    reshaped = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    at = np.interp(np.linspace(0.0, 1.0, nfe + 1), reshaped / reshaped[-1], q)
    sde: Any = flow.sde
    return [sde.time_at(v) for v in np.interp(at, share / share[-1], log_snr).tolist()]


def _least_squares(residual: Callable[[np.ndarray], np.ndarray], x: np.ndarray, rounds: int = 6) -> np.ndarray:
    """The x with the least sum of squares, by Levenberg's and Marquardt's method with difference quotients; it stops
    where a round gains less than 2 %. (scipy's takes several times the evaluations for digits that mean nothing here.)
    """
    r = residual(x)
    damping = 1e-2
    for _ in range(rounds):
        slopes = np.stack([(residual(x + 0.05 * unit) - r) / 0.05 for unit in np.eye(len(x))], 1)
        normal, gradient = slopes.T @ slopes, slopes.T @ r
        diagonal = np.diag(np.diag(normal) + 1e-12 * np.trace(normal))
        for _ in range(4):
            step = -np.linalg.solve(normal + damping * diagonal, gradient)
            step *= min(1.0, 0.7 / np.abs(step).max())
            r_new = residual(x + step)
            if r_new @ r_new < r @ r:
                break
            damping *= 5.0
        else:
            return x
        gain = (r @ r) / (r_new @ r_new)
        x, r, damping = x + step, r_new, max(damping / 5.0, 1e-4)
        if gain < 1.02:
            break
    return x - x.mean()
