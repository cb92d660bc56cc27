"""The pictures of ``benchmarks.solvers``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from .report import Found, unique
from .work_precision import line

# Okabe and Ito's colours, which all eyes tell apart; each curve has a marker of its own as well.
STYLES: dict[str, tuple[str, str, str]] = {  # solver: colour, marker, label
    "scipy RK45": ("#000000", "o", "scipy RK45 (upstream)"),
    "torchdiffeq dopri5": ("#E69F00", "v", "torchdiffeq dopri5"),
    "torchode dopri5": ("#CC79A7", "^", "torchode dopri5"),
    "RK45 in the angle": ("#56B4E9", "s", "RK45 in the angle"),
    "UniPC-4 adaptive": ("#0072B2", "D", "UniPC-4 adaptive"),
    "DPM-Solver++(2M), Karras grid": ("#8C8C8C", "x", "DPM-Solver++(2M), Karras grid"),
    "UniPC-3 calibrated, theory": ("#009E73", "P", "UniPC-3 calibrated"),
    "UniPC-3 calibrated, fitted": ("#D55E00", "*", "UniPC-3 calibrated, fitted"),
}
TICKS = (5, 10, 20, 50, 100, 200)


def work_precision(path: Path, found: Found, targets: Sequence[float]) -> None:
    """Error against evaluations on logarithmic axes: a row of panels for each problem, a column for each SDE."""
    problems, sdes = unique(p for p, _, _ in found), unique(s for _, s, _ in found)
    figure, axes = plt.subplots(
        len(problems), len(sdes), figsize=(1 + 3.6 * len(sdes), 1 + 2.9 * len(problems)), sharex=True, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for row, problem in zip(axes, problems, strict=True):
        for ax, sde in zip(row, sdes, strict=True):
            for solver, (color, marker, label) in STYLES.items():
                if curve := found.get((problem, sde, solver)):
                    ax.plot(*zip(*line(curve), strict=True), color=color, marker=marker, ms=4, lw=1.2, label=label)
            for target in targets:
                ax.axhline(target, color="0.75", lw=0.8, zorder=0)
            ax.set_title(f"{problem}, {sde}", fontsize=10)
            _log_axes(ax)
    for ax in axes[-1]:
        ax.set_xlabel("evaluations of the network")
    for ax in axes[:, 0]:
        ax.set_ylabel("RMS error")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _log_axes(ax: Any) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(4.5, 220)
    ax.set_ylim(2e-5, 1)
    ax.xaxis.set_major_locator(FixedLocator(TICKS))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelbottom=True, labelleft=True, labelsize=8)


def spread(path: Path, found: Found, target: float) -> None:
    """Histograms of the evaluations of single samples, for the runs whose RMS error is nearest to ``target``."""
    solvers = [solver for solver in unique(s for _, _, s in found) if solver.endswith("per sample")]
    first_sde = next(iter(found))[1]
    problems = unique((p, s) for p, s, _ in found if s == first_sde)[-2:]
    figure, axes = plt.subplots(
        len(solvers), len(problems), figsize=(1 + 4 * len(problems), 0.6 + 2.2 * len(solvers)), squeeze=False,
        sharex="col", layout="constrained",
    )  # fmt: skip
    for row, solver in zip(axes, solvers, strict=True):
        for ax, (problem, sde) in zip(row, problems, strict=True):
            point = min(found[problem, sde, solver], key=lambda p: abs(math.log(p.rms / target)))
            low, high = int(point.each.min()), int(point.each.max())
            ax.hist(point.each, bins=[i - 0.5 for i in range(low, high + 2)], color="#56B4E9")
            ax.axvline(point.evaluations, color="#000000", lw=1.5)
            ax.axvline(point.calls, color="#D55E00", lw=1.5, ls="--")
            ax.set_title(
                f"{problem}, {sde}: {solver.removesuffix(', per sample')}, RMS error {point.rms:.1e}\n"
                f"mean {point.evaluations:.1f} (solid), slowest {point.calls} (dashed): "
                f"{point.calls / point.evaluations:.2f} times the mean",
                fontsize=8,
            )
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(labelbottom=True, labelsize=8)
            ax.set_ylabel(f"samples, of {len(point.each)}")
    for ax in axes[-1]:
        ax.set_xlabel("evaluations of the network for a sample")
    figure.savefig(path, dpi=110)
    plt.close(figure)
