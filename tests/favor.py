"""FAVOR+ attention as the encoder calls it, for q, k and v of a test."""

import torch

from scbert.model.attention import attend_in_chunks, features_first, positions_first


def favor_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, projection: torch.Tensor, key_stabiliser: str = "head", **options
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Call `scbert.attention.attend_in_chunks`, as the encoder does, for q, k, v: (cells, heads, positions, dim_head).

    `projection` are the random features, (features, dim_head). Returned are tensors of the same layout: what is found,
    and with the option `weight`, of the queries, the attention that each position receives, (cells, heads, positions).
    """

    def project(names, *chunk):
        return [features_first(chunk["qkv".index(name)]) for name in names]

    def finish(out, *_):
        return positions_first(out, q.shape[1])

    inputs = [x.transpose(1, 2) for x in (q, k, v)]
    out, received = attend_in_chunks(inputs, q.shape[1], projection, key_stabiliser, project, finish, **options)
    return out.transpose(1, 2).to(q.dtype), received
