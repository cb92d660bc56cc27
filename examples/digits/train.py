"""Trains the digits network: python examples/digits/train.py --sde vp

Writes the averaged weights as safetensors, with the command that made them. On the same machine the same command gives
the same weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from data import load_digits
from network import SDES, DigitsNetwork, save
from torch import Tensor
from tqdm import tqdm

from scoresde_ext import losses, noise
from scoresde_ext.models.ema import ExponentialMovingAverage

BATCH = 128
REPORT_EVERY = 500
CONFIG = SimpleNamespace(
    optim=SimpleNamespace(optimizer="Adam", lr=1e-3, beta1=0.9, eps=1e-8, weight_decay=0.0, warmup=200, grad_clip=1.0)
)


def train(sde_name: str, steps: int, seed: int) -> tuple[DigitsNetwork, float]:
    """The trained network, with averaged weights, and its loss on the test digits."""
    torch.manual_seed(seed)
    digits = load_digits()
    network = DigitsNetwork(sde_name)
    state: dict[str, Any] = {
        "model": network,
        "optimizer": losses.get_optimizer(CONFIG, network.parameters()),
        "ema": ExponentialMovingAverage(network.parameters(), decay=0.999),
        "step": 0,
    }
    train_step = losses.get_step_fn(
        network.sde, train=True, optimize_fn=losses.optimization_manager(CONFIG), reduce_mean=True
    )
    test_step = losses.get_step_fn(network.sde, train=False, reduce_mean=True)

    def test_loss() -> float:
        # Every digit 16 times, and always under the same noise: two numbers can be compared.
        images = digits.test_images.repeat(16, 1, 1, 1)
        with noise.seeds(0, range(len(images))):
            return test_step(state, images).item()

    recent: list[Tensor] = []
    with tqdm(total=steps, unit="step", disable=None) as bar:
        while state["step"] < steps:
            batch = digits.train_images[torch.randint(len(digits.train_images), (BATCH,))]
            recent.append(train_step(state, batch).detach())
            bar.update()
            if state["step"] % REPORT_EVERY == 0 or state["step"] == steps:
                tested = test_loss()
                trained = torch.stack(recent).mean().item()
                message = f"step {state['step']}: loss {trained:.4f}, on the test digits {tested:.4f}"
                tqdm.write(message, file=sys.stderr)  # where the bar is, and not held back when it goes to a file
                recent.clear()
    state["ema"].copy_to(network.parameters())
    return network, tested


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the digits network for one SDE.")
    parser.add_argument("--sde", choices=SDES, default="vp", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=6000, help=f"of {BATCH} digits each; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="default: digits-SDE.safetensors beside this script")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps: expected at least 1, got {args.steps}")
    out = args.out or Path(__file__).with_name(f"digits-{args.sde}.safetensors")
    if not out.parent.is_dir():
        parser.error(f"--out: expected a path in a folder that exists, got {out}")

    start = time.perf_counter()
    network, tested = train(args.sde, args.steps, args.seed)
    command = f"python examples/digits/train.py --sde {args.sde} --steps {args.steps} --seed {args.seed}"
    save(out, network, steps=args.steps, seed=args.seed, test_loss=f"{tested:.4f}", command=command)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    seconds = time.perf_counter() - start
    print(f"{out}: {parameters} parameters, {args.steps} steps in {seconds:.0f} s, test loss {tested:.4f}")


if __name__ == "__main__":
    main()
