"""What a person or a program sees: results as JSON objects and as pages of text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..absorbing.metrics import probabilities
from ..checkpoint.tokenizer import Tokenizer
from ..comparison import Comparison, Side
from ..design import catalog
from ..graph.changes import Change, MatrixChange
from ..patch.patch import Merged, Patch
from ..patch.peft import Adapter
from ..planner.explain import RULES, Explanation, derivation
from ..planner.plan import Plan
from ..planner.route import Route
from ..planner.verdict import Verdict
from ..session import Result
from ..trials.verify import Verification
from .latex import latex
from .mermaid import mermaid
from .svg import svg


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON: what `check` says without its reasons."""
    return {
        "patchable": verdict.patchable,
        "capacity": verdict.capacity.json(),
        "routes": [route_json(r) for r in verdict.routes],
        "obstructions": [{"node": o.node, "reason": o.reason} for o in verdict.obstructions],
    }


def route_json(route: Route) -> dict[str, Any]:
    return {
        "parameters": list(route.parameters),
        "capacity": route.capacity.json(),
        "conditions": [f"{c.node}: {c}" for c in route.conditions],
        "source": route.source,
    }


def explanation_json(explanation: Explanation) -> dict[str, Any]:
    """The JSON object of `check`."""
    found = verdict_json(explanation.verdict)
    for shown, route in zip(found["routes"], explanation.verdict.routes, strict=True):
        shown["derivation"] = derivation(explanation.graph, route)
    found["blocking"] = list(explanation.blocking)
    found["changes"] = [
        {
            "change": change.text,
            "block": kind,
            "parameters": list(change.parameters),
            "nodes": list(change.nodes),
            "new_numbers": change.numbers.json(),
            "keeps_function": change.keeps_function,
            "then": [route_json(r) for r in change.verdict.routes],
        }
        for kind, change in explanation.listed
    ]
    return found


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """The JSON object of `compare`."""
    return {"designs": [_side_json(comparison.left), _side_json(comparison.right)]}


def _side_json(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "layers": side.layers,
        **verdict_json(side.verdict),
        "strategies": {
            strategy: {
                "parameters": list(cost.route.parameters),
                "capacity": cost.route.capacity.json(),
                "numbers_stored": cost.block.json(),
                "numbers_stored_model": None if cost.model is None else cost.model.json(),
            }
            for strategy, cost in side.costs.items()
        },
    }


def plans_json(plan: Plan) -> dict[str, Any]:
    """The JSON object of `plan`: the plan of the first kind of block, and under `blocks` those of all kinds."""
    return plan_json(plan) | {"blocks": [{"kinds": list(p.blocks), **plan_json(p)} for p in plan.all]}


def plan_json(plan: Plan) -> dict[str, Any]:
    """One plan as JSON."""
    return {
        "strategy": plan.strategy,
        "steps": [
            {
                "parameter": s.parameter,
                "shape": s.shape,
                "law": s.law,
                "formula": s.formula,
                "rank": s.rank,
                "conditions": list(s.conditions),
                "source": s.source,
            }
            for s in plan.steps
        ],
        "numbers_stored": plan.numbers_stored.json(),
    }


def render_plan(plan: Plan, form: str, title: str) -> str:
    """The plan as `latex`, `mermaid` or `svg`, or with the derivation of its route (`explain`).

    Raises:
        BadInput: there are too many components for a drawing.
    """
    if form == "latex":
        return latex(plan, title)
    if form == "mermaid":
        return mermaid(plan)
    if form == "svg":
        return svg(plan, title)
    lines = [str(plan)]
    for one in plan.all:
        lines.append(f"because, for {'/'.join(one.blocks)}" if plan.others else "because")
        lines.extend(f"  {line}" for line in derivation(one.graph, one.route))
    return "\n".join([*lines, *RULES])


def verification_json(found: Verification) -> dict[str, Any]:
    """The JSON object of `verify`; the values at the top are those of the worst block."""
    keys = ("block", "parameters", "relative_linf", "unpatched_relative", "conditions", "reason")

    def shown(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    blocks = [{key: shown(getattr(b, key)) for key in keys} for b in found.blocks]
    top = {key: shown(getattr(found, key)) for key in keys}
    return {"strategy": found.strategy, "tokens": found.tokens, "seed": found.seed, **top, "blocks": blocks}


def catalogue_json() -> list[dict[str, str]]:
    """The entries of `list`."""
    found = []
    for family in catalog.families():
        entry = catalog.entry(family)
        for name in (family, *(f"{family}-{v}" for v in entry.variants)):
            found.append(
                {"name": name, "family": family, "note": entry.architecture.note, "source": entry.architecture.source}
            )
    return found


def catalogue_text(entries: list[dict[str, str]]) -> str:
    """A paragraph for each family: what makes it special, where it is from, and the sizes it comes in."""
    lines = []
    for family in dict.fromkeys(e["family"] for e in entries):
        listed = [e for e in entries if e["family"] == family]
        lines.append(f"{family}: {listed[0]['note']}  ({listed[0]['source']})")
        if sizes := [e["name"] for e in listed if e["name"] != family]:
            lines.append("    " + ", ".join(sizes))
    families = len({e["family"] for e in entries})
    lines.append(f"\n{len(entries)} name(s) of {families} family(ies); a family's own name leaves its sizes open")
    return "\n".join(lines)


def absorbed_json(result: Result, backend: str, dtype: str) -> dict[str, Any]:
    """The JSON object of `absorb`."""
    absorbed, reference, seconds = result.absorbed, result.reference, result.seconds
    measured, request = absorbed.measured, absorbed.request
    return {
        "tokens": len(request.served),
        "mode": request.tokens,
        "context_tokens": len(request.context),
        "query_tokens": len(request.query),
        "backend": backend,
        "dtype": dtype,
        "unpatched_linf": reference.unpatched.linf,
        "linf": measured.linf,
        "linf_factored": reference.factored.linf if reference.factored else measured.linf,
        "largest_logit": float(np.abs(absorbed.contextual).max()),
        "tvd": measured.tvd,
        "top1_agree": measured.top1_agree,
        "floor_linf": reference.floor.linf,
        "floor_top1_agree": reference.floor.top1_agree,
        "stored": _stored_json(result.patch),
        "residual_by_block": list(absorbed.residual_by_block),
        "plan": {kind: plan_json(plan) for kind, plan in absorbed.plans.items()},
        "seconds": {k: round(v, 4) for k, v in seconds.items()},
    }


def _stored_json(patch: Patch) -> dict[str, Any] | None:
    """The recompute floor in the dtype of 16 bits that the model is stored in, where it runs in a wider one."""
    narrow = [dtype for dtype in patch.floors if dtype != patch.dtype]
    return {"dtype": narrow[0], "floor_linf": patch.floors[narrow[0]]} if narrow else None


def merged_json(merged: Merged, patch: Patch, out: Path) -> dict[str, Any]:
    """The JSON object of `apply`."""
    proved = merged.proved
    return {
        "out": str(out),
        "changed": sorted(patch.changes),
        "validity": merged.validity,
        "proved": proved is not None and proved.exact,
        "linf": dict(proved.linf) if proved else None,
        "floor_linf": proved.floor if proved else None,
        "floor_dtype": proved.dtype if proved else None,
        "position_ids": [int(p) for p in patch.position_ids[0]],
    }


def merged_text(result: Mapping[str, Any]) -> str:
    """What was written, and how far its own run is from the contextual logits."""
    first, last = result["position_ids"][0], result["position_ids"][-1]
    lines = [f"wrote {result['out']} with {len(result['changed'])} changed weights; {result['validity']}"]
    if result["linf"] is not None:
        runs = ", ".join(f"{linf:.3g} in {dtype}" for dtype, linf in result["linf"].items())
        floor = result["floor_linf"]
        against = f" (recompute floor in {result['floor_dtype']}: {floor:.3g})" if floor is not None else ""
        lines.append(f"run from the written files, its logits are off by {runs}{against}")
    lines.append(f"run it on the query alone, with position_ids from {first} to {last}")
    return "\n".join(lines)


def absorbed_text(result: Mapping[str, Any]) -> str:
    """The errors of an absorbed context, beside what they are judged against."""
    served = "the last token" if result["mode"] == "last" else f"{result['tokens']} token(s)"
    rows = [
        ("no patch", f"{result['unpatched_linf']:.3g}"),
        (
            "edited model, merged weights" if result["mode"] != "each" else "edited model, per-token factors",
            f"{result['linf']:.3g}",
        ),
        ("the same changes kept as factors", f"{result['linf_factored']:.3g}"),
        ("recompute floor (with and without cache)", f"{result['floor_linf']:.3g}"),
    ]
    if result["mode"] == "each":
        rows.pop(2)
    if result["stored"] is not None:
        stored = result["stored"]
        rows.append((f"recompute floor in {stored['dtype']}, as it is stored", f"{stored['floor_linf']:.3g}"))
    width = max(len(name) for name, _ in rows)
    lines = [
        f"{result['context_tokens']} context tokens absorbed, exact for {served} of the query "
        f"({result['backend']}, {result['dtype']})",
        "largest error of a logit against the contextual run:",
        *(f"  {name:<{width}}  {value:>9}" for name, value in rows),
        f"same most probable token: {result['top1_agree']:.0%}; total variation distance {result['tvd']:.2g}; "
        f"largest residual of a block {max(result['residual_by_block'], default=0.0):.2g}",
        "seconds: " + ", ".join(f"{stage} {value:.2f}" for stage, value in result["seconds"].items()),
    ]
    if result["mode"] != "each" and result["linf_factored"] > 100 * max(result["linf"], result["floor_linf"]):
        lines.append(
            "note: this patch is exact in the very arithmetic that it was made in, and sensitive to rounding: the "
            "same changes applied as factors are far off. To run the edited model elsewhere, use --strategy stable"
        )
    return "\n".join(lines)


def patch_json(patch: Patch) -> dict[str, Any]:
    """The JSON object of `show`."""
    return {
        "made_for": dict(patch.made_for),
        "strategy": patch.strategy,
        "mode": patch.tokens,
        "dtype": patch.dtype,
        "validity": patch.validity,
        "context_tokens": patch.context_length,
        "query": list(patch.query),
        "position_ids": patch.position_ids.tolist(),
        "measured": dict(patch.measured),
        "numbers": sum(_numbers(change) for change in patch.changes.values()),
        "changes": patch.table().json(),
    }


def patch_text(patch: Patch) -> str:
    """The page of `show`: what the patch was made for, what was measured, and its table."""
    measured = ", ".join(f"{name} {value:.3g}" for name, value in patch.measured.items()) or "nothing"
    return "\n".join(
        [
            f"made for {patch.made_for.get('architecture', 'an unknown model')}, strategy {patch.strategy}, "
            f"{patch.dtype}, behind {patch.context_length} context token(s)",
            f"measured when it was made: {measured}",
            str(patch.table()),
        ]
    )


def _numbers(change: Change) -> int:
    """How many numbers hold it."""
    return change.left.size + change.right.size if isinstance(change, MatrixChange) else change.delta.size


def adapter_json(adapter: Adapter, patch: Patch) -> dict[str, Any]:
    """The JSON object of `export`."""
    return {
        "out": str(adapter.folder),
        "format": "peft",
        "ranks": dict(adapter.ranks),
        "fan_in_fan_out": adapter.transposed,
        "validity": patch.validity,
        "position_ids": patch.position_ids.tolist(),
        "measured": None if adapter.measured is None else dict(adapter.measured),
    }


def adapter_text(adapter: Adapter, patch: Patch) -> str:
    """What was written, for which tokens it is exact, and whether that was looked at."""
    ranks = ", ".join(map(str, sorted(set(adapter.ranks.values()))))
    lines = [
        f"wrote {adapter.folder}, a LoRA of rank {ranks} for {len(adapter.ranks)} modules; {patch.validity}",
        "run it on the query alone, at these positions (position_ids)",
    ]
    if adapter.measured is None:
        lines.append("not compared with the model: give --model to load it with peft and run it")
    else:
        found = adapter.measured
        lines.append(
            f"loaded by peft and run: largest error of a logit against the patched model {found['reloaded_linf']:.3g}, "
            f"unpatched {found['unpatched_linf']:.3g}; same most probable token: {found['top1_agree']:.0%}"
        )
    return "\n".join(lines)


def next_tokens_text(tokenizer: Tokenizer, rows: Mapping[str, np.ndarray], count: int = 5) -> str:
    """The most probable next tokens of several runs, side by side. Logits `[vocabulary]` by name."""
    columns = []
    for name, logits in rows.items():
        chances = probabilities(logits[None])[0]
        best = np.argsort(-chances)[:count]
        columns.append([name, *(f"{tokenizer.decode([int(i)])!r} {chances[i]:.1%}" for i in best)])
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in zip(*columns, strict=True)
    ]
    return "\n".join(f"  {line}" for line in lines)
