"""What the command line ``intscale`` does, as functions: models by name, quantizing, planning, evaluating, timing."""

from .bench import GemmTiming, bench_gemms
from .evaluation import Evaluation, evaluate, stdlib_texts, token_sequences
from .inspection import inspect_model, plan, products, verify_folder
from .link import LinkRun
from .loading import load_model, load_tokenizer, meta_model, source_folder
from .quantizing import QuantizeSummary, parse_fields, quantize_folder
from .self_check import check_linear

__all__ = [
    "Evaluation",
    "GemmTiming",
    "LinkRun",
    "QuantizeSummary",
    "bench_gemms",
    "check_linear",
    "evaluate",
    "inspect_model",
    "load_model",
    "load_tokenizer",
    "meta_model",
    "parse_fields",
    "plan",
    "products",
    "quantize_folder",
    "source_folder",
    "stdlib_texts",
    "token_sequences",
    "verify_folder",
]
