"""What a comparison is about: a model with its two texts, and the settings that all of its cells share."""

import gc
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from sparsify.calibration import Calibration
from sparsify.evals.generation_check import Continuations, GenerationSettings, continue_greedily, cut_prompts
from sparsify.fingerprint import weights_sha256
from sparsify.models import load_dense, load_tokenizer
from sparsify.runtime import dense
from sparsify.text import Windows, read_text, windows


@dataclass(frozen=True)
class Subject:
    """A model and its two texts, as specs (sparsify.models, sparsify.text)."""

    model: str
    calibration: str
    evaluation: str

    @property
    def name(self) -> str:
        """The model's name without the folders of one machine."""
        return Path(self.model).name if Path(self.model).is_dir() else self.model


@dataclass(frozen=True)
class Settings:
    """How texts become windows and where the model runs, the same for all cells of a run.

    limit: evaluation windows at most; sequences: calibration windows; generation: None leaves the check out.
    """

    seq_len: int = 256
    stride: int | None = None
    limit: int | None = None
    sequences: int = 32
    batch_size: int = 8
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    generation: GenerationSettings | None = None


@dataclass
class LoadedSubject:
    """A subject with its texts as tokens; calibrations by seed."""

    subject: Subject
    settings: Settings
    windows: Windows
    calibrations: dict[int, Calibration]
    model_sha256: str = ""
    _continuations: Continuations | None = field(default=None, repr=False)

    def load(self) -> PreTrainedModel:
        """Loads the dense model anew."""
        # Native decoding ties a model to itself: without this, two of them would be in memory.
        gc.collect()
        settings = self.settings
        return load_dense(
            self.subject.model,
            dtype=settings.dtype,
            device=settings.device,
            trust_remote_code=settings.trust_remote_code,
        )

    def dense_continuations(self, model: PreTrainedModel, settings: GenerationSettings) -> Continuations:
        """Returns what the dense model writes after the prompts: made once, by the first model that needs them."""
        if self._continuations is None:
            with dense(model):
                self._continuations = continue_greedily(model, cut_prompts(self.windows, settings), settings)
        return self._continuations


def load_subject(subject: Subject, settings: Settings, seeds: int) -> LoadedSubject:
    """Reads both texts and the model's weights; calibration windows are drawn with seeds 0 .. seeds−1.

    Raises SparsifyError for an unknown model or text, and for settings that they cannot meet.
    """
    tokenizer = load_tokenizer(subject.model, trust_remote_code=settings.trust_remote_code)
    text, source = read_text(subject.evaluation), read_text(subject.calibration)
    evaluation = windows(text, tokenizer, seq_len=settings.seq_len, stride=settings.stride, limit=settings.limit)
    sizes = {"sequences": settings.sequences, "seq_len": settings.seq_len}
    calibrations = {seed: Calibration.from_text(source, tokenizer, **sizes, seed=seed) for seed in range(seeds)}
    loaded = LoadedSubject(subject, settings, evaluation, calibrations)
    model = loaded.load()
    if settings.generation is not None:
        settings.generation.check(model, evaluation)
    loaded.model_sha256 = weights_sha256(model)
    return loaded
