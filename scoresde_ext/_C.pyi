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

class calls:
    @staticmethod
    def filled(n: int, number: float, is_double: bool) -> Tensor: ...
    @staticmethod
    def new_key() -> Tensor: ...
    @staticmethod
    def total(numbers: Tensor) -> float: ...
    # and the operators of torch.ops.scoresde_ext

# Only in a build with CUDA:
class DeviceLoop:
    def __init__(self, step: int, flag: int) -> None: ...
    def launch(self, stream: int) -> None: ...

def loops_missing() -> str: ...
