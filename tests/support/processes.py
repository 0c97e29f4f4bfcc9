"""New Python processes: for a Keras backend each, and for what must not touch the process of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HANGS = 3600.0  # seconds: only a process that would never end takes so long, on however busy a machine
QUIET = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}
SMALL_MODELS = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # most of their time would be the compiler's


def python(*args: str | Path, home: Path, **settings: str) -> str:
    """The output of a new Python, which sees no accelerator and no other Keras configuration than ours."""
    env = {**os.environ, **QUIET, "KERAS_HOME": str(home), **settings}
    done = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
