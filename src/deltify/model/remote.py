"""Write the model's code beside its weights, so that a saved folder loads where deltify is not installed."""

import re
from pathlib import Path

from transformers import PreTrainedConfig

# Module of deltify: module in the saved folder. transformers follows only imports of the form `from .name import`, so
# all modules are written side by side.
FLAT = {
    "model.configuration": "configuration_deltify",
    "model.remote": "remote_deltify",
    "model.loading": "loading_deltify",
    "model.cache": "cache_deltify",
    "model.documents": "documents_deltify",
    "model.sliding": "sliding_deltify",
    "model.mixers": "mixers_deltify",
    "model.context_parallel": "context_parallel_deltify",
    "model.capture": "capture_deltify",
    "model.generation": "generation_deltify",
    "model.modeling": "modeling_deltify",
    "ops": "kda_ops",
    "ops.dispatch": "kda_dispatch",
    "ops.reference": "kda_reference",
    "ops.chunked": "kda_chunked",
    "ops.conv": "kda_conv",
    "ops.step": "kda_one_step",
    "ops.context_parallel": "kda_context_parallel",
}
INSTALLED_FIRST = """

try:  # an installed deltify may have faster backends
    from deltify.ops import gated_rms_norm, kda, kda_layer_step, kda_step, short_conv, short_conv_step  # noqa: F811
except ImportError:
    pass
"""


def auto_map(config: PreTrainedConfig) -> dict[str, str]:
    """Return the entry of config.json by which the Auto classes find the code in the folder."""
    name = type(config).__name__.removesuffix("Config")
    return {
        "AutoConfig": f"configuration_deltify.{name}Config",
        "AutoModel": f"modeling_deltify.{name}Model",
        "AutoModelForCausalLM": f"modeling_deltify.{name}ForCausalLM",
    }


def write_code(folder: Path) -> None:
    """Write configuration, model and CPU operator into a saved folder as flat modules."""
    if Path(__file__).stem == FLAT["model.remote"]:
        return  # this module was loaded from a saved folder, whose code transformers copies by itself
    package = Path(__file__).parent.parent
    for module, flat in FLAT.items():
        path = package / (module.replace(".", "/") + ".py")
        path = path if path.is_file() else package / module / "__init__.py"
        home = ["deltify", *module.split(".")]
        home = home if path.name == "__init__.py" else home[:-1]
        text = re.sub(
            r"^from (\.+)([\w.]*) import",
            lambda match, home=home: f"from .{flat_name(home, match)} import",
            path.read_text(),
            flags=re.MULTILINE,
        )
        (folder / f"{flat}.py").write_text(text + (INSTALLED_FIRST if module == "ops" else ""))


def flat_name(home: list[str], match: re.Match) -> str:
    """Return the flat module for a relative import in the package `home`."""
    dots, rest = match.groups()
    package = home[: len(home) - len(dots) + 1]
    return FLAT[".".join([*package[1:], *([rest] if rest else [])])]
