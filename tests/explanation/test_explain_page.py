"""The page of tiny-llama in a real browser, and what it says against the graph that torch.compile ran."""

import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import intscale_compile
from intscale_compile import explain
from intscale_compile.kernels.quantize_per_token import OP as QUANTIZE_OP
from intscale_compile.kernels.w4a8_linear import LINEAR_OP
from tests.support.pages import open_page

CHECK = """
  const text = (id) => document.getElementById(id).textContent;
  for (const id of ["layers-quantized", "gemm-count", "quantization-count", "bytes-before", "bytes-after"]) result[id] = text(id);
  const table = document.getElementById("layers");
  const shown = () => Array.from(table.tBodies[0].rows).filter((row) => row.offsetParent !== null);
  const column = (i) => shown().map((row) => row.cells[i].dataset.sort ?? row.cells[i].textContent);
  const press = (name) => Array.from(table.tHead.rows[0].cells).find((h) => h.textContent.startsWith(name)).firstChild.click();
  result.folded = column(0);
  document.querySelector("input[data-unfold]").click();
  result.unfolded = column(0);
  press("bytes after");
  result.ascending = column(9).map(Number);
  press("bytes after");
  result.descending = column(9).map(Number);
  press("layer");
  result.names = column(0);
  const field = document.querySelector("input[data-table=layers]");
  field.value = "DOWN_proj";
  field.dispatchEvent(new Event("input"));
  result.filtered = column(0);
  result.histograms = shown().every((row) => row.querySelector("svg path").getBBox().width > 5);
  const part = document.querySelector('details[data-part="model.layers.0"]');
  result.open = part.open;
  for (const step of part.querySelectorAll("details")) step.open = true;
  result.steps = Array.from(part.querySelectorAll(".step"), (step) => [
    step.querySelector("summary").textContent.split(":")[0],
    Array.from(step.querySelectorAll("td.removed"), (cell) => cell.textContent),
    Array.from(step.querySelectorAll("td.added"), (cell) => cell.textContent),
    getComputedStyle(step.querySelector("td.added, td.removed")).backgroundColor,
    step.querySelector("tbody").offsetHeight,
  ]);
  result.overflow = document.documentElement.scrollWidth - innerWidth;
"""


@pytest.fixture(scope="module")
def tiny_llama(models_dir):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(models_dir / "tiny-llama").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def report(tiny_llama):
    return explain(tiny_llama, torch.ones(2, 16, dtype=torch.long))


@pytest.fixture(scope="module")
def opened(report, tmp_path_factory):
    return open_page(report.to_html(), tmp_path_factory.mktemp("page"), CHECK)


def test_no_error_and_no_request(opened):
    assert opened["failures"] == [] and opened["requests"] == []


def test_self_contained_and_small(report, tmp_path):
    html = report.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == html
    assert len(html.encode()) < 5_000_000
    assert not re.search(r"https?:|@import|url\(|src=", html)
    assert "default-src 'none'" in html and "prefers-color-scheme: dark" in html


def test_well_formed(report):
    class Balance(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open = []

        def handle_starttag(self, tag, attrs):
            if tag == "td" and self.open[-1] == "td":
                self.open.pop()  # the end of a cell may be left out
            if tag not in ("meta", "link", "input", "br"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            if tag == "tr" and self.open[-1] == "td":
                self.open.pop()
            assert self.open.pop() == tag, self.getpos()

    parser = Balance()
    parser.feed(report.to_html())
    assert parser.open == []


def test_totals_are_those_of_the_compiled_graph(tiny_llama, opened, monkeypatch):
    """The graph is the one that Inductor gets."""
    import torch._inductor.compile_fx as inductor

    targets, read = [], []

    def compile_graph(gm, inputs, **_):
        targets.extend(node.target for node in gm.graph.nodes)
        read.extend(value for value in inputs if isinstance(value, torch.Tensor))
        return gm.forward

    monkeypatch.setattr(inductor, "compile_fx", compile_graph)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(tiny_llama, backend="intscale")(torch.ones(2, 16, dtype=torch.long))
    assert opened["gemm-count"] == str(targets.count(LINEAR_OP)) == "32"
    assert opened["quantization-count"] == str(targets.count(QUANTIZE_OP)) == "32"
    assert opened["layers-quantized"] == "56 of 57"
    others = tiny_llama.model.rotary_emb.inv_freq.nbytes + 2 * 16 * 8  # what is no parameter: a buffer and token ids
    assert int(opened["bytes-after"].replace(",", "")) == sum(value.nbytes for value in read) - others
    parameters = {id(p): p for p in tiny_llama.parameters()}.values()
    assert int(opened["bytes-before"].replace(",", "")) == sum(p.nbytes for p in parameters)


def test_repeated_layers_are_folded(opened, report):
    assert opened["folded"] == [
        *(f"model.layers.0..7.self_attn.{x}_proj.weight" for x in "qkvo"),
        *(f"model.layers.0..7.mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
        "model.embed_tokens.weight",
    ]
    assert sorted(opened["unfolded"]) == sorted(layer.name for layer in report.layers)


def test_table_sorts_and_filters(opened):
    assert opened["ascending"] == sorted(opened["ascending"]) and len(set(opened["ascending"])) > 3
    assert opened["descending"] == sorted(opened["ascending"], reverse=True)
    assert opened["names"] == sorted(opened["unfolded"])
    assert opened["filtered"] == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(8)]
    assert opened["histograms"]


def test_graph_of_layer_0_before_and_after_each_pass(opened, report):
    assert opened["open"]
    names = [name for name, *_ in opened["steps"]]
    assert names[0].startswith("all passes together")
    assert names[1:5] == ["insert_qdq", "share_quantize", "merge_siblings", "fuse"]
    steps = {name: (gone, new) for name, gone, new, *_ in opened["steps"]}
    gone, new = steps["insert_qdq"]
    assert sum("= F.linear(" in line for line in gone) == 7
    assert sum("= intscale.dequantize_weight(" in line for line in new) == 7
    gone, new = steps["fuse"]
    assert sum("= F.linear(" in line for line in gone) == sum("= intscale.w4a8_linear(" in line for line in new) == 4
    assert sum("quantize_per_token = " in line for line in steps["share_quantize"][1]) == 0
    assert all(colour != "rgba(0, 0, 0, 0)" and height > 20 for *_, colour, height in opened["steps"])
    idle = {name for name, _ in report.parts[0].stages[1:]} - {*names}
    assert "match" in idle and "rotate_quantize" in idle


def test_readable_on_a_phone(report, tmp_path):
    found = open_page(report.to_html(), tmp_path, CHECK, width=500)
    assert found["failures"] == [] and found["overflow"] <= 0


class Plain(nn.Module):
    def forward(self, x):
        return x * 2


class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(y)


CASES = {"no linear": Plain, "graph break": Breaks, "<b>&amp;": lambda: nn.Sequential(nn.Linear(64, 64))}


@pytest.mark.parametrize("case", CASES)
def test_other_models_open_as_well(case, tmp_path):
    model = CASES[case]()
    if case == "<b>&amp;":
        model = nn.Sequential()
        model.add_module("<b>&amp", nn.Linear(64, 64))
    html = explain(model, torch.randn(4, 64)).to_html()
    found = open_page(html, tmp_path, "result.text = document.body.textContent;")
    assert found["failures"] == []
    assert {"no linear": "has no linear layer", "graph break": "graphs, 1 break", "<b>&amp;": "<b>&amp"}[case] in found[
        "text"
    ]


def test_page_of_a_difference(tmp_path):
    model = Breaks()
    x = torch.randn(4, 64)
    difference = intscale_compile.explain.diff(
        explain(model, x), explain(model, x, options={"intscale.skip": "second.*"})
    )
    found = open_page(difference.to_html(), tmp_path, 'result.rows = document.querySelectorAll("tbody tr").length;')
    assert found["failures"] == [] and found["rows"] > 5
