"""`deltify`: the package's functions as sub-commands."""

import argparse
import sys
from pathlib import Path

DESCRIPTION = """\
Turn a pretrained transformer into a Kimi Delta Attention (KDA) language model by distillation.

  deltify distill recipes/smollm2-135m-demo.yaml     convert the teacher, train the student, stage by stage
  deltify evaluate runs/smollm2-135m-demo            teacher and every stage, side by side
  deltify report runs/smollm2-135m-demo              the table, samples, and the training curves
  deltify generate runs/smollm2-135m-demo "Once"     text from the student
  deltify convert recipes/smollm2-135m-demo.yaml     the conversion alone, without training

Each sub-command explains itself: deltify distill --help
"""

RECIPE_HELP = """\
Any field of the recipe can be given here too: --match.tokens 1000000 --data.train '{"book.txt": 1.0}'.
All fields:
"""


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options, extra = parser.parse_known_args(arguments)
    if extra and options.command not in ("distill", "convert"):
        parser.error(f"{options.command} does not know {' '.join(extra)}")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        COMMANDS[options.command](options, extra)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"deltify: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("deltify: stopped; what was saved can be taken up with --resume", file=sys.stderr)
        return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("deltify", description=DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    distill = commands.add_parser(
        "distill", help="run a recipe: convert, align, match, extend", formatter_class=raw, epilog=recipe_fields()
    )
    distill.add_argument("recipe", help="YAML file")
    distill.add_argument("--resume", action="store_true", help="go on with the run that is in the folder")
    distill.add_argument("--smoke", action="store_true", help="two steps a stage on a tiny random model, on the CPU")
    distill.add_argument("--max-minutes", type=float, help="stop training after this time; --resume goes on")

    convert = commands.add_parser(
        "convert",
        help="the conversion alone: where each tensor comes from, and the KL before training",
        formatter_class=raw,
        epilog=recipe_fields(),
    )
    convert.add_argument("recipe", help="YAML file")
    convert.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    convert.add_argument("--smoke", action="store_true", help="of a tiny random model")

    evaluate = commands.add_parser("evaluate", help="score the teacher and every stage of a run on held-out text")
    evaluate.add_argument("run", help="folder of a run")
    evaluate.add_argument("--no-samples", action="store_true", help="leave out the text samples")

    report = commands.add_parser("report", help="table, samples and training curves of an evaluated run")
    report.add_argument("run", help="folder of a run")

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
    read.add_argument("model", help="folder of a model or run, or hub id; pure KDA")
    read.add_argument("text", help="text file")
    read.add_argument("-o", "--output", required=True, help="state file to write")
    read.add_argument("--device", default="auto")

    chat = commands.add_parser("chat", help="talk with a model in the terminal")
    chat.add_argument("model", help="folder of a model or run, or hub id")
    chat.add_argument("--device", default="auto")
    chat.add_argument("--temperature", type=float, default=0.7)
    chat.add_argument("--top-p", type=float, default=0.95)

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
    from .config import read_recipe, smoke
    from .distill import distill

    recipe = read_recipe(options.recipe, overrides)
    distill(smoke(recipe) if options.smoke else recipe, resume=options.resume, max_minutes=options.max_minutes)


def run_convert(options: argparse.Namespace, overrides: list[str]) -> None:
    from .config import read_recipe, smoke
    from .distill import distill

    recipe = read_recipe(options.recipe, overrides)
    distill(smoke(recipe) if options.smoke else recipe, resume=options.resume, stages=())


def run_evaluate(options: argparse.Namespace, _: list[str]) -> None:
    from .config import read_recipe
    from .evaluate import evaluate_run

    print(evaluate_run(read_recipe(Path(options.run) / "recipe.yaml"), samples=not options.no_samples))


def run_report(options: argparse.Namespace, _: list[str]) -> None:
    from .report import report

    report(Path(options.run))


def run_generate(options: argparse.Namespace, _: list[str]) -> None:
    from .distill import pick_device
    from .generate import generate

    settings = {k: v for k, v in vars(options).items() if k not in ("command", "model", "prompt", "device")}
    generate(options.model, options.prompt, device=str(pick_device(options.device)), **settings)


def run_read(options: argparse.Namespace, _: list[str]) -> None:
    from .distill import pick_device
    from .generate import read_file

    read_file(options.model, options.text, options.output, device=str(pick_device(options.device)))


def run_export(options: argparse.Namespace, _: list[str]) -> None:
    from .generate import model_folder
    from .layouts import export

    export(model_folder(options.model), options.layout, options.output)


def run_chat(options: argparse.Namespace, _: list[str]) -> None:
    from .chat import chat
    from .distill import pick_device

    device = str(pick_device(options.device))
    chat(options.model, device=device, temperature=options.temperature, top_p=options.top_p)


COMMANDS = {
    "distill": run_distill,
    "convert": run_convert,
    "evaluate": run_evaluate,
    "report": run_report,
    "generate": run_generate,
    "read": run_read,
    "export": run_export,
    "chat": run_chat,
}

if __name__ == "__main__":
    sys.exit(main())
