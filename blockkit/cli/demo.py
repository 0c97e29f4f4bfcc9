"""The main job on a real model, as a page of results."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import api
from ..absorbing.continuation import agreed, greedy
from ..progress import Progress
from ..session import Session
from ..views.report import absorbed_json, absorbed_text, next_tokens_text, verdict_json

CONTEXT = (
    "Field notes, 14 March. The lighthouse on Skarv island is kept by Ingrid Solberg, who has a grey parrot "
    "called Magnus. Every evening at six she climbs the tower, lights the lamp, and reads the weather report aloud "
    "to the parrot."
)
QUERY = " The lighthouse stands on the island of"
PHRASE = 6  # tokens that each of the three says
ROWS = ("with the context", "without it", "without it, patched")

NEXT = (
    ("check gemma3-270m --only 'mlp.down_proj'", "why one parameter alone is not enough (exit status 1: no)"),
    ("plan gemma3-270m --strategy paper", "the construction of the paper's Theorem 1"),
    (
        "absorb --model gemma3-270m --context 'The dog is called Biscuit.' --query \" The dog's name is\" "
        "--tokens all --out patch.safetensors",
        "a context of your own; --context @FILE reads it from a file",
    ),
    ("show patch.safetensors", "what the patch changes in which layer"),
    ("apply --model gemma3-270m --patch patch.safetensors --out edited", "an ordinary checkpoint with it merged"),
)


def run_demo(session: Session, progress: Progress) -> tuple[dict[str, Any], str]:
    """Absorbs a context, shows what the edited model says, judges the model's blocks, and shows the plan.

    The patch is exact for the query and the phrase that the contextual model continues it with, so that the patched
    model, which sees neither the context nor the phrase, has to say the same.

    Returns:
        The JSON result and the page of text.
    """
    architecture = session.model.architecture
    context = session.tokenizer.encode(CONTEXT, special=True)
    query = session.tokenizer.encode(QUERY, special=False)
    phrase = greedy(session.executor, [*context, *query], PHRASE, progress=progress)
    found = session.absorb_ids(context, [*query, *phrase[:-1]], "all", progress=progress)
    absorbed, result, first = found.absorbed, absorbed_json(found, session.backend, session.dtype), len(query) - 1
    patched = agreed(phrase, absorbed.patched[first:].argmax(-1).tolist())
    patched += greedy(
        session.executor, [*query, *patched], PHRASE - len(patched), len(context), absorbed.overlays, progress
    )  # fmt: skip
    without = greedy(session.executor, query, PHRASE, len(context), progress=progress)
    said = {row: session.tokenizer.decode(ids) for row, ids in zip(ROWS, (phrase, without, patched), strict=True)}
    logits = (absorbed.contextual, found.reference.without, absorbed.patched)
    verdict = api.check(architecture)
    parts = [
        f"the context: {CONTEXT}\nthe query:  {QUERY}",
        f"what the model says next\n{_phrases(said)}\n"
        f"  (the patch is exact for the query and these {PHRASE} tokens; beyond them it promises nothing)",
        f"the most probable first tokens\n"
        f"{next_tokens_text(session.tokenizer, {r: v[first] for r, v in zip(ROWS, logits, strict=True)})}",
        absorbed_text(result),
        f"a block of {architecture.name} is {verdict}",
        f"the plan\n{next(iter(absorbed.plans.values()))}",
        next_steps(),
    ]
    json = {"context": CONTEXT, "query": QUERY, "phrases": said, "verdict": verdict_json(verdict), **result}
    return json, "\n\n".join(parts)


def _phrases(said: Mapping[str, str]) -> str:
    width = max(map(len, said))
    return "\n".join(f"  {row:<{width}}  {text!r}" for row, text in said.items())


def next_steps() -> str:
    """What to try next, as it can be typed here: with the path of the running program where the shell has another."""
    program = shlex.join(running_program())
    lines = [f"  # {why}\n  {program} {command}" for command, why in NEXT]
    return "\n".join(["what to try next", *lines])


def running_program() -> list[str]:
    """The words that start this program again from the shell."""
    own = Path(sys.argv[0])
    if own.name != "blockkit" or not own.is_file():  # `python -c`, or a test
        own = Path(sys.executable).with_name("blockkit")
    if not own.is_file():
        return [sys.executable, "-c", "from blockkit.cli.main import main; main()"]
    found = shutil.which("blockkit")
    return ["blockkit"] if found and Path(found).resolve() == own.resolve() else [str(own.absolute())]
