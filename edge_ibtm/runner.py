"""Build apps/runner against the executorch wheel and pack it into one folder that starts anywhere.

    bundle/
        run.sh               what to start: `sh run.sh --model_path m.pte ...`
        edge_ibtm_runner     the program
        lib*.so*             ExecuTorch; for aarch64 also glibc, its loader and the C++ library
        manifest.json        architecture, versions, SHA-256 of every file

host links the installed wheel. aarch64 is cross-compiled with Debian's g++-aarch64-linux-gnu against the
aarch64 wheel of the same version, downloaded once into the cache; no NDK. Cache: $EDGE_IBTM_CACHE, else
~/.cache/edge-ibtm.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_ibtm.errors import EdgeIBTMError, UsageError, lookup
from edge_ibtm.files import sha256_of

ARCHITECTURES = {"host": "host", "aarch64": "aarch64"}
ABI = {"arm64-v8a": "aarch64", "aarch64": "aarch64", "x86_64": "x86_64", "amd64": "x86_64", "arm64": "aarch64"}
COMPONENTS = ("", "_backend_xnnpack", "_etdump", "_kernels_optimized", "_kernels_quantized", "_threadpool")
PROGRAM = "edge_ibtm_runner"
_SYSROOT = Path("/usr/aarch64-linux-gnu/lib")
LOADER = "ld-linux-aarch64.so.1"
_GLIBC = (LOADER, "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libgcc_s.so.1")
_HERE = '#!/bin/sh\ncase "$0" in */*) d="${0%/*}" ;; *) d=. ;; esac\n'
_START = {
    "host": f'{_HERE}exec "$d/{PROGRAM}" "$@"\n',
    "aarch64": f'{_HERE}exec "$d/{LOADER}" --library-path "$d" "$d/{PROGRAM}" "$@"\n',
}


@dataclass(frozen=True)
class Bundle:
    """A packed runner: its folder, the machine it is for, and SHA-256 of its files."""

    folder: Path
    arch: str
    executorch: str
    source_sha256: str
    files: dict[str, str]

    @property
    def start(self) -> Path:
        """The script that starts it."""
        return self.folder / "run.sh"

    @property
    def command(self) -> list[str]:
        """How to start it on a machine of its architecture."""
        return ["/bin/sh", str(self.start)]


def cache_folder() -> Path:
    """Where wheels and bundles are kept: $EDGE_IBTM_CACHE, else ~/.cache/edge-ibtm."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("EDGE_IBTM_CACHE") or Path(base) / "edge-ibtm")


def build(arch: str = "host", folder: str | Path | None = None, *, force: bool = False) -> Bundle:
    """Build and pack the runner, or return the bundle in `folder` (default: in the cache) when it is up to
    date.

    Errors: UsageError (unknown architecture, no sources), EdgeIBTMError (tool missing, download or
    compilation failed).
    """
    lookup("architecture", arch, ARCHITECTURES)
    sources = source_folder()
    stamp = _stamp(sources, arch)
    target = Path(folder) if folder else cache_folder() / f"runner-{arch}-{stamp[:12]}"
    if not force and (found := read_bundle(target)) is not None and found.source_sha256 == stamp:
        return found
    _refuse_foreign(target)
    _need("cmake", "apt install cmake, or pip install cmake")
    if arch == "aarch64":
        _need("aarch64-linux-gnu-g++", "apt install g++-aarch64-linux-gnu")
    wheel = _host_wheel() if arch == "host" else aarch64_wheel()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".runner-") as work:
        program = _compile(sources, wheel, Path(work) / "build", arch)
        packed = _pack(program, wheel, Path(work) / "bundle", arch, stamp)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(packed, target)
    bundle = read_bundle(target)
    assert bundle is not None
    return bundle


def read_bundle(folder: Path) -> Bundle | None:
    """The bundle in `folder`, None when there is none or a file of it is missing or changed."""
    try:
        held = json.loads((folder / "manifest.json").read_text())
        bundle = Bundle(folder=folder, **held)
        whole = all(sha256_of(folder / name) == digest for name, digest in bundle.files.items())
    except (OSError, ValueError, TypeError):
        return None
    return bundle if whole else None


def source_folder() -> Path:
    """apps/runner of this checkout, or as carried by an installed package; UsageError when there is neither."""
    package = Path(__file__).resolve().parent
    places = [package.parent / "apps" / "runner", package / "apps" / "runner"]
    for place in places:
        if (place / "CMakeLists.txt").is_file():
            return place
    raise UsageError(f"no runner sources at {places[0]} or {places[1]}; install from a checkout: pip install -e .")


def executorch_version() -> str:
    """Version of the installed executorch, without its local part."""
    from edge_ibtm.probe.facts import version_of

    return version_of("executorch").partition("+")[0]


def _stamp(sources: Path, arch: str) -> str:
    """SHA-256 over the sources, this packer, the version linked and the architecture."""
    digest = hashlib.sha256(f"{arch} {platform.machine()} {executorch_version()}".encode())
    for file in sorted([*sources.iterdir(), Path(__file__)]):
        if file.suffix in (".cpp", ".h", ".txt", ".cmake", ".py"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _refuse_foreign(target: Path) -> None:
    """Never empty a folder that holds anything but a bundle."""
    try:
        known = {"manifest.json", *json.loads((target / "manifest.json").read_text())["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        known = set()
    if target.exists() and any(file.name not in known for file in target.iterdir()):
        raise UsageError(f"{target} holds other files; give an empty or new folder for the bundle")


def _need(tool: str, how: str) -> None:
    if shutil.which(tool) is None:
        raise EdgeIBTMError(f"{tool} is missing: {how}; `edge-ibtm doctor` lists what the phone path needs")


def _host_wheel() -> Path:
    """The installed executorch package."""
    from importlib.util import find_spec

    spec = find_spec("executorch")
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise EdgeIBTMError("executorch is not installed; pip install executorch")
    return Path(places[0])


def aarch64_wheel() -> Path:
    """The unpacked aarch64 wheel of the installed version, downloaded with pip when it is not in the cache."""
    version = executorch_version()
    folder = cache_folder() / f"executorch-{version}-aarch64"
    if (folder / "executorch" / "lib" / "libexecutorch.so").is_file():
        return folder / "executorch"
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".wheel-") as work:
        tag = f"{sys.version_info.major}{sys.version_info.minor}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--platform", "manylinux_2_28_aarch64", "--python-version", tag, "--dest", work]
        _run([*command, f"executorch=={version}"], "downloading the aarch64 wheel of executorch")
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            wanted = ("executorch/lib/", "executorch/include/", "executorch/share/cmake/")
            archive.extractall(Path(work) / "x", [n for n in archive.namelist() if n.startswith(wanted)])
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(Path(work) / "x", folder)
    return folder / "executorch"


def _compile(sources: Path, wheel: Path, build_folder: Path, arch: str) -> Path:
    configure = ["cmake", "-S", str(sources), "-B", str(build_folder), f"-DEXECUTORCH_ROOT={wheel}"]
    if arch == "aarch64":
        configure.append(f"-DCMAKE_TOOLCHAIN_FILE={sources / 'aarch64.cmake'}")
    _run(configure, f"configuring the runner for {arch}")
    _run(["cmake", "--build", str(build_folder), "--parallel", "2"], f"compiling the runner for {arch}")
    return build_folder / PROGRAM


def _pack(program: Path, wheel: Path, folder: Path, arch: str, stamp: str) -> Path:
    folder.mkdir(parents=True)
    shutil.copy(program, folder / PROGRAM)
    for component in COMPONENTS:
        shutil.copy(wheel / "lib" / f"libexecutorch{component}.so", folder)
    if arch == "aarch64":
        for name in _GLIBC:
            shutil.copy(_SYSROOT / name, folder)
        shutil.copy((_SYSROOT / "libstdc++.so.6").resolve(), folder / "libstdc++.so.6")
    (folder / "run.sh").write_text(_START[arch])
    for name in ("run.sh", PROGRAM, LOADER):
        if (folder / name).exists():
            (folder / name).chmod(0o755)
    files = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
    machine = "aarch64" if arch == "aarch64" else ABI.get(platform.machine().lower(), platform.machine())
    manifest = {"arch": machine, "executorch": executorch_version(), "source_sha256": stamp, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return folder


def _run(command: list[str], doing: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        telling = [line for line in said if "rror" in line] or said
        raise EdgeIBTMError(f"{doing} failed: {' | '.join(telling[-4:])} (command: {' '.join(command)})")


def describe(bundle: Bundle) -> str:
    """What is in the bundle, a line a file with size and checksum."""
    lines = [f"runner for {bundle.arch}, executorch {bundle.executorch}, in {bundle.folder}"]
    for name, digest in bundle.files.items():
        size = (bundle.folder / name).stat().st_size
        lines.append(f"  {digest}  {size / 1e6:7.2f} MB  {name}")
    lines.append(f"start it with: sh {bundle.start} --help")
    return "\n".join(lines)


def json_line(bundle: Bundle) -> str:
    """The bundle as one line of JSON."""
    return json.dumps({**asdict(bundle), "folder": str(bundle.folder)})
