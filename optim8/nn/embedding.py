"""The embedding that trains stably with 8-bit optimizer state."""

from __future__ import annotations

from typing import Any

import torch

from optim8.optim.override import override_module_parameter


class StableEmbedding(torch.nn.Embedding):
    """An embedding with layer normalization behind it, xavier initialization, and 32-bit optimizer state.

    Gradients of embeddings differ much in size, by how often a token occurs; each of the three keeps that from
    unsettling training (Dettmers et al. 2021, arXiv 2110.02861, section 2.3). The override of `optim_bits` holds for
    `weight` in every optimizer of this library, and for copies of the module. It is for code that was written for
    bitsandbytes: since second moments are kept as roots, a torch.nn.Embedding can have 8-bit state (docs/numerics.md).

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, device, dtype: as
            for torch.nn.Embedding.
        _weight: as for torch.nn.Embedding; given weights are not initialized.

    Shape: integers of any shape [*] give [*, embedding_dim], of the weight's dtype. The norm is computed in the
    dtype of its own parameters, which is torch's default dtype unless the whole model is cast.
    """

    norm: torch.nn.LayerNorm

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
            dtype=dtype,
        )
        self.norm = torch.nn.LayerNorm(embedding_dim, device=device)
        self._keep_32bit_state()

    def _keep_32bit_state(self) -> None:
        override_module_parameter("StableEmbedding", self, "weight", {"optim_bits": 32}, idle=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy (deepcopy, pickle) is another module, which overrides do not know.
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._keep_32bit_state()

    def reset_parameters(self) -> None:
        """Draw the weight from the uniform distribution of Glorot and Bengio (2010); the padding's row is 0."""
        torch.nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        found = super().forward(input)
        return self.norm(found.to(self.norm.weight.dtype)).to(self.weight.dtype)  # type: ignore[no-any-return]
