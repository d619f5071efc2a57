"""Runs one command to its end and prints what it cost, as JSON: `measure.py LOG COMMAND...`.

The command runs in a process of its own below this one, which is small: the peak that the kernel reports for a child
starts from the memory of whoever forked it. Its output goes to the file LOG. Peak memory is the resident set of the
largest process of the tree, memory-mapped file pages included.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time


def main(log: str, command: list[str]) -> None:
    with open(log, "wb") as output:
        started = time.perf_counter()
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False).returncode
        wall_s = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024
    cost = {"wall_s": wall_s, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_rss_bytes": peak, "returncode": code}
    print(json.dumps(cost))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
