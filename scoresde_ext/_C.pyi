from typing import TypedDict

from torch import Tensor

class CudaBuild(TypedDict):
    nvcc: str
    archs: str

class BuildInfo(TypedDict):
    compiler: str
    torch: str
    cuda: CudaBuild | None
    cpu_capabilities: list[str]
    cpu_capability: str

def build_info() -> BuildInfo: ...
def control_step(norm: float, h: float, after_rejection: bool, exponent: float) -> tuple[bool, float]: ...

# The operators of torch.ops.scoresde_ext, as functions.
class calls: ...

class host:
    @staticmethod
    def filled(n: int, number: float, is_double: bool) -> Tensor: ...
    @staticmethod
    def new_key() -> Tensor: ...
    @staticmethod
    def next_draw(key: Tensor) -> Tensor: ...
    @staticmethod
    def total(numbers: Tensor) -> float: ...
    @staticmethod
    def norm_ratio(squares: Tensor, other_squares: Tensor) -> float: ...
    @staticmethod
    def extremes(numbers: Tensor) -> tuple[float, float]: ...

# Only in a build with CUDA:
class DeviceLoop:
    def __init__(self, step: int, flag: int) -> None: ...
    def launch(self, stream: int) -> None: ...

def loops_missing() -> str: ...
