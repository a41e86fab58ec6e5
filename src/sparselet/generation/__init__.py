"""From rows to tokens, and from prompts to answers: what training, evaluation and serving stand on."""
