"""A decoding step of a whole T6 as one CUDA graph, and `use`, which gives it to a model.

    from tpa_minimal import decode_graph
    decode_graph.use(model)         # model.generate(...) now replays one graph per token on a CUDA device

Launched one by one, a step's kernels take longer to launch than to run. In a graph they are launched together; for that
nothing may depend on numbers that Python knows: the position is a tensor on the device, `flash_decode.append` writes
there and `flash_decode.decode` reads up to there. A layer is 14 kernels: two norms, five matrix products, appending,
two of attention, silu, its product, and two sums (norms of one kernel each: PyTorch 2.9 or later; cuBLAS may add one to
a product that it splits).
"""

import functools

import torch
from torch import Tensor

from tpa_minimal.tpa import T6, Cache, TensorProductAttention


def graphed(function, device: str):
    """On CUDA, `function` recorded once as a graph and replayed, so that it is launched as a whole; else itself."""
    if device != "cuda":
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up where nothing is recorded, as the documentation of CUDA graphs asks
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


class Step:
    """`T6.hidden` for one new token of each sequence, in shapes that stay while the cache grows.

    model: T6 of TensorProductAttention; cache: of its `new_cache`, with room for a position. The step writes into the
    cache's own memory. Weights may be changed in place, but not moved, as long as the step is used.
    """

    def __init__(self, model: T6, cache: Cache):
        from tpa_minimal import flash_decode  # here, since Triton is an extra

        self.append, self.decode, self.model = flash_decode.append, flash_decode.decode, model
        self.kept = [layer.view(0, layer.max_len) for layer in cache]
        B, max_len, device = self.kept[0][0].shape[0], cache[0].max_len, self.kept[0][0].device
        self.token = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.length = torch.full((B,), cache.length + 1, dtype=torch.int32, device=device)  # with the new token
        ropes, positions = {block.attention.rope for block in model.blocks}, torch.empty(1, max_len, device=device)
        self.tables = {rope: rope.tables(0, positions) for rope in ropes}  # most often one, for all layers and steps
        self.run = graphed(self.launch, device.type)

    def launch(self) -> None:
        """All kernels of the step: from self.token (B, 1) at position self.length - 1 to self.out (B, 1, d_model)."""
        x = self.model.embedding(self.token)
        for block, kept in zip(self.model.blocks, self.kept):
            layer = block.attention
            new = layer.factor_proj(block.norm(x))  # (B, 1, all factors)
            a_q = new[..., : layer.sizes[0]].unflatten(-1, layer.shapes[0])  # (B, 1, R_Q, h)
            b_q = self.append(new, self.length, *self.tables[layer.rope], *kept)  # (B, 1, R_Q, d_h)
            attended = self.decode(a_q, b_q, *kept, self.length)  # (B, 1, h, d_h)
            x = x + layer.out_proj(attended.flatten(2))
            x = x + block.mlp(block.norm(x))
        self.out = self.model.norm(x)

    def __call__(self, token: Tensor, cache: Cache) -> Tensor:
        """token (B, 1) -> (B, 1, d_model); `cache` is that of the constructor, and grows by one position."""
        self.token.copy_(token)
        self.length.fill_(cache.length + 1)
        self.run()
        for layer in cache:
            layer.length += 1
        return self.out.clone()  # the next replay writes over it


def hidden(model: T6, tokens: Tensor, cache: Cache | None = None, padding: Tensor | None = None) -> Tensor:
    """What `T6.hidden` computes: by a `Step` that stays with the cache where that serves, else by it.

    It serves one new token after others, without padding or gradient, where `flash_decode`'s kernels serve.
    """
    from tpa_minimal import flash_decode

    if (
        cache is None
        or not 0 < cache.length < cache[0].max_len
        or tokens.shape[1] != 1
        or padding is not None
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled(tokens.device.type)
        or any(x.dtype != model.embedding.weight.dtype for x in cache[0].view(0, 1))
        or not flash_decode.serves(cache[0].view(0, 1))
    ):
        return T6.hidden(model, tokens, cache, padding)
    if not hasattr(cache, "step"):  # a graph pays from the second token on; transformers makes a new list for each
        cache.step = None
        return T6.hidden(model, tokens, cache, padding)
    cache.step = cache.step or Step(model, cache)
    return cache.step(tokens, cache)


def use(model: T6) -> T6:
    """Let `model` take each decoding step by one graph, and all else as `flash_decode.use` does; returns the model.

    Raises ValueError for an attention other than TensorProductAttention itself: a variant has other factors.
    """
    from tpa_minimal import flash_decode

    for block in model.blocks:
        if type(block.attention) is not TensorProductAttention:
            kind = type(block.attention).__name__
            raise ValueError(f"{kind} has no graph, only TensorProductAttention has; use flash_decode.use(model)")
    model.hidden = functools.partial(hidden, model)
    return flash_decode.use(model)
