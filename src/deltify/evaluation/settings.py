"""Settings of an evaluation: one dataclass for each measure, and one for all of them."""

from dataclasses import dataclass
from pathlib import Path

from ..data.sources import PYTHON_DOCS


@dataclass(frozen=True)
class BenchmarkSpec:
    """Benchmarks that run through lm-eval.

    Args:
        tasks: Names of lm-eval tasks. "mmlu@5" is mmlu with five examples in the prompt.
        limit: Number of items of each task. Defaults to all.
        data: Folder with the tasks' data as JSON lines. Defaults to the Hugging Face hub.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    data: str | Path | None = None

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} must be 1 or more items. Without a limit, all items are used.")

    @property
    def folder(self) -> Path | None:
        return None if self.data is None else Path(self.data)


@dataclass(frozen=True)
class NeedleSpec:
    """Needles in haystacks, the niah tasks of RULER.

    Args:
        tasks: Names of RULER's needle tasks, such as niah_single_1.
        lengths: Numbers of tokens that prompt and answer take together.
        samples: Number of samples of each task and length.
        haystack: Source of the text that hides the needles.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...] = (1024, 4096)
    samples: int = 16
    haystack: str | Path = PYTHON_DOCS


@dataclass(frozen=True)
class PositionSpec:
    """Perplexity and KL to the teacher by position in long documents.

    Args:
        source: Source of the documents, as in `data.train` of a recipe.
        max_tokens: Number of tokens read of each document.
        documents: Number of documents. The longest of the source's first `20 * documents` are taken.
    """

    source: str | Path
    max_tokens: int = 8192
    documents: int = 4

    def __post_init__(self):
        if self.max_tokens < 2 or self.documents < 1:
            raise ValueError(
                f"Books: {self.max_tokens} tokens of {self.documents} documents. At least 2 tokens of 1 document are "
                "needed."
            )


@dataclass(frozen=True)
class RecallSpec:
    """The recall curve: log-probability of tokens that repeat earlier ones, by their distance.

    Args:
        max_tokens: Number of tokens of the longest documents, 512 to 65,536.
        samples: Number of documents of each kind and length. Lengths are 512, its doublings, and `max_tokens`.
        haystack: Source of the text that hides needles and facts.

    Raises:
        ValueError: If `max_tokens` or `samples` is out of range.
    """

    max_tokens: int = 16384
    samples: int = 8
    haystack: str = PYTHON_DOCS

    def __post_init__(self):
        if not 512 <= self.max_tokens <= 65_536:
            raise ValueError(f"Recall with documents of {self.max_tokens:,} tokens: choose 512 to 65,536.")
        if self.samples < 1:
            raise ValueError(f"Recall with {self.samples} samples: choose at least 1.")


@dataclass(frozen=True)
class DecodeSpec:
    """Memory and time of decoding.

    Args:
        contexts: Numbers of tokens in the cache at which decoding is timed.
    """

    contexts: tuple[int, ...]


@dataclass(frozen=True)
class EvaluationSpec:
    """What an evaluation measures, and where it runs. Measures that are None are left out.

    Args:
        teacher: Hub id, folder or GGUF file of the teacher. Defaults to the teacher of the runs.
        heldout: Source of held-out text. Defaults to the held-out text of the first run.
        benchmarks: Benchmarks to run.
        needles: Needle tasks to run.
        recall: Documents of the recall curve.
        positions: Documents for perplexity and KL by position. Needs a teacher.
        decode: Contexts at which decoding is measured.
        controls: Whether to measure the teacher with a sliding window and the last student with a zeroed state, too.
        stages: Whether to score every stage of a single run on held-out text. Otherwise only the last stage is scored,
            under the name of the run.
        samples: Whether to keep greedy continuations of a few prompts.
        device: auto, cpu, cuda or mps.
        dtype: float32, bfloat16, float16, or auto (float32 on a CPU, bfloat16 elsewhere).
    """

    teacher: str | Path | None = None
    heldout: str | Path | None = None
    benchmarks: BenchmarkSpec | None = None
    needles: NeedleSpec | None = None
    recall: RecallSpec | None = None
    positions: PositionSpec | None = None
    decode: DecodeSpec | None = None
    controls: bool = True
    stages: bool = True
    samples: bool = True
    device: str = "auto"
    dtype: str = "auto"
