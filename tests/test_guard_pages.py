"""The kernels for CPUs touch nothing outside of what they are given."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.backends import BACKENDS, INTERPRETED
from support.guard_pages import Memory, libc
from support.marks import DTYPES, name_of

TESTS = Path(__file__).parent
INSTRUCTION_SETS = [backend.isa for backend in BACKENDS.values() if backend.isa]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or INTERPRETED, reason="needs Linux, and kernels for CPUs"
)


def readable(address: int) -> bool:
    """Whether there is a byte, as the system says without a crash."""
    end, other = os.pipe()
    try:
        return libc.write(other, ctypes.c_void_p(address), 1) == 1
    finally:
        os.close(end)
        os.close(other)


@pytest.mark.parametrize("layout", ("vector", "rows", "columns", "gaps"))
@pytest.mark.parametrize("dtype", (*DTYPES, torch.int64, torch.bool), ids=name_of)
def test_what_lies_beside_a_tensor(dtype, layout):
    values = torch.arange(35).view(5, 7).to(dtype)
    given = {"vector": values.flatten(), "rows": values, "columns": values.t()}
    values = given.get(layout, values[::2, 1::2])
    for at_end, shift in ((True, 0), (False, 0), (False, 3)):
        memory = Memory(at_end, shift)
        got = memory.copy(values)
        assert torch.equal(got, values) and got.stride() == values.stride()
        first, item = got.data_ptr(), got.element_size()
        last = first + sum((n - 1) * s for n, s in zip(got.shape, got.stride(), strict=True)) * item
        assert readable(first) and readable(last + item - 1)
        if at_end:
            assert not readable(last + item)
        else:
            assert not readable(first - shift * item - 1)
        memory.free()
        assert not readable(first)


@pytest.mark.skipif(not INSTRUCTION_SETS, reason="there are no kernels for CPUs here")
def test_nothing_is_touched_outside_the_tensors(pytestconfig):
    """All operators, by every instruction set of this machine; values are checked on the way."""
    share, cases = ("1", 1600) if pytestconfig.getoption("long") else ("17", 93)
    command = [sys.executable, "-m", "native.check", "--share", share, "--isa", *INSTRUCTION_SETS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS)
    told = done.stdout.strip().splitlines()
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        pytest.fail(
            f"{name} within {told[-1] if told else 'the first case'}\n{done.stderr[-2000:]}"
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert told[-1] == f"{cases * len(INSTRUCTION_SETS)} cases"
