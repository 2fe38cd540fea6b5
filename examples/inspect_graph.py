"""A tour of what the compiler did to a model: the table, one layer, its graph before and after a pass, a difference, a page.

    python examples/inspect_graph.py                        # a small Llama with random weights; nothing to download
    python examples/inspect_graph.py --model FOLDER --page page.html

Runs on a CPU in seconds. ``docs/explain.md`` says more about each step.
"""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from intscale_compile import explain


def load(folder: str | None) -> torch.nn.Module:
    """The model of a folder, or a Llama of four layers with random weights."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def main(arguments: list[str] | None = None) -> None:
    """The tour."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder or hub name of a causal language model")
    parser.add_argument("--page", type=Path, default=Path("explain.html"), help="where the HTML page goes")
    given = parser.parse_args(arguments)
    model, tokens = load(given.model), torch.ones(1, 16, dtype=torch.long)

    print("1. What became of every linear layer; repeated layers share a line.\n")
    report = explain(model, tokens, measure=True)
    print(report)

    print("\n2. The layer whose accumulator is nearest to overflow (still proved free of it), and its group scales.\n")
    layer = min((x for x in report.layers if x.quantized), key=lambda x: x.headroom_bits)
    print(
        f"{layer.name}: {layer.headroom_bits:.1f} bits of headroom, {layer.bytes_before} -> {layer.bytes_after} bytes"
    )
    most = max(layer.scale_counts.values())
    for scale, count in layer.scale_counts.items():
        print(f"{scale:4d} {'#' * round(40 * count / most)} {count}")

    print("\n3. What one pass did to the first repeated layer: fuse.\n")
    part = next(part for part in report.parts if part.name)
    names = [name for name, _ in part.stages]
    before, after = (part.stages[names.index("fuse") + shift][1] for shift in (-1, 0))
    for line in difflib.unified_diff(before, after, lineterm="", n=1):
        if not line.startswith(("---", "+++")):
            print(line)

    print("\n4. What another configuration changes.\n")
    print(
        explain.diff(
            report, explain(model, tokens, options={"intscale.group_size": 32, "intscale.skip": r".*\.down_proj\..*"})
        )
    )

    report.to_html(given.page)
    print(f"\n5. All of it as one page: {given.page.resolve()}")


if __name__ == "__main__":
    main()
