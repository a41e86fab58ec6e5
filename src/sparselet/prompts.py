"""From rows to tokens: the prompt as the model is asked, the target as it should answer.

Training and evaluation use the same functions, so that a model is asked the way it was trained.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str, chat_template: bool, max_length: int) -> list[int]:
    """The token ids of a prompt, cut from the left to `max_length`.

    chat_template: ask through the tokenizer's chat template, as one user's message; without a template, or when false,
    the text itself.
    """
    if uses_template(tokenizer, chat_template):
        message = [{"role": "user", "content": text}]
        tokens = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert isinstance(tokens, list)
        return [int(t) for t in tokens if isinstance(t, int)][-max_length:]
    return list(tokenizer(text)["input_ids"])[-max_length:]  # pyright: ignore[reportArgumentType]


def target_tokens(tokenizer: PreTrainedTokenizerBase, text: str, chat_template: bool, encoder_decoder: bool) -> list[int]:
    """The token ids of a target, with the end token. After a bare prompt a space comes first."""
    bare = not uses_template(tokenizer, chat_template) and not encoder_decoder
    tokens = list(tokenizer(f" {text}" if bare else text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]
    assert isinstance(tokenizer.eos_token_id, int)
    return [*tokens, tokenizer.eos_token_id]


def shared_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """The tokens that all prompts begin with, but for at least one token of each."""
    first, last = min(prompts), max(prompts)
    limit = max(0, min(len(prompt) for prompt in prompts) - 1)
    same = next((i for i in range(limit) if first[i] != last[i]), limit)
    return first[:same]


def uses_template(tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> bool:
    """Whether prompts go through a chat template: it is wanted, and the tokenizer has one."""
    return chat_template and getattr(tokenizer, "chat_template", None) is not None


def pad(sequences: Sequence[Sequence[int]], value: int, left: bool) -> list[list[int]]:
    """The sequences with `value` added on one side up to the longest one's length."""
    longest = max(len(sequence) for sequence in sequences)
    fill = [[value] * (longest - len(sequence)) for sequence in sequences]
    return [[*f, *s] if left else [*s, *f] for f, s in zip(fill, sequences, strict=True)]
