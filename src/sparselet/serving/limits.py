"""`ServingLimits`: the bounds of a server."""

from dataclasses import dataclass

from sparselet.setting_checks import check_at_least, check_settings


@dataclass(frozen=True)
class ServingLimits:
    """Bounds of a server. Raises ConfigError for a number out of range."""

    max_rows: int = 32
    """Requests of one expert that are answered together."""
    max_queue: int = 256
    """Requests that wait; further ones are refused with 429."""
    cache_tokens: int = 65536
    """Tokens whose keys and values are kept, over all requests that have begun."""
    max_tokens: int = 1024
    """Longest answer that a request may ask for, in tokens."""
    merge_cache_bytes: int = 2**30
    """Memory for experts that were merged for a request."""
    max_wait: float = 0.5
    """Seconds that an expert's requests wait before the engine leaves another expert for them."""
    mixed: bool = True
    """Answer several experts in one batch where that is measured to be cheaper than swapping them; float32 only."""
    max_body_bytes: int = 2**20
    """Longest body of a request."""

    def __post_init__(self) -> None:
        check_settings(self)
        check_at_least(self, 1, "max_rows", "max_queue", "cache_tokens", "max_tokens", "max_body_bytes")
        check_at_least(self, 0, "merge_cache_bytes", "max_wait")
