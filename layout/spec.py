"""The constants of format version 1. FORMAT.md gives each its meaning; nothing here is computed."""

MAGIC = "moepack"
FORMAT_VERSION = 1

MANIFEST_NAME = "manifest.json"
RESIDENT_NAME = "resident.safetensors"
EXPERTS_FOLDER = "experts"
PARTIAL_SUFFIX = ".partial"

PAGE_SIZE = 16384  # a constant of the format (the largest page of the machines in view), not this machine's page
SECTION_ALIGNMENT = 64  # sections of a block start on cache lines, so that vector loads and GPU bindings are aligned

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")  # the order of the matrices in a block
QUANTIZED_BITS = (2, 3, 4, 8)
UNQUANTIZED_BITS = 16  # bf16 as it is
GROUP_SIZES = (32, 64, 128)
DTYPE_BYTES = {  # safetensors' names for element types
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}

# What a reader accepts before it allocates anything. Far above any model in view, far below what hurts.
MAX_MANIFEST_BYTES = 32 * 2**20
MAX_JSON_DEPTH = 64
MAX_LAYERS = 4096
MAX_EXPERTS = 65536
MAX_DIMENSION = 2**24
MAX_FILE_BYTES = 2**50
MAX_TENSOR_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
MAX_TENSOR_DIMENSIONS = 8
MAX_TENSOR_NAME = 512


def expert_file_name(layer: int, num_hidden_layers: int) -> str:
    """Path inside a pack of one layer's experts; layers from num_hidden_layers on belong to the MTP head."""
    if layer < num_hidden_layers:
        return f"{EXPERTS_FOLDER}/layer_{layer:02d}.bin"
    return f"{EXPERTS_FOLDER}/mtp_{layer - num_hidden_layers:02d}.bin"
