"""Write what a checkpoint needs beside its weights: configs, tokenizer files and the chat template.

    python export.py tokenizer.json CKPT

Writes config.json, generation_config.json, chat_template.jinja, tokenizer.json and tokenizer_config.json. The
weights are train.py's; the model card is written by hand. No vision parts are described: the checkpoint has
none.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from chat_format import template_text
from config import CONTEXT_TOKENS, Config

_TOKEN_FIELDS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def generation_config(token_ids: dict[str, int]) -> dict[str, Any]:
    """Return generation_config.json: how the model is best sampled."""
    end, message_end = token_ids["<|endoftext|>"], token_ids["<|im_end|>"]
    return {
        "bos_token_id": end,
        "pad_token_id": end,
        "eos_token_id": [message_end, end],
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
    }


def tokenizer_config(added_tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """Return tokenizer_config.json for the added tokens of a tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_TOKENS,
        "split_special_tokens": False,
        "errors": "replace",
        "added_tokens_decoder": {
            str(token["id"]): {field: token[field] for field in _TOKEN_FIELDS} for token in added_tokens
        },
    }


def export(tokenizer_file: Path, checkpoint: Path) -> None:
    """Write the five files to a checkpoint folder."""
    added_tokens = json.loads(tokenizer_file.read_text(encoding="utf-8"))["added_tokens"]
    token_ids = {token["content"]: token["id"] for token in added_tokens}
    files = {
        "config.json": Config().hub_config(token_ids),
        "generation_config.json": generation_config(token_ids),
        "tokenizer_config.json": tokenizer_config(added_tokens),
    }
    for name, content in files.items():
        (checkpoint / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    (checkpoint / "chat_template.jinja").write_text(template_text(), encoding="utf-8")
    shutil.copyfile(tokenizer_file, checkpoint / "tokenizer.json")


def main() -> None:
    """Export to one checkpoint folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path, help="tokenizer.json")
    parser.add_argument("checkpoint", type=Path, help="folder with the weights")
    args = parser.parse_args()
    export(args.tokenizer, args.checkpoint)


if __name__ == "__main__":
    main()
