"""The jobs on models, by one name each: `blockkit.absorb`, `blockkit.generate`, `blockkit.export`.

A model is a name or path, which a `Session` opens, or one in memory, which its framework's backend knows
(`blockkit.patch.in_place`). Nothing of a framework is imported before a model asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .absorbing.generation import Generated, Run, Settings
from .absorbing.sampling import Sampling
from .checkpoint.tokenizer import Tokenizer
from .errors import BadInput
from .patch.in_place import backend_of
from .patch.patch import Patch
from .patch.peft import FORMATS, Adapter, export_peft
from .progress import Progress, silent
from .session import Session

__all__ = ["absorb", "export", "generate"]


def absorb(
    model: Any,
    *given: Any,
    strategy: str | None = None,
    tokens: str = "last",
    progress: Progress | None = None,
    **options: Any,
) -> Patch:
    """Absorbs a context into a model's weights: a patch, proved by a run of the edited model.

        absorb(model, context_ids, query_ids)               # ids [batch, n] and [batch, q]: tensors, arrays, lists
        absorb(model, tokenizer, "the context", " a query")
        absorb("gemma3-270m", "the context", " a query")    # a name, a .gguf file or a Hugging Face folder

    The model is left as it was. Of texts, the context is tokenized with the tokenizer's special tokens, the query
    without.

    Args:
        model: a model in memory (a `torch.nn.Module`, a KerasHub model), or a name or path.
        given: context and query; before two texts for a model in memory, its tokenizer: anything with
            `encode(text, add_special_tokens=...)`, as those of `transformers` and `tokenizers` have.
        strategy: `paper`, `minimal`, `matrix`, `stable` or `joint`; by default `stable`, or `joint` for many tokens.
        tokens: `last` (exact for the query's last token), `each` (a patch for every token) or `all` (one for all).
        progress: called with a stage in words and the fraction of it that is done (`print` will do).
        options: of a model in memory, what its backend's own `absorb` takes (`retain`, `freeze`, `merge`, ...); of a
            name or path `backend` and `dtype`, as for `Session`.

    Raises:
        BadInput: something given does not fit; the message says what is allowed.
        MissingDependency: an optional package is missing; the message holds the install line.
        NotPatchable, ConditionViolated, ExactnessLost: see `blockkit.absorbing.algorithm.absorb`.
    """
    if isinstance(model, str | Path):
        context, query = _two_texts("absorb", model, given)
        session = Session(str(model), progress=progress, **_known("absorb", options, ("backend", "dtype")))
        return session.absorb(context, query, tokens, strategy, progress).patch
    context, query = _ids("absorb", given)
    backend = backend_of(model)
    patch: Patch = backend.absorb(
        model, context, query, strategy=strategy, tokens=tokens, progress=progress, **options
    )  # fmt: skip
    return patch


def generate(
    model: Any,
    *given: Any,
    max_new_tokens: int = 20,
    tokens: str = "each",
    strategy: str | None = None,
    merge: bool = False,
    sampling: Sampling | None = None,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Generated:
    """The generation experiment: with the prompt as context, and with the prompt absorbed, token by token.

        generate("gemma3-270m", "the prompt")
        generate(model, tokenizer, "the prompt")
        generate(model, prompt_ids)                         # [1, n]; the text is then the ids

    Args:
        model: a PyTorch language model in memory, or a name or path.
        tokens: `each` (a patch of its own for every token) or `all` (one static patch that grows).
        strategy, merge: see `blockkit.absorbing.generation.Settings`.
        sampling: how the next token is chosen; by default the most probable one.
        dtype: of a model that is opened by name; one in memory has its own.
        progress: called with a stage in words and the fraction of it that is done (`print` will do).

    Raises:
        BadInput: the model, the prompt or a setting cannot be used.
        MissingDependency: an optional package is missing; the message holds the install line.
        NotPatchable, ConditionViolated, ExactnessLost: the patched model cannot follow.
    """
    report = progress or silent
    settings = Settings(max_new_tokens, dtype, tokens, strategy, merge, sampling or Sampling())
    if isinstance(model, str | Path):
        if len(given) != 1 or not isinstance(given[0], str):
            raise BadInput(f"generate({str(model)!r:.60}, ...) takes one text, the prompt")
        run = Run.open(str(model), given[0], settings, report)
    else:
        ids, decode = _prompt(given)
        backend = backend_of(model)
        run = Run(lambda prompt, s: backend.experiment(model, prompt, s), ids, settings, decode)
    for number, _ in enumerate(run, 1):
        report("generating", number / max_new_tokens)
    return run.finish(report)


def export(
    patch: Patch | str | Path,
    out: str | Path,
    *,
    format: str = "peft",
    model: Any = None,
    progress: Progress | None = None,
) -> Adapter:
    """Writes a patch as an adapter that other programs load: a LoRA for PEFT.

    Args:
        patch: the patch, or its file.
        out: a folder that does not exist, or is empty.
        model: to compare with before the folder appears; see `blockkit.patch.peft.export_peft`.

    Raises:
        BadInput: an unknown format, a file that is no patch, a folder that cannot be written, or a wrong model.
        NotPatchable: the patch holds what a LoRA cannot; the message names it.
        MissingDependency: comparing needs a package that is not installed.
        ExactnessLost: the adapter, loaded by `peft`, does not do what the patch does.
    """
    if format not in FORMATS:
        raise BadInput(f"format={format!r:.60} is not known; allowed are {', '.join(FORMATS)}")
    found = Patch.load(patch) if isinstance(patch, str | Path) else patch
    if not isinstance(found, Patch):
        raise BadInput(f"a {type(patch).__name__} is no patch; give a blockkit.Patch or the file of one")
    return export_peft(found, out, model, progress)


# -- what was given ------------------------------------------------------------------------------------


def _two_texts(job: str, model: Any, given: tuple[Any, ...]) -> tuple[str, str]:
    if len(given) == 2 and all(isinstance(text, str) for text in given):
        return given[0], given[1]
    shown = ", ".join(type(value).__name__ for value in given) or "nothing"
    raise BadInput(
        f"{job}({str(model)!r:.60}, ...) takes two texts, context and query, got {shown}; "
        "a model by name has its own tokenizer"
    )


def _known(job: str, options: Mapping[str, Any], allowed: tuple[str, ...]) -> dict[str, Any]:
    if unknown := [name for name in options if name not in allowed]:
        raise BadInput(f"{job} takes no {unknown[0]!r} for a model by name; allowed are {', '.join(allowed)}")
    return dict(options)


def _ids(job: str, given: tuple[Any, ...]) -> tuple[Any, Any]:
    """Context and query as ids: those given, or those of two texts, `[1, n]` and `[1, q]`."""
    if len(given) == 2 and not any(isinstance(value, str) for value in given):
        return given[0], given[1]
    if len(given) == 3 and all(isinstance(text, str) for text in given[1:]):
        tokenizer, context, query = given
        return [encoded(tokenizer, context, "context", True)], [encoded(tokenizer, query, "query", False)]
    shown = ", ".join(type(value).__name__ for value in given) or "nothing"
    raise BadInput(
        f"{job}(model, ...) takes context_ids and query_ids, or a tokenizer and two texts (tokenizer, context, query), "
        f"got {shown}"
    )


def _prompt(given: tuple[Any, ...]) -> tuple[list[int], Callable[[list[int]], str]]:
    """The prompt's ids, and what makes a text of ids."""
    if len(given) == 2 and isinstance(given[1], str):
        tokenizer, text = given
        if not callable(getattr(tokenizer, "decode", None)):
            raise BadInput(f"a {type(tokenizer).__name__} is no tokenizer: it has no decode(ids)")
        return encoded(tokenizer, text, "prompt", True), lambda ids: str(tokenizer.decode(ids))
    if len(given) == 1 and not isinstance(given[0], str):
        rows = given[0].tolist() if hasattr(given[0], "tolist") else given[0]
        if isinstance(rows, list) and len(rows) == 1 and isinstance(rows[0], list):
            rows = rows[0]
        if isinstance(rows, list) and all(type(i) is int for i in rows):
            return rows, lambda ids: " ".join(map(str, ids))
        raise BadInput(f"the prompt must be ids of one sequence, [1, n], got {given[0]!r:.60}")
    shown = ", ".join(type(value).__name__ for value in given) or "nothing"
    raise BadInput(f"generate(model, ...) takes prompt_ids, or a tokenizer and a text, got {shown}")


def encoded(tokenizer: Any, text: str, name: str, special: bool) -> list[int]:
    """The ids of a text.

    Args:
        tokenizer: has `encode(text, add_special_tokens=...)`, which gives ids or what has them as `ids`.
        name: what the text is, for the message.
        special: with what the model expects around a text (such as BOS).

    Raises:
        BadInput: it is no tokenizer, or the text has no tokens.
    """
    if not callable(getattr(tokenizer, "encode", None)):
        raise BadInput(
            f"a {type(tokenizer).__name__} is no tokenizer: it has no encode(text, add_special_tokens=...); "
            "give token ids instead"
        )
    if isinstance(tokenizer, Tokenizer):
        found: Any = tokenizer.encode(text, special)
    else:
        try:
            found = tokenizer.encode(text, add_special_tokens=special)
        except TypeError as error:
            raise BadInput(
                f"{type(tokenizer).__name__}.encode does not take a text with add_special_tokens=...: {error}"
            ) from None
    ids = [int(i) for i in getattr(found, "ids", found)]
    if not ids:
        raise BadInput(f"the {name} has no tokens")
    return ids
