"""SigLiT: sigmoid-loss locked-image tuning from cached image embeddings (arXiv:2303.15343).

    experiment = siglit.load_experiment("experiment.yaml", **{"optim.lr": 1e-3})
    siglit.precompute(experiment)
    siglit.train(experiment)
    print(siglit.eval_retrieval(experiment))

Every command is a function of its name that returns a result dataclass. Names are imported when they are first used, so
that `import siglit` costs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from siglit.cache import CacheError, CacheWriter, EmbeddingCache
    from siglit.commands.cache import cache_info, cache_merge, cache_skipped, cache_verify
    from siglit.commands.cache_exchange import cache_export, cache_import
    from siglit.commands.dry_run import dry_run
    from siglit.commands.eval_fewshot import eval_fewshot
    from siglit.commands.eval_logits import eval_logits
    from siglit.commands.eval_probe import eval_probe
    from siglit.commands.eval_retrieval import eval_retrieval
    from siglit.commands.eval_zeroshot import eval_zeroshot
    from siglit.commands.plan import plan
    from siglit.commands.plot import plot
    from siglit.commands.precompute import precompute
    from siglit.commands.quickstart import quickstart
    from siglit.commands.report import report
    from siglit.commands.search import search
    from siglit.commands.tokenizer_train import tokenizer_train
    from siglit.commands.train import train
    from siglit.config import Experiment
    from siglit.errors import UserError
    from siglit.loss import SigLipLoss, sigmoid_loss
    from siglit.parsing.arguments import load_experiment

_HOMES = {
    "siglit.cache": ("CacheError", "CacheWriter", "EmbeddingCache"),
    "siglit.commands.cache": ("cache_info", "cache_merge", "cache_skipped", "cache_verify"),
    "siglit.commands.cache_exchange": ("cache_export", "cache_import"),
    "siglit.commands.dry_run": ("dry_run",),
    "siglit.commands.eval_fewshot": ("eval_fewshot",),
    "siglit.commands.eval_logits": ("eval_logits",),
    "siglit.commands.eval_probe": ("eval_probe",),
    "siglit.commands.eval_retrieval": ("eval_retrieval",),
    "siglit.commands.eval_zeroshot": ("eval_zeroshot",),
    "siglit.commands.plan": ("plan",),
    "siglit.commands.plot": ("plot",),
    "siglit.commands.precompute": ("precompute",),
    "siglit.commands.quickstart": ("quickstart",),
    "siglit.commands.report": ("report",),
    "siglit.commands.search": ("search",),
    "siglit.commands.tokenizer_train": ("tokenizer_train",),
    "siglit.commands.train": ("train",),
    "siglit.config": ("Experiment",),
    "siglit.errors": ("UserError",),
    "siglit.loss": ("SigLipLoss", "sigmoid_loss"),
    "siglit.parsing.arguments": ("load_experiment",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CacheError",
    "CacheWriter",
    "EmbeddingCache",
    "Experiment",
    "SigLipLoss",
    "UserError",
    "__version__",
    "cache_export",
    "cache_import",
    "cache_info",
    "cache_merge",
    "cache_skipped",
    "cache_verify",
    "dry_run",
    "eval_fewshot",
    "eval_logits",
    "eval_probe",
    "eval_retrieval",
    "eval_zeroshot",
    "load_experiment",
    "plan",
    "plot",
    "precompute",
    "quickstart",
    "report",
    "search",
    "sigmoid_loss",
    "tokenizer_train",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'siglit' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
