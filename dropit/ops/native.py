"""The operations on a CPU by C, where there is a compiler: the same results as ``reference``, bit for bit, in one pass.

``native.c`` is compiled for this processor when a tensor is first worth it, in a few seconds, and kept in the user's
cache directory (``XDG_CACHE_HOME``, ``~/.cache``). Where that fails, or with ``DROPIT_NATIVE=0`` in the environment,
NumPy's and PyTorch's own operations do the same, and take two to four times as long.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from dropit.ops import reference
from dropit.packed import LEVELS_GROUP, OFFSET_BLOCK, SCALE_GROUP, bits_nbytes
from dropit.tracing import is_plain

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-ffp-contract=off", "-shared", "-fPIC")
_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_STORED = {16: torch.int16, 8: torch.int8, 4: torch.uint8, 2: torch.uint8}
_BITS = {torch.int16: 16, torch.int8: 8, torch.uint8: 4}  # or 2
_WORTH = 2**15  # elements, for which a compiler is started
_PART = 2**15  # elements that a thread takes at a time
_log = logging.getLogger(__name__)
_loaded: ctypes.CDLL | None = None


def takes(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the functions here can be called for ``x`` and what goes with it."""
    for each in (x, *others):
        if each is not None and not (is_plain(each) and each.is_contiguous() and each.device == x.device):
            return False
    return (_loaded is not None or x.numel() >= _WORTH) and shared_object() is not None


def quantize(x: Tensor, bits: int, statistics: reference.Statistics | None = None) -> tuple[Tensor, Tensor]:
    """As :func:`dropit.ops.reference.quantize`, of float32 or bfloat16, to 16, 8, 4 or 2 bits."""
    n, (top, most) = x.numel(), reference.CODES.get(bits, (0, 0))
    # Of the device, since the default may be another.
    codes = torch.empty(x.shape if bits >= 8 else (-(-n * bits // 8),), dtype=_STORED[bits], device=x.device)
    shape = (-(-n // LEVELS_GROUP), 2) if bits == 2 else (-(-n // SCALE_GROUP),)
    scales = torch.empty(shape, dtype=torch.bfloat16, device=x.device)
    mean, rstd, inner = statistics or (None, None, 1)
    _function("quantize")(
        x.data_ptr(),
        _KINDS[x.dtype],
        n,
        None if mean is None else mean.data_ptr(),
        None if rstd is None else rstd.data_ptr(),
        inner,
        1 if rstd is None else rstd.numel(),
        bits,
        top,
        most,
        codes.data_ptr(),
        scales.data_ptr(),
        torch.get_num_threads(),
    )
    return codes, scales


def dequantize(
    codes: Tensor, scales: Tensor, dtype: torch.dtype, n: int, rescaling: reference.Rescaling | None = None
) -> Tensor:
    """As :func:`dropit.ops.reference.dequantize`, of float32 or bfloat16, from 16, 8, 4 or 2 bits."""
    by, computed = rescaling or reference.Rescaling(None, None, 1), torch.float32 if rescaling else dtype
    weight, bias = (None if each is None else each.float() for each in by[:2])
    given = weight if bias is None else bias
    result = by.result_type(dtype)
    dense = torch.empty(n, dtype=result, device=codes.device)
    bits = 2 if scales.dim() == 2 else _BITS[codes.dtype]
    _function("dequantize")(
        codes.data_ptr(),
        scales.data_ptr(),
        bits,
        n,
        _KINDS[computed],
        torch.finfo(computed).max,
        None if weight is None else weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        by.inner,
        1 if given is None else given.numel(),
        by.lower,
        by.upper,
        _KINDS[result],
        dense.data_ptr(),
        torch.get_num_threads(),
    )
    return dense


def range_bitmask(flat: Tensor, lower: float, upper: float) -> Tensor:
    """As :func:`dropit.ops.reference.range_bitmask`, of float32 or bfloat16."""
    n, kind = flat.numel(), _KINDS[flat.dtype]
    bits = torch.empty(bits_nbytes(n), dtype=torch.uint8, device=flat.device)
    lower = reference.rounded(lower, flat.dtype)
    upper = reference.rounded(upper, flat.dtype) if upper < math.inf else math.nan  # above which nothing is
    _function("mark")(flat.data_ptr(), kind, n, lower, upper, bits.data_ptr(), torch.get_num_threads())
    return bits


def apply_bitmask(flat: Tensor, bits: Tensor) -> Tensor:
    """As :func:`dropit.ops.reference.apply_bitmask`, of elements of 2 or 4 bytes."""
    kept = torch.empty_like(flat)
    arguments = (flat.data_ptr(), flat.element_size(), flat.numel(), bits.data_ptr(), kept.data_ptr())
    _function("keep")(*arguments, torch.get_num_threads())
    return kept


def select(
    flat: Tensor, block_size: int, count: int, rest_count: int, values: Tensor, positions: Tensor, counted: bool
) -> None:
    """Write the values and positions of :func:`dropit.ops.reference.pack_largest`, of elements of 2 or 4 bytes.

    ``positions``: zeros (bytes,); ``counted``: whether its offsets come after the counts.
    """
    n, start = flat.numel(), positions.data_ptr()
    as_bits = len(positions) == bits_nbytes(n)
    counts = 2 * -(-n // OFFSET_BLOCK) if counted and not as_bits else 0
    part = math.lcm(block_size, OFFSET_BLOCK)
    _function("select")(
        flat.data_ptr(),
        flat.element_size(),
        n,
        block_size,
        count,
        rest_count,
        values.data_ptr(),
        start if counts else None,
        None if as_bits else start + counts,
        start if as_bits else None,
        part * max(1, _PART // part),
        torch.get_num_threads(),
    )


def place(values: Tensor, bits: Tensor, n: int) -> Tensor:
    """(n,) with the values, of 2 or 4 bytes, where the bits are set."""
    dense = torch.empty(n, dtype=values.dtype, device=values.device)
    firsts = torch.empty(-(-n // _PART), dtype=torch.int64, device=values.device)
    arguments = (values.data_ptr(), values.element_size(), n, bits.data_ptr(), firsts.data_ptr(), dense.data_ptr())
    _function("place")(*arguments, torch.get_num_threads())
    return dense


def digest(flat: Tensor) -> int:
    """A number that tells whether any of the bytes of ``flat`` have changed."""
    return int(_function("digest")(flat.data_ptr(), flat.nbytes))


@functools.cache
def _function(name: str) -> ctypes._NamedFuncPointer:
    address, integer, size, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
    types = {
        "quantize": [
            *[address, integer, size],
            *[address, address, size, size],
            *[integer, number, number, address, address, integer],
        ],
        "dequantize": [
            *[address, address, integer, size, integer, number],
            *[address, address, size, size, number, number, integer],
            *[address, integer],
        ],
        "mark": [address, integer, size, number, number, address, integer],
        "keep": [address, integer, size, address, address, integer],
        "select": [
            *[address, integer, size, size, size, size],
            *[address, address, address, address, size, integer],
        ],
        "place": [address, integer, size, address, address, address, integer],
        "digest": [address, size],
    }
    found = shared_object()
    assert found is not None
    function = getattr(found, f"dropit_{name}")
    function.argtypes, function.restype = types[name], ctypes.c_uint64 if name == "digest" else None
    return function  # type: ignore[no-any-return]


@functools.cache
def shared_object() -> ctypes.CDLL | None:
    """What was compiled of ``native.c``; None where it cannot be, or is not to be."""
    global _loaded
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if os.environ.get("DROPIT_NATIVE") == "0" or compiler is None or sys.byteorder != "little":
        return None
    try:
        with tempfile.TemporaryDirectory(prefix="dropit", ignore_cleanup_errors=True) as spare:
            _loaded = ctypes.CDLL(str(_compiled(compiler, _directory() or Path(spare))))
            _share_threads(_loaded)
    except (OSError, subprocess.SubprocessError) as error:
        _log.debug("native.c was not compiled, and PyTorch quantizes on the CPU: %s", error)
    return _loaded


def _share_threads(library: ctypes.CDLL) -> None:
    """Have it work by the threads that PyTorch has started, where PyTorch has been built with OpenMP."""
    pytorch = ctypes.CDLL(torch._C.__file__)  # and what that was linked to
    if hasattr(pytorch, "GOMP_parallel"):
        library.dropit_share_threads(ctypes.cast(pytorch.GOMP_parallel, ctypes.c_void_p))


def _directory() -> Path | None:
    """Where libraries are kept; None where that cannot be written to."""
    try:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dropit")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter of a user without a home
        return None
    return directory if os.access(directory, os.W_OK) else None


def _compiled(compiler: str, directory: Path) -> Path:
    """Compile it into ``directory``, unless that was done before for such a processor. Returns the library's path."""
    parts = (_SOURCE.read_text(encoding="utf-8"), compiler, *_FLAGS, platform.machine(), _processor())
    name = hashlib.blake2b("\n".join(parts).encode(), digest_size=12).hexdigest()
    path = directory / f"native-{name}.so"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=directory) as workplace:  # from where it is moved when it is whole
        made = Path(workplace, path.name)
        command = [*compiler.split(), *_FLAGS, str(_SOURCE), "-o", str(made)]
        for options in (["-march=native"], []):  # which not all compilers have
            done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=False)
            if done.returncode == 0:
                break
        done.check_returncode()
        made.replace(path)
    return path


def _processor() -> str:
    """What tells this processor from others that share the user's files."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
