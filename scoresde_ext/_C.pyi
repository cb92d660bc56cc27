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
