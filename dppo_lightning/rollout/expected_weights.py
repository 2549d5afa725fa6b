"""ExpectedWeights: the names and shapes that a weight update must bring, checked before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dppo_lightning.errors import SyncError
from dppo_lightning.pretrained import load_config


class ExpectedWeights:
    """The parameters of a Hugging Face model.

    Args:
        model: The model; only names, shapes and ties are read.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        first_name = {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}
        every = model.named_parameters(remove_duplicate=False)
        self.canonical = {name: first_name[id(parameter)] for name, parameter in every}

    @classmethod
    def of(cls, name: str) -> ExpectedWeights:
        """Of a Hugging Face id or folder, without loading its weights."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(load_config(name), trust_remote_code=False)
        model.tie_weights()
        return cls(model)

    def once(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Of tied parameters one, under the name that comes first in the model."""
        sent = set()
        for given, tensor in named_tensors:
            name = self.canonical.get(given, given)
            if name not in sent:
                sent.add(name)
                yield name, tensor

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Compare names and shapes; of tied parameters any one name will do.

        Raises:
            SyncError: A name is unknown or missing, or a shape differs.
        """
        unknown = [name for name in shapes if name not in self.canonical]
        given = {self.canonical[name]: tuple(shape) for name, shape in shapes.items() if name in self.canonical}
        missing = [name for name in self.shapes if name not in given]
        wrong = [f"{name} {given[name]} for {self.shapes[name]}" for name in given if given[name] != self.shapes[name]]
        problems = [
            f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for what, names in (("missing", missing), ("unknown", unknown), ("wrong shape", wrong))
            if names
        ]
        if problems:
            raise SyncError(f"weight update refused, the engine keeps its weights ({'; '.join(problems)})")
