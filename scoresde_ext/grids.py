"""Fixed grids for a network: where an adaptive solver would step, with coefficients fitted to what it finds.

One adaptive run shows where along the log-SNR steps are needed, another gives the states of some samples at the times
so chosen. A step of a multistep method is a linear combination of arrays that are at hand: its coefficients are then
those that take these samples nearest to where they should be. Theory's coefficients are right for every D that is a
polynomial; fitted ones for what this network does to this data, and the steps can be several times as long
(docs/performance.md). Nothing is rejected, and every solve takes the same evaluations.

Times chosen for the network: Sabour, Fidler, Kreis 2024, arXiv 2404.14507. Coefficients of each step fitted to
trajectories, by gradient descent: Shaul et al. 2024, arXiv 2403.01329.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import noise, ops
from .callers import untraced
from .checks import check_choice, check_device, check_eps, check_flags, check_shape, whole
from .flow import ProbabilityFlow
from .foreign import recognised
from .integrate import solve
from .integrate.multistep import Flow, grid_points, grid_tables, with_values
from .models.program import score_function
from .ode import precision_floor
from .sde_lib import SDE, is_affine
from .utils import whole_file

LOOSE = 1e-3  # tolerance of the run that shows where steps are needed
TIGHT = 1e-6  # and of the one that is fitted to
RIDGE = 1e-10  # share of a direction's variance among the samples below which theory decides about it
COEFFICIENTS = ("auto", "theory", "fitted")


@dataclass(frozen=True)
class Grid:
    """Steps of UniPC, made by :func:`calibrate_grid` for one SDE; to be handed to ``get_ode_sampler(grid=...)``.

    Attributes:
        sde: name of the SDE's class.
        times: ``nfe + 1`` times from T to eps.
        log_snr: the SDE's log-SNR at these times, by which it is recognised.
        order: of UniPC.
        fitted: for each step the coefficients of ``[x_{i-1}, x_i, out_i, D_{i-1}, ..., D_{i-order}]`` that give
            ``x_{i+1}``; None: those of theory.
        rms: root mean square error of the calibration samples, over all their elements.
        rms_held_out, median_held_out: the same of as many others, and of the median one among them. (A sample that
            starts near the border between two modes may end in the other one, and then makes up all of the first.)
    """

    sde: str
    times: tuple[float, ...]
    log_snr: tuple[float, ...]
    order: int
    fitted: tuple[tuple[float, ...], ...] | None
    rms: float
    rms_held_out: float
    median_held_out: float

    @property
    def nfe(self) -> int:
        """Evaluations of the network that a solve takes."""
        return len(self.times) - 1

    def check(self, sde: SDE) -> None:
        """ValueError where the grid was made for another SDE."""
        sde = recognised(sde)
        found: Any = sde.log_snr(torch.tensor(self.times, dtype=torch.float64)) if is_affine(sde) else None
        if found is None or np.abs(found.numpy() - self.log_snr).max() > 1e-6:
            ends = "not affine" if found is None else f"log-SNR {found[0]:.4g} to {found[-1]:.4g}"
            raise ValueError(
                f"grid: expected the SDE it was calibrated for, {self.sde} with log-SNR {self.log_snr[0]:.4g} to "
                f"{self.log_snr[-1]:.4g}, got {type(sde).__name__}, {ends} at the same times. Calibrate another."
            )

    def tables(self, flow: Flow) -> tuple[Tensor, bool]:
        """The matrices of the steps, see :class:`scoresde_ext.integrate.multistep.FixedGrid`."""
        self.check(flow.sde)
        if self.fitted is None:
            return grid_tables(flow, self.times, self.order, "unipc"), False
        rows = np.roll(np.array(self.fitted), -1, axis=1)  # x_{i-1} comes last
        return with_values(grid_points(flow, self.times), rows), True

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, as a :func:`scoresde_ext.utils.whole_file`."""
        with whole_file(path) as file:
            file.write(json.dumps({"format": "scoresde_ext grid 1", **asdict(self)}, indent=1).encode())

    @staticmethod
    def load(path: str | os.PathLike[str], sde: SDE | None = None) -> Grid:
        """Reads what :meth:`save` wrote; ValueError for anything else, or where it was made for another SDE than the
        one given."""
        try:
            data = json.loads(Path(path).read_text())
            if data.pop("format") != "scoresde_ext grid 1":
                raise ValueError("another format")
            for name in ("times", "log_snr"):
                data[name] = tuple(map(float, data[name]))
            if data["fitted"] is not None:
                data["fitted"] = tuple(tuple(map(float, row)) for row in data["fitted"])
            grid = Grid(**data)
            falls = all(a > b for a, b in zip(grid.times, grid.times[1:], strict=False))
            if not falls or not len(grid.log_snr) == len(grid.times) > 1 or grid.order not in (1, 2, 3, 4):
                raise ValueError("times or order")
            if grid.fitted is not None and [len(row) for row in grid.fitted] != [3 + grid.order] * grid.nfe:
                raise ValueError("fitted coefficients")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"path: expected a grid written by Grid.save, got {path} ({error}).") from error
        if sde is not None:
            grid.check(sde)
        return grid


@untraced
def calibrate_grid(
    sde: SDE,
    model: Any,
    shape: Sequence[int],
    *,
    nfe: int,
    order: int = 3,
    eps: float = 1e-3,
    samples: int = 64,
    seed: int = 0,
    device: torch.device | str = "cuda",
    coefficients: str = "auto",
    progress: bool = False,
) -> Grid:
    """A grid of ``nfe`` steps of UniPC for this network.

    Costs about ``300 + 5 nfe`` evaluations of ``samples`` samples, once for a network and an SDE.

    Args:
        sde: an affine SDE.
        model: network ``model(x, labels)``, trained on continuous times.
        shape: ``(B, *)`` as for the samplers; only the shape of one sample counts.
        nfe: evaluations that a solve with the grid takes.
        order: of UniPC, 1 to 4: how many past evaluations a step uses.
        eps: last time.
        samples: calibration samples; as many others measure the error.
        seed: their prior samples are streams 0, 1, ... of this seed.
        device: where to calibrate.
        coefficients: of the steps: ``theory``; ``fitted`` to the calibration samples, by least squares; ``auto``: what
            has the smaller median error on the other samples (fitted, unless there are very many steps).
        progress: progress bars on a terminal.

    Raises:
        ValueError: an argument is wrong; before any evaluation.
        SolverError: a calibration sample could not be solved.
    """
    recognised(sde)
    shape, device, eps = check_shape(shape), check_device(device), check_eps(eps, sde.T)
    nfe, samples, order = whole("nfe", nfe, 1), whole("samples", samples, 2), whole("order", order, 1, 4)
    check_choice("coefficients", coefficients, COEFFICIENTS)
    check_flags(progress=progress)
    flow = ProbabilityFlow(sde, score_function(sde, model, False, True))
    flow.require_affine("calibrate_grid")
    span = (float(sde.T), float(eps))

    def draw(first: int) -> Tensor:
        with noise.seeds(seed, range(first, first + samples)):
            return noise.prior(sde, (samples, *shape[1:]), device)

    z, others = draw(0), draw(samples)
    floor, _ = precision_floor(flow, z.device, z.dtype)
    loose, tight = max(LOOSE, floor), max(TIGHT, floor)
    times = _times(flow, z, span, order, nfe, loose)
    adaptive: dict[str, Any] = {"method": "unipc", "order": 4, "rtol": tight, "atol": tight, "progress": progress}
    states = solve(flow, span, z, t_eval=times, **adaptive).ys
    others_end = solve(flow, span, others, **adaptive).y

    def made(fitted: Tensor | None) -> Grid:
        grid = Grid(
            sde=type(sde).__name__,
            times=tuple(times),
            log_snr=tuple(flow.sde.log_snr(t) for t in times),  # type: ignore[attr-defined]
            order=order,
            fitted=None if fitted is None else tuple(map(tuple, fitted.tolist())),
            rms=math.nan,
            rms_held_out=math.nan,
            median_held_out=math.nan,
        )

        def errors(z: Tensor, right: Tensor) -> Tensor:
            error = solve(flow, span, z, "unipc", grid=grid, on_failure="status").y - right
            return error.double().square().flatten(1).mean(1).sqrt()

        own, held_out = errors(z, states[-1]), errors(others, others_end)
        return replace(
            grid,
            rms=own.square().mean().sqrt().item(),
            rms_held_out=held_out.square().mean().sqrt().item(),
            median_held_out=held_out.median().item(),
        )

    grids = []
    if coefficients != "theory":
        grids.append(made(_fitted(flow, times, order, states)))
    if coefficients != "fitted":
        grids.append(made(None))
    return min(grids, key=lambda grid: (math.isnan(grid.median_held_out), grid.median_held_out))


def _times(
    flow: ProbabilityFlow, z: Tensor, span: tuple[float, float], order: int, nfe: int, tolerance: float
) -> list[float]:
    """Times between which steps are equally needed. A step that an adaptive solver made with error norm e could have
    been ``e^(-1/(order + 1))`` as long."""
    from scipy.interpolate import PchipInterpolator  # imported here: it takes longer than the rest of the package

    sde: Any = flow.sde
    run = solve(flow, span, z, "unipc", order=order, rtol=tolerance, atol=tolerance)
    norms = run.error_norms[run.error_norms < 1].numpy()
    log_snr = np.array([sde.log_snr(t) for t in run.times.tolist()])
    need = np.cumsum(np.concatenate([[0.0], np.maximum(norms, 1e-6) ** (1.0 / (order + 1))]))
    fine = np.linspace(log_snr[0], log_snr[-1], 4001)
    share = np.maximum.accumulate(PchipInterpolator(log_snr, need / need[-1])(fine)) + np.linspace(0.0, 1e-9, 4001)
    inner = np.interp(np.linspace(0.0, share[-1], nfe + 1)[1:-1], share, fine)
    return [span[0], *(sde.time_at(v) for v in inner.tolist()), span[1]]


def _fitted(flow: ProbabilityFlow, times: Sequence[float], order: int, states: Tensor) -> Tensor:
    """``(nfe, 3 + order)``: the coefficients of each step. ``states``: ``(nfe + 1, B, *)``, where the samples should
    be. Step by step, from where the samples are after the steps already fitted: what went wrong there is mended here.
    """
    before = x = states[0]
    past = [torch.zeros_like(x)] * order
    fitted = []
    with torch.no_grad():
        for i, table in enumerate(grid_tables(flow, times, order, "unipc")):
            out = flow.network(x, times[i])
            (value,) = ops.combine([x, out], table[:1, :2].to(x.device))
            a, b = table[0, :2]  # D = a x + b out
            # x and out hardly differ at large times: D in the place of out is the better basis.
            theory = torch.cat([torch.zeros_like(a)[None], table[1]])
            theory[1], theory[2] = theory[1] - theory[2] * a / b, theory[2] / b
            known = [i > 0, True, True, *(j < i for j in range(order))]
            row = torch.zeros_like(theory)
            arrays = [v for v, there in zip([before, x, value, *past], known, strict=True) if there]
            row[known] = _least_squares(arrays, states[i + 1], theory[known])
            row[1], row[2] = row[1] + row[2] * a, row[2] * b
            fitted.append(row)
            (after,) = ops.combine([before, x, out, *past], row[None].to(x.device))
            before, x, past = x, after, [value, *past[:-1]]
    return torch.stack(fitted)


def _least_squares(arrays: Sequence[Tensor], wanted: Tensor, theory: Tensor) -> Tensor:
    """The coefficients c with ``sum_k c_k arrays_k`` nearest to ``wanted``; those of theory in directions that the
    arrays hardly have."""
    columns = torch.stack([v.double().flatten() for v in arrays], 1).cpu()
    missing = wanted.double().flatten().cpu() - columns @ theory
    sizes = columns.square().sum(0).sqrt().clamp(min=1e-300)
    columns = columns / sizes
    normal = columns.T @ columns + RIDGE * torch.eye(len(theory), dtype=torch.float64)
    return theory + torch.linalg.solve(normal, columns.T @ missing) / sizes
