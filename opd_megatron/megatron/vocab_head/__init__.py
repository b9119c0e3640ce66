"""Vocabulary-parallel head: from hidden rows and the output weight, in chunks of tokens, without a batch of logits."""

from opd_megatron.megatron.vocab_head.baseline import target_moments
from opd_megatron.megatron.vocab_head.divergence import (
    record_divergence,
    target_divergence,
)
from opd_megatron.megatron.vocab_head.selected import selected_log_probs, token_log_probs
from opd_megatron.megatron.vocab_head.target import Mixture, Side, Target
from opd_megatron.megatron.vocab_head.top_k import TopK, top_k

__all__ = [
    "Mixture",
    "Side",
    "Target",
    "TopK",
    "record_divergence",
    "selected_log_probs",
    "target_divergence",
    "target_moments",
    "token_log_probs",
    "top_k",
]
