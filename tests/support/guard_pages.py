"""Tensors beside pages that nobody may touch: an access outside of one ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
PRIVATE_ANONYMOUS = 0x22  # of Linux, where Python < 3.13 has no mmap.MAP_ANONYMOUS beyond mmap()
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Memory:
    """Tensors whose last element ends where a guard page begins; or whose first one is `shift`
    elements past the end of one."""

    def __init__(self, at_end: bool, shift: int = 0) -> None:
        self.at_end, self.shift = at_end, shift
        self.regions: list[tuple[int, int]] = []

    def copy(self, values: Tensor) -> Tensor:
        """The same values in the same layout; no two elements may share an address."""
        span = 1 + sum((n - 1) * s for n, s in zip(values.shape, values.stride(), strict=True))
        if values.numel() == 0:
            span = 0
        item = values.element_size()
        size, start = span * item, 0 if self.at_end else self.shift * item
        pages = (size + start + PAGE - 1) // PAGE * PAGE + 2 * PAGE
        base = libc.mmap(None, pages, mmap.PROT_READ | mmap.PROT_WRITE, PRIVATE_ANONYMOUS, -1, 0)
        assert base is not None and base != ctypes.c_void_p(-1).value, "no memory"
        self.regions.append((base, pages))
        for guard in (base, base + pages - PAGE):
            assert libc.mprotect(guard, PAGE, 0) == 0, "a page cannot be protected"
        first = base + (pages - PAGE - size if self.at_end else PAGE + start)
        memory = (ctypes.c_char * max(size, 1)).from_address(first)
        flat = torch.frombuffer(memory, dtype=values.dtype, count=span)
        return flat.as_strided(values.shape, values.stride()).copy_(values)

    def free(self) -> None:
        """After which none of its tensors may be used."""
        for base, pages in self.regions:
            libc.munmap(base, pages)
        self.regions.clear()
