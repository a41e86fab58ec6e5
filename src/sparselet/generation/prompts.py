"""From rows to tokens: prompts, targets, and the tokens that end an answer.

Training and evaluation use the same functions, so that a model gets the prompts it was trained on, and its answers end with
the token it was trained to end them with.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sparselet.adapter_format import PLACEHOLDER, is_prompt
from sparselet.errors import ConfigError, ModelError, TaskError
from sparselet.io.printable import reason
from sparselet.io.time_limit import time_limit
from sparselet.models import position_limit, vocabulary_size
from sparselet.tasks.rows import Prompt

_PROBES = ("probe one", "another")
_TEMPLATE_SECONDS = 5.0  # for a chat template to render one conversation


@dataclass(frozen=True)
class PromptFormat:
    """How prompts and targets of one model are encoded.

    template: prompts go through the tokenizer's chat template. parts: it takes a message's content as a list of parts.
    control: the texts of the tokenizer's control tokens. appended: number of tokens that the tokenizer appends to a text.
    encoder_decoder: the prompt goes to an encoder, the target to a decoder.
    begin: the token that answers are forced to begin with, such as a language's. end: the token that targets end with.
    ends: the tokens that end an answer: `end` and those of the generation settings. vocabulary: token ids are below it.
    positions: the limit of tokens of prompt and answer together, or of a decoder's output. encoder_positions: of the prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    template: bool
    parts: bool
    control: tuple[str, ...]
    appended: int
    encoder_decoder: bool
    begin: int | None
    end: int | None
    ends: frozenset[int]
    vocabulary: int
    positions: int | None
    encoder_positions: int | None


def prompt_format(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> PromptFormat:
    """The prompt format of a model. chat_template: use the tokenizer's chat template, where it has one.

    Targets end with the token with which the template ends an answer, or with the tokenizer's end token; if only one of the
    two is in the model's generation settings, with that one. Without either it is the first of the generation settings.
    Raises ModelError for a template that fails, or that leaves out the user's message.
    """
    template = chat_template and tokenizer.chat_template is not None
    parts = template and _takes_parts(tokenizer)
    control = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    control |= {*tokenizer.all_special_tokens}
    settings = model.generation_config
    configured = end_tokens(settings) if settings else []
    turn_end = _turn_end(tokenizer, parts, control) if template else None
    candidates = [token for token in (turn_end, tokenizer.eos_token_id) if isinstance(token, int)]
    end = next((token for token in candidates if token in configured), next(iter([*candidates, *configured]), None))
    encoder_decoder = bool(model.config.is_encoder_decoder)
    return PromptFormat(
        tokenizer=tokenizer,
        template=template,
        parts=parts,
        control=tuple(sorted(control)),
        appended=0 if encoder_decoder else _count_appended(tokenizer),
        encoder_decoder=encoder_decoder,
        begin=settings.forced_bos_token_id if encoder_decoder and settings else None,
        end=end,
        ends=frozenset([*configured, *([] if end is None else [end])]),
        vocabulary=vocabulary_size(model),
        positions=position_limit(model),
        encoder_positions=position_limit(model, encoder=True) if encoder_decoder else None,
    )


def in_prompt(text: str | None, prompt: Prompt) -> Prompt:
    """An expert's prompt with this input in the place of `{input}`; of a conversation, its last user's message is the input.

    text: None leaves the input as it is. Raises TaskError for a conversation without a user's message.
    """
    if text is None:
        return prompt
    if isinstance(prompt, str):
        return text.replace(PLACEHOLDER, prompt)
    last = max((i for i, message in enumerate(prompt) if message.role == "user"), default=None)
    if last is None:
        raise TaskError("has no user's message, which the expert's prompt is put around.")
    message = replace(prompt[last], content=text.replace(PLACEHOLDER, prompt[last].content))
    return (*prompt[:last], message, *prompt[last + 1 :])


def check_prompt(field: str, text: str) -> None:
    """Raise ConfigError, naming the field, for a prompt without the placeholder, or with several."""
    if not is_prompt(text):
        raise ConfigError(f"{field} must have {PLACEHOLDER} in it once, where the input goes, got {text!r:.80}.")


def prompt_tokens(form: PromptFormat, prompt: Prompt) -> list[int]:
    """The token ids of a prompt: one user's message or a conversation through the chat template, or the text as it is.

    A control token that the text spells out is encoded as plain text. Tokens that the tokenizer appends to a text, such as
    an end token, go to an encoder only. Raises TaskError for a text that cannot be encoded so, or has no tokens, and for a
    conversation without a template, or with a message that the template leaves out.
    """
    if not form.template:
        if not isinstance(prompt, str):
            raise TaskError(
                "is a conversation, which only a chat template makes a prompt of: leave out `chat_template=False`, or give a "
                "model whose tokenizer has a template."
            )
        tokens = _encode(form, prompt, add_special_tokens=True)
        return _check_tokens(form, tokens[: len(tokens) - form.appended])
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(vars(m)) for m in prompt]
    tokens = _check_tokens(form, chat_tokens(form, messages, generation_prompt=True))
    if not isinstance(prompt, str):
        _require_all_messages(form, messages)
    return tokens


def target_tokens(form: PromptFormat, text: str) -> list[int]:
    """The token ids of a target, from the token that answers are forced to begin with to the end token.

    After a bare prompt of a causal model a space comes first. Raises TaskError as `prompt_tokens`, and ModelError where
    neither tokenizer nor model names an end token.
    """
    if form.end is None:
        raise ModelError(
            "neither the tokenizer nor the generation settings of the model name an end token, so the model could not learn "
            "where an answer ends; set eos_token in tokenizer_config.json."
        )
    bare = not form.template and not form.encoder_decoder
    tokens = _encode(form, f" {text}" if bare else text, add_special_tokens=False, target=form.encoder_decoder)
    begin = [] if form.begin is None else [form.begin]
    return _check_tokens(form, [*begin, *tokens, form.end])


def chat_tokens(form: PromptFormat, messages: Sequence[Mapping[str, str]], generation_prompt: bool) -> list[int]:
    """The token ids of a conversation through the chat template; messages have a `role` and a text `content`.

    generation_prompt: open the assistant's next turn. Control tokens that the messages spell out are encoded as text.
    Raises TaskError where that cannot be, or the template refuses the messages.
    """
    spelled = any(token in message["content"] for message in messages for token in form.control)
    try:
        with time_limit(_TEMPLATE_SECONDS):
            tokens = form.tokenizer.apply_chat_template(
                _content(messages, form.parts),
                add_generation_prompt=generation_prompt,
                return_dict=False,
                sanitize_control_tokens=spelled,
            )
    except Exception as error:  # a template may raise anything
        raise TaskError(f"cannot go through the tokenizer's chat template: {reason(error)}") from error
    return [token for token in tokens if isinstance(token, int)]


def longest_prompt(form: PromptFormat, max_length: int, answer: int) -> int:
    """The limit of a prompt's tokens: `max_length`, or fewer where the model's positions must also hold `answer` tokens.

    0 or less if they hold no prompt, or not the answer.
    """
    if form.positions is None or not form.encoder_decoder:
        limits = [form.encoder_positions] if form.encoder_decoder else [form.positions and form.positions - answer]
    else:
        limits = [form.encoder_positions] if answer <= form.positions else [0]
    return min([max_length, *(limit for limit in limits if limit is not None)])


def end_tokens(settings: GenerationConfig) -> list[int]:
    """The tokens that end an answer by a model's generation settings."""
    ends: Any = settings.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def padding_token(form: PromptFormat) -> int:
    """The token for padding, which is masked everywhere: the tokenizer's padding token, or another of the vocabulary."""
    for token in (form.tokenizer.pad_token_id, form.tokenizer.eos_token_id):
        if isinstance(token, int) and token < form.vocabulary:
            return token
    return 0


def _encode(form: PromptFormat, text: str, add_special_tokens: bool, target: bool = False) -> list[int]:
    """The token ids of a text, without control tokens. target: as a translation's target, in that language."""
    spelled = [token for token in form.control if token in text]
    argument: dict[str, Any] = {"text_target" if target else "text": text}
    if not spelled:
        return list(form.tokenizer(**argument, add_special_tokens=add_special_tokens)["input_ids"])
    tokens = form.tokenizer(**argument, add_special_tokens=add_special_tokens, split_special_tokens=True)["input_ids"]
    plain = form.tokenizer(**argument, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for token in spelled:
        if token != form.tokenizer.unk_token and form.tokenizer.convert_tokens_to_ids(token) in plain:
            raise TaskError(f"spells out {token!r}, which this tokenizer cannot tell from its control token; change the text.")
    return list(tokens)


def _check_tokens(form: PromptFormat, tokens: list[int]) -> list[int]:
    """The tokens. Raises TaskError for none, and for one that the model has no embedding for."""
    if not tokens:
        raise TaskError("has no tokens: the tokenizer encodes nothing of its text.")
    if max(tokens) >= form.vocabulary:
        spelled = form.tokenizer.convert_ids_to_tokens(max(tokens))
        raise TaskError(
            f"has token {max(tokens)} ({spelled!r}), but the model has tokens up to {form.vocabulary - 1}; the tokenizer is "
            "not this model's, or the model's embeddings were not enlarged for it."
        )
    return tokens


def _content(messages: Sequence[Mapping[str, str]], parts: bool) -> list[dict[str, Any]]:
    """The messages as the template expects them."""
    if not parts:
        return [dict(message) for message in messages]
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _require_all_messages(form: PromptFormat, messages: Sequence[Mapping[str, str]]) -> None:
    """Raise TaskError for a system's or user's message that the chat template leaves out."""
    rendered = _render(form.tokenizer, messages, form.parts, True)
    for number, message in enumerate(messages, 1):
        if message["role"] in ("system", "developer", "user") and message["content"].strip() not in rendered:
            raise TaskError(f"the chat template leaves out message {number}, the {message['role']}'s.")


def _takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template takes content as a list of parts. Raises ModelError if it leaves the texts out of the prompt."""
    failure = "the user's message is not in the prompt that it renders"
    for parts in (False, True):
        try:
            rendered = [_render(tokenizer, [{"role": "user", "content": text}], parts, True) for text in _PROBES]
        except Exception as error:  # a template may raise anything
            failure = reason(error)
            continue
        if all(text in prompt for text, prompt in zip(_PROBES, rendered, strict=True)):
            return parts
    raise ModelError(f"the tokenizer's chat template cannot ask a user's question: {failure}. Set `chat_template=False`.")


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], parts: bool, generation_prompt: bool
) -> str:
    with time_limit(_TEMPLATE_SECONDS):
        text = tokenizer.apply_chat_template(
            _content(messages, parts), add_generation_prompt=generation_prompt, tokenize=False, return_dict=False
        )
    assert isinstance(text, str)
    return text


def _turn_end(tokenizer: PreTrainedTokenizerBase, parts: bool, control: Collection[str]) -> int | None:
    """The control token with which a chat template ends an answer, None without one."""
    question, answer = _PROBES
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        _, separator, ending = _render(tokenizer, messages, parts, False).rpartition(answer)
    except Exception:  # a template may raise anything; this one takes no answers
        return None
    tokens = list(tokenizer(ending.lstrip(), add_special_tokens=False)["input_ids"]) if separator else []
    return tokens[0] if tokens and tokenizer.convert_ids_to_tokens(tokens[0]) in control else None


def _count_appended(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens that a tokenizer appends to a text."""
    plain, full = (list(tokenizer(_PROBES[0], add_special_tokens=special)["input_ids"]) for special in (False, True))
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), None)
    return 0 if start is None else len(full) - start - len(plain)
