"""What figures were measured on, and of which source. In: the machine. Out: :class:`Machine`.

Called by :mod:`benchmark.__main__`, which writes it beside every figure.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[1]
# What a figure depends on; the report and what it is made of do not matter.
SOURCES = (
    "crates",
    "python/flex_block_attn",
    ":(glob)benchmark/*.py",
    "Cargo.toml",
    "Cargo.lock",
)


@dataclass(frozen=True)
class Machine:
    """The last four columns of a row."""

    device: str
    # Of a GPU, its version; of a CPU, the instructions that torch uses, and threads.
    driver: str
    torch: str
    commit: str

    @property
    def folder(self) -> str:
        """The device's name as that of a folder: of a GPU without who made it, and its memory."""
        name = self.device.lower()
        if name.startswith("nvidia "):
            name = re.sub(r"\b(nvidia|[0-9]+gb|hbm[0-9]\w*)\b", "", name)
        return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def describe(device: torch.device, commit: str | None) -> Machine:
    """This machine; the commit is asked of git if it is not given."""
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(), _gpu_driver()
    else:
        name = _cpu_name()
        driver = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return Machine(name, driver, torch.__version__, commit or _commit())


def _gpu_driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return _output(query).splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        pass
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else "unknown"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    except OSError:
        found = None
    cores = len(re.findall(r"^processor\s*:", text, flags=re.MULTILINE)) if found else 0
    return f"{found[1].strip()}, {cores} cores" if found else "CPU"


def _commit() -> str:
    """Ten digits of the last one that changed what figures depend on; with a plus behind if that
    has changed since."""
    try:
        commit = _output(["git", "log", "-1", "--format=%H", "--", *SOURCES]).strip()[:10]
        changed = _output(["git", "status", "--porcelain", "--", *SOURCES]).strip()
    except (OSError, subprocess.CalledProcessError):
        commit, changed = "", ""
    if not commit:
        raise ValueError(
            "git does not say which commit this is: name it by --commit, so that results can be "
            "told from those of other commits"
        )
    return commit + "+" * bool(changed)


def _output(command: list[str]) -> str:
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
