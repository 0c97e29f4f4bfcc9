"""The main job on a real model, as a page of results."""

from __future__ import annotations

from typing import Any

from .. import api
from ..progress import Progress
from ..session import Session
from ..views.report import absorbed_json, absorbed_text, next_tokens_text, verdict_json

CONTEXT = (
    "Field notes, 14 March. The lighthouse on Skarv island is kept by Ingrid Solberg, who has a grey parrot "
    "called Magnus. Every evening at six she climbs the tower, lights the lamp, and reads the weather report aloud "
    "to the parrot."
)
QUERY = " The lighthouse stands on the island of"

NEXT = """what to try next
  blockkit check gemma3-270m --only 'mlp.down_proj'      why one parameter alone is not enough
  blockkit plan gemma3-270m --strategy paper             the construction of the paper's Theorem 1
  blockkit absorb --model gemma3-270m --context "..." --query "..." --tokens all --out patch.safetensors
  blockkit apply --model gemma3-270m --patch patch.safetensors --out edited/"""


def run_demo(session: Session, progress: Progress) -> tuple[dict[str, Any], str]:
    """Judges the model's blocks, plans, absorbs a context, and shows what the edited model says.

    Returns:
        The JSON result and the page of text.
    """
    architecture = session.model.architecture
    verdict = api.check(architecture)
    found = session.absorb(CONTEXT, QUERY, progress=progress)
    absorbed, result = found.absorbed, absorbed_json(found, session.backend, session.dtype)
    plan = next(iter(absorbed.plans.values()))
    rows = {
        "with the context": absorbed.contextual[-1],
        "without it": found.reference.without[-1],
        "without it, patched": absorbed.patched[-1],
    }
    parts = [
        f"the context: {CONTEXT}\nthe query:  {QUERY}",
        f"a block of {architecture.name} is {verdict}",
        f"the plan\n{plan}",
        absorbed_text(result),
        f"the most probable next tokens\n{next_tokens_text(session.tokenizer, rows)}",
        NEXT,
    ]
    return {"context": CONTEXT, "query": QUERY, "verdict": verdict_json(verdict), **result}, "\n\n".join(parts)
