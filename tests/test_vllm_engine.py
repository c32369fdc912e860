"""The vLLM engine against a stub: an HTTP server that speaks as vLLM does, and is none.

What a real vLLM makes of the same requests is told in python_trainer/vllm_engine.py.
"""

import json
import random
import socket
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainer_toys import TINY, Digits

from python_trainer import vllm_engine
from python_trainer.config import ConfigError, EngineError, TrainConfig
from python_trainer.engine import TransformersEngine, make_engine
from python_trainer.loop import Progress, prepare, train
from python_trainer.model import Policy, load_policy
from python_trainer.vllm_engine import VLLMEngine, fingerprint

EOS = 1


class Stub(ThreadingHTTPServer):
    """Continues a prompt with tokens that depend on it and on the seed; remembers what it got."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.pushes: list[dict[str, torch.Tensor]] = []
        self.folder = Path()
        self.posts = 0
        self.drop = 0  # connections to close without an answer
        self.status, self.delay = 200, 0.0
        self.answer: bytes | None = None  # instead of its own
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(body)
        rng = random.Random(f"{body['seed']} {body['prompt']}")
        time.sleep(rng.random() / 50)  # so that answers come in another order than requests
        (stop,) = body["stop_token_ids"]
        ids = []
        while len(ids) < body["max_tokens"] and stop not in ids:
            ids.append(rng.choice([stop, 4, 5, 6, 7, 8, 9]))
        reason = "stop" if ids[-1] == stop else "length"
        return {"choices": [{"index": 0, "token_ids": ids, "finish_reason": reason}]}

    def reload(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["method"] == "reload_weights"
        self.folder = Path(body["kwargs"]["weights_path"])
        self.pushes.append(load_file(self.folder / "model.safetensors"))
        return {"results": [None]}


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        stub = self.server
        stub.posts += 1
        if stub.drop:
            stub.drop -= 1
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        act = {"/v1/completions": stub.complete, "/collective_rpc": stub.reload}[self.path]
        time.sleep(stub.delay)
        data = json.dumps(act(body)).encode() if stub.answer is None else stub.answer
        self.send_response(stub.status)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def stub():
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(vllm_engine, "WAITS", (0.0, 0.0))


@pytest.fixture
def policy() -> Policy:
    torch.manual_seed(0)
    return load_policy(TINY, ["abc 123"])


def step(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_answers_come_in_the_order_of_the_prompts(stub, policy):
    prompts = [[4 + i % 9] * (1 + i % 5) for i in range(60)]
    sampled = VLLMEngine(policy, stub.url).generate(prompts, [6] * 60, 0.7, seed=3)
    assert [body["prompt"] for body in stub.asked] != prompts  # they were under way side by side
    rng = random.Random(3)
    asked = {body["seed"]: body for body in stub.asked}
    for prompt, ids in zip(prompts, sampled, strict=True):
        body = asked.pop(rng.getrandbits(63))
        assert body["prompt"] == prompt
        assert stub.complete(body)["choices"][0]["token_ids"] == ids
    assert not asked


def test_turns_end_with_eos_or_at_the_limit(stub, policy):
    sampled = VLLMEngine(policy, stub.url).generate([[4, 5]] * 40, [6] * 40, 1.0, seed=0)
    ended = [ids for ids in sampled if ids[-1] == EOS]
    assert 0 < len(ended) < 40
    assert all(EOS not in ids[:-1] for ids in sampled)
    assert all(len(ids) == 6 for ids in sampled if ids not in ended)


def test_requests_leave_nothing_to_the_servers_defaults(stub, policy):
    engine = VLLMEngine(policy, stub.url)
    engine.refresh()
    engine.generate([[4, 5, 6]], [3], 0.5, seed=0)
    (body,) = stub.asked
    assert body.pop("seed") >= 0 and body.pop("cache_salt")
    assert body == {
        "prompt": [4, 5, 6], "max_tokens": 3, "temperature": 0.5, "return_token_ids": True,
        "ignore_eos": True, "stop_token_ids": [EOS], "top_k": -1, "top_p": 1.0, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip


def test_a_group_has_different_seeds_and_a_seed_repeats(stub, policy):
    engine = VLLMEngine(policy, stub.url)
    group = [[4, 5, 6]] * 16
    first = engine.generate(group, [12] * 16, 1.0, seed=5)
    assert len({body["seed"] for body in stub.asked}) == 16
    assert len({tuple(ids) for ids in first}) > 4
    assert engine.generate(group, [12] * 16, 1.0, seed=5) == first
    assert engine.generate(group, [12] * 16, 1.0, seed=6) != first


def choices(*several: Any) -> bytes:
    return json.dumps({"choices": several}).encode()


GOOD = {"token_ids": [4, 5], "finish_reason": "length"}
WRONG_ANSWERS = [
    b"<html>\nnot\nJSON",
    b"[]",
    b"\xff\xfe",
    b"{}",
    choices(),
    choices(GOOD, GOOD),
    choices("text"),
    choices(GOOD | {"token_ids": None}),  # vLLM before 0.10.2
    choices({"text": "no ids"}),
    choices(GOOD | {"token_ids": []}),
    choices(GOOD | {"token_ids": [4, 10**6]}),
    choices(GOOD | {"token_ids": [4, -1]}),
    choices(GOOD | {"token_ids": [4, 5.0]}),
    choices(GOOD | {"token_ids": [4] * 7}),
    choices(GOOD | {"finish_reason": "abort"}),
]


@pytest.mark.parametrize("answer", WRONG_ANSWERS)
def test_a_wrong_answer_is_one_line(stub, policy, answer):
    stub.answer = answer
    with pytest.raises(EngineError) as caught:
        VLLMEngine(policy, stub.url).generate([[4]], [6], 1.0, seed=0)
    message = str(caught.value)
    assert message.startswith(f"vllm_url: POST {stub.url}/v1/completions: expected one choice")
    assert "\n" not in message and len(message) < 500
    stub.answer = choices(GOOD)  # so it was the answer
    assert VLLMEngine(policy, stub.url).generate([[4]], [6], 1.0, seed=0) == [[4, 5]]


def test_an_http_error_is_not_tried_again(stub, policy):
    stub.status, stub.answer = 400, b'{"message": "too\nlong' + b"!" * 9999
    with pytest.raises(EngineError, match=r"expected HTTP 200, got HTTP 400 \(.*too long!+…\)$"):
        VLLMEngine(policy, stub.url).generate([[4]], [6], 1.0, seed=0)
    assert stub.posts == 1


def test_a_server_that_is_late_is_not_asked_again(stub, policy, monkeypatch):
    monkeypatch.setattr(vllm_engine, "TIMEOUT", 0.1)
    stub.delay = 0.3
    with pytest.raises(EngineError, match=r"expected an answer, got none in 0.1 s"):
        VLLMEngine(policy, stub.url).generate([[4]], [6], 1.0, seed=0)
    assert stub.posts == 1


def test_a_lost_connection_is_tried_again_so_often_and_no_more(stub, policy):
    engine = VLLMEngine(policy, stub.url)
    stub.drop = 2
    assert engine.generate([[4]], [6], 1.0, seed=0) and stub.posts == 3
    stub.drop = 3
    with pytest.raises(EngineError, match="expected an answer, got RemoteDisconnected"):
        engine.generate([[4]], [6], 1.0, seed=0)
    assert stub.posts == 6


def test_a_server_that_is_not_there(policy):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        engine = VLLMEngine(policy, f"http://127.0.0.1:{taken.getsockname()[1]}")
        for act in (engine.refresh, lambda: engine.generate([[4]] * 300, [6] * 300, 1.0, seed=0)):
            with pytest.raises(EngineError, match=r"vllm_url: .* got ConnectionRefusedError"):
                act()


def test_weights_are_pushed_once_and_after_applied_updates_only(stub, policy):
    engine = VLLMEngine(policy, stub.url)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    engine.refresh()
    engine.refresh()
    assert len(stub.pushes) == 1
    optimizer.found_inf = torch.ones(())  # pyright: ignore[reportAttributeAccessIssue]
    step(policy, optimizer)  # a gate discards this one
    engine.refresh()
    assert len(stub.pushes) == 1
    optimizer.found_inf = torch.zeros(())  # pyright: ignore[reportAttributeAccessIssue]
    step(policy, optimizer)
    engine.refresh()
    engine.refresh()
    assert len(stub.pushes) == 2
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(stub.pushes[1].pop(name), weight)
        assert not torch.equal(stub.pushes[0][name], weight)
    assert not stub.pushes[1]


def test_pushed_weights_do_not_stay_on_the_disk(stub, policy):
    VLLMEngine(policy, stub.url).refresh()
    assert stub.folder.name and not stub.folder.exists()


def test_what_old_weights_computed_is_not_met_again(stub, policy):
    engine, salts = VLLMEngine(policy, stub.url), []
    for changed in (False, False, True):
        if changed:
            step(policy, torch.optim.SGD(policy.parameters(), lr=1.0))
        engine.refresh()
        engine.generate([[4], [5]], [2, 3], 1.0, seed=0)
        assert {tuple(b["prompt"]): b["max_tokens"] for b in stub.asked[-2:]} == {(4,): 2, (5,): 3}
        (salt,) = {body["cache_salt"] for body in stub.asked[-2:]}
        salts.append(salt)
    again = VLLMEngine(policy, stub.url)  # another arm, on the same server
    again.refresh()
    assert salts[0] == salts[1] and len({*salts, again._salt}) == 3


def test_a_tied_head_is_pushed_under_both_names(stub, policy):
    policy.model.get_input_embeddings().weight = policy.head.weight
    VLLMEngine(policy, stub.url).refresh()
    (pushed,) = stub.pushes
    assert torch.equal(pushed["lm_head.weight"], pushed["model.embed_tokens.weight"])


def test_a_push_that_failed_is_made_again(stub, policy, monkeypatch):
    engine = VLLMEngine(policy, stub.url)
    stub.status, stub.answer = 404, b"Not Found"
    with pytest.raises(EngineError, match=r"VLLM_SERVER_DEV_MODE=1.*got HTTP 404 \(Not Found\)"):
        engine.refresh()
    stub.status, stub.answer = 200, None
    with monkeypatch.context() as patched:
        patched.setattr("tempfile.tempdir", "/nowhere/at/all")
        with pytest.raises(EngineError, match=r"vllm_url: no folder for the weights .*nowhere"):
            engine.refresh()
    assert not stub.pushes
    engine.refresh()
    assert len(stub.pushes) == 1


@pytest.mark.parametrize("first", [True, False])
def test_rank_0_pushes_and_all_ranks_hear_of_it(stub, policy, first):
    engine = VLLMEngine(policy, stub.url)
    others: list[float] = []  # what the other ranks say, in turn: changed, failed
    engine.ranks = SimpleNamespace(first=first, total=lambda x: x + others.pop(0))  # pyright: ignore
    others += [1.0, 0.0]
    engine.refresh()
    assert len(stub.pushes) == first
    others += [0.0]
    engine.refresh()
    others += [1.0, 0.0]  # only another rank's shard changed
    engine.refresh()
    assert len(stub.pushes) == 2 * first
    others += [1.0, 1.0]
    with pytest.raises(EngineError, match="rank 0 could not push"):
        engine.refresh()
    assert not others


def test_every_trained_weight_is_in_the_fingerprint(policy):
    for p in policy.parameters():
        before = fingerprint(policy)
        with torch.no_grad():
            p.view(-1)[-1] += 1e-6
        assert fingerprint(policy) != before
    policy.bfloat16()
    assert len(fingerprint(policy)) == len(list(policy.parameters()))


def test_training_samples_from_the_server(stub, tmp_path):
    config = replace(TINY, vllm_url=stub.url, gate="off", num_iterations=2, rollout_batches=3)
    start, progress = prepare(config, Digits()), Progress()
    train(config, start, tmp_path, progress)
    assert progress.finished and progress.updates_applied == 6
    # Before each of three batches, and at the end; the first evaluation had the first's weights.
    assert len(stub.pushes) == 4
    rollouts = config.rollout_batches * config.prompts_per_batch * config.num_generations
    evaluations = len(progress.accuracy) * config.eval_prompts
    assert len(stub.asked) == rollouts + evaluations


def test_the_engine_is_chosen_by_the_setting(policy):
    assert isinstance(make_engine(policy, TINY), TransformersEngine)
    config = replace(TINY, vllm_url="https://[::1]:8000/")
    engine = make_engine(policy, config)
    assert isinstance(engine, VLLMEngine) and engine.url == "https://[::1]:8000"


URLS = [
    "",
    "localhost:8000",
    "ftp://host",
    "http://",
    "http://h:99999",
    "http://h/v1",
    "http://h?x",
]


@pytest.mark.parametrize("url", [*URLS, 8000, b"http://h"])
def test_a_wrong_url_is_one_line(url):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(vllm_url=url)
    assert str(caught.value) == f"vllm_url: expected http(s)://HOST[:PORT], got {url!r}"


def test_lora_is_refused():
    with pytest.raises(ConfigError, match="lora_rank: expected 0 with vllm_url, got 8"):
        TrainConfig(vllm_url="http://h", lora_rank=8)
