"""SigLiT: sigmoid-loss locked-image tuning from cached image embeddings (arXiv:2303.15343).

    experiment = siglit.load_experiment("experiment.yaml", **{"optim.lr": 1e-3})
    siglit.precompute(experiment)
    siglit.train(experiment)
    print(siglit.eval_retrieval(experiment))

Every command of the command line is a function of the same name; it returns a result dataclass, raises UserError or
CacheError on bad input, and neither prints nor exits. Names are imported on first use, so `import siglit` loads no
torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # `X as X` exports X to type checkers
    from siglit.cache import CacheError as CacheError
    from siglit.cache import CacheWriter as CacheWriter
    from siglit.cache import EmbeddingCache as EmbeddingCache
    from siglit.commands.cache import cache_info as cache_info
    from siglit.commands.cache import cache_merge as cache_merge
    from siglit.commands.cache import cache_skipped as cache_skipped
    from siglit.commands.cache import cache_verify as cache_verify
    from siglit.commands.cache_exchange import cache_export as cache_export
    from siglit.commands.cache_exchange import cache_import as cache_import
    from siglit.commands.dry_run import dry_run as dry_run
    from siglit.commands.eval_fewshot import eval_fewshot as eval_fewshot
    from siglit.commands.eval_logits import eval_logits as eval_logits
    from siglit.commands.eval_probe import eval_probe as eval_probe
    from siglit.commands.eval_retrieval import eval_retrieval as eval_retrieval
    from siglit.commands.eval_zeroshot import eval_zeroshot as eval_zeroshot
    from siglit.commands.plan import plan as plan
    from siglit.commands.plot import plot as plot
    from siglit.commands.precompute import precompute as precompute
    from siglit.commands.quickstart import quickstart as quickstart
    from siglit.commands.report import report as report
    from siglit.commands.search import search as search
    from siglit.commands.study import study_plan as study_plan
    from siglit.commands.study import study_report as study_report
    from siglit.commands.study import study_run as study_run
    from siglit.commands.tokenizer_train import tokenizer_train as tokenizer_train
    from siglit.commands.train import train as train
    from siglit.config import Experiment as Experiment
    from siglit.errors import UserError as UserError
    from siglit.loss import SigLipLoss as SigLipLoss
    from siglit.loss import sigmoid_loss as sigmoid_loss
    from siglit.parsing.arguments import load_experiment as load_experiment

_MODULES = {
    "CacheError": "siglit.cache",
    "CacheWriter": "siglit.cache",
    "EmbeddingCache": "siglit.cache",
    "Experiment": "siglit.config",
    "SigLipLoss": "siglit.loss",
    "UserError": "siglit.errors",
    "cache_export": "siglit.commands.cache_exchange",
    "cache_import": "siglit.commands.cache_exchange",
    "cache_info": "siglit.commands.cache",
    "cache_merge": "siglit.commands.cache",
    "cache_skipped": "siglit.commands.cache",
    "cache_verify": "siglit.commands.cache",
    "dry_run": "siglit.commands.dry_run",
    "eval_fewshot": "siglit.commands.eval_fewshot",
    "eval_logits": "siglit.commands.eval_logits",
    "eval_probe": "siglit.commands.eval_probe",
    "eval_retrieval": "siglit.commands.eval_retrieval",
    "eval_zeroshot": "siglit.commands.eval_zeroshot",
    "load_experiment": "siglit.parsing.arguments",
    "plan": "siglit.commands.plan",
    "plot": "siglit.commands.plot",
    "precompute": "siglit.commands.precompute",
    "quickstart": "siglit.commands.quickstart",
    "report": "siglit.commands.report",
    "search": "siglit.commands.search",
    "sigmoid_loss": "siglit.loss",
    "study_plan": "siglit.commands.study",
    "study_report": "siglit.commands.study",
    "study_run": "siglit.commands.study",
    "tokenizer_train": "siglit.commands.tokenizer_train",
    "train": "siglit.commands.train",
}
"""{public name: the module that defines it}; the same names as above, at run time."""

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'siglit' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
