"""Lets a CUDA build of torch be imported, and built against, where there are no CUDA libraries.

    python .ci/stand_ins.py TORCH OUT

TORCH is the folder of the package torch. Writes into OUT an empty stand-in for every library that TORCH/lib needs and
this machine lacks, with the symbols and versions that are asked of it; with ``LD_LIBRARY_PATH=OUT`` torch then runs as
its CPU build would. Every function of a stand-in returns 100, which is CUDA's "no device". Needs gcc and binutils.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path


def said(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def symbols(library: Path, which: str) -> set[str]:
    """``name`` or ``name@version``. A weak one (w) may stay undefined."""
    lines = (line.split() for line in said("nm", "-D", which, library).splitlines())
    return {words[-1] for words in lines if words[-2] not in ("w", "v")}


def write(folder: Path, soname: str, versions: dict[str, set[str]]) -> None:
    """A library of these functions, by version; "" for those without one."""
    names = sorted(set().union(*versions.values()))
    source, script = folder / "stand_in.c", folder / "stand_in.map"
    source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in names) or "int empty;\n")
    script.write_text(
        "".join(f"{v} {{ global: {' '.join(f'{n};' for n in sorted(versions[v]))} }};\n" for v in versions if v)
    )
    versioned = [f"-Wl,--version-script={script}"] if any(versions) else []
    said("gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{soname}", *versioned, "-o", folder / soname, source)
    source.unlink()
    script.unlink()


def main(torch: Path, out: Path) -> None:
    libraries = [path for path in sorted((torch / "lib").glob("*.so*")) if path.read_bytes()[:4] == b"\x7fELF"]
    missing: set[str] = set()
    library_of: dict[str, str] = {}  # version -> the library that has it
    for library in libraries:
        missing |= set(re.findall(r"(\S+) => not found", said("ldd", library)))
        needs = said("readelf", "--version-info", "--wide", library)
        for file, its_versions in re.findall(r"File: (\S+) .*\n((?:.*Name: .*\n)*)", needs):
            library_of |= dict.fromkeys(re.findall(r"Name: (\S+)", its_versions), file)

    defined = {symbol.split("@")[0] for library in libraries for symbol in symbols(library, "--defined-only")}
    any_library = min(missing, default=None)  # for symbols without a version, which are found in whichever has them
    wanted: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in missing}
    for library in libraries:
        for symbol in symbols(library, "--undefined-only"):
            name, _, version = symbol.partition("@")
            if version:
                if library_of.get(version) in missing:
                    wanted[library_of[version]][version].add(name)
            elif any_library and name not in defined and not name.startswith(("Py", "_Py")):
                wanted[any_library][""].add(name)
    out.mkdir(parents=True, exist_ok=True)
    for soname, versions in wanted.items():
        write(out, soname, versions)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
