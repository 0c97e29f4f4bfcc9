"""Modules that a user wrote: judged and patched as they are, with no registration and no example."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch_modules as own  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import blockkit as bk  # noqa: E402
from blockkit.backends.pytorch import absorb, trace  # noqa: E402
from blockkit.errors import NotPatchable  # noqa: E402
from blockkit.graph.ops import Opaque  # noqa: E402

# What the theory says of each block: what every single parameter that serves can serve (by its path in the module).
MLP = {"mlp.down.bias": 1, "mlp.down.weight": own.HIDDEN}
ATTENTION, LAYER = {"attn.o.weight": own.D}, {"layer.linear2.bias": 1, "layer.linear2.weight": own.HIDDEN}
LAYER_ATTENTION = {"layer.self_attn.out_proj.bias": 1, "layer.self_attn.out_proj.weight": own.D}
NORMS = {f"layer.norm{i}.{p}": 1 for i in (1, 2) for p in ("weight", "bias")}
ROUTED = {f"experts.{e}.down.{p}": n for e in range(3) for p, n in (("bias", 1), ("weight", own.HIDDEN))}
SHARED = {"shared.down.bias": 1, "shared.down.weight": own.HIDDEN}
SCALED = {"gamma1": 1, "gamma2": 1, **MLP, **ATTENTION}
DOWN = "down.parametrizations.weight.original0"
EXPECTED: dict[str, dict[str, int]] = {
    "parallel": {**MLP, **ATTENTION},
    "layer_scale": SCALED,
    "gated": {**MLP, **ATTENTION},
    "highway": {**MLP, **ATTENTION},
    "rezero": {**MLP, **ATTENTION},
    "post_norm": {"n1.weight": 1, "n1.bias": 1, "n2.weight": 1, "n2.bias": 1, **MLP, **ATTENTION},
    "sandwich": {"n3.weight": 1, "n4.weight": 1, **ATTENTION},
    "in_place": {**MLP, **ATTENTION},
    "divided": {"down.bias": 1, "down.weight": own.HIDDEN, **ATTENTION},
    "no_projection": MLP,
    "two_mixers": {**MLP, **ATTENTION, "out.bias": 1, "out.weight": own.D},
    "gru": {**MLP, "out.weight": 12},
    "lstm": {**MLP, "out.weight": 12},
    "moving_average": {**MLP, "out.bias": 1, "out.weight": 2 * own.D},
    "library_attention": {**MLP, "attn.out_proj.bias": 1, "attn.out_proj.weight": own.D},
    "library_layer": {**LAYER, **LAYER_ATTENTION},
    "library_layer_post": {**NORMS, **LAYER, **LAYER_ATTENTION},
    "raw_matrices": {"w2": own.HIDDEN, "wo": own.D},
    "convolved": {"down.bias": 1, "down.weight": own.HIDDEN, **ATTENTION},
    "parametrized": {f"mlp.{DOWN}": 1, "attn.o.parametrizations.weight.original0": 1},
    "head_norms": {**MLP, "o.weight": own.D},
    "tables": {**MLP, **ATTENTION},
    "experts_list": {**SHARED, **ATTENTION, **ROUTED},
    "experts_soft": {**SHARED, **ATTENTION},
    "experts_sorted": {**SHARED, **ATTENTION},
    "gives_tuple": SCALED,
    "gives_mapping": SCALED,
}  # fmt: skip
NAMELESS = {  # what no primitive describes, by the operation's name
    "divided": {"softplus", "reciprocal"},
    "experts_list": {"getitem", "sum", "eq", "reciprocal"},
    "experts_soft": {"einsum"},
    "experts_sorted": {"getitem", "index", "bmm"},
}


def stream_of(result: Any) -> Tensor:
    if isinstance(result, dict):
        return result["hidden"]  # type: ignore[no-any-return]
    return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]


def run(module: nn.Module, value: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        if isinstance(module, own.GivesMapping):
            return stream_of(module(hidden=value))
        return stream_of(module(value, **options))


@cache
def block(name: str) -> nn.Module:
    torch.manual_seed(0)
    return own.drawn(own.BLOCKS[name]())


@cache
def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return own.drawn(own.MODELS[name]())


def vectors(seed: int = 5, batch: int = 1) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 9, own.D, generator=rng), torch.randn(batch, 3, own.D, generator=rng)


def ids(seed: int = 5, batch: int = 1) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, own.IDS, (batch, n), generator=rng) for n in (9, 3))  # type: ignore[return-value]


def errors(module: nn.Module, context: Tensor, query: Tensor, rows: int, **options: Any) -> tuple[float, float, Any]:
    """Relative error of the edited module's ordinary run, and of the module's as it was, on the last rows."""
    before = {n: t.clone() for n, t in module.state_dict().items()}
    wanted, plain = run(module, torch.cat([context, query], 1))[:, -rows:], run(module, query)[:, -rows:]
    patch = absorb(module, context, query, **options)
    with patch.applied(module):
        found = run(module, query)[:, -rows:]
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    size = wanted.float().abs().max()
    return float((found - wanted).abs().max() / size), float((plain - wanted).abs().max() / size), patch


@pytest.mark.parametrize("name", EXPECTED)
def test_verdict_names_the_modules_own_parameters_and_what_they_serve(name: str) -> None:
    module = block(name)
    verdict = bk.check(module)
    found = {r.parameters[0]: r.capacity.json() for r in verdict.routes if len(r.parameters) == 1}
    assert verdict.patchable is True
    assert found == EXPECTED[name]
    assert set(found) <= {n for n, _ in module.named_parameters()}
    (graph,) = trace(module).kinds.values()
    nameless = {n.name.rsplit(".", 1)[-1].rstrip("_0123456789") for n in graph.nodes if isinstance(n.op, Opaque)}
    assert nameless == NAMELESS.get(name, set())


@pytest.mark.parametrize("name", EXPECTED)
def test_edited_block_gives_what_the_context_gave(name: str) -> None:
    module, (context, query) = block(name), vectors()
    weight_norm = name == "parametrized"  # its matrices are made of two parameters: none moves by itself
    modes = [("last", None, 1), ("last", "minimal", 1), ("each", None, 3)]
    modes += [] if weight_norm else [("last", "matrix", 1), ("all", None, 3)]
    for tokens, strategy, rows in modes:
        patched, plain, patch = errors(module, context, query, rows, tokens=tokens, strategy=strategy)
        assert patched < 5e-6, (tokens, strategy)
        assert plain > 0.05, (tokens, strategy)
        assert set(patch.changes) <= {n for n, _ in module.named_parameters()}


@pytest.mark.parametrize("name", own.MODELS)
def test_edited_model_gives_what_the_context_gave(name: str) -> None:
    module, (context, query) = model(name), ids()
    for tokens, strategy, rows in (("last", None, 1), ("last", "matrix", 1), ("each", None, 3), ("all", None, 3)):
        patched, plain, _ = errors(module, context, query, rows, tokens=tokens, strategy=strategy)
        assert patched < 5e-6, (tokens, strategy)
        assert plain > 0.05, (tokens, strategy)


@pytest.mark.parametrize("name", ["list", "library", "transposed"])
@pytest.mark.parametrize("tokens", ["last", "each", "all"])
def test_a_batch_of_prompts(name: str, tokens: str) -> None:
    module, (context, query) = model(name), ids(seed=8, batch=2)
    if name == "transposed" and tokens != "all":
        with pytest.raises(NotPatchable, match="no route"):  # rows of their own stand where the batch comes first
            absorb(module, context, query, tokens=tokens)
        return
    patched, plain, patch = errors(module, context, query, 1 if tokens == "last" else 3, tokens=tokens)
    assert patched < 5e-6
    assert plain > 0.05
    assert patch.batch == 2


@pytest.mark.parametrize(("dtype", "worst"), [("float64", 1e-7), ("float16", 3e-3), ("bfloat16", 3e-2)])
def test_in_the_models_own_dtype(dtype: str, worst: float) -> None:
    module = deepcopy(model("list")).to(getattr(torch, dtype))
    for tokens, rows in (("last", 1), ("each", 3), ("all", 3)):
        patched, plain, patch = errors(module, *ids(), rows, tokens=tokens)
        assert patched < worst
        assert plain > 0.05
        assert patch.dtype == dtype


def test_frozen_strided_and_shared_out_parameters() -> None:
    module = deepcopy(model("list"))
    for part in module.blocks:
        part.mlp.down.weight = nn.Parameter(part.mlp.down.weight.detach().t().contiguous().t(), requires_grad=False)
    assert not module.blocks[0].mlp.down.weight.is_contiguous()
    patched, plain, patch = errors(module, *ids(), 3, tokens="all", freeze=["attn*"])
    assert patched < 5e-6 < 0.05 < plain
    assert {n.split(".", 2)[-1] for n in patch.changes} == {"mlp.down.weight"}
    assert not module.blocks[0].mlp.down.weight.requires_grad


def test_parallel_wrapper() -> None:
    module = nn.DataParallel(model("list")).eval()
    patched, plain, patch = errors(module, *ids(), 1)
    assert patched < 5e-6 < 0.05 < plain
    assert all(n.startswith("module.blocks.") for n in patch.changes)


# -- what cannot be patched ------------------------------------------------------------------------


def test_one_block_run_several_times_is_named_as_shared() -> None:
    torch.manual_seed(0)
    module = own.drawn(own.Universal(own.LayerScale()))
    verdict = bk.check(module)
    assert verdict.patchable is not True
    reasons = {o.reason.partition(":")[0] for o in verdict.obstructions}
    assert "mlp.down.weight is tied" in reasons
    assert "gamma2 is tied" in reasons


def test_a_bare_attention_layer_has_no_route() -> None:
    torch.manual_seed(0)
    module = own.drawn(own.NoProjection(mlp=False))
    verdict = bk.check(module)
    assert verdict.patchable is not True
    assert {o.reason.split()[0] for o in verdict.obstructions} >= {"attn.q.weight", "attn.k.weight", "attn.v.weight"}
    with pytest.raises(NotPatchable, match="no route"):
        absorb(module, *vectors())


def test_a_later_block_makes_up_for_one_without_a_route() -> None:
    _, _, patch = errors(model("last_makes_up"), *ids(), 1)
    assert {n.split(".")[1] for n in patch.changes} == {"1"}


def test_the_verdict_of_a_stack_is_that_of_its_weakest_block() -> None:
    assert list(trace(model("different")).kinds) == ["blocks.0", "blocks.1", "blocks.2"]
    assert bk.check(model("different")).capacity.json() == own.D
    assert bk.check(model("last_makes_up")).patchable is not True


def test_without_a_context_there_is_nothing_to_do() -> None:
    module = own.drawn(own.MLP())
    verdict = bk.check(module)
    assert verdict.patchable is True
    assert [(r.parameters, r.source) for r in verdict.routes] == [((), "the output does not depend on the context")]
    assert not absorb(module, *vectors()).changes


def test_a_module_of_no_parameters() -> None:
    class Running(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.cumsum(1)

    verdict = bk.check(Running(), example=torch.randn(1, 11, own.D))
    assert verdict.patchable is False
    assert "looks at other tokens" in verdict.obstructions[0].reason
