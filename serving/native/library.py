"""The native kernels: compiled for this very processor on first use, then loaded from the cache.

Needs a C++ compiler at run time and nothing else; where there is none, torch's operators serve.
The structures mirror native/model.h, field by field.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

from okavango.platform.errors import UnsupportedError

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
# No contraction: where a compiler fuses a product and a sum in one copy of a function and not in another, a
# row's numbers would depend on its neighbours (GCC 13 does). What is to be fused says so: fma in vec.h.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-Wno-psabi",
)
_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 300


def _fields(ctype: type, names: str) -> list[tuple[str, type]]:
    return [(name, ctype) for name in names.split()]


class Linear(ctypes.Structure):
    _fields_ = [
        *_fields(c_void_p, "weights bias scales"),
        *_fields(c_int64, "inputs panels num_targets"),
        ("targets", c_int64 * 3),
        *_fields(c_void_p, "panel_target panel_index"),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        *_fields(c_void_p, "attention_norm mlp_norm query_norm key_norm"),
        *_fields(Linear, "qkv out gate_up down"),
        *_fields(c_void_p, "keys values"),
        ("window", c_int64),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *_fields(c_int64, "width inner heads kv_heads head_width vocabulary"),
        *_fields(c_int64, "block_size block_stride head_stride max_rank activation threads num_layers"),
        *_fields(c_double, "eps scale"),
        *_fields(c_void_p, "cosines sines final_norm"),
        ("layers", POINTER(Layer)),
        ("head", Linear),
        *_fields(c_void_p, "slots places"),
        *_fields(c_int64, "num_targets"),
    ]


class Chunk(ctypes.Structure):
    _fields_ = _fields(c_int64, "row count first table")


class Segment(ctypes.Structure):
    _fields_ = _fields(c_int64, "slot start end")


class Step(ctypes.Structure):
    _fields_ = [
        *_fields(c_int64, "rows num_chunks num_segments num_outputs"),
        ("x", c_void_p),
        ("chunks", POINTER(Chunk)),
        ("tables", POINTER(c_int32)),
        ("segments", POINTER(Segment)),
        ("outputs", POINTER(c_int64)),
        ("logits", POINTER(c_float)),
    ]


@cache
def load_library(folder: Path) -> ctypes.CDLL:
    """The kernels, compiled into `folder` if they are not there yet.

    Raises:
        UnsupportedError: there is no compiler, or it fails; the message holds what it said.
    """
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise UnsupportedError(
            "there is no C++ compiler", where="native kernels", remedy="install g++ or clang for faster steps"
        )
    path = folder / f"okavango-{_key(compiler)}.so"
    if not path.exists():
        _compile(compiler, path)
    library = ctypes.CDLL(str(path))
    library.okv_create.restype = c_void_p
    library.okv_create.argtypes = [POINTER(Model), c_int]
    library.okv_run.argtypes = [c_void_p, c_int, POINTER(Step)]
    library.okv_destroy.argtypes = [c_void_p, c_int]
    library.okv_run.restype = library.okv_destroy.restype = None
    if library.okv_prepare() != 0:
        raise UnsupportedError("the operating system grants no AMX tiles", where="native kernels")
    return library


def _key(compiler: str) -> str:
    """A digest of all that the result depends on: sources, flags, compiler and processor."""
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for source in sorted((*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp"))):
        digest.update(source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest.update(version.encode())
    digest.update(_processor().encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return " ".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes may start at once; one compiles
        if path.exists():
            return
        log.info("compiling the native kernels, once")
        descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".so.partial")
        os.close(descriptor)
        try:
            _run([compiler, *_FLAGS, "-o", name, str(SOURCES / "step.cpp")])
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnsupportedError(f"cannot be compiled: {error}", where="native kernels") from error
    if done.returncode != 0:
        said = "\n".join(done.stderr.splitlines()[:5])
        raise UnsupportedError(f"cannot be compiled: {said}", where="native kernels")
