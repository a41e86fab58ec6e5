"""The weights of a model directory, read tensor by tensor."""

from pathlib import Path

from torch import Tensor

from sparselet.container import TensorFile
from sparselet.errors import BadConfig, MissingFile, MissingTensor, UnsafePath, UnsupportedExpert
from sparselet.files import read_object

MODEL_CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT = ".weight"

# How transformers' models call the layer that makes logits, and their input embeddings.
OUTPUT_LAYERS = ("lm_head", "embed_out")
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared")


class ModelFiles:
    """A model directory as transformers writes it: config.json, and one safetensors file or shards with an index.

    config: the content of config.json. shapes, dtypes: by tensor name. Files may be links, as they are in the hub's cache.
    Raises MissingFile, BadConfig, BadContainer, MissingTensor, UnsafePath, UnsupportedExpert (pickled weights).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_object(self.path / MODEL_CONFIG)
        self._file_of: dict[str, TensorFile] = {}
        for file, names in _weight_files(self.path).items():
            tensors = TensorFile(self.path / file)
            absent = sorted(names - tensors.shapes.keys())
            if absent:
                raise MissingTensor(f"{tensors.path} does not hold {absent[0]}, which {INDEX} puts there ({len(absent)} such).")
            self._file_of |= dict.fromkeys(tensors.shapes, tensors)
        self.shapes = {name: file.shapes[name] for name, file in self._file_of.items()}
        self.dtypes = {name: file.dtypes[name] for name, file in self._file_of.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, mapped into memory; not to be written to."""
        return self._file_of[name].read(name)

    def where(self, name: str) -> str:
        """A tensor and its file, for messages."""
        return f"{self._file_of[name].path}: {name}"

    def weight_shape(self, module: str) -> tuple[int, ...] | None:
        """The shape of a module's weight; None if there is none. Of the oldest models on the hub, such as gpt2, the files
        lack the first part of each name."""
        for name in (module + WEIGHT, module.partition(".")[2] + WEIGHT):
            if name in self.shapes:
                return self.shapes[name]
        return None

    @property
    def tied(self) -> bool:
        """Whether the output layer shares the embeddings' weight: what config.json says, or else whether it is absent."""
        for config in (self.config, self.config.get("text_config")):
            if isinstance(config, dict) and isinstance(config.get("tie_word_embeddings"), bool):
                return config["tie_word_embeddings"]
        return not any(_is_output(name) for name in self.shapes)

    @property
    def embeddings(self) -> str | None:
        """The tensor of the input embeddings, by its usual names; where a model has two, the one they share."""
        found = sorted(name for name in self.shapes if _last_part(name) in EMBEDDINGS and name.endswith(WEIGHT))
        return next((name for name in found if _last_part(name) == "shared"), found[0] if found else None)


def copies_of_embeddings(files: ModelFiles, tied: bool) -> set[str]:
    """The tensors that repeat the embeddings under another name: T5's `encoder.embed_tokens` beside `shared`, and, where
    the base model ties it, the output layer. Their values are not looked at."""
    embeddings = files.embeddings
    if embeddings is None:
        return set()
    alike = {name for name, shape in files.shapes.items() if shape == files.shapes[embeddings] and name != embeddings}
    shared = _last_part(embeddings) == "shared"
    return {n for n in alike if (tied and _is_output(n)) or (shared and _last_part(n) == "embed_tokens")}


def _weight_files(path: Path) -> dict[str, set[str]]:
    """The safetensors files of a model, each with the tensors that the index puts there."""
    if (path / SINGLE).is_file():
        return {SINGLE: set()}
    if not (path / INDEX).is_file():
        if any(path.glob("pytorch_model*.bin")):
            raise UnsupportedExpert(
                f"{path} holds pickled weights (pytorch_model*.bin), which are never read. Load it with transformers and save "
                "it again."
            )
        raise MissingFile(f"{path / SINGLE} is missing, and there is no {INDEX} that names shards.")
    weight_map = read_object(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise BadConfig(f"{path / INDEX}: weight_map is {weight_map!r:.60}; expected an object of file names.")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(file, set()).add(name)
    for file in files:
        if Path(file).name != file or file == "..":
            raise UnsafePath(f"{path / INDEX}: {file!r} is not a plain file name; path parts are not allowed.")
        if not (path / file).is_file():
            raise MissingFile(f"{path / file} is missing, which {INDEX} names.")
    return files


def _last_part(tensor: str) -> str:
    return tensor.removesuffix(WEIGHT).rpartition(".")[2]


def _is_output(tensor: str) -> bool:
    return _last_part(tensor) in OUTPUT_LAYERS and tensor.endswith(WEIGHT)
