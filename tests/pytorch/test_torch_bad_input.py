"""What cannot be used is refused by name, and whatever goes wrong, the model is left as it was."""

from __future__ import annotations

import hashlib
import logging
import math
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch_modules as own  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

import blockkit as bk  # noqa: E402
from blockkit.backends.pytorch import absorb  # noqa: E402
from blockkit.backends.pytorch.absorbing import lockstep as lockstep_module  # noqa: E402
from blockkit.backends.pytorch.calling.exclusive import sole_use  # noqa: E402
from blockkit.errors import BadInput, ConditionViolated, ExactnessLost, NotPatchable  # noqa: E402

D = own.D
CONTEXT, QUERY = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]), torch.tensor([[5, 3, 7]])
CHANGES = torch.randn(1, 8, D), torch.randn(1, 3, D)


def model(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    return own.drawn(own.LanguageModel(own.LayerScale(), own.LayerScale(), **more))


def state(module: nn.Module) -> Any:
    """Everything that may not change: the parameters themselves, their bytes, hooks, flags, and what torch keeps."""
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    bytes_ = {n: hashlib.sha256(t.detach().cpu().numpy().tobytes()).hexdigest() for n, t in held.items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training, type(m)) for m in module.modules()]
    same = {n: (id(t), type(t), t.requires_grad, t._version) for n, t in held.items()}
    return bytes_, same, hooks, torch.is_grad_enabled(), hash(torch.get_rng_state().numpy().tobytes())


def refused(module: Any, kind: type[Exception], text: str, act: Callable[[], Any]) -> None:
    before = state(module) if isinstance(module, nn.Module) and not _meta(module) else None
    with pytest.raises(kind, match=text):
        act()
    assert before is None or state(module) == before


def _meta(module: nn.Module) -> bool:
    return any(p.is_meta for p in module.parameters())


# -- prompts and options ---------------------------------------------------------------------------

LONG = torch.ones(1, 70, dtype=torch.long)
PROMPTS: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "ids too high": (CONTEXT + 30, QUERY, {}, "an id of the context is 39; the model knows 0 to 30"),
    "ids negative": (CONTEXT, QUERY - 4, {}, "an id of the query is -1; the model knows 0 to 30"),
    "empty context": (CONTEXT[:, :0], QUERY, {}, "the context is empty: there is nothing to absorb"),
    "empty query": (CONTEXT, QUERY[:, :0], {}, "the query is empty: it must hold at least one token"),
    "no sequence": (CONTEXT[:0], QUERY[:0], {}, r"\(0, 8\): there is no sequence in it"),
    "one axis": (CONTEXT[0], QUERY, {}, r"the context has the shape \(8,\); ids \[batch, n\] are wanted"),
    "query of one axis": (CONTEXT, QUERY[0], {}, r"the query has the shape \(3,\); ids \[batch, n\] are wanted"),
    "floating ids": (CONTEXT.float(), QUERY, {}, r"embeddings \[batch, n, d\] are wanted"),
    "truth values": (CONTEXT.bool(), QUERY, {}, "the context is torch.bool, torch.strided; a dense tensor"),
    "sparse": (CONTEXT.to_sparse(), QUERY, {}, "the context is torch.int64, torch.sparse_coo; a dense tensor"),
    "mask as a list": (CONTEXT, QUERY, {"query_mask": [[1, 1, 1]]}, "the query's mask must be a tensor of 0 and 1"),
    "mask elsewhere": (
        CONTEXT, QUERY, {"context_mask": torch.ones(1, 8, device="meta")},
        "the context's mask must be a tensor of 0 and 1 on cpu, got meta",
    ),
    "a list": (CONTEXT.tolist(), QUERY, {}, "the context must be a tensor of ids"),
    "text": ("Hello", QUERY, {}, "the context must be a tensor of ids"),
    "other batches": (CONTEXT.repeat(2, 1), QUERY, {}, "the context has 2 sequences and the query 1"),
    "another device": (CONTEXT.to("meta"), QUERY, {}, r"the context is on meta, the model on cpu; move it"),
    "embeddings for ids": (*CHANGES, {}, r"fails on embeddings of shape \(1, 11, 16\) \(float32\): .*indices"),
    "too long": (LONG, QUERY, {}, r"LanguageModel fails on ids of shape \(1, 73\) .*: IndexError: index out of range"),
    "mask": (CONTEXT, QUERY, {"context_mask": torch.ones(1, 3)}, r"the context's mask has the shape \(1, 3\), its ids"),
    "strategy": (CONTEXT, QUERY, {"strategy": "best"}, "unknown strategy 'best'; allowed are paper, minimal, matrix"),
    "tokens": (CONTEXT, QUERY, {"tokens": "some"}, "tokens='some'; allowed are last, each, all"),
    "freeze": (CONTEXT, QUERY, {"freeze": ["mlp.dwon*"]}, r"'mlp.dwon\*' matches no parameter of a block; there"),
    "freeze a number": (CONTEXT, QUERY, {"freeze": 3}, "freeze must be a list of globs of parameter names"),
    "freeze numbers": (CONTEXT, QUERY, {"freeze": [3]}, "freeze must be a list of globs of parameter names"),
    "retain a number": (CONTEXT, QUERY, {"retain": 3}, r"retain must be places .* got int 3"),
    "retain words": (CONTEXT, QUERY, {"retain": ["a"]}, "retain must be places in the context"),
    "retain a square": (CONTEXT, QUERY, {"retain": CONTEXT}, "retain must be a row of whole numbers"),
    "retain part": (CONTEXT, QUERY, {"retain": [0.5]}, "retain must be a row of whole numbers"),
    "inputs": (CONTEXT, QUERY, {"inputs": [1]}, "inputs must be a mapping of keyword arguments"),
    "own inputs": (CONTEXT, QUERY, {"inputs": {"attention_mask": 1}}, "inputs holds attention_mask, which follows"),
    "more inputs": (CONTEXT, QUERY, {"context_inputs": "x"}, "context_inputs must be a mapping of keyword arguments"),
    "decoder list": (CONTEXT, QUERY, {"decoder_input_ids": [1]}, r"decoder_input_ids must be a tensor of ids"),
    "decoder row": (CONTEXT, QUERY, {"decoder_input_ids": CONTEXT[0]}, r"got a tensor \[8\] of int64 on cpu"),
    "decoder rows": (CONTEXT, QUERY, {"decoder_input_ids": CONTEXT.repeat(2, 1)}, "2 sequences and the query 1"),
    "decoder": (CONTEXT, QUERY, {"decoder_input_ids": CONTEXT}, "LanguageModel.forward takes no decoder_input_ids"),
    "mask of halves": (CONTEXT, QUERY, {"query_mask": torch.full((1, 3), 0.5)}, "the query's mask holds other numbers"),
    "mask of nothing": (CONTEXT, QUERY, {"query_mask": torch.full((1, 3), math.nan)}, "mask holds other numbers"),
    "a gap": (
        CONTEXT, QUERY, {"retain": [1], "query_mask": torch.tensor([[0, 1, 1]])},
        "padding between retained context and query cannot be told",
    ),
    "retain twice": (CONTEXT, QUERY, {"retain": [2, 2]}, "retain must be places in the context, from 0 to 7"),
    "retain all": (CONTEXT, QUERY, {"retain": slice(None)}, "the whole context is retained"),
    "merge each": (CONTEXT, QUERY, {"tokens": "each", "merge": True}, "cannot be merged; leave merge=False"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_and_options_that_do_not_fit(name: str, language_model: nn.Module) -> None:
    context, query, options, text = PROMPTS[name]
    refused(language_model, BadInput, text, lambda: absorb(language_model, context, query, **options))


@pytest.fixture(scope="module")
def language_model() -> nn.Module:
    return model(positions=True)


STREAMS: dict[str, tuple[Tensor, Tensor, str]] = {
    "not finite": (CHANGES[0] / 0, CHANGES[1], "the context holds numbers that are not finite"),
    "widths": (CHANGES[0][..., :9], CHANGES[1], "context and query have widths 9 and 16"),
    "width": (
        CHANGES[0][..., :9],
        CHANGES[1][..., :9],
        r"LayerScale fails on embeddings of shape \(1, 11, 9\) \(float32\)",
    ),
    "dtype": (CHANGES[0].double(), CHANGES[1].double(), r"LayerScale fails on embeddings of shape .* \(float64\)"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_that_do_not_fit(name: str, layer: nn.Module) -> None:
    context, query, text = STREAMS[name]
    refused(layer, BadInput, text, lambda: absorb(layer, context, query))


@pytest.fixture(scope="module")
def layer() -> nn.Module:
    return own.drawn(own.LayerScale())


# -- models ----------------------------------------------------------------------------------------


class Silent(own.LanguageModel):
    def forward(self, ids: Tensor) -> Any:  # type: ignore[override]
        super().forward(ids)
        return "text"


class NoInput(nn.Module):
    def forward(self) -> int:
        return 1


class Branching(own.LayerScale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if x.sum() > 0 else x)


def compiled_in_place() -> nn.Module:
    module = model()
    module.blocks[1].compile()
    return module


def quantised() -> nn.Module:
    module = model()
    module.head = torch.ao.nn.quantized.dynamic.Linear(D, own.IDS)
    return module


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "compiled": (lambda: torch.compile(model()), "OptimizedModule is compiled .*give the module that was compiled"),
    "compiled block": (compiled_in_place, "blocks.1 is compiled"),
    "scripted": (lambda: torch.jit.script(nn.Linear(D, D)), "is scripted"),
    "quantised": (quantised, "head is a quantised Linear; give the model with floating-point weights"),
    "meta": (lambda: model().to("meta"), "embedding.weight is on the meta device and has no numbers"),
    "no forward": (lambda: nn.ModuleList([own.LayerScale()]), "ModuleList has no forward of its own"),
    "no input": (NoInput, "NoInput.forward takes no input"),
    "nothing": (nn.Identity, "Identity could not be run .*it has no parameters.*; give example="),
    "tokens first": (lambda: own.drawn(own.TokensFirst()), r"TokensFirst looks across its first axis.*wrap it"),
    "branches on numbers": (lambda: own.drawn(Branching()), "the block Branching cannot be traced by torch.export"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_judged(name: str) -> None:
    build, text = MODELS[name]
    module = build()
    with pytest.raises(BadInput, match=text):
        bk.check(module)


def test_models_that_cannot_be_run_as_they_are() -> None:
    training = model()
    training.blocks[1].mlp.train()
    text = r"in training mode \(blocks.1.mlp\).*call model.eval\(\)"
    refused(training, BadInput, text, lambda: absorb(training, CONTEXT, QUERY))
    silent, text = own.drawn(Silent(own.LayerScale())), "the model gave str, in which there are no logits"
    refused(silent, BadInput, text, lambda: absorb(silent, CONTEXT, QUERY))
    refused(
        None, BadInput, "the model is a function; a torch.nn.Module is wanted", lambda: absorb(model, CONTEXT, QUERY)
    )  # type: ignore[arg-type]
    refused(None, BadInput, "no model of a framework", lambda: bk.check(model))


def test_examples_that_do_not_fit() -> None:
    module = model()
    for example, text in (
        ("ids", "example must be a tensor or a mapping of keyword arguments, got str"),
        (CONTEXT[0], r"the example has the shape \(8,\); \[batch, tokens, \.\.\.\] is wanted"),
        ({"ids": [1, 2]}, r"the example must hold a tensor \[batch, tokens"),
    ):
        refused(module, BadInput, text, lambda example=example: bk.check(module, example=example))  # type: ignore[misc]


def test_judging_leaves_training_mode_and_random_numbers_as_they_are() -> None:
    module = model().train()
    module.blocks[0].eval()
    before = state(module)
    assert bk.check(module).patchable is True
    assert state(module) == before


def test_whole_numbers_do_not_move() -> None:
    class Int8(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.randint(-9, 9, (D, D), dtype=torch.int8)
            self.whole, self.scale = nn.Parameter(whole, requires_grad=False), nn.Parameter(torch.full((D, 1), 0.1))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.whole.float() * self.scale)

    module = own.LayerScale()
    module.attn.o = Int8()
    names = {r.parameters[0] for r in bk.check(module.eval()).routes if len(r.parameters) == 1}
    assert names == {"gamma1", "gamma2", "mlp.down.bias", "mlp.down.weight", "attn.o.scale"}


# -- failures on the way ---------------------------------------------------------------------------


class Failing(own.LayerScale):
    """Raises at its `calls`-th forward from now on."""

    calls: int = -1
    error: BaseException = RuntimeError("out of luck")

    def forward(self, x: Tensor) -> Tensor:
        if self.calls == 0:
            raise self.error
        self.calls -= 1
        return super().forward(x)


def test_models_in_several_threads() -> None:
    with ThreadPoolExecutor(3) as pool:
        patches = list(pool.map(lambda _: absorb(model(), CONTEXT, QUERY), range(3)))
    assert all(p.measured["linf"] < 1e-5 for p in patches)
    assert sys.stdout is not None and not isinstance(sys.stdout, StringIO) and logging.root.manager.disable == 0
    module = model()
    with sole_use(module), ThreadPoolExecutor(1) as pool:
        refused(
            module, BadInput, "in another thread; wait for it, or give each thread a model of its own",
            lambda: pool.submit(absorb, module, CONTEXT, QUERY).result(),
        )  # fmt: skip


class Random(own.LayerScale):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(super().forward(x), 0.3, training=True)


def test_a_model_that_draws_at_random_is_told_so() -> None:
    module = own.drawn(own.LanguageModel(own.LayerScale(), Random()))
    with pytest.raises(ExactnessLost, match=r"two runs of LanguageModel on the same input differ by .*draws at random"):
        absorb(module, CONTEXT, QUERY)


def test_why_there_is_no_route() -> None:
    module, query = model(), torch.randint(31, (1, 30))
    for options, text in (
        (
            {"tokens": "all"},
            r"blocks.0: there is no route for 30 tokens .*; 24 can be served at most \(by mlp.down.weight\)",
        ),
        ({"freeze": "*"}, r"blocks.0: there is no route; none of the strategies can do it, .* \(\* may not move\)"),
        (
            {"strategy": "matrix", "freeze": ["*weight"]},
            "strategy 'matrix' has no route; paper, minimal, stable can do",
        ),
    ):
        refused(module, NotPatchable, text, lambda options=options: absorb(module, CONTEXT, query, **options))  # type: ignore[misc]


class Scripted(own.LayerScale):
    """Reads a bias where no one can watch."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        return _added(super().forward(x), self.last)


@torch.jit.script
def _added(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def test_a_parameter_that_no_one_sees_read_is_gone_around() -> None:
    module = own.drawn(own.LanguageModel(Scripted(), Scripted()))
    assert "last" in bk.check(module).routes[0].parameters
    patch = absorb(module, CONTEXT, QUERY)
    assert patch.measured["linf"] < 1e-5 and not any(name.endswith("last") for name in patch.changes)


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("calls", range(3), ids=["contextual", "reduced", "edited"])
def test_a_forward_that_fails(calls: int, error: BaseException) -> None:
    torch.manual_seed(0)
    module = own.drawn(own.LanguageModel(own.LayerScale(), Failing()))
    bk.check(module)
    wanted = module(QUERY)
    failing = module.blocks[1]
    failing.calls, failing.error = calls, error
    kind, text = (BadInput, "RuntimeError: out of luck") if isinstance(error, Exception) else (type(error), None)
    before = state(module)
    with pytest.raises(kind, match=text):
        absorb(module, CONTEXT, QUERY)
    assert state(module) == before
    failing.calls = -1
    assert torch.equal(module(QUERY), wanted)


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=["memory", "interrupt"])
def test_a_solution_that_fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    module = model()
    bk.check(module)
    before, solved = state(module), lockstep_module.solve_step
    calls = iter(range(9))

    def solve(*args: Any) -> Any:
        if next(calls) == 1:  # the second block's: the first is patched by then
            raise error
        return solved(*args)

    monkeypatch.setattr(lockstep_module, "solve_step", solve)
    with pytest.raises((BadInput, type(error))):
        absorb(module, CONTEXT, QUERY)
    assert state(module) == before


def test_a_condition_that_does_not_hold_is_named() -> None:
    module = model()
    with torch.no_grad():
        module.blocks[1].gamma2.zero_()
    refused(
        module, ConditionViolated, r"blocks\.1: .*mlp\.down\.bias",
        lambda: absorb(module, CONTEXT, QUERY, freeze=["gamma*", "attn*", "mlp.up*", "mlp.down.weight", "n2*"]),
    )  # fmt: skip
    refused(module, NotPatchable, re.escape("blocks.0"), lambda: absorb(module, CONTEXT, QUERY, freeze=["*"]))


def test_an_error_inside_the_patched_model() -> None:
    module = model()
    patch = absorb(module, CONTEXT, QUERY)
    before, plain = state(module), module(QUERY)
    for merge in (False, True):
        with pytest.raises(ZeroDivisionError), patch.applied(module, merge=merge):
            assert not torch.allclose(module(QUERY), plain)
            raise ZeroDivisionError
        bytes_, same, *rest = state(module)
        assert (bytes_, rest) == (before[0], list(before[2:]))
        assert {n: s[:3] for n, s in same.items()} == {n: s[:3] for n, s in before[1].items()}
        assert torch.equal(module(QUERY), plain)


def test_a_model_that_counts_places_itself_is_patched_for_the_places_it_counts() -> None:
    module = model(positions=True)  # its forward takes no position_ids: the query's tokens stand at 0, 1, 2 afterwards
    with torch.no_grad():
        wanted = module(torch.cat([CONTEXT, QUERY], 1))[:, -1]
        with absorb(module, CONTEXT, QUERY).applied(module):
            found = module(QUERY)[:, -1]
    assert (found - wanted).abs().max() < 5e-6 * wanted.abs().max()
