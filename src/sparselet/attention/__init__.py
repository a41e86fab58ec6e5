"""Sparse attention: which keys a query sees, by patterns of the literature, with what they use counted. It stands alone."""

from sparselet.attention.patterns import PATTERNS, AttentionPattern, parse_pattern
from sparselet.attention.switch import AttentionCounts, SparseAttention, sparse_attention

__all__ = ["PATTERNS", "AttentionCounts", "AttentionPattern", "SparseAttention", "parse_pattern", "sparse_attention"]
