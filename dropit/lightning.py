"""DropIT in anybody's Lightning Trainer: CacheMonitor measures, DropITCallback converts and measures.

The one part of the library that needs Lightning; ``dropit`` imports it when one of its names is asked for.
"""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dropit.convert import from_dropit, to_dropit
from dropit.memory import CacheMeter

MIB = 2**20
_PACKAGES = ("pytorch_lightning", "lightning.pytorch")  # the same code under two names, with classes of its own each
_NO_BACKWARD = "retain=False"  # what CacheMeter's error names when a backward pass begins


def _find_package() -> str:
    """The name that the process knows Lightning by already, or else one that is installed."""
    for name in _PACKAGES:
        if sys.modules.get(name) is not None:
            return name
    for name in _PACKAGES:
        try:
            import_module(name)
        except ModuleNotFoundError:
            continue
        return name
    raise ImportError("dropit's callbacks need Lightning: pip install pytorch-lightning")


if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.utilities.compile import to_uncompiled
    from pytorch_lightning.utilities.seed import isolate_rng
else:
    _package = _find_package()
    Callback = import_module(_package).Callback
    LightningModule = import_module(_package).LightningModule
    to_uncompiled = import_module(f"{_package}.utilities.compile").to_uncompiled
    isolate_rng = import_module(f"{_package}.utilities.seed").isolate_rng


class CacheMonitor(Callback):
    """Measure what the first step of each epoch saves for backward, and what the plain model would save.

    It logs dropit/cache_mb and dropit/dense_mb (MiB, of this process), and dropit/cache_ratio. Both are measured when
    the step's first backward pass begins. dense_mb comes from one more forward pass, of the plain model, run eagerly;
    it keeps nothing for backward and leaves weights, buffers, metrics and random numbers as they were. Where a plain
    step cannot be taken (a sharded model, a training_step that reads a dataloader_iter) dense_mb is nan and not logged.

    Attributes:
        cache_mb: MiB that the last measured step saved.
        dense_mb: MiB that the plain model would have saved; nan if unknown.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[CacheMonitor()], logger=False, enable_checkpointing=False)
    """

    def __init__(self) -> None:
        self.cache_mb = self.dense_mb = float("nan")
        self._meter: CacheMeter | None = None
        self._epoch = -1  # that was measured last
        self._step = 0

    @property
    def cache_ratio(self) -> float:
        """Return the cache as a part of the plain model's."""
        return self.cache_mb / self.dense_mb if self.dense_mb else float("nan")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Measure the first epoch of this fit, whatever was measured in another."""
        self._epoch = -1

    def state_dict(self) -> dict[str, Any]:
        """Keep in checkpoints what was measured, and of which epoch."""
        return {"cache_mb": self.cache_mb, "dense_mb": self.dense_mb, "epoch": self._epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A run that is resumed in the middle of an epoch does not measure that one again."""
        self.cache_mb, self.dense_mb, self._epoch = (state_dict[name] for name in ("cache_mb", "dense_mb", "epoch"))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before a step that is measured."""
        if self._epoch != trainer.current_epoch:
            self._step = trainer.global_step
            self.dense_mb = self.measure_dense(trainer, pl_module, batch, batch_idx)
            self._meter = CacheMeter(pl_module).__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After it; CacheMeter has counted when backward began."""
        if self._meter is None:
            return
        self._stop()
        self._epoch = trainer.current_epoch
        if self.cache_mb:  # 0 where training_step left the batch out
            self.log_cache(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave no hook behind."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._stop()

    def _stop(self) -> None:
        if self._meter is not None:
            self._meter.__exit__()
            self.cache_mb = self._meter.total_bytes / MIB
            self._meter = None

    def measure_dense(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> float:
        """Return the MiB that this step of the plain model would save, or nan; for each epoch, as batches differ.

        The random numbers that it draws are those that the step itself will draw.
        """
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"), _kept_gradients(pl_module.parameters()):
            try:
                return _plain_bytes(trainer, pl_module, copy.deepcopy(batch), batch_idx) / MIB
            except Exception as error:  # somebody's training must not end because of a measurement
                warnings.warn(f"dropit/dense_mb is not known: a step of the plain model failed: {error}", stacklevel=2)
                return float("nan")

    def log_cache(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give what was measured to the progress bar and the loggers."""
        tags = {"cache_mb": self.cache_mb, "dense_mb": self.dense_mb, "cache_ratio": self.cache_ratio}
        metrics = {f"dropit/{tag}": value for tag, value in tags.items() if value == value}
        for tag, value in metrics.items():
            pl_module.log(tag, value, prog_bar=tag == "dropit/cache_mb", logger=False)
        # Not by log(): it reaches the loggers every so many steps only, and an epoch's first is seldom one of them.
        for logger in trainer.loggers:
            logger.log_metrics(metrics, self._step)


class DropITCallback(CacheMonitor):
    """Train the LightningModule with DropIT layers, from the start of a fit to its end, and measure what they save.

    After the fit, after an exception too, the layers are plain again. Checkpoints have the plain model's keys.

    Args:
        strategy, gamma, options: As in :func:`dropit.to_dropit`.
        module: Name of the submodule to convert, as in ``"model"``; "" for the whole module.

    Raises:
        ValueError: At the start of a fit, where ``to_dropit`` does or there is no such submodule.

    Example:
        >>> callback = DropITCallback(gamma=0, compress="int8")
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(self, strategy: str = "fastmink", gamma: float = 0.9, *, module: str = "", **options: Any) -> None:
        super().__init__()
        self._strategy, self._gamma, self._options = strategy, gamma, options
        self._name = module
        self._modules = 0  # in the converted model; 0 where none is

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert what is there."""
        super().setup(trainer, pl_module, stage)
        prefix = self._name and f"{self._name}."
        if stage == "fit" and any(name.startswith(prefix) for name, _ in pl_module.named_parameters()):
            self._convert(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Convert what the LightningModule has made since, in its setup or configure_model."""
        if _count(self._target(pl_module)) != self._modules:
            self._convert(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the layers plain again."""
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As at the end, which Lightning does not come to."""
        super().on_exception(trainer, pl_module, exception)
        self._restore(pl_module)

    def _convert(self, pl_module: LightningModule) -> None:
        target = self._target(pl_module)
        to_dropit(target, self._strategy, self._gamma, **self._options)
        self._modules = _count(target)

    def _restore(self, pl_module: LightningModule) -> None:
        if self._modules:
            from_dropit(self._target(pl_module))
            self._modules = 0

    def _target(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self._name)
        except AttributeError as error:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(
                f"DropITCallback(module={self._name!r}): {type(pl_module).__name__} has {names}"
            ) from error


def _count(module: nn.Module) -> int:
    return sum(1 for _ in module.modules())


def _plain_bytes(trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> int:
    plain = _plain_copy(trainer, pl_module)
    arguments = (batch, batch_idx) if len(inspect.signature(plain.training_step).parameters) > 1 else (batch,)
    # A compiler would compile the copy again in every epoch.
    with torch.compiler.set_stance("force_eager"), trainer.precision_plugin.train_step_context():
        try:
            with CacheMeter(plain, retain=False) as meter:
                output = plain.training_step(*arguments)
                loss = output.get("loss") if isinstance(output, Mapping) else output
                del output  # Lightning frees all else before backward
            del loss
        except RuntimeError as error:
            if _NO_BACKWARD not in str(error):
                raise
    return meter.total_bytes


def _plain_copy(trainer: Trainer, pl_module: LightningModule) -> LightningModule:
    """A copy that drops nothing and logs nothing, for one forward pass; it shares the weights, and data if it has any.

    A backward pass of its own ends in the error that CacheMeter raises where nothing is kept.
    """
    data = (value for value in vars(pl_module).values() if isinstance(value, (Dataset, DataLoader)))
    shared: dict[int, Any] = {id(item): item for item in (*pl_module.parameters(), *data)}
    plain = copy.deepcopy(pl_module, shared)
    from_dropit(plain)
    if plain._compiler_ctx is not None:
        to_uncompiled(plain)
    plain.trainer = trainer
    for module in plain.modules():
        if isinstance(module, LightningModule):
            vars(module).update(log=_ignore, log_dict=_ignore, manual_backward=_refuse_backward)
    return plain


def _ignore(*_: Any, **__: Any) -> None:
    pass


def _refuse_backward(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(_NO_BACKWARD)


@contextmanager
def _kept_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Manual optimization sets gradients to None and freezes the other optimizers' parameters before its backward."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    try:
        yield
    finally:
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
