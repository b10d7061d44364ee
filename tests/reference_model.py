"""The model and its optimizer once more, plainly: one matrix at a time, nothing fused, batched or sharded.

Written from the recipe alone and sharing no code with nanochat/. Weights are a dictionary with the model's
names.
"""

import math

import torch


def rms(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def turn(x, base=100_000.0):
    """Rotate channel pairs (i, i + D/2) of x (B, T, H, D) by minus position / base^(2 i / D)."""
    t, d = x.size(1), x.size(3)
    out = torch.empty_like(x)
    for i in range(d // 2):
        angle = torch.arange(t, dtype=torch.float32) * torch.tensor(base) ** (-2 * i / d)
        c, s = angle.cos().to(x)[:, None], angle.sin().to(x)[:, None]
        a, b = x[..., i], x[..., i + d // 2]
        out[..., i] = a * c + b * s
        out[..., i + d // 2] = -a * s + b * c
    return out


def look(q, k, v, hidden):
    """One map: q, k (B, T, D) normed and times 1.2, v (B, T, Dv), hidden (B or 1, T, T) -> (B, T, Dv)."""
    q, k = 1.2 * rms(q), 1.2 * rms(k)
    scores = q @ k.transpose(1, 2) / math.sqrt(q.size(-1))
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


def reference_head(w, block, layer, config, y, head, hidden, values):
    """Output of one head, (B, T, D). y (B, T, C) normed input, values (B, T, D) of its K/V head."""
    kind, d = config.attention_kind, config.head_dim
    kv = head // (config.n_head // config.n_kv_head)
    q_rows, k_rows = w[block + "attn.q.weight"], w[block + "attn.k.weight"][kv * d : (kv + 1) * d]

    def turned(rows):
        return turn((y @ rows.T)[:, :, None])[:, :, 0]

    if kind == "softmax":
        return look(turned(q_rows[head * d : (head + 1) * d]), turned(k_rows), values, hidden)
    if kind == "diff1":
        q_rows, half = q_rows[head * d : (head + 1) * d], d // 2
        a1 = look(turned(q_rows[:half]), turned(k_rows[:half]), values, hidden)
        a2 = look(turned(q_rows[half:]), turned(k_rows[half:]), values, hidden)
        q1, k1, q2, k2 = w[block + "attn.differential.vectors"]
        at_start = 0.8 - 0.6 * math.exp(-0.3 * layer)
        z = a1 - (torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + at_start) * a2
        return (1 - at_start) * z / (z.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    even, odd = 2 * head * d, (2 * head + 1) * d
    a1 = look(turned(q_rows[even : even + d]), turned(k_rows), values, hidden)
    a2 = look(turned(q_rows[odd : odd + d]), turned(k_rows), values, hidden)
    share = 1 / (1 + torch.exp(-(y @ w[block + "attn.differential.share.weight"][head])))
    return a1 - share[..., None] * a2


def reference_pairs(ids, rows):
    """Row of each token and the one before it (-1 at the beginning), in the integers of Python."""
    return torch.tensor(
        [
            [
                ((36313 * now) ^ (27191 * before)) % rows
                for before, now in zip([-1, *row[:-1]], row, strict=True)
            ]
            for row in ids.tolist()
        ]
    )


def reference_logits(w, config, ids, bos=None):
    """w: name -> tensor. ids (B, T) -> (B, T, V) softcapped logits; documents begin at bos, if given."""
    n, h, hkv, d = config.n_layer, config.n_head, config.n_kv_head, config.head_dim
    t = ids.size(1)
    short = min(config.sequence_len, 128 * math.ceil(math.ceil(config.sequence_len / 4) / 128))
    e = rms(w["embed.weight"][ids])
    x = e.clone()
    gate = 1 / (1 + torch.exp(-(e[:, 1:, :24] @ w["smear_gate.weight"].T)))
    x[:, 1:] = e[:, 1:] + w["smear_scale"] * gate * e[:, :-1]
    x0 = x
    for i in range(n):
        block = f"blocks.{i}."
        x = w["resid_scale"][i] * x + w["x0_scale"][i] * x0
        if "bigram.weight" in w:
            x = x + w["bigram_scale"][i] * w["bigram.weight"][reference_pairs(ids, len(w["bigram.weight"]))]
        y = rms(x)
        v = (y @ w[block + "attn.v.weight"].T).view(*ids.shape, hkv, d)
        if (n - 1 - i) % 2 == 0:
            table = w[f"value_embeds.{i}.weight"][ids].view(*ids.shape, hkv, d)
            g = 3 / (1 + torch.exp(-(y[..., :12] @ w[block + "attn.value_gate.weight"].T)))
            v = v + g[..., None] * table
        letter = "L" if i == n - 1 else config.window_pattern[i % len(config.window_pattern)]
        window = short if letter == "S" else config.sequence_len
        hidden = torch.ones(1, t, t, dtype=torch.bool)
        for row in range(t):
            hidden[0, row, max(0, row - window) : row + 1] = False
        if bos is not None:
            document = (ids == bos).cumsum(1)
            hidden = hidden | (document[:, :, None] != document[:, None, :])
        heads = [
            reference_head(w, block, i, config, y, head, hidden, v[:, :, head // (h // hkv)])
            for head in range(h)
        ]
        x = x + torch.cat(heads, -1) @ w[block + "attn.out.weight"].T
        up = (rms(x) @ w[block + "mlp.up.weight"].T).clamp(min=0) ** 2
        x = x + up @ w[block + "mlp.down.weight"].T
        if i == n // 2:
            middle = x
    x = rms(x - w["backout_scale"] * middle)
    return 15 * torch.tanh(x @ w["head.weight"][: config.vocab_size].T / 15)


def reference_loss(w, config, ids, targets):
    """Mean over the targets that are not -1."""
    logits = reference_logits(w, config, ids)
    at = logits.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    nats = torch.logsumexp(logits, -1) - at
    return nats[targets != -1].mean()


COEFFICIENTS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


class ReferenceOptimizer:
    """Muon and AdamW with one parameter at a time. params: name -> tensor, changed in place."""

    def __init__(self, params, kinds, groups):
        self.params, self.kinds, self.groups = params, kinds, groups
        self.state = {name: {"t": 0, "a": 0.0, "b": 0.0} for name in params}

    def step(self, grads, lr_mult, mu, muon_wd):
        for name, p in self.params.items():
            group = self.groups[self.kinds[name]]
            update = self.muon if group.optimizer == "muon" else self.adam
            p.copy_(update(p, grads[name], self.state[name], group, lr_mult, mu, muon_wd))

    def adam(self, p, g, s, group, lr_mult, mu, muon_wd):
        s["t"] += 1
        s["a"] = group.beta1 * s["a"] + (1 - group.beta1) * g
        s["b"] = group.beta2 * s["b"] + (1 - group.beta2) * g**2
        lr = group.lr * lr_mult
        p = p - lr * group.weight_decay * p
        denominator = (s["b"] / (1 - group.beta2 ** s["t"])).sqrt() + group.eps
        return p - lr / (1 - group.beta1 ** s["t"]) * s["a"] / denominator

    def muon(self, p, g, s, group, lr_mult, mu, muon_wd):
        rows, cols = p.shape
        s["a"] = mu * s["a"] + (1 - mu) * g
        u = (1 - mu) * g + mu * s["a"]
        size = u.pow(2).sum().sqrt()
        u = torch.stack([row * (size / math.sqrt(rows)) / max(row.pow(2).sum().sqrt(), 1e-6) for row in u])
        x = u / (1.01 * u.pow(2).sum().sqrt() + 1e-6)
        for a, b, c in COEFFICIENTS:
            if rows > cols:
                gram = x.T @ x
                x = a * x + x @ (b * gram + c * gram @ gram)
            else:
                gram = x @ x.T
                x = a * x + (b * gram + c * gram @ gram) @ x
        if x.any():
            x = x * math.sqrt(min(rows, cols)) / x.pow(2).sum().sqrt()
        variance = x.pow(2).mean(1, keepdim=True) if rows >= cols else x.pow(2).mean(0, keepdim=True)
        s["b"] = group.beta2 * s["b"] + (1 - group.beta2) * variance
        y = x / s["b"].clamp(min=1e-10).sqrt()
        if y.any():
            y = y * x.pow(2).sum().sqrt() / y.pow(2).sum().sqrt()
        lr = group.lr * lr_mult * max(1, rows / cols) ** 0.5
        return p - lr * (y + muon_wd * p * (y * p >= 0))
