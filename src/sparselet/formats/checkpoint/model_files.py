"""The weights of a model directory, read tensor by tensor."""

from pathlib import Path

from torch import Tensor

from sparselet.errors import BadConfig, MissingFile, MissingTensor, UnsafePath, UnsupportedExpert
from sparselet.io.json_files import read_object
from sparselet.io.tensor_files import TensorFile

MODEL_CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


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
