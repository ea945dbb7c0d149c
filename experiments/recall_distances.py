"""Table of the distances that training sequences of recall text ask for.

    python experiments/recall_distances.py openstax.jsonl.zst --lengths 2048 8192 16384

A copy is a token that follows three tokens as it did before, 128 or more tokens back in the same document. Those three
tokens must be nowhere nearer, nor anywhere in the document with another token after them.
"""

import argparse
import tempfile
from collections import defaultdict
from itertools import pairwise

import numpy as np
from transformers import AutoTokenizer

from deltify.config import DataSpec
from deltify.conversion.teacher import locate
from deltify.data.batches import MixedBatches
from deltify.data.token_files import open_data

NEAREST, CONTEXT = 128, 3


def copies(ids: list[int]) -> list[tuple[int, int]]:
    """Return the places of copies in a document, and the places of what they repeat."""
    places, found = defaultdict(list), []
    for place in range(CONTEXT, len(ids)):
        earlier = places[tuple(ids[place - CONTEXT : place])]
        if earlier and place - earlier[-1] >= NEAREST and all(ids[other] == ids[place] for other in earlier):
            found.append((place, earlier[-1]))
        earlier.append(place)
    return found


def table_row(source: str, mix: MixedBatches, sequences: int) -> str:
    """Return a row of the table: copies per sequence, tokens that they repeat, and the percentage in each octave."""
    edges = [NEAREST * 2**octave for octave in range(8)]
    distances, repeated = [], []
    for index in range(sequences):
        ids, positions = mix.row(index)
        starts = [*np.flatnonzero(positions == 0).tolist(), len(ids)]
        pairs = [pair for start, end in pairwise(starts) for pair in copies(ids[start:end].tolist())]
        distances += [place - other for place, other in pairs]
        repeated.append(len({other for _, other in pairs}))
    counts, _ = np.histogram(distances, edges)
    cells = [f"{100 * count / len(distances):.1f}" for count, edge in zip(counts, edges) if edge < mix.length]
    cells += [""] * (len(counts) - len(cells))
    figures = [source, f"{mix.length:,}", f"{len(distances) / sequences:.0f}", f"{np.median(repeated):.0f}"]
    return f"| {' | '.join(figures + cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="source of the sentences")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 16384], help="tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=200_000, help="number of tokens to count copies in, for each row")
    parser.add_argument("--max-tokens", type=int, default=4_000_000, help="number of tokens made of each kind")
    parser.add_argument("--teacher", default="smollm2-135m-instruct", help="model whose tokenizer is used")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(locate(args.teacher))
    octaves = " | ".join(f"{start:,}-{2 * start:,}" for start in (NEAREST * 2**octave for octave in range(7)))
    print(f"| source | sequence | copies | repeated | {octaves} |\n{'|---' * 11}|")
    with tempfile.TemporaryDirectory() as folder:
        sources = {
            "text alone": args.text,
            "recall": f"recall:{args.text}",
            "sparse-recall": f"sparse-recall:{args.text}",
        }
        spec = DataSpec(dict.fromkeys(sources.values(), 1.0), args.text, folder, args.max_tokens)
        files, _ = open_data(spec, args.teacher, tokenizer, 2)
        for length in args.lengths:
            for source, file in zip(sources, files):
                print(table_row(source, MixedBatches([file], [1.0], length, 1, 0), max(1, args.tokens // length)))


if __name__ == "__main__":
    main()
