"""`Service`: from names and texts to requests of the engine; what the HTTP server and a notebook use."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparselet.adapter import expert_profile
from sparselet.apply import target_weights
from sparselet.errors import ConfigError, RequestRefused, TaskError
from sparselet.expert import Expert
from sparselet.fingerprint import fingerprint_weight, require_same_base
from sparselet.formats import BaseModel, open_expert
from sparselet.generation.prompts import in_prompt, prompt_format, prompt_tokens
from sparselet.models import load_model, load_tokenizer, local_path
from sparselet.names import Names
from sparselet.serving.engine import Engine
from sparselet.serving.limits import ServingLimits
from sparselet.serving.merge_cache import MergeCache
from sparselet.serving.prompt_router import PromptRouter
from sparselet.serving.registry import BASE_NAME, MERGE_NAME, ExpertRegistry
from sparselet.serving.served_expert import ServedExpert, base_digest
from sparselet.steering import SteeringVector
from sparselet.steering.switch import block_of
from sparselet.tasks.rows import Message, Prompt


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's tokens, the tokens that end its answer, and the most tokens that the answer may have."""

    tokens: tuple[int, ...]
    ends: frozenset[int]
    room: int


class Service:
    """An engine with its registry of experts, its router and its cache of merges.

    open_expert: opens a directory as an expert under the model's names. directories, state: as in `ExpertRegistry`.
    name: of the base model, as clients are shown it. vectors: steering vectors by the names that requests give.
    Raises what `Engine`, `ExpertRegistry` and, for a vector that does not fit, `steered` raise.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        open_expert: Callable[[Path], Expert],
        directories: Sequence[Path],
        state: Path,
        limits: ServingLimits | None = None,
        name: str = "",
        vectors: Mapping[str, SteeringVector] | None = None,
    ) -> None:
        self.name, self.vectors = name, vectors or {}
        for vector in self.vectors.values():
            block_of(model, vector)  # raises where it does not fit
        base = {name: fingerprint_weight(layer.parameter) for name, layer in Names(model).layers.items()}

        def fits(expert: Expert) -> object:
            profile = expert_profile(expert)
            if profile is not None:
                require_same_base(profile.fingerprints, base, "the expert's profile and the model")
            return target_weights(model, expert, base)

        self.engine = Engine(model, tokenizer, base, limits)
        self.registry = ExpertRegistry(open_expert, fits, ServedExpert(base_digest(base), None), directories, state)
        self.router = PromptRouter(self.registry)
        self.merges = MergeCache(self.engine.limits.merge_cache_bytes, fits)
        self._forms = {template: prompt_format(model, tokenizer, template) for template in (True, False)}

    def resolve(
        self, model: str | None, members: Sequence[tuple[str, float]] | None, method: str, parameters: Mapping[str, Any]
    ) -> ServedExpert:
        """The expert that a request names: `model`, or the merge of `members`, which are names with weights.

        Raises UnknownExpert, RequestRefused, and what merging raises.
        """
        if members is not None:
            if model not in (None, BASE_NAME, MERGE_NAME):
                raise RequestRefused(f"model {model!r:.100} and experts name two things; set model to {MERGE_NAME!r}.", "model")
            return self.merges.merged([(self.registry[name], weight) for name, weight in members], method, parameters)
        if model is None or model == MERGE_NAME:
            raise RequestRefused("name an expert in model, or several with their weights in experts.", "experts")
        return self.registry[model]

    def steering(self, name: str | None, strength: float | None) -> tuple[int, Tensor] | None:
        """The block and the change of its output that a request names, None where it names none. Raises RequestRefused."""
        if name is None:
            if strength is not None:
                raise RequestRefused("steer_strength is given without steer, the vector's name.", "steer_strength")
            return None
        if name not in self.vectors:
            listed = ", ".join(self.vectors) or "none"
            raise RequestRefused(f"no steering vector is called {name!r:.100}; there are {listed}.", "steer")
        vector = self.vectors[name]
        return vector.layer, (vector.strength if strength is None else strength) * vector.values

    def encode(self, expert: ServedExpert, prompt: str | Sequence[Message]) -> EncodedPrompt:
        """The tokens of a prompt for an expert: a text as it is, or a conversation.

        A conversation goes through the tokenizer's chat template. If there is none, or the expert was trained without one, it
        must be a single user's message, whose text is the prompt, as in training. An expert's own prompt is put around it.
        Raises RequestRefused for a prompt that cannot be encoded, or fills the model's positions.
        """
        return self._encode(prompt, expert.metadata.chat_template is not False, expert.metadata.prompt)

    def encode_for_route(self, prompt: str | Sequence[Message]) -> tuple[int, ...]:
        """The tokens of a prompt as the experts with a profile were trained. Raises as `encode`, and `PromptRouter`."""
        self.router.candidates()
        return self._encode(prompt, self.router.chat_template()).tokens

    def _encode(self, prompt: Prompt, chat_template: bool, own_prompt: str | None = None) -> EncodedPrompt:
        field = "prompt" if isinstance(prompt, str) else "messages"
        form = self._forms[not isinstance(prompt, str) and chat_template]
        if not isinstance(prompt, str) and not form.template:
            if len(prompt) != 1 or prompt[0].role != "user":
                raise RequestRefused("this expert answers without a chat template: send one user's message.", "messages")
            prompt = prompt[0].content
        try:
            tokens = prompt_tokens(form, in_prompt(own_prompt, prompt))
        except TaskError as error:
            raise RequestRefused(f"{field} {error}", field) from error
        longest = self.engine.limits.max_tokens
        room = longest if form.positions is None else min(longest, form.positions + 1 - len(tokens))
        if room < 1:
            raise RequestRefused(f"{field} has {len(tokens)} tokens; the model has {form.positions} positions.", field)
        return EncodedPrompt(tuple(tokens), form.ends, room)


def open_service(
    model: str,
    experts: Sequence[str | Path],
    state: Path,
    *,
    dtype: str = "float32",
    limits: ServingLimits | None = None,
    vectors: Sequence[str | Path] = (),
) -> Service:
    """Load a base model and the experts to serve.

    model: a hub name, a directory, or `packaged:smollm2-135m`. experts: directories of experts, or experts themselves.
    vectors: directories of steering vectors, called by their names.
    Raises ConfigError for two vectors of one name, ModelError, and what reading a vector and `Service` raise.
    """
    named: dict[str, SteeringVector] = {}
    for path in map(Path, vectors):
        if path.resolve().name in named:
            raise ConfigError(f"two steering vectors are called {path.resolve().name}; rename a directory.")
        named[path.resolve().name] = SteeringVector.load(path)
    base = BaseModel(local_path(model))
    directories = [Path(directory) for directory in experts]
    loaded, tokenizer = load_model(model, dtype), load_tokenizer(model)
    return Service(loaded, tokenizer, lambda path: open_expert(path, base), directories, state, limits, model, named)
