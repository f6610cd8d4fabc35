"""What a recipe may say: pydantic models, read from YAML, every fault reported at once.

A recipe has one section a stage (model, data, base, merge, finetune, quantize, lower, verify, probe). Unknown keys are
faults. `recipe.py` finds recipe files and applies `key=value` overrides; this module only knows what is valid.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from edge_ibtm.errors import UsageError, suggest

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Ratio = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Channels = tuple[float, float, float]
Place = Annotated[str, AfterValidator(os.path.expanduser)]  # a file or folder; ~ is the home folder, in a recipe as in a shell


class Section(BaseModel):
    """A part of a recipe; unknown keys are faults and values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which backbone, and where its weights come from."""

    name: str = Field(default="mobilevit_s", description="timm name of the backbone")
    weights: Place | None = Field(
        default=None, description="null: train the base on the data; 'pretrained': timm's hub; else a .safetensors or .pth file"
    )
    img_size: Positive | None = Field(default=None, description="side of the input in pixels; null: the backbone's own")
    num_classes: Positive | None = Field(default=None, description="null: as many as the data has; given: must match the data")
    new_head: bool = Field(
        default=False, description="the weights are of another class count: give them a new head and train it for base.epochs"
    )


class AugmentSection(Section):
    """Training transforms, named as in timm.data.create_transform."""

    hflip: Annotated[float, Field(ge=0, le=1)] = 0.5
    scale: tuple[float, float] = Field(default=(0.35, 1.0), description="random crop, share of the image's area")
    ratio: tuple[float, float] = Field(default=(0.75, 4 / 3), description="random crop, width over height")
    color_jitter: Weight = 0.0
    auto_augment: str | None = Field(default=None, description="RandAugment as timm spells it, e.g. rand-m9-mstd0.5-inc1")
    re_prob: Annotated[float, Field(ge=0, le=1)] = Field(default=0.0, description="random erasing")

    @field_validator("scale", "ratio")
    @classmethod
    def _in_order(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"give two positive numbers, the smaller first, not {list(value)}")
        return value


class DataSection(Section):
    """Labelled images, and how they are split."""

    source: Place | None = Field(
        default=None, description="folder, .tar, or torch/..., hfds/..., wds/...; null: the built-in demo set"
    )
    root: Place | None = Field(default=None, description="where torch/..., hfds/... and wds/... keep their files")
    train_split: str = "train"
    test_split: str = "validation"
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.2, description="held out when there is no test split")
    train_images: Positive | None = Field(default=None, description="at most so many training images; null: all")
    calibration_images: Positive = Field(default=64, description="set apart from the training images for quantization")
    test_images: Positive | None = Field(default=None, description="at most so many held-out images; null: all")
    class_map: Place | None = Field(default=None, description="file of class names in label order, as timm reads it")
    mean: Channels | None = Field(default=None, description="of the normalisation, in 0..1; null: as timm says of the model")
    std: Channels | None = Field(default=None, description="likewise; give both for weights that were trained with others")
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] | None = Field(
        default=None, description="how images are resized; null: as timm says of the model"
    )
    download: bool = Field(default=False, description="let timm download the data set where it can")
    workers: NonNegative = Field(default=0, description="loader processes")
    check: Literal["auto", "all", "none"] = Field(
        default="auto", description="decode every image before training; auto: when there are 20,000 or fewer"
    )
    augment: AugmentSection = AugmentSection()

    @field_validator("std")
    @classmethod
    def _above_zero(cls, value: Channels | None) -> Channels | None:
        if value is not None and min(value) <= 0:
            raise ValueError("give three numbers above 0")
        return value


class TrainSection(Section):
    """One training run: AdamW, cosine schedule, label smoothing."""

    epochs: NonNegative = 1
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Weight = 0.05
    warmup_epochs: Weight = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    batch_size: Positive = 32
    mixup: Weight = 0.0
    cutmix: Weight = 0.0
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="decay of the weight average; 0: none")
    min_lr: Weight = 1e-6
    layer_decay: Ratio | None = Field(default=None, description="layer-wise learning rate decay")
    clip_grad: Weight = 1.0
    accumulate: Positive = Field(default=1, description="micro-batches of one optimizer step")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    max_steps: Positive | None = Field(default=None, description="stop after so many optimizer steps in all")
    checkpoint_seconds: Weight = Field(default=15.0, description="at most so long between checkpoints; 0: at every step")


class BaseSection(TrainSection):
    """Training of the base model; used only when model.weights is null."""

    epochs: NonNegative = 10


class FinetuneSection(TrainSection):
    """Fine-tuning of the merged model."""

    lr: Annotated[float, Field(gt=0)] = 2e-4
    distill: Weight = Field(default=0.0, description="weight of the distillation loss from the unmerged base")
    distill_temperature: Annotated[float, Field(gt=0)] = 1.0
    lambda_ib: Weight = Field(default=0.1, description="weight of the information bottleneck bound")
    ib_start: Annotated[float, Field(ge=0, le=1)] = Field(default=0.3, description="share of the epochs before lambda_ib is on")
    ib_conditional: bool = Field(default=False, description="the conditional bound instead of the paper's")
    ib_clusters: Positive | None = Field(default=None, description="null: as many as classes")
    statistics_images: Positive = Field(default=2048, description="training images that clusters are fitted on")


class MergeSection(Section):
    """Token merging. keep_ratio is tokens kept over tokens entering, the one knob; or it is solved for a budget, macs."""

    merger: str = Field(default="ibtm", description="a name of `edge-ibtm list`")
    keep_ratio: Ratio = 0.7
    macs: Ratio | None = Field(default=None, description="share of the base's MACs to meet; solves keep_ratio")
    layout: Literal["auto", "grid", "sequence"] = "auto"
    density: Literal["auto", "block", "stage", "once", "progressive"] = "auto"


class QuantizeSection(Section):
    """PT2E quantization."""

    scheme: Literal["none", "auto", "int8", "int8_dynamic", "mixed", "qat"] = Field(
        default="auto", description="auto: int8_dynamic for models of linear layers (ViT, Swin), else int8; qat: trained on"
    )
    epochs: NonNegative = Field(default=1, description="qat: epochs with rounding in the graph; else as finetune")
    lr: Annotated[float, Field(gt=0)] = Field(default=2e-5, description="qat: learning rate")


def _all_str(names: Any) -> bool:
    return isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names)


class LowerSection(Section):
    """Artifacts to make."""

    targets: tuple[str, ...] = Field(default=("xnnpack", "coreml"), description="names of `edge-ibtm list`")
    base: bool = Field(default=True, description="lower the unmerged base too, to compare with")
    coreml_precision: Literal["fp16", "fp32", "int8w", "w8a8", "pal4", "pal6"] = "fp16"
    jobs: Positive | None = Field(default=None, description="lowerings at a time; null: by cores and free memory")

    @field_validator("targets", mode="before")
    @classmethod
    def split_commas(cls, value: Any) -> Any:
        """Accept 'xnnpack,coreml' as well as a list."""
        names = value.split(",") if isinstance(value, str) else value
        return tuple(dict.fromkeys(n.strip() for n in names if n.strip())) if _all_str(names) else value

    @field_validator("targets")
    @classmethod
    def not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """At least one target."""
        if not value:
            raise ValueError("name at least one target, e.g. xnnpack")
        return value


class VerifySection(Section):
    """Gates. A missed gate is named and the command exits 1."""

    fp32_sqnr_db: float = Field(default=80.0, description="fp32 artifact against eager")
    fp16_sqnr_db: float = Field(
        default=40.0, description="fp16 Core ML package against eager, the median image; where it can be evaluated"
    )
    agreement: Ratio = Field(default=0.98, description="share of images with the same class in a Core ML package and eager")
    int8_sqnr_db: float = Field(default=28.0, description="int8 artifact against its own converted graph")
    max_drop: Annotated[float, Field(ge=0, le=100)] = Field(
        default=2.0, description="top-1 points that a stage may lose against the previous stage"
    )
    images: Positive = Field(default=64, description="held-out images for SQNR and agreement")


class ProbeSection(Section):
    """Latency on a host or a device."""

    device: str = "host"
    threads: Positive | None = Field(default=None, description="null: every core")


class Recipe(Section):
    """A whole run of `edge-ibtm compress`."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    base: BaseSection = BaseSection()
    merge: MergeSection = MergeSection()
    finetune: FinetuneSection = FinetuneSection()
    quantize: QuantizeSection = QuantizeSection()
    lower: LowerSection = LowerSection()
    verify: VerifySection = VerifySection()
    probe: ProbeSection = ProbeSection()
    seed: NonNegative = 0

    @model_validator(mode="after")
    def has_something_to_start_from(self) -> Recipe:
        """A base that is neither loaded nor trained is random weights."""
        if self.model.weights is None and self.base.epochs == 0:
            raise ValueError("base.epochs is 0 and model.weights is null: the base would keep its random weights")
        return self


def parse_recipe(values: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Validate a mapping; raise one UsageError that lists every fault with its path.

    Errors: UsageError, one line a fault: `origin: merge.keep_ratio: ... (got 1.5)`.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{origin}: a recipe is a mapping of sections, got {type(values).__name__}")
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as err:
        faults = [_fault(e) for e in err.errors()]
        head = f"{origin}: {len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise UsageError("\n  ".join([head, *faults]) if len(faults) > 1 else f"{origin}: {faults[0]}") from None
    merge = recipe.merge
    if merge.macs is not None and "keep_ratio" in merge.model_fields_set:
        raise UsageError(
            f"{origin}: merge.macs is {merge.macs:g} and merge.keep_ratio is {merge.keep_ratio:g}, but macs solves "
            "keep_ratio; give one of them"
        )
    return recipe


def _fault(error: Any) -> str:
    """`path: what is wrong (got value)`; unknown keys get a suggestion."""
    location = tuple(p for p in error["loc"])
    path = ".".join(str(p) for p in location) or "recipe"
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key; {suggest(str(location[-1]), known_keys(location[:-1]))}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and not location:
        return message
    return f"{path}: {message[0].lower()}{message[1:]} (got {error['input']!r})"


def known_keys(path: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the section at `path`."""
    section: Any = Recipe
    for part in path:
        field = getattr(section, "model_fields", {}).get(part)
        section = field.annotation if field else None
        if section is None:
            return []
    return list(section.model_fields) if hasattr(section, "model_fields") else []


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors and CI."""
    return Recipe.model_json_schema()
