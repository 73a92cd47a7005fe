"""llama.cpp's own server, as the package xllamacpp has it; runs in that package's environment.

python benchmarks/peer_llama.py MODEL.gguf PORT
"""

from __future__ import annotations

import argparse
import signal

import xllamacpp  # type: ignore[import-not-found]  # it has an environment of its own


def main() -> None:
    """Serve until a signal ends the process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("port", type=int)
    parser.add_argument("--batch-size", type=int)
    options = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path, params.port = options.model, options.port
    params.n_parallel, params.n_ctx = 12, 32768
    if options.batch_size:
        params.n_batch = options.batch_size
    server = xllamacpp.Server(params)
    print(f"serving at {server.listening_address}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
