"""Draws digits with a trained network: python examples/digits/draw.py

Integrates the probability-flow ODE by adaptive RK45, writes out/digits.png to look at and out/digits.npz to work with,
and says how good the digits are: printed, and as out/digits.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import quality
import torch
from network import load
from PIL import Image

from scoresde_ext import noise, sampling

SCALE, GAP, COLUMNS = 6, 4, 16


def grid(images: np.ndarray) -> Image.Image:
    """Images ``(n, 8, 8, 1)`` uint8 side by side, smoothly enlarged: 8x8 pixels read as digits from far away only."""
    n, height, width, _ = images.shape
    cell = np.array([height * SCALE + GAP, width * SCALE + GAP])
    sheet = Image.new("L", (int(cell[1] * min(n, COLUMNS) + GAP), int(cell[0] * -(-n // COLUMNS) + GAP)), 64)
    for i, image in enumerate(images):
        row, column = divmod(i, COLUMNS)
        enlarged = Image.fromarray(image[:, :, 0]).resize((width * SCALE, height * SCALE), Image.Resampling.BICUBIC)
        sheet.paste(enlarged, (int(cell[1] * column + GAP), int(cell[0] * row + GAP)))
    return sheet


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Draw digits with a trained network.")
    checkpoint = here / "digits-vp.safetensors"
    parser.add_argument("--checkpoint", type=Path, default=checkpoint, help="of train.py; default: %(default)s")
    parser.add_argument("--samples", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="rtol and atol; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder; default: %(default)s")
    args = parser.parse_args()
    if args.samples < 2:
        parser.error(f"--samples: expected at least 2, got {args.samples}")
    if not args.checkpoint.is_file():
        parser.error(f"--checkpoint: expected a file that train.py wrote, found none at {args.checkpoint}")

    network = load(args.checkpoint)
    sampler = sampling.get_ode_sampler(
        network.sde,
        (args.samples, 1, 8, 8),
        inverse_scaler=lambda x: x,
        rtol=args.tolerance,
        atol=args.tolerance,
        device="cpu",
        progress=True,
    )
    start = time.perf_counter()
    with noise.seeds(args.seed, range(args.samples)):
        samples, nfe = sampler(network)
    seconds = time.perf_counter() - start

    images = quality.to_uint8(samples).permute(0, 2, 3, 1).numpy()
    args.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out / "digits.npz", samples=images)
    grid(images).save(args.out / "digits.png")

    q, threads = quality.measure(samples), torch.get_num_threads()
    figures = {"samples": args.samples, "seed": args.seed, "tolerance": args.tolerance, "evaluations": nfe,
               "seconds": seconds, "threads": threads, "quality": q._asdict()}  # fmt: skip
    (args.out / "digits.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(
        f"""
{args.samples} digits in {seconds:.1f} s: {args.samples / seconds:.0f} a second, {nfe} evaluations of the network each
(RK45, rtol = atol = {args.tolerance:g}, {type(network.sde).__name__}, seed {args.seed}, {threads} threads)

Frechet distance to the training digits, on the features of a small classifier (less is better)
    real digits, held back   {q.floor:8.2f}   floor: what {q.images} perfect samples would get
    these samples            {q.samples:8.2f}
    noise                    {q.ceiling:8.2f}   ceiling
What the classifier sees in them (it is right on {100 * q.accuracy:.1f} % of the held-back digits)
    {"  ".join(f"{digit}: {count}" for digit, count in enumerate(q.histogram))}
    mean confidence {100 * q.confidence:.1f} %

{args.out / "digits.png"}   to look at
{args.out / "digits.npz"}   samples: uint8 {images.shape}
{args.out / "digits.json"}  these figures"""
    )


if __name__ == "__main__":
    main()
