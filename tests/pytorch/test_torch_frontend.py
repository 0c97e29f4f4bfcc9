"""From modules to graphs: operations, parameters, taps, and where the blocks of a model are."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch_modules as own  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from blockkit.backends.pytorch import trace  # noqa: E402
from blockkit.backends.pytorch.calling.interface import Interface, vocabulary  # noqa: E402
from blockkit.backends.pytorch.calling.token_rows import TOKENS_FIRST, batch_rows  # noqa: E402
from blockkit.graph.graph import Graph  # noqa: E402
from blockkit.graph.ops import LayerNorm, RMSNorm, Scale  # noqa: E402

D = own.D


def graph_of(module: nn.Module) -> Graph:
    return trace(module).blocks[0].graph


def shown(graph: Graph) -> list[str]:
    return [f"{n.name} = {n.op.kind}({', '.join(n.args)})" for n in graph.nodes]


def test_a_blocks_graph_in_full() -> None:
    assert shown(graph_of(own.drawn(own.LayerScale()))) == [
        "n1.layer_norm = layer_norm(stream)",
        "n1.multiply = multiply(n1.layer_norm, n1.weight)",
        "n1.add = add(n1.multiply, n1.bias)",
        "attn.q.matmul = matmul(n1.add, attn.q.weight)",
        "attn.k.matmul = matmul(n1.add, attn.k.weight)",
        "attn.v.matmul = matmul(n1.add, attn.v.weight)",
        "attn.mix = mix(attn.v.matmul, attn.q.matmul, attn.k.matmul)",
        "attn.o.matmul = matmul(attn.mix, attn.o.weight)",
        "multiply = multiply(attn.o.matmul, gamma1)",
        "add = add(stream, multiply)",
        "n2.layer_norm = layer_norm(add)",
        "n2.multiply = multiply(n2.layer_norm, n2.weight)",
        "n2.add = add(n2.multiply, n2.bias)",
        "mlp.up.matmul = matmul(n2.add, mlp.up.weight)",
        "mlp.up.add = add(mlp.up.matmul, mlp.up.bias)",
        "mlp.gelu = activation(mlp.up.add)",
        "mlp.down.matmul = matmul(mlp.gelu, mlp.down.weight)",
        "mlp.down.add = add(mlp.down.matmul, mlp.down.bias)",
        "multiply_2 = multiply(mlp.down.add, gamma2)",
        "add_2 = add(add, multiply_2)",
    ]


class Expression(nn.Module):
    """A function of a stream and of some parameters."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.w, self.one = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(1))
        self.m, self.halves = nn.Parameter(torch.ones(D, D)), nn.Parameter(torch.ones(2, 1))
        self.stack = nn.Parameter(torch.ones(D, 2, D // 2))
        self.register_buffer("table", torch.linspace(1, 2, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def mean_norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps)


def halves(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1))


def norm_of_halves(x: Tensor, w: Tensor) -> Tensor:
    return functional.rms_norm(halves(x), (D // 2,), w[: D // 2]).flatten(-2)


EXPRESSIONS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "x - w": (lambda s, x: x - s.w, "opaque"),
    "1 - x": (lambda s, x: 1 - x, "scale add"),
    "(1 - x) x": (lambda s, x: (1 - x) * x, "scale multiply"),
    "x (1 + w)": (lambda s, x: x * (1 + s.w), "multiply"),
    "x exp(w)": (lambda s, x: x * s.w.exp(), "multiply"),
    "x one": (lambda s, x: s.one * x, "multiply"),
    "x table": (lambda s, x: x * s.table + 3 * s.table, "multiply add"),
    "x per half": (lambda s, x: (halves(x) * s.halves).flatten(-2), "multiply"),
    "x / 4": (lambda s, x: x / 4, "scale"),
    "x / (2 + sigmoid x)": (lambda s, x: x / (2 + torch.sigmoid(x)), "activation add opaque multiply"),
    "x - 2 tanh x": (lambda s, x: torch.sub(x, torch.tanh(x), alpha=2), "activation scale add"),
    "softcap": (lambda s, x: 5 * torch.tanh(x / 5), "scale activation scale"),
    "clamp": (lambda s, x: x.clamp(min=-1) + x.clamp_max(1) + functional.relu6(x), "clamp clamp clamp add add"),
    "dropout": (lambda s, x: functional.dropout(x, 0.5, s.training) + 0, "scale"),
    "broadcast signal": (lambda s, x: x * x[..., :1], "slice repeat multiply"),
    "swapped halves": (lambda s, x: torch.cat([x[..., D // 2 :], x[..., : D // 2]], -1), "slice slice concat"),
    "linear": (lambda s, x: functional.linear(x, s.m, s.w), "matmul add"),
    "addmm": (lambda s, x: torch.addmm(s.w, x[0], s.m)[None], "matmul add"),
    "einsum to heads": (lambda s, x: torch.einsum("bnd,dhe->bnhe", x, s.stack).flatten(-2), "matmul"),
    "einsum from heads": (lambda s, x: torch.einsum("bnhe,dhe->bnd", halves(x), s.stack), "matmul"),
    "two matrices in one": (lambda s, x: x @ (s.m @ s.m), "opaque"),
    "silu": (lambda s, x: x * torch.sigmoid(x), "activation"),
    "quick gelu": (lambda s, x: x * torch.sigmoid(1.702 * x), "activation"),
    "squared relu": (lambda s, x: torch.relu(x).square() + torch.relu(x) ** 2, "activation activation add"),
    "softplus": (lambda s, x: functional.softplus(x), "opaque"),
    "where": (lambda s, x: torch.where(x > 0, x, 0.1 * x), "opaque scale opaque"),
    "rms of heads": (lambda s, x: norm_of_halves(x, s.w), "slice rms_norm slice rms_norm concat multiply"),
    "masked": (lambda s, x: x.masked_fill(x > 2, 0.0), "opaque opaque"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_as_primitives(name: str) -> None:
    function, wanted = EXPRESSIONS[name]
    assert " ".join(sorted(n.op.kind for n in graph_of(Expression(function).eval()).nodes)) == " ".join(
        sorted(wanted.split())
    )


@pytest.mark.parametrize(
    ("function", "ops"),
    [
        (lambda s, x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3), [RMSNorm(1e-3)]),
        (lambda s, x: x / torch.sqrt(x.pow(2).sum(-1, keepdim=True) + 1e-2), [RMSNorm(1e-2 / D), Scale(D**-0.5)]),
        (lambda s, x: functional.normalize(x, dim=-1), [RMSNorm(0.0), Scale(D**-0.5)]),
        (lambda s, x: mean_norm(x, 1e-5), [LayerNorm(1e-5)]),
        (lambda s, x: functional.layer_norm(x, (D,), eps=1e-3), [LayerNorm(1e-3)]),
    ],
)
def test_norms_written_out_with_their_epsilon(function: Any, ops: list[Any]) -> None:
    assert [n.op for n in graph_of(Expression(function).eval()).nodes] == ops


def test_known_values_are_each_blocks_own() -> None:
    class Scaled(own.LayerScale):
        def __init__(self, size: float) -> None:
            super().__init__()
            self.alpha = nn.Parameter(torch.tensor([size]))
            self.register_buffer("table", torch.full((D,), size))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.table * self.alpha.exp()

    model = own.LanguageModel(Scaled(2.0), Scaled(3.0)).eval()
    traced, tensors = trace(model), {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert len(traced.kinds) == 1
    fixed = [p for p in traced.blocks[0].graph.parameters if p.frozen]
    assert [p.name for p in fixed] == ["table", "alpha.fixed"]
    for block, size in zip(traced.blocks, (2.0, 3.0), strict=True):
        assert torch.allclose(block.value("table", tensors.__getitem__), torch.full((D,), size))
        assert torch.allclose(block.value("alpha.fixed", tensors.__getitem__), torch.tensor(size).exp().expand(D))


def test_settings_tell_blocks_apart() -> None:
    class Set(own.LayerScale):
        def __init__(self, function: Any, power: float) -> None:
            super().__init__()
            self.function, self.powers = function, (power,)
            self.register_buffer("size", torch.tensor(power))

        def forward(self, x: Tensor) -> Tensor:
            return self.size * super().forward(x) + self.function(x)

    blocks = [Set(torch.tanh, 1.5), Set(torch.tanh, 1.5), Set(torch.relu, 1.5), Set(torch.tanh, 2.5)]
    assert list(trace(own.LanguageModel(*blocks).eval()).kinds) == ["blocks.0", "blocks.2", "blocks.3"]


class Heeding(own.LayerScale):
    """Does something else after its first block, which only numbers show: by place, by settings, by an argument."""

    def __init__(self, how: str, place: int) -> None:
        super().__init__()
        self.how, self.layer_idx, self.settings = how, place, {"limit": 9.0 if place else 1000.0}

    def forward(self, x: Tensor, place: int = 0) -> Tensor:
        y = super().forward(x)
        match self.how:
            case "place":
                return torch.tanh(y) if self.layer_idx else y
            case "argument":
                return torch.tanh(y) if place else y
            case "limit":
                return y.clamp(-self.settings["limit"], self.settings["limit"])
        return y


class Heeded(own.LanguageModel):
    def run(self, x: Tensor) -> Tensor:
        for place, block in enumerate(self.blocks):
            x = block(x, place) if block.how == "argument" else block(x)
        return x


@pytest.mark.parametrize(("how", "kinds"), [("", 1), ("place", 2), ("argument", 2), ("limit", 2)])
def test_what_a_block_heeds_besides_its_settings(how: str, kinds: int) -> None:
    model = own.drawn(Heeded(*(Heeding(how, place) for place in range(3))))
    assert list(trace(model).kinds) == [f"blocks.{i}" for i in range(kinds)]


def test_a_trace_is_made_anew_for_new_settings_and_hooks() -> None:
    model = own.drawn(Heeded(*(Heeding("place", place) for place in range(2))))
    assert len(trace(model).kinds) == 2
    model.blocks[1].layer_idx = 0
    assert len(trace(model).kinds) == 1
    handle = model.blocks[1].mlp.register_forward_hook(lambda module, args, result: result.tanh())
    assert len(trace(model).kinds) == 2
    handle.remove()
    assert len(trace(model).kinds) == 1


def test_a_trace_does_not_keep_the_model() -> None:
    model = own.drawn(own.LanguageModel(own.LayerScale()))
    model.register_forward_hook(lambda module, args, result, model=model: result)
    model.function = model.forward
    trace(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class Casting(own.LayerScale):
    """Names the precision that it wants."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        return x + self.mlp(functional.softmax(self.n2(x), -1, dtype=torch.float32).to(torch.bfloat16))


def test_casts_to_a_named_precision_are_followed() -> None:
    graph = graph_of(own.drawn(Casting()).bfloat16())
    assert "softmax" in {node.op.kind for node in graph.nodes} and not any(n.op.kind == "opaque" for n in graph.nodes)


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_the_epsilon_of_a_norm_that_names_none(dtype: torch.dtype, eps: torch.dtype) -> None:
    block = own.drawn(own.LayerScale())
    block.n2 = nn.RMSNorm(D)
    norms = [n.op for n in graph_of(block.to(dtype)).nodes if isinstance(n.op, RMSNorm)]
    assert [op.eps for op in norms] == [torch.finfo(eps).eps]


def test_a_model_with_few_places_is_run_on_few_tokens() -> None:
    model = own.drawn(own.LanguageModel(own.LayerScale(), positions=True))
    model.positions = nn.Embedding(8, D)
    assert len(trace(model).blocks) == 1


def test_places_that_a_block_counts_itself_are_context() -> None:
    class Placed(own.LayerScale):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(64, D))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.table[: x.shape[1]]

    graph = graph_of(Placed().eval())
    assert graph.node[graph.output].op.mixing


def test_taps_are_all_reads_in_order() -> None:
    (block,) = trace(own.drawn(own.Recurrent())).blocks
    reads = [sorted(t.parameters) for t in block.taps]
    assert reads.count(["n2.bias", "n2.weight"]) == 2
    assert [t.output[0] for t in block.taps if "n2.weight" in t.parameters] == ["n2.add", "n2.add_2"]
    (block,) = trace(own.drawn(own.LibraryAttention())).blocks
    outputs = {name: t.output[1] for t in block.taps for name in t.parameters}
    assert outputs["attn.in_proj_weight"] == outputs["attn.out_proj.weight"] == TOKENS_FIRST
    assert outputs["mlp.down.weight"] == 1
    (block,) = trace(own.drawn(own.Convolved())).blocks
    assert [p for t in block.taps if not t.by_row for p in sorted(t.parameters)] == [
        "up.bias", "up.weight", "down.bias", "down.weight",
    ]  # fmt: skip


def test_rows_of_a_batch() -> None:
    value = torch.arange(2 * 3 * 4).reshape(2, 3, 4)  # [batch, tokens, width]
    for other, axis in (
        (value, 1),
        (value.flatten(0, 1), 0),
        (value.mT, 2),
        (value.transpose(0, 1), TOKENS_FIRST),
        (value.transpose(0, 1).reshape(6, 4), TOKENS_FIRST),
    ):
        assert torch.equal(batch_rows(other, axis, 2), value)


# -- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("list", ["blocks.0", "blocks.1"]),
        ("sequential", ["stack.0", "stack.1"]),
        ("named", ["block1", "block2"]),
        ("nested", ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]),
        ("inline", ["attention.0", "attention.1"]),
        ("library", ["encoder.layers.0", "encoder.layers.1"]),
        ("recycled", ["blocks.0", "blocks.0", "blocks.1"]),
    ],
)
def test_where_the_blocks_are(name: str, paths: list[str]) -> None:
    assert [b.path for b in trace(own.drawn(own.MODELS[name]())).blocks] == paths


def test_streams_by_place_keyword_and_in_nested_results() -> None:
    (block,) = trace(own.drawn(own.GivesMapping())).blocks
    assert (block.stream, block.result) == ("hidden", ("hidden",))
    (block,) = trace(own.drawn(own.GivesTuple())).blocks
    assert (block.stream, block.result) == (0, (0,))


def test_what_forward_takes() -> None:
    value = torch.randn(1, 3, D)
    assert Interface.of(own.GivesMapping()).inputs(value) == ((), {"hidden": value})
    assert Interface.of(nn.DataParallel(own.LayerScale())).inputs(value, use_cache=False) == ((value,), {})


def test_the_table_that_ids_are_looked_up_in() -> None:
    torch.manual_seed(0)
    assert vocabulary(own.MODELS["positions"]()) == own.IDS
    assert vocabulary(own.MODELS["list"]()) == own.IDS
    assert vocabulary(own.LayerScale()) is None


def test_a_trace_is_kept_until_the_model_changes() -> None:
    model = own.drawn(own.MODELS["list"]())
    first = trace(model)
    assert trace(model) is first
    model.blocks[1].mlp.up = nn.Linear(D, own.HIDDEN)
    assert trace(model) is not first


def test_decoder_layers_read_another_sequence() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(D, own.HEADS, own.HIDDEN, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            return self.layer(x, memory, tgt_mask=mask)  # type: ignore[no-any-return]

    example = {"x": torch.randn(1, 11, D), "memory": torch.randn(1, 5, D)}
    (block,) = trace(own.drawn(Decoder()), example).blocks
    assert [n.name for n in block.graph.nodes if n.op.mixing] == ["layer.self_attn.mix", "layer.multihead_attn.mix"]
