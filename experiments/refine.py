"""On-policy distillation: a run continues in three ways with equal tokens, and is measured on its own text.

    python experiments/refine.py --text TEXT --start runs/kda --out runs/refine --tokens 4000000

TEXT is a folder with train/ and eval/. The ways are called arms:

- `start`: The run itself.
- `same`: The texts that the run was trained on.
- `own`: Half of the tokens are documents that the run writes itself, from beginnings of those texts.
- `own-js`: Like `own`, with the Jensen-Shannon divergence.

Measures are:

- KL on held-out text, overall and by position, as in experiments/recipe.py.
- KL(teacher | student) and KL(student | teacher) in nats per token, on text that each model writes from beginnings of
  held-out text. The second is the difference of the model's and the teacher's log-probabilities of it.
- Needles.

Arms with a result in experiments/results/refine.json are skipped. Needs a GPU.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from recipe import LENGTH, OURS, RECALL, open_models, summary, windows, with_recall
from result import SHARES, continue_run, heldout, texts

from deltify.config import load_recipe
from deltify.data.sources import documents
from deltify.evaluation.needles import NeedleMaker, ask_needles, summarise
from deltify.evaluation.positions import by_position, token_scores
from deltify.inference.sample import sample
from deltify.utils.devices import device_name
from deltify.utils.files import create_once, write_text
from deltify.utils.tokens import token_ids

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results" / "refine.json"
ARMS: dict[str, tuple[float, str] | None] = {
    "start": None,
    "same": (0.0, "forward"),
    "own": (0.5, "forward"),
    "own-js": (0.5, "jensen-shannon"),
}
PASSAGE, PASSAGES = 2000, 256  # characters of a passage, and number of held-out passages
BEGINNING = 32  # tokens of a passage that a model continues
NEEDLES = ("niah_single_1", "niah_single_2", "niah_multikey_1")
LENGTHS, SAMPLES = (512, 1024, 2048, 4096), 16  # of needles


def beginnings(sources: list[str], path: Path, count: int) -> str:
    """Return a file whose documents are passages of the texts. It is made once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        passages: list[str] = []
        of_each = count // len(sources) + 1
        for source in sources:
            of_source: list[str] = []
            for text in documents(source):
                of_source += [text[a : a + PASSAGE] for a in range(0, len(text) - PASSAGE + 1, PASSAGE)]
                if len(of_source) >= of_each:
                    break
            passages += of_source[:of_each]
        write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in passages[:count]))
    return str(path)


def train(arm: str, options: argparse.Namespace) -> Path:
    """Train an arm and return the folder of its run."""
    if ARMS[arm] is None:
        return Path(options.start)
    share, divergence = ARMS[arm]
    weights = with_recall(dict(zip(texts(options), SHARES)), RECALL["recall-quarter"])
    if share:
        source = options.beginnings or beginnings(texts(options), options.out / "beginnings.jsonl", options.documents)
        own = write(options.start, source, options.out / "own-text", options.documents, options.batch)
        weights = {text: weight * (1 - share) for text, weight in weights.items()} | {str(own): share}
    fields = {
        "run.eval_every": 1_000_000, "seed": options.seed, "extend.tokens": 0, "match.tokens": options.tokens,
        "match.divergence": divergence, "match.lr_mixers": options.lr, "match.lr_other": 0.3 * options.lr,
    }  # fmt: skip
    return continue_run(OURS, arm, options.start, weights, fields, options)


def write(model: str, source: str, folder: Path, count: int, batch: int) -> Path:
    """Return a folder with text that a model writes. It is made once."""
    settings = {"count": count, "prompt_tokens": BEGINNING, "batch": batch}
    create_once(folder, lambda unfinished: sample(model, source, unfinished / "text.jsonl", **settings))
    return folder


@torch.no_grad()
def measure(arm: str, folder: Path, options: argparse.Namespace) -> dict:
    """Measure the run of an arm and return its result."""
    recipe = load_recipe(Path(options.start) / "recipe.yaml")
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, heldout=heldout(options)))
    teacher, student = open_models(recipe, folder)
    source = beginnings([heldout(options)], options.out / "heldout-beginnings.jsonl", PASSAGES)
    wrote = write(str(folder), source, options.out / f"{arm}-wrote", PASSAGES, PASSAGES)
    own = [torch.tensor(token_ids(teacher.tokenizer, text)) for text in documents(str(wrote))]
    scores = [token_scores({"student": student}, teacher.model, ids[:512]) for ids in own if len(ids) > 2 * BEGINNING]
    written = {  # after the beginning, which the model did not write
        name: np.concatenate([of_text[model][column][BEGINNING - 1 :] for of_text in scores])
        for name, (model, column) in {"loss": ("student", 0), "teacher": ("teacher", 0), "kl": ("student", 1)}.items()
    }
    make = NeedleMaker(teacher.tokenizer, str(options.text / "eval" / "heldout_books.jsonl"))
    path = options.out / "needles.jsonl"
    rows = ask_needles(student, make, path, name=arm, tasks=NEEDLES, lengths=LENGTHS, samples=SAMPLES)
    needles: dict[str, dict] = {}
    for row in summarise(rows):
        needles.setdefault(row["task"], {})[row["length"]] = row["score"]
    held = by_position({"student": student}, teacher.model, windows(recipe, teacher.tokenizer), max_tokens=LENGTH)
    return {
        "arm": arm, **setting(options),
        "kl": summary(held, "student"), "kl_on_own_text": float(written["kl"].mean()),
        "reverse_kl_on_own_text": float((written["teacher"] - written["loss"]).mean()),
        "own_tokens": len(written["kl"]), "needles": needles,
        "device": device_name(student.device), "torch": torch.__version__,
    }  # fmt: skip


def setting(options: argparse.Namespace) -> dict:
    """Return the options that results are told apart by."""
    return {
        "start": Path(options.start).name,
        **{name: getattr(options, name) for name in ("tokens", "lr", "documents", "seed")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", help=f"arms to run: {', '.join(ARMS)} (default: all)")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--start", required=True, help="folder of the run that arms continue")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate of mixers, 0.3 of it for others")
    parser.add_argument("--documents", type=int, default=8192, help="number of documents that the run writes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beginnings", help="text whose documents begin them (default: passages of TEXT/train)")
    parser.add_argument("--batch", type=int, default=512, help="number of documents written at a time")
    parser.add_argument("--data", default="runs/data", help="folder of token files")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if unknown := [arm for arm in options.arms if arm not in ARMS]:
        parser.error(f"unknown arms {unknown}; known are {', '.join(ARMS)}")
    results = json.loads(options.results.read_text()) if options.results.exists() else []
    options.out /= "-".join(map(str, setting(options).values()))
    for arm in options.arms or ARMS:
        if any(r.items() >= ({"arm": arm} | setting(options)).items() for r in results):
            print(f"{arm}: {options.results} has a result")
            continue
        results.append(measure(arm, train(arm, options), options))
        options.results.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(results[-1]), flush=True)


if __name__ == "__main__":
    main()
