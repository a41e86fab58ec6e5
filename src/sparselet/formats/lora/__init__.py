"""LoRA of PEFT."""
