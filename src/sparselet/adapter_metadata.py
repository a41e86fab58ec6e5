"""`AdapterMetadata`: what adapter_config.json says of an adapter beside its targets (docs/format.md)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from sparselet.delta import BlockSize

OF_TARGETS = frozenset({"peft_type", "format_version", "targets"})  # fields that follow from the deltas


@dataclass(frozen=True)
class AdapterMetadata:
    """The fields of adapter_config.json that describe an adapter; None where a field is absent or null.

    base_model_name_or_path, task_type, modules_to_save: PEFT's. density, block_size, score, when, balance, replaced, scope,
    layer_drop, initial_mask, reselect_every, selection_epochs, score_batches, seed: how the mask was
    selected. prompt: the text around an input, `{input}` in its place. merge: how experts were merged. training: the training
    method of a baseline, and what a second stage started from.

    extra: fields of any other name, PEFT's among them. nulls: fields that are written as null; others that are None are left
    out of the file.
    """

    base_model_name_or_path: str | None = None
    task_type: str | None = None
    modules_to_save: Sequence[str] | None = None
    density: float | None = None
    block_size: BlockSize | None = None
    score: str | None = None
    when: str | None = None
    balance: str | None = None
    replaced: float | None = None
    scope: str | None = None
    layer_drop: bool | None = None
    initial_mask: str | None = None
    reselect_every: int | None = None
    selection_epochs: float | None = None
    score_batches: int | None = None
    seed: int | None = None
    task: str | None = None
    data_fingerprint: str | None = None
    chat_template: bool | None = None
    prompt: str | None = None
    metrics: Mapping[str, Any] | None = None
    versions: Mapping[str, str] | None = None
    merge: Mapping[str, Any] | None = None
    training: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    nulls: frozenset[str] = frozenset()

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "AdapterMetadata":
        """The metadata in the content of an adapter_config.json, whose kinds `check_config` checks."""
        named = {name: content[name] for name in _NAMED if name in content}
        extra = {name: value for name, value in content.items() if name not in _NAMED | OF_TARGETS}
        return cls(**named, extra=extra, nulls=frozenset(name for name, value in named.items() if value is None))

    def to_json(self) -> dict[str, Any]:
        """The fields as adapter_config.json holds them: the inverse of `from_json`."""
        named = {name: value for name, value in vars(self).items() if name in _NAMED}
        return {**self.extra, **{name: value for name, value in named.items() if value is not None or name in self.nulls}}

    def __getitem__(self, name: str) -> Any:
        """A field by its name in the file. Raises KeyError where it is absent."""
        return self.to_json()[name]

    def with_fields(self, content: Mapping[str, Any]) -> "AdapterMetadata":
        """The same metadata with the fields of `content`, which are written even where they are None."""
        return self.from_json({**self.to_json(), **content})


_NAMED = frozenset(f.name for f in fields(AdapterMetadata)) - {"extra", "nulls"}
