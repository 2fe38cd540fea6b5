"""Train an encoder on a few labelled and many unlabelled texts, quantize it to W4A8, and see whether it keeps its labels.

    python examples/text_classifier.py                   # functions of the standard library, label = package; 3 to 6 minutes
    python examples/text_classifier.py --data FILE.tsv   # your own: a label, a tab and a text on each line

Trained twice with equal steps: supervised, and with UDA, ESimCSE and FGM or PGD in the later 60 % of them (arXiv 2304.13140).
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import sysconfig
import timeit
from collections import Counter
from pathlib import Path
from statistics import median

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.nn import functional as F
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, calibrate, explain

TOKENS, BATCH, VOCABULARY, WIDTH, PAD, START = 64, 32, 8192, 128, 0, 1
LEARNING_RATE, WARMUP, SUPERVISED_PART, LEAST_TEXTS = 1e-3, 50, 0.4, 60  # texts of a label that takes part
TEMPERATURE, CERTAIN, CERTAIN_OF_TWO, DROPPED = 0.4, 0.6, 0.97, 0.15  # UDA
REPEATED, MOMENTUM, COSINE, CONTRAST_WEIGHT = 0.32, 0.995, 0.05, 0.1  # ESimCSE
ATTACKS, BACKENDS = {"fgm": (1, 1.0), "pgd": (3, 0.3)}, ("inductor", "intscale", "intscale")  # steps, their length
NO_LABELS = {"site-packages", "test", "lib2to3", "idlelib", "turtledemo", "encodings", "ensurepip"}


def functions_by_package():
    """Package and source of every longer function of the running Python's standard library: many, uneven, noisy labels."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(set(root.glob("*/**/*.py")) - {p for name in NO_LABELS for p in root.glob(f"{name}/**/*.py")}):
        parts = re.split(r"^ *def ", path.read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE)
        yield from ((path.relative_to(root).parts[0], text) for text in parts[1:] if len(text) > 120)


def read_data(args) -> tuple[int, tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor]]:
    """Number of labels, labelled texts ``[N, T]`` with labels ``[N]``, unlabelled ones, and those to test with."""
    lines = [] if args.data is None else args.data.read_text(encoding="utf-8").splitlines()
    pairs = list(functions_by_package()) if args.data is None else [x.split("\t", 1) for x in lines if "\t" in x]
    names = sorted(label for label, count in Counter(label for label, _ in pairs).items() if count >= LEAST_TEXTS)
    if len(names) < 2:
        raise SystemExit(f"text_classifier: there are {len(names)} labels with {LEAST_TEXTS} texts or more, not 2")
    pairs = [(names.index(label), " ".join(text.split())) for label, text in pairs if label in names]
    random.Random(args.seed).shuffle(pairs)
    seen, labelled, rest = Counter(), [], []
    for label, text in pairs:
        (labelled if seen[label] < args.per_label else rest).append((label, text))
        seen[label] += 1
    size, tokenizer = len(rest) // 3 // BATCH * BATCH, ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text for _, text in labelled + rest[size:]], VOCABULARY, 2, False, ["<pad>", "<s>"])

    def tensors(part) -> tuple[Tensor, Tensor]:
        rows = [([START, *tokenizer.encode(text).ids] + [PAD] * TOKENS)[:TOKENS] for _, text in part]
        return torch.tensor(rows), torch.tensor([label for label, _ in part])

    return len(names), tensors(labelled), tensors(rest[size:])[0], tensors(rest[:size])


def recounted(ids: Tensor, counts: Tensor) -> Tensor:
    """``ids [B, T]`` with each token as often as ``counts [B, T]`` says, cut or padded to the same length."""
    places = torch.arange(TOKENS).expand(len(ids), -1).contiguous()
    return F.pad(ids, (0, 1), value=PAD).gather(1, torch.searchsorted(counts.cumsum(1), places, right=True))


def inputs(ids: Tensor) -> dict[str, Tensor]:
    """What the model is called with for ``ids [B, T]``."""
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def uda_loss(model, ids: Tensor) -> Tensor:
    """The model agrees with its sharpened self, where that is certain, on texts without some of their words."""
    with torch.no_grad():
        wanted = (model.eval()(**inputs(ids)).logits / TEMPERATURE).softmax(-1)
    keep = (torch.rand(ids.shape) > DROPPED) | (ids == START)
    found = model.train()(**inputs(recounted(ids, keep.long()))).logits.log_softmax(-1)
    certain = wanted.amax(-1) > (CERTAIN if wanted.shape[-1] > 2 else CERTAIN_OF_TWO)
    return (F.kl_div(found, wanted, reduction="none").sum(-1) * certain).mean()


def contrast_loss(model, momentum, queue: list[Tensor], ids: Tensor) -> Tensor:
    """ESimCSE: a text against itself with words repeated, and against the others of this batch and the two before it."""
    words = ids > START
    most = (REPEATED * words.sum(1, keepdim=True)).clamp(min=2)
    order = torch.where(words, torch.rand(ids.shape), 2.0).argsort(1).argsort(1)
    twice = words & (order < (torch.rand(len(ids), 1) * (most + 1)).floor())
    with torch.no_grad():
        for slow, fast in zip(momentum.parameters(), model.parameters()):
            slow.lerp_(fast, 1 - MOMENTUM)
        keys = momentum.bert(**inputs(recounted(ids, 1 + twice.long()))).last_hidden_state[:, 0]
    found = model.bert(**inputs(ids)).last_hidden_state[:, 0]
    similar = F.cosine_similarity(found[:, None], torch.cat([keys, *queue])[None], dim=-1)
    queue[:] = [keys, *queue][:2]
    return F.cross_entropy(similar / COSINE, torch.arange(len(ids)))


def add_attack(model, loss, kind: str) -> None:
    """Add the gradients of ``loss()`` with the word embeddings moved along theirs, a distance of 1 at most."""
    table, (steps, length) = model.bert.embeddings.word_embeddings.weight, ATTACKS[kind]
    kept, clean = table.detach().clone(), [(p, p.grad) for p in model.parameters()]
    for step in range(steps):
        moved = table.data + length * table.grad / table.grad.norm().clamp(min=1e-12) - kept
        table.data = kept + moved / moved.norm().clamp(min=1)
        for parameter, gradient in clean:
            parameter.grad = gradient if step == steps - 1 else None
        loss().backward()
    table.data.copy_(kept)


def train(labels: int, labelled: tuple[Tensor, Tensor], unlabelled: Tensor, args, more: bool):
    """A two-layer BERT, trained on the labelled texts and, with ``more``, on the unlabelled ones."""
    torch.manual_seed(args.seed)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=WIDTH // 32,
        intermediate_size=4 * WIDTH, max_position_embeddings=TOKENS, num_labels=labels, pad_token_id=PAD,
    )  # fmt: skip
    model, momentum, queue = transformers.BertForSequenceClassification(config).train(), None, []
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP) * (1 - step / args.steps)
        chosen = torch.randint(len(labelled[0]), (BATCH,))
        ids, wanted = labelled[0][chosen], labelled[1][chosen]
        loss = F.cross_entropy(model(**inputs(ids)).logits, wanted)
        later = more and step >= SUPERVISED_PART * args.steps  # from the first step on it ends with one label for all
        if later:
            momentum = momentum or copy.deepcopy(model).requires_grad_(False)
            other = unlabelled[torch.randint(len(unlabelled), (BATCH,))]
            loss = loss + uda_loss(model, other) + CONTRAST_WEIGHT * contrast_loss(model, momentum, queue, other)
        optimizer.zero_grad()
        loss.backward()
        if later:
            add_attack(model, lambda: F.cross_entropy(model(**inputs(ids)).logits, wanted), args.attack)  # noqa: B023
        optimizer.step()
    return model.eval().requires_grad_(False)


def attacked(model, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Inputs whose word embeddings are moved, text by text, by 1 along the gradient of the loss (FGM)."""
    words, mask = model.bert.embeddings.word_embeddings(ids).requires_grad_(), (ids != PAD).long()
    with torch.enable_grad():
        loss = F.cross_entropy(model(inputs_embeds=words, attention_mask=mask).logits, labels, reduction="sum")
    slope = torch.autograd.grad(loss, words)[0]
    moved = words + slope / slope.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    return {"inputs_embeds": moved, "attention_mask": mask}


def compare(model, unlabelled: Tensor, ids: Tensor, wanted: Tensor) -> None:
    """Quantize copies of the model, compile, and print how they differ from it."""
    forms = {"fp32": model, "quantize_": copy.deepcopy(model), "calibrate": copy.deepcopy(model)}
    quantize_(forms["quantize_"], IntScaleConfig())
    calibrate(forms["calibrate"], [inputs(part) for part in unlabelled[:1024].split(BATCH)], "gptq", progress=False)
    runs = [torch.compile(form, backend=backend) for form, backend in zip(forms.values(), BACKENDS)]
    plain = [inputs(part) for part in ids.split(BATCH)]
    moved = [attacked(model, *batch) for batch in zip(ids.split(BATCH), wanted.split(BATCH))]
    pairs = [((run, plain), (form, moved)) for run, form in zip(runs, forms.values())]
    logits = [[torch.cat([f(**batch).logits for batch in batches]) for f, batches in pair] for pair in pairs]
    times = [[timeit.timeit(lambda f=f: f(**plain[0]), number=1) for f in runs] for _ in range(21)]  # in turns
    columns = ("correct", "labels as fp32", "moved by FGM: correct", "labels as fp32", "KL, nats", "sentences/s")
    print(f"\n{explain(runs[1], **plain[0])}\n\n{' | '.join([' ' * 9, *columns])}")
    for name, found, taken in zip(forms, logits, zip(*times)):
        same = [part.argmax(-1) == x for part, first in zip(found, logits[0]) for x in (wanted, first.argmax(-1))]
        p, q = (parts[0].log_softmax(-1) for parts in (logits[0], found))
        cells = [*(f"{100 * x.double().mean():.2f} %" for x in same)]
        cells += [f"{F.kl_div(q, p, log_target=True, reduction='batchmean'):.5f}", f"{BATCH / median(taken):.0f}"]
        print(" | ".join([f"{name:<9}", *(f"{x:>{len(column)}}" for x, column in zip(cells, columns))]))


@torch.no_grad()
def main(argv=None) -> None:
    """Train, quantize, compare."""
    parser = argparse.ArgumentParser(prog="text_classifier", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="file with lines of label, tab, text")
    for name, default in (("steps", 400), ("per-label", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--attack", choices=ATTACKS, default="fgm", help="in training; default: fgm")
    args = parser.parse_args(argv)
    labels, labelled, unlabelled, (ids, wanted) = read_data(args)
    print(f"{labels} labels, {len(labelled[0])} labelled texts, {len(unlabelled)} unlabelled, {len(ids)} to test with")
    for name in ("supervised", f"with UDA, ESimCSE and {args.attack.upper()}"):
        with torch.enable_grad():
            model = train(labels, labelled, unlabelled, args, more=name != "supervised")
        found = torch.cat([model(**inputs(part)).logits for part in ids.split(BATCH)]).argmax(-1)
        print(f"{name}, {args.steps} steps: {100 * (found == wanted).double().mean():.1f} % correct", flush=True)
        if len(found.unique()) < max(2, labels / 2):
            raise SystemExit(f"text_classifier: collapsed to {len(found.unique())} of {labels} labels: train it longer")
    compare(model, unlabelled, ids, wanted)


if __name__ == "__main__":
    torch.set_num_threads(1)  # layers this small gain nothing from more
    main()
