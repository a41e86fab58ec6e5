"""How sparse a model's hidden states are, and what that goes with."""
