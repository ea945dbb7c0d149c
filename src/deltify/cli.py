"""`deltify`: the package's functions as commands. Each command's options stand beside the function that runs it."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from . import __version__
from .config import Recipe
from .training.signals import Stopped

DESCRIPTION = """\
Convert a pretrained transformer into a Kimi Delta Attention (KDA) language model by distillation.

  deltify distill smollm2-135m-demo                convert the teacher and train the student, stage by stage
  deltify watch runs/smollm2-135m-demo             follow the run on a page, from another terminal
  deltify evaluate runs/smollm2-135m-demo          measure the student beside its teacher
  deltify report runs/smollm2-135m-demo            write tables, plots, report.html and a model card
  deltify generate runs/smollm2-135m-demo "Once"   generate text with the student
  deltify recipes                                  list the recipes that come with deltify

`deltify COMMAND --help` explains a command.
"""

RECIPE_HELP = """\
Every field of the recipe is also a flag: --match.tokens 1000000 --data.train '{"book.txt": 1.0}'.
Fields:
"""

PARALLEL_COMMANDS = ("distill", "convert", "evaluate", "sample")  # those that torchrun may start
RECIPE_COMMANDS = ("distill", "convert", "plan", "capture")
# what to do after Ctrl-C, where it is not to repeat the command
GO_ON = {
    "distill": "Continue from the last checkpoint with --resume",
    "sample": "The file has what was written so far, and is not continued. Name another file to start anew",
}
MODEL_HELP = "folder of a model or run, or hub id"
DEVICE_HELP = "auto, cpu, cuda or mps (default: auto)"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = make_parser()
    options, extra = parser.parse_known_args(arguments)
    if extra and options.command not in RECIPE_COMMANDS:
        parser.error(f"{options.command} has no option {' '.join(extra)}")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        check_launcher(options.command)
        COMMANDS[options.command][1](options, extra)
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print(f"deltify: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        figures = ". ".join(str(error).split(". ")[:3])
        print(
            f"deltify: a GPU's memory is full ({figures}). Other programs may use it (nvidia-smi lists them), or this "
            "command needs more than the GPU has",
            file=sys.stderr,
        )
        return 1
    except Stopped as stopped:
        print(f"deltify: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print(f"deltify: stopped. {GO_ON.get(options.command, 'Repeat the command')}", file=sys.stderr)
        return 130
    return 0


def check_launcher(command: str) -> None:
    """Raise ValueError if torchrun started several processes of a command that does not share its work."""
    processes = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if processes > 1 and command not in PARALLEL_COMMANDS:
        shared = ", ".join(PARALLEL_COMMANDS)
        raise ValueError(
            f"torchrun started {processes} processes, but {command} runs in one. Only {shared} share their work. Run: "
            f"deltify {command} ..."
        )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        "deltify", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"deltify {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add_command, _ in COMMANDS.values():
        add_command(commands)
    return parser


def add_recipe_command(commands: argparse._SubParsersAction, name: str, summary: str) -> argparse.ArgumentParser:
    """Add a command whose first argument is a recipe and whose flags include the recipe's fields."""
    raw = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(name, help=summary, description=summary, formatter_class=raw, epilog=recipe_fields())
    command.add_argument("recipe", help="recipe file (YAML), or name of a recipe that comes with deltify")
    return command


def recipe_fields() -> str:
    """Return the help of all recipe fields if help is asked for, else nothing, since making it takes time."""
    if not {"-h", "--help"} & set(sys.argv):
        return ""
    from .config import recipe_parser

    text = recipe_parser().format_help()
    return RECIPE_HELP + text[text.index("  --name") :]


def add_recipes(commands: argparse._SubParsersAction) -> None:
    recipes = commands.add_parser(
        "recipes",
        help="list the recipes that come with deltify, or write one to a file",
        description="List the recipes that come with deltify. With a name, print that recipe or write it to a file.",
    )
    recipes.add_argument("name", nargs="?", help="recipe to print")
    recipes.add_argument("-o", "--output", type=Path, help="new file for the recipe, to change it")


def run_recipes(options: argparse.Namespace, _: list[str]) -> None:
    from .recipes import find_recipe, recipe_names, summary, write_new

    if options.name is None:
        if options.output is not None:
            raise ValueError(f"--output needs the name of a recipe: {', '.join(recipe_names())}")
        width = max(map(len, recipe_names()))
        for name in recipe_names():
            print(f"{name:{width}}  {summary(name)}")
    elif options.output is None:
        print(find_recipe(options.name).read_text(encoding="utf-8"), end="")
    else:
        write_new(options.output, find_recipe(options.name).read_text(encoding="utf-8"))
        print(f"wrote {options.output}. Change it, then run: deltify distill {options.output}")


def add_init(commands: argparse._SubParsersAction) -> None:
    summary = "write a recipe for a teacher, sized for a GPU and a time"
    init = commands.add_parser("init", help=summary, description=summary)
    init.add_argument("teacher", help="folder, GGUF file or hub id of the teacher, or smollm2-135m-instruct")
    where = init.add_mutually_exclusive_group()
    where.add_argument("--gpu", help="GPU to train on, such as h100, h200 or a100 (default: this machine's)")
    where.add_argument("--cpu", action="store_true", help="train on this machine's CPU")
    init.add_argument("--hours", type=float, default=1.0, help="time of the whole run (default: 1)")
    init.add_argument("-o", "--output", type=Path, help="new file for the recipe (default: the run's name and .yaml)")


def run_init(options: argparse.Namespace, _: list[str]) -> None:
    from .training.first_recipe import write_first_recipe

    settings = {"gpu": options.gpu, "cpu": options.cpu, "hours": options.hours}
    path = write_first_recipe(options.teacher, options.output, **settings)
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        print(line.removeprefix("#").removeprefix(" "))
    print(f"\nwrote {path}. Try it with a tiny model, then run it:")
    print(f"  deltify distill {path} --smoke\n  deltify distill {path}")


def add_distill(commands: argparse._SubParsersAction) -> None:
    distill = add_recipe_command(commands, "distill", "run a recipe: convert, align, match, extend")
    distill.add_argument("--resume", action="store_true", help="continue the run in the recipe's folder")
    distill.add_argument(
        "--smoke",
        action="store_true",
        help="run two steps per stage with a tiny random model on the CPU; replaces an earlier trial",
    )
    distill.add_argument("--max-minutes", type=float, help="stop training after this time; --resume continues")
    distill.add_argument("--dashboard", action="store_true", help="serve the page of `deltify watch` during the run")
    distill.add_argument(
        "--fit-minutes",
        type=float,
        help="measure this machine's speed and choose numbers of tokens for a run of about this time",
    )


def run_distill(options: argparse.Namespace, overrides: list[str]) -> None:
    from .config import load_recipe
    from .training.distributed import relaunch_with_torchrun
    from .training.fit import fit_to_time
    from .training.runner import distill

    recipe = load_recipe(options.recipe, overrides)
    given = [part.removeprefix("--").partition("=")[0] for part in overrides if part.startswith("--")]
    there, planned = Path(options.recipe).resolve().parent, recipe.folder.resolve()
    if options.resume and "name" not in given and there != planned and (there / "metrics.jsonl").is_file():
        raise ValueError(
            f"{options.recipe} is the recipe of the run in {there}, but with output: {recipe.output} that run would be "
            f"{planned}. To continue it, give --output {there.parent}"
        )
    if options.smoke:
        recipe = make_trial(recipe, options.resume)
    elif recipe.run.device in ("auto", "cuda") and options.fit_minutes is None:
        relaunch_with_torchrun(recipe)
    if options.fit_minutes is not None:
        recipe = fit_to_time(recipe, options.fit_minutes, given)
    with ExitStack() as stack:
        if options.dashboard and os.environ.get("RANK", "0") == "0":  # the first process serves
            from .evaluation.watch import serving

            print(f"progress: {stack.enter_context(serving(recipe.folder, recipe=recipe))}", flush=True)
        distill(recipe, resume=options.resume, max_minutes=options.max_minutes)


def make_trial(recipe: Recipe, resume: bool) -> Recipe:
    """Return the recipe of --smoke. Its folder is emptied of an earlier trial, unless that is to be resumed."""
    from .config import smoke
    from .training.run_folder import remove_trial

    recipe = smoke(recipe)
    if not resume and os.environ.get("RANK", "0") == "0":  # the other processes wait for the first one later
        remove_trial(recipe.folder)
    return recipe


def add_watch(commands: argparse._SubParsersAction) -> None:
    summary = "show the progress of a run on a page: curves, samples, speed, time left"
    watch = commands.add_parser("watch", help=summary, description=summary)
    watch.add_argument("run", help="folder of a run, during or after training, or a copy of it")
    watch.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    watch.add_argument("--port", type=int, default=8010, help="port to listen on; 0 for a free one (default: 8010)")


def run_watch(options: argparse.Namespace, _: list[str]) -> None:
    from .evaluation.watch import watch

    watch(options.run, host=options.host, port=options.port)


def add_convert(commands: argparse._SubParsersAction) -> None:
    summary = "convert without training; print the origin of each tensor and the KL before training"
    convert = add_recipe_command(commands, "convert", summary)
    convert.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    convert.add_argument("--smoke", action="store_true", help="convert a tiny random model")


def run_convert(options: argparse.Namespace, overrides: list[str]) -> None:
    from .config import load_recipe
    from .training.runner import distill

    recipe = load_recipe(options.recipe, overrides)
    distill(make_trial(recipe, options.resume) if options.smoke else recipe, resume=options.resume, stages=())


def add_capture(commands: argparse._SubParsersAction) -> None:
    summary = "save the teacher's hidden states, so that training no longer needs the teacher in memory"
    capture = add_recipe_command(commands, "capture", summary)
    capture.add_argument("-o", "--output", type=Path, required=True, help="folder to write, for --teacher.cache")
    capture.add_argument("--format", default="int8", help="int8 (one scale per 32 channels) or bf16 (default: int8)")


def run_capture(options: argparse.Namespace, overrides: list[str]) -> None:
    from .config import load_recipe
    from .training.runner import capture_recipe

    found = capture_recipe(load_recipe(options.recipe, overrides), options.output, options.format)
    print(
        f"{options.output}: {found['rows']:,} sequences, {found['tokens']:,} tokens, "
        f"{found['bytes_per_token']:,.0f} bytes per token; KL of the stored distribution from the teacher's: "
        f"{found['kl']:.2g} nats/token"
    )


def add_plan(commands: argparse._SubParsersAction) -> None:
    summary = "estimate memory, hours and disk space of a recipe without loading the teacher"
    plan = add_recipe_command(commands, "plan", summary)
    plan.add_argument("--gpu", default="h100", help="GPU to plan for, such as h100, h200 or a100 (default: h100)")
    plan.add_argument("--gpus", type=int, default=1, help="number of GPUs (default: 1)")


def run_plan(options: argparse.Namespace, overrides: list[str]) -> None:
    from .config import load_recipe
    from .training.estimate import plan

    plan(load_recipe(options.recipe, overrides), gpu=options.gpu, gpus=options.gpus)


def words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in words(text))


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure a run's stages, or any models, beside their teacher",
        description="Score models on held-out text. Options add benchmarks, needles, recall, curves and decoding. "
        "Several GPUs share the work of: torchrun --nproc-per-node 4 -m deltify.cli evaluate ...",
    )
    evaluate.add_argument("sources", nargs="+", metavar="MODEL", help="folder of a run or model, or hub id")
    evaluate.add_argument("-o", "--output", type=Path, help="folder for the results (default: the run's own)")
    evaluate.add_argument("--teacher", help="hub id, folder or GGUF file of the teacher (default: the runs' teacher)")
    evaluate.add_argument("--heldout", help="source of held-out text (default: that of the first run)")
    evaluate.add_argument("--tasks", type=words, default=(), help="lm-eval tasks, comma-separated, or the word default")
    evaluate.add_argument("--limit", type=int, help="number of items of each task (default: all)")
    evaluate.add_argument("--data", type=Path, help="folder with the tasks' data as JSON lines (default: the hub)")
    evaluate.add_argument("--needles", type=words, default=(), help="RULER tasks, comma-separated, or the word all")
    evaluate.add_argument(
        "--lengths", type=numbers, default=(1024, 4096), help="lengths of needle texts in tokens (default: 1024,4096)"
    )
    evaluate.add_argument(
        "--needle-samples", type=int, default=16, help="samples per needle task and length (default: 16)"
    )
    evaluate.add_argument(
        "--haystack", default="python-docs", help="source of the text around needles and facts (default: python-docs)"
    )
    evaluate.add_argument(
        "--recall", action="store_true", help="measure the recall curve: log-probability of repeated tokens by distance"
    )
    evaluate.add_argument(
        "--recall-tokens",
        type=int,
        default=16384,
        help="tokens of the longest documents of the recall curve, up to 65536 (default: 16384)",
    )
    evaluate.add_argument(
        "--recall-samples", type=int, default=8, help="documents per kind and length of the recall curve (default: 8)"
    )
    evaluate.add_argument("--books", help="source of long documents for perplexity and KL by position")
    evaluate.add_argument(
        "--book-tokens", type=int, default=8192, help="number of tokens to read from each document (default: 8192)"
    )
    evaluate.add_argument("--book-count", type=int, default=4, help="number of documents (default: 4)")
    evaluate.add_argument(
        "--contexts", type=numbers, default=(), help="numbers of tokens after which decoding is timed, comma-separated"
    )
    evaluate.add_argument(
        "--no-controls", action="store_true", help="leave out the controls: sliding windows, zeroed states"
    )
    evaluate.add_argument("--no-stages", action="store_true", help="score only the last stage, under the run's name")
    evaluate.add_argument("--no-samples", action="store_true", help="leave out greedy continuations of fixed prompts")
    evaluate.add_argument("--device", default="auto", help=DEVICE_HELP)
    evaluate.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16 or auto (default: auto, by device)"
    )
    needs = {"limit": "tasks", "data": "tasks", "lengths": "needles", "needle_samples": "needles"}
    needs |= {"recall_tokens": "recall", "recall_samples": "recall", "book_tokens": "books", "book_count": "books"}
    keep_defaults(evaluate, needs)


def keep_defaults(command: argparse.ArgumentParser, needs: dict[str, str]) -> None:
    """Let `refuse_unused` know which options of a command do nothing without which other ones."""
    command.set_defaults(needs={name: (needed, command.get_default(name)) for name, needed in needs.items()})


def refuse_unused(options: argparse.Namespace) -> None:
    """Raise ValueError if an option was given that does nothing without another one, which was not."""
    for name, (needed, default) in options.needs.items():
        if getattr(options, name) != default and not getattr(options, needed):
            flag, other = (f"--{word.replace('_', '-')}" for word in (name, needed))
            raise ValueError(f"{flag} does nothing without {other}. Give both, or leave it out")


def run_evaluate(options: argparse.Namespace, _: list[str]) -> None:
    from .evaluation.benchmarks import TASKS
    from .evaluation.needles import TASKS as NEEDLES
    from .evaluation.runner import evaluate
    from .evaluation.settings import BenchmarkSpec, DecodeSpec, EvaluationSpec, NeedleSpec, PositionSpec, RecallSpec
    from .utils.console import log

    refuse_unused(options)
    o = options
    tasks = TASKS if o.tasks == ("default",) else o.tasks
    needles = tuple(NEEDLES) if o.needles == ("all",) else o.needles
    spec = EvaluationSpec(
        teacher=o.teacher,
        heldout=o.heldout,
        benchmarks=BenchmarkSpec(tasks, o.limit, o.data) if tasks else None,
        needles=NeedleSpec(needles, o.lengths, o.needle_samples, o.haystack) if needles else None,
        recall=RecallSpec(o.recall_tokens, o.recall_samples, o.haystack) if o.recall else None,
        positions=PositionSpec(o.books, o.book_tokens, o.book_count) if o.books else None,
        decode=DecodeSpec(o.contexts) if o.contexts else None,
        controls=not o.no_controls,
        stages=not o.no_stages,
        samples=not o.no_samples,
        device=o.device,
        dtype=o.dtype,
    )
    log(str(evaluate(o.sources, spec, output=o.output)))


def add_report(commands: argparse._SubParsersAction) -> None:
    summary = "write tables, plots, report.html and a model card of an evaluated run"
    report = commands.add_parser("report", help=summary, description=summary)
    report.add_argument("runs", nargs="+", metavar="FOLDER", help="evaluated run, or output folder of an evaluation")
    report.add_argument("-o", "--output", type=Path, help="folder of the common report, if several folders are given")


def run_report(options: argparse.Namespace, _: list[str]) -> None:
    from .evaluation.report import combine, report

    runs = [Path(run) for run in options.runs]
    if len(runs) > 1 and options.output is None:
        raise ValueError(f"{len(runs)} folders need --output, the folder of their common report")
    report(runs[0] if options.output is None else combine(runs, options.output))


def add_inspect(commands: argparse._SubParsersAction) -> None:
    summary = "measure what each KDA head of a student can hold: decay, writing, overwriting, retrieval"
    inspect = commands.add_parser("inspect", help=summary, description=summary)
    inspect.add_argument("source", metavar="MODEL", help=MODEL_HELP)
    inspect.add_argument("--text", default="python-docs", help="source of the text to read (default: python-docs)")
    inspect.add_argument("--tokens", type=int, default=8192, help="number of tokens to read (default: 8192)")
    inspect.add_argument("--teacher", help="hub id, folder or GGUF file of the teacher (default: the run's teacher)")
    inspect.add_argument("-o", "--output", type=Path, help="folder to write (default: that of the run or model)")
    inspect.add_argument("--device", default="auto", help=DEVICE_HELP)


def run_inspect(options: argparse.Namespace, _: list[str]) -> None:
    from .evaluation.inspection import inspect_student

    print(inspect_student(**{key: value for key, value in vars(options).items() if key != "command"}))


def add_generate(commands: argparse._SubParsersAction) -> None:
    summary = "generate text with a model"
    generate = commands.add_parser("generate", help=summary, description=summary)
    generate.add_argument("model", help=MODEL_HELP)
    generate.add_argument("prompt", help="text to continue")
    generate.add_argument("--max-new-tokens", type=int, default=128, help="largest number of tokens (default: 128)")
    add_sampling(generate)
    generate.add_argument("--greedy", action="store_true", help="always take the most likely token")
    generate.add_argument("--chat", action="store_true", help="apply the tokenizer's chat template to the prompt")
    generate.add_argument("--device", default="auto", help=DEVICE_HELP)
    generate.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    generate.add_argument("--state", help="state file of `deltify read`; the prompt continues its text")


def add_sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--temperature", type=float, default=0.7, help="sampling temperature; 0: likeliest token (default: 0.7)"
    )
    command.add_argument("--top-p", type=float, default=0.95, help="probability mass to sample from (default: 0.95)")


def run_generate(options: argparse.Namespace, _: list[str]) -> None:
    from .inference.generate import generate
    from .utils.devices import pick_device

    settings = {k: v for k, v in vars(options).items() if k not in ("command", "model", "prompt", "device")}
    generate(options.model, options.prompt, device=str(pick_device(options.device)), **settings)


def add_read(commands: argparse._SubParsersAction) -> None:
    summary = "read a text once and save the model's state, to continue from it many times"
    read = commands.add_parser("read", help=summary, description=summary)
    read.add_argument("model", help=f"{MODEL_HELP}; a model without full attention layers")
    read.add_argument("text", help="text file")
    read.add_argument("-o", "--output", required=True, help="state file to write")
    read.add_argument("--device", default="auto", help=DEVICE_HELP)


def run_read(options: argparse.Namespace, _: list[str]) -> None:
    from .inference.generate import read_file
    from .utils.devices import pick_device

    read_file(options.model, options.text, options.output, device=str(pick_device(options.device)))


def add_chat(commands: argparse._SubParsersAction) -> None:
    summary = "chat with a model in the terminal"
    chat = commands.add_parser("chat", help=summary, description=summary)
    chat.add_argument("model", help=MODEL_HELP)
    chat.add_argument("--device", default="auto", help=DEVICE_HELP)
    add_sampling(chat)


def run_chat(options: argparse.Namespace, _: list[str]) -> None:
    from .inference.chat import chat
    from .utils.devices import pick_device

    device = str(pick_device(options.device))
    chat(options.model, device=device, temperature=options.temperature, top_p=options.top_p)


def add_serve(commands: argparse._SubParsersAction) -> None:
    summary = "serve a model over an OpenAI-compatible HTTP API, with a page to ask about a text"
    serve = commands.add_parser("serve", help=summary, description=summary)
    serve.add_argument("model", help=MODEL_HELP)
    serve.add_argument("--host", default="localhost", help="address to listen on (default: localhost)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    serve.add_argument("--device", default="auto", help=DEVICE_HELP)


def run_serve(options: argparse.Namespace, _: list[str]) -> None:
    from .inference.serve import serve
    from .utils.devices import pick_device

    pick_device(options.device)  # the server's own auto may spread a model over several GPUs
    serve(options.model, host=options.host, port=options.port, device=options.device)


def add_sample(commands: argparse._SubParsersAction) -> None:
    summary = "let a model write text to train on"
    sample = commands.add_parser("sample", help=summary, description=summary)
    sample.add_argument("model", help=f"{MODEL_HELP}, GGUF file, or smollm2-135m-instruct")
    sample.add_argument("source", help="text to take prompts from: file, folder, python-docs or hf:NAME")
    sample.add_argument("-o", "--output", type=Path, required=True, help="JSON lines file to write, for data.train")
    sample.add_argument("--count", type=int, default=1024, help="number of documents (default: 1024)")
    sample.add_argument("--prompt-tokens", type=int, help="number of tokens of each prompt (default: 32)")
    chats = sample.add_argument_group("chats, instead of continued documents")
    chats.add_argument(
        "--chat",
        action="store_true",
        help="answer the messages of SOURCE, a JSON-lines file; chat:OUTPUT in data.train trains on the answers",
    )
    chats.add_argument("--field", default="text", help="field of a line that is the message (default: text)")
    chats.add_argument("--samples", type=int, default=1, help="number of answers to each message (default: 1)")
    chats.add_argument(
        "--keep-number",
        metavar="FIELD",
        help="keep only answers whose last number equals the last number of this field",
    )
    sample.add_argument("--length", type=int, default=512, help="largest number of tokens per document (default: 512)")
    sample.add_argument(
        "--batch", type=int, default=64, help="documents generated at a time; more keep a GPU busier (default: 64)"
    )
    sample.add_argument(
        "--temperature", type=float, default=1.0, help="sampling temperature; 0: likeliest token (default: 1.0)"
    )
    sample.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    sample.add_argument("--device", default="auto", help=DEVICE_HELP)
    keep_defaults(sample, {"field": "chat", "samples": "chat", "keep_number": "chat"})


def run_sample(options: argparse.Namespace, _: list[str]) -> None:
    from .inference.sample import sample, sample_answers
    from .utils.console import log

    refuse_unused(options)
    if options.chat and options.prompt_tokens is not None:
        raise ValueError("--prompt-tokens does nothing with --chat, whose prompts are whole messages. Leave it out")
    write, left_out = (sample_answers, ()) if options.chat else (sample, ("field", "samples", "keep_number"))
    left_out += ("command", "chat", "needs") + (("prompt_tokens",) if options.prompt_tokens is None else ())
    log(str(write(**{key: value for key, value in vars(options).items() if key not in left_out})))


def add_export(commands: argparse._SubParsersAction) -> None:
    summary = "write a model in another library's layout"
    export = commands.add_parser("export", help=summary, description=summary)
    export.add_argument("model", help="folder of a model or run")
    export.add_argument(
        "--layout",
        required=True,
        help="kimi_linear (transformers, vLLM, MLX-LM), gguf (llama.cpp), kda (flash-linear-attention) or deltify",
    )
    export.add_argument("-o", "--output", required=True, help="folder to write; for gguf also a file, NAME.gguf")
    identity = (
        "whether kimi_linear models without attention layers get an identity layer: auto or never (default: auto)"
    )
    export.add_argument("--identity-layer", default="auto", help=identity)
    export.add_argument("--dtype", help="type of the weights for gguf: f32, f16, bf16 or q8_0 (default: f16)")
    fold = "fold biases of KDA layers into the weights with the help of this text (default: python-docs); prints the KL"
    export.add_argument("--fold-gate-bias", metavar="SOURCE", nargs="?", const="python-docs", help=fold)


def run_export(options: argparse.Namespace, _: list[str]) -> None:
    from .inference.export import export
    from .utils.folders import model_folder

    choices = {"identity_layer": options.identity_layer, "dtype": options.dtype}
    choices |= {"fold_gate_bias": options.fold_gate_bias}
    print(export(model_folder(options.model), options.layout, options.output, **choices))


def add_push(commands: argparse._SubParsersAction) -> None:
    push = commands.add_parser(
        "push",
        help="publish a run on the Hugging Face hub, with a model card",
        description="List what would be published, and upload it with --yes. Without --yes, no network is used.",
    )
    push.add_argument("run", help="folder of a run")
    push.add_argument("repo", help="repository on the hub, OWNER/NAME")
    push.add_argument("--yes", action="store_true", help="upload; otherwise only list")
    push.add_argument("--private", action="store_true", help="make the repository private")
    push.add_argument("--stage", help="stage whose model is published (default: the last one)")
    push.add_argument("--license", help="licence in the model card, such as apache-2.0 (default: the teacher's)")


def run_push(options: argparse.Namespace, _: list[str]) -> None:
    from .evaluation.push import push

    push(**{key: value for key, value in vars(options).items() if key != "command"})


def add_env(commands: argparse._SubParsersAction) -> None:
    summary = "print versions, devices and the kernels in use, for bug reports"
    commands.add_parser("env", help=summary, description=summary)


def run_env(options: argparse.Namespace, _: list[str]) -> None:
    from .environment import environment

    print("\n".join(environment()))


def add_completion(commands: argparse._SubParsersAction) -> None:
    completion = commands.add_parser(
        "completion",
        help="print a script that completes commands, options and recipes in a shell",
        description="Print a completion script. It needs, in a clone of deltify: pip install -e '.[completion]'",
        epilog='For bash, add to ~/.bashrc: eval "$(deltify completion bash)". For zsh, write the output to a file '
        "_deltify in a folder of $fpath.",
    )
    completion.add_argument("shell", choices=("bash", "zsh"), help="bash or zsh")


def run_completion(options: argparse.Namespace, _: list[str]) -> None:
    from .completion import completion_script

    print(completion_script(make_parser(), RECIPE_COMMANDS, options.shell))


def add_schema(commands: argparse._SubParsersAction) -> None:
    summary = "print the JSON Schema of recipes, for editors"
    commands.add_parser("schema", help=summary, description=summary)


def run_schema(options: argparse.Namespace, _: list[str]) -> None:
    from .schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


Add = Callable[[argparse._SubParsersAction], None]
Run = Callable[[argparse.Namespace, list[str]], None]
COMMANDS: dict[str, tuple[Add, Run]] = {
    "recipes": (add_recipes, run_recipes),
    "init": (add_init, run_init),
    "distill": (add_distill, run_distill),
    "watch": (add_watch, run_watch),
    "convert": (add_convert, run_convert),
    "capture": (add_capture, run_capture),
    "plan": (add_plan, run_plan),
    "evaluate": (add_evaluate, run_evaluate),
    "report": (add_report, run_report),
    "inspect": (add_inspect, run_inspect),
    "generate": (add_generate, run_generate),
    "read": (add_read, run_read),
    "chat": (add_chat, run_chat),
    "serve": (add_serve, run_serve),
    "sample": (add_sample, run_sample),
    "export": (add_export, run_export),
    "push": (add_push, run_push),
    "env": (add_env, run_env),
    "completion": (add_completion, run_completion),
    "schema": (add_schema, run_schema),
}

if __name__ == "__main__":
    sys.exit(main())
