"""Huge pages for the weights of a session on the CPU.

Decoding reads every weight once per token. In pages of 4 kB the processor looks up a translation for each of them and
its prefetcher stops at each border; in pages of 2 MB it does not. Linux gives such pages to those who ask (the setting
"madvise", the default of most distributions), and ONNX Runtime does not ask.
"""

from __future__ import annotations

import ctypes
import logging
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_HUGE = 2 << 20  # bytes of a huge page on x86-64 and on arm64 with small pages
_ADVISE, _COLLAPSE = 14, 25  # MADV_HUGEPAGE; MADV_COLLAPSE, Linux 6.1 and newer
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPS = Path("/proc/self/maps")


def use_huge_pages_soon() -> threading.Thread:
    """`use_huge_pages` in a thread of its own: it copies what it moves, and nobody has to wait for that."""
    thread = threading.Thread(target=use_huge_pages, name="onnxpress-pages", daemon=True)
    thread.start()
    return thread


def use_huge_pages() -> int:
    """Asks for huge pages for all private memory of this process that is large enough, and moves it there at once.

    Contents and addresses stay. Does nothing where it cannot be done: another system, switched off by the
    administrator, an old kernel, no free memory in one piece.

    Returns:
        Bytes that were moved or were in huge pages already.
    """
    if not sys.platform.startswith("linux") or not _is_allowed():
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    moved = 0
    for start, end in _private_memory():
        first, last = -(-start // _HUGE) * _HUGE, end // _HUGE * _HUGE
        if last <= first or madvise(first, last - first, _ADVISE):
            continue
        # Page by page: one that cannot be moved ends a call, and would keep back those behind it.
        moved += _HUGE * sum(madvise(page, _HUGE, _COLLAPSE) == 0 for page in range(first, last, _HUGE))
    logger.info("%.0f MB in huge pages", moved / 1e6)
    return moved


def _is_allowed() -> bool:
    try:
        return "[never]" not in _SETTING.read_text()
    except OSError:
        return False


def _private_memory() -> Iterator[tuple[int, int]]:
    """Start and end of each writable mapping that belongs to no file."""
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0\s*(\[heap\])?$", line)
        if found is not None:
            yield int(found[1], 16), int(found[2], 16)
