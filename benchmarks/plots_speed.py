"""The pictures of ``python -m benchmarks``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .cases import CASES, COPY, EAGER, OURS, Measured
from .digits import FITTED, K_DIFFUSION, Timed
from .work_precision import line

# Okabe and Ito's colours, which all eyes tell apart.
COLOURS = {
    OURS: "#0072B2",
    EAGER: "#000000",
    "torch.compile": "#009E73",
    "scipy RK45": "#000000",
    "scipy, two network runs": "#000000",
    "k-diffusion loop": "#000000",
    "torchdiffeq dopri5": "#E69F00",
    "torchode dopri5": "#CC79A7",
    COPY: "#8C8C8C",
}
SAMPLER_STYLES = {  # sampler: colour, marker, label
    "scipy RK45": ("#000000", "o", "scipy RK45 (upstream)"),
    "torchdiffeq dopri5": ("#E69F00", "v", "torchdiffeq dopri5"),
    "torchode dopri5": ("#CC79A7", "^", "torchode dopri5"),
    K_DIFFUSION: ("#8C8C8C", "x", "k-diffusion loop, DPM-Solver++(2M)"),
    "RK45 in t": ("#56B4E9", "s", "scoresde_ext, RK45"),
    "UniPC-4 adaptive": ("#0072B2", "D", "scoresde_ext, UniPC-4 adaptive"),
    FITTED: ("#D55E00", "*", "scoresde_ext, UniPC-3 calibrated"),
}


def bars(path: Path, measured: Sequence[Measured]) -> None:
    """How many times as fast as the baseline each competitor is, by best times on one thread; logarithmic."""
    shown = [m for m in measured if m.threads == 1 and not m.case.endswith("by size")]
    groups = list(dict.fromkeys((m.case, m.shape) for m in shown))
    figure, ax = plt.subplots(figsize=(8, 1 + 0.62 * len(groups)), layout="constrained")
    labelled: set[str] = set()
    for place, (case, shape) in enumerate(groups):
        found = {m.competitor: m.best for m in shown if (m.case, m.shape) == (case, shape)}
        baseline = found[CASES[case].baseline]
        others = [name for name in found if name != CASES[case].baseline]
        height = 0.8 / len(others)
        for i, name in enumerate(others):
            ratio, y = baseline / found[name], place + (i - (len(others) - 1) / 2) * height
            label = None if name in labelled else name
            labelled.add(name)
            ax.barh(y, math.log10(ratio), height * 0.9, color=COLOURS[name], label=label)
            beyond = 0.02 if ratio >= 1 else -0.02
            ax.text(math.log10(ratio) + beyond, y, f"{ratio:.2g}", va="center", ha="left" if ratio >= 1 else "right",
                    fontsize=8)  # fmt: skip
    ax.axvline(0, color="black", lw=1)
    ax.set_yticks(
        range(len(groups)), [f"{case}, {'x'.join(map(str, s))}\nagainst {CASES[case].baseline}" for case, s in groups],
        fontsize=8,
    )  # fmt: skip
    ax.invert_yaxis()
    low, high = ax.get_xlim()
    ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low - 0.1 <= math.log10(t) <= high + 0.1]
    ax.set_xticks([math.log10(t) for t in ticks], [f"{t:g}" for t in ticks])
    ax.set_xlim(low - 0.15, high + 0.15)
    ax.set_xlabel("times as fast as the baseline (one thread, best times)")
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def sizes(path: Path, measured: Sequence[Measured]) -> None:
    """Time of the loss step against the number of elements, with the time of a copy of what it has to move."""
    threads = list(dict.fromkeys(m.threads for m in measured))
    figure, axes = plt.subplots(
        1, len(threads), figsize=(1 + 4.2 * len(threads), 4), squeeze=False, sharey=True, layout="constrained"
    )
    for ax, number in zip(axes[0], threads, strict=True):
        for name in dict.fromkeys(m.competitor for m in measured):
            curve = [m for m in measured if m.competitor == name and m.threads == number]
            elements = [math.prod(m.shape) for m in curve]
            label = "copy of the same bytes" if name == COPY else name
            ax.plot(elements, [m.best for m in curve], color=COLOURS[name], ls="--" if name == COPY else "-",
                    marker="" if name == COPY else "o", ms=4, label=label)  # fmt: skip
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_title(f"{number} thread{'s' if number > 1 else ''}", fontsize=10)
        ax.set_xlabel("elements")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("seconds a loss step")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def error_against_seconds(path: Path, points: Sequence[Timed], target: float) -> None:
    """RMS error against the seconds a sampler took."""
    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, (color, marker, label) in SAMPLER_STYLES.items():
        if curve := [p for p in points if p.sampler == name]:
            ax.plot(*zip(*line(curve, work="seconds"), strict=True), color=color, marker=marker, ms=5, label=label)
    ax.axhline(target, color="0.75", lw=0.8, zorder=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel(f"seconds for {points[0].samples} digits")
    ax.set_ylabel("RMS error")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
