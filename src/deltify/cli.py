"""`deltify`: the package's functions as sub-commands."""

import argparse
import sys
from pathlib import Path

from .training.signals import Stopped

DESCRIPTION = """\
Turn a pretrained transformer into a Kimi Delta Attention (KDA) language model by distillation.

  deltify distill recipes/smollm2-135m-demo.yaml     convert the teacher, train the student, stage by stage
  deltify evaluate runs/smollm2-135m-demo            teacher and every stage, side by side
  deltify report runs/smollm2-135m-demo              tables, pictures, report.html, and a model card
  deltify generate runs/smollm2-135m-demo "Once"     text from the student
  deltify sample runs/smollm2-135m-demo TEXT -o a.jsonl   its own text, to train on
  deltify convert recipes/smollm2-135m-demo.yaml     the conversion alone, without training
  deltify plan recipes/afm-4.5b-kda.yaml             memory, hours and disk of a recipe, before anything is loaded

Each sub-command explains itself: deltify distill --help
"""

RECIPE_HELP = """\
Any field of the recipe can be given here too: --match.tokens 1000000 --data.train '{"book.txt": 1.0}'.
All fields:
"""


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options, extra = parser.parse_known_args(arguments)
    if extra and options.command not in ("distill", "convert", "plan", "capture"):
        parser.error(f"{options.command} does not know {' '.join(extra)}")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        COMMANDS[options.command](options, extra)
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print(f"deltify: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"deltify: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("deltify: stopped; what was saved can be taken up with --resume", file=sys.stderr)
        return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("deltify", description=DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_recipe_command(name: str, what: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what, formatter_class=raw, epilog=fields)
        command.add_argument("recipe", help="YAML file")
        return command

    fields = recipe_fields()
    distill = add_recipe_command("distill", "run a recipe: convert, align, match, extend")
    distill.add_argument("--resume", action="store_true", help="go on with the folder's run; learning rates may change")
    distill.add_argument("--smoke", action="store_true", help="two steps a stage on a tiny random model, on the CPU")
    distill.add_argument("--max-minutes", type=float, help="stop training after this time; --resume goes on")

    convert = add_recipe_command(
        "convert", "the conversion alone: where each tensor comes from, and the KL before training"
    )
    convert.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    convert.add_argument("--smoke", action="store_true", help="of a tiny random model")

    capture = add_recipe_command(
        "capture", "write the teacher's hidden states of a recipe's text to files, for training without the teacher"
    )
    capture.add_argument("-o", "--output", type=Path, required=True, help="folder, for --teacher.cache")
    capture.add_argument("--format", default="int8", help="int8, with a scale for 32 channels, or bf16")

    plan = add_recipe_command("plan", "what a recipe will take: memory, hours, disk; nothing is loaded")
    plan.add_argument("--gpu", default="h100", help="h100 or h200, whose speed the hours come from")
    plan.add_argument("--gpus", type=int, default=1, help="processes that share the work")

    evaluate = commands.add_parser(
        "evaluate",
        help="measure a run's stages, or any models, beside their teacher",
        description="Score models on held-out text. Options add benchmarks, needles, curves by position and decoding.",
    )
    evaluate.add_argument("sources", nargs="+", metavar="MODEL", help="folder of a run or model, or hub id")
    evaluate.add_argument("-o", "--output", type=Path, help="folder for the results (default: the run's own)")
    evaluate.add_argument("--teacher", help="hub id, folder or GGUF file of the teacher (default: the runs' teacher)")
    evaluate.add_argument("--heldout", help="source of held-out text (default: that of the first run)")
    evaluate.add_argument("--tasks", type=words, default=(), help="lm-eval tasks, comma-separated, or: default")
    evaluate.add_argument("--limit", type=int, help="number of items of each task (default: all)")
    evaluate.add_argument("--data", type=Path, help="folder with the tasks' data as JSON lines (default: the hub)")
    evaluate.add_argument("--needles", type=words, default=(), help="RULER tasks, comma-separated, or: all")
    evaluate.add_argument("--lengths", type=numbers, default=(1024, 4096), help="needle lengths in tokens (1024,4096)")
    evaluate.add_argument("--needle-samples", type=int, default=16, help="samples of each needle task and length (16)")
    evaluate.add_argument("--haystack", default="python-docs", help="source of the text that hides the needles")
    evaluate.add_argument("--books", help="source of long documents for perplexity and KL by position")
    evaluate.add_argument("--book-tokens", type=int, default=8192, help="tokens read of each document (8192)")
    evaluate.add_argument("--book-count", type=int, default=4, help="number of documents (4)")
    evaluate.add_argument("--contexts", type=numbers, default=(), help="tokens in the cache when decoding is timed")
    evaluate.add_argument("--no-controls", action="store_true", help="leave out sliding windows and zeroed states")
    evaluate.add_argument("--no-stages", action="store_true", help="score only the last stage, under the run's name")
    evaluate.add_argument("--no-samples", action="store_true", help="leave out greedy continuations of fixed prompts")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    evaluate.add_argument("--dtype", default="auto", help="float32, bfloat16, float16, or auto (by device)")

    report = commands.add_parser("report", help="tables, pictures, report.html and a model card of an evaluated run")
    report.add_argument("runs", nargs="+", metavar="FOLDER", help="an evaluated run, or an evaluation's output")
    report.add_argument("-o", "--output", type=Path, help="of several folders, where their common report goes")

    generate = commands.add_parser("generate", help="stream text from a model")
    generate.add_argument("model", help="folder of a model or run, or hub id")
    generate.add_argument("prompt")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.7)
    generate.add_argument("--top-p", type=float, default=0.95)
    generate.add_argument("--greedy", action="store_true", help="the likeliest token each time")
    generate.add_argument("--chat", action="store_true", help="through the tokenizer's chat template")
    generate.add_argument("--device", default="auto")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--state", help="file of a text already read (deltify read); the prompt follows it")

    read = commands.add_parser("read", help="read a text once and save the model's state, to go on from many times")
    read.add_argument("model", help="folder of a model or run, or hub id; KDA and sliding layers only")
    read.add_argument("text", help="text file")
    read.add_argument("-o", "--output", required=True, help="state file to write")
    read.add_argument("--device", default="auto")

    chat = commands.add_parser("chat", help="talk with a model in the terminal")
    chat.add_argument("model", help="folder of a model or run, or hub id")
    chat.add_argument("--device", default="auto")
    chat.add_argument("--temperature", type=float, default=0.7)
    chat.add_argument("--top-p", type=float, default=0.95)

    serve = commands.add_parser("serve", help="an OpenAI-compatible endpoint on this machine")
    serve.add_argument("model", help="folder of a model or run, or hub id")
    serve.add_argument("--host", default="localhost")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--device", default="auto")

    sample = commands.add_parser("sample", help="write text of a model's own, to train on")
    sample.add_argument("model", help="folder of a model or run, GGUF file, hub id, or smollm2-135m-instruct")
    sample.add_argument("source", help="text whose documents begin the new ones: file, folder, python-docs or hf:NAME")
    sample.add_argument("-o", "--output", type=Path, required=True, help="JSON lines file to write, for data.train")
    sample.add_argument("--count", type=int, default=1024, help="documents")
    sample.add_argument("--prompt-tokens", type=int, default=32, help="of a document that the model goes on from")
    sample.add_argument("--length", type=int, default=512, help="tokens of a document at most")
    sample.add_argument("--batch", type=int, default=64, help="documents at a time")
    sample.add_argument("--temperature", type=float, default=1.0)
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--device", default="auto")

    export = commands.add_parser("export", help="write a model under another library's names")
    export.add_argument("model", help="folder of a model or run")
    export.add_argument("--layout", required=True, help="kda (flash-linear-attention), kimi_linear or deltify")
    export.add_argument("-o", "--output", required=True, help="folder to write")
    return parser


def recipe_fields() -> str:
    """The help of every recipe field, when help is asked for; making it takes a moment."""
    if not {"-h", "--help"} & set(sys.argv):
        return ""
    from .config import recipe_parser

    text = recipe_parser().format_help()
    return RECIPE_HELP + text[text.index("  --name") :]


def run_distill(options: argparse.Namespace, overrides: list[str]) -> None:
    from .config import load_recipe, smoke
    from .training.distributed import start_ranks
    from .training.runner import distill

    recipe = load_recipe(options.recipe, overrides)
    if not options.smoke and recipe.run.device in ("auto", "cuda"):
        start_ranks()
    distill(smoke(recipe) if options.smoke else recipe, resume=options.resume, max_minutes=options.max_minutes)


def run_convert(options: argparse.Namespace, overrides: list[str]) -> None:
    from .config import load_recipe, smoke
    from .training.runner import distill

    recipe = load_recipe(options.recipe, overrides)
    distill(smoke(recipe) if options.smoke else recipe, resume=options.resume, stages=())


def run_capture(options: argparse.Namespace, overrides: list[str]) -> None:
    from .config import load_recipe
    from .training.runner import capture_recipe

    found = capture_recipe(load_recipe(options.recipe, overrides), options.output, options.format)
    print(
        f"{options.output}: {found['rows']:,} rows, {found['tokens']:,} tokens, {found['bytes_per_token']:,.0f} bytes "
        f"a token; KL of what is stored from what the teacher says: {found['kl']:.2g} nats/token"
    )


def run_plan(options: argparse.Namespace, overrides: list[str]) -> None:
    from .config import load_recipe
    from .training.estimate import plan

    plan(load_recipe(options.recipe, overrides), gpu=options.gpu, gpus=options.gpus)


def words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in words(text))


def run_evaluate(options: argparse.Namespace, _: list[str]) -> None:
    from .evaluation.benchmarks import TASKS
    from .evaluation.needles import TASKS as NEEDLES
    from .evaluation.runner import evaluate
    from .evaluation.settings import BenchmarkSpec, DecodeSpec, EvaluationSpec, NeedleSpec, PositionSpec

    o = options
    tasks = TASKS if o.tasks == ("default",) else o.tasks
    needles = tuple(NEEDLES) if o.needles == ("all",) else o.needles
    spec = EvaluationSpec(
        teacher=o.teacher,
        heldout=o.heldout,
        benchmarks=BenchmarkSpec(tasks, o.limit, o.data) if tasks else None,
        needles=NeedleSpec(needles, o.lengths, o.needle_samples, o.haystack) if needles else None,
        positions=PositionSpec(o.books, o.book_tokens, o.book_count) if o.books else None,
        decode=DecodeSpec(o.contexts) if o.contexts else None,
        controls=not o.no_controls,
        stages=not o.no_stages,
        samples=not o.no_samples,
        device=o.device,
        dtype=o.dtype,
    )
    print(evaluate(o.sources, spec, output=o.output))


def run_report(options: argparse.Namespace, _: list[str]) -> None:
    from .evaluation.report import combine, report

    runs = [Path(run) for run in options.runs]
    if len(runs) > 1 and options.output is None:
        raise ValueError(f"{len(runs)} folders; say with --output where their common report should go")
    report(runs[0] if options.output is None else combine(runs, options.output))


def run_generate(options: argparse.Namespace, _: list[str]) -> None:
    from .inference.generate import generate
    from .utils.devices import pick_device

    settings = {k: v for k, v in vars(options).items() if k not in ("command", "model", "prompt", "device")}
    generate(options.model, options.prompt, device=str(pick_device(options.device)), **settings)


def run_read(options: argparse.Namespace, _: list[str]) -> None:
    from .inference.generate import read_file
    from .utils.devices import pick_device

    read_file(options.model, options.text, options.output, device=str(pick_device(options.device)))


def run_export(options: argparse.Namespace, _: list[str]) -> None:
    from .inference.export import export
    from .utils.folders import model_folder

    export(model_folder(options.model), options.layout, options.output)


def run_sample(options: argparse.Namespace, _: list[str]) -> None:
    from .inference.sample import sample

    print(sample(**{key: value for key, value in vars(options).items() if key != "command"}))


def run_serve(options: argparse.Namespace, _: list[str]) -> None:
    from .inference.serve import serve
    from .utils.devices import pick_device

    pick_device(options.device)  # the server's own auto may spread a model over several GPUs
    serve(options.model, host=options.host, port=options.port, device=options.device)


def run_chat(options: argparse.Namespace, _: list[str]) -> None:
    from .inference.chat import chat
    from .utils.devices import pick_device

    device = str(pick_device(options.device))
    chat(options.model, device=device, temperature=options.temperature, top_p=options.top_p)


COMMANDS = {
    "distill": run_distill,
    "convert": run_convert,
    "plan": run_plan,
    "capture": run_capture,
    "evaluate": run_evaluate,
    "report": run_report,
    "generate": run_generate,
    "read": run_read,
    "sample": run_sample,
    "export": run_export,
    "chat": run_chat,
    "serve": run_serve,
}

if __name__ == "__main__":
    sys.exit(main())
