"""The stages and the one training loop.

    teacher ─▶ converted ─▶ align ─▶ match ─▶ extend

align:  each layer that replaces attention gets the teacher's input of that layer and learns the teacher's output.
        Layers are independent, so each has its own backward and only one layer's graph is alive.
match:  the whole student learns the teacher's next-token distribution (forward KL).
extend: the same, on longer rows.

Legend: B batch, T tokens, N = B * T, D model width.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress as ProgressBar
from rich.progress import TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from . import checkpoint
from .checkpoint import Progress
from .config import STAGES, Recipe, Stage, read_recipe, write_recipe
from .convert import convert
from .data import Batch, Mix, TokenFile, documents, heldout_batches, split_heldout, tokenize
from .losses import linear_kl, mixer_loss
from .model import DeltifyForCausalLM
from .model.modeling import find_packing
from .teacher import Teacher, load_teacher, random_teacher

console = Console()


# ---- the whole run ---------------------------------------------------------------------------------------------------


def distill(
    recipe: Recipe, *, resume: bool = False, max_minutes: float | None = None, stages: tuple[str, ...] = STAGES
) -> Path:
    """Runs a recipe and returns its folder, which holds a loadable model for each stage, metrics.jsonl and checkpoints.

    Args:
        resume: go on where an earlier run of the same recipe stopped; the numbers are those of an unbroken run.
        max_minutes: stop training after this time; the stage that was going on is saved as it is then, and a later
            resume takes it up again.
        stages: the stages to run; none of them to convert only.

    Raises:
        FileExistsError: if the folder holds a run and `resume` was not asked for.
        ValueError: if the run there was made from another recipe; names the fields that differ.
        FloatingPointError: if the loss or a gradient is not finite; says at which step.
    """
    started = time.monotonic()
    deadline = math.inf if max_minutes is None else started + 60 * max_minutes
    open_run(recipe, resume)
    device, precision = pick_device(recipe.run.device), recipe.run.precision
    if precision == "auto":
        precision = "bf16" if fast_bf16(device) else "fp32"
    console.print(f"[bold]{recipe.name}[/]: {recipe.teacher.model} on {device}, {precision}")
    teacher = open_teacher(recipe, device, torch.bfloat16 if precision == "bf16" else torch.float32)
    train, heldout = open_data(recipe, teacher)
    heldout_rows = heldout_batches(heldout, recipe.run.heldout_length, 8, recipe.run.heldout_tokens)
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")  # noqa: E731

    student = None
    for name in ("converted", *stages):
        folder = recipe.folder / name
        if name != "converted" and not recipe.stage(name).tokens:
            continue
        if (folder / "config.json").is_file() and not (folder / "unfinished.json").is_file():
            console.print(f"{name}: done already, in {folder}")
            student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
            continue
        if name == "converted":
            student = convert_with(recipe, teacher, train)
        else:
            loop = Loop(name, recipe, teacher, student, train, heldout_rows, autocast, deadline)
            loop.run()
        student.eval()
        checkpoint.save_model(folder, student, teacher.tokenizer)
        if name == "converted":
            judged = judge(teacher, student, heldout_rows, autocast)
            Metrics(recipe).write(stage=name, step=0, tokens=0, **judged)
            console.print(f"converted: held-out KL {judged['heldout_kl']:.3f}, before any training")
        elif loop.stopped_early:
            (folder / "unfinished.json").write_text(json.dumps(asdict(loop.progress)))
            console.print(f"{name}: stopped by --max-minutes after {loop.progress.tokens:,} tokens; --resume goes on")
            break
    console.print(f"models, metrics and checkpoints are in {recipe.folder}")
    return recipe.folder


def open_run(recipe: Recipe, resume: bool) -> None:
    """Makes the run's folder, or checks that the one there was made from the same recipe."""
    saved = recipe.folder / "recipe.yaml"
    if saved.is_file():
        if not resume:
            raise FileExistsError(
                f"{recipe.folder} holds a run already; add --resume to go on with it, or --name for another folder"
            )
        old, new = flatten(asdict(read_recipe(saved))), flatten(asdict(recipe))
        free = ("run.", "output")
        if changed := [key for key in new if old.get(key) != new[key] and not key.startswith(free)]:
            changes = ", ".join(f"{key}: {old.get(key)!r} then, {new[key]!r} now" for key in changed)
            raise ValueError(f"{recipe.folder} was made from another recipe ({changes}); use another --name")
    recipe.folder.mkdir(parents=True, exist_ok=True)
    write_recipe(recipe, saved)


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and key != "train"
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def pick_device(wanted: str) -> torch.device:
    if wanted != "auto":
        return torch.device(wanted)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 here: on GPUs, and on CPUs with AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)


def open_teacher(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Teacher:
    spec = recipe.teacher
    if spec.model.startswith("random:"):
        return random_teacher(spec.model.removeprefix("random:"))
    teacher = load_teacher(
        spec.model, dtype=dtype, device=device, trust_remote_code=spec.trust_remote_code, revision=spec.revision
    )
    longest = teacher.config.max_position_embeddings
    for name in STAGES:
        stage = recipe.stage(name)
        if stage.tokens and stage.length > longest and (name != "extend" or stage.ce_weight == 0):
            raise ValueError(
                f"{name}.length={stage.length} is longer than the teacher can read ({longest}); make it shorter, or "
                "give extend a ce_weight above 0"
            )
    return teacher


def open_data(recipe: Recipe, teacher: Teacher) -> tuple[list[TokenFile], list[TokenFile]]:
    """The training sources and the held-out texts as token files, made at the first use."""
    spec, tokenizer = recipe.data, teacher.tokenizer
    suffix = f"-{spec.max_tokens}" if spec.max_tokens else ""
    folder = Path(spec.folder) / file_name(f"{recipe.teacher.model}{suffix}")
    train, held = [], []
    for source in spec.train:
        name = file_name(source)
        if spec.heldout is not None:
            train.append(tokenize(documents(source), tokenizer, folder / name, max_tokens=spec.max_tokens))
            continue
        here = folder / f"{name}-train", folder / f"{name}-heldout"
        texts = [[], []] if all((path / "meta.json").is_file() for path in here) else split_heldout(documents(source))
        train.append(tokenize(texts[0], tokenizer, here[0], max_tokens=spec.max_tokens))
        held.append(tokenize(texts[1], tokenizer, here[1], max_tokens=spec.max_tokens))
    if spec.heldout is not None:
        held = [tokenize(documents(spec.heldout), tokenizer, folder / file_name(spec.heldout))]
    return train, held


def file_name(text: str) -> str:
    """A text as a file name."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in text).strip("._")


def convert_with(recipe: Recipe, teacher: Teacher, train: list[TokenFile]) -> DeltifyForCausalLM:
    spec = recipe.student
    rows = max(1, spec.calibration_tokens // spec.calibration_length)
    mix = Mix(train, list(recipe.data.train.values()), spec.calibration_length, rows, recipe.seed)
    return convert(
        teacher,
        full_attention_layers=spec.full_attention_layers,
        keep_rope=spec.keep_rope,
        sliding_window=spec.sliding_window,
        sink_tokens=spec.sink_tokens,
        start=spec.start,
        calibration=mix.batch(0),
        seed=recipe.seed,
        report=lambda line: console.print(line, highlight=False, soft_wrap=True),
    )


# ---- one stage -------------------------------------------------------------------------------------------------------


class Loop:
    """One stage of training: from its last checkpoint, if there is one, to its last step."""

    def __init__(self, name, recipe, teacher, student, train, heldout, autocast, deadline):
        self.name, self.recipe, self.stage = name, recipe, recipe.stage(name)
        self.teacher, self.student, self.heldout, self.autocast = teacher, student, heldout, autocast
        self.deadline, self.stopped_early = deadline, False
        stage = self.stage
        seed = recipe.seed + STAGES.index(name)
        self.mix = Mix(train, list(recipe.data.train.values()), stage.length, stage.batch, seed)
        self.steps = stage.tokens // (stage.batch * stage.length)
        self.optimizer = make_optimizer(student, stage, name)
        self.metrics = Metrics(recipe)
        self.progress = Progress(name, 0, 0, 0.0)
        if stage.checkpoint_layers and name != "align":
            student.gradient_checkpointing_enable()

    def run(self) -> None:
        """Trains; leaves the student with the last step's weights."""
        run, stage = self.recipe.run, self.stage
        if saved := checkpoint.checkpoints(self.recipe.folder, self.name):
            self.progress = checkpoint.load_checkpoint(saved[-1], self.student, self.optimizer)
            console.print(f"{self.name}: going on from step {self.progress.step}")
            self.metrics.cut(self.name, self.progress.step)
        device = self.student.device
        self.student.train()
        last_save = last_clock = time.monotonic()
        with progress_bar(self.name, self.steps) as show:
            for step in range(self.progress.step, self.steps):
                set_learning_rates(self.optimizer, stage, step, self.steps)
                losses = self.accumulate(self.mix.batch(step).to(device))
                norm = nn.utils.clip_grad_norm_(trained(self.optimizer), stage.clip)
                self.check_finite(step, losses, norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)

                now = time.monotonic()
                tokens = self.progress.tokens + stage.batch * stage.length
                spent, last_clock = now - last_clock, now
                self.progress = replace(
                    self.progress, step=step + 1, tokens=tokens, seconds=self.progress.seconds + spent
                )
                record = {"stage": self.name, "step": step + 1, "tokens": tokens, **losses, "grad_norm": float(norm)}
                rates = {f"lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups}
                speed = stage.batch * stage.length / spent
                last_step = step + 1 == self.steps
                self.stopped_early = not last_step and now > self.deadline
                if (step + 1) % run.heldout_steps == 0 or last_step or self.stopped_early:
                    record |= self.judge()
                    last_clock = time.monotonic()
                self.metrics.write(**record, **rates, tokens_per_second=speed, seconds=self.progress.seconds)
                show(step + 1, losses["loss"], speed)
                due = now - last_save > 60 * run.checkpoint_minutes
                due = due or (run.checkpoint_steps and (step + 1) % run.checkpoint_steps == 0)
                if (due and not last_step) or self.stopped_early:
                    self.save()
                    last_save = last_clock = time.monotonic()
                if self.stopped_early:
                    return

    def accumulate(self, batch: Batch) -> dict[str, float]:
        """Adds the gradients of a batch, micro-batch by micro-batch; returns the mean losses."""
        rows = self.stage.micro_batch or self.stage.batch
        parts = [Batch(*pair) for pair in zip(batch.input_ids.split(rows), batch.position_ids.split(rows))]
        compute = align_step if self.name == "align" else match_step
        with self.autocast():
            losses = [compute(self.teacher, self.student, part, self.stage, 1 / len(parts)) for part in parts]
        return {key: sum(float(loss[key]) for loss in losses) / len(losses) for key in losses[0]}

    def check_finite(self, step: int, losses: dict[str, float], norm: Tensor) -> None:
        if math.isfinite(losses["loss"]) and math.isfinite(float(norm)):
            return
        saved = checkpoint.checkpoints(self.recipe.folder, self.name)
        raise FloatingPointError(
            f"{self.name}, step {step}: loss {losses['loss']}, gradient norm {float(norm)}; no update was made. "
            f"The last good checkpoint is {saved[-1] if saved else 'the folder of the stage before'}; lower "
            f"{self.name}.lr_mixers and --resume"
        )

    def judge(self) -> dict[str, float]:
        self.student.eval()
        judged = judge(self.teacher, self.student, self.heldout, self.autocast)
        self.student.train()
        if self.progress.best_kl is None or judged["heldout_kl"] < self.progress.best_kl:
            self.progress = replace(self.progress, best_kl=judged["heldout_kl"], best_step=self.progress.step)
        console.print(
            f"{self.name}: {self.progress.tokens:>12,} tokens, held-out KL {judged['heldout_kl']:.3f}, "
            f"perplexity {judged['heldout_perplexity']:.1f}",
            highlight=False,
        )
        return judged

    def save(self) -> None:
        folder = self.recipe.folder
        checkpoint.save_checkpoint(
            checkpoint.checkpoint_folder(folder, self.progress), self.student, self.optimizer, self.progress
        )
        checkpoint.prune(folder, self.name, self.recipe.run.keep, self.progress.best_step)


def align_step(teacher: Teacher, student: DeltifyForCausalLM, batch: Batch, stage: Stage, scale: float):
    """Runs the teacher; behind each of its attention layers, the student's mixer there learns its output."""
    losses = []

    def learn(module, args, kwargs, output):
        layer = student.model.layers[module.layer_idx]
        if not any(p.requires_grad for p in layer.self_attn.parameters()):
            return  # attention that keeps its positions has nothing to learn yet
        hidden = kwargs["hidden_states"].detach()
        with torch.enable_grad():
            if layer.linear:
                out = layer.self_attn(hidden, None, packing)
            else:
                out, _ = layer.self_attn(hidden, kwargs["position_embeddings"], kwargs["attention_mask"], None)
            loss = mixer_loss(out, output[0])
            with torch.autocast(hidden.device.type, enabled=False):
                (loss * scale).backward()
        losses.append(loss.detach())

    packing = find_packing(None, batch.position_ids, batch.input_ids.shape[1], cached=False)
    hooks = [layer.self_attn.register_forward_hook(learn, with_kwargs=True) for layer in teacher.model.model.layers]
    try:
        with torch.no_grad():
            teacher.model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {"loss": torch.stack(losses).mean()}


def match_step(teacher: Teacher, student: DeltifyForCausalLM, batch: Batch, stage: Stage, scale: float):
    """Forward KL of the whole student, with a share of cross-entropy if the stage asks for it."""
    with torch.no_grad():
        wanted = hidden_states(teacher.model, batch)
    labels = next_tokens(batch).flatten() if stage.ce_weight else None
    loss, kl, ce = linear_kl(
        hidden_states(student, batch),
        student.lm_head.weight,
        wanted,
        teacher.model.lm_head.weight,
        labels=labels,
        ce_weight=stage.ce_weight,
    )
    with torch.autocast(loss.device.type, enabled=False):
        (loss * scale).backward()
    return {"loss": loss.detach(), "kl": kl} | ({"ce": ce} if stage.ce_weight else {})


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """Last hidden states [N, D] of a language model, documents kept apart."""
    output = model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)


def next_tokens(batch: Batch) -> Tensor:
    """[B, T] the token after each, -100 at the end of a document or row."""
    labels = F.pad(batch.input_ids[:, 1:], (0, 1), value=-100)
    return labels.masked_fill(F.pad(~batch.same_document, (0, 1), value=True), -100)


@torch.no_grad()
def judge(teacher: Teacher, student: nn.Module, heldout: list[Batch], autocast: Callable) -> dict[str, float]:
    """Token KL and perplexity on held-out text."""
    kl = ce = tokens = labelled = 0.0
    for batch in heldout:
        batch = batch.to(student.device)
        labels = next_tokens(batch).flatten()
        with autocast():
            hidden, wanted = hidden_states(student, batch), hidden_states(teacher.model, batch)
            parts = linear_kl(hidden, student.lm_head.weight, wanted, teacher.model.lm_head.weight, labels=labels)
        kl += float(parts[1]) * labels.numel()
        ce += float(parts[2]) * labels.numel()
        tokens += labels.numel()
        labelled += int((labels >= 0).sum())
    return {"heldout_kl": kl / tokens, "heldout_perplexity": math.exp(min(ce / labelled, 700.0))}


# ---- optimizer, learning rates, metrics ------------------------------------------------------------------------------


def make_optimizer(student: DeltifyForCausalLM, stage: Stage, name: str) -> torch.optim.AdamW:
    """AdamW over two groups, mixers and the rest; what is not trained gets no gradient."""
    mixers, rest = [], []
    for layer in student.model.layers:
        nope = layer.kind == "full_attention" and not student.config.use_rope[layer.self_attn.layer_idx]
        if layer.linear or nope:
            mixers += layer.self_attn.parameters()
    known = {id(p) for p in mixers}
    rest = [p for p in student.parameters() if id(p) not in known]
    train_rest = name != "align" and stage.lr_rest > 0
    if not mixers and not train_rest:
        raise ValueError(
            f"{name} has nothing to train: no layer of the student replaces attention; set {name}.tokens to 0"
        )
    student.requires_grad_(False)
    for parameter in mixers + (rest if train_rest else []):
        parameter.requires_grad_(True)
    groups = [("mixers", mixers, stage.lr_mixers)] + ([("rest", rest, stage.lr_rest)] if train_rest else [])
    options = []
    for group, parameters, rate in groups:
        matrices = [p for p in parameters if p.dim() == 2]
        vectors = [p for p in parameters if p.dim() != 2]
        options.append({"name": group, "params": matrices, "peak": rate, "weight_decay": stage.weight_decay})
        options.append({"name": f"{group}_vectors", "params": vectors, "peak": rate, "weight_decay": 0.0})
    return torch.optim.AdamW([o for o in options if o["params"]], lr=0.0, betas=(0.9, 0.95), fused=True)


def trained(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (p for group in optimizer.param_groups for p in group["params"])


def set_learning_rates(optimizer: torch.optim.Optimizer, stage: Stage, step: int, steps: int) -> None:
    """Linear warm-up, then cosine to `lr_end` of the peak."""
    warm = max(1, round(stage.warmup * steps))
    if step < warm:
        factor = (step + 1) / warm
    else:
        along = (step - warm) / max(1, steps - warm)
        factor = stage.lr_end + (1 - stage.lr_end) * (1 + math.cos(math.pi * along)) / 2
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


class Metrics:
    """metrics.jsonl, one line per step, and a tracker besides if the recipe names one."""

    def __init__(self, recipe: Recipe):
        self.path = recipe.folder / "metrics.jsonl"
        self.tracker = open_tracker(recipe)

    def write(self, **record) -> None:
        with self.path.open("a") as out:
            out.write(json.dumps(record) + "\n")
        if self.tracker:
            self.tracker(record)

    def cut(self, stage: str, step: int) -> None:
        """Drops lines of steps that a resumed stage is about to make again."""
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        records = [json.loads(line) for line in lines]
        kept = [r for r in records if r["stage"] != stage or r["step"] <= step]
        self.path.write_text("".join(json.dumps(r) + "\n" for r in kept))


def open_tracker(recipe: Recipe) -> Callable[[dict], None] | None:
    """A function that sends a record to the tracker that `run.log_to` names."""
    name = recipe.run.log_to
    if name is None:
        return None
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(recipe.folder / "tensorboard"))

        def send(record: dict) -> None:
            for key, value in record.items():
                if isinstance(value, int | float) and key != "step":
                    writer.add_scalar(f"{record['stage']}/{key}", value, record["step"])

        return send
    if name in ("trackio", "wandb"):
        import importlib

        tracker = importlib.import_module(name)
        tracker.init(project="deltify", name=recipe.name, config=asdict(recipe))
        return lambda record: tracker.log(record)
    raise ValueError(f"run.log_to={name!r}; choose trackio, wandb or tensorboard, or leave it out")


class progress_bar:
    """A bar with loss, tokens/s and the time left; silent where there is no terminal."""

    def __init__(self, name: str, steps: int):
        text = TextColumn("{task.description} {task.completed}/{task.total}  loss {task.fields[loss]:.3f}")
        speed = TextColumn("{task.fields[speed]:,.0f} tokens/s")
        self.bar = ProgressBar(text, speed, TimeRemainingColumn(), console=console, transient=True)
        self.task = self.bar.add_task(name, total=steps, loss=math.nan, speed=0.0)

    def __enter__(self):
        self.bar.start()
        return lambda done, loss, speed: self.bar.update(self.task, completed=done, loss=loss, speed=speed)

    def __exit__(self, *error):
        self.bar.stop()
