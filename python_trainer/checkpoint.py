"""Checkpoints: whole or not there at all, verified when read, no pickle.

    <arm>/checkpoints/000123/tensors.safetensors   weights, optimizer, gate, random states, rollout
                             state.json            counters, positions, a checksum of all

Rank 0 writes whole tensors (torch.distributed.checkpoint gathers them), so a run may go on with
another number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .config import CheckpointError, TrainConfig, one_line
from .distributed import Ranks
from .files import as_json, write_json

KEEP = 2  # the newest, and one to fall back on
# Settings that a run may change when it goes on: where it runs, and what a fault may ask for.
MAY_CHANGE = {"device", "threads", "parallel", "vllm_url", "save_every", "task_timeout",
              "micro_batch_size", "gradient_checkpointing"}  # fmt: skip


def training_state(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights that are trained and the optimizer's moments: flat names, whole, on the CPU.

    A collective: every rank calls it, the first one's has the tensors.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = get_model_state_dict(policy, options=options)
    moments: Any = get_optimizer_state_dict(policy, optimizer, options=options).get("state", {})
    state: dict[str, Any] = {f"model.{name}": value for name, value in weights.items()}
    for name, of_weight in moments.items():
        state |= {f"optimizer.{name}.{kind}": value for kind, value in of_weight.items()}
    return state


def restore_weights(policy: nn.Module, state: dict[str, Any]) -> None:
    """Of a checkpoint that every rank has read; frozen weights stay as they are."""
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(policy, _under("model.", state), options=options)


def restore_optimizer(
    policy: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """The same of the moments. torch takes a step for it, with gradients and rates of zero."""
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    groups = get_optimizer_state_dict(policy, optimizer, options=options)["param_groups"]
    moments: dict[str, dict[str, Tensor]] = {}
    for name, value in _under("optimizer.", state).items():
        weight, kind = name.rsplit(".", 1)
        moments.setdefault(weight, {})[kind] = value
    saved: Any = {"state": moments, "param_groups": groups}
    set_optimizer_state_dict(policy, optimizer, saved, options=options)


def _under(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def random_states(ranks: Ranks, device: str) -> dict[str, Tensor]:
    """The default generators of every rank, [ranks, bytes]. A collective."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return {name: ranks.gather(value[None].to(device)).cpu() for name, value in states.items()}


def restore_random_states(state: dict[str, Any], ranks: Ranks, device: str) -> None:
    """Of this rank; with another number of ranks than when it was saved, they stay as they are."""
    if len(state["random.cpu"]) != ranks.world:
        return
    # Copies: of a row of a tensor torch reads the wrong bytes, or crashes.
    torch.set_rng_state(state["random.cpu"][ranks.rank].clone())
    if "random.cuda" in state and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(state["random.cuda"][ranks.rank].clone(), device)


def save(folder: Path, number: int, state: dict[str, Any]) -> None:
    """Write one checkpoint, then drop all but the newest `KEEP`.

    Raises:
        OSError: it could not be written (a full disk). Those that were there are untouched.
    """
    final, partial = folder / f"{number:08d}", folder / f".{number:08d}.{os.getpid()}.tmp"
    # safetensors wants each name to have memory of its own: tied weights are written twice.
    tensors = {k: v.detach().cpu().clone() for k, v in state.items() if isinstance(v, Tensor)}
    plain = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
    for left in folder.glob(".*.tmp"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        file = partial / "tensors.safetensors"
        try:
            save_file(tensors, file)
        except SafetensorError as error:  # its own name for a full disk
            raise OSError(str(error)) from error
        write_json(partial / "state.json", {"sha256": _sha256(file, plain), "state": plain})
        for path in (file, partial / "state.json"):
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in sorted(_numbered(folder))[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, tensors: bool = True) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint that is whole (None: there is none), and complaints about newer ones.

    Raises:
        CheckpointError: there are some, and none is whole.
    """
    found, complaints = sorted(_numbered(folder), reverse=True), []
    for path in found:
        try:
            head = json.loads((path / "state.json").read_text())
            file = path / "tensors.safetensors"
            if head["sha256"] != _sha256(file, head["state"]):
                raise ValueError("its checksum differs")
            return head["state"] | (load_file(file) if tensors else {}), complaints
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            complaints.append(f"{path}: unreadable ({one_line(str(error))})")
    if found:
        raise CheckpointError(f"checkpoints: none can be read: {'; '.join(complaints)}")
    return None, complaints


def check_settings(state: dict[str, Any], config: TrainConfig) -> None:
    """Raise CheckpointError if it is of a run with other settings."""
    saved = state.get("config", {})  # as JSON has it
    for name, mine in json.loads(as_json(asdict(config))).items():
        if name not in MAY_CHANGE and saved.get(name) != mine:
            raise CheckpointError(
                f"{name}: expected {mine!r}, the checkpoint has {saved.get(name)!r}"
            )


def progress_in(folder: Path, config: TrainConfig | None = None) -> dict[str, Any] | None:
    """The counters that the newest checkpoint holds (None: there is none), without its tensors.

    Raises:
        CheckpointError: there are checkpoints, and none can be read, or they are of a run with
            other settings than `config`.
    """
    state, _ = load(folder, tensors=False)
    if state is None:
        return None
    if config is not None:
        check_settings(state, config)
    return state["progress"]


def _numbered(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.name.isdigit()]


def _sha256(file: Path, state: dict[str, Any]) -> str:
    with open(file, "rb") as data:
        digest = hashlib.file_digest(data, "sha256")
    digest.update(as_json(state, sort_keys=True).encode())
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """A rename may reach the disk before what was renamed does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
