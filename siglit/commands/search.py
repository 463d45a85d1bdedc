"""`siglit search WORDS`: the images whose embeddings are nearest to a sentence."""

from dataclasses import dataclass

import torch

from siglit.config import Experiment
from siglit.errors import UserError
from siglit.evaluation.index import nearest_images
from siglit.runs.trained import open_trained
from siglit.runtime.malloc import reusing_freed_memory


@dataclass(frozen=True)
class SearchResult:
    """The nearest images, best first."""

    query: str
    keys: list[str]
    scores: list[float]
    """Cosines."""
    probabilities: list[float]
    """Sigmoid of the logits: the model's probability that image and query match."""

    def __str__(self) -> str:
        """A line per image."""
        lines = ["cosine  probability  key"]
        images = zip(self.scores, self.probabilities, self.keys, strict=True)
        return "\n".join(lines + [f"{score:6.3f}  {probability:11.4f}  {key}" for score, probability, key in images])


@reusing_freed_memory()
def search(experiment: Experiment, query: str) -> SearchResult:
    """Rank the images of eval.split by their cosine with the query; returns the best eval.top_k.

    Raises:
        UserError: the query is empty or not UTF-8, or cache and checkpoint do not match.
    """
    if not query.strip():
        raise UserError("the query is empty; give words to search for")
    try:
        query.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            "the query is not UTF-8; set the terminal to UTF-8, or convert the query (iconv -t utf-8)"
        ) from error
    trained = open_trained(experiment)
    ztxt = trained.encode_text([query], quiet=True)
    scores, rows = nearest_images(trained.ensure_exact_index(), ztxt, experiment.eval.top_k)
    logits = trained.logit_scale * scores[0] + trained.logit_bias
    return SearchResult(
        query=query,
        keys=[trained.cache.keys[int(row)] for row in rows[0]],
        scores=[float(s) for s in scores[0]],
        probabilities=torch.from_numpy(logits).sigmoid().tolist(),  # numpy's exp would overflow for large t
    )
