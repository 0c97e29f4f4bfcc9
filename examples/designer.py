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
# # A designer's notebook: is my block patchable?
#
# You have an idea for a block and no weights yet. Which of its parameters could stand in for a context, for how many
# tokens, and if none, what would it take? Needs nothing but `pip install -e .` and matplotlib (extra `plot`).
#
# Open it with `jupytext --to ipynb examples/designer.py`, or run it as it stands.

# %%
import matplotlib.pyplot as plt

import blockkit as bk

# %% [markdown]
# ## The first idea
#
# A gated MLP behind attention, with a norm *without parameters* behind the MLP, to keep the stream tame. The attention
# is shared by all layers (tied), so it may not move for one layer alone.


# %%
def block(post_scale: bool = False, tied: tuple[str, ...] = ("attention.*",), activation: str = "silu") -> bk.Block:
    """One design in its variants."""
    x = bk.stream()
    v = x + bk.Attention(bk.RMSNorm(x, scale=False), heads=4, head_dim=16, name="attention")
    mlp = bk.GatedMLP(bk.RMSNorm(v, name="mlp_norm"), hidden=256, activation=activation, name="mlp")
    return bk.Block(v + bk.RMSNorm(mlp, scale=post_scale, name="post_norm"), width=64, tied=tied)


first = bk.explain(block())
print(first)
assert first.verdict.patchable is not True

# %% [markdown]
# The answer says which reachable set is too small, and lists the smallest changes that would unblock it. Every one was
# judged before it was printed. Take the first: give the norm a scale.

# %%
second = bk.check(block(post_scale=True))
print(second)
assert second.patchable

# %% [markdown]
# One scale vector serves one token. Is there a route for a whole query with one static patch? Ask for 16 tokens, then
# untie the attention.

# %%
assert not bk.check(block(post_scale=True), tokens=16).patchable
untied = bk.check(block(post_scale=True, tied=()), tokens=16)
print(untied)
assert untied.patchable

# %% [markdown]
# ## Where it comes from
#
# What a component can do is derived from the laws of its operations: input control (it can ignore a change of what it
# reads) and output control (it can be made to give any result).

# %%
mlp = bk.GatedMLP(bk.RMSNorm(bk.stream()), hidden=256, name="mlp")
print(bk.controls(mlp))
print(bk.plan(block(post_scale=True, tied=()), strategy="paper"))

# %% [markdown]
# ## Is it true?
#
# Draw small random weights, solve the patch, run the edited block, compare. An error above 1e-9 would be a no.

# %%
for strategy in ("stable", "paper", "minimal", "matrix"):
    found = bk.verify(block(post_scale=True, tied=()), strategy=strategy)
    print(f"{strategy:<8} relative error {found.relative_linf:.1e}, without a patch {found.unpatched_relative:.1e}")
    assert found.exact

# %% [markdown]
# ## Against what others do
#
# The routes of some published blocks at one size: how many tokens one static value of a parameter can serve.

# %%
sizes = {"d_model": 1024, "d_ff": 4096, "heads": 12, "kv_heads": 4, "head_dim": 64, "layers": 24}
names = ["gpt2", "gptj", "llama", "gemma3", "olmo2", "palm"]
capacities = {}
for name in names:
    verdict = bk.check(bk.replace_constants(bk.load(name), sizes))
    assert verdict.patchable
    capacities[name] = {r.parameters[0]: r.capacity.estimate() for r in verdict.routes if len(r.parameters) == 1}

figure, axis = plt.subplots(figsize=(8, 4))
for place, (_, routes) in enumerate(capacities.items()):
    axis.scatter([place] * len(routes), list(routes.values()))
    for parameter, tokens in routes.items():
        axis.annotate(parameter, (place, tokens), textcoords="offset points", xytext=(4, 3), fontsize=6)
axis.set_xticks(range(len(names)), names)
axis.set_yscale("log")
axis.set_ylabel("tokens that one static value serves")
axis.set_title("Routes of one parameter")
plt.show()
