"""Read text, tokenize it into token files, and make batches of them."""

from .batches import Batch, MixedBatches, heldout_batches
from .sources import documents, pieces
from .token_files import TokenFile, open_data, open_tokens, tokenize, tokenize_split

__all__ = [
    "Batch",
    "MixedBatches",
    "TokenFile",
    "documents",
    "heldout_batches",
    "open_data",
    "open_tokens",
    "pieces",
    "tokenize",
    "tokenize_split",
]
