"""Publish a run on the Hugging Face hub: its model in every layout that can express it, and a model card.

The repository itself is the kimi_linear folder, which transformers, vLLM and MLX-LM load by the repository's name. The
folder in deltify's layout is then a subfolder. Where kimi_linear cannot express the model, the repository itself is the
folder in deltify's layout.
"""

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import yaml
from huggingface_hub import HfApi, constants

from ..inference.export import read_layout
from ..inference.gguf_export import DEFAULT_DTYPE, write_gguf
from ..inference.kimi_linear import o_norm_eps, write_kimi_linear
from ..inference.loading import load_tokenizer
from ..training.checkpoint import is_finished
from ..utils.console import log
from .card import Layouts, last_stage, teacher_facts
from .report import check_current, make_sections, read_results, render_card

STAGING = "push"  # folder in the run
VLLM_O_NORM_EPS = 1e-5


def push(
    run: str | Path,
    repo: str,
    *,
    yes: bool = False,
    private: bool = False,
    stage: str | None = None,
    license: str | None = None,
) -> Path:
    """Gather what a run publishes, list it, and upload it if `yes`. Return the folder with the gathered files.

    Without `yes`, nothing is sent and no network is used.

    Args:
        run: Folder of the run.
        repo: Hub id to upload to, OWNER/NAME. The repository is created if it does not exist.
        yes: Whether to upload.
        private: Whether the repository is private.
        stage: Stage whose model is published. Defaults to the last one.
        license: Licence to write in the card. Defaults to the teacher's.

    Raises:
        ValueError: If `repo` is not OWNER/NAME, or models were trained further after they were measured.
        FileNotFoundError: If the folder is not a run, or has no model of the stage.
        OSError: If the upload fails. The message has the reason.
    """
    run = Path(run)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"{repo!r} is not the name of a repository. Name it as OWNER/NAME.")
    model = stage_folder(run, stage)
    results = read_results(run) if (run / "results.json").is_file() else None
    if results is not None:
        check_current(run, results)
    teacher = yaml.safe_load((run / "recipe.yaml").read_text())["teacher"]
    facts = teacher_facts(teacher["model"], teacher["revision"], online=yes)
    if license is not None:
        facts = {name: fact for name, fact in facts.items() if not name.startswith("license")} | {"license": license}
    staging = run / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    layouts, notes = gather(model, staging, repo)
    sections = [] if results is None else make_sections(run, results)
    card = render_card(run, model.name, results, sections, facts, layouts)
    (staging / "README.md").write_text(card, encoding="utf-8")

    if "license" in facts:
        notes.append(f"licence: {facts['license']}")
    else:
        notes.append(f"licence: that of {teacher['model']} is not known. The card says: other. Set it by --license")
    if results is None:
        notes.append(f"the card has no measurements. Run: deltify evaluate {run}")
    if not is_finished(model):
        notes.append(f"{model.name} stopped before its last step")
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    for path in files:
        log(f"{size_text(path.stat().st_size)}  {path.relative_to(staging)}")
    log(f"{size_text(sum(path.stat().st_size for path in files))}  in {len(files)} files of {staging}")
    for note in notes:
        log(note)
    target = f"{constants.ENDPOINT}/{repo}"
    log(f"target: {target}{' (private)' if private else ''}")
    if not yes:
        log("Nothing was uploaded. Look at the files, then add --yes.")
        return staging
    upload(staging, repo, private, f"Upload {model.name} of {run.name}")
    log(f"uploaded to {target}")
    return staging


def size_text(size: int) -> str:
    """Return a number of bytes for a column of sizes."""
    return f"{size / 1e6:>9,.1f} MB" if size >= 1e6 else f"{size / 1e3:>9,.1f} kB"


def stage_folder(run: Path, stage: str | None) -> Path:
    """Return the folder of a stage's model, by default the last stage's.

    Raises:
        FileNotFoundError: If the folder is not a run, or has no model of the stage.
    """
    if not (run / "recipe.yaml").is_file():
        raise FileNotFoundError(f"{run} is not a run: it has no recipe.yaml. Name the folder that distill wrote.")
    folder = last_stage(run) if stage is None else run / stage
    if folder is None or not (folder / "config.json").is_file():
        models = sorted(path.parent.name for path in run.glob("*/config.json") if path.parent.name != STAGING)
        raise FileNotFoundError(
            f"{run} has no model of {stage or 'a trained stage'}. With --stage, choose one of {models}."
        )
    return folder


def gather(folder: Path, staging: Path, repo: str) -> tuple[Layouts, list[str]]:
    """Write a model in every layout that can express it, and return where, with a line for each omission."""
    layouts, notes = Layouts(repo), []
    model, tokenizer = read_layout(folder), load_tokenizer(folder)
    try:
        write_kimi_linear(model, tokenizer, staging)
        vllm = math.isclose(o_norm_eps(model), VLLM_O_NORM_EPS, rel_tol=1e-3)
        layouts = replace(layouts, deltify="deltify", native=True, vllm=vllm)
        if not vllm:
            notes.append(f"vLLM is left out of the card: its o_norm has eps {VLLM_O_NORM_EPS}, not that of this model")
    except ValueError as error:
        notes.append(f"left out: kimi_linear (transformers, vLLM, MLX-LM). {reason(error)}")
    name = f"{repo.partition('/')[2]}-{DEFAULT_DTYPE}.gguf"
    try:
        write_gguf(model, tokenizer, staging / name)
        layouts = replace(layouts, gguf=name)
    except ValueError as error:
        notes.append(f"left out: GGUF (llama.cpp). {reason(error)}")
    own = shutil.ignore_patterns("README.md", "unfinished.json")
    shutil.copytree(folder, staging / layouts.deltify, ignore=own, dirs_exist_ok=True)
    return layouts, notes


def reason(error: ValueError) -> str:
    """Return the first sentence of an error. The next one names another command."""
    return str(error).partition(". ")[0] + "."


def upload(staging: Path, repo: str, private: bool, message: str) -> None:
    """Create a repository if it does not exist, and commit a folder to it.

    Raises:
        OSError: If the hub refuses or cannot be reached, or the repository is public and `private` is true.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise PermissionError("the repository is public. Make it private in its settings, or omit --private")
        api.upload_folder(repo_id=repo, folder_path=staging, commit_message=message)
    except Exception as error:  # of many kinds: of the hub, of its HTTP library, of the network
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise OSError(
            f"could not upload to {repo}: {why}. The files are in {staging}. Log in with `hf auth login` if you have "
            "not, and run the same command again."
        ) from error
