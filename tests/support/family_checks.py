"""What `test_families.py` runs in one process on Keras: the float32 logits of checkpoints.

    KERAS_BACKEND=jax python family_checks.py FOLDER NAME ...

For every FOLDER/NAME it writes FOLDER/NAME.npy, the logits for the ids in FOLDER/ids.npy.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def main(folder: Path, names: list[str]) -> None:
    from blockkit.backends.keras import build, load_weights
    from blockkit.checkpoint.model import open_model

    ids = np.load(folder / "ids.npy")[None].astype("int32")
    for name in names:
        source = open_model(folder / name)
        model = build(source.architecture)
        load_weights(model, source)
        np.save(folder / f"{name}.npy", np.asarray(model.predict(ids, verbose=0))[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
