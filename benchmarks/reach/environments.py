"""A virtual environment for each library, made once and kept; torch is the running interpreter's own."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Needs:
    """What is installed for some models: with what it needs in turn, or exactly what is listed."""

    packages: tuple[str, ...]
    alone: bool = False


# The yolo packages ask for opencv-python, which needs a display's libraries, and for much that no model uses.
YOLO = (
    "ultralytics==8.4.190 ultralytics-thop yolov5==7.0.14 yolov7-package==0.0.13 opencv-python-headless polars "
    "polars-runtime-32 matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil six psutil requests "
    "urllib3 certifi idna charset-normalizer scipy pandas pytz tzdata seaborn gitpython gitdb smmap"
)
ENVIRONMENTS = {
    "": Needs(()),
    "yolo": Needs(tuple(YOLO.split()), alone=True),
    "segmentation": Needs(("segmentation-models-pytorch==0.6.0",)),
    "transformers": Needs(("transformers==5.24.0",)),
    "peft": Needs(("peft==0.21.2",)),
    "einops": Needs(("einops==0.8.2",)),
}
# no model is ever downloaded, and no package installs another one while it is imported
OFFLINE = {"HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}


def python_of(name: str, folder: Path) -> str:
    """The interpreter that has what `name` of ENVIRONMENTS lists; installs it where it is not there yet.

    Raises:
        RuntimeError: pip cannot install it.
    """
    needs = ENVIRONMENTS[name]
    if not needs.packages:
        return sys.executable
    home = folder / name
    python, told = home / "bin" / "python", home / "installed.txt"
    wanted = "\n".join((version("torch"), sys.version, *needs.packages))
    if not told.exists() or told.read_text() != wanted:
        venv.create(home, with_pip=True, clear=True)
        _share_packages(home)
        _install(str(python), needs, home)
        told.write_text(wanted)
    return str(python)


def surroundings(threads: int, folder: Path) -> dict[str, str]:
    """Environment variables of a process that runs a model."""
    return os.environ | OFFLINE | {"OMP_NUM_THREADS": str(threads), "YOLO_CONFIG_DIR": str(folder)}


def _share_packages(home: Path) -> None:
    """Lets the environment import what the running interpreter has installed, after its own packages."""
    (own,) = home.glob("lib/python*/site-packages")
    shared = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (own / "shared_packages.pth").write_text("".join(p + "\n" for p in shared))


def _install(python: str, needs: Needs, home: Path) -> None:
    constraints = home / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version(name)}\n" for name in ("torch", "torchvision")))
    options: Sequence[str] = ("--no-deps",) if needs.alone else ()
    command = [python, "-m", "pip", "install", "-q", "-c", str(constraints), *options, *needs.packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip cannot install {', '.join(needs.packages)}: {done.stderr[-500:]}")
