"""Evaluation of models side by side, all with the same text, prompts and device.

    deltify.evaluate("runs/kda")

All measures go into one results.json, which is written anew after each of them. A second evaluation of the same models
keeps the measures that it does not repeat. Answers of models are kept in files next to it, and are reused.
`deltify.report` makes pages of results.json.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Recipe, load_recipe
from ..conversion.teacher import Teacher, load_teacher
from ..data.sources import documents, text_files
from ..data.token_files import file_name, origin_of
from ..inference.generate import GREEDY
from ..inference.loading import load_model, load_tokenizer
from ..model.causal_lm import CausalLM
from ..training.distributed import LONG_WAIT, check_same, from_first, process_group, rank, share_out, sole_writer
from ..training.history import trained_model
from ..training.run_folder import check_weights
from ..training.teachers import open_teacher
from ..utils.console import log, with_progress
from ..utils.devices import pick_device
from ..utils.files import digest
from ..utils.fingerprint import fingerprint
from ..utils.folders import model_folder, saved_stages
from ..utils.tokens import TOKENIZER_PROBE, token_ids
from .benchmarks import compare_with_teacher, run_benchmarks
from .controls import make_controls
from .decode_cost import check_contexts, decode_cost
from .heldout import heldout_scores
from .lm_eval_tasks import check_benchmark
from .needles import NeedleMaker, ask_needles, summarise, task_of
from .positions import by_position
from .recall_curve import measure_recall, recall_probes
from .results_file import Results
from .settings import BenchmarkSpec, DecodeSpec, EvaluationSpec, NeedleSpec, PositionSpec, RecallSpec

PROMPTS = ("The capital of France is", "To open a file in Python, you", "Once upon a time, there was a")
PROMPT_TOKENS = 32  # tokens of a greedy continuation
LAYER_NAMES = {
    "linear_attention": "KDA",
    "full_attention": "full attention",
    "sliding_attention": "sliding attention",
}


def evaluate(
    sources: str | Path | Sequence[str | Path],
    spec: EvaluationSpec | None = None,
    *,
    output: str | Path | None = None,
) -> Path:
    """Measure students beside their teacher and controls, and return the path of results.json.

    Without a spec, models are scored on held-out text. More measures are fields of the spec:

        spec = EvaluationSpec(
            benchmarks=BenchmarkSpec(("hellaswag", "arc_easy"), limit=500),
            needles=NeedleSpec(("niah_single_1",), lengths=(1024, 4096)),
        )
        deltify.evaluate("runs/kda", spec)
        deltify.evaluate(["runs/kda", "runs/hybrid"], spec, output="runs/both")

    Processes under torchrun share the work. The first one writes the files, which are those of a single process.

    Args:
        sources: One or several runs (folders with a recipe) or models (folders or hub ids). Every stage of a single
            run is scored on held-out text. All other measures, and several runs, use the last stage.
        spec: Measures, device and precision.
        output: Folder for the results. Defaults to the run's own folder, if there is one run and nothing else.

    Raises:
        ValueError: If sources do not fit together, an argument of a measure is wrong, or another evaluation writes to
            the same folder.
    """
    names = [str(source) for source in ([sources] if isinstance(sources, str | Path) else sources)]
    spec = spec or EvaluationSpec()
    runs = {path: load_recipe(recipe) for path in names if (recipe := Path(path) / "recipe.yaml").is_file()}
    if output is None and len(names) > 1:
        raise ValueError(f"there are {len(names)} sources. Name a folder for the results with --output")
    if output is None and not runs:
        raise ValueError(
            f"{names[0]} has no recipe.yaml, so it is no run. Check the path. To evaluate a model that is no run, name "
            "a folder for the results with --output"
        )
    if not runs and spec.heldout is not None:
        raise ValueError("--heldout needs a run among the sources, whose teacher and lengths it takes")
    if not runs and spec.positions and spec.teacher is None:
        raise ValueError("--books needs a teacher, as no source is a run. Name it with --teacher")
    if spec.benchmarks:  # before other measures take their time
        for task in spec.benchmarks.tasks:
            check_benchmark(task, spec.benchmarks.folder)
    if spec.needles:
        check_needles(spec.needles)
    if spec.decode:
        check_contexts(spec.decode.contexts)
    folder = Path(output) if output else Path(names[0])
    refusal = (
        f"Another evaluation writes to {folder}. Wait for it, or name another folder with --output. To use several "
        "GPUs, start one evaluation with torchrun."
    )
    alone = sole_writer(folder / ".evaluation.lock", refusal)
    with process_group(pick_device(spec.device), timeout=LONG_WAIT) as device, alone:
        evaluation = Evaluation(names, runs, spec, folder, device)
        evaluation.heldout()
        evaluation.choose_models()
        if spec.samples:
            evaluation.samples()
        if spec.benchmarks:
            evaluation.benchmarks(spec.benchmarks)
        if spec.needles:
            evaluation.needles(spec.needles)
        if spec.recall:
            evaluation.recall(spec.recall)
        if spec.positions:
            evaluation.positions(spec.positions)
        if spec.decode:
            evaluation.decoding(spec.decode)
    return evaluation.results.path


class Evaluation:
    """The models of one evaluation and the results so far. Each method adds one measure to results.json."""

    def __init__(
        self, sources: list[str], runs: dict[str, Recipe], spec: EvaluationSpec, folder: Path, device: torch.device
    ):
        self.spec, self.runs, self.folder = spec, runs, folder
        dtype = pick_dtype(spec.dtype, device)
        self.teacher = open_reference(spec.teacher, list(runs.values()), device, dtype)
        folders = model_folders(sources, runs, all_stages=spec.stages and len(sources) == 1)
        if len({file_name(name) for name in folders}) < len(folders):
            raise ValueError(f"The models {', '.join(folders)} would share a folder of answers. Rename a folder.")
        self.trained = {name: trained_model(path) for name, (path, _) in folders.items()}
        teacher = spec.teacher or next((recipe.teacher.model for recipe in runs.values()), None)
        length = max(trained.length for trained in self.trained.values())
        self.scored = {name: load_model(path, device=device, dtype=dtype) for name, (path, _) in folders.items()}
        self.students = {name: self.scored[name] for name, (_, is_final) in folders.items() if is_final}
        all_models = [*([self.teacher.model] if self.teacher else []), *self.scored.values()]
        check_same("models", lambda: [fingerprint(model) for model in all_models])
        self.tokenizer = self.teacher.tokenizer if self.teacher else load_tokenizer(sources[0])
        check_tokenizers(self.tokenizer, "the teacher" if self.teacher else sources[0], folders)
        teacher_model: dict[str, CausalLM] = {"teacher": self.teacher.model} if self.teacher else {}
        self.teacher_and_students = teacher_model | self.students
        weights = {name: fingerprint(model) for name, model in self.teacher_and_students.items()}
        self.results = Results(folder / "results.json", teacher, list(runs), length, weights, device, dtype)
        self.models: dict[str, PreTrainedModel] = {}  # teacher, students, controls: if time ends, the last are missing

    def heldout(self) -> None:
        """Score every model on the held-out text of the first run. Without a run there is none.

        Earlier scores on other text, which --heldout named, are kept.
        """
        source, earlier = self.spec.heldout, self.results.earlier.get("heldout_source")
        if source is None and earlier is not None:
            log(f"held-out text: the scores on {earlier} are kept. To replace them, give --heldout")
        elif self.teacher is not None and self.runs:
            scores = heldout_scores(self.teacher, self.runs, self.scored, self.trained, source)
            self.results.add(heldout_source=None if source is None else str(source), **scores)

    def choose_models(self) -> None:
        """Add controls to teacher and students, and write what the students are."""
        controls: dict[str, PreTrainedModel] = {}
        if self.teacher is not None and self.spec.controls:
            last = list(self.students)[-1]
            made = make_controls(self.teacher, self.students[last])
            controls = {name.replace("student", last): model for name, model in made.items()}
        self.models = self.teacher_and_students | controls
        self.results.add(students=[describe(name, m, self.trained[name].tokens) for name, m in self.students.items()])

    def keep_settings(self, measure: str, source: str | Path, **numbers: int) -> None:
        """Keep what a measure takes, to be written with its rows, so that measures of different texts are not mixed."""
        values = {"source": origin_of(str(source))["source"], "text": text_digest(str(source)), **numbers}
        self.results.content["settings"] = self.results.content.get("settings", {}) | {measure: values}

    def samples(self) -> None:
        """Keep greedy continuations of fixed prompts."""
        texts = {name: greedy_samples(self.tokenizer, model) for name, model in self.teacher_and_students.items()}
        self.results.add(samples=texts)

    def benchmarks(self, spec: BenchmarkSpec) -> None:
        """Run benchmarks, and compare each model with the teacher item by item."""
        rows: list[dict] = []
        items = self.folder / "items"
        for name, model in self.models.items():
            new = run_benchmarks(
                model,
                self.tokenizer,
                spec.tasks,
                items_folder=items / file_name(name),
                data=spec.folder,
                limit=spec.limit,
                log=lambda line, name=name: log(f"{name}: {line}"),
            )
            rows += [{"model": name, **row} for row in new]
            # the other processes may not see the first one's files
            self.results.add(benchmarks=compare_with_teacher(rows, items) if rank() == 0 else rows)

    def needles(self, spec: NeedleSpec) -> None:
        """Run needle tasks on every model."""
        self.keep_settings("needles", spec.haystack)
        maker, rows = NeedleMaker(self.tokenizer, str(spec.haystack)), []
        for name, model in self.models.items():
            rows += ask_needles(
                model,
                maker,
                self.folder / "needles.jsonl",
                name=name,
                tasks=spec.tasks,
                lengths=spec.lengths,
                samples=spec.samples,
                log=log,
            )
            self.results.add(needles=summarise(rows), needle_rows=rows)

    def recall(self, spec: RecallSpec) -> None:
        """Measure the recall curve of every model."""
        self.keep_settings("recall", spec.haystack, tokens=spec.max_tokens, samples=spec.samples)
        probes, rows = recall_probes(self.tokenizer, spec), []
        for name, model in self.models.items():
            rows += measure_recall(model, probes, self.folder / "recall.jsonl", name=name, log=log)
            self.results.add(recall=rows)

    def positions(self, spec: PositionSpec) -> None:
        """Measure perplexity and KL by position. Without a teacher this does nothing."""
        if self.teacher is None:
            return
        self.keep_settings("positions", spec.source, tokens=spec.max_tokens, books=spec.documents)
        others = {name: model for name, model in self.models.items() if name != "teacher"}
        texts = longest_documents(str(spec.source), spec.documents, self.tokenizer)
        rows = by_position(others, self.teacher.model, texts, max_tokens=spec.max_tokens, log=log)
        self.results.add(positions=rows)

    def decoding(self, spec: DecodeSpec) -> None:
        """Measure memory and time of decoding on the first process, while the others wait. Controls are left out."""
        self.results.add(decode=from_first(lambda: decode_cost(self.teacher_and_students, spec.contexts, log=log)))


def describe(name: str, model: PreTrainedModel, tokens: int) -> dict:
    """Return a student's layers, parameters and training tokens, for the head of its report."""
    counts = Counter(getattr(model.config, "layer_types", None) or ())
    return {
        "name": name,
        "layers": ", ".join(
            f"{count} layer{'s' * (count > 1)} of {LAYER_NAMES.get(kind, kind)}" for kind, count in counts.items()
        ),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens,
    }


def check_tokenizers(tokenizer: PreTrainedTokenizerBase, owner: str, folders: Mapping[str, tuple[str, bool]]) -> None:
    """Raise ValueError if a model has another tokenizer than the one that all of them are read with."""
    vocabulary, ids = tokenizer.get_vocab(), token_ids(tokenizer, TOKENIZER_PROBE)
    for name, (folder, _) in folders.items():
        other = load_tokenizer(folder)
        if other.get_vocab() != vocabulary or token_ids(other, TOKENIZER_PROBE) != ids:
            raise ValueError(f"{name} ({folder}) has another tokenizer than {owner}. Evaluate them separately.")


def check_needles(spec: NeedleSpec) -> None:
    """Raise ValueError if a needle task is unknown, or a number is too small."""
    for task in spec.tasks:
        task_of(task)
    if not spec.lengths or min(spec.lengths) < 1:
        raise ValueError(f"--lengths {','.join(map(str, spec.lengths))}: name numbers of tokens of at least 1")
    if spec.samples < 1:
        raise ValueError(f"--needle-samples {spec.samples} must be at least 1")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of this name, or for auto the usual one of the device.

    Raises:
        ValueError: If the name is unknown.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    known["auto"] = torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in known:
        raise ValueError(f"--dtype {name!r} is unknown. Choose one of {sorted(known)}.")
    return known[name]


def open_reference(
    source: str | Path | None, recipes: list[Recipe], device: torch.device, dtype: torch.dtype
) -> Teacher | None:
    """Open the named teacher, or the one that all runs share.

    Raises:
        ValueError: If the runs have different teachers, or the teacher's weights changed since the run.
    """
    if source is not None:
        return load_teacher(source, dtype=dtype, device=device)
    if len(names := {recipe.teacher.model for recipe in recipes}) > 1:
        raise ValueError(f"The runs have different teachers, {', '.join(sorted(names))}. Evaluate them separately.")
    if not recipes:
        return None
    teacher = open_teacher(recipes[0], device, dtype)
    if dtype != torch.float16:  # float16 weights have a fingerprint of their own
        weights = fingerprint(teacher.model)
        for recipe in recipes:
            check_weights(recipe, weights, f"the teacher {recipe.teacher.model}")
    return teacher


def model_folders(sources: list[str], runs: dict[str, Recipe], *, all_stages: bool) -> dict[str, tuple[str, bool]]:
    """Return the students by name: each one's folder or hub id, and whether it is a final one.

    A run's last stage is final, and so is a model that is no run.

    Args:
        all_stages: Whether to take all stages of a run under their own names, instead of the last under the run's name.

    Raises:
        ValueError: If two models would have one name.
    """
    found: dict[str, tuple[str, bool]] = {}
    for source in sources:
        folders = {Path(source).name or Path(source).resolve().name: model_folder(source)}
        if source in runs and all_stages:
            folders = {name: str(Path(source) / name) for name in saved_stages(Path(source))}
        for name, folder in folders.items():
            if name in found or name == "teacher":
                raise ValueError(f"Two models would be called {name!r}. Rename the folder {source}.")
            found[name] = folder, name == list(folders)[-1]
    return found


def text_digest(source: str) -> str | None:
    """Return a hash of the files of a source, or None if its text is not in files."""
    if not (path := Path(source).expanduser()).exists():
        return None
    return hashlib.sha256("".join(map(digest, text_files(str(path)))).encode()).hexdigest()[:16]


def longest_documents(source: str, count: int, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the token ids of the `count` longest of a source's first documents."""
    texts = sorted(itertools.islice(documents(source), 20 * count), key=len, reverse=True)
    return [token_ids(tokenizer, text) for text in texts[:count]]


@torch.no_grad()
def greedy_samples(tokenizer: PreTrainedTokenizerBase, model: CausalLM) -> list[str]:
    """Return greedy continuations of a few fixed prompts."""

    def go_on(prompt: str) -> str:
        ids = torch.tensor([token_ids(tokenizer, prompt)], device=model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=PROMPT_TOKENS, **GREEDY)
        return str(tokenizer.decode(out[0], skip_special_tokens=True))

    return [text for _, text in with_progress(share_out(PROMPTS, go_on), "samples", len(PROMPTS))]
