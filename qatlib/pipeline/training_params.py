"""Sections ``calibrate`` and ``qat`` of ``params.yaml``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qatlib.pipeline.params import DISTILL, OPTIMIZER, Count, Entry, Many, Name, Observer, Params, Percentile, Positive


class ComparedMethod(Params):
    """A line of ``calibrate.compare``; a name alone is its method. A percentile of None is ``calibrate.percentile``."""

    method: Observer
    percentile: Percentile | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _percentile_has_a_use(self) -> ComparedMethod:
        if self.percentile is not None and self.method != "percentile":
            raise ValueError(f"method {self.method} takes no percentile; remove it, or set method: percentile")
        return self


class AdaRoundParams(Params):
    """Learned rounding of weights; see :func:`qatlib.fake.ptq.rounding.adaround`."""

    steps: Count = 1000
    lr: Positive = 1e-2
    images: Count = 256
    batch_size: Count = 32
    regularization: Positive = 1.0
    beta: Many[Positive] = (20.0, 2.0)
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.2

    @model_validator(mode="after")
    def _beta_falls(self) -> AdaRoundParams:
        if len(self.beta) != 2 or self.beta[0] < self.beta[1]:
            raise ValueError(f"beta is {list(self.beta)}; give where it starts and, not above that, where it ends")
        return self


class CalibrateParams(Params):
    method: Observer = "percentile"
    percentile: Percentile = 99.99
    bins: Annotated[int, Field(ge=128, le=65536, multiple_of=2)] = 2048
    weight_method: Literal["min_max", "mse"] = "min_max"
    batches: Count = 32
    batch_size: Count = 64
    compare: Many[ComparedMethod] = ()
    compare_images: Count | None = None
    equalize: bool = False
    adaround: AdaRoundParams | None = None
    bn_re_estimation: bool = False
    bias_correction: bool = False


class DistillParams(Params):
    """Learning from the float model; see :class:`qatlib.fake.distill.Distillation`."""

    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    temperature: Positive = 4.0
    loss: Annotated[str, Field(pattern=DISTILL)] = "kl"


class QatParams(Params):
    epochs: Annotated[int, Field(ge=0)] = 2
    lr: Positive = 1e-3
    optimizer: Annotated[str, Field(pattern=OPTIMIZER)] = "sgd"
    optimizer_kwargs: dict[str, Any] = Field(default_factory=dict)
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 4e-5
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    milestones: Many[Annotated[float, Field(gt=0, lt=1)]] = (0.5, 0.8)
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip_grad_norm: Positive | None = None
    fake_quant: Literal["moving_average", "lsq", "pact", "tqt"] = "moving_average"
    scale_lr_factor: Positive = 1.0
    averaging_constant: Annotated[float, Field(ge=0, le=1)] = 0.01
    batch_size: Count = 128
    data_kwargs: dict[str, Any] = Field(default_factory=dict)
    loss: Entry = "torch.nn.functional:cross_entropy"
    loss_kwargs: dict[str, Any] = Field(default_factory=dict)
    distill: DistillParams | None = None
    relu6: Many[Name] = ()
    batch_norm: Literal["fold", "keep"] = "fold"
    freeze_batch_norm: Count | None = None
    forward: Literal["fake_quant", "exact"] = "fake_quant"
    amp: Literal["bf16"] | None = None
    channels_last: bool = False
    on_nan: Literal["stop", "rewind"] = "stop"
    max_rewinds: Count = 3
    max_loss_ratio: Annotated[float, Field(gt=1)] = 5.0
    integer_eval_images: Count | None = 2000
    keep_epochs: Count = 2
    hybrid: Many[Name] = ()

    @model_validator(mode="after")
    def _optimizer_is_given_its_own_settings(self) -> QatParams:
        taken = sorted({"lr", "params", "weight_decay"} & set(self.optimizer_kwargs))
        if taken:
            fix = "; ".join(f"set qat.{name}" if name != "params" else "leave out params" for name in taken)
            raise ValueError(f"optimizer_kwargs has {', '.join(taken)}, which the training passes itself: {fix}")
        return self

    @model_validator(mode="after")
    def _batch_norm_is_one_that_forward_knows(self) -> QatParams:
        if self.freeze_batch_norm is not None and self.batch_norm == "fold":
            raise ValueError("freeze_batch_norm is set, but batch_norm is fold, which never has statistics of a batch")
        if self.forward == "exact" and self.batch_norm == "keep" and self.freeze_batch_norm != 1:
            fix = "set freeze_batch_norm: 1, or batch_norm: fold"
            raise ValueError(f"forward is exact, but integers have no statistics of a batch: {fix}")
        return self

    @model_validator(mode="after")
    def _milestones_increase(self) -> QatParams:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones are {list(self.milestones)}; they must increase")
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule is step but milestones is empty; give fractions such as [0.5, 0.8]")
        return self
