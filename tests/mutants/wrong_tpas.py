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
    Mutant("angles in float32", 'torch.float32 if positions.device.type == "mps" else torch.float64', "torch.float32"),
    Mutant("frequencies count features, not pairs", "base ** (-2 * j / d_head)", "base ** (-j / d_head)"),
    # factors
    Mutant("assemble without 1/R", "a.mT @ (b / b.shape[-2])", "a.mT @ b"),
    Mutant("factors laid out head by head", "part.unflatten(-1, shape) for", "part.unflatten(-1, shape[::-1]).mT for"),
    Mutant("the authors' bound under the paper's name", 'if config.init == "authors":', 'if config.init != "authors":'),
    Mutant("fan without the rank", "n_in, n_out = config.d_model, rank * width", "n_in, n_out = config.d_model, width"),
    Mutant("output matrix not started at zero", "        self.out_proj.weight.zero_()\n", ""),
    # positions and masks
    Mutant("positions restart at 0 in each chunk", "= self.factors(x, start)", "= self.factors(x, 0)"),
    Mutant("mask aligned with the first key", ".tril(M - T)", ".tril()"),
    Mutant("mask lets one later token in", ".tril(M - T)", ".tril(M - T + 1)"),
    # attention in factor space
    Mutant("no 1/R_K", "(math.log2(math.e) / (rank_k * math.sqrt(d_head)))", "(math.log2(math.e) / math.sqrt(d_head))"),
    Mutant("no 1/R_V", "(y / (s.unsqueeze(-1) * rank_v))", "(y / s.unsqueeze(-1))"),
    Mutant("scale without the root", "(rank_k * math.sqrt(d_head))", "(rank_k * d_head)"),
    Mutant("powers of 2 without log2(e)", "math.log2(math.e) /", "1 /"),
    Mutant("mask hides the token itself", "[:, None] > positions", "[:, None] >= positions"),
    Mutant("mask forgets where the chunk starts", "positions = torch.arange(start, start + T, device=q.device)\n        m", "positions = torch.arange(T, device=q.device)\n        m"),
    Mutant("softmax over the heads", "s = s * shrink + weights.sum(1)", "s = s * shrink + weights.sum(1).mean(-1, keepdim=True)"),
    Mutant("earlier blocks not rescaled", "y = y * shrink.unsqueeze(-1) + ", "y = y + "),
    Mutant("running sum not rescaled", "s = s * shrink + ", "s = s + "),
    Mutant("only the first rank of the keys", "for r in range(1, rank_k):", "for r in range(1, 1):"),
    Mutant("mask counts positions within the block", "ahead = torch.arange(first, first + n,", "ahead = torch.arange(n,"),
    # cache
    Mutant("truncate forgets nothing", "        self.length = length\n", "        pass\n"),
    Mutant("truncate only in the first layer", "            layer.truncate(length)\n", "            layer.truncate(length)\n            break\n"),
    Mutant("bytes of the room, not of what is held", "for view in self._views(0, self.length)", "for view in self._views(0, self.max_len)"),
    Mutant("a full cache starts over", "if new_length > self.max_len:", "if new_length > self.max_len and self.truncate(0):"),
    Mutant("a smaller batch is broadcast", "if place.shape != new.shape:", "if place.shape[1:] != new.shape[1:]:"),
    # T6
    Mutant("no residual around attention", "x = x + self.attention(self.norm(x), cache)", "x = self.attention(self.norm(x), cache)"),
    Mutant("no norm before SwiGLU", "return x + self.mlp(self.norm(x))", "return x + self.mlp(x)"),
    Mutant("gate and up exchanged", "F.silu(self.gate_proj(x)) * self.up_proj(x)", "self.gate_proj(x) * F.silu(self.up_proj(x))"),
    Mutant("all layers share the first layer's cache", "cache[i]", "cache[0]"),
    Mutant("no final norm", "        return self.norm(x)\n", "        return x\n"),
    Mutant("the prompt is fed again at each step", "self.hidden(new if use_cache else tokens, cache)", "self.hidden(tokens, cache)"),
    Mutant("top_k keeps too many", "logits.topk(min(top_k, logits.shape[-1]))", "logits.topk(min(top_k + 1, logits.shape[-1]))"),
    Mutant("temperature multiplies", "logits / temperature", "logits * temperature"),
]  # fmt: skip
