"""What `test_keras_model.py` runs in a process of its own for each Keras backend.

    python keras_checks.py FOLDER CHECK[:FAMILY] ...

The environment's KERAS_BACKEND says which backend; the last line printed is a JSON object with what each
check measured, or the traceback it ended with. A framework is imported only inside the checks.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

BATCH, TOKENS, VOCABULARY = 3, 9, 37

CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3_text", "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
        "query_pre_attn_scalar": 9, "sliding_window": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "llama": {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
    },
}  # fmt: skip
BLOCKS = {"gemma3": ["local_0", "global_1", "local_2"], "llama": ["block_0", "block_1"], "gpt2": ["block_0", "block_1"]}


def write_checkpoint(family: str, folder: Path) -> None:
    """A random checkpoint in the Hugging Face layout, made without any framework."""
    from safetensors.numpy import save_file

    from blockkit.checkpoint.model import from_config, slots

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[family]), encoding="utf-8")
    architecture, conventions = from_config(CONFIGS[family], family)
    rng = np.random.default_rng(11)
    tensors = {}
    for slot, shape in slots(architecture):
        parts = slot.split(".")
        layer = parts[1] if parts[0] == "layers" else ""
        entry = conventions["tensors"][".".join(["layers", "*", *parts[2:]]) if layer else slot]
        name, turned = (entry, False) if isinstance(entry, str) else (entry["tensor"], entry["transpose"])
        value = rng.standard_normal(shape) * (0.5 if len(shape) == 1 else shape[-1] ** -0.5)
        if len(shape) == 1 and family != "gemma3" and not slot.endswith("bias"):
            value += 1
        tensors[name.replace("*", layer, 1)] = np.ascontiguousarray(value.T if turned else value, dtype=np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def tokens(seed: int, batch: int = BATCH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, TOKENS)).astype("int32")


def filled(family: str, folder: Path) -> tuple[Any, Any]:
    """The checkpoint, and a Keras model with its weights."""
    from blockkit.backends.keras import build, load_weights
    from blockkit.checkpoint.model import open_model

    source = open_model(folder / family)
    model = build(source.architecture)
    load_weights(model, source)
    return source, model


def values(tensor: Any) -> np.ndarray:
    from keras import ops

    return np.asarray(ops.convert_to_numpy(tensor))


def check_forward(family: str, folder: Path) -> dict[str, Any]:
    """The summary, the largest difference from the reference in float32, and the saved file."""
    source, model = filled(family, folder)
    from blockkit.absorbing.executor import reference
    from blockkit.absorbing.run import logits_of, run_stream
    from blockkit.backends.keras import executor

    ids = tokens(1)
    offsets = np.arange(BATCH, dtype="int32")[:, None] * 5
    positions = np.arange(TOKENS, dtype="int32") + offsets * (np.arange(TOKENS) >= 4)  # gaps: rotary sees no offset
    oracle, own = reference(source, "float32"), executor(model)
    logits, placed = values(model(ids)), values(model(ids, positions=positions))
    assert logits.shape == placed.shape == (BATCH, TOKENS, VOCABULARY) and logits.dtype == np.float32
    apart = {"plain": 0.0, "positions": 0.0, "executor": 0.0, "positions_matter": 0.0}
    for i in range(BATCH):
        at = np.arange(TOKENS)
        wanted = logits_of(oracle, run_stream(oracle, ids[i], at))
        moved = logits_of(oracle, run_stream(oracle, ids[i], positions[i]))
        again = logits_of(own, run_stream(own, ids[i], at))
        pairs = {"plain": (logits[i], wanted), "positions": (placed[i], moved), "executor": (again, wanted)}
        pairs["positions_matter"] = (logits[i], moved)
        apart = {k: max(apart[k], float(np.abs(a - b).max())) for k, (a, b) in pairs.items()}
    lines: list[str] = []
    model.summary(print_fn=lambda text, **_: lines.append(str(text)), line_length=100)
    model.save(folder / f"{family}.keras")
    np.save(folder / f"{family}.npy", logits)
    count = sum(int(np.prod(w.shape)) for w in model.weights)
    return {
        "apart": apart, "size": float(np.abs(logits).max()), "summary": "\n".join(lines), "parameters": count,
        "stored": sum(int(np.prod(s)) for s in source.folder.shapes.values()),
    }  # fmt: skip


def check_load(family: str, folder: Path) -> dict[str, Any]:
    """The saved file, opened in this new process by Keras itself."""
    import keras

    import blockkit.backends.keras  # noqa: F401  (registers the model's class)

    model = keras.saving.load_model(folder / f"{family}.keras")
    logits = values(model(tokens(1)))
    return {
        "equal": np.array_equal(logits, np.load(folder / f"{family}.npy")),
        "name": model.architecture.name,
        "slots": sorted(model.slots),
        "dtype": str(logits.dtype),
    }


def check_train(family: str, folder: Path) -> dict[str, Any]:
    """Two steps on the same batch, then an epoch over an array whose last batch is smaller."""
    import keras

    _, model = filled(family, folder)
    before = {slot: values(v).copy() for slot, v in model.slots.items()}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(1e-2), loss=loss)
    ids, targets, more, wanted = tokens(1), tokens(2), tokens(3, 5), tokens(4, 5)
    evaluated = float(model.evaluate(more, wanted, batch_size=2, verbose=0))  # batches of 2, 2 and 1
    losses = [float(model.train_on_batch(ids, targets)) for _ in range(2)]
    after = {slot: values(v).copy() for slot, v in model.slots.items()}
    fitted = model.fit(more, wanted, batch_size=2, epochs=1, verbose=0).history["loss"]
    return {
        "losses": losses,
        "expected": cross_entropy(family, folder, ids, targets),
        "evaluated": [evaluated, cross_entropy(family, folder, more, wanted)],
        "finite": all(bool(np.isfinite(values(v)).all()) for v in model.slots.values()),
        "unmoved": sorted(slot for slot in before if np.array_equal(before[slot], after[slot])),
        "unmoved_by_fit": sorted(s for s, v in model.slots.items() if np.array_equal(values(v), after[s])),
        "fitted": [float(x) for x in fitted],
        "predicted": list(model.predict(more, batch_size=2, verbose=0).shape),
    }


def check_unknown_length(family: str, folder: Path) -> dict[str, Any]:
    """What is said of sequences whose length is not known before the model runs: TensorFlow's data sets alone."""
    import keras
    import tensorflow as tf

    _, model = filled(family, folder)
    model.compile(optimizer="sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    spec = tf.TensorSpec((None, None), tf.int32)
    rows = tf.data.Dataset.from_generator(lambda: [(tokens(1), tokens(2))], output_signature=(spec, spec))
    try:
        model.fit(rows, epochs=1, verbose=0)
    except Exception as error:
        return {"kind": type(error).__name__, "message": str(error)}
    return {"kind": "", "message": ""}


def check_shared(family: str, folder: Path) -> dict[str, Any]:
    """A matrix that all layers share is one variable: counted, trained and saved once."""
    from dataclasses import replace

    import keras

    from blockkit.backends.keras import build
    from blockkit.checkpoint.model import open_model

    plain = open_model(folder / family).architecture
    blocks = {k: replace(b, tied=("mlp.down_proj",)) for k, b in plain.blocks.items()}
    model = build(replace(plain, blocks=blocks))
    separate = build(plain)
    logits = values(model(tokens(1)))
    model.save(folder / "shared.keras")
    again = keras.saving.load_model(folder / "shared.keras")
    model.compile(optimizer="sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    name = f"shared.{plain.kind_at(0)}.mlp.down_proj"
    before = values(model.slots[name]).copy()
    model.train_on_batch(tokens(1), tokens(2))
    return {
        "slots": [s for s in model.slots if "down_proj" in s],
        "name": name,
        "saved": len(separate.weights) - len(model.weights),
        "equal": np.array_equal(values(again(tokens(1))), logits),
        "moved": not np.array_equal(values(model.slots[name]), before),
    }


def check_dtype(family: str, folder: Path) -> dict[str, Any]:
    """A model in bfloat16 stays so in its file."""
    import keras

    from blockkit.backends.keras import build
    from blockkit.checkpoint.model import open_model

    model = build(open_model(folder / family).architecture, "bfloat16")
    model.save(folder / "narrow.keras")
    again = keras.saving.load_model(folder / "narrow.keras")
    return {
        "compute": again.compute_dtype,
        "weights": sorted({str(w.dtype) for w in again.weights}),
        "logits": str(keras.backend.standardize_dtype(again(tokens(1)).dtype)),
    }


def cross_entropy(family: str, folder: Path, ids: np.ndarray, targets: np.ndarray) -> float:
    """The mean loss by the reference executor, in float64."""
    from blockkit.absorbing.executor import reference
    from blockkit.absorbing.run import logits_of, run_stream
    from blockkit.checkpoint.model import open_model

    oracle, total = reference(open_model(folder / family), "float64"), []
    for row, wanted in zip(ids, targets, strict=True):
        logits = logits_of(oracle, run_stream(oracle, row, np.arange(TOKENS)))
        chosen = logits[np.arange(TOKENS), wanted]
        total.append(np.log(np.exp(logits).sum(axis=-1)) - chosen)
    return float(np.mean(total))


def check_wrong_backend(family: str, folder: Path) -> dict[str, Any]:
    """The messages of the openers of the backends that Keras is not running on."""
    from blockkit.backends import keras as kit
    from blockkit.checkpoint.model import open_model
    from blockkit.errors import BadInput

    model, messages = open_model(folder / family), {}
    for backend in ("jax", "tensorflow", "torch"):
        try:
            getattr(kit, f"open_{backend}")(model)
        except BadInput as error:
            messages[backend] = str(error)
    return {"refused": messages}


def check_environment(family: str, folder: Path) -> dict[str, Any]:
    """What importing the backends changes in the environment: nothing of ours."""
    before = dict(os.environ)
    import keras  # what Keras and its backend change is theirs

    theirs = dict(os.environ)
    import blockkit.backends.keras  # noqa: F401

    return {
        "ours": sorted(k for k in theirs.keys() | os.environ.keys() if theirs.get(k) != os.environ.get(k)),
        "selector": before.get("KERAS_BACKEND") == os.environ.get("KERAS_BACKEND"),
        "backend": keras.backend.backend(),
    }


def main(folder: Path, checks: list[str]) -> None:
    found = {}
    for check in checks:
        name, _, family = check.partition(":")
        try:
            found[check] = globals()[f"check_{name}"](family or "gemma3", folder)
        except Exception:
            found[check] = {"error": traceback.format_exc()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
