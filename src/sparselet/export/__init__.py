"""Taking adapters out into the world."""

from sparselet.export.checkpoint import export_checkpoint

__all__ = ["export_checkpoint"]
