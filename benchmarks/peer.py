"""One run of the peer, llama.cpp through llama-cpp-python, on given token ids: prefill, then decode.

Runs in the peer's Python (README.md says how to make it) and calls llama.cpp's C interface, so that no sampling and no
Python per token stands between the clock and the engine. The ids of the answer are given, too: with random weights it
is the ids that decide which experts are used, and both engines shall do the same work. Prints one JSON object.

    PEER/bin/python benchmarks/peer.py peer.q4_0.gguf --prompt prompt.json --decode answer.json --load mapped
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp

from laps import Meter, peak_rss_bytes

# How weights get into memory: (load mode, whether they are rewritten for the processor's matrix instructions).
# The library's default repacks from the mapping; only weights used as they lie in the file can be evicted and read
# again.
LOADS = {
    "default": (llama_cpp.LLAMA_LOAD_MODE_AUTO, True),
    "repacked": (llama_cpp.LLAMA_LOAD_MODE_NONE, True),
    "mapped": (llama_cpp.LLAMA_LOAD_MODE_MMAP, False),
}


def main() -> None:
    """Parse the arguments, run, print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--prompt", type=Path, required=True, help="JSON list of token ids")
    parser.add_argument("--decode", type=Path, help="JSON list of token ids to feed one by one after the prompt")
    parser.add_argument("--warm-up", type=Path, help="JSON list of token ids to run and forget first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--load", choices=LOADS, default="default")
    parser.add_argument("--ubatch", type=int, default=512, help="prompt tokens computed together")
    parser.add_argument("--verbose", action="store_true", help="llama.cpp's own log on stderr")
    arguments = parser.parse_args()
    if not arguments.verbose:
        llama_cpp.llama_log_set(_ignore_log, ctypes.c_void_p(0))
    prompt, answer, warm_up = (
        json.loads(path.read_text()) if path else [] for path in (arguments.prompt, arguments.decode, arguments.warm_up)
    )
    json.dump(measure(arguments, prompt, answer, warm_up), sys.stdout)
    print()


def measure(
    arguments: argparse.Namespace, prompt: Sequence[int], answer: Sequence[int], warm_up: Sequence[int]
) -> dict[str, Any]:
    """Load the model and run it; the laps of loading, prefill and each decoded token."""
    meter = Meter()
    context = open_context(arguments, max_positions=max(len(prompt) + len(answer), len(warm_up)))
    load = meter.lap()
    if warm_up:
        feed(context, warm_up)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        meter.lap()
    feed(context, prompt)
    prefill, steps = meter.lap(), []
    for token_id in answer:
        feed(context, [token_id])
        steps.append(meter.lap())
    return {
        "load": load,
        "prompt_tokens": len(prompt),
        "prefill": prefill,
        "steps": steps,
        "peak_rss_bytes": peak_rss_bytes(),
        "system": llama_cpp.llama_print_system_info().decode(),
    }


def open_context(arguments: argparse.Namespace, max_positions: int) -> llama_cpp.llama_context_p:
    """Load the model and make a context for that many positions."""
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.load_mode, model_params.use_extra_bufts = LOADS[arguments.load]
    model = llama_cpp.llama_model_load_from_file(str(arguments.model).encode(), model_params)
    if not model:
        sys.exit(f"error: {arguments.model}: llama.cpp cannot load it: run again with --verbose")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch = max_positions, max(arguments.ubatch, 2048)
    params.n_ubatch, params.n_threads, params.n_threads_batch = arguments.ubatch, arguments.threads, arguments.threads
    params.n_outputs_max = 1  # scores of the last position only: room for a whole batch's would be 400 MB
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        sys.exit(f"error: {arguments.model}: no context of {max_positions} positions: run again with --verbose")
    return context


def feed(context: llama_cpp.llama_context_p, token_ids: Sequence[int]) -> None:
    """Run tokens after those before, in batches; returns when the scores of the last one are there."""
    batch_size = llama_cpp.llama_n_batch(context)
    for first in range(0, len(token_ids), batch_size):
        piece = token_ids[first : first + batch_size]
        tokens = (llama_cpp.llama_token * len(piece))(*piece)
        status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(piece)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
    llama_cpp.llama_synchronize(context)


@llama_cpp.llama_log_callback
def _ignore_log(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    pass


if __name__ == "__main__":
    main()
