"""VersionHistory: the latest weights, packed, so that tokens of older versions are compared under their own."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from engine.model import NamedTensors
from engine.ops import Ops
from rollout import Rollout
from trainers.batch import pack_micro_batches
from trainers.policy import load_transformer, packed_logprobs

_FILE = "history-v"

Compared = tuple[torch.Tensor, torch.Tensor]
"""(the trainer's log-probabilities, the engine's) of the same tokens, each [num_tokens] float32."""


class VersionHistory:
    """A copy of the model in its packed form for each version, in places that are used again."""

    def __init__(self, directory: Path, ops: Ops, num_versions: int) -> None:
        """directory, ops: of the policy's model. num_versions: how many are kept at once."""
        self._models = [load_transformer(directory, ops, with_masters=False) for _ in range(num_versions)]
        self._versions: list[int | None] = [None] * num_versions

    def keep(self, policy_version: int, named_weights: NamedTensors) -> None:
        """Copies the weights of this version, under Hugging Face names, over those of the oldest one."""
        if not self._models:
            return
        place = min(range(len(self._models)), key=lambda i: -1 if self._versions[i] is None else self._versions[i])
        self._models[place].load_weights(named_weights)
        self._versions[place] = policy_version

    @property
    def num_bytes(self) -> int:
        """What `save` writes at most."""
        return sum(4 * prod(shape) for model in self._models for shape in model.weight_shapes().values())

    def save(self, directory: Path) -> None:
        """Writes each version's weights, float32, as `history-vN.safetensors`, for a checkpoint."""
        for version, model in zip(self._versions, self._models, strict=True):
            if version is not None:
                save_file(
                    {name: tensor.contiguous() for name, tensor in model.named_weights()}, _file(directory, version)
                )

    def load(self, directory: Path) -> None:
        """Takes the versions that `save` wrote, the latest as far as there is room."""
        versions = sorted(int(path.stem.removeprefix(_FILE)) for path in directory.glob(f"{_FILE}*.safetensors"))
        for place, version in enumerate(versions[::-1][: len(self._models)]):
            self._models[place].load_weights(load_file(_file(directory, version)))
            self._versions[place] = version

    @torch.no_grad()
    def compare(self, rollouts: Sequence[Rollout], max_tokens: int, share_prompts: bool) -> list[Compared]:
        """The tokens of rollouts that were drawn under a version kept here, under that version.

        max_tokens: rows of one forward.
        """
        compared = []
        for version, model in zip(self._versions, self._models, strict=True):
            of_version = [rollout for rollout in rollouts if version in rollout.policy_versions]
            for batch in pack_micro_batches(of_version, [0.0] * len(of_version), max_tokens, share_prompts):
                is_of_version = batch.policy_versions == version
                logprobs = packed_logprobs(model, batch)
                compared.append((logprobs[is_of_version], batch.rollout_logprobs[is_of_version]))
        return compared


def _file(directory: Path, version: int) -> Path:
    return directory / f"{_FILE}{version}.safetensors"
