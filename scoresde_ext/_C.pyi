from typing import TypedDict

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

# Only in a build with CUDA:
class DeviceLoop:
    def __init__(self, step: int, flag: int) -> None: ...
    def launch(self, stream: int) -> None: ...

def loops_missing() -> str: ...
