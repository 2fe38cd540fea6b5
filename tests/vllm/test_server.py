"""``vllm serve`` on loopback with the ``openai`` client, and tensor parallelism over two processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from engines import engine, generate, prompts  # noqa: E402

from intscale_compile.commands.quantizing import quantize_folder  # noqa: E402

openai = pytest.importorskip("openai")
SECONDS = 240


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def quantized(llama, folders):
    quantize_folder(llama, folders / "served", progress=False)
    return folders / "served"


@pytest.fixture(scope="module")
def requests(quantized):
    """32 prompts of different lengths, and the offline answers of each alone: 24 greedy tokens."""
    ids = [prompt[: 8 + 2 * n] for n, prompt in enumerate(prompts(quantized) * 8)]
    with engine(quantized) as llm:
        return ids, [generate(llm, [prompt], 24)[0] for prompt in ids]


@pytest.fixture(scope="module")
def client(quantized, requests, tmp_path_factory):
    """A client of a server that runs while the tests of this file do."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    # What `vllm serve` runs; that command itself asks for a package named vllm, which the CPU build is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", quantized, "--port", str(port)]
    command += ["--host", "127.0.0.1"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--served-model-name", "small"]
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO"})
    found = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=SECONDS, max_retries=0)
    try:
        end = time.monotonic() + SECONDS
        while True:
            try:
                found.models.list()
                break
            except openai.APIConnectionError:
                assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(0.5)
        yield found
    finally:
        server.terminate()
        server.wait(60)


def complete(client, ids, **how):
    return client.completions.create(
        model="small",
        prompt=ids,
        temperature=0,
        max_tokens=24,
        extra_body={"min_tokens": 24, "return_token_ids": True},
        **how,
    )


def test_concurrent_answers_are_the_offline_ones(client, requests):
    ids, wanted = requests
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda prompt: complete(client, prompt).choices[0].token_ids, ids))
    assert len(answers) == 32
    differ = [n for n, (answer, alone) in enumerate(zip(answers, wanted)) if list(answer) != alone]
    assert differ == []


def test_streaming_and_log_probabilities(client, requests):
    ids, _ = requests
    whole = complete(client, ids[5], logprobs=2).choices[0]
    assert len(whole.logprobs.token_logprobs) == 24
    for chosen, top in zip(whole.logprobs.token_logprobs, whole.logprobs.top_logprobs):
        assert chosen <= 0 and chosen == pytest.approx(max(top.values()), abs=1e-5)
    pieces = [piece.choices[0].text for piece in complete(client, ids[5], stream=True) if piece.choices]
    assert len(pieces) > 10 and "".join(pieces) == whole.text


def test_tensor_parallel_over_two_processes(llama, folders, quantized):
    by_128, quantized = quantized, folders / "groups-of-64"  # 384 features over two ranks are no whole groups of 128
    quantize_folder(llama, quantized, {"group_size": 64}, progress=False)
    code = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from engines import engine, log_likelihood, prompts
if __name__ == "__main__":
    with engine(sys.argv[1], tensor_parallel_size=int(sys.argv[2])) as llm:
        print("likelihood", log_likelihood(llm, prompts(sys.argv[1])), flush=True)
"""
    script = quantized.parent / "ranks.py"
    script.write_text(code)

    def run(folder, ranks):
        threads = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "|".join("01"[:ranks])}
        return subprocess.run(
            [sys.executable, script, folder, str(ranks)],
            env=os.environ | threads,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    def likelihood(ranks):
        done = run(quantized, ranks)
        found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("likelihood")]
        assert found, done.stdout[-1000:] + done.stderr[-3000:]
        return float(found[0])

    one, two = likelihood(1), likelihood(2)  # each rank quantizes its own features, more finely than all together
    assert one == pytest.approx(two, rel=0.01) and one != two
    refused = run(by_128, 2)
    said = refused.stdout + refused.stderr
    assert "o_proj: tensor parallelism over 2 ranks cuts its 384 input features into 192" in said
    assert "--tensor-parallel-size" in said and "group_size" in said
