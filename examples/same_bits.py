"""Hash the logits of one text in every way to compute them: an integer-only model prints one hash.

    python examples/same_bits.py --model FOLDER            # a Llama, Mistral or Qwen, local or on the hub
    python examples/same_bits.py --model FOLDER --device cuda

Run it on a CPU and on a GPU and compare.
"""

from __future__ import annotations

import argparse

import torch
import transformers
from torch import Tensor
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, integer_only

TEXT = "def read(self, size=-1):\n    return self._file.read(size)\n\n\nclass Reader:\n    def __init__(self, file):\n"


def logits_in_every_way(run, ids: Tensor):
    """Name and logits ``[T, V]`` of one sequence ``[1, T]``."""
    tokens = ids.shape[1]
    yield "batch of 1", run(ids, use_cache=False).logits[0]
    yield "batch of 8", run(ids.expand(8, -1).contiguous(), use_cache=False).logits[5]
    padded = torch.cat([ids[:, :3], ids], 1)  # three tokens that the mask hides
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    yield "left padding", run(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[0, 3:]
    for name, size in (("chunks of 8", 8), ("one token at a time", 1)):
        cache, parts = integer_only.IntegerCache(), []
        for start in range(0, tokens, size):
            parts.append(run(ids[:, start : start + size], past_key_values=cache, use_cache=True).logits[0])
        yield name, torch.cat(parts)


def main(argv=None) -> None:
    """Quantize, compile, and print one line for each way."""
    parser = argparse.ArgumentParser(prog="same_bits", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, help="keep so many layers only: compiling takes minutes")
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    more = {} if args.layers is None else {"num_hidden_layers": args.layers}
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **more)
    model = model.eval().requires_grad_(False)
    quantize_(model, IntScaleConfig())  # on the CPU, so that the integers are the same wherever it then runs
    model = model.to(args.device)
    run = torch.compile(model, backend="intscale", options={"intscale.integer_only": True})
    ids = tokenizer(TEXT, return_tensors="pt").input_ids.to(args.device)
    hashes = set()
    with torch.no_grad():
        for name, logits in logits_in_every_way(run, ids):
            hashes.add(integer_only.hash_logits(logits))
            print(f"{name:<22}{integer_only.hash_logits(logits)[:32]}", flush=True)
    if len(hashes) > 1:
        raise SystemExit("the hashes differ")
    print(f"one hash on {args.device}")


if __name__ == "__main__":
    main()
