"""Paired differences of perplexity with their standard errors, from the JSON of one or more runs of accuracy.py.

    python benchmarks/accuracy.py tiny-llama --presets gptq --rows float 8 4 --seeds 4 --jitter 3 --json gptq.json
    python benchmarks/paired.py gptq.json rtn.json                        # integer against float group scales
    python benchmarks/paired.py outliers.json --base plain.json           # the same presets and rows of two runs

One perplexity of a small model cannot decide a question of 0.05 %: group scales that change by 1e-6 flip int8 roundings, which
moves it by as much. So two forms are compared on equal text and equal calibration samples, sequence by sequence. With ``d[s, t]``
the difference of the mean losses of sequence ``t`` for calibration sample ``s``, the difference of the perplexities is
``exp(mean d) - 1``. Its standard error has a part from the samples, ``std_s(mean_t d) / sqrt(S)``, and one from the sequences,
``std_t(mean_s d) / sqrt(T)``; the figure behind the sign is the root of the sum of their squares. Both parts hold the noise of
the roundings, so it is rather too large than too small.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reporting import table as markdown

FLOAT = "float group scales"
HEADER = ["model", "preset", "group scales", "samples x sequences", "perplexity", "difference"]
HEADER += ["samples", "sequences", "one reading"]


@dataclass(frozen=True)
class Difference:
    """A relative difference of two perplexities and its standard errors, all in percent; NaN where one sample tells nothing."""

    mean: float
    over_samples: float
    over_sequences: float

    @classmethod
    def of(cls, differences: Sequence[Sequence[float]]) -> Difference:
        """From differences of losses, for each calibration sample those of every sequence."""
        samples = [statistics.fmean(row) for row in differences]
        sequences = [statistics.fmean(column) for column in zip(*differences, strict=True)]
        mean = 100 * math.expm1(statistics.fmean(samples))
        return cls(mean, _standard_error(samples), _standard_error(sequences))

    @property
    def error(self) -> float:
        """Both parts together; those that are unknown do not count."""
        return math.hypot(*(part for part in (self.over_samples, self.over_sequences) if not math.isnan(part)))

    def __str__(self) -> str:
        return f"{self.mean:+.2f} % ± {self.error:.2f} %"


def _standard_error(values: Sequence[float]) -> float:
    return 100 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def compared(
    rows: Iterable[Mapping[str, Any]], base: Iterable[Mapping[str, Any]] | None = None
) -> list[tuple[Mapping[str, Any], int, float, float, Difference]]:
    """Rows with what they are compared with, calibration sample by calibration sample.

    Args:
        rows: results of accuracy.py, with their model's title as ``model``.
        base: results of another run, whose rows of equal preset and scales are compared with; None: each row with the float
            group scales of its model and preset.

    Returns:
        For each model, preset and scales: one of its rows, the number of calibration samples that both sides have, the mean
        perplexity, the standard deviation of one reading in percent (NaN without ``--jitter``), and the difference.
    """
    known = {}
    for row in list(rows) if base is None else base:
        if base is not None or row["scales"] == FLOAT:
            known[_key(row, base is None)] = row
    pairs = defaultdict(list)
    for row in rows:
        other = known.get(_key({**row, "scales": FLOAT} if base is None else row, base is None))
        if other is not None and other is not row:
            pairs[row["model"], row["preset"], row["scales"]].append((row, other))
    found = []
    for several in pairs.values():
        differences = [[a - b for a, b in zip(x["losses"], y["losses"], strict=True)] for x, y in several]
        perplexity = statistics.fmean(row["perplexity"] for row, _ in several)
        noise = statistics.fmean(row["noise"] for row, _ in several)
        found.append((several[0][0], len(several), perplexity, noise, Difference.of(differences)))
    return found


def _key(row: Mapping[str, Any], with_model: bool) -> tuple:
    return (row["model"] if with_model else "", row["preset"], row["scales"], row["seed"])


def table(rows: Iterable[Mapping[str, Any]], base: Iterable[Mapping[str, Any]] | None = None) -> str:
    """A Markdown table of ``compared``."""
    lines = []
    for row, samples, perplexity, noise, difference in compared(rows, base):
        count = f"{samples} x {len(row['losses'])}"
        parts = (difference.over_samples, difference.over_sequences, noise)
        errors = ("" if math.isnan(part) else f"± {part:.3f} %" for part in parts)
        lines.append([row["model"], row["preset"], row["scales"], count, f"{perplexity:.3f}", difference, *errors])
    return markdown(HEADER, lines)


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Rows of files that accuracy.py wrote.

    Raises:
        ValueError: two of them are of one model, preset, form of the scales and calibration sample.
    """
    found: dict[tuple, dict[str, Any]] = {}
    for path in paths:
        stored = json.loads(path.read_text())
        for row in stored["rows"]:
            row = {"model": stored["model"], **row}
            if _key(row, True) in found:
                raise ValueError(f"{path} has a row that a file before it has: {_key(row, True)}; give it to --base")
            found[_key(row, True)] = row
    return list(found.values())


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="paired", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON of accuracy.py")
    parser.add_argument("--base", nargs="+", type=Path, help="JSON of other runs on equal text, to compare with")
    args = parser.parse_args(argv)
    try:
        print(table(read(args.files), None if args.base is None else read(args.base)))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
