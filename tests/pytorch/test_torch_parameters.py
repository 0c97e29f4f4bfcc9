"""Every call that reads an intercepted parameter is seen, says what it is, and can be given another result."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from blockkit.backends.pytorch.watching.intercepted import Event, Intercepted  # noqa: E402
from blockkit.backends.pytorch.watching.interception import intercepting  # noqa: E402
from blockkit.errors import BadInput  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def events_of(parameter: Tensor, call: object) -> tuple[list[Event], object]:
    seen: list[Event] = []
    result = call(Intercepted.of(parameter, "w", lambda e: seen.append(e)))  # type: ignore[operator,func-returns-value]
    return seen, result


W = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))  # [d_out, d_in]
Z = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(2))

PRODUCTS = {
    "linear": (W, lambda w: functional.linear(Z, w), False),
    "linear, keywords": (W, lambda w: functional.linear(input=Z, weight=w, bias=torch.ones(3)), False),
    "linear of W.t()": (W.t().contiguous(), lambda w: functional.linear(Z, w.t()), True),
    "addmm": (W.t().contiguous(), lambda w: torch.addmm(torch.ones(3), Z.view(-1, 4), w), True),
    "z @ W": (W.t().contiguous(), lambda w: Z @ w, True),
    "matmul": (W.t().contiguous(), lambda w: torch.matmul(Z, w), True),
    "mm": (W.t().contiguous(), lambda w: Z[0].mm(w), True),
    "z @ W.t()": (W, lambda w: Z @ w.t(), False),
    "z @ W.T": (W, lambda w: Z @ w.T, False),
    "z @ W.mT": (W, lambda w: Z @ w.mT, False),
    "z @ W.transpose(0, -1)": (W, lambda w: Z @ w.transpose(0, -1), False),
    "z @ W.permute(1, 0), twice turned": (W.t().contiguous(), lambda w: Z @ w.permute(1, 0).T, True),
    "W.float().t().to()": (W, lambda w: Z @ w.float().t().to(torch.float32), False),
    "einsum oi": (W, lambda w: torch.einsum("bti,oi->bto", Z, w), False),
    "einsum io": (W.t().contiguous(), lambda w: torch.einsum("...i,io->...o", Z, w), True),
    "einsum W first": (W, lambda w: torch.einsum("oi,bti->bto", w, Z), False),
}


@pytest.mark.parametrize("kind", PRODUCTS)
def test_product_and_its_orientation_are_read_off_the_call(kind: str) -> None:
    stored, call, transposed = PRODUCTS[kind]
    (event,), result = events_of(stored, call)
    found = event.product("w")
    assert found is not None and found.transposed is transposed and found.index is None
    assert event.names == ("w",) and type(result) is Tensor
    matrix = stored.t() if transposed else stored
    bias = torch.ones(3) if kind in ("addmm", "linear, keywords") else 0
    assert torch.allclose(found.z @ matrix.t() + bias, event.output)
    other = torch.randn_like(stored)
    assert torch.equal(event.with_values({"w": other}), call(other))


@pytest.mark.parametrize(
    "call",
    [
        lambda w: w @ Z[0].t(),
        lambda w: functional.linear(Z, w[:2]),
        lambda w: functional.linear(Z, w * 2),
        lambda w: functional.linear(Z, w.reshape(3, 4)),
        lambda w: functional.linear(Z[..., :3], w.view(4, 3)),
        lambda w: torch.einsum("bti,oi->bot", Z, w),
        lambda w: functional.embedding(torch.tensor([1, 2]), w),
        lambda w: torch.addmm(torch.ones(3), Z[0], w.t(), alpha=2),
        lambda w: Z * w[0],
    ],
)
def test_what_is_no_plain_product_is_not_called_one(call: object) -> None:
    seen, _ = events_of(W, call)
    assert seen and all(event.product("w") is None for event in seen)


def test_slices_of_a_stack_are_products_with_that_slice() -> None:
    stack, index = torch.randn(4, 3, 4), torch.tensor(2)
    calls = {
        2: lambda w: functional.linear(Z, w[2]),
        3: lambda w: functional.linear(Z, w[-1]),
        1: lambda w: functional.linear(Z, w.select(0, 1)),
        0: lambda w: functional.linear(Z, w.unbind(0)[0]),
    }
    for wanted, call in calls.items():
        (event,), _ = events_of(stack, call)
        found = event.product("w")
        assert found is not None and (found.index, found.transposed) == (wanted, False)
    (event,), _ = events_of(stack, lambda w: Z @ w.transpose(-2, -1)[index])
    found = event.product("w")
    assert found is not None and (found.index, found.transposed) == (2, False)
    (event,), result = events_of(stack, lambda w: w[torch.tensor([0, 2])])
    assert event.names == ("w",) and torch.equal(result, stack[[0, 2]])


def test_what_is_computed_of_parameters_alone_is_no_event_and_is_computed_anew() -> None:
    v = torch.randn(6, dtype=torch.bfloat16)

    def call(w: Tensor) -> Tensor:
        scale = torch.cat([(1.0 + w.float()).exp().chunk(2)[1], -w.float().detach()[:3], 2 - w.type_as(X)[:2]])
        assert w.shape == (6,) and w.dtype == torch.bfloat16 and w.dim() == 1 and not w.requires_grad
        assert type(torch.zeros_like(w)) is Tensor and type(X.type_as(w)) is Tensor
        return X * scale.unsqueeze(0).expand(2, -1)

    X = torch.randn(2, 8)  # noqa: N806
    (event,), result = events_of(v, call)
    assert type(result) is Tensor and torch.equal(result, call(v)) and event.signals[0] is X
    other = torch.randn(6, dtype=torch.bfloat16)
    assert torch.equal(event.with_values({"w": other}), call(other))
    assert torch.equal(event.with_values({"unread": other}), result)


def test_computing_widely_keeps_what_bfloat16_would_round_away() -> None:
    z, w = torch.randn(2, 8).bfloat16(), torch.randn(8).bfloat16()
    (event,), _ = events_of(w, lambda w: z * w)
    other = torch.randn(8)
    assert torch.equal(event.with_values({"w": other}, wide=torch.float32), z.float() * other)


@pytest.mark.parametrize(
    "write",
    [
        lambda x, w: x.mul_(w),
        lambda x, w: x.__imul__(w),
        lambda x, w: x.__setitem__((slice(None), 0), w[0]),
        lambda x, w: x.copy_(w),
        lambda x, w: torch.mul(x.clone(), w, out=x),
    ],
)
def test_writing_into_a_signal_is_an_event_that_can_be_repeated(write: object) -> None:
    w, x = torch.randn(4), torch.randn(3, 4)
    expected, other, seen = x.clone(), torch.randn(4), []
    moved = x.clone()
    write(expected, w), write(moved, other)

    def handler(event: Event) -> None:
        seen.append(event.with_values({"w": other}))
        assert type(event.output) is Tensor

    write(x, Intercepted.of(w, "w", handler))
    assert torch.equal(x, expected) and torch.equal(seen[0], moved)


def test_a_handler_gives_the_result_and_two_handlers_are_asked_one_inside_the_other() -> None:
    linear = nn.Linear(4, 3)
    x = torch.randn(2, 4)
    asked = []

    def bias(event: Event) -> Tensor:
        asked.append(event.names)
        return event.output + 1

    def both(event: Event) -> Tensor:
        asked.append(event.names)
        return event.output * 2

    plain = linear(x)
    with intercepting(linear, ["bias"], bias), intercepting(linear, ["weight", "bias"], both):
        assert torch.equal(linear(x), (plain + 1) * 2)
    assert asked == [("weight", "bias"), ("bias",)]


class Own(nn.Module):
    """Parameters wherever modules keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(4))
        self.listed = nn.ParameterList([torch.randn(4), torch.randn(4, 4)])
        self.named = nn.ParameterDict({"up": torch.randn(4, 4)})
        self.experts = nn.Parameter(torch.randn(2, 4, 4))
        self.embed, self.norm, self.rms = nn.Embedding(9, 4), nn.LayerNorm(4), nn.RMSNorm(4)
        self.rnn = nn.GRU(4, 4, batch_first=True)
        self.head = nn.Linear(4, 9)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.rms(self.norm(self.embed(ids))) * self.raw + self.listed[0]
        x = x @ self.listed[1] @ self.named["up"]
        x = x + sum(functional.linear(x, w) for w in self.experts)
        return self.head(self.rnn(x)[0])


def llama() -> nn.Module:
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 31}
    config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=31))


def gemma3() -> nn.Module:
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 31}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, **heads))


def mixtral() -> nn.Module:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 31}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads, num_local_experts=4))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    found = model(ids)
    return found if isinstance(found, Tensor) else found.logits


def places(model: nn.Module) -> dict[str, int]:
    return {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("build", [Own, llama, gpt2, gemma3, mixtral])
def test_a_model_runs_as_before_and_every_parameter_is_seen(build: object, mode: object) -> None:
    model = build().eval()
    ids, before, seen = torch.tensor([[1, 2, 3, 4]]), places(model), set()
    names = [name for name, _ in model.named_parameters()]

    def handler(event: Event) -> None:
        assert not any(isinstance(t, Intercepted) for t in (*event.args, *event.kwargs.values()))
        seen.update(event.names)

    with mode():
        plain = logits(model, ids)
        with intercepting(model, names, handler):
            result = logits(model, ids)
    assert torch.equal(result, plain) and type(result) is Tensor
    assert places(model) == before and set(names) == seen


def test_shared_parameters_report_the_name_that_was_asked_for() -> None:
    model, seen = Own(), []
    with intercepting(model, ["head.weight"], lambda e: seen.append((e.names, e.func.__name__))):
        model(torch.tensor([[1, 2]]))
    assert seen == [(("head.weight",), "embedding"), (("head.weight",), "linear")]


def test_parameters_are_back_after_an_exception_and_unknown_names_are_refused() -> None:
    model = Own()
    before = places(model)
    lists = [id(p) for p in model.rnn._flat_weights]

    def fail(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), intercepting(model, list(before), fail):
        model(torch.tensor([[1, 2]]))
    assert places(model) == before and [id(p) for p in model.rnn._flat_weights] == lists
    with (
        pytest.raises(BadInput, match=r"no parameter 'norm\.wight'.*norm\.weight"),
        intercepting(model, ["raw", "norm.wight"], fail),
    ):
        pass
    assert places(model) == before


def test_gradients_copies_and_files_are_those_of_the_parameter() -> None:
    linear, x = nn.Linear(4, 3), torch.randn(2, 4)
    with intercepting(linear, ["weight"], lambda e: e.output * 2):
        linear(x).sum().backward()
        twin = copy.deepcopy(linear)
        stored = pickle.loads(pickle.dumps(linear.weight))
        state = linear.state_dict()
    assert torch.equal(linear.weight.grad, 2 * x.sum(0).expand(3, 4))
    assert torch.allclose(twin(x), linear(x) * 2) and type(linear.weight) is nn.Parameter
    assert type(stored) is nn.Parameter and torch.equal(stored, linear.weight)
    assert torch.equal(state["weight"], linear.weight)
