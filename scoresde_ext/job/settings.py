"""What a user may ask for: options of the command line, keys of a configuration file, and how they are checked."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from ..checks import as_real, as_whole

SDES = ("vp", "subvp", "ve")
FORMATS = ("npz", "npy", "pt", "png", "png-folder")
ADAPTIVE_ODE = ("unipc", "RK23", "RK45", "DOP853")  # without nfe and grid
FIXED_ODE = (*ADAPTIVE_ODE, "dpmpp_2m", "euler", "midpoint", "heun", "rk4")  # with one of them
FIXED_SDE = ("unipc_sde", "dpmpp_2m_sde")
SAMPLERS = (*FIXED_ODE, *FIXED_SDE, "adaptive_sde", "pc")
SHARD = 4096
"""Samples in a shard, about, unless asked for otherwise."""


class Refused(Exception):
    """A wrong input: one line for the user, and exit code 2."""


# ---- values ----

Parser = Callable[[Any], Any]


def whole(least: int) -> Parser:
    def parse(value: Any) -> int:
        try:
            found = int(value) if isinstance(value, str) else as_whole(value)
        except ValueError:
            found = None
        if found is None or found < least:
            raise ValueError(f"expected a whole number from {least} on")
        return found

    return parse


def number(above: float = -math.inf, least: float = -math.inf) -> Parser:
    words = f"above {above:g}" if above > -math.inf else f"from {least:g} on" if least > -math.inf else ""

    def parse(value: Any) -> float:
        try:
            found = float(value) if isinstance(value, str) else as_real(value)  # YAML takes 1e-3 for a string
        except ValueError:
            found = None
        if found is None or not (math.isfinite(found) and found > above and found >= least):
            raise ValueError(f"expected a number {words}".rstrip())
        return found

    return parse


def word(choices: Sequence[str]) -> Parser:
    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return str(value)

    return parse


def text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expected a text")
    return value


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _items(value: Any) -> list[Any]:
    return [v for v in value.split(",") if v] if isinstance(value, str) else list(value)


def sizes(value: Any) -> tuple[int, ...]:
    """The shape of a sample."""
    try:
        return tuple(whole(1)(v) for v in _items(value))
    except (TypeError, ValueError):
        raise ValueError("expected the shape of one sample, for example 3,32,32") from None


def interval(value: Any) -> tuple[float, float]:
    try:
        low, high = (number()(v) for v in _items(value))
    except (TypeError, ValueError):
        low = high = 0.0
    if not low < high:
        raise ValueError("expected two rising numbers, for example -1,1")
    return low, high


def assignments(value: Any) -> dict[str, float]:
    try:
        pairs = value.items() if isinstance(value, Mapping) else (v.split("=") for v in _items(value))
        return {str(name).strip(): number()(v) for name, v in pairs}
    except (AttributeError, TypeError, ValueError):
        raise ValueError("expected numbers by name, for example beta_min=0.1,beta_max=20") from None


def option(default: Any, parse: Parser, help: str, metavar: str = "N", same: bool = True, needed: bool = False) -> Any:
    """A field. ``same``: whether a folder of samples has one value of it for all time. ``needed``: there is no default
    that would do."""
    about = {"parse": parse, "help": help, "metavar": metavar, "same": same, "needed": needed}
    return field(default=default, metadata=about)


# ---- the commands' settings ----


@dataclass(frozen=True)
class Problem:
    """Which network, for which SDE."""

    network: str = option("", text, "the network: file.py:function or package.module:function", "NAME", needed=True)
    checkpoint: str | None = option(None, text, "its weights: safetensors, or a torch file", "FILE")
    weights: str = option("ema", word(("ema", "model")), "which weights of a torch checkpoint", "KIND")
    sde: str = option("vp", word(SDES), "the SDE the network was trained for", "NAME")
    sde_options: dict[str, float] | None = option(None, assignments, "its arguments: beta_max=20,N=1000", "A=B,...")  # noqa: RUF009
    shape: tuple[int, ...] | None = option(None, sizes, "of one sample; else the network's sample_shape", "C,H,W")
    eps: float = option(1e-3, number(above=0.0), "last time", "TIME")
    seed: int = option(0, whole(0), "of all random numbers")
    device: str = option("auto", text, "cpu, cuda or auto", "NAME", same=False)
    dtype: str = option("float32", word(("float32", "bfloat16", "float16")), "the network computes in", "TYPE")
    out: str = option("", text, "folder or file to write", "PATH", same=False, needed=True)


@dataclass(frozen=True)
class Sample(Problem):
    """A sampling job."""

    samples: int = option(0, whole(1), "how many are wanted in all", same=False, needed=True)
    batch: int = option(256, whole(1), "samples that are computed together", same=False)
    shard_size: int | None = option(None, whole(1), f"samples in a file, a multiple of the batch; about {SHARD}")
    format: str = option("npz", word(FORMATS), f"of the files: {', '.join(FORMATS)}", "KIND")
    data_range: tuple[float, float] = option(
        (-1.0, 1.0), interval, "of the samples, for 8-bit images (--data-range=-1,1)", "LOW,HIGH"
    )
    sampler: str = option("unipc", word(SAMPLERS), ", ".join(SAMPLERS), "NAME")
    nfe: int | None = option(None, whole(1), "evaluations of the network a sample: fixed steps")
    grid: str | None = option(None, text, "the fixed steps that `scoresde calibrate` found", "FILE")
    order: int | None = option(None, whole(1), "of unipc (3) and of the SDE samplers (2)")
    rtol: float | None = option(None, number(least=0.0), "tolerance of adaptive steps", "X")
    atol: float | None = option(None, number(least=0.0), "tolerance of adaptive steps", "X")
    coordinate: str | None = option(None, word(("t", "angle")), "of adaptive Runge-Kutta steps", "NAME")
    denoise: bool | None = option(None, flag, "end with a step without noise")
    predictor: str | None = option(None, text, "of pc: euler_maruyama, reverse_diffusion, ...", "NAME")
    corrector: str | None = option(None, text, "of pc: langevin, ald, none", "NAME")
    snr: float | None = option(None, number(least=0.0), "of pc: the corrector's signal-to-noise ratio", "X")
    corrector_steps: int | None = option(None, whole(0), "of pc: a predictor step")
    continuous: bool = option(True, flag, "whether the network was trained on continuous times")
    grid_png: bool = option(False, flag, "write preview.png, the first samples side by side", same=False)
    dry_run: bool = option(False, flag, "say what would be done, how many shards, how much disk", same=False)
    remake: bool = option(False, flag, "look at all shards first; make damaged ones again", same=False)

    @property
    def kind(self) -> str:
        """What decides which options mean something, and how the work is cut."""
        if self.sampler == "pc":
            return "pc"
        if self.sampler in FIXED_SDE:
            return "fixed_sde"
        if self.sampler == "adaptive_sde":
            return "adaptive_sde"
        return "fixed" if self.nfe is not None or self.grid is not None else "adaptive"

    @property
    def refills(self) -> bool:
        """Whether each sample has its own steps, so that slots become free one by one."""
        return self.kind in ("adaptive", "adaptive_sde")

    @property
    def mixes_rows(self) -> bool:
        """Whether a sample depends on those it is computed with: Langevin's step size is one for the batch."""
        return self.kind == "pc" and self.corrector == "langevin" and self.corrector_steps != 0


@dataclass(frozen=True)
class Calibrate(Problem):
    """Fixed steps for a network."""

    nfe: int = option(0, whole(1), "evaluations of the network a sample", needed=True)
    order: int = option(3, whole(1), "of unipc")
    samples: int = option(64, whole(2), "samples to calibrate with")
    coefficients: str = option(
        "auto", word(("auto", "theory", "fitted")), "of the steps: fitted to the samples, or theory's", "KIND"
    )


@dataclass(frozen=True)
class Likelihood(Problem):
    """Likelihoods of data."""

    eps: float = option(1e-5, number(above=0.0), "first time", "TIME")
    data: str = option("", text, "the data: npz with samples (uint8 NHWC), npy or pt (float)", "FILE", needed=True)
    data_range: tuple[float, float] = option(
        (-1.0, 1.0), interval, "of the network's data (--data-range=-1,1)", "LOW,HIGH"
    )
    batch: int = option(256, whole(1), "samples that are computed together")
    hutchinson: str = option("Rademacher", word(("Rademacher", "Gaussian", "exact")), "noise of the divergence", "NAME")
    epsilons: int = option(1, whole(1), "noise vectors to average over")
    units: str = option("bits/dim", word(("bits/dim", "nats")), "bits/dim or nats", "NAME")
    levels: float | None = option(None, number(above=0.0), "levels of the data; 256 for uint8")
    rtol: float = option(1e-5, number(least=0.0), "tolerance", "X")
    atol: float = option(1e-5, number(least=0.0), "tolerance", "X")


S = TypeVar("S", bound=Problem)

RECORD = "record"
"""The key of a stored configuration that holds what is not a setting."""


def resolve(cls: type[S], config: str | None, given: Mapping[str, Any]) -> S:
    """The settings: those ``given``, else those of the configuration file, else the defaults.

    Raises:
        Refused: an unknown key, a value of the wrong kind, or one that is missing.
    """
    known = {f.name: f.metadata["parse"] for f in fields(cls)}
    found: dict[str, Any] = {}
    for source, values in ((f"{config}: ", read_config(config) if config else {}), ("", given)):
        for key, value in values.items():
            name = str(key).replace("-", "_")
            if name == RECORD or (value is None and name in known):
                continue
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise Refused(f"{source}{key}: no such setting" + (f"; is {near[0]} meant?" if near else ""))
            try:
                found[name] = known[name](value)
            except ValueError as error:
                raise Refused(f"{source}{name}: {error}, got {value!r}") from None
    settings = cls(**found)
    for f in fields(cls):
        if f.metadata["needed"] and not getattr(settings, f.name):
            raise Refused(f"{f.name}: is missing. Give --{f.name.replace('_', '-')}, or a --config that has it")
    return settings


def read_config(path: str) -> dict[str, Any]:
    """The keys of a YAML or TOML file."""
    try:
        content = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"config: cannot read {path}: {reason(error)}") from None
    try:
        if path.endswith(".toml"):
            if sys.version_info >= (3, 11):
                import tomllib
            else:
                import tomli as tomllib
            found: Any = tomllib.loads(content)
        else:
            import yaml

            found = yaml.safe_load(content)
    except Exception as error:
        raise Refused(f"config: {path} is not what its name says: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise Refused(f"config: expected settings by name in {path}, got {type(found).__name__}")
    return found


def first_line(error: BaseException) -> str:
    words = error.args[0] if isinstance(error, KeyError) and error.args else error  # as text, a KeyError has quotes
    return " ".join(str(words).split()) or type(error).__name__


def reason(error: BaseException) -> str:
    """What the system says, without the path."""
    return getattr(error, "strerror", None) or first_line(error)


# ---- what fits together ----

_USED: dict[
    str, dict[str, Any]
] = {  # options of a sampler, by kind, with their defaults; None: nothing, or one of several
    "fixed": {"nfe": None, "grid": None, "denoise": False},
    "adaptive": {"rtol": 1e-5, "atol": 1e-5, "denoise": False},
    "fixed_sde": {"nfe": 51, "order": 2, "denoise": True},
    "adaptive_sde": {"rtol": 1e-2, "atol": 1e-2, "order": 2, "denoise": True},
    "pc": {
        "nfe": None,
        "predictor": "reverse_diffusion",
        "corrector": "langevin",
        "snr": 0.16,
        "corrector_steps": 1,
        "denoise": True,
    },
}
_OF_A_SAMPLER = (
    *("nfe", "grid", "order", "rtol", "atol", "coordinate", "denoise"),
    *("predictor", "corrector", "snr", "corrector_steps"),
)


def completed(settings: Sample) -> Sample:
    """The settings with every default filled in that depends on others; Refused where they do not fit together."""
    kind, sampler = settings.kind, settings.sampler
    used = dict(_USED[kind])
    if sampler == "unipc" and settings.grid is None:
        used["order"] = 3
    if kind == "adaptive":
        if sampler not in ADAPTIVE_ODE:
            raise Refused(f"nfe: sampler {sampler} takes fixed steps. Say how many evaluations")
        if sampler != "unipc":
            used["coordinate"] = "t"
    for name in _OF_A_SAMPLER:
        if name not in used and getattr(settings, name) is not None:
            how = "with fixed steps " if kind == "fixed" else ""
            raise Refused(f"{name}: means nothing to sampler {sampler} {how}here. Leave it out")
    if settings.nfe is not None and settings.grid is not None:
        raise Refused("nfe, grid: expected one of them, got both")
    if settings.grid is not None and sampler != "unipc":
        raise Refused(f"grid: was calibrated for sampler unipc, got {sampler}")
    if not settings.continuous and kind != "pc":
        raise Refused(f"continuous: sampler {sampler} needs a network trained on continuous times; pc does not")
    changes: dict[str, Any] = {n: v for n, v in used.items() if getattr(settings, n) is None and v is not None}
    if settings.shard_size is None:
        changes["shard_size"] = settings.batch * max(1, round(SHARD / settings.batch))
    elif settings.shard_size % settings.batch:
        near = settings.batch * max(1, round(settings.shard_size / settings.batch))
        raise Refused(
            f"shard_size: expected a multiple of the batch, {settings.batch}, got {settings.shard_size}. {near} is near"
        )
    return replace(settings, **changes)


def as_dict(settings: Problem) -> dict[str, Any]:
    """The settings as YAML can hold them, without those that mean nothing here."""
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(settings).items()}
    return {name: value for name, value in plain.items() if value is not None}


def differences(there: Mapping[str, Any], here: Sample) -> list[str]:
    """Where the settings of a folder differ from these, among those that it has one value of for all time."""
    mine = as_dict(here)
    by_content = ("network", "checkpoint", "grid")  # compared by what is in the files
    names = [f.name for f in fields(here) if f.metadata["same"] and f.name not in by_content]
    if here.shape is None:  # the network's
        names.remove("shape")
    if here.mixes_rows:
        names.append("batch")
    return [
        f"{name} is {_shown(there.get(name))} there, {_shown(mine.get(name))} here"
        for name in names
        if there.get(name) != mine.get(name)
    ]


def _shown(value: Any) -> str:
    return "not set" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)
