"""The model card of an adapter: its metadata as a README.md for the hub."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparselet.io.printable import printable

_PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_2_SEQ_LM": "text2text-generation"}
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def model_card(
    name: str,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, int]],
    fingerprints: Mapping[str, Any],
    entries: int,
    size: int,
) -> str:
    """The card of a sparse adapter called `name` on the hub, as Markdown under YAML front matter.

    metadata: the content of adapter_config.json. shapes, fingerprints: of `AdapterFile`. entries: selected entries of all
    targets. size: bytes on disk. Absent metadata are left out.
    """
    total = sum(rows * columns for rows, columns in shapes.values())
    merge = _mapping(metadata.get("merge"))
    checked = sum(1 for name in shapes if fingerprints.get(name))
    facts = {
        "base model": _short(metadata.get("base_model_name_or_path")),
        "task": metadata.get("task"),
        "entries": f"{entries:,} of {total:,} in {len(shapes)} targets",
        "density": metadata.get("density"),
        "mask": _mask(metadata.get("block_size")),
        **_schedule(metadata),
        **{_words(key): value for key, value in _mapping(metadata.get("metrics")).items()},
        "training data": metadata.get("data_fingerprint"),
        "base weights": f"fingerprints of {checked} of {len(shapes)} targets; weights of another model are refused",
        "chat template": metadata.get("chat_template"),
        "prompt": metadata.get("prompt"),
        "versions": ", ".join(f"{key} {value}" for key, value in _mapping(metadata.get("versions")).items()),
        "size": f"{size / 2**20:.2f} MiB",
    }
    description = "Sparse experts merged into one" if merge else "A sparse expert"
    tags = ["sparselet", "sparse-adapter", *(["merge"] if merge else []), "peft"]
    return "\n".join(
        [
            *_front_matter(metadata, "sparselet", tags),
            f"# {name.rpartition('/')[2]}",
            "",
            f"{description}: it changes {entries:,} of the base model's weights and leaves all others as they are.",
            "",
            *_table(["", ""], [[key, value] for key, value in facts.items() if value not in (None, "")]),
            *(_recipe(merge) if merge else []),
            *_use(name),
        ]
    )


def peft_card(name: str, config: Mapping[str, Any], size: int) -> str:
    """The card of an adapter of another PEFT method, such as LoRA. config: its adapter_config.json. size: bytes on disk."""
    method = _text(config.get("peft_type"))
    facts = {
        "base model": _short(config.get("base_model_name_or_path")),
        "method": method,
        **{key: config.get(key) for key in ("r", "lora_alpha", "target_modules")},
        "size": f"{size / 2**20:.2f} MiB",
    }
    return "\n".join(
        [
            *_front_matter(config, "peft", [method.lower()] if method.isalnum() else []),
            f"# {name.rpartition('/')[2]}",
            "",
            *_table(["", ""], [[key, value] for key, value in facts.items() if value not in (None, "")]),
            *_code("python", ["from peft import PeftModel", "", f'model = PeftModel.from_pretrained(base_model, "{name}")']),
        ]
    )


def _front_matter(metadata: Mapping[str, Any], library: str, tags: Sequence[str]) -> list[str]:
    """YAML for the hub's search. Every value is JSON, which YAML contains."""
    base = metadata.get("base_model_name_or_path")
    on_hub = isinstance(base, str) and _HUB_NAME.fullmatch(base)
    fields = {
        "base_model": base if on_hub else None,
        "base_model_relation": "adapter" if on_hub else None,
        "library_name": library,
        "pipeline_tag": _PIPELINES.get(str(metadata.get("task_type"))),
        "tags": list(tags) or None,
    }
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items() if value is not None), "---", ""]


def _schedule(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """How the mask was selected."""
    steps = metadata.get("reselect_every")
    if metadata.get("score") is None:  # merged, or made by hand
        return {}
    return {
        "score": metadata["score"],
        "when": metadata.get("when"),
        "balanced over": metadata.get("balance"),
        "scope": metadata.get("scope"),
        "initial mask": metadata.get("initial_mask") if metadata.get("when") in (None, "paper") else None,
        "selected again": "never" if steps == 0 else steps and f"every {_text(steps)} steps",
        "selection epochs": metadata.get("selection_epochs"),
        "layer drop": metadata.get("layer_drop"),
        "seed": metadata.get("seed"),
    }


def _recipe(merge: Mapping[str, Any]) -> list[str]:
    """How the experts were merged: method, parameters, and a row for each expert."""
    listed = merge.get("experts")
    experts = [_mapping(expert) for expert in listed] if isinstance(listed, list) else []
    facts = {key: value for key, value in merge.items() if key not in ("experts", "parameters")}
    facts |= _mapping(merge.get("parameters"))
    keys = dict.fromkeys(["task", "weight", *(key for expert in experts for key in expert)])
    present = [key for key in keys if any(expert.get(key) not in (None, "") for expert in experts)]
    shown = [key for key in present if key not in ("task_type", "chat_template")]  # the same as of the base model
    return [
        "## How it was merged",
        "",
        *_table(["", ""], [[_words(key), value] for key, value in facts.items() if value not in (None, {}, [])]),
        *_table(
            ["expert", *map(_words, shown)],
            [[number, *(_of_expert(expert, key) for key in shown)] for number, expert in enumerate(experts, 1)],
        ),
    ]


def _of_expert(expert: Mapping[str, Any], key: str) -> Any:
    """An expert's cell in one column; for an expert that was merged itself, the method and the number of experts."""
    value = expert.get(key)
    if key == "base":
        return _short(value)
    if key == "merge" and isinstance(value, Mapping) and isinstance(value.get("experts"), list):
        return f"{_text(value.get('method'))} of {len(value['experts'])}"
    return value


def _use(name: str) -> list[str]:
    return [
        "## How to use",
        "",
        *_code(
            "python",
            [
                "import sparselet.tuner  # PEFT knows the method now",
                "from peft import PeftModel",
                "from sparselet.hub.sources import fetch",
                "",
                f'model = PeftModel.from_pretrained(base_model, fetch("{name}"))',
            ],
        ),
        *_code("", [f"sparselet pull {name} --out expert", "sparselet eval --task TASK --adapter expert --base"]),
    ]


def _short(base: Any) -> str | None:
    """A base model's name; of a directory the last part, since its path means nothing on another machine."""
    if not isinstance(base, str):
        return None
    return f"{base.rstrip('/').rpartition('/')[2]}, a local directory" if base.startswith(("/", ".", "~")) else base


def _words(key: str) -> str:
    """A field's name as text."""
    return {"base": "base model", "data_fingerprint": "training data"}.get(key, key.replace("_", " "))


def _mask(block_size: Any) -> str | None:
    if not isinstance(block_size, int):
        return {"row": "whole output rows", "column": "whole input columns"}.get(str(block_size))
    return "single entries" if block_size == 1 else f"tiles of {block_size}×{block_size}"


def _mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is an object, otherwise an empty one; a file may hold any value."""
    return value if isinstance(value, Mapping) else {}


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    head, *body = ([_text(cell) for cell in row] for row in [columns, *rows])
    return [*(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body]), ""] if rows else []


def _code(language: str, lines: Sequence[str]) -> list[str]:
    return [f"```{language}", *lines, "```", ""]


def _text(value: Any) -> str:
    """A value as the text of a table's cell, on one line, with Markdown's special characters escaped."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return re.sub(r"([\\|`*\[\]])", r"\\\1", html.escape(printable(" ".join(text.split())), quote=False))
