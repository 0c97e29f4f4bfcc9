"""The handbook's table of other programs: patches found in NumPy, run by transformers on the real Gemma 3 270M.

python tests/figures/elsewhere.py [--write]        (or: make elsewhere)

Each strategy absorbs a context in float32 on the reference executor. Its merged weights are put into the model that
`transformers` loads from the same folder, which runs the query alone. Beside that error stand the patch's own, where it
was made, and the recompute floor of transformers: the contextual run with and without a cache.
"""

from __future__ import annotations

import sys

import results
import torch
from conformance import PROMPTS
from transformers import AutoModelForCausalLM

from blockkit.graph.changes import dense
from blockkit.session import Session

STRATEGIES = ("stable", "matrix", "paper", "minimal")
LAST = 4  # tokens of a prompt that are the query
HEAD = ("strategy", "tokens", "no patch", "where it was made", "in transformers", "floor of transformers",
        "in transformers / floor", "same token")  # fmt: skip


def main() -> None:
    session = Session("gemma3-270m", "numpy")
    theirs = AutoModelForCausalLM.from_pretrained(session.model.folder.path, dtype=torch.float32).eval()
    rows = []
    for strategy, tokens in (*((s, "last") for s in STRATEGIES), ("joint", "all")):
        for number, prompt in enumerate(PROMPTS[:2] if "--short" in sys.argv else PROMPTS):
            context, query = split(session, prompt)
            found = session.absorb(context, query, tokens, strategy)
            rows.append((strategy, tokens, number, *elsewhere(session, theirs, found)))
            print(*rows[-1], file=sys.stderr, flush=True)
    table = results.Table.of(HEAD, [line(rows, *key) for key in dict.fromkeys(r[:2] for r in rows)])
    print(table)
    if "--write" in sys.argv:
        results.write("elsewhere", [table], packages=("numpy", "torch", "transformers"))


def split(session: Session, prompt: str) -> tuple[str, str]:
    words = prompt.split(" ")
    return " ".join(words[:-LAST]), " " + " ".join(words[-LAST:])


def elsewhere(session: Session, theirs: torch.nn.Module, found: object) -> tuple[float, float, float, float, bool]:
    """Largest errors of a logit: no patch, where it was made, in transformers; the floor there; the same top token."""
    patch = found.patch  # type: ignore[attr-defined]
    request = found.absorbed.request  # type: ignore[attr-defined]
    ids = torch.tensor([[*request.context.tolist(), *request.query.tolist()]])
    n, served = len(request.context), len(found.absorbed.contextual)  # type: ignore[attr-defined]
    query, positions = ids[:, n:], torch.arange(n, ids.shape[1])[None]
    with torch.no_grad():
        wanted = theirs(ids).logits[0, -served:]
        past = theirs(ids[:, :n], use_cache=True).past_key_values
        cached = theirs(query, past_key_values=past, position_ids=positions).logits[0, -served:]
        without = theirs(query, position_ids=positions).logits[0, -served:]
        merged = {slot: dense(session.model.parameter(slot), c) for slot, c in patch.changes.items()}
        state, new = theirs.state_dict(), session.model.rewritten(merged)
        kept = {name: state[name].clone() for name in new}
        for name, value in new.items():
            state[name].copy_(torch.as_tensor(value))
        own = theirs(query, position_ids=positions).logits[0, -served:]
        for name, value in kept.items():
            state[name].copy_(value)
    off = [float((a - wanted).abs().max()) for a in (without, own, cached)]
    same = bool((own.argmax(-1) == wanted.argmax(-1)).all())
    return off[0], found.absorbed.measured.linf, off[1], off[2], same  # type: ignore[attr-defined]


def line(rows: list[tuple], strategy: str, tokens: str) -> tuple[str, ...]:
    mine = [r[3:] for r in rows if r[:2] == (strategy, tokens)]
    ratio = max(r[2] / r[3] for r in mine)
    return (strategy, tokens, f"{min(r[0] for r in mine):.1f}", *(f"{max(r[i] for r in mine):.1e}" for i in (1, 2, 3)),
            f"{ratio:.3g}", f"{sum(r[4] for r in mine)}/{len(mine)}")  # fmt: skip


if __name__ == "__main__":
    main()
