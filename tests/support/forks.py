"""Processes that begin with the imports done: forks of one that all processes of pytest-xdist share.

Imports of torch, transformers and this package are 5 to 10 s of processor time, what a first compilation looks up 2 to 3 s. A
fork has run nothing else, and nothing of that starts a thread. For scripts that need no other state of a Python just started:
what is read from the environment at an import has the value that it had when the first test asked for this kind.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = {  # by kind
    "plain": (
        "torch._inductor.compile_fx",
        "torch.distributed.tensor.parallel",
        "torchao.quantization",
        "intscale_compile",
        "?transformers.models.llama.modeling_llama",
        "?transformers.models.mixtral.modeling_mixtral",
    ),
    "interpreter": ("torch", "intscale_compile"),
}
VARIABLES = {"plain": {}, "interpreter": {"TRITON_INTERPRET": "1"}}  # before the imports
START_SECONDS = 300.0


def run(
    kind: str,
    target: str | Path,
    *arguments: str,
    timeout: float,
    input: str = "",
    cwd: Path = ROOT,
    **environment: str,
) -> subprocess.CompletedProcess:
    """Run a module (a name) or a script (a path) as ``__main__`` in a fork, as ``subprocess.run`` would in a new process.

    Args:
        kind: of :data:`IMPORTS`.
        environment: added to that of this process.

    Raises:
        subprocess.TimeoutExpired: the fork, and what it started, are ended; also where this process ends before.
    """
    fork = Fork(kind, target, arguments, {**os.environ, **environment}, input=input, cwd=cwd)
    try:
        code = fork.wait(timeout)
    finally:
        fork.kill()
    return subprocess.CompletedProcess([str(target), *arguments], code, fork.out, fork.err)


def instead_of_subprocess() -> SimpleNamespace:
    """For a module that starts its ranks with what it has imported as ``subprocess``."""
    return SimpleNamespace(Popen=PythonFork, DEVNULL=subprocess.DEVNULL)


class Fork:
    """A module or script in a fork that runs beside this process.

    Attributes:
        returncode: None while it runs.
        out, err: what it wrote, once it has ended.
    """

    def __init__(
        self,
        kind: str,
        target: str | Path,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        input: str = "",
        cwd: Path = ROOT,
    ):
        self.returncode: int | None = None
        self.out = self.err = ""
        self._target, self._folder = str(target), tempfile.TemporaryDirectory()
        self._connection = _connected(kind)
        (Path(self._folder.name) / "0").write_text(input)
        request = dict(target=str(target), script=isinstance(target, Path), arguments=arguments, cwd=str(cwd))
        request |= dict(environment={**environment, **VARIABLES[kind]}, folder=self._folder.name)
        self._connection.sendall(json.dumps(request).encode() + b"\n")

    def wait(self, timeout: float | None = None) -> int:
        """Exit code, once it has ended."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                answer = self._connection.makefile().readline()
            except TimeoutError:
                raise subprocess.TimeoutExpired(self._target, timeout or 0.0) from None
            self._end(int(answer))
        assert self.returncode is not None
        return self.returncode

    def poll(self) -> int | None:
        """Exit code; None while it runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def kill(self) -> None:
        """End it, and what it started."""
        if self.returncode is None:
            self._end(-signal.SIGKILL)

    def _end(self, code: int) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # where it runs yet, its parent ends it then
        self._connection.close()
        self.returncode = code
        self.out, self.err = (path.read_text() if path.exists() else "" for path in self._streams())
        self._folder.cleanup()

    def _streams(self) -> list[Path]:
        return [Path(self._folder.name) / stream for stream in "12"]


class PythonFork(Fork):
    """As ``subprocess.Popen`` of ``python -m module`` or ``python script``: what it writes comes when it has ended."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], stdout: Any = None, stderr: Any = None):
        assert command[0] == sys.executable
        module = command[1] == "-m"
        self._files = [os.dup(file.fileno()) if hasattr(file, "fileno") else file for file in (stdout, stderr)]
        super().__init__(
            "plain", command[2] if module else Path(command[1]), command[2 + module :], env, cwd=Path.cwd()
        )

    def _end(self, code: int) -> None:
        super()._end(code)
        for text, file, own in zip((self.out, self.err), self._files, (sys.stdout, sys.stderr)):
            if file is None:
                own.write(text)
            elif file != subprocess.DEVNULL:
                os.write(file, text.encode())
                os.close(file)


def _connected(kind: str) -> socket.socket:
    """Connection to the process of a kind, which is started where it does not run yet."""
    # Of this run of pytest; a worker's parent is the process that started the run.
    run_id = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    owner = os.getppid() if run_id else os.getpid()
    folder = Path(tempfile.gettempdir()) / f"intscale-forks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    address = folder / f"{owner}-{kind}"
    connection = socket.socket(socket.AF_UNIX)
    with open(folder / f"{owner}-{kind}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            connection.connect(str(address))
        except OSError:
            _start(kind, owner, address)
            connection.connect(str(address))
    return connection


def _start(kind: str, owner: int, address: Path) -> None:
    """Start the process of a kind and wait until it listens."""
    address.unlink(missing_ok=True)
    environment = {**os.environ, **VARIABLES[kind], "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.support.forks", kind, str(owner), str(address)]
    log = address.with_suffix(".log")
    with open(log, "w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    end = time.monotonic() + START_SECONDS
    while not address.exists():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise RuntimeError(f"imports of {kind}: {log.read_text()[-2000:]}")
        time.sleep(0.02)


def serve(kind: str, owner: int, address: Path) -> None:
    """Import, then fork at each connection until ``owner`` has ended."""
    for name in IMPORTS[kind]:
        with contextlib.suppress(*([ImportError] if name.startswith("?") else [])):
            __import__(name.removeprefix("?"))
    if kind == "plain":
        _compile_once()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how the forks ended: they answer themselves
    with socket.socket(socket.AF_UNIX) as listener:
        waiting = address.with_suffix(".new")
        waiting.unlink(missing_ok=True)
        listener.bind(str(waiting))
        listener.listen(64)
        waiting.rename(address)  # there when it listens
        while _runs(owner):
            if not select.select([listener], [], [], 1.0)[0]:
                continue
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(connection)
            connection.close()
    for suffix in ("", ".lock", ".log"):
        Path(f"{address}{suffix}").unlink(missing_ok=True)


def _compile_once() -> None:
    """The first compilation of a process registers patterns and imports more for 2 to 3 s, which each fork would spend.

    Nothing else is left of it: no cached graph, no record and no thread.
    """
    import torch
    import torch._inductor.config
    import tqdm
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    import intscale_compile
    from intscale_compile.compile import times
    from intscale_compile.compile.recorder import compilation
    from intscale_compile.integrations import registry
    from intscale_compile.reasons import log_once

    interval, tqdm.tqdm.monitor_interval = tqdm.tqdm.monitor_interval, 0
    with (
        torch.random.fork_rng(),
        fresh_cache(),
        torch._inductor.config.patch(fallback_by_default=True),
        torch.no_grad(),
    ):
        layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)).eval()
        layer[0].weight = torch.nn.Parameter(
            intscale_compile.IntScaleTensor.from_hp(layer[0].weight), requires_grad=False
        )
        torch.compile(layer, backend="intscale")(torch.randn(4, 64))
    tqdm.tqdm.monitor_interval = interval
    torch._dynamo.reset()
    for records in (counters, times._times, compilation._compilations, registry._said):
        records.clear()
    log_once.cache_clear()
    assert len(os.listdir("/proc/self/task") if Path("/proc/self/task").is_dir() else [1]) == 1, "a fork has one thread"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _answer(connection: socket.socket) -> None:
    """Fork what was asked for and say its exit code; end it where nobody waits for that any more. Does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        request = json.loads(connection.makefile().readline())
        child = os.fork()
        if child == 0:
            connection.close()
            _become(**request)
        ended, status = 0, 0
        while not ended:
            if select.select([connection], [], [], 0.02)[0]:  # closed: nothing more is sent
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
                break
            ended, status = os.waitpid(child, os.WNOHANG)
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    except BrokenPipeError:
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _become(
    target: str, script: bool, arguments: list[str], cwd: str, environment: dict[str, str], folder: str
) -> None:
    """Run the module or script with these streams, as a Python that was started for it. Does not return."""
    code = 1
    try:
        os.setsid()
        for stream, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY | os.O_CREAT), (2, os.O_WRONLY | os.O_CREAT)):
            os.dup2(os.open(f"{folder}/{stream}", flags, 0o600), stream)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [target, *arguments]
        sys.path[0] = str(Path(target).parent) if script else cwd
        if script:
            runpy.run_path(target, run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0xFF)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
