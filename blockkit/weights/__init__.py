"""Checkpoints on disk: Hugging Face folders, GGUF files and tokenizers."""

from blockkit.weights.cache import resolve_model
from blockkit.weights.folder import CheckpointFolder, open_folder, write_folder
from blockkit.weights.gguf_file import convert_gguf
from blockkit.weights.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "CheckpointFolder",
    "Tokenizer",
    "convert_gguf",
    "load_tokenizer",
    "open_folder",
    "resolve_model",
    "write_folder",
]
