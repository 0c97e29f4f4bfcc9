"""Which of a block's parameters can stand in for the context? A gated block, written down and asked.

python examples/ask.py
"""

import blockkit as bk

x = bk.stream()
v = x + bk.Attention(bk.RMSNorm(x), heads=8, kv_heads=2, head_dim=32, name="attention")
mlp = bk.GatedMLP(bk.RMSNorm(v), hidden=1024, activation="silu", name="mlp")
block = bk.Block(v + bk.Gain(mlp, name="layer_scale"), width=256)

print(bk.check(block))
for only in ("layer_scale.scale", "mlp.down_proj", "mlp.gate_proj"):
    verdict = bk.check(block, only=[only], tokens=100)
    print(f"\nonly {only}, for 100 tokens with one static value:\n{verdict}")
