"""QSLAW on small models: codes learned on text, and on pictures with a mix of text.

    python benchmarks/learned_codes.py text                  # tiny-llama in $INTSCALE_MODELS, or ../shared/models: 100 steps
    python benchmarks/learned_codes.py pictures              # a small LLaVA on the handwritten digits of scikit-learn

``pictures`` builds a LLaVA from a CLIP tower of two layers, a projector and tiny-llama, trains tower and projector (and a little
of the language model) to name digits, and quantizes the language model. Then codes and projector are learned: on pictures alone,
and with the progressive mix of pictures and text. Two claims of the paper are looked at: learning recovers what rounding lost in
the task, and without text in the mix the model's language suffers.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib.util
import time
from pathlib import Path

import torch
import transformers
from accuracy import calibration_sequences
from perplexity import MODULE_LIST, default_model, held_out_sequences, perplexity
from reporting import head, row
from torch import Tensor, nn

from intscale_compile import IntScaleConfig, IntScaleTensor, learn_codes, quantize
from intscale_compile.learning import LearningReport, Mixed

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGE = 32  # pixels a side, in patches of 8
TRAINED = 1200  # of the 1797 digits


def scales(model: nn.Module) -> dict[str, Tensor]:
    """Group and row scales by name, copied."""
    found = {n: p for n, p in model.named_parameters() if isinstance(p, IntScaleTensor)}
    return {f"{n}.{part}": getattr(p, part).clone() for n, p in found.items() for part in ("scale", "per_tensor_scale")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> str:
    """Whether all scales are equal to the bit, in words."""
    return "equal to the bit" if a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) else "DIFFERENT"


def text_batches(sequences: Tensor, size: int = 2) -> list[dict]:
    """Batches of a few sequences with labels."""
    return [{"input_ids": ids, "labels": ids} for ids in sequences.split(size)]


def text(args: argparse.Namespace) -> None:
    """Learn codes on Python's standard library; perplexity on modules that are held out."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    modules = args.model.parent / MODULE_LIST
    held_out = held_out_sequences(tokenizer, modules, args.sequences, 512)
    data = calibration_sequences(tokenizer, modules, 512, 256)
    original = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    original.requires_grad_(False)
    model = quantize(copy.deepcopy(original), IntScaleConfig())
    torch.set_grad_enabled(False)
    print(head(["codes", "perplexity", "seconds"]))
    print(row(["fp32", f"{perplexity(original, held_out):.3f}", ""]))
    print(row(["rounded", f"{perplexity(model, held_out):.3f}", ""]), flush=True)
    before, began = scales(model), time.monotonic()
    report = learn_codes(model, original, text_batches(data, args.batch), steps=args.steps, lr=args.lr, progress=False)
    seconds = time.monotonic() - began
    print(row([f"learned, {args.steps} steps", f"{perplexity(model, held_out):.3f}", f"{seconds:.0f}"]))
    print(f"\nscales: {same(before, scales(model))}\n{report}")


# --- pictures -----------------------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, list[int]]:
    """Pictures ``[S, 3, 32, 32]`` of 8 x 8 pixels, enlarged, and the digits."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("learned_codes: the digits come with scikit-learn: pip install scikit-learn")
    file = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(file, "rt") as lines:
        rows = torch.tensor([[float(cell) for cell in line.split(",")] for line in lines])  # 64 pixels and the digit
    pixels = rows[:, :64].view(-1, 8, 8) / 8 - 1
    pixels = nn.functional.interpolate(pixels.unsqueeze(1), size=IMAGE, mode="nearest").expand(-1, 3, -1, -1)
    return pixels.contiguous(), rows[:, 64].int().tolist()


def small_llava(language: nn.Module):
    """A LLaVA whose language model has tiny-llama's weights; tower and projector are random. Its last token is the picture's."""
    config = language.config
    tower = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE,
        patch_size=8,
    )
    llava = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=tower, text_config=config, image_token_index=config.vocab_size - 1,
            image_seq_length=(IMAGE // 8) ** 2, vision_feature_layer=-1,
        )
    )  # fmt: skip
    state = {n.replace("model.", "model.language_model.", 1): p for n, p in language.state_dict().items()}
    missing, unexpected = llava.load_state_dict(state, strict=False)
    if unexpected or any("language_model" in name for name in missing):
        raise SystemExit(f"learned_codes: tiny-llama does not fit into LLaVA: {unexpected} {missing}")
    return llava.eval()


class Task:
    """Batches that ask for the digit, and how often a model says it."""

    def __init__(self, llava, tokenizer):
        self.pixels, self.targets = digits()
        self.picture = [llava.config.image_token_index] * ((IMAGE // 8) ** 2)
        encode = lambda words: tokenizer(words, add_special_tokens=False).input_ids  # noqa: E731
        self.question = encode("# digit: ")
        first = [encode(name)[0] for name in NAMES]
        if len(set(first)) < len(first):
            first = [encode(str(i))[0] for i in range(10)]
        self.answers = first

    def batch(self, places: list[int]) -> dict:
        """Some pictures with question and answer; only the answer has a label."""
        answers = torch.tensor([[self.answers[self.targets[p]]] for p in places])
        prompt = torch.tensor([self.picture + self.question]).expand(len(places), -1)
        ids = torch.cat([prompt, answers], 1)
        labels = torch.cat([torch.full_like(prompt, -100), answers], 1)
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "labels": labels, "attention_mask": mask, "pixel_values": self.pixels[places]}

    def batches(self, size: int) -> list[dict]:
        """The pictures to learn from."""
        order = torch.randperm(TRAINED, generator=torch.Generator().manual_seed(0)).tolist()
        return [self.batch(order[i : i + size]) for i in range(0, TRAINED, size)]

    def accuracy(self, model) -> float:
        """Share of the other pictures whose digit the model says, among all tokens, in percent."""
        right, places = 0, list(range(TRAINED, len(self.targets)))
        for i in range(0, len(places), 64):
            batch = self.batch(places[i : i + 64])
            labels = batch.pop("labels")[:, -1]
            right += int((model(**batch).logits[:, -2].argmax(-1) == labels).sum())
        return 100 * right / len(places)


def train(llava, task: Task, language: list[dict], steps: int) -> None:
    """Train tower and projector, and the language model a little on pictures and text alike."""
    own = [p for n, p in llava.named_parameters() if "language_model" not in n and "lm_head" not in n]
    rest = [p for n, p in llava.named_parameters() if "language_model.layers" in n]
    optimizer = torch.optim.AdamW([{"params": own, "lr": 2e-3}, {"params": rest, "lr": 5e-5}], weight_decay=0.0)
    pictures = task.batches(32)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.zero_grad()
            loss = llava(**pictures[step % len(pictures)]).loss
            loss.backward()
            if step % 4 == 3:
                llava(**language[step // 4 % len(language)]).loss.backward()
            optimizer.step()
            if step % 50 == 49:
                print(f"training LLaVA: step {step + 1}, loss {float(loss.detach()):.3f}", flush=True)


def pictures(args: argparse.Namespace) -> None:
    """The table of the small LLaVA."""
    began = time.monotonic()
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    modules = args.model.parent / MODULE_LIST
    held_out = held_out_sequences(tokenizer, modules, args.sequences, 512)
    language = text_batches(calibration_sequences(tokenizer, modules, 64, 128))
    original = small_llava(transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32))
    task = Task(original, tokenizer)
    train(original, task, language, args.train_steps)
    original.requires_grad_(False)
    torch.set_grad_enabled(False)
    chosen = lambda module, name: isinstance(module, nn.Linear) and "language_model" in name  # noqa: E731
    rounded = quantize(copy.deepcopy(original), IntScaleConfig(group_size=args.group_size), chosen)
    before = scales(rounded)
    print("\n" + head(["codes", "digits right %", "perplexity of text", "scales"]))

    def say(name: str, model, report: LearningReport | None = None) -> None:
        cells = [name, f"{task.accuracy(model):.1f}", f"{perplexity(model, held_out):.3f}"]
        print(row([*cells, same(before, scales(model)) if report is not None else ""]), flush=True)

    say("fp32", original)
    say("rounded", rounded)
    kinds = {
        "learned on pictures alone": task.batches(16),
        "learned on pictures and text, 1.0 to 0.5": Mixed(task.batches(16), language),
    }
    options = dict(
        steps=args.steps, lr=args.lr, also=["multi_modal_projector"], first_layer=args.first_layer, progress=False
    )
    reports = {}
    for name, batches in kinds.items():
        model = copy.deepcopy(rounded)
        reports[name] = learn_codes(model, original, batches, **options)
        say(name, model, reports[name])
    for name, report in reports.items():
        print(f"\n{name}: {report}")
    print(f"\n{time.monotonic() - began:.0f} s")


def main(argv: list[str] | None = None) -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["text", "pictures"])
    parser.add_argument("model", nargs="?", type=Path, default=default_model())
    parser.add_argument("--steps", type=int, help="100 for text, 50 for pictures")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=4, help="sequences of 256 tokens a step, for text")
    parser.add_argument("--sequences", type=int, default=24, help="held out, of 512 tokens")
    parser.add_argument("--train-steps", type=int, default=200, help="of LLaVA itself")
    parser.add_argument(
        "--group-size", type=int, default=-1, help="for pictures; -1: per channel, where rounding costs most"
    )
    parser.add_argument("--first-layer", type=int, default=0)
    args = parser.parse_args(argv)
    args.steps = args.steps or (100 if args.task == "text" else 50)
    text(args) if args.task == "text" else pictures(args)


if __name__ == "__main__":
    main()
