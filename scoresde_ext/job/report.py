"""report.html: what a job made and how it went, in one file that needs no other."""

from __future__ import annotations

import base64
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from . import files, shards
from .manifest import Shard
from .settings import RECORD

PICTURES = 64  # in the preview
BARS = 40  # in a chart, at most


def write(folder: Path, config: dict[str, Any], there: dict[int, Shard]) -> None:
    """Writes report.html into the folder."""
    import jinja2

    template = resources.files(__package__).joinpath("report.html").read_text()
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(template)
    picture = preview(folder, config, there)
    listed = sorted(there.values(), key=lambda shard: shard.first)
    record = config.get(RECORD, {})
    settings = [(n.replace("_", " "), show(v)) for n, v in config.items() if n != RECORD]
    settings += [(n.replace("_", " "), show(v)) for n, v in record.items() if n != "started"]
    text = page.render(
        title=f"{sum(s.count for s in listed):,} samples",
        subtitle=f"{config['sampler']}, seed {config['seed']}, {written(listed)}",
        facts=facts(listed),
        picture=base64.b64encode(picture).decode() if picture else "",
        charts=charts(listed) if listed else [],
        failed=sorted((i, why) for shard in listed for i, why in shard.failed.items()),
        settings=settings,
    )
    files.write_file(folder / "report.html", lambda file: file.write(text.encode()))


def preview(folder: Path, config: dict[str, Any], there: dict[int, Shard]) -> bytes | None:
    """The first samples side by side, as PNG; None where they are no images."""
    shape = config["shape"]
    if len(shape) != 3 or shape[0] not in (1, 3):
        return None
    parts: list[np.ndarray] = []
    for _, shard in sorted(there.items()):
        left = PICTURES - sum(map(len, parts))
        if left <= 0:
            break
        if shard.count == 0:
            continue
        samples, _ = shards.read(folder / shard.file, config["format"], left)
        if not shards.is_image(config["format"]):
            samples = shards.to_uint8(torch.from_numpy(samples), tuple(config["data_range"])).numpy()
        parts.append(samples)
    return shards.sheet(np.concatenate(parts)) if parts else None


def written(listed: Sequence[Shard]) -> str:
    if not listed:
        return "nothing written yet"
    return time.strftime("written until %Y-%m-%d %H:%M UTC", time.gmtime(max(s.written for s in listed)))


def facts(listed: Sequence[Shard]) -> list[tuple[str, str]]:
    samples = sum(s.stop - s.first for s in listed)
    evaluations = sum(n * many for s in listed for n, many in s.evaluations.items())
    slots = sum(s.slot_evaluations for s in listed)
    busy = sum(s.seconds for s in listed)
    numbers = [
        ("samples", f"{sum(s.count for s in listed):,}"),
        ("failed", f"{sum(len(s.failed) for s in listed):,}"),
        ("shards", f"{len(listed):,}"),
        ("evaluations a sample", f"{evaluations / samples:.1f}" if samples else "–"),
        ("of the slots in use", f"{100 * evaluations / slots:.1f} %" if slots else "–"),
        ("workers", f"{len({s.worker for s in listed})}"),
        ("computing, all workers", str(tqdm.format_interval(busy))),
        ("samples/s a worker", f"{samples / busy:.1f}" if busy else "–"),
    ]
    return numbers


# ---- charts ----


def charts(listed: Sequence[Shard]) -> list[dict[str, Any]]:
    return [throughput(listed), histogram(listed)]


def throughput(listed: Sequence[Shard]) -> dict[str, Any]:
    """Samples a second over time: those of a shard are spread over the time it was computed in."""
    start = min(s.written - s.seconds for s in listed)
    length = max(max(s.written for s in listed) - start, 1e-3)
    edges = np.linspace(0.0, length, min(BARS, max(4, len(listed))) + 1)
    rates = np.zeros(len(edges) - 1)
    for s in listed:
        first, last = s.written - s.seconds - start, s.written - start
        shares = np.clip(np.minimum(edges[1:], last) - np.maximum(edges[:-1], first), 0.0, None)
        rates += (s.stop - s.first) * shares / max(last - first, 1e-9) / np.diff(edges)
    scale, unit = next((s, u) for s, u in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
                       if length >= 2 * s or s == 1)  # fmt: skip
    spans = [(a / scale, b / scale) for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]
    return bars("Samples a second", spans, rates.tolist(), f"{unit} since the start")


def histogram(listed: Sequence[Shard]) -> dict[str, Any]:
    """Samples by the evaluations they took."""
    counts: Counter[int] = Counter()
    for s in listed:
        counts.update(s.evaluations)
    low, high = min(counts), max(counts)
    width = max(1, math.ceil((high - low + 1) / BARS))
    groups: Counter[int] = Counter()
    for n, many in counts.items():
        groups[(n - low) // width] += many
    spans = [(low + i * width - 0.5, low + (i + 1) * width - 0.5) for i in range((high - low) // width + 1)]
    return bars("Evaluations of the network", spans, [groups[i] for i in range(len(spans))], "evaluations a sample")


def bars(title: str, spans: Sequence[tuple[float, float]], heights: Sequence[float], unit: str) -> dict[str, Any]:
    """Numbers for the template: an area of 362 by 150 at (52, 10)."""
    left, top, width, height = 52, 10, 362, 150
    first, last = spans[0][0], spans[-1][1]
    if len(spans) == 1:  # a lone bar would fill it all
        first, last = first - 4 * (last - first), last + 4 * (last - first)
    step = round_step(max(heights) or 1.0)
    most = step * math.ceil((max(heights) or 1.0) / step)

    def x(v: float) -> float:
        return round(left + width * (v - first) / (last - first), 2)

    drawn = []
    for (a, b), value in zip(spans, heights, strict=True):
        tall = height * value / most
        label = f"{plain(math.ceil(a) if unit.startswith('eval') else a)}: {plain(value)}"
        drawn.append({"x": x(a), "y": round(top + height - tall, 2), "height": round(tall, 2), "label": label,
                      "width": max(round(x(b) - x(a) - 1, 2), 1)})  # fmt: skip
    ticks = [{"y": round(top + height * (1 - v / most), 1), "label": plain(v)} for v in multiples(step, most)]
    whole = unit.startswith("eval")
    ends = (math.ceil(spans[0][0]), math.floor(spans[-1][1])) if whole else (0.0, last)
    if whole and ends[0] == ends[1]:
        marks = [{"x": x(ends[0]), "label": plain(ends[0]), "anchor": "middle"}]
    else:
        marks = [{"x": x(v), "label": plain(v), "anchor": a} for v, a in zip(ends, ("start", "end"), strict=True)]
    return {"title": title, "unit": unit, "bars": drawn, "ticks": ticks, "marks": marks}


def round_step(most: float) -> float:
    """1, 2 or 5 times a power of ten: about four of them make ``most``."""
    power = 10.0 ** math.floor(math.log10(most / 4))
    return next(m * power for m in (1, 2, 5, 10) if m * power * 4 >= most)


def multiples(step: float, most: float) -> Iterable[float]:
    return [i * step for i in range(round(most / step) + 1)]


def plain(v: float) -> str:
    return f"{v:,.0f}" if v >= 100 or v == round(v) else f"{v:.3g}"


def show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {v}" for name, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
