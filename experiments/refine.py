"""Does on-policy distillation pay? A run goes on three ways, with as many tokens each, judged where it writes itself.

    python experiments/refine.py --text TEXT --start runs/kda --out runs/refine --tokens 4000000

`same`: the texts it was trained on. `own`: half of the rows are documents that the run wrote itself, from beginnings of
those texts. `own-js`: the same, by the Jensen-Shannon divergence. TEXT is a folder with train/ and eval/. Judged by:

- KL on held-out text, overall and by position, as in experiments/recipe.py;
- text that each model writes from beginnings of held-out text: KL(teacher | student) on it, and KL(student | teacher),
  which is how much likelier a model finds what it wrote than the teacher does, in nats a token;
- needles.

What is done is not done again. Needs a GPU; results go to experiments/results/refine.json.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from recipe import LENGTH, OURS, RECALL, open_models, summary, windows, with_recall
from result import SHARES, go_on, heldout, texts

from deltify.config import load_recipe
from deltify.data.sources import documents
from deltify.evaluation.needles import NeedleMaker, ask_needles, summarise
from deltify.evaluation.positions import by_position, token_scores
from deltify.inference.sample import sample
from deltify.utils.devices import device_name
from deltify.utils.files import make_once, write_text
from deltify.utils.tokens import token_ids

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results" / "refine.json"
ARMS: dict[str, tuple[float, str] | None] = {
    "start": None,
    "same": (0.0, "forward"),
    "own": (0.5, "forward"),
    "own-js": (0.5, "jensen-shannon"),
}
PASSAGE, PASSAGES = 2000, 256  # letters of a passage, and how many held-out ones begin a text
BEGINNING = 32  # tokens of it that a model is given
NEEDLES = ("niah_single_1", "niah_single_2", "niah_multikey_1")
LENGTHS, SAMPLES = (512, 1024, 2048, 4096), 16  # of needles


def beginnings(sources: list[str], path: Path, count: int) -> str:
    """A file whose documents are passages of the texts, in turn; made once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found: list[str] = []
        for source in sources:
            mine: list[str] = []
            for text in documents(source):
                mine += [text[a : a + PASSAGE] for a in range(0, len(text) - PASSAGE + 1, PASSAGE)]
                if len(mine) >= count // len(sources) + 1:
                    break
            found += mine[: count // len(sources) + 1]
        write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in found[:count]))
    return str(path)


def train(arm: str, options: argparse.Namespace) -> Path:
    """The folder of the run that an arm ends with."""
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
    return go_on(OURS, arm, options.start, weights, fields, options)


def write(model: str, source: str, folder: Path, count: int, batch: int) -> Path:
    """A folder of what a model writes, made once."""
    settings = {"count": count, "prompt_tokens": BEGINNING, "batch": batch}
    make_once(folder, lambda unfinished: sample(model, source, unfinished / "text.jsonl", **settings))
    return folder


@torch.no_grad()
def judge(arm: str, folder: Path, options: argparse.Namespace) -> dict:
    recipe = load_recipe(Path(options.start) / "recipe.yaml")
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, heldout=heldout(options)))
    teacher, student = open_models(recipe, folder)
    source = beginnings([heldout(options)], options.out / "heldout-beginnings.jsonl", PASSAGES)
    wrote = write(str(folder), source, options.out / f"{arm}-wrote", PASSAGES, PASSAGES)
    own = [torch.tensor(token_ids(teacher.tokenizer, text)) for text in documents(str(wrote))]
    scores = [token_scores({"student": student}, teacher.model, ids[:512]) for ids in own if len(ids) > 2 * BEGINNING]
    written = {  # behind the beginning, which is not the model's
        name: np.concatenate([found[model][column][BEGINNING - 1 :] for found in scores])
        for name, (model, column) in {"loss": ("student", 0), "teacher": ("teacher", 0), "kl": ("student", 1)}.items()
    }
    make = NeedleMaker(teacher.tokenizer, str(options.text / "eval" / "heldout_books.jsonl"))
    path = options.out / "needles.jsonl"
    rows = ask_needles(student, make, path, name=arm, tasks=NEEDLES, lengths=LENGTHS, samples=SAMPLES)
    found: dict[str, dict] = {}
    for row in summarise(rows):
        found.setdefault(row["task"], {})[row["length"]] = row["score"]
    stretches = windows(recipe, teacher.tokenizer)
    held = by_position({"student": student}, teacher.model, stretches, max_tokens=LENGTH)
    return {
        "arm": arm, **setting(options),
        "kl": summary(held, "student"), "kl_on_own_text": float(written["kl"].mean()),
        "reverse_kl_on_own_text": float((written["teacher"] - written["loss"]).mean()),
        "own_tokens": len(written["kl"]), "needles": found,
        "device": device_name(student.device), "torch": torch.__version__,
    }  # fmt: skip


def setting(options: argparse.Namespace) -> dict:
    return {
        "start": Path(options.start).name,
        **{name: getattr(options, name) for name in ("tokens", "lr", "documents", "seed")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", help=f"of {', '.join(ARMS)}; all if absent")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--start", required=True, help="folder of a run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--lr", type=float, default=3e-4, help="of mixers; .3 of it for the rest")
    parser.add_argument("--documents", type=int, default=8192, help="that the run writes, of 512 tokens at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beginnings", help="a text whose documents begin them; passages of TEXT/train if absent")
    parser.add_argument("--batch", type=int, default=512, help="documents that are written at a time")
    parser.add_argument("--data", default="runs/data", help="folder of token files")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if unknown := [arm for arm in options.arms if arm not in ARMS]:
        parser.error(f"unknown arms {unknown}; known are {', '.join(ARMS)}")
    results = json.loads(options.results.read_text()) if options.results.exists() else []
    options.out /= "-".join(map(str, setting(options).values()))
    for arm in options.arms or ARMS:
        if any(r.items() >= ({"arm": arm} | setting(options)).items() for r in results):
            print(f"{arm}: in {options.results} already")
            continue
        results.append(judge(arm, train(arm, options), options))
        options.results.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(results[-1]), flush=True)


if __name__ == "__main__":
    main()
