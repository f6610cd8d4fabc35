"""The stages that make a model: check, data, base, merge, finetune, quantize.

Each takes a `Context` and the folder it may write into, and returns a JSON record. Upstream results are read from disk,
so a stage does not care whether they were just made or cached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_ibtm.cache import Entry
from edge_ibtm.checkpoint import MergeSpec, ModelSpec, build, is_merged, load_into, read_state, save_state
from edge_ibtm.config import Recipe, TrainSection
from edge_ibtm.errors import EdgeIBTMError, UsageError
from edge_ibtm.watch import Watch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edge_ibtm.data import Data

WEIGHTS = "weights.safetensors"
CONVERTED = "converted.pt2"
COMPARED = 64  # held-out images on which an 8-bit graph is compared with its model


@dataclass
class Context:
    """What the stages of one run share: the recipe, the finished entries by stage name, and who watches."""

    recipe: Recipe
    watch: Watch
    done: dict[str, Entry] = field(default_factory=dict)
    _data: Any = None

    @property
    def data(self) -> Data:
        """The images, opened on first use."""
        if self._data is None:
            from edge_ibtm.data import load_data, view_of

            model = self.recipe.model
            self._data = load_data(self.recipe.data, view_of(model.name, model.img_size), seed=self.recipe.seed)
        return self._data

    @cached_property
    def files(self) -> str:
        """Fingerprint of the data source's files; a large folder is walked once."""
        from edge_ibtm.data_sources import fingerprint

        return fingerprint(self.recipe.data)

    def spec(self, stage: str) -> ModelSpec:
        """How the model that a stage produced is built."""
        return ModelSpec.from_json(self.done[stage].record["spec"])

    def model(self, stage: str) -> nn.Module:
        """The model that a stage produced, eval mode."""
        return build(self.spec(stage), self.done[stage].file(WEIGHTS))

    def reporter(self, stage: str) -> Callable[..., None]:
        """A progress callback bound to a stage."""
        return lambda done, total, note="": self.watch.progress(stage, done, total, note)


def preflight(recipe: Recipe) -> dict[str, Any]:
    """Fail before any work: unknown model, merger, target or device; weights that cannot be read; mergers that do not fit
    the model. Returns target -> suffix.

    Errors: UsageError.
    """
    from edge_ibtm.backbones import build_model
    from edge_ibtm.data import view_of
    from edge_ibtm.names import check_names
    from edge_ibtm.surgery import insert_mergers
    from edge_ibtm.targets import TARGETS

    check_names(recipe)
    size = recipe.model.img_size
    model = build_model(recipe.model.name, img_size=size)
    insert_mergers(model, **recipe.merge.model_dump(), img_size=view_of(recipe.model.name, size).img_size)
    weights = recipe.model.weights
    if weights not in (None, "pretrained") and is_merged(read_state(str(weights))):
        raise UsageError(f"weights {weights!r} are those of a merged model; give those of its base")
    return {"suffixes": {name: target.suffix for name, target in TARGETS.items()}}


def make_data(context: Context, folder: Path) -> dict[str, Any]:
    """Open and split the data; the record says how many images each part has and how they are viewed."""
    import json

    from edge_ibtm.data import check_classes
    from edge_ibtm.files import write_text

    data, section = context.data, context.recipe.data
    check_classes(context.recipe.model.num_classes, data)
    parts = {"train": data.train, "calibration": data.calibration, "test": data.test}
    write_text(folder / "splits.json", json.dumps({k: v.names() for k, v in parts.items()}, indent=0))
    return {
        "source": section.source or "built-in demo set: scikit-learn digits, 8x8 grey, upscaled",
        "classes": list(data.class_names),
        "images": {k: len(v) for k, v in parts.items()},
        "img_size": data.img_size,
        "mean": list(data.mean),
        "std": list(data.std),
        "interpolation": section.interpolation,
        "files": context.files,  # with augment: later stages, which read this record, see what they are trained on
        "augment": section.augment.model_dump(),
    }


def make_base(context: Context, folder: Path) -> dict[str, Any]:
    """Load the base model, or train it on the data when there are no weights."""
    from edge_ibtm.backbones import build_model

    section, data = context.recipe.model, context.data
    spec = ModelSpec(section.name, data.num_classes, data.img_size)
    train = section.weights is None or section.new_head
    history: dict[str, Any] = {}
    if section.weights == "pretrained" and not section.new_head:
        model = _pretrained(spec)
    else:
        _seed(context.recipe.seed)
        model = build_model(spec.name, num_classes=spec.num_classes, img_size=spec.img_size)
        if section.weights is not None:
            state = _pretrained_state(section.name) if section.weights == "pretrained" else read_state(section.weights)
            load_into(model, state, section.weights, new_head=section.new_head)
    if train:
        history = _train(context, "base", model, context.recipe.base, folder)
    save_state(model, folder / WEIGHTS)
    origin = "trained here on the data" if section.weights is None else f"weights: {section.weights}"
    origin += ", new head trained on the data" if section.weights and section.new_head else ""
    return {**_figures(context, model, spec), "origin": origin, **history}


def make_merge(context: Context, folder: Path) -> dict[str, Any]:
    """Put mergers into the base; no training yet."""
    merge = context.recipe.merge
    from edge_ibtm.surgery import insert_mergers, schedule

    chosen, base = MergeSpec(merge.merger, merge.keep_ratio, merge.layout, merge.density), context.spec("base")
    _seed(context.recipe.seed)
    model = context.model("base")
    insert_mergers(model, **asdict(chosen), macs=merge.macs, img_size=base.img_size)
    steps = schedule(model, base.img_size)
    if merge.macs is not None:
        chosen = replace(chosen, keep_ratio=[step.keep_ratio for step in steps])
        context.watch.note(f"macs {merge.macs:g} of the base is met by: {'; '.join(map(str, steps))}")
    spec = base.merged(chosen)
    fill = context.recipe.finetune.model_copy(update={"epochs": 0})
    _train(context, "merge", model, fill, folder)  # no step: only the statistics the mergers stand on
    save_state(model, folder / WEIGHTS)
    return {**_figures(context, model.eval(), spec), "schedule": [asdict(step) for step in steps]}


def make_finetune(context: Context, folder: Path) -> dict[str, Any]:
    """Fine-tune the merged model; with distillation the base is the teacher."""
    section = context.recipe.finetune
    model = context.model("merge")
    teacher = context.model("base") if section.distill > 0 and section.epochs else None
    history = _train(context, "finetune", model, section, folder, teacher) if section.epochs else {"epochs": 0}
    save_state(model, folder / WEIGHTS)
    return {**_figures(context, model, context.spec("merge")), **history}


def make_quantize(context: Context, folder: Path) -> dict[str, Any]:
    """Quantize the fine-tuned model with calibration images; the converted graph is kept as an exported program."""
    import torch

    from edge_ibtm.files import replacing
    from edge_ibtm.quantize import quantize
    from edge_ibtm.quantize_sensitivity import sqnr_db

    scheme, data = context.recipe.quantize.scheme, context.data
    images = list(stacked(data.calibration).split(1))
    model = context.model("finetune")
    converted = _trained_on(context, model, images, folder) if scheme == "qat" else quantize(model, images, scheme=scheme)
    choice = str(getattr(converted, "meta", {}).get("quantization", "")) or None
    program = torch.export.export(converted, (images[0],))
    try:
        with replacing(folder / CONVERTED) as name:
            torch.export.save(program, name)
    except RuntimeError as err:  # torch's own writer on a full disk
        reason = (str(err).splitlines() or ["?"])[0]
        raise EdgeIBTMError(f"cannot write {folder / CONVERTED}: {reason}; free space or choose another --out") from None
    run = _pieces(converted)
    correct, count = count_correct(run, data, report=context.reporter("quantize"))
    found: dict[str, Any] = {"top1": 100 * correct / count, "images": count}
    if scheme != "qat":  # what was trained on is meant to differ from its model
        held_out = stacked(data.test, COMPARED)
        with torch.no_grad():
            found["sqnr_db"] = sqnr_db(model(held_out), run(held_out))
    return {"scheme": scheme, "calibration_images": len(images), "choice": choice, **found}


def _trained_on(context: Context, model: nn.Module, images: list[Tensor], folder: Path) -> nn.Module:
    """The 8-bit graph of a model that was trained on with rounding in it, as `finetune` trains, from few images at a time."""
    from edge_ibtm.quantize_qat import quantize_qat

    tune, section = context.recipe.finetune, context.recipe.quantize
    size = min(tune.batch_size, len(images))
    train = tune.model_copy(update={
        "epochs": section.epochs, "lr": section.lr, "batch_size": size, "accumulate": 1, "warmup_epochs": 0.0,
        "lambda_ib": 0.0, "ema": 0.0, "layer_decay": None,
    })  # fmt: skip
    teacher = model if tune.distill else None

    def finetune(graph: nn.Module) -> None:
        _train(context, "quantize", graph, train, folder, teacher)

    return quantize_qat(model, images, finetune, batch_size=size)


def stacked(part: Any, most: int | None = None) -> Tensor:
    """The images [n, 3, H, W] of a part of the data, the first `most` of them."""
    import torch

    return torch.stack([part[i][0] for i in range(min(len(part), most or len(part)))])


def load_converted(path: Path) -> nn.Module:
    """The converted graph that the quantize stage wrote."""
    import executorch.exir  # noqa: F401  registers the operators of quantized graphs
    import torch
    import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401

    return torch.export.load(path).module()


def count_correct(
    predict: Callable[..., Any],
    data: Data,
    *,
    limit: int | None = None,
    report: Callable[..., None] = lambda *a: None,
) -> tuple[int, int]:
    """(correct, all) over the held-out images; predict: images [B, 3, H, W] -> logits [B, classes]."""
    import torch
    from torch.utils.data import DataLoader, Subset

    count = min(limit or len(data.test), len(data.test))
    correct, seen = 0, 0
    with torch.no_grad():
        for images, labels in DataLoader(Subset(data.test, range(count)), batch_size=32):
            correct += int((predict(images).argmax(-1) == labels).sum())
            seen += len(labels)
            report(seen, count)
    return correct, seen


def _pieces(model: nn.Module) -> Callable[..., Any]:
    """A captured graph takes one image at a time."""
    import torch

    return lambda images: torch.cat([model(image[None]) for image in images])


def _figures(context: Context, model: nn.Module, spec: ModelSpec) -> dict[str, Any]:
    """Top-1 on the held-out images, MACs, parameters and bytes of weights of an eager model."""
    from edge_ibtm.macs import count_macs

    correct, count = count_correct(model.eval(), context.data)
    return {
        "spec": spec.to_json(),
        "top1": 100 * correct / count,
        "images": count,
        "macs": int(count_macs(model, spec.img_size)),
        "params": sum(p.numel() for p in model.parameters()),
        "bytes": sum(t.numel() * t.element_size() for t in model.state_dict().values()),
    }


def _train(
    context: Context, stage: str, model: nn.Module, section: TrainSection, folder: Path, teacher: Any = None
) -> dict[str, Any]:
    """Run `finetune` with checkpoints under the stage's scratch folder, which an interrupted run finds again."""
    from edge_ibtm.finetune import FinetuneConfig, finetune

    settings = section.model_dump()
    if teacher is None:
        settings["distill"] = 0.0
    config = FinetuneConfig(
        **settings,
        seed=context.recipe.seed,
        workers=context.recipe.data.workers,
        checkpoint_dir=folder / "scratch" / "checkpoints",
    )
    report = context.reporter(stage)

    def progress(now: Any) -> None:
        report(
            now.epoch * now.steps + now.step,
            now.epochs * now.steps,
            f"epoch {now.epoch + 1}/{now.epochs}, loss {now.loss:.3f}, {now.images_per_second:.0f} images/s",
        )

    history = finetune(model, context.data.train, None, config, teacher=teacher, progress=progress)
    return {"epochs": section.epochs, "history": asdict(history)}


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _pretrained(spec: ModelSpec) -> nn.Module:
    from timm.models import get_pretrained_cfg

    from edge_ibtm.backbones import build_model

    cfg = get_pretrained_cfg(spec.name)
    classes = cfg.num_classes if cfg is not None else spec.num_classes
    if classes != spec.num_classes:
        raise UsageError(
            f"the pretrained {spec.name} has {classes} classes and the data has {spec.num_classes}: give data with the same "
            "classes (data.class_map orders them), or model.new_head=true to train a new head"
        )
    return build_model(spec.name, num_classes=spec.num_classes, weights="pretrained", img_size=spec.img_size)


def _pretrained_state(name: str) -> Mapping[str, Any]:
    from timm.models import get_pretrained_cfg

    cfg = get_pretrained_cfg(name)
    if cfg is None:
        raise UsageError(f"timm has no pretrained weights of {name!r}; give --weights FILE")
    return _pretrained(ModelSpec(name, cfg.num_classes, cfg.input_size[-1])).state_dict()
