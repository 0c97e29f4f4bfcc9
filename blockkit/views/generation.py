"""What a person or a program sees of a generation: lines as tokens come, a page, a JSON object, a file, a plot."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from ..absorbing.generation import Generated, Step
from ..atomic import write_file
from ..errors import BadInput
from ..extras import require

METRICS, PLOTS = (".json", ".csv"), (".png", ".svg", ".pdf")
HEAD = f"{'token':<24}  {'contextual':>10}  {'patched':>10}  same  {'L-inf':>8}  {'TVD':>8}"


def token_line(step: Step, text: str) -> str:
    """One token as it comes, under `HEAD`."""
    shown = repr(text) if len(repr(text)) <= 24 else repr(text)[:20] + " ..."
    same = "yes" if step.id == step.patched_id else "no"
    return f"{shown:<24}  {step.id:>10}  {step.patched_id:>10}  {same:<4}  {step.linf:>8.2g}  {step.tvd:>8.2g}"


def generated_json(found: Generated) -> dict[str, Any]:
    """The JSON object of `generate`."""
    steps, yards, settings = found.steps, found.yardsticks, found.settings
    agree = [s.id == s.patched_id for s in steps]
    static = found.static
    return {
        "prompt_tokens": len(found.prompt),
        "mode": settings.tokens,
        "dtype": settings.dtype,
        "strategy": settings.strategy,
        "merged": settings.merge,
        "temperature": settings.sampling.temperature,
        "seed": settings.sampling.seed,
        "text": found.text,
        "new_tokens": len(steps),
        "agreement": sum(agree),
        "top1_agree": sum(agree) / len(steps),
        "floor_agreement": sum(y.stable for y in yards),
        "agreement_where_floor_agrees": sum(a and y.stable for a, y in zip(agree, yards, strict=True)),
        "faithful": found.faithful,
        "linf": max(s.linf for s in steps),
        "tvd": max(s.tvd for s in steps),
        "floor_linf": max(y.floor.linf for y in yards),
        "floor_tvd": max(y.floor.tvd for y in yards),
        "unpatched_linf": max(y.unpatched.linf for y in yards),
        "largest_logit": found.largest_logit,
        "static": None
        if static is None
        else {
            "linf": static.measured.linf,
            "tvd": static.measured.tvd,
            "agreement": sum(static.agree),
            "amplification": static.amplification,
        },
        "seconds": {stage: round(value, 4) for stage, value in found.seconds.items()},
        "tokens": token_rows(found),
    }


def token_rows(found: Generated) -> list[dict[str, Any]]:
    """One flat record for each token."""
    rows = []
    for number, (step, text, yard) in enumerate(zip(found.steps, found.texts, found.yardsticks, strict=True), 1):
        row = {
            "number": number,
            "text": text,
            "id": step.id,
            "patched_id": step.patched_id,
            "agree": step.id == step.patched_id,
            "linf": step.linf,
            "tvd": step.tvd,
            "floor_agree": yard.stable,
            "floor_linf": yard.floor.linf,
            "floor_tvd": yard.floor.tvd,
            "unpatched_linf": yard.unpatched.linf,
            "unpatched_tvd": yard.unpatched.tvd,
            "margin": yard.margin,
            "seconds_contextual": round(step.seconds[0], 6),
            "seconds_patched": round(step.seconds[1], 6),
            "seconds_proof": round(step.seconds[2], 6),
        }
        if found.static is not None:
            row["static_agree"] = found.static.agree[number - 1]
        rows.append(row)
    return rows


def generated_text(result: dict[str, Any]) -> str:
    """The page below the tokens: the errors beside what they are judged against."""
    count, static = result["new_tokens"], result["static"]
    rows = [("no patch", result["unpatched_linf"]), ("patched model", result["linf"])]
    if static is not None:
        rows.append(("one run of the finished static weights", static["linf"]))
    rows.append(("recompute floor (with and without cache)", result["floor_linf"]))
    width = max(len(name) for name, _ in rows)
    patch = "a patch for each token" if result["mode"] == "each" else "one static patch that grows"
    how = "merged into the weights" if result["merged"] else "kept as factors"
    lines = [
        f"{result['prompt_tokens']} prompt tokens, {count} new one(s); {patch}, {how} ({result['dtype']})",
        f"same token: {result['agreement']} of {count}; where the contextual model's own runs agree: "
        f"{result['agreement_where_floor_agrees']} of {result['floor_agreement']}",
        "largest error of a logit against the contextual run:",
        *(f"  {name:<{width}}  {value:>9.3g}" for name, value in rows),
        f"total variation distance: patched {result['tvd']:.2g}, floor {result['floor_tvd']:.2g}",
    ]
    if static is not None:
        lines.append(
            f"the finished weights: same token {static['agreement']} of {count}; rounding amplified by at most "
            f"{static['amplification']:.3g}"
        )
    lines.append("seconds: " + ", ".join(f"{stage} {value:.2f}" for stage, value in result["seconds"].items()))
    return "\n".join(lines)


def require_suffix(option: str, file: Path, allowed: tuple[str, ...]) -> None:
    """Finds out before the work.

    Raises:
        BadInput: the file's name does not say which of the allowed kinds it is.
    """
    if file.suffix.lower() not in allowed:
        raise BadInput(f"{option} {file}: the name must end in {', '.join(allowed[:-1])} or {allowed[-1]}")


def write_metrics(result: dict[str, Any], file: Path) -> None:
    """The whole result as JSON, or its tokens as CSV, by the file's suffix."""
    if file.suffix.lower() == ".json":
        content = json.dumps(result, indent=2) + "\n"
    else:
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(result["tokens"][0]))
        writer.writeheader()
        writer.writerows(result["tokens"])
        content = out.getvalue()
    write_file(file, content.encode())


def write_plot(result: dict[str, Any], file: Path) -> None:
    """Errors of the patched and the unpatched model and the floor, token by token, on logarithmic axes.

    Raises:
        MissingDependency: `matplotlib` is not installed.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    rows = result["tokens"]
    numbers = [row["number"] for row in rows]
    above, below = figure.subplots(2, 1, sharex=True)
    for axes, key, name in ((above, "linf", "largest error of a logit"), (below, "tvd", "total variation distance")):
        for prefix, label, marker in (("unpatched_", "no patch", "s"), ("", "patched", "o"), ("floor_", "floor", "x")):
            values = [row[prefix + key] or None for row in rows]  # zero has no place on a logarithmic axis
            points = [(n, v) for n, v in zip(numbers, values, strict=True) if v is not None]
            axes.plot([n for n, _ in points], [v for _, v in points], marker=marker, label=label)
        axes.set_yscale("log")
        axes.set_ylabel(name)
    above.legend()
    above.set_title(f"{result['mode']}, {'merged' if result['merged'] else 'factored'}, {result['dtype']}")
    below.set_xlabel("generated token")
    below.set_xticks(numbers if len(numbers) <= 40 else numbers[:: len(numbers) // 20])
    out = io.BytesIO()
    figure.savefig(out, format=file.suffix.lower()[1:])
    write_file(file, out.getvalue())
