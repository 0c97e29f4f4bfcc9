"""Speed and memory of the in-place backend on the real Gemma 3 270M, 500 tokens of context, float32.

    python tests/figures/bench_in_place.py [--write]        (or: make bench-in-place)

Absorbing (its proof included) is held against one plain contextual forward of the same tokens, a step of a growing
patch and a step of a patched model against a plain step with a cache; all in one process, A B A B ..., best of several.
Peak memory comes from processes of their own (Linux): absorbing against a plain contextual forward. --write puts the
table into the handbook's data.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results

CONTEXT, RUNS, STEPS = 500, 7, 25
HEAD = ("what", "seconds", "against", "seconds", "ratio")
PROSE = "Item {i} of the list is a {w}."


def prepared() -> tuple[Any, Any]:
    """The model and `CONTEXT + 1` ids."""
    import torch
    from transformers import AutoModelForCausalLM

    from blockkit.checkpoint.cache import resolve_model
    from blockkit.checkpoint.tokenizer import load_tokenizer

    folder = resolve_model("gemma3-270m")
    text = " ".join(PROSE.format(i=i, w=w) for i in range(80) for w in ("stone", "river", "cloud"))
    ids = load_tokenizer(folder).encode(text, special=True)[: CONTEXT + 1]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), torch.tensor([ids])


def best(*actions: Callable[[], Any]) -> list[float]:
    """The shortest seconds of each, taken in turn."""
    for action in actions:
        action()
    found: list[list[float]] = [[] for _ in actions]
    for _ in range(RUNS):
        for action, seconds in zip(actions, found, strict=True):
            start = time.perf_counter()
            action()
            seconds.append(time.perf_counter() - start)
    return [min(seconds) for seconds in found]


def absorbing() -> dict[str, float]:
    import torch

    from blockkit.backends.pytorch import absorb

    model, ids = prepared()
    context, query = ids[:, :CONTEXT], ids[:, CONTEXT:]

    def forward() -> Any:
        with torch.no_grad():
            return model(ids, use_cache=False, logits_to_keep=1)

    def whole() -> Any:
        with torch.no_grad():
            return model(ids, use_cache=False)

    def alone() -> Any:
        with torch.no_grad():
            return model(query, use_cache=False)

    plain, every, short, stable, matrix = best(
        forward, whole, alone, lambda: absorb(model, context, query),
        lambda: absorb(model, context, query, strategy="matrix"),
    )  # fmt: skip
    return {
        "forward": plain, "forward with all logits": every, "query alone": short, "absorb": stable,
        "absorb, matrix": matrix,
    }  # fmt: skip


def decoding() -> dict[str, float]:
    import torch

    from blockkit.backends.pytorch import absorb, generate

    model, ids = prepared()
    patch = absorb(model, ids[:, :CONTEXT], ids[:, CONTEXT:])

    def steps() -> float:
        """Seconds of a step: the shortest of several."""
        with torch.no_grad():
            past = model(ids, use_cache=True, logits_to_keep=1).past_key_values
            found = []
            for _ in range(STEPS):
                start = time.perf_counter()
                past = model(ids[:, -1:], past_key_values=past, use_cache=True).past_key_values
                found.append(time.perf_counter() - start)
        return min(found)

    plain = steps()
    growing = generate(model, ids, tokens="all", max_new_tokens=STEPS, compare_logits=False).finish()
    growth = min(sum(token.seconds) for token in growing.tokens[1:-1])
    with patch.applied(model):
        patched = steps()
    plain = min(plain, steps())
    return {"step": plain, "growth step": growth, "patched step": patched}


def peak(absorbed: bool) -> dict[str, float]:
    """The most bytes that are resident while absorbing, or in a plain forward."""
    import torch

    from blockkit.backends.pytorch import absorb

    model, ids = prepared()
    context, query = ids[:, :CONTEXT], ids[:, CONTEXT:]
    with torch.no_grad():
        model(ids[:, :20], use_cache=False, logits_to_keep=1)
        absorb(model, context[:, :20], query)  # what is traced and imported once
    Path("/proc/self/clear_refs").write_text("5")
    with torch.no_grad():
        if absorbed:
            absorb(model, context, query)
        else:
            model(ids, use_cache=False, logits_to_keep=1)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"weights": weights, "peak": _status("VmHWM")}


def _status(name: str) -> int:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(name))
    return int(line.split()[1]) * 1024


def alone(part: str) -> Any:
    """The part's figures, from a process of its own."""
    done = subprocess.run([sys.executable, __file__, part], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:] not in ([], ["--write"]):
        parts = {
            "absorbing": absorbing,
            "decoding": decoding,
            "forward": lambda: peak(False),
            "peak": lambda: peak(True),
        }
        print(json.dumps(parts[sys.argv[1]]()))
        return
    speed, steps, forward, absorbed = (alone(part) for part in ("absorbing", "decoding", "forward", "peak"))
    rows = [
        ("absorb, last token", speed["absorb"], "contextual forward", speed["forward"]),
        ("absorb, `matrix`", speed["absorb, matrix"], "contextual forward", speed["forward"]),
        ("absorb, last token", speed["absorb"], "contextual forward, all logits", speed["forward with all logits"]),
        ("query alone, a plain run", speed["query alone"], "contextual forward", speed["forward"]),
        ("growth step", steps["growth step"], "plain cached step", steps["step"]),
        ("patched step, factored", steps["patched step"], "plain cached step", steps["step"]),
    ]
    shown = [(what, f"{mine:.3f}", other, f"{its:.3f}", f"{mine / its:.2f}") for what, mine, other, its in rows]
    ratio = absorbed["peak"] / forward["peak"]
    memory = (
        f"Peak memory of absorbing: {absorbed['peak'] / 1e9:.2f} GB, of a plain contextual forward "
        f"{forward['peak'] / 1e9:.2f} GB: ratio {ratio:.2f}; weights {absorbed['weights'] / 1e9:.2f} GB."
    )
    table = results.Table.of(HEAD, shown)
    print(f"{table}\n\n{memory}")
    if "--write" in sys.argv:
        results.write("speed-in-place", [table], [memory], ("torch", "transformers"))


if __name__ == "__main__":
    main()
