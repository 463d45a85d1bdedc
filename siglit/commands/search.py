"""`siglit search WORDS`: the images whose embeddings lie nearest to a sentence."""

from dataclasses import dataclass

import torch

from siglit.config import Experiment
from siglit.errors import UserError
from siglit.evaluation.index import nearest_images
from siglit.runs.trained import open_trained


@dataclass(frozen=True)
class SearchResult:
    """Keys, best first, with cosine and the model's probability that the pair belongs together."""

    query: str
    keys: list[str]
    scores: list[float]
    probabilities: list[float]

    def __str__(self) -> str:
        """A line per answer."""
        lines = ["cosine  probability  key"]
        found = zip(self.scores, self.probabilities, self.keys, strict=True)
        return "\n".join(lines + [f"{score:6.3f}  {probability:11.4f}  {key}" for score, probability, key in found])


def search(experiment: Experiment, query: str) -> SearchResult:
    """Search the cache of eval.split for the query.

    Raises:
        UserError: the query is empty or no text, or cache and checkpoint do not fit each other.
    """
    if not query.strip():
        raise UserError("there is nothing to search for: the query is empty")
    try:
        query.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            "the query is not UTF-8; type it in a terminal that is, or convert it (iconv -t utf-8)"
        ) from error
    trained = open_trained(experiment)
    ztxt = trained.encode_text([query], quiet=True)
    scores, rows = nearest_images(trained.ensure_exact_index(), ztxt, experiment.eval.top_k)
    logits = trained.logit_scale * scores[0] + trained.logit_bias
    return SearchResult(
        query=query,
        keys=[trained.cache.keys[int(row)] for row in rows[0]],
        scores=[float(s) for s in scores[0]],
        probabilities=torch.from_numpy(logits).sigmoid().tolist(),  # exp overflows where t is large
    )
