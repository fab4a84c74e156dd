"""The same weights for the peer: a checkpoint as a GGUF at Q4_0, made by llama.cpp's own converter and quantizer.

Runs in the peer's Python (README.md says how to make it). Every matrix that Q4_0 can hold is Q4_0, the head too: the
usual mixture keeps the head at 6 bits, which is more to read per token and no like for like. The converter knows
tokenizers by a hash and refuses others; ours is a Qwen3.5 one with another vocabulary, so it is told so.

    PEER/bin/python benchmarks/make_gguf.py CHECKPOINT OUT.gguf --converter llama_cpp_python-0.3.36/vendor/llama.cpp
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import runpy
import sys
from pathlib import Path

import llama_cpp

PRE_TOKENIZER = "qwen35"  # llama.cpp's name of Qwen3.5's splitting rule


def main() -> None:
    """Parse the arguments, convert to bf16, quantize, remove the bf16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--converter", type=Path, required=True, help="llama.cpp's sources, as in the package's sdist")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    script = arguments.converter / "convert_hf_to_gguf.py"
    if not script.exists():
        parser.error(f"--converter {arguments.converter}: expected convert_hf_to_gguf.py in it, found none")
    unquantized, unfinished = (arguments.out.with_suffix(end) for end in (".bf16.gguf", ".partial.gguf"))
    try:
        convert(script, arguments.checkpoint, unquantized)
        quantize(unquantized, unfinished, arguments.threads)
    finally:
        unquantized.unlink(missing_ok=True)
    unfinished.rename(arguments.out)


def convert(script: Path, checkpoint: Path, out: Path) -> None:
    """Run the converter in this process, with the pre-tokenizer named instead of looked up."""
    sys.path.insert(0, str(script.parent))
    sys.path.insert(1, str(script.parent / "gguf-py"))
    importlib.import_module("conversion.base").TextModel.get_vocab_base_pre = lambda model, tokenizer: PRE_TOKENIZER
    sys.argv = [script.name, str(checkpoint), "--no-mtp", "--outtype", "bf16", "--outfile", str(out)]
    runpy.run_path(str(script), run_name="__main__")


def quantize(source: Path, out: Path, threads: int) -> None:
    """Quantize a GGUF to Q4_0 throughout. Raises RuntimeError if llama.cpp says that it failed."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = threads, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    if status:
        raise RuntimeError(f"{source}: llama_model_quantize returned {status}")


if __name__ == "__main__":
    main()
