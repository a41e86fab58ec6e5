"""`MergeCache`: experts that are merged for a request, kept by the content of what is merged, within a bound of bytes."""

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from sparselet.errors import RequestRefused
from sparselet.merging import merge
from sparselet.merging.methods import get_method
from sparselet.profiles.profile import Profile
from sparselet.serving.latest import Latest
from sparselet.serving.served_expert import FitCheck, ServedExpert, serve_expert

MAX_MEMBERS = 64


class MergeCache:
    """Merges by method, parameters, and each member's digest and weight. The least recently used ones leave first.

    limit: bytes of all kept merges. fits: the check against the base model.
    hits, misses: of `merged`.
    """

    def __init__(self, limit: int, fits: FitCheck) -> None:
        self.limit, self._fits = limit, fits
        self.hits = self.misses = 0
        self._kept: Latest[str, ServedExpert] = Latest(limit, lambda expert: expert.bytes)
        self._merging = threading.Lock()

    @property
    def bytes(self) -> int:
        """Of what is kept now."""
        return self._kept.size

    def merged(self, members: Sequence[tuple[ServedExpert, float]], method: str, parameters: Mapping[str, Any]) -> ServedExpert:
        """The merge of the members, computed at its first use, one merge at a time.

        Raises RequestRefused (members without a change, more than 64, or more than the cache holds), and what `merge` raises.
        """
        adapters = [expert.adapter for expert, _ in members if expert.adapter is not None]
        if not 0 < len(members) <= MAX_MEMBERS or len(adapters) < len(members):
            raise RequestRefused(f"experts must be 1 to {MAX_MEMBERS} experts; the base model is in each of them.", "experts")
        size = sum(expert.bytes for expert, _ in members)
        if size > self.limit:
            raise RequestRefused(
                f"these experts have {size:,} bytes, and merges may have {self.limit:,}; merge them with `sparselet merge` "
                "and serve the result.",
                "experts",
            )
        weights = [weight for _, weight in members]
        content = [expert.digest for expert, _ in members]
        if get_method(method).needs_profiles:
            content += [_profile_digest(adapter.profile) for adapter in adapters if adapter.profile is not None]
        key = json.dumps([method, parameters, content, weights], sort_keys=True, default=repr)
        kept = self._find(key)
        if kept is not None:
            return kept
        with self._merging:
            kept = self._find(key)
            if kept is None:
                self.misses += 1
                kept = self._kept.keep(key, serve_expert(merge(adapters, method, weights, parameters), self._fits))
        return kept

    def _find(self, key: str) -> ServedExpert | None:
        kept = self._kept.get(key)
        self.hits += kept is not None
        return kept


def _profile_digest(profile: Profile) -> str:
    """SHA-256 of what tells the rows of a profile apart: their number and their prompts' states. Moments stay unread."""
    states = (profile.prompts.mean, profile.prompts.covariance.factor, profile.prompts.covariance.diagonal)
    digest = hashlib.sha256(json.dumps([profile.tokens, profile.rows, profile.prompts.count]).encode())
    for tensor in states:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
