"""Wrong TPAs: each is tpa.py with one mistake that somebody made or could make.

Every one must be rejected by at least one ordinary test of tests/test_tpa.py (see tests/test_mutants.py).
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    right: str  # occurs exactly once in tpa.py
    wrong: str


MUTANTS = [
    # RoPE
    Mutant("value factors rotated", "apply_rope(b_k, cos, sin), a_v, b_v", "apply_rope(b_k, cos, sin), a_v, apply_rope(b_v, cos, sin)"),
    Mutant("queries unrotated", "a_q, apply_rope(b_q, cos, sin)", "a_q, b_q"),
    Mutant("keys unrotated", "a_k, apply_rope(b_k, cos, sin)", "a_k, b_k"),
    Mutant("rotated the other way round", "x1 * cos + x2 * sin, x2 * cos - x1 * sin", "x1 * cos - x2 * sin, x2 * cos + x1 * sin"),
    Mutant("scaled by angles instead of rotated", "x1 * cos + x2 * sin, x2 * cos - x1 * sin", "x1 * cos, x2 * sin"),
    Mutant("neighbouring features paired", "x1, x2 = x.chunk(2, dim=-1)", "x1, x2 = x[..., ::2], x[..., 1::2]"),
    Mutant("tables rounded to bfloat16", "return angles.cos().to(dtype), angles.sin().to(dtype)", "return angles.cos().bfloat16().to(dtype), angles.sin().bfloat16().to(dtype)"),
    Mutant("tables as narrow as the input", "    dtype = torch.promote_types(dtype, torch.float32)\n    return angles", "    return angles"),
    Mutant("angles in float32", 'torch.float32 if positions.device.type == "mps" else torch.float64', "torch.float32"),
    Mutant("frequencies count features, not pairs", "base ** (-2 * j / d_head)", "base ** (-j / d_head)"),
    Mutant("the layer ignores rope_base", "RoPE(config.d_head, config.rope_base)", "RoPE(config.d_head, 10000.0)"),
    Mutant("unequal rotations share one pair of tables", "if rope and all(other == rope for other in others):", "if rope:"),
    Mutant("shared tables restart at 0", "rope.tables(0 if cache is None else cache.length, x)", "rope.tables(0, x)"),
    Mutant("tables anew in each layer", "x = block(x, None if cache is None else cache[i], **shared)", 'x = block(x, None if cache is None else cache[i], **{k: v for k, v in shared.items() if k != "rope"})'),
    # factors
    Mutant("assemble without 1/R", "a.mT @ (b / b.shape[-2])", "a.mT @ b"),
    Mutant("factors laid out head by head", "part.unflatten(-1, shape) for", "part.unflatten(-1, shape[::-1]).mT for"),
    Mutant("the authors' bound under the paper's name", 'if config.init == "authors":', 'if config.init != "authors":'),
    Mutant("fan without the rank", "n_in, n_out = config.d_model, rank * width", "n_in, n_out = config.d_model, width"),
    Mutant("output projection not started at zero", "        self.out_proj.weight.zero_()\n", ""),
    # positions and masks
    Mutant("positions restart at 0 in each chunk", "cos, sin = rope or self.rope.tables(start, x)", "cos, sin = rope or self.rope.tables(0, x)"),
    Mutant("mask aligned with the first key", "~unseen(positions, positions[M - T :], padding)", "~unseen(positions, positions[:T], padding)"),
    Mutant("mask lets one later token in", "later = keys > queries[:, None]", "later = keys > queries[:, None] + 1"),
    Mutant("mask hides the token itself", "later = keys > queries[:, None]", "later = keys >= queries[:, None]"),
    Mutant("padding is seen", "later if padding is None else later | ", "later if True else later | "),
    Mutant("padding hides one token of the text", "(keys < torch.minimum(padding", "(keys <= torch.minimum(padding"),
    Mutant("padding sees nothing at all", "torch.minimum(padding[:, None, None], queries[:, None])", "padding[:, None, None]"),
    # attention in factor space
    Mutant("no 1/R_K", "(rank_k * math.sqrt(d_head))", "math.sqrt(d_head)"),
    Mutant("no 1/R_V", "(y / (s * rank_v))", "(y / s)"),
    Mutant("scale without the root", "(rank_k * math.sqrt(d_head))", "(rank_k * d_head)"),
    Mutant("powers of 2", "(scores - m_new).exp(), (m - m_new).exp()", "(scores - m_new).exp2(), (m - m_new).exp2()"),
    Mutant("mask forgets where the chunk starts", "queries = torch.arange(start, start + T", "queries = torch.arange(T"),
    Mutant("mask counts positions within the block", "torch.arange(b_kb.shape[1], device=q.device) + i * n", "torch.arange(b_kb.shape[1], device=q.device)"),
    Mutant("softmax over the heads", "s = s * shrink + weights.sum(-1, keepdim=True)", "s = s * shrink + weights.sum(-1, keepdim=True).mean(2, keepdim=True)"),
    Mutant("earlier blocks not rescaled", "y = y * shrink + ", "y = y + "),
    Mutant("running sum not rescaled", "s = s * shrink + ", "s = s + "),
    Mutant("maximum of the last block only", "m_new = torch.maximum(m, scores.detach().amax(-1, keepdim=True))", "m_new = scores.detach().amax(-1, keepdim=True)"),
    Mutant("no maximum subtracted", "m_new = torch.maximum(m, scores.detach().amax(-1, keepdim=True))", "m_new = torch.zeros_like(m)"),
    Mutant("only the first rank of the keys", '"bthnr,bnrh->bthn", p, a_kb', '"bthnr,bnrh->bthn", p[..., :1], a_kb[:, :, :1]'),
    Mutant("only the first rank of the values", '"bthn,bnrh,bnrd->bthd", weights, a_vb, b_vb', '"bthn,bnrh,bnrd->bthd", weights, a_vb[:, :, :1], b_vb[:, :, :1]'),
    Mutant("accumulation in the cache's half precision", "dtype = torch.promote_types(b_k.dtype, torch.float32)  # a softmax", "dtype = b_k.dtype  # a softmax"),
    Mutant("all of the cache in one block", "x.split(n, dim=1)", "x.split(x.shape[1], dim=1)"),
    Mutant("K and V assembled while decoding", "if start > 0 and a_q.shape[1] <= DECODE_TOKENS:", "if start > 0 and a_q.shape[1] <= 0:"),
    Mutant("factor space from the second token only", "if start > 0 and a_q.shape[1] <= DECODE_TOKENS:", "if start > 0 and 1 < a_q.shape[1] <= DECODE_TOKENS:"),
    # cache
    Mutant("the cache keeps the graph", "place.copy_(x.detach())", "place.copy_(x)"),
    Mutant("the first call takes the cache's copies", "factors = cached if start else factors", "factors = cached"),
    Mutant("truncate forgets nothing", "        self.length = length\n", "        pass\n"),
    Mutant("truncate only in the first layer", "            layer.truncate(length)\n", "            layer.truncate(length)\n            break\n"),
    Mutant("bytes of the room, not of what is cached", "for view in self.view(0, self.length)", "for view in self.view(0, self.max_len)"),
    Mutant("a full cache starts over", "if self.length + T > self.max_len:", "if self.length + T > self.max_len and self.truncate(0):"),
    Mutant("a smaller batch is broadcast", "if expected != given:", "if [s[1:] for s in expected] != [s[1:] for s in given]:"),
    Mutant("the cache is as wide as the widest", "torch.zeros(batch_size, R, max_len, width,", "torch.zeros(batch_size, R, max_len, max(w for _, w in shapes),"),
    # T6
    Mutant("no residual around attention", "x = x + self.attention(self.norm(x), cache, **shared)", "x = self.attention(self.norm(x), cache, **shared)"),
    Mutant("no norm before SwiGLU", "return x + self.mlp(self.norm(x))", "return x + self.mlp(x)"),
    Mutant("gate and up exchanged", "F.silu(self.gate_proj(x)) * self.up_proj(x)", "self.gate_proj(x) * F.silu(self.up_proj(x))"),
    Mutant("all layers share the first layer's cache", "cache[i]", "cache[0]"),
    Mutant("no final norm", "        return self.norm(x)\n", "        return x\n"),
    Mutant("d_ff rounded instead of floored", "8 * self.d_model // 3", "round(8 * self.d_model / 3)"),
    Mutant("the prompt is fed again at each step", "self.hidden(new if use_cache else tokens, cache, padding)", "self.hidden(tokens, cache, padding)"),
    Mutant("top_k keeps too many", "logits.topk(min(top_k, logits.shape[-1]))", "logits.topk(min(top_k + 1, logits.shape[-1]))"),
    Mutant("temperature multiplies", "(logits - logits.amax(-1, keepdim=True)) / temperature", "(logits - logits.amax(-1, keepdim=True)) * temperature"),
    Mutant("a tiny temperature overflows", "(logits - logits.amax(-1, keepdim=True)) / temperature", "logits / temperature"),
    Mutant("generate forgets the padding", "tokens, cache, padding)  # (B, T or 1", "tokens, cache)  # (B, T or 1"),
]  # fmt: skip
