"""The command line; an error if threads of gloo are left when it has ended.

They abort the process, now and then, if they are at work when Python ends.
"""

import os
import sys
from pathlib import Path

from neuron_explainer.cli import main

status = main(sys.argv[1:])
if Path("/proc/self/task").exists():
    threads = [Path(f"/proc/self/task/{each}/comm") for each in os.listdir("/proc/self/task")]
    names = [path.read_text().strip() for path in threads]
    assert not any("gloo" in name for name in names), names
sys.exit(status)
