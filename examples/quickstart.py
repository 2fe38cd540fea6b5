"""Train a small Llama on the standard library, quantize it to W4A8, compile it, and see what that cost and gained.

    pip install -e .                                    # registers backend="intscale"
    python examples/quickstart.py                       # trains for a minute, once; nothing to download
    python examples/quickstart.py --model FOLDER        # a model of your own, or a name on the Hugging Face hub

The three lines that matter are in ``main``: ``quantize_``, ``torch.compile`` and ``explain``.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import platform
import random
import shutil
import statistics
import sys
import sysconfig
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

# Never trained on; perplexity is measured on these. A Python that lacks one skips it.
HELD_OUT = (
    "contextlib.py",
    "traceback.py",
    "mailbox.py",
    "pkgutil.py",
    "wave.py",
    "hmac.py",
    "poplib.py",
    "email/parser.py",
    "unittest/loader.py",
    "zoneinfo/__init__.py",
    "asyncio/transports.py",
    "concurrent/futures/process.py",
)
# Tables, generated text and other people's code: little to learn from.
NOT_TRAINED_ON = {"site-packages", "test", "tests", "encodings", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
PROMPT = "def __init__(self, "

# Two layers, not four: within a minute of two CPU cores they see more text and reach a lower perplexity.
ARCHITECTURE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "vocab_size": 2048,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
BATCH, WINDOW = 4, 256  # training: sequences in a step, tokens in each
MAX_STEPS = 400  # about a minute on two idle cores; a slow or busy machine stops earlier, at --train-seconds
LEARNING_RATE = 2e-2
CORPUS_BYTES = 4_000_000  # more than a run can read
TIMING_REPEATS = 7


def fail(message: str) -> None:
    """End with one line on stderr and exit code 2, as argparse does."""
    print(f"quickstart: {message}", file=sys.stderr)
    raise SystemExit(2)


def stdlib() -> Path:
    """Folder of the running Python's own sources."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_sources(paths) -> list[str]:
    """Text of those files that this Python has."""
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()]


def training_texts(seed: int) -> list[str]:
    """Standard library modules in a seeded order, without the held-out ones, up to ``CORPUS_BYTES``."""
    root = stdlib()
    held_out = {root / name for name in HELD_OUT}
    paths = sorted(
        path
        for path in root.rglob("*.py")
        if path not in held_out and not NOT_TRAINED_ON.intersection(path.relative_to(root).parts)
    )
    random.Random(seed).shuffle(paths)
    texts, total = [], 0
    for text in read_sources(paths):
        if total > CORPUS_BYTES:
            break
        texts.append(text)
        total += len(text)
    if not texts:
        fail(f"no Python sources in {root}; give a trained model with --model")
    return texts


def train_tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE: a token is about 3.4 bytes, so a minute covers more text than single bytes would."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    vocab_size = ARCHITECTURE["vocab_size"]
    bpe.train_from_iterator(texts[::3], vocab_size=vocab_size, special_tokens=["<s>"], show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>")


def encode(tokenizer, texts: list[str]) -> Tensor:
    """All texts in one row of token ids, each after a begin token where the tokenizer has one."""
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    rows = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor([token for row in rows for token in begin + row])


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for the rest: in so few steps Muon gets much further than AdamW alone."""
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim != 2 or p is embedding]
    return [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is worth it here: emulated, it would be slower than float32."""
    if device.type != "cpu":
        return True
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def train(model: nn.Module, tokens: Tensor, seconds: float, seed: int, device: torch.device) -> None:
    """Train until ``MAX_STEPS`` or ``seconds``, whichever is first; the learning rate ends at 0 either way."""
    generator = torch.Generator().manual_seed(seed)
    optimizers, bfloat16 = make_optimizers(model), has_fast_bfloat16(device)
    start, step, average = time.perf_counter(), 0, None
    with tqdm(total=MAX_STEPS, desc="training", unit="step", disable=None) as bar:
        while (progress := max(step / MAX_STEPS, (time.perf_counter() - start) / seconds)) < 1:
            rate = LEARNING_RATE * min(1.0, (step + 1) / 20) * (1 - progress)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = rate
            offsets = torch.randint(len(tokens) - WINDOW, (BATCH, 1), generator=generator)
            batch = tokens[offsets + torch.arange(WINDOW)].to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
            bar.update()
            bar.set_postfix(loss=f"{average:.2f}")
    print(f"trained {step} steps in {time.perf_counter() - start:.0f} s, {step * BATCH * WINDOW:,} tokens", flush=True)


def trained_model_folder(args: argparse.Namespace) -> Path:
    """Folder of the trained model, trained on the first run. A changed script or input gets a new folder."""
    state = json.dumps([args.train_seconds, args.seed, platform.python_version(), transformers.__version__])
    key = hashlib.sha256(Path(__file__).read_bytes() + state.encode()).hexdigest()[:12]
    folder = args.cache.expanduser() / f"quickstart-{key}"
    if (folder / "config.json").is_file():
        print(f"model from {folder} (trained by an earlier run)")
        return folder
    texts = training_texts(args.seed)
    print(f"training on {len(texts)} modules of the standard library, about {args.train_seconds:.0f} s", flush=True)
    tokenizer = train_tokenizer(texts)
    torch.manual_seed(args.seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**ARCHITECTURE)).to(args.device)
    train(model, encode(tokenizer, texts), args.train_seconds, args.seed, args.device)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")  # an interrupted run must not leave half a model
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:  # another run finished first
        shutil.rmtree(partial)
    print(f"saved to {folder}")
    return folder


def load(name: str, device: torch.device):
    """Model, in eval mode and without gradients, and tokenizer from a local folder or the hub."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        looks_local = os.path.isabs(name) or name.startswith((".", "~"))
        reason = "no such folder" if looks_local and not os.path.isdir(name) else str(error).strip().splitlines()[0]
        fail(f"cannot load a model from {name!r}: {reason}")
    model.config.use_cache = False
    return model.to(device).eval().requires_grad_(False), tokenizer


def held_out_batches(tokenizer, model: nn.Module, args: argparse.Namespace) -> Tensor:
    """Held-out token ids ``[batches, sequences in a batch, tokens]``; equal batches, so nothing is compiled twice."""
    tokens = min(args.tokens, getattr(model.config, "max_position_embeddings", args.tokens))
    ids = encode(tokenizer, read_sources(stdlib() / name for name in HELD_OUT))
    count = min(args.sequences, len(ids) // tokens)
    if count == 0:
        fail(f"the held-out modules give {len(ids)} tokens, less than one sequence: lower --tokens ({tokens})")
    size = max(size for size in range(1, 9) if count % size == 0)
    return ids[: count * tokens].view(-1, size, tokens).to(args.device)


def perplexity(model, batches: Tensor) -> float:
    """exp of the mean next-token loss within each sequence."""
    losses = []
    for batch in batches:
        logits = model(batch, use_cache=False).logits
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten()).item())
    return math.exp(statistics.fmean(losses))


def parameter_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of each parameter by name. A quantized weight counts what it stores: codes and scales."""
    sizes = {}
    for name, parameter in model.named_parameters():  # a tied weight appears once
        stored = [parameter]
        if hasattr(parameter, "__tensor_flatten__"):
            stored = [getattr(parameter, inner) for inner in parameter.__tensor_flatten__()[0]]
        sizes[name] = sum(tensor.numel() * tensor.element_size() for tensor in stored)
    return sizes


def median_ms(models: list, batch: Tensor) -> list[float]:
    """Median milliseconds of a forward pass of each model, taken in turns so that a busy machine slows all alike."""
    synchronize = torch.cuda.synchronize if batch.is_cuda else lambda: None
    times: list[list[float]] = [[] for _ in models]
    for _ in range(TIMING_REPEATS + 1):
        for model, taken in zip(models, times):
            synchronize()
            start = time.perf_counter()
            model(batch, use_cache=False)
            synchronize()
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken[1:]) for taken in times]  # the first round warms up


def sample(model: nn.Module, tokenizer, seed: int) -> str:
    """A short text after ``PROMPT``."""
    ids = encode(tokenizer, [PROMPT.rstrip()])[None].to(model.device)
    torch.manual_seed(seed)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=80,
        do_sample=True,
        temperature=0.7,
        top_k=40,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def summary(name: str, perplexities, before: dict[str, int], after: dict[str, int], times) -> str:
    """The closing table: one line per figure, float model against W4A8."""
    changed = [key for key in before if after[key] != before[key]]
    linear = [sum(sizes[key] for key in changed) / 1e6 for sizes in (before, after)]
    total = [sum(sizes.values()) / 1e6 for sizes in (before, after)]
    rows = [
        ("", name, "W4A8", ""),
        ("perplexity", *(f"{p:.2f}" for p in perplexities), f"{100 * (perplexities[1] / perplexities[0] - 1):+.1f} %"),
        ("all parameters, MB", *(f"{size:.2f}" for size in total), f"{total[0] / total[1]:.1f}x smaller"),
        ("quantized weights, MB", *(f"{s:.2f}" for s in linear), f"{linear[0] / linear[1]:.1f}x smaller"),
        ("compiled forward, ms", *(f"{t:.1f}" for t in times), f"{times[0] / times[1]:.2f}x as fast"),
    ]
    return "\n".join(f"{label:<24}{a:>10}{b:>10}   {note}".rstrip() for label, a, b, note in rows)


def parse_arguments(argv) -> argparse.Namespace:
    """Options, checked."""

    def positive(kind, least):
        def convert(text: str):
            if not (value := kind(text)) >= least:
                raise argparse.ArgumentTypeError(f"{text} is less than {least}")
            return value

        convert.__name__ = "number"
        return convert

    def device(text: str) -> torch.device:
        try:
            return torch.empty(0, device=text).device
        except (RuntimeError, AssertionError) as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not usable here: {str(error).splitlines()[0]}") from None

    parser = argparse.ArgumentParser(prog="quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub name of a causal language model (default: train a small one)")
    parser.add_argument("--device", type=device, default="cpu", help="default: cpu")
    parser.add_argument("--tokens", type=positive(int, 2), default=256, help="tokens per held-out sequence")
    parser.add_argument("--sequences", type=positive(int, 1), default=48, help="number of held-out sequences")
    parser.add_argument("--train-seconds", type=positive(float, 0.1), default=60, help="longest training time")
    parser.add_argument("--seed", type=int, default=0, help="for training and the sample")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/intscale"), help="where the trained model is kept")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """Run the whole tour; see the module's docstring."""
    args = parse_arguments(argv)
    import intscale_compile
    from intscale_compile import IntScaleConfig

    if "intscale" not in torch.compiler.list_backends():
        fail('backend "intscale" is not registered: run "pip install -e ." in the checkout first')
    from torchao.quantization import quantize_

    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load(args.model or str(trained_model_folder(args)), args.device)
    batches = held_out_batches(tokenizer, model, args)

    with torch.no_grad():
        name = "fp32" if args.device.type == "cpu" else "bf16"
        original = torch.compile(copy.deepcopy(model))
        before, size_before = perplexity(model, batches), parameter_bytes(model)
        count = f"{batches[..., 0].numel()} x {batches.shape[-1]} held-out tokens"
        print(f"perplexity before: {before:.2f} ({name}, {count})")

        quantize_(model, IntScaleConfig())
        compiled = torch.compile(model, backend="intscale")

        after, size_after = perplexity(compiled, batches), parameter_bytes(model)
        print(f"perplexity after:  {after:.2f} (W4A8, integer group scales, compiled)")
        print(f"parameters: {sum(size_before.values()):,} bytes before, {sum(size_after.values()):,} after")
        print(f"\n{intscale_compile.explain(model, batches[0])}")
        print(f"\nsample from the quantized model:\n{sample(model, tokenizer, args.seed)}\n", flush=True)
        times = median_ms([original, compiled], batches[0])
        print(summary(name, (before, after), size_before, size_after, times))


if __name__ == "__main__":
    main()
