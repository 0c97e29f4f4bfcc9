"""Encoder and decoder blocks of the catalogue against layers that others wrote, in float64."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from blockkit.absorbing.executor import Executor
from blockkit.absorbing.run import run_stream
from blockkit.design import catalog
from blockkit.design.architecture import Architecture, Block, Embedding, Head
from blockkit.design.components import RMSNorm
from blockkit.graph.arrays import NumpyArrays
from blockkit.graph.evaluate import evaluate
from blockkit.graph.graph import Graph
from blockkit.graph.packing import Packing

families = pytest.importorskip("families")
import torch  # noqa: E402
import transformers  # noqa: E402

LIMIT, TOKENS, MEMORY, VOCABULARY = 1e-12, 17, 13, 61
SIZES = {"d_model": 32, "d_ff": 40, "heads": 4, "head_dim": 8, "layers": 2}
State = dict[str, np.ndarray]


def randomised(module: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    for p in module.parameters():
        scale = 0.5 if p.ndim == 1 else 1.5 * p.shape[-1] ** -0.5
        p.copy_((0.5 if p.ndim == 1 else 0) + scale * torch.randn(p.shape, generator=generator))
    return module.eval()


def state_of(module: Any, prefix: str = "") -> State:
    return {n.removeprefix(prefix): v.detach().numpy() for n, v in module.state_dict().items() if n.startswith(prefix)}


def run_block(graph: Graph, parameters: State, x: np.ndarray, memory: np.ndarray | None = None) -> np.ndarray:
    assert {p.name for p in graph.parameters} == parameters.keys()
    packing = Packing(np.arange(len(x)), (len(x),), memory=() if memory is None else (memory,))
    return np.asarray(
        evaluate(graph, NumpyArrays(), parameters, {graph.input: x}, [graph.output], packing)[graph.output]
    )


def apart(ours: np.ndarray, theirs: Any) -> float:
    wanted = theirs[0].numpy()
    assert np.abs(wanted).max() > 0.3, "results near zero would be equal whatever the block does"
    return float(np.abs(ours - wanted).max())


# -- the first transformer ---------------------------------------------------------------------------


def attention_of(state: State, theirs: str, ours: str) -> State:
    """PyTorch's attention without biases, as the paper's, by our names."""
    parts = np.split(state[f"{theirs}.in_proj_weight"], 3)
    return {f"{ours}.{p}_proj": w for p, w in zip("qkvo", [*parts, state[f"{theirs}.out_proj.weight"]], strict=True)}


def rest_of(state: State, norms: dict[str, str]) -> State:
    found = {f"{ours}.{what}": state[f"{theirs}.{name}"] for theirs, ours in norms.items()
             for what, name in (("scale", "weight"), ("bias", "bias"))}  # fmt: skip
    for theirs, ours in (("linear1", "mlp.up_proj"), ("linear2", "mlp.down_proj")):
        found |= {ours: state[f"{theirs}.weight"], f"{ours}_bias": state[f"{theirs}.bias"]}
    return found


def first_transformer(cls: Any) -> Any:
    layer = cls(32, 4, 40, dropout=0.0, layer_norm_eps=1e-6, batch_first=True)
    randomised(layer)
    for name, p in layer.named_parameters():
        if "attn" in name and name.endswith("bias"):
            p.zero_()
    return layer


def test_the_first_encoder() -> None:
    graph = catalog.entry("vaswani-encoder").bound(SIZES, "small").graphs["block"]
    with families.in_float64():
        layer, x = first_transformer(torch.nn.TransformerEncoderLayer), torch.randn(1, TOKENS, 32)
        theirs = layer(x)
    state = state_of(layer)
    given = attention_of(state, "self_attn", "attention") | rest_of(state, {"norm1": "v", "norm2": "y"})
    assert apart(run_block(graph, given, x[0].numpy()), theirs) <= LIMIT


def test_the_first_decoder() -> None:
    graph = catalog.entry("vaswani-decoder").bound(SIZES, "small").graphs["block"]
    with families.in_float64():
        layer = first_transformer(torch.nn.TransformerDecoderLayer)
        x, memory = torch.randn(1, TOKENS, 32), torch.randn(1, MEMORY, 32)
        later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        theirs = layer(x, memory, tgt_mask=later)
    state = state_of(layer)
    given = attention_of(state, "self_attn", "attention") | attention_of(state, "multihead_attn", "cross_attention")
    given |= rest_of(state, {"norm1": "u", "norm2": "v", "norm3": "y"})
    assert apart(run_block(graph, given, x[0].numpy(), memory[0].numpy()), theirs) <= LIMIT


# -- ViT ---------------------------------------------------------------------------------------------

VIT = {
    "layernorm_before.weight": "attention_norm.scale", "layernorm_before.bias": "attention_norm.bias",
    "layernorm_after.weight": "mlp_norm.scale", "layernorm_after.bias": "mlp_norm.bias",
    "mlp.fc1.weight": "mlp.up_proj", "mlp.fc1.bias": "mlp.up_proj_bias",
    "mlp.fc2.weight": "mlp.down_proj", "mlp.fc2.bias": "mlp.down_proj_bias",
    **{f"attention.{p}_proj.weight": f"attention.{p}_proj" for p in "qkvo"},
    **{f"attention.{p}_proj.bias": f"attention.{p}_proj_bias" for p in "qkvo"},
}  # fmt: skip


def test_a_block_of_vit() -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40, image_size=16,
        patch_size=4, layer_norm_eps=1e-6,
    )  # fmt: skip
    with families.in_float64():
        model = randomised(transformers.AutoModel.from_config(config, attn_implementation="eager"))
        x = torch.randn(1, TOKENS, 32)
        out = model.layers[0](x)
        theirs = out[0] if isinstance(out, tuple) else out
    given = {VIT[name]: value for name, value in state_of(model.layers[0]).items()}
    graph = catalog.entry("vit").bound(SIZES, "small").graphs["block"]
    assert apart(run_block(graph, given, x[0].numpy()), theirs) <= LIMIT


# -- T5: all blocks, with what they share, through the executor --------------------------------------

T5_NAMES = {
    "SelfAttention": "attention", "EncDecAttention": "cross_attention", "DenseReluDense": "mlp", "q": "q_proj",
    "k": "k_proj", "v": "v_proj", "o": "o_proj", "wi": "up_proj", "wi_0": "gate_proj", "wi_1": "up_proj",
    "wo": "down_proj", "relative_attention_bias": "rel_bias",
}  # fmt: skip
NORMS = {"encoder": ["attention_norm", "mlp_norm"], "decoder": ["attention_norm", "cross_norm", "mlp_norm"]}


def t5_slot(part: str, name: str) -> str:
    """`1.layer.0.SelfAttention.q.weight` -> `layers.1.attention.q_proj`."""
    layer, _, number, *rest, _ = name.split(".")
    if rest == ["layer_norm"]:
        return f"layers.{layer}.{NORMS[part][int(number)]}.scale"
    owner, slot = (T5_NAMES[part] for part in rest)
    return f"shared.block.{owner}.{slot}" if slot == "rel_bias" else f"layers.{layer}.{owner}.{slot}"


def t5(part: str, feed_forward: str) -> tuple[Any, Architecture, State]:
    """One half of a random T5, the catalogue's architecture of it made a whole model, and its parameters."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, feed_forward_proj=feed_forward,
        layer_norm_epsilon=1e-6,
    )  # fmt: skip
    model = randomised(transformers.AutoModel.from_config(config, attn_implementation="eager"))
    half = getattr(model, part)
    entry = catalog.entry(f"t5-{part}")
    published = entry.variants["base" if feed_forward == "relu" else "v1.1-base"]
    design = entry.bound({**SIZES, **{key: value for key, value in published.items() if "." in key}}, "small")
    whole = replace(
        design, embedding=Embedding(VOCABULARY), head=Head(), final=Block("norm", 32, {"norm": RMSNorm("x")})
    )
    parameters = {t5_slot(part, name): value for name, value in state_of(half, "block.").items()}
    return half, whole, {"embedding": state_of(model)["shared.weight"], **parameters}


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_stream_of_t5(part: str, feed_forward: str) -> None:
    seen = {}

    def hook(module: Any, args: Any, out: Any) -> None:
        seen["y"] = out[0] if isinstance(out, tuple) else out

    with families.in_float64():
        half, design, parameters = t5(part, feed_forward)
        half.block[-1].register_forward_hook(hook)
        ids, memory = torch.randint(0, VOCABULARY, (1, 40)), torch.randn(1, MEMORY, 32)
        half(input_ids=ids, **({"encoder_hidden_states": memory} if part == "decoder" else {}))
    executor = Executor(design, NumpyArrays(), parameters, "float64")
    given = memory[0].numpy() if part == "decoder" else None
    ours = run_stream(executor, ids[0].numpy(), np.arange(40), memory=given)
    assert apart(ours, seen["y"]) <= LIMIT
