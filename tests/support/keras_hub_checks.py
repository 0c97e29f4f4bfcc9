"""What `test_keras_hub.py` runs in a process of its own for each Keras backend.

    python keras_hub_checks.py FOLDER CHECK[:FAMILY] ...

The environment's KERAS_BACKEND says which backend; the last line printed is a JSON object with what each
check measured, or the traceback it ended with. A framework is imported only inside the checks.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, CONTEXT, QUERY, WINDOW = 61, 12, 7, 6
SIZES = {
    "vocabulary_size": VOCABULARY, "num_layers": 2, "num_query_heads": 4, "num_key_value_heads": 2,
    "hidden_dim": 32, "intermediate_dim": 48,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {  # of the backbone, beside SIZES; heads are not as wide as the stream asks
    "Gemma3": {
        "num_layers": 6, "image_size": 16, "head_dim": 12, "use_sliding_window_attention": True,
        "sliding_window_size": WINDOW, "use_post_ffw_norm": True, "use_post_attention_norm": True,
        "final_logit_soft_cap": 30.0, "attention_logit_soft_cap": 50.0, "global_rope_scaling_factor": 8.0,
    },
    "Llama3": {
        "rope_max_wavelength": 500000, "rope_frequency_adjustment_factor": 8.0, "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0, "rope_pretraining_sequence_length": 32,
    },
    "Mistral": {"sliding_window": WINDOW, "head_dim": 12},
    "Mixtral": {"num_experts": 4, "top_k": 2, "sliding_window": WINDOW},
    "Qwen3": {"sliding_window_size": WINDOW, "head_dim": 12, "tie_word_embeddings": False},
}  # fmt: skip


def build(family: str, seed: int = 3, **settings: Any) -> Any:
    """A small causal language model with random weights, large enough for every part to matter."""
    import keras_hub

    models = keras_hub.models
    backbone = getattr(models, f"{family}Backbone")(**{**SIZES, **FAMILIES.get(family, {}), **settings})
    rng = np.random.default_rng(seed)
    for v in backbone.weights:
        shape = tuple(v.shape)
        if len(shape) == 1:
            v.assign(stored(v).astype("float32") + 0.3 * rng.standard_normal(shape))
        else:
            spread = 0.3 if "embeddings" in v.path else 1.3 * float(np.prod(shape[-2:-1])) ** -0.5
            v.assign(spread * rng.standard_normal(shape))
    model = getattr(models, f"{family}CausalLM")(backbone=backbone, preprocessor=None)
    model.compile(sampler="greedy")
    return model


def ids(seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """A context `[1, n]` and a query `[1, q]`."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, VOCABULARY, (1, CONTEXT)), rng.integers(0, VOCABULARY, (1, QUERY))


def stored(variable: Any) -> np.ndarray:
    import keras

    return np.array(keras.ops.convert_to_numpy(variable))


def all_bytes(model: Any) -> list[bytes]:
    return [stored(v).tobytes() for v in model.weights]


def next_token(model: Any, prompt: np.ndarray) -> int:
    """The first token that the model's own `generate` adds."""
    count = prompt.shape[1]
    rows, mask = np.zeros((1, CONTEXT + QUERY + 2), "int32"), np.zeros((1, CONTEXT + QUERY + 2), "int32")
    rows[0, :count], mask[0, :count] = prompt[0], 1
    given: dict[str, Any] = {"token_ids": rows, "padding_mask": mask.astype(bool)}
    if hasattr(model.backbone, "vision_encoder"):  # without a preprocessor, its generate wants no images, said so
        given["images"] = np.zeros((1, 0, 16, 16, 3), "float32")
    found = model.generate(given, stop_token_ids=None)
    return int(found["token_ids"][0, count])


def message(function: Callable[[], Any]) -> str:
    """What a refusal says; empty where nothing was refused."""
    from blockkit.errors import BadInput

    try:
        function()
    except BadInput as error:
        return str(error)
    return ""


def largest(a: np.ndarray, b: np.ndarray) -> float:
    """L-infinity distance, relative to the largest value of `b`."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def prompt_that_turns(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """A context and a query after which the model says something else than after the query alone."""
    from blockkit.backends.keras.hub import own_logits

    for seed in range(50):
        context, query = ids(seed)
        alone, behind = (own_logits(model, x[0])[-1] for x in (query, np.concatenate([context, query], axis=1)))
        if alone.argmax() != behind.argmax():
            return context, query
    raise AssertionError("no prompt tells the edited model from the plain one")


def check_family(family: str, folder: Path) -> dict[str, Any]:
    """Judged, absorbed, applied, generated with, restored."""
    import blockkit as bk
    from blockkit.backends.keras.hub import absorb, open_hub, own_logits

    model = build(family)
    context, query = prompt_that_turns(model)
    everything = np.concatenate([context, query], axis=1)
    before, wanted = all_bytes(model), own_logits(model, everything[0])[-1:]
    spoken = [next_token(model, query), next_token(model, everything)]  # compiled before anything is edited
    patch = absorb(model, context, query)
    untouched = all_bytes(model) == before
    receipt = patch.apply(model)
    edited, saying = own_logits(model, query[0])[-1:], next_token(model, query)
    patch.remove(model)
    return {
        "patchable": bk.check(model).patchable,
        "kinds": list(open_hub(model, everything.size).architecture.layers.pattern),
        "untouched": untouched,
        "unpatched": largest(own_logits(model, query[0])[-1:], wanted),
        "patched": largest(edited, wanted),
        "measured": patch.measured["linf"] / float(np.abs(wanted).max()),
        "spoken": [*spoken, saying, next_token(model, query)],
        "changed": list(patch.changes), "transposed": list(patch.transposed), "exact": receipt.exact,
        "positions": patch.position_ids[0].tolist(),
        "restored": all_bytes(model) == before,
    }  # fmt: skip


def check_all_tokens(family: str, folder: Path) -> dict[str, Any]:
    """One static patch for every token of the query, from a file."""
    from blockkit import Patch
    from blockkit.backends.keras.hub import absorb, own_logits

    model, (context, query) = build(family), ids()
    wanted = own_logits(model, np.concatenate([context, query], axis=1)[0])[-QUERY:]
    absorb(model, context, query, strategy="matrix", tokens="all").save(folder / "all.safetensors")
    plain = own_logits(model, query[0])
    with Patch.load(folder / "all.safetensors").applied(model):
        edited = own_logits(model, query[0])
    return {"unpatched": largest(plain, wanted), "patched": largest(edited, wanted)}


def check_sharing(family: str, folder: Path) -> dict[str, Any]:
    """A variable that changes is seen by an executor that was opened before, which holds no weight of its own."""
    from blockkit.absorbing.run import logits_of, run_stream
    from blockkit.backends.keras.hub import open_hub, own_logits

    model, (_, query) = build(family), ids()
    executor = open_hub(model)

    def mine() -> np.ndarray:
        return logits_of(executor, run_stream(executor, query[0], np.arange(QUERY)))

    before = mine()
    for variable in model.backbone.weights:
        variable.assign(stored(variable) * 1.05)
    return {
        "moved": largest(before, mine()),
        "apart": largest(mine(), own_logits(model, query[0])),
        "variables": all(
            any(s.variable is v for v in model.weights)
            for s in executor.parameters.stored.values()  # type: ignore[attr-defined]
        ),
    }


def check_editing(family: str, folder: Path) -> dict[str, Any]:
    """Two patches in the wrong order, an exception while one is applied, and one inside `with`."""
    import blockkit as bk
    from blockkit.backends.keras import hub_editing
    from blockkit.backends.keras.hub import absorb

    model = build(family)
    before = all_bytes(model)
    first = absorb(model, *ids(1))
    first.apply(model)
    between = all_bytes(model)
    second = absorb(model, *ids(2))
    messages = {"twice": message(lambda: first.apply(model))}
    second.apply(model)
    messages["below"] = message(lambda: first.remove(model))
    second.remove(model)
    found = {"between": all_bytes(model) == between}
    first.remove(model)
    found["restored"] = all_bytes(model) == before
    messages["gone"] = message(lambda: first.remove(model))
    first.save(folder / "first.safetensors")
    again = bk.Patch.load(folder / "first.safetensors")  # as a notebook's cell has it that runs twice
    first.apply(model)
    messages["again"] = message(lambda: again.apply(model))
    again.remove(model)
    found["reloaded"] = all_bytes(model) == before
    first.apply(model)
    kept = [np.array(v) for v in model.get_weights()]
    model.set_weights([v + 1 for v in kept])
    others = all_bytes(model)
    messages["overwritten"] = message(lambda: first.remove(model))
    found["left"] = all_bytes(model) == others
    messages["forgotten"] = message(lambda: first.remove(model))
    model = build(family)
    merge, calls = hub_editing._merge, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:  # the first parameter is changed already
            raise KeyboardInterrupt
        return merge(*args)

    hub_editing._merge = failing  # type: ignore[assignment]
    try:
        first.apply(model)
    except KeyboardInterrupt:
        found["after_interrupt"] = all_bytes(model) == before and len(calls) == 2
    hub_editing._merge = merge
    try:
        with first.applied(model):
            found["inside"] = all_bytes(model) != before
            raise ZeroDivisionError
    except ZeroDivisionError:
        found["after_with"] = all_bytes(model) == before
    return {**found, "messages": messages}


def check_dtype(family: str, folder: Path) -> dict[str, Any]:
    """A model in bfloat16 is patched, and restored to the last bit."""
    from blockkit.backends.keras.hub import absorb, own_logits

    model, (context, query) = build(family, dtype="bfloat16", num_layers=1), ids()
    before = all_bytes(model)
    wanted = own_logits(model, np.concatenate([context, query], axis=1)[0])[-1:]
    plain, patch = own_logits(model, query[0])[-1:], absorb(model, context, query)
    receipt = patch.apply(model)
    edited = own_logits(model, query[0])[-1:]
    patch.remove(model)
    dtypes = sorted({p.dtype for p in receipt.parameters})
    return {
        "unpatched": largest(plain, wanted), "patched": largest(edited, wanted), "dtypes": dtypes,
        "exact": receipt.exact, "restored": all_bytes(model) == before,
    }  # fmt: skip


def check_refusals(family: str, folder: Path) -> dict[str, Any]:
    """The messages of what cannot be patched, of wrong ids, and of wrong models."""
    import keras
    import keras_hub

    import blockkit as bk
    from blockkit.backends.keras.hub import absorb

    few = {"num_layers": 1}
    model, (context, query) = build(family, **few), ids()
    patch, before = absorb(model, context, query), all_bytes(model)
    other, narrow, foreign = build(family, 4, **few), build(family, intermediate_dim=40, **few), build("Mistral", **few)
    gpt2 = keras_hub.models.GPT2CausalLM(
        backbone=keras_hub.models.GPT2Backbone(61, 1, 2, 16, 24, max_sequence_length=32), preprocessor=None
    )
    plain = keras.Sequential([keras.layers.Dense(3)])
    odd, elsewhere = build(family, **few), build(family, **few)
    table = elsewhere.backbone.token_embedding.embeddings
    table.assign(table * 1.01)

    def silu(x: Any) -> Any:
        return keras.ops.relu(x)

    odd.backbone.transformer_layers[0].activation = silu
    quantised = build(family, **few)
    quantised.quantize("int8")
    wrong = {
        "other_weights": lambda: patch.apply(other),
        "other_embedding": lambda: patch.apply(elsewhere),
        "other_family": lambda: patch.apply(foreign),
        "other_shape": lambda: patch.apply(narrow),
        "factored": lambda: patch.apply(model, merge=False),
        "each": lambda: absorb(model, context, query, tokens="each"),
        "flat": lambda: absorb(model, context[0], query),
        "floats": lambda: absorb(model, context * 1.5, query),
        "empty": lambda: absorb(model, context, query[:, :0]),
        "vocabulary": lambda: absorb(model, context + VOCABULARY, query),
        "architecture": lambda: bk.check(gpt2),
        "no_model": lambda: bk.check(plain),
        "not_what_it_says": lambda: bk.check(odd),
        "quantised": lambda: bk.check(quantised),
    }
    messages = {name: message(refused) for name, refused in wrong.items()}
    with patch.applied(elsewhere, allow_other_weights=True) as receipt:
        claim = receipt.exact, receipt.validity
    return {"messages": messages, "untouched": all_bytes(model) == before, "claim": claim}


def main(folder: Path, checks: list[str]) -> None:
    found = {}
    for check in checks:
        name, _, family = check.partition(":")
        try:
            found[check] = globals()[f"check_{name}"](family, folder)
        except Exception:
            found[check] = {"error": traceback.format_exc()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
