"""Check an installed wheel from outside of the checkout: its files, entry points, doctor and a first compile.

python check_wheel.py SOURCE: the tree that the wheel was built from.
"""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import intscale_compile
from intscale_compile import explain

installed, source = Path(intscale_compile.__file__).parent, Path(sys.argv[1])
assert installed.is_relative_to(sys.prefix), f"{installed} is not of this environment"

assert importlib.metadata.version("intscale-compile") == intscale_compile.__version__
backends = importlib.metadata.entry_points(group="torch_dynamo_backends")
assert "intscale" in [entry.name for entry in backends]

for package in ("intscale_compile", "intscale_cli"):
    tree = source / package
    missing = [
        str(file.relative_to(source))
        for file in tree.rglob("*")
        if file.is_file()
        and "__pycache__" not in file.parts
        and not (installed.parent / file.relative_to(source)).exists()
    ]
    assert not missing, f"not in the wheel: {missing}"
for module in ("intscale.py", "intscale_graphs.py"):
    assert (installed.parent / module).exists(), module

doctor = subprocess.run([Path(sys.prefix) / "bin" / "intscale", "doctor"], capture_output=True, text=True)
assert doctor.returncode == 0, doctor.stdout + doctor.stderr

model, x = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64)).requires_grad_(False), torch.randn(4, 64)
assert torch.compile(model, backend="intscale")(x).shape == (4, 64)
report = explain(model, x)
assert "</html>" in report.to_html()
print(f"intscale-compile {intscale_compile.__version__}: wheel, entry points, doctor and a first compile work")
