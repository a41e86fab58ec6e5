"""Taking adapters out into the world."""

from sparselet.export.checkpoint import export_checkpoint
from sparselet.export.gguf import export_gguf_checkpoint
from sparselet.export.lora import export_lora
from sparselet.export.peft import export_shira, export_super_tuning

__all__ = ["export_checkpoint", "export_gguf_checkpoint", "export_lora", "export_shira", "export_super_tuning"]
